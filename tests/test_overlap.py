"""Targets from other views of the same image: places, averages, choice of the views, losses, and what is refused."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import config_with, seeded, world_config
from torch import Tensor

from pipeline.cache import Cache
from pipeline.config import Config
from pipeline.data.sampler import BatchIndices, batch_index_lists
from pipeline.runtime.devices import make_accelerator
from pipeline.stages.cache_teacher import cache_teacher
from pipeline.stages.distill import distill
from pipeline.stages.refine import refine
from pipeline.training.batch import Batch, BatchLoader
from pipeline.training.distilling.cached_teachers import open_teachers
from pipeline.training.distilling.runs import NewStudent, StudentSpec
from pipeline.training.other_views import OtherViews
from pipeline.training.run_log import read_log
from singer.backbones import block_outputs
from singer.errors import UserError
from singer.objectives import OBJECTIVES, ObjectiveContext, Tokens
from singer.overlap import average_overlap, resample_overlap
from singer.tokens import resize_tokens

Box = tuple[float, float, float, float, float]
WHOLE: Box = (0, 0, 1, 1, 0)


def pair(own: Box, other: Box) -> Tensor:
    return torch.tensor([own, other]).unsqueeze(0)


def centres(view: Box, grid: tuple[int, int]) -> Tensor:
    """Where in the image the centres of a view's patches are, (rows · columns, 2) of (x, y)."""
    left, upper, right, lower, flip = view
    rows, columns = grid
    places = []
    for row in range(rows):
        for column in range(columns):
            x = (column + 0.5) / columns
            x = 1 - x if flip else x
            places.append((left + x * (right - left), upper + (row + 0.5) / rows * (lower - upper)))
    return torch.tensor(places)


@pytest.mark.parametrize("target", [(3, 4), (6, 8), (9, 5), (12, 16)], ids=str)
def test_the_same_view_is_resized_as_any_tokens_are(target: tuple[int, int]) -> None:
    patches = torch.randn(2, 48, 5, generator=torch.Generator().manual_seed(seeded(0)))
    found, shown = resample_overlap(patches, (6, 8), pair(WHOLE, WHOLE).expand(2, -1, -1), target)
    assert torch.allclose(found, resize_tokens(patches, 0, (6, 8), target), atol=1e-5) and shown.all()


@pytest.mark.parametrize("flips", [(0, 0), (0, 1), (1, 0), (1, 1)], ids=str)
def test_views_that_are_whole_patches_apart_share_their_patches(flips: tuple[int, int]) -> None:
    """Of an image of 10 x 12 patches, one view shows 6 x 8 of them, and the other one those 2 below and 3 beside."""
    grid = (6, 8)
    own, other = (1 / 12, 1 / 10, 9 / 12, 7 / 10, flips[0]), (4 / 12, 3 / 10, 1.0, 9 / 10, flips[1])
    image = torch.randn(10, 12, 3, generator=torch.Generator().manual_seed(seeded(1)))
    seen = [image[1:7, 1:9], image[3:9, 4:12]]
    mine, theirs = (view.flip(1) if flip else view for view, flip in zip(seen, flips, strict=True))
    found, shown = resample_overlap(theirs.reshape(1, 48, 3), grid, pair(own, other), grid)
    both = torch.zeros(6, 8, dtype=torch.bool)
    both[2:, 3:] = True
    both = both.flip(1) if flips[0] else both
    assert torch.equal(shown[0], both.flatten())
    assert torch.allclose(found[0][both.flatten()], mine.reshape(48, 3)[both.flatten()], atol=1e-5)


def test_a_linear_picture_stays_where_it_is() -> None:
    """The other view is larger, so that each place is between four of its patches; rectangular grids, both mirrored."""
    own, other = (0.31, 0.42, 0.7, 0.65, 1.0), (0.1, 0.2, 0.9, 0.95, 1.0)
    places, there = centres(own, (5, 7)), centres(other, (6, 9))
    found, shown = resample_overlap(there.unsqueeze(0), (6, 9), pair(own, other), (5, 7))
    assert shown.all() and torch.allclose(found[0], places, atol=1e-5)


