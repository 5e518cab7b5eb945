"""No test draws from a seed of its own: all derive from SINGER_TEST_SEED, so that the suite can be run with others."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import SETTINGS, seeded

TESTS = sorted(Path(__file__).parent.glob("test_*.py"))
MAKERS = {"default_rng", "manual_seed", "Random", "RandomState"}


def seeds(tree: ast.AST) -> Iterator[ast.expr]:
    """What generators are made from, and scikit-learn's random_state."""
    for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
        name = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
        if name in MAKERS:
            yield from call.args
        yield from (word.value for word in call.keywords if word.arg == "random_state")


def derives(seed: ast.expr) -> bool:
    return isinstance(seed, ast.Call) and getattr(seed.func, "id", "") == "seeded"


@pytest.mark.parametrize("file", TESTS, ids=lambda file: file.stem)
def test_seeds_derive_from_one(file: Path) -> None:
    wrong = [seed.lineno for seed in seeds(ast.parse(file.read_text())) if not derives(seed)]
    assert not wrong, f"{file.name}: lines {wrong} make a generator from something else than seeded(...)"


def test_a_seed_of_its_own_is_found() -> None:
    for line in ("np.random.default_rng(3)", "torch.manual_seed(seed)", "f(x, random_state=0)"):
        (seed,) = seeds(ast.parse(line))
        assert not derives(seed)
    assert list(seeds(ast.parse("np.random.default_rng()"))) == []
    (seed,) = seeds(ast.parse("torch.Generator().manual_seed(seeded(1))"))
    assert derives(seed)


def test_stages_and_hypothesis_have_it_too(pytestconfig: pytest.Config) -> None:
    assert {f"{section}.seed={seeded(0)}" for section in ("refine", "distill", "evaluate")} <= set(SETTINGS)
    assert pytestconfig.getoption("--hypothesis-seed") is not None  # conftest's, or another from the command line
    assert [seeded(n) - seeded(0) for n in (1, 99)] == [1, 99]
