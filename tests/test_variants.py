"""One teacher at several precisions, image sizes and preprocessings in one cache: each is a teacher of its own."""

import json
import shutil
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import shards, tree_bytes, world_config

from pipeline.cache import Cache
from pipeline.cache.info import cache_info
from pipeline.config import Config
from pipeline.data import index_images
from pipeline.evaluation.learned_from import learned_from
from pipeline.models.loading import LOCAL
from pipeline.outputs.folder import Mode
from pipeline.reports.runs import find_cache, read_runs
from pipeline.stages.cache_teacher import cache_teacher
from pipeline.stages.distill import distill
from pipeline.stages.export import export
from pipeline.stages.inspect import inspect
from pipeline.stages.refine import refine
from pipeline.stages.report import report
from pipeline.stages.verify import verify
from pipeline.sweeps.run import sweep
from pipeline.training.distilling.cached_teachers import open_images
from pipeline.training.refining.stored_refiners import load_refiner, read_refiner
from pipeline.training.run_directory import load_result
from singer.errors import UserError

CPU = torch.device("cpu")
ARCHITECTURE = "vit_tiny_patch16_224"
FITTED = ("refine.cleaner=clip", "distill.epochs=1")


@pytest.fixture(scope="module")
def lighter(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The teacher's weights in a folder that gives another preprocessing."""
    folder = tmp_path_factory.mktemp("lighter") / "teacher"
    shutil.copytree(world / "teacher", folder)
    config = json.loads((folder / "config.json").read_text())
    config["pretrained_cfg"]["mean"] = [0.3, 0.3, 0.3]
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def variant_config(world: Path, lighter: Path, kind: str, *sets: str) -> Config:
    own = {
        "precision": ["cache.precision=bf16"],
        "size": ["teacher.image_size=64"],
        "preprocessing": [f"teacher.name={LOCAL}{lighter}"],
    }
    return world_config(world, *own[kind], *FITTED, *sets)


def add(world: Path, config: Config, place: Path, mode: Mode = "append") -> str:
    """The name of the variant that is added."""
    return cache_teacher(config, shards(world), place, mode).variant


def features(cache: Cache) -> dict[int, torch.Tensor]:
    return cache.features(np.arange(len(cache)), CPU)


def equal(one: dict[int, torch.Tensor], other: dict[int, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(x, other[b]) for b, x in one.items())


@pytest.fixture(scope="module")
def both(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The world's cache and, appended, the same teacher in bf16, with the refiners of both; tests only read it."""
    root = tmp_path_factory.mktemp("both")
    shutil.copytree(world / "cache", root / "cache")
    config = world_config(world, *FITTED)
    refine(config, root / "cache", root / "first")
    half = add(world, world_config(world, "cache.precision=bf16"), root / "cache")
    refine(world_config(world, *FITTED, f"refine.teacher={half}"), root / "cache", root / "half")
    return root


def variants(place: Path) -> list[str]:
    return [teacher.variant for teacher in cache_info(place).teachers]


@pytest.mark.parametrize("kind", ["precision", "size", "preprocessing"])
def test_a_variant_leaves_the_first_as_it_was(world: Path, lighter: Path, tmp_path: Path, kind: str) -> None:
    """Its features, id and refiners; and the variant has those that it has in a cache of its own."""
    place, config = tmp_path / "c", world_config(world, *FITTED)
    shutil.copytree(world / "cache", place)
    before, ids = features(Cache(place)), Cache(place).ids
    refine(config, place, tmp_path / "adapters")
    other = variant_config(world, lighter, kind)
    name = add(world, other, place)
    first = Cache(place)
    assert variants(place) == [first.manifest.teacher.variant, name] and name != first.manifest.teacher.variant
    assert equal(features(first), before) and first.ids == ids

    second = Cache(place, name)
    assert second.manifest.teacher.variant == name
    add(world, other, tmp_path / "alone", "new")
    assert equal(features(second), features(Cache(tmp_path / "alone"))) and second.id == Cache(tmp_path / "alone").id
    assert not equal(features(second), before)

    # What was made of the first goes on with it, and is of no use to the other.
    run = distill(config, place, tmp_path / "run", tmp_path / "adapters")
    (link,) = run.teachers
    assert (link.cache, link.teacher.variant) == (first.id, first.manifest.teacher.variant)
    with pytest.raises(
        UserError, match=f"fitted to features of {link.teacher.variant}, but those of .* are of {name};"
    ):
        load_refiner(tmp_path / "adapters", second)
    chosen = variant_config(world, lighter, kind, f"refine.teacher={name}", f"distill.teacher={name}")
    assert refine(chosen, place, tmp_path / "own").cache == second.id
    assert distill(chosen, place, tmp_path / "raw").teachers[0].cache == second.id


@pytest.mark.parametrize("kind", ["precision", "size", "preprocessing"])
def test_a_name_that_fits_several_lists_them(world: Path, lighter: Path, tmp_path: Path, kind: str) -> None:
    place = tmp_path / "c"
    shutil.copytree(world / "cache", place)
    name = add(world, variant_config(world, lighter, kind), place)
    first = Cache(place).manifest.teacher
    told = {
        "precision": (r"precision no", "precision bf16"),
        "size": (r"image_size 32", "image_size 64"),
        "preprocessing": (rf"name {first.name}, mean \[0\.5.*\]", rf"name {LOCAL}{lighter}, mean \[0\.3.*\]"),
    }[kind]
    names = [ARCHITECTURE, first.weights, first.weights[:6], *([first.name] if kind != "preprocessing" else [])]
    for given in names:
        listed = rf"{first.variant} \({told[0]}\), {name} \({told[1]}\)"
        message = f"has 2 variants of teacher '{given}': {listed}; name one: teacher={first.variant}$"
        with pytest.raises(UserError, match=message):
            Cache(place, given)
    for given in (first.weights[:5], "vit"):
        with pytest.raises(UserError, match="has no features of a teacher .*; it has: "):
            Cache(place, given)


def test_each_command_says_how_to_name_one(world: Path, both: Path, tmp_path: Path) -> None:
    """What the message says works as it is printed, and nothing was written before."""
    place, out = both / "cache", tmp_path / "out"
    ambiguous = world_config(world, *FITTED, f"refine.teacher={ARCHITECTURE}", f"distill.teacher={ARCHITECTURE}")
    first = variants(place)[0]
    with pytest.raises(UserError, match=f"; name one: --set refine.teacher={first}$"):
        refine(ambiguous, place, out)
    with pytest.raises(UserError, match=f"; name one: --set refine.teacher={first}$"):
        inspect(ambiguous, place)
    with pytest.raises(UserError, match=f"; name one: --set distill.teacher={first}$"):
        distill(ambiguous, place, out)
    with pytest.raises(UserError, match=rf"; name one: --set 'distill.teacher=\[null, {first}\]'$"):
        distill(world_config(world, f"distill.teacher=[null, {ARCHITECTURE}]"), [place, place], out)
    assert not out.exists()
    assert refine(world_config(world, *FITTED, f"refine.teacher={first}"), place, out).cache == Cache(place).id
    run = distill(world_config(world, *FITTED, f"distill.teacher=[null, {first}]"), [place, place], tmp_path / "run")
    assert [link.cache for link in run.teachers] == [Cache(place).id] * 2


def test_blocks_of_a_variant(world: Path, lighter: Path, tmp_path: Path) -> None:
    """Each variant has blocks of its own, and those that are added later join the earlier ones."""
    place = tmp_path / "c"
    shutil.copytree(world / "cache", place)
    before = features(Cache(place))
    name = add(world, variant_config(world, lighter, "size", "cache.blocks=[1,3]"), place)
    theirs = features(Cache(place, name))
    assert (Cache(place).blocks, Cache(place, name).blocks) == ((2, 3), (1, 3))
    assert equal(features(Cache(place)), before)
    with pytest.raises(UserError, match=r"has no block 1; add it"):
        Cache(place, blocks=[1])
    add(world, world_config(world, "cache.blocks=[1]"), place)
    grown = Cache(place)
    assert grown.blocks == (1, 2, 3) and equal({b: features(grown)[b] for b in (2, 3)}, before)
    add(world, variant_config(world, lighter, "size", "cache.blocks=[2]"), place)
    assert Cache(place, name).blocks == (1, 2, 3)
    assert equal({b: features(Cache(place, name))[b] for b in (1, 3)}, theirs)
    assert len(variants(place)) == 2


def test_views_of_a_variant(world: Path, lighter: Path, tmp_path: Path) -> None:
    """More views of one variant are not records of the other, until it gets them too."""
    place, sets = tmp_path / "c", ("views.kind=random-resized-crop", "cache.blocks=[3]")
    add(world, world_config(world, *sets), place, "new")
    before = features(Cache(place))
    two = variant_config(world, lighter, "precision", *sets, "views.count=2")
    name = add(world, two, place)
    assert (len(Cache(place)), len(Cache(place, name))) == (100, 200) and equal(features(Cache(place)), before)
    add(world, world_config(world, *sets, "views.count=2"), place)
    assert (len(Cache(place)), len(Cache(place, name))) == (200, 200)
    assert Cache(place).records_key == Cache(place, name).records_key
    assert torch.equal(features(Cache(place))[3][:100], before[3])


def test_a_refiner_belongs_to_one_variant(world: Path, both: Path, tmp_path: Path) -> None:
    place = both / "cache"
    first, half = variants(place)
    assert [read_refiner(both / name).variant for name in ("first", "half")] == [first, half]
    config = world_config(world, *FITTED)
    for adapters, own, other in ((both / "first", first, half), (both / "half", half, first)):
        run = distill(config, place, tmp_path / own, adapters)
        assert run.teachers[0].teacher.variant == own
        assert inspect(config, place, adapters).cache == Cache(place, own).id
        wrong = world_config(world, *FITTED, f"refine.teacher={other}", f"distill.teacher={other}")
        message = (
            f"fitted to features of {own}, but those of .* are of {other}; fit one .* --set refine.teacher={other}$"
        )
        with pytest.raises(UserError, match=message):
            distill(wrong, place, tmp_path / "wrong", adapters)
        with pytest.raises(UserError, match=message):
            inspect(wrong, place, adapters)
    # A cache without the refiner's blocks is not to get them where it is another teacher's.
    place = tmp_path / "c"
    add(world, world_config(world, "cache.precision=bf16", "cache.blocks=[1]"), place, "new")
    for blocks in ([], ["distill.blocks=[1]"]):
        with pytest.raises(UserError, match=f"fitted to features of {first}, but those of {place} are of {half};"):
            distill(world_config(world, *FITTED, *blocks), place, tmp_path / "wrong", both / "first")
    assert not (tmp_path / "wrong").exists()


@pytest.mark.slow
def test_two_caches_of_two_variants(world: Path, both: Path, tmp_path: Path) -> None:
    """Two teachers of one student, whichever caches they are in; refiners in the wrong order are refused."""
    alone, config = tmp_path / "alone", world_config(world, *FITTED)
    half = add(world, world_config(world, "cache.precision=bf16"), alone, "new")
    first = Cache(world / "cache").manifest.teacher.variant
    adapters = [both / "first", both / "half"]
    run = distill(config, [world / "cache", alone], tmp_path / "run", adapters)
    assert [t.teacher.variant for t in run.teachers] == [first, half]
    one = distill(config, [both / "cache"] * 2, tmp_path / "one", adapters)
    assert tree_bytes(one.student) == tree_bytes(run.student)
    raw = world_config(world, *FITTED, f"distill.teacher=[{first}, {half}]")
    two = distill(raw, [both / "cache"] * 2, tmp_path / "raw")
    assert [t.cache for t in two.teachers] == [t.cache for t in run.teachers]
    with pytest.raises(UserError, match=f"fitted to features of {half}, but those of .* are of {first}"):
        distill(config, [world / "cache", alone], tmp_path / "wrong", adapters[::-1])


def test_a_name_that_became_ambiguous_does_not_stop_what_was_begun(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A refiner and a run that were started by a name go on after another variant was added."""
    place = tmp_path / "c"
    shutil.copytree(world / "cache", place)
    sets = ("refine.cleaner=adapter", f"refine.teacher={ARCHITECTURE}", f"distill.teacher={ARCHITECTURE}")
    config = world_config(world, *sets)

    def die(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("pipeline.stages.refine.fit_adapters", die)
        refine(config, place, tmp_path / "adapters")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("pipeline.training.distilling.runs.train", die)
        distill(config, place, tmp_path / "run")
    first = Cache(place).id
    add(world, world_config(world, "cache.precision=bf16"), place)
    assert refine(config, place, tmp_path / "adapters", "resume").cache == first
    assert refine(config, place, tmp_path / "adapters", "resume").cache == first
    assert distill(config, place, tmp_path / "run", mode="resume").teachers[0].cache == first
    with pytest.raises(UserError, match="has 2 variants of teacher"):
        distill(config, place, tmp_path / "new")


def test_evaluate_and_report_open_the_variant_of_the_run(world: Path, tmp_path: Path) -> None:
    """Of two variants, only one has seen the test images."""
    place, test = tmp_path / "c", str(world / "test" / "*.tar")
    config = world_config(world, *FITTED)
    cache_teacher(config, shards(world), place)
    half = cache_teacher(world_config(world, "cache.precision=bf16"), [shards(world), test], place, "append").variant
    seen = world_config(world, *FITTED, f"distill.teacher={half}")
    runs = [distill(config, place, tmp_path / "first"), distill(seen, place, tmp_path / "half")]
    assert [learned_from(run, index_images(test))[0] for run in runs] == ["no", "yes"]
    for run in runs:
        opened = find_cache(read_runs([run.run]), None)
        (link,) = run.teachers
        assert (opened.id, opened.manifest.teacher.variant) == (link.cache, link.teacher.variant)
    page = report([runs[1].run], tmp_path / "half.html", records=8).out.read_text()
    assert f"<code>{half}</code>" in page and f"{len(opened)} records of 140 images" in page
    export(config, runs[1].run, tmp_path / "export", "timm")
    assert f"variant `{half}`" in (tmp_path / "export" / "README.md").read_text()
    with pytest.raises(UserError, match="a report is about one cache; make one for each"):
        find_cache(read_runs([run.run for run in runs]), place)


def test_a_block_is_held_once(world: Path, tmp_path: Path) -> None:
    """Two parts of one variant with the same block of the same records are refused: either might be read."""
    place, config = tmp_path / "c", world_config(world, "cache.blocks=[3]")
    add(world, config, place, "new")
    add(world, world_config(world, "cache.blocks=[2]"), place)
    before = features(Cache(place))
    add(world, world_config(world, "cache.blocks=[2,3]"), place)
    assert not (place / "parts" / "002").exists()
    shutil.copytree(place / "parts" / "001", place / "parts" / "002")
    message = r"c/parts/001 and .*c/parts/002 both hold block 2 of \S+@\w{8} for the same records; remove the second"
    for read in (Cache, partial(verify, config)):
        with pytest.raises(UserError, match=message):
            read(place)
    shutil.rmtree(place / "parts" / "002")
    assert equal(features(Cache(place)), before)


def test_every_variant_is_verified(world: Path, both: Path, tmp_path: Path) -> None:
    """By the teacher's name all of them, by the name of a variant this one; what is damaged of each is repaired."""
    place = tmp_path / "c"
    shutil.copytree(both / "cache", place)
    first, half = variants(place)

    def checked(*sets: str) -> list[bool]:
        result = verify(world_config(world, *sets), place, live=True, sample=8)
        result.check()
        return [part.live is not None for part in result.parts]

    assert checked() == checked(f"teacher.weights={world / 'teacher' / 'model.safetensors'}") == [True, True]
    assert checked(f"teacher.name={first}") == checked("cache.precision=no") == [True, False]
    assert checked(f"teacher.name={half}") == checked("cache.precision=bf16") == [False, True]
    whole = tree_bytes(place)
    for part in (place, place / "parts" / "001"):
        next(file for file in (part / "features" / "2").rglob("0") if file.is_file()).write_bytes(b"")
    assert verify(world_config(world), place, repair=True, sample=8).whole
    assert tree_bytes(place) == whole


@pytest.mark.slow
def test_sweep_over_variants(world: Path, both: Path, tmp_path: Path) -> None:
    """Each refiner is fitted to the variant that its students learn from; an ambiguous name is refused at once."""
    place = both / "cache"
    file = tmp_path / "s.yaml"
    base = world_config(world, *FITTED).model_dump(mode="json")
    grid = {"distill.teacher": variants(place)}
    file.write_text(json.dumps({"base": base, "grid": grid, "runs": [{"set": {"refiner": "none"}}, {"name": "clip"}]}))
    result = sweep(file, place, tmp_path / "sweep")
    assert (result.done, result.failed) == (4, {})
    taught = [load_result(folder).teachers[0].teacher for folder in sorted((tmp_path / "sweep" / "runs").iterdir())]
    assert sorted(t.variant for t in taught) == sorted(variants(place) * 2)
    fitted = [read_refiner(folder).variant for folder in (tmp_path / "sweep" / "refiners").iterdir()]
    assert sorted(v or "" for v in fitted) == sorted(variants(place))
    assert sweep(file, place, tmp_path / "sweep", "resume").done == 4
    for key in ("distill.teacher", "refine.teacher"):
        file.write_text(json.dumps({"base": base, "grid": {key: [ARCHITECTURE]}}))
        with pytest.raises(
            UserError, match=rf"has 2 variants of .*; name one: {key}: {variants(place)[0]} in s\.yaml$"
        ):
            sweep(file, place, tmp_path / "never")
    assert not (tmp_path / "never").exists()


@pytest.mark.parametrize("kinds", [("uint8", "uint8"), ("jpeg", "uint8")])
def test_each_part_stores_views_at_its_own_size(
    world: Path, lighter: Path, tmp_path: Path, kinds: tuple[str, str]
) -> None:
    """Students see the same images, whichever variant's part stored the views."""
    place, some = tmp_path / "c", str(world / "train" / "*000000.tar")
    small = [world_config(world, "cache.blocks=[3]", f"views.pixels={kind}") for kind in kinds]
    large = variant_config(world, lighter, "size", "cache.blocks=[3]", f"views.pixels={kinds[1]}")
    cache_teacher(small[0], some, place)
    cache_teacher(large, shards(world), place, "append")
    cache_teacher(small[1], shards(world), place, "append")
    cache, whole, records = Cache(place), Cache(world / "cache"), [99, 0, 31, 5]
    assert cache.has_pixels and cache.index.images.keys[99] == whole.index.images.keys[99]
    with open_images(whole) as files:
        drawn = whole.pixels(records, 32, files).float()
    assert (cache.pixels(records, 32).float() - drawn).abs().mean() < 0.1 * drawn.std()