def test_a_patch_is_shown_if_its_centre_is_in_both() -> None:
    rng = np.random.default_rng(seeded(2))
    corners = rng.uniform(0, 0.5, (50, 2, 2))
    edges = np.concatenate([corners, corners + rng.uniform(0.1, 0.5, (50, 2, 2))], 2)
    views = torch.tensor(np.concatenate([edges, rng.integers(0, 2, (50, 2, 1))], 2), dtype=torch.float32)
    found, shown = resample_overlap(torch.ones(50, 20, 1), (4, 5), views, (6, 7))
    assert torch.allclose(found, torch.ones_like(found)) and 0 < shown.float().mean() < 1
    for view, own in zip(views.tolist(), shown, strict=True):
        left, upper, right, lower, _ = view[1]
        x, y = centres(tuple(view[0]), (6, 7)).T
        assert torch.equal(own, (x >= left) & (x <= right) & (y >= upper) & (y <= lower))


def random_views(images: int, views: int, seed: int) -> Tensor:
    """Places of random views of some images, (images, views, 5), a quarter to three quarters of a side long."""
    rng = np.random.default_rng(seeded(seed))
    sides = rng.uniform(0.25, 0.75, (images, views, 2))
    corners = rng.uniform(0, 1, (images, views, 2)) * (1 - sides)
    edges = np.concatenate([corners, corners + sides, rng.integers(0, 2, (images, views, 1))], 2)
    return torch.tensor(edges, dtype=torch.float32)


def test_averages_of_a_linear_field_are_the_field() -> None:
    """Views are of random sizes and mirrored: each place is taught what is there, whichever views show it."""
    grid, places = (7, 9), random_views(60, 4, 7)
    # Channels: the places (x, y) themselves. The first view's are the field; CLS says which view it is.
    fields = torch.stack([torch.stack([centres(tuple(v), grid) for v in of]) for of in places.tolist()])
    cls = torch.arange(4.0).expand(60, 4)[..., None, None].expand(-1, -1, 1, 2)
    tokens = torch.cat([cls, fields], 2)
    found = average_overlap(tokens.transpose(0, 1).flatten(0, 1), 1, grid, places)
    assert torch.equal(found[:, 0], torch.zeros(60, 2))
    # At the edge of a view and between larger patches, interpolation errs by up to half a patch of the coarsest view.
    patch = ((places[..., 2:4] - places[..., :2]).amax(1) / torch.tensor([9.0, 7.0])).unsqueeze(1)
    errors = (found[:, 1:] - fields[:, 0]).abs()
    assert (errors <= 0.5 * patch + 1e-5).all() and 0 < errors.mean() < 0.02


def test_noise_of_averages_falls_with_the_views_that_show_a_place() -> None:
    """Views are whole patches apart, so that nothing is interpolated: n views that show a place leave 1/n of noise."""
    rng, grid, images, side = np.random.default_rng(seeded(8)), (6, 6), 200, 10
    corners = rng.integers(0, side - 5, (images, 4, 2))
    edges = np.concatenate([corners, corners + 6], 2) / side
    places = torch.tensor(np.concatenate([edges, rng.integers(0, 2, (images, 4, 1))], 2), dtype=torch.float32)
    noise = torch.randn(4 * images, 36, 8, generator=torch.Generator().manual_seed(seeded(9)))
    shown = torch.ones(images, 36)
    for view in (1, 2, 3):
        shown += resample_overlap(noise[:images], grid, places[:, [0, view]], grid)[1]
    found = average_overlap(noise, 0, grid, places)
    for count in (1, 2, 3, 4):
        assert found[shown == count].square().mean().item() == pytest.approx(1 / count, rel=0.08)


def test_views_that_share_no_place_keep_their_tokens() -> None:
    left, right, below = (0.0, 0.0, 0.4, 0.5, 0.0), (0.5, 0.0, 1.0, 0.5, 1.0), (0.0, 0.6, 0.4, 1.0, 0.0)
    tokens = torch.randn(6, 21, 3, generator=torch.Generator().manual_seed(seeded(10)))
    places = torch.tensor([[left, right, below], [right, below, left]])
    assert torch.equal(average_overlap(tokens, 1, (4, 5), places), tokens[:2])


def overlap_config(world: Path, *sets: str) -> Config:
    views = ("views.count=2", "views.kind=random-resized-crop", "views.flip=0.5", "views.pixels=uint8")
    return world_config(world, *views, "refine.cleaner=neighbour", "distill.overlap=other", "distill.epochs=1", *sets)


def shards(world: Path, last: int = -1) -> str:
    """Ten images; thirty others with 0."""
    return str(sorted((world / "test").glob("*.tar"))[last])


