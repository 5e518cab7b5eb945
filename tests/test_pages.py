"""The text of the pages: every link leads somewhere, every quoted error is one that the code prints, lists are whole.

Blocks of code are for test_docs.py.
"""

import ast
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml
from pages import DOCUMENTS, HABITS, PAGES, ROOT, name_of, place_of
from test_structure import FLOORS

import cli
from pipeline.config import Config

SECTIONS = "|".join(Config.model_fields)


# The other two name Python objects and keys of the manifest.
@pytest.mark.parametrize("page", [p for p in PAGES if p.name not in ("python.md", "cache-format.md")], ids=name_of)
def test_keys_in_the_text_exist(page: Path) -> None:
    """`section.key` and `section.key=value` wherever they are quoted."""
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    for quoted in re.findall(r"`([^`\n]+)`", text):
        for section, key in re.findall(rf"(?:^|--set |')({SECTIONS})\.([a-z_]+)(?![\w(/])", quoted):
            if key not in ("py", "yaml", "json", "shard"):  # files, and names in the format
                assert key in getattr(Config(), section).model_dump(), f"{page.name}: {section}.{key}"


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_commands_in_the_text_exist(page: Path) -> None:
    """`singer COMMAND ... --option`, perhaps without what it needs."""
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    for quoted in re.findall(r"`singer ([^`\n]+)`", text):
        command: Any = typer.main.get_command(cli.app)
        words = quoted.split()
        while hasattr(command, "commands") and words and words[0] in command.commands:
            command = command.commands[words.pop(0)]
        assert not hasattr(command, "commands"), f"{page.name}: singer {quoted}"
        known = {option for p in command.params for option in p.opts}
        assert {w for w in words if w.startswith("--")} <= known, f"{page.name}: singer {quoted}"


def slug(heading: str) -> str:
    """The anchor that GitHub makes of a heading."""
    text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).replace("`", "").strip().lower()
    return re.sub(r"[^\w\- ]", "", text).replace(" ", "-")


def anchors(page: Path) -> set[str]:
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    return {slug(h) for h in re.findall(r"^#+ (.*)$", text, re.MULTILINE)}


@pytest.mark.parametrize("page", DOCUMENTS, ids=place_of)
def test_links_lead_somewhere(page: Path) -> None:
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"https?://", link):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), f"{page.name}: {link}"
        assert not anchor or anchor in anchors(target), f"{page.name}: {link}"


def test_every_page_is_found_from_the_readme() -> None:
    text = (ROOT / "README.md").read_text()
    assert not [place_of(p) for p in (*PAGES[1:], *HABITS) if f"({place_of(p)})" not in text]


def test_every_page_is_found_in_the_site() -> None:
    """And in the list of pages; `mkdocs build --strict` itself, which `make docs` runs, checks links and names."""
    groups = yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"]
    listed = [page for group in groups for pages in group.values() for page in pages]
    wanted = [page for page in DOCUMENTS if not page.is_relative_to(ROOT / ".github")]
    assert sorted(listed) == sorted(map(place_of, wanted))
    text = (ROOT / "docs" / "README.md").read_text()
    assert not [p.name for p in PAGES[1:] if p.name != "README.md" and f"({p.name})" not in text]


@pytest.mark.parametrize("page", DOCUMENTS, ids=place_of)
def test_paths_in_the_text_exist(page: Path) -> None:
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    paths = re.findall(r"`((?:benchmarks|configs|data|docs|pipeline|singer|tests)/[\w./-]*)`", text)
    assert not [path for path in paths if not (ROOT / path).exists()]


@pytest.mark.parametrize("page", DOCUMENTS, ids=place_of)
def test_nobody_is_sent_to_a_strangers_package(page: Path) -> None:
    """`singer` on the package index is not ours."""
    assert not re.search(r"pip3? install [^\n`]*\bsinger(?!-vit)\b", page.read_text())


def test_figures_of_the_limits_are_those_of_the_results() -> None:
    def numbers(page: str) -> set[str]:
        return set(re.findall(r"\d+(?:[.,]\d+)*", (ROOT / "docs" / page).read_text()))

    assert numbers("limits.md") <= numbers("results.md")


def test_contributing_lists_the_floors() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text()
    listed = text[text.index("<!-- floors: begin -->") : text.index("<!-- floors: end -->")]
    assert [set(re.findall(r"`(\w+)`", line)) for line in listed.splitlines()[1:] if line] == FLOORS


def test_the_habits_of_the_project_fit_it() -> None:
    """Versions agree, hosted checks call what the Makefile has, and forms are whole."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert (citation["version"], citation["license"]) == (project["version"], project["license"])
    assert "## Unreleased" in (ROOT / "CHANGELOG.md").read_text()
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())
    commands = [step["run"] for job in workflow["jobs"].values() for step in job["steps"] if "run" in step]
    assert commands == ["make check", "make docs"]
    for form in (ROOT / ".github" / "ISSUE_TEMPLATE").glob("*_*.yml"):
        fields = yaml.safe_load(form.read_text())
        assert {"name", "description", "body"} <= set(fields) and all("type" in part for part in fields["body"])
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    assert {hook["id"] for repo in hooks for hook in repo["hooks"]} == {"ruff-check", "ruff-format", "mypy"}


def messages() -> Iterator[str]:
    """Every string in the code, with "\\0" where a value goes."""
    for file in [ROOT / "cli.py", *(ROOT / "pipeline").rglob("*.py"), *(ROOT / "singer").rglob("*.py")]:
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.JoinedStr):
                yield "".join(str(v.value) if isinstance(v, ast.Constant) else "\0" for v in node.values)
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield node.value


def test_errors_in_troubleshooting_are_those_of_the_code() -> None:
    """A message in a heading, `...` for its values, is one that the code prints, in whole or in a part."""
    quoted = re.findall(r"^#+ .*?`([^`]{12,})`", (ROOT / "docs" / "troubleshooting.md").read_text(), re.MULTILINE)
    assert len(quoted) > 15
    known = list(messages())
    for message in quoted:
        # What is quoted by !r has no quotes in the code.
        pieces = message.replace("'...'", "...").split("...")
        pattern = re.compile(".*".join(map(re.escape, pieces)), re.DOTALL)
        assert any(pieces[0] in text and pattern.search(text) for text in known), message


def test_tests_of_the_page_of_requests_exist() -> None:
    text = (ROOT / "docs" / "requests.md").read_text()
    cited = re.findall(r"`(tests/\w+\.py)`(?: \(([^)]*)\))?", text)
    assert len(cited) > 15
    for file, names in cited:
        source = (ROOT / file).read_text()
        for name in re.findall(r"`(\w+)`", names):
            assert f"def {name}(" in source, (file, name)
    rows = [line for line in text.splitlines() if line.startswith("| ") and "---" not in line][1:]
    for row in rows:
        assert re.search(r"\| (\*\*Yes\*\*|\*\*No\*\*|\*Partly\*)", row), row
        assert "**Yes**" not in row or "tests/" in row, row
