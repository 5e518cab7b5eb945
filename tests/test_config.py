"""The configuration tree: layering, validation, recipes."""

from pathlib import Path

import pytest
import yaml

from pipeline.config import Config, Section, dump_config, keys, load_config, meta, read_dumped, recipes, section_of
from pipeline.config.load import read_yaml
from pipeline.config.reference import as_markdown, as_yaml
from pipeline.sweeps.file import read_plan
from singer.errors import UserError


def test_layers(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("refine: {rank: 8, steps: 9}\ndistill: {lr: 0.5}\n")
    config = load_config(file, ["refine.rank=32"], {"refine.steps": 7, "distill.epochs": None})
    assert (config.refine.rank, config.refine.steps, config.distill.lr) == (32, 7, 0.5)
    assert config.distill.epochs == Config().distill.epochs


def test_another_student_has_its_own_shape() -> None:
    """By name alone, on a recipe; what the user gives beside it stays, and so does the rest of the section."""
    recipe = "tinyimagenet-ti-to-w96"
    assert load_config(recipe, ["student.name=vit"]).student == load_config(recipe).student
    for config in (
        load_config(recipe, options={"student.name": "vit_tiny_patch16_224"}),
        load_config(recipe, ["student.name=vit_tiny_patch16_224"]),
    ):
        assert config.student == Config().student.model_copy(update={"name": "vit_tiny_patch16_224"})
        assert config.distill == load_config(recipe).distill
    tree = {"student": {"dim": 96, "drop_path": 0.1}, "distill": None}
    config = load_config(tree, ["student.patch_size=8", "student.name=vit_tiny_patch16_224", "distill.epochs=3"])
    assert (config.student.dim, config.student.patch_size, config.student.drop_path) == (None, 8, 0.1)
    assert tree == {"student": {"dim": 96, "drop_path": 0.1}, "distill": None}


def test_yaml_quirks(tmp_path: Path) -> None:
    assert load_config(sets=["cache.precision=no"]).cache.precision == "no"
    (tmp_path / "c.yaml").write_text("refine:\ndistill: {lr: 1e-3}\n")
    assert load_config(tmp_path / "c.yaml").distill.lr == 1e-3


@pytest.mark.parametrize(
    ("key", "text", "value"),
    [
        ("distill.epochs", "010", 10),
        ("distill.epochs", "+08", 8),
        ("distill.epochs", "1_000", 1000),
        ("distill.lr", "010", 10.0),
        ("distill.lr", "1_0.5e-1", 1.05),
        ("student.image_size", "0224", 224),
        ("distill.blocks", "[08, 011]", (8, 11)),
        ("student.pretrained", "yes", True),
        ("distill.compile", "off", False),
        ("distill.precision", "no", "no"),
        *(("student.name", text, text) for text in ("no", "on", "010", "1:30", "2024-01-05", "1_000", "0x10")),
        ("student.name", "'1'", "1"),
        ("distill.trackers", "[no, 010]", ("no", "010")),
        ("distill.teacher", "~", None),
    ],
)
def test_what_is_written_is_read_as_the_key_takes_it(key: str, text: str, value: object, tmp_path: Path) -> None:
    """A number as people read it, and a name as it is written; in a file as on the command line, and when dumped."""
    section, _, name = key.partition(".")
    (tmp_path / "c.yaml").write_text(f"{section}:\n  {name}: {text}\n")
    configs = [load_config(tmp_path / "c.yaml"), load_config(sets=[f"{key}={text}"])]
    (tmp_path / "d.yaml").write_text(dump_config(configs[0]))
    for config in [*configs, load_config(tmp_path / "d.yaml")]:
        assert getattr(getattr(config, section), name) == value


@pytest.mark.parametrize("text", ["0o10", "0x10", "1:30", "1__0", "2024-01-05"])
def test_a_number_in_another_notation_is_an_error(text: str, tmp_path: Path) -> None:
    message = f"distill.epochs: input should be a valid integer, unable to parse string as an integer, got '{text}'"
    (tmp_path / "c.yaml").write_text(f"distill: {{epochs: {text}}}\n")
    for read in (lambda: load_config(tmp_path / "c.yaml"), lambda: load_config(sets=[f"distill.epochs={text}"])):
        with pytest.raises(UserError) as error:
            read()
        assert str(error.value) == f"configuration: {message}; distill.epochs takes integer ≥ 1"


def test_dump_reads_back(tmp_path: Path) -> None:
    config = load_config(sets=["cache.blocks=[8,11]", "teacher.weights=/a/b.pth", "evaluate.strengths=[1.0]"])
    (tmp_path / "c.yaml").write_text(dump_config(config))
    assert load_config(tmp_path / "c.yaml") == config


def test_what_was_dumped_is_read_alone() -> None:
    """Also what a stranger has put in its place, however deep it nests."""
    config = load_config(sets=["teacher.name='010'", "distill.lr=1e-3", "student.name='no'"])
    assert read_dumped(dump_config(config).encode()) == config.model_dump(mode="json")
    for text in (b"[" * 200_000, b"- " * 200_000, b"{a: " * 200_000):
        with pytest.raises(RecursionError):
            read_dumped(text)
    with pytest.raises(yaml.YAMLError):
        read_dumped(b"a: [\xff")


@pytest.mark.parametrize("name", recipes())
def test_recipes_load(name: str) -> None:
    load_config(name)


def test_recipes_cover_the_paper() -> None:
    wanted = {
        "demo",
        "tinyimagenet-ti-to-w96",
        "vit-l-to-ti",
        "vit-l-to-s",
        "deit3-l-to-b",
        "deit3-s-to-ti",
        "dinov2-l-to-s",
    }
    assert wanted <= set(recipes())


@pytest.mark.parametrize(
    ("sets", "message"),
    [
        (["refine.rnak=3"], "unknown key 'refine.rnak'; did you mean 'refine.rank'?"),
        (["cache.on_error=skip"], "unknown key 'cache.on_error'; did you mean 'data.on_error'?"),
        (["distil.lr=1"], "unknown key 'distil'; did you mean 'distill'?"),
        (["refine.rank=0"], "refine.rank: input should be greater than or equal to 1, got 0"),
        (["distill.lr=fast"], "got 'fast'; distill.lr takes number > 0 or auto"),
        (["distill.objective={mse: x}"], "distill.objective takes text or names with number > 0 or list of"),
        (["distill.objective={}"], "distill.objective: input should be a valid string, got {}"),
        (["finetune.randaugment=2"], "finetune.randaugment takes [integer ≥ 1, number ≥ 0 ≤ 10] or null"),
        (["distill.trained=blocks"], "distill.trained: input should be a valid list, got 'blocks'"),
        (["distill.trained=[]"], "distill.trained: list should have at least 1 item"),
        (["distill.blocks=[]"], "distill.blocks: list should have at least 1 item"),
        (["cache.blocks=8,11"], "cache.blocks takes list of integer or null, in brackets: [8,11]"),
        (["distill.blocks=[[]]"], "distill.blocks takes list of integer or list of"),
        (["distill.mask_weight=2"], "distill.mask_weight: 2 is about masked patches; mask some"),
        (["finetune.kd_weight=1"], "finetune.kd_weight: 1 is the share of a teacher, and none takes part"),
        (["student.init_blocks=even", "student.init=random"], "student.init_blocks: even chooses among blocks"),
        (["student.init_blocks=even", "student.pretrained=true"], "student.init_blocks: even chooses among blocks"),
        (["rank=3"], "give section.key"),
        (["refine.rank"], "--set takes section.key=value"),
        (["refine.rank=[1"], "is not a YAML value"),
    ],
)
def test_mistakes_are_named(sets: list[str], message: str) -> None:
    with pytest.raises(UserError) as error:
        load_config(sets=sets)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_file_mistakes(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file, nor a recipe among"):
        load_config(tmp_path / "none.yaml")
    bad = tmp_path / "bad.yaml"
    bad.write_text("teacher:\n  image_size: 64\ncache:\n  blocks: [8, 11\n")
    with pytest.raises(UserError, match=r"not YAML \(.* in line 5\)"):
        load_config(bad)
    bad.write_text("teacher: vit_tiny\n")
    with pytest.raises(
        UserError, match="teacher: a section has keys below it, as in --set teacher.KEY=VALUE; got 'vit"
    ):
        load_config(bad)
    bad.write_text("- 1\n")
    with pytest.raises(UserError, match="expected sections"):
        load_config(bad)


SECTIONS = [pytest.param(section_of(Config, name), id=name) for name in Config.model_fields]


@pytest.mark.parametrize("section", SECTIONS)
def test_every_key_says_what_it_is_and_what_it_affects(section: type[Section]) -> None:
    for name, _ in keys(section):
        assert len(section.model_fields[name].description or "") > 8, name


def test_a_key_that_says_nothing_is_found() -> None:
    class Silent(Section):
        said_nothing: int = 1

    with pytest.raises(TypeError, match="said_nothing does not say what it affects"):
        meta(Silent, "said_nothing")


@pytest.mark.parametrize("recipe", [None, *recipes()])
def test_what_config_prints_reads_back(recipe: str | None, tmp_path: Path) -> None:
    config = load_config(recipe, ["distill.lr=0.00001", "distill.trackers=[]", "refine.teacher='ü: #'"])
    file = tmp_path / "all.yaml"
    file.write_text(as_yaml(config))
    assert load_config(file) == config
    assert all(
        f"  {name}: " in file.read_text() for s in Config.model_fields for name, _ in keys(section_of(Config, s))
    )


def test_the_page_is_that_of_the_code() -> None:
    """Write it anew by `singer config --markdown > docs/configuration.md`."""
    assert (Path(__file__).parent.parent / "docs" / "configuration.md").read_text() == as_markdown()


# Settings that cannot work together


@pytest.mark.parametrize(
    ("sets", "message"),
    [
        (["distill.epochs=4", "distill.warmup_epochs=5"], "distill.warmup_epochs: a warm-up of 5 of 4 epochs never"),
        (["distill.epochs=1", "distill.warmup_epochs=1"], r"never reaches .* \(--set distill\.warmup_epochs=0\.05\)"),
        (
            ["distill.batch_size=8", "distill.accumulate=9"],
            "distill.accumulate: a batch of 8 records cannot have 9 parts",
        ),
        (["distill.read_block=64", "distill.shuffle_window=32"], "distill.read_block: 64 neighbouring records are"),
        (
            ["views.count=2"],
            r"configuration: views\.count: center views are all alike; .* \(--set views\.kind=random-resized-crop\)",
        ),
    ],
)
def test_settings_that_cannot_work_together(sets: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        load_config(sets=sets)
    assert "\n" not in str(error.value)


def test_a_remedy_works_as_printed() -> None:
    for epochs in (1, 3, 100):
        with pytest.raises(UserError) as error:
            load_config(sets=[f"distill.epochs={epochs}", f"distill.warmup_epochs={epochs + 1}"])
        remedy = str(error.value).split("--set ")[1].split(")")[0]
        assert load_config(sets=[f"distill.epochs={epochs}", remedy]).distill.warmup_epochs == pytest.approx(
            0.05 * epochs
        )


def test_a_key_that_is_there_twice(tmp_path: Path) -> None:
    """PyYAML would take the last one; a sweep's file is read in the same way."""
    (tmp_path / "a.yaml").write_text("distill: {epochs: 1}\nstudent:\n  dim: 24\n  depth: 2\n  dim: 48\n")
    with pytest.raises(UserError, match=r"a.yaml: not YAML \('dim' is there twice, again in line 5\)"):
        load_config(tmp_path / "a.yaml")
    with pytest.raises(UserError, match="'dim' is there twice"):
        read_plan(tmp_path / "a.yaml")
    # Merged maps may say a key again, and a number is not its text.
    (tmp_path / "a.yaml").write_text("distill: &sub {<<: {epochs: 2, batch_size: 4}, epochs: 1}\nstudent: {dim: 24}\n")
    assert load_config(tmp_path / "a.yaml").distill.epochs == 1
    assert read_yaml("base: &base {sub: &sub {<<: {q: 1, x: 2}, x: 1}}\nb: {<<: *sub}\n1: a\n'1': b\n") == {
        "base": {"sub": {"q": 1, "x": 1}},
        "b": {"q": 1, "x": 1},
        1: "a",
        "1": "b",
    }


@pytest.mark.parametrize("name", ["2024-01-05", "2024", "0123", "1.5", "yes", "true"])
def test_a_name_that_yaml_reads_otherwise(name: str, tmp_path: Path) -> None:
    """In a file, only what is plainly a number or a truth value needs quotes."""
    config = load_config(None, [f"student.init={name}", f"evaluate.features={name}", f"distill.teacher={name}"])
    assert (config.student.init, config.evaluate.features, config.distill.teacher) == (name, Path(name), name)
    file = tmp_path / "config.yaml"
    file.write_text(f"student:\n  init: {name}\n")
    if name in ("2024", "1.5", "true"):
        with pytest.raises(UserError, match="got .*; a name is put in quotes"):
            load_config(file)
    else:
        assert load_config(file).student.init == name
    file.write_text(f"student:\n  init: '{name}'\n")
    assert load_config(file).student.init == name


def test_lists_and_null_of_a_key_that_takes_a_name() -> None:
    config = load_config({"evaluate": {"features": "x"}}, ["evaluate.features=null", "distill.teacher=[a, null]"])
    assert config.evaluate.features is None
    assert config.distill.teacher == ("a", None)


def test_home_folders(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    config = load_config({"evaluate": {"class_map": "~/map"}}, ["evaluate.features=~/f"], {"teacher.weights": "~/w"})
    assert config.evaluate.class_map == Path("/home/me/map")
    assert (config.evaluate.features, config.teacher.weights) == (Path("/home/me/f"), Path("/home/me/w"))
    with pytest.raises(UserError, match="features: there is no such user, or no home folder, got '~nobody-of-this"):
        load_config(None, ["evaluate.features=~nobody-of-this-name/f"])


def test_a_variant_that_is_given_wins_over_the_whole_of_the_files() -> None:
    whole = load_config().model_dump(mode="json")
    assert (
        load_config(whole, options={"refine.variant": "paper"}).refine
        == load_config(None, ["refine.variant=paper"]).refine
    )
    kept = load_config({"refine": {"variant": "paper", "rank": 8, "steps": 5}}, ["refine.variant=paper"])
    assert (kept.refine.rank, kept.refine.steps) == (8, 5)
    other = load_config({"refine": {"rank": 8, "steps": 5}}, ["refine.variant=paper", "refine.lr=1e-4"])
    assert (other.refine.rank, other.refine.steps, other.refine.lr) == (8, 5, 1e-4)
    meant = load_config({"refine": {"rank": 16}}, ["refine.variant=paper"])  # the default, but somebody wrote it
    assert meant.refine.rank == 16
    recipe = load_config("vit-l-to-ti", ["refine.variant=singer"]).refine
    assert (recipe.rank, recipe.start, recipe.normaliser) == (16, "identity", "standardize")
    changed = load_config(whole | {"refine": whole["refine"] | {"rank": 8}}, options={"refine.variant": "paper"})
    assert changed.refine == load_config(None, ["refine.variant=paper", "refine.rank=8"]).refine