@pytest.fixture(scope="module")
def place(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache of two random crops of each of ten images; tests only read it."""
    out = tmp_path_factory.mktemp("pairs") / "cache"
    cache_teacher(overlap_config(world), shards(world), out)
    return out


@pytest.fixture(scope="module")
def grown(world: Path, place: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same, with a third view that was added later."""
    out = tmp_path_factory.mktemp("grown") / "cache"
    shutil.copytree(place, out)
    cache_teacher(overlap_config(world, "views.count=3"), shards(world), out, "append")
    return out


@pytest.fixture(scope="module")
def mixed(world: Path, place: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten images of two views, and thirty of six, which were added later."""
    out = tmp_path_factory.mktemp("mixed") / "cache"
    shutil.copytree(place, out)
    cache_teacher(overlap_config(world, "views.count=6"), shards(world, 0), out, "append")
    return out


def test_each_record_gets_another_view_of_its_image(place: Path, grown: Path) -> None:
    for folder, views in ((place, 2), (grown, 3)):
        cache = Cache(folder)
        index, others = cache.index, OtherViews(cache, 4)
        records = np.random.default_rng(seeded(3)).permutation(len(cache))
        seen = {epoch: others.choose(records, epoch)[0] for epoch in range(40)}
        for found in seen.values():
            assert [index.key(a) for a in records.tolist()] == [index.key(b) for b in found.tolist()]
            assert (found != records).all()
        # A pure function: of the record alone, whatever else is read with it.
        assert np.array_equal(seen[7][:9], OtherViews(cache, 4).choose(records[:9], 7)[0])
        if views == 3:
            counts = np.mean([index.view[found] for found in seen.values()], 0)
            assert not np.array_equal(seen[0], seen[1])
            assert not np.array_equal(seen[0], OtherViews(cache, 5).choose(records, 0)[0])
            # Over 40 epochs, each of the two others about as often.
            expected = (3 - index.view[records]) / 2
            assert np.abs(counts - expected).max() < 1
            assert np.abs(counts - expected).mean() < 0.2
    pairs = OtherViews(Cache(place), 0).places(np.array([3, 0]), np.array([[2, 1]]))
    index = Cache(place).index
    assert pairs[0, 0].tolist() == [*index.box[3].tolist(), float(index.flip[3])]
    assert pairs[1, 1].tolist() == [*index.box[1].tolist(), float(index.flip[1])]


def test_averages_are_over_the_other_views_of_the_image(place: Path, grown: Path, mixed: Path) -> None:
    """Over all of them if there are at most three; else over three that change, each about as often."""
    for folder, views in ((place, 2), (grown, 3), (mixed, 4)):
        cache = Cache(folder)
        index, others = cache.index, OtherViews(cache, 4, average=True)
        records = np.random.default_rng(seeded(11)).permutation(len(cache))
        assert others.views == views
        keys = [index.key(record) for record in records.tolist()]
        each = np.array([keys.count(key) for key in keys])
        times = np.zeros((len(cache), 6))
        for epoch in range(50):
            chosen = others.choose(records, epoch)
            assert chosen.shape == (views - 1, len(cache))
            assert np.array_equal(chosen[:, :5], OtherViews(cache, 4, average=True).choose(records[:5], epoch))
            for record, found, count in zip(records.tolist(), chosen.T.tolist(), each.tolist(), strict=True):
                shown = {r for r in found if r != record}
                assert len(shown) == min(views, count) - 1 and {index.key(r) for r in shown} == {index.key(record)}
                # The record itself is in the place of each view that is missing.
                assert found.count(record) == views - 1 - len(shown)
                times[record, index.view[list(shown)]] += 1
        several = times[records[each == 6]]
        assert (np.sort(several, 1)[:, 0] == 0).all()
        assert np.abs(np.sort(several, 1)[:, 1:] - 30).max(initial=0) < 20
        # Places of views that are missing show nothing.
        patches, shown_at = torch.ones(len(records), 16, 1), others.places(records, chosen)
        for number, other in enumerate(chosen, 1):
            _, seen = resample_overlap(patches, (4, 4), shown_at[:, [0, number]], (4, 4))
            assert not seen[torch.from_numpy(other == records)].any()


def test_the_choice_of_views_does_not_depend_on_the_processes(world: Path, mixed: Path) -> None:
    cache = Cache(mixed)
    settings = overlap_config(world, "distill.batch_size=15").distill
    found: list[dict[tuple[int, int], tuple[Tensor, Tensor]]] = []
    for world_size in (1, 2):
        taught: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}
        for rank in range(world_size):
            load = BatchLoader([cache], None, [32], others=OtherViews(cache, settings.seed, average=True))
            # From the third step on, as a run that is resumed.
            lists = list(batch_index_lists(len(cache), load.record_bytes, settings, rank, world_size, 2, 28))
            batches = [indices for group in lists for indices in group]
            for indices, batch in zip(batches, load(lists, 1), strict=True):
                features = cache.decode(batch.features[0], torch.device("cpu"))[3].unflatten(0, (4, -1))
                assert batch.places is not None and batch.average
                for row, record in enumerate(indices.records.tolist()):
                    if indices.weights[row]:
                        taught[indices.epoch, record] = features[:, row], batch.places[row]
        found.append(taught)
    one, two = found
    assert one.keys() == two.keys() and {epoch for epoch, _ in one} == {0, 1}
    assert all(torch.equal(x, y) for key, own in one.items() for x, y in zip(own, two[key], strict=True))


def test_batches_hold_the_features_of_both_views(place: Path) -> None:
    cache = Cache(place)
    others = OtherViews(cache, 0)
    records = np.array([5, 8, 16])
    load = BatchLoader([cache], None, [32], others=others)
    indices = [BatchIndices(records, np.full(3, 1 / 3, np.float32), epoch) for epoch in (0, 3)]
    for epoch, stored in zip((0, 3), load([indices], 1), strict=True):
        chosen = others.choose(records, epoch)
        whole = cache.features(np.concatenate([records, *chosen]), torch.device("cpu"))
        assert torch.equal(cache.decode(stored.features[0], torch.device("cpu"))[3], whole[3])
        assert stored.places is not None and torch.equal(stored.places, others.places(records, chosen))
        assert torch.equal(stored.pixels[32], cache.pixels(records, 32))
    assert load.record_bytes == 2 * cache.record_bytes


def step_of(
    new: NewStudent, cache: Cache, records: np.ndarray, share: float
) -> tuple[Batch, dict[str, Tensor], dict[int, Tensor], Tensor | None]:
    """A batch of six records in epoch 2, its losses, and what the student gives for the patches that it keeps."""
    load = BatchLoader([cache], None, [32], others=new.others)
    (batch,) = load([[BatchIndices(records, np.full(6, 1 / 6, np.float32), 2)]], 1)
    new.distiller.train()
    if new.distiller.dropout is not None:
        new.distiller.dropout.share = share
    torch.manual_seed(seeded(4))
    losses, _ = new.distiller(batch)
    torch.manual_seed(seeded(4))
    outputs = block_outputs(new.student.model, new.distiller.images(batch), new.distiller.blocks)
    kept = new.distiller.dropout.kept if new.distiller.dropout is not None else None
    assert (kept is None) == (share == 1)
    return batch, losses, outputs, kept


@pytest.mark.parametrize("share", [1.0, 0.5])
def test_losses_are_of_the_overlap_and_of_cls(world: Path, place: Path, tmp_path: Path, share: float) -> None:
    """By hand: CLS of its own view, patches of the other one where it shows them; all others count as no error."""
    config = overlap_config(world, "student.patch_size=4", f"distill.token_share={share}")
    sources = open_teachers(config.distill, place, None)
    new = NewStudent(StudentSpec(config, tmp_path / "run"), sources, make_accelerator("no"))
    cache, others, branch = sources[0].cache, new.others, new.distiller.branches[0]
    assert others is not None
    records = np.arange(0, 12, 2)
    batch, losses, outputs, kept = step_of(new, cache, records, share)
    assert batch.places is not None
    tokens = branch.tokens(outputs, None, kept).normalised
    both = cache.features(np.concatenate([records, *others.choose(records, 2)]), torch.device("cpu"))
    for block, x in tokens.items():
        own, other = both[block].chunk(2)
        patches, shown = resample_overlap(other[:, 1:], (4, 4), batch.places, (8, 8))
        if kept is not None:
            shown = shown.gather(1, kept)
            patches = patches.gather(1, kept.unsqueeze(-1).expand(-1, -1, patches.shape[-1]))
        squares = (x[:, 0] - own[:, 0]).square().sum(-1) + ((x[:, 1:] - patches).square().sum(-1) * shown).sum(1)
        expected = (squares / (x.shape[1] * x.shape[2])).mean() / 2
        assert losses[f"mse.{block}"].item() == pytest.approx(expected.item(), rel=1e-4)
        assert 0 < shown.float().mean() < 1


@pytest.mark.parametrize("share", [1.0, 0.5])
@pytest.mark.parametrize("objective", ["mse", "gram"])
def test_losses_are_of_the_refined_averages(
    world: Path, mixed: Path, tmp_path: Path, share: float, objective: str
) -> None:
    """By hand: patches are refined, averaged on the teacher's grid, and brought to the student's; CLS is its own."""
    sets = ("distill.overlap=average", "student.patch_size=4", "refine.normaliser=layernorm")
    config = overlap_config(world, *sets, f"distill.token_share={share}", f"distill.objective={objective}")
    refine(config, mixed, tmp_path / "refiner")
    sources = open_teachers(config.distill, mixed, tmp_path / "refiner")
    new = NewStudent(StudentSpec(config, tmp_path / "run", tmp_path / "refiner"), sources, make_accelerator("no"))
    cache, others, branch = sources[0].cache, new.others, new.distiller.branches[0]
    assert others is not None and others.average
    records = np.array([0, 3, 10, 40, 77, 120])
    batch, losses, outputs, kept = step_of(new, cache, records, share)
    assert batch.places is not None
    tokens = branch.tokens(outputs, None, kept)
    targets: dict[int, list[Tensor]] = {block: [] for block in tokens.normalised}
    for block, found in targets.items():
        for record, chosen, place in zip(records, others.choose(records, 2).T, batch.places, strict=True):
            own, *rest = branch.targets.refine(cache.features([record, *chosen], torch.device("cpu"))).normalised[block]
            total, count = own[1:].clone(), torch.ones(16)
            for other, view, there in zip(chosen, rest, place[1:], strict=True):
                if other == record:  # the image has fewer views
                    continue
                moved, shown = resample_overlap(view[None, 1:], (4, 4), torch.stack([place[0], there])[None], (4, 4))
                total[shown[0]] += moved[0, shown[0]]
                count += shown[0]
            patches = resize_tokens((total / count[:, None])[None], 0, (4, 4), (8, 8))[0]
            patches = patches if kept is None else patches[kept[len(found)]]
            found.append(torch.cat([own[:1], patches]))
    wanted = Tokens({block: torch.stack(found) for block, found in targets.items()})
    expected = branch.objective(tokens, wanted, batch.labels, {})
    assert losses.keys() == expected.keys() and len(losses) == 2
    for name, loss in expected.items():
        assert losses[name].item() == pytest.approx(loss.mean().item(), rel=1e-4)


def test_masked_patches_are_taught_by_the_overlap(world: Path, place: Path, tmp_path: Path) -> None:
    """By hand, in the second pass: patches that are masked, half of them all, and that the other view shows."""
    config = overlap_config(world, "student.patch_size=4", "distill.mask_share=0.5")
    sources = open_teachers(config.distill, place, None)
    new = NewStudent(StudentSpec(config, tmp_path / "run"), sources, make_accelerator("no"))
    cache, others, learner = sources[0].cache, new.others, new.distiller.train()
    assert others is not None and learner.masks is not None
    records = np.arange(0, 12, 2)
    load = BatchLoader([cache], None, [32], others=others)
    (batch,) = load([[BatchIndices(records, np.full(6, 1 / 6, np.float32), 2)]], 1)
    torch.manual_seed(seeded(6))
    losses, _ = learner(batch)
    torch.manual_seed(seeded(6))
    learner.masks.active = True
    outputs = block_outputs(new.student.model, learner.images(batch), learner.blocks)
    both = cache.features(np.concatenate([records, *others.choose(records, 2)]), torch.device("cpu"))
    assert batch.places is not None and learner.masks.masked is not None
    for block, x in learner.branches[0].tokens(outputs, None).normalised.items():
        patches, shown = resample_overlap(both[block].chunk(2)[1][:, 1:], (4, 4), batch.places, (8, 8))
        squares = (x[:, 1:] - patches).square().sum(-1) * shown * learner.masks.masked
        expected = 2 * squares.sum(1) / (x.shape[1] * x.shape[2])
        assert losses[f"masked.mse.{block}"].item() == pytest.approx(expected.mean().item() / 2, rel=1e-4)


def test_averages_are_one_graph(world: Path, mixed: Path, tmp_path: Path) -> None:
    config = overlap_config(world, "distill.overlap=average")
    sources = open_teachers(config.distill, mixed, None)
    new = NewStudent(StudentSpec(config, tmp_path / "run"), sources, make_accelerator("no"))
    load = BatchLoader([sources[0].cache], None, [32], others=new.others)
    (batch,) = load([[BatchIndices(np.array([1, 50]), np.full(2, 1 / 2, np.float32))]], 1)
    torch._dynamo.reset()
    targets_of = new.distiller.branches[0].targets_of
    found = torch.compile(targets_of, fullgraph=True, backend="eager")(batch.features[0], batch).refined.normalised
    for block, expected in targets_of(batch.features[0], batch).refined.normalised.items():
        assert expected.shape == (2, 17, 24)
        torch.testing.assert_close(found[block], expected)


@pytest.mark.parametrize("name", [name for name, kind in OBJECTIVES.items() if kind.tokenwise])
def test_tokens_that_equal_their_targets_have_neither_loss_nor_gradient(name: str) -> None:
    generator = torch.Generator().manual_seed(seeded(5))
    student, target = torch.randn(2, 3, 6, 8, generator=generator).unbind(0)
    shown = torch.rand(3, 6, 1, generator=generator) < 0.5
    objective = OBJECTIVES[name](ObjectiveContext((3,), 8, 1, (1, 5)))
    moved = student.clone().requires_grad_()
    losses = objective({3: moved}, {3: torch.where(shown, target, student)})
    torch.stack(list(losses.values())).sum().backward()
    assert moved.grad is not None and torch.equal(moved.grad.abs().sum(-1, keepdim=True) > 1e-6, shown)


@pytest.mark.parametrize("overlap", ["other", "average"])
def test_training_is_the_same_in_parts_and_measures_whole_views(
    world: Path, place: Path, mixed: Path, tmp_path: Path, overlap: str
) -> None:
    logs, (cache, share) = [], (place, ()) if overlap == "other" else (mixed, ("distill.share=0.2",))
    for parts in (1, 3):
        sets = (f"distill.overlap={overlap}", f"distill.accumulate={parts}", "distill.holdout=0.2", *share)
        distill(overlap_config(world, *sets, "distill.batch_size=8"), cache, tmp_path / str(parts))
        logs.append(read_log(tmp_path / str(parts) / "log.jsonl"))
    assert [line["loss"] for line in logs[1]] == pytest.approx([line["loss"] for line in logs[0]], rel=1e-4)
    if overlap == "other":
        # Held-out views are measured whole, so that their loss is the larger one.
        assert logs[0][-1]["held_out_loss"] > 1.1 * logs[0][-1]["loss"]


@pytest.mark.parametrize("objective", ["gram", "{mse: 1, relation: 1}"])
def test_objectives_that_need_all_patches_are_refused(world: Path, place: Path, tmp_path: Path, objective: str) -> None:
    config = overlap_config(world, f"distill.objective={objective}")
    with pytest.raises(UserError, match="objective (gram|relation) does not compare token by token, .* one of mse,"):
        distill(config, place, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_what_has_no_other_view_is_refused(world: Path, tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"one view of image 'class\d/\d+', .* --views 2 --set views.kind=random-resized-crop, in a new"
    ):
        distill(overlap_config(world), world / "cache", tmp_path / "run")
    for overlap in ("other", "average"):
        with pytest.raises(UserError, match="overlap: adapters .* see one view; set joint=false"):
            config_with(f"distill.overlap={overlap}", "distill.joint=true")
    with pytest.raises(UserError, match="distill.overlap: input should be 'none', 'other' or 'average', got True"):
        config_with("distill.overlap=true")


def test_averages_need_whole_grids_and_a_second_view(world: Path, mixed: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="one view of image .* needs another one; .* or set distill.overlap=none"):
        distill(overlap_config(world, "distill.overlap=average"), world / "cache", tmp_path / "run")
    config = overlap_config(world, "distill.overlap=average", "cache.token_share=0.5")
    cache_teacher(config, shards(world), tmp_path / "sampled")
    with pytest.raises(UserError, match="overlap: .* holds only some of the patches .* set distill.overlap=none"):
        distill(config, tmp_path / "sampled", tmp_path / "run")
    assert not (tmp_path / "run").exists()
