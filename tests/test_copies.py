"""Features averaged over shifted and mirrored copies of a view: alignment, draws, caches, verification and costs."""

import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from conftest import seeded, tree_bytes, world_config
from torch import Tensor

from pipeline.cache import Cache
from pipeline.cache.extract import Extractor
from pipeline.cache.format import JOURNAL
from pipeline.cache.info import cache_info
from pipeline.cache.verify import live
from pipeline.cache.view_reader import copies_of
from pipeline.config import Config, load_config
from pipeline.data.views import draw_copies, normalise
from pipeline.models.backbone import Backbone
from pipeline.planning.choice import LADDER, Chooser, Costs
from pipeline.planning.plan import plan
from pipeline.planning.sample import open_teacher
from pipeline.stages.cache_teacher import cache_teacher
from pipeline.stages.verify import verify
from pipeline.teachers.teacher import load_teacher
from singer.backbones import block_outputs
from singer.copies import Copying
from singer.errors import UserError
from singer.sizes import Size

CPU = torch.device("cpu")
# 7 columns of patches may be shifted by one, 4 rows by none.
WIDE = ("teacher.image_size=[32,56]", "cache.batch_size=8")


def shards(world: Path) -> str:
    """Ten images."""
    return str(sorted((world / "test").glob("*.tar"))[-1])


def position_teacher(images: Tensor, patches: Mapping[int, int], pattern: bool = False) -> dict[int, Tensor]:
    """One prefix token, the mean of the image; then the mean of each square patch, by block of another patch size.

    pattern: each place of the grid adds its number.
    """
    found = {}
    for block, side in patches.items():
        means = torch.nn.functional.avg_pool2d(images, side).flatten(2).transpose(1, 2)
        if pattern:
            means = means + torch.arange(means.shape[1])[:, None]
        found[block] = torch.cat([images.mean((2, 3)).unsqueeze(1), means], 1)
    return found


def by_hand(found: Sequence[Tensor], grid: Size, copies: np.ndarray, prefix: int) -> np.ndarray:
    """The average over the copies of ONE view, place by place. found: the tokens (N, d) of each copy."""
    sums, counts = np.zeros((*grid, found[0].shape[1])), np.zeros((*grid, 1))
    for tokens, (down, right, mirrored) in zip(found, copies.tolist(), strict=True):
        cells = tokens[prefix:].numpy().reshape(*grid, -1)
        cells = cells[:, ::-1] if mirrored else cells
        for row in range(grid.height):
            for column in range(grid.width):
                y, x = row + down, column + right
                if 0 <= y < grid.height and 0 <= x < grid.width:
                    sums[y, x] += cells[row, column]
                    counts[y, x] += 1
    before = np.mean([tokens[:prefix].numpy() for tokens in found], 0)
    return np.concatenate([before, (sums / counts).reshape(-1, sums.shape[-1])])


def shown(image: np.ndarray, copies: np.ndarray, unit: Size) -> list[np.ndarray]:
    """The copies of one view (H, W, 3), cut out of the view as NumPy continues it."""
    (high, wide, _), reach = image.shape, 3 * max(unit)
    whole = np.pad(image, ((reach, reach), (reach, reach), (0, 0)), "reflect")
    cut = []
    for down, right, mirrored in copies.tolist():
        y, x = reach + down * unit.height, reach + right * unit.width
        piece = whole[y : y + high, x : x + wide]
        cut.append(piece[:, ::-1] if mirrored else piece)
    return cut


@pytest.mark.parametrize("size", [(56, 56), (56, 112), (112, 56)], ids=str)
def test_features_of_the_absolute_place_are_those_of_the_view(size: tuple[int, int]) -> None:
    """Every pixel is a whole number that no other one has, so that a token at a wrong place has another mean."""
    high, wide = size
    grids = {0: (high // 4, wide // 4), 1: (high // 8, wide // 8)}
    copying = Copying.of(9, size, list(grids.values()))
    assert copying.unit == (8, 8) and copying.most == (high // 56, wide // 56)
    order = torch.randperm(2 * 3 * high * wide, generator=torch.Generator().manual_seed(seeded(0)))
    images = order.reshape(2, 3, high, wide).float()
    copies = np.stack([draw_copies(seeded(0), key, 0, copying) for key in "ab"])
    assert copies.any((0, 1)).all()

    def teacher(x: Tensor) -> dict[int, Tensor]:
        return position_teacher(x, {0: 4, 1: 8})

    found, plain = copying.average(teacher, images, torch.from_numpy(copies), 1, grids), teacher(images)
    for block in grids:
        assert torch.equal(found[block][:, 1:], plain[block][:, 1:])
    # The margins of copies show other means: that of all copies is the prefix token's.
    pictures = [shown(image.permute(1, 2, 0).numpy(), c, Size(8, 8)) for image, c in zip(images, copies, strict=True)]
    means = np.array([np.mean([p.mean((0, 1)) for p in own], 0) for own in pictures])
    assert np.allclose(found[1][:, 0].numpy(), means, rtol=1e-4) and not torch.equal(found[1][:, 0], plain[1][:, 0])


def test_what_belongs_to_the_place_of_a_patch_is_averaged() -> None:
    copying, grid = Copying.of(6, 112, [(14, 14)]), Size(14, 14)
    images = torch.randn(2, 3, 112, 112, generator=torch.Generator().manual_seed(seeded(1)))
    copies = np.stack([draw_copies(seeded(1), key, 3, copying) for key in "ab"])

    def teacher(x: Tensor) -> dict[int, Tensor]:
        return position_teacher(x, {0: 8}, pattern=True)

    found = copying.average(teacher, images, torch.from_numpy(copies), 1, {0: (14, 14)})[0]
    for image, own, tokens in zip(images, copies, found, strict=True):
        seen = [torch.from_numpy(s.copy()) for s in shown(image.permute(1, 2, 0).numpy(), own, Size(8, 8))]
        each = [teacher(s.permute(2, 0, 1).unsqueeze(0))[0][0] for s in seen]
        assert np.allclose(tokens.numpy(), by_hand(each, grid, own, 1), atol=1e-3)
    # The corner is not shown by the copies that are shifted away from it, and always by the view.
    assert torch.isfinite(found).all()


def test_shifts_are_far_from_each_other_and_reach_the_whole_range() -> None:
    copying = Copying.of(8, (160, 320), [(20, 40)])
    assert copying.most == (3, 6)
    uniform = np.random.default_rng(seeded(2)).random(copying.numbers)
    copies = copying.choose(uniform)
    assert copies.shape == (8, 3) and copies[0].tolist() == [0, 0, 0]
    assert (np.abs(copies[:, 0]) <= 3).all() and (np.abs(copies[:, 1]) <= 6).all()
    pool = np.floor(uniform[:200].reshape(100, 2) * (7, 13)) - (3, 6)
    for number in range(1, 8):

        def nearest(points: np.ndarray, number: int = number) -> np.ndarray:
            return np.linalg.norm(points[:, None] - copies[None, :number, :2], axis=-1).min(1)

        assert nearest(copies[number : number + 1, :2])[0] == pytest.approx(nearest(pool).max())
    drawn = np.concatenate([copying.choose(u) for u in np.random.default_rng(seeded(3)).random((300, copying.numbers))])
    assert drawn.reshape(300, 8, 3)[:, 1:, 2].mean() == pytest.approx(0.5, abs=0.05)
    assert drawn[:, :2].min(0).tolist() == [-3, -6] and drawn[:, :2].max(0).tolist() == [3, 6]


def test_more_copies_than_shifts_take_each_shift_again() -> None:
    copying = Copying.of(19, 112, [(7, 7)])
    copies = draw_copies(seeded(4), "a", 0, copying)
    assert np.unique(copies[:9, :2], axis=0).shape == (9, 2)
    assert copies[9:17, :2].tolist() == copies[1:9, :2].tolist()


def test_copies_are_a_function_of_seed_key_and_view() -> None:
    copying = Copying.of(5, 224, [(14, 14)])
    first = draw_copies(7, "a", 1, copying).tolist()
    assert first == draw_copies(7, "a", 1, copying).tolist()
    # As NumPy's PCG64 gives them for ever: other draws would make caches of one id differ.
    assert first == [[0, 0, 0], [-2, -2, 1], [-2, 2, 1], [2, -2, 1], [2, 2, 0]]
    assert all(first != draw_copies(*other, copying).tolist() for other in ((8, "a", 1), (7, "b", 1), (7, "a", 2)))


@pytest.mark.parametrize(
    ("size", "grids", "message"),
    [
        (
            32,
            [(4, 4)],
            "an image of 32 a patch of 8 pixels is more; take a teacher.image_size of 56 or more, or set",
        ),
        (100, [(25, 25), (13, 13)], r"13 patches do not divide an image of 100 pixels; .* or set teacher.copies=1"),
    ],
)
def test_what_cannot_be_shifted_is_said(size: int, grids: list[tuple[int, int]], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Copying.of(2, size, grids)


def by_each_copy(
    backbone: Backbone, blocks: Sequence[int], copying: Copying, copies: np.ndarray, pixels: Tensor
) -> dict[int, np.ndarray]:
    """The average of what the teacher gives for each copy of a view, (H, W, 3) uint8, by block."""
    seen = torch.from_numpy(np.stack(shown(pixels.numpy(), copies, copying.unit)))
    with torch.no_grad():
        found = block_outputs(backbone.model, normalise(seen, backbone.mean, backbone.std), blocks)
    features = {}
    for block, x in found.items():
        grid = Size(*backbone.layout[block][1])
        cells = [unit * n // side for unit, n, side in zip(copying.unit, grid, pixels.shape[:2], strict=True)]
        features[block] = by_hand(list(x), grid, copies * [*cells, 1], backbone.prefix)
    return features


@pytest.fixture(autouse=True, scope="module")
def tiny_shards() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pipeline.cache.create.MAX_SHARD_RECORDS", 8)
        yield


@pytest.fixture(scope="module")
def wide(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache of two views of each image, averaged over three copies of 32 x 56 pixels; tests only read it."""
    place = tmp_path_factory.mktemp("wide") / "cache"
    cache_teacher(wide_config(world), shards(world), place)
    return place


def wide_config(world: Path, *sets: str) -> Config:
    views = ("views.count=2", "views.kind=random-resized-crop", "views.flip=0.5", f"views.seed={seeded(5)}")
    return world_config(world, *WIDE, *views, "views.pixels=uint8", "teacher.copies=3", *sets)


def test_a_cache_holds_the_averages(world: Path, wide: Path) -> None:
    cache = Cache(wide)
    backbone = load_teacher(wide_config(world).teacher)
    records = [0, 1, 10, 19]
    stored, pixels = cache.features(records, CPU), cache.pixels(records, (32, 56))
    with torch.no_grad():
        plain = block_outputs(backbone.model, normalise(pixels, backbone.mean, backbone.std), cache.blocks)
    copying = cache.manifest.teacher.copying
    assert copying is not None
    for place, record in enumerate(records):
        key, number = cache.index.key(record), int(cache.index.view[record])
        copies = draw_copies(cache.manifest.views["seed"], key, number, copying)
        for block, x in by_each_copy(backbone, cache.blocks, copying, copies, pixels[place]).items():
            assert np.allclose(stored[block][place].numpy(), x, atol=2e-3, rtol=2e-3)
            assert not np.allclose(plain[block][place].numpy(), x, atol=2e-2, rtol=2e-2)
    assert cache_info(wide).teachers[0].copies == 3


def test_maps_of_several_sizes_are_averaged_at_their_own_places(world: Path) -> None:
    """Stages with strides of 4 to 32 pixels are all shifted by 32."""
    torch.manual_seed(seeded(6))
    size = (32, 224)
    model = timm.create_model("test_convnext", pretrained=False).eval()
    maps = Backbone(model, "test_convnext", {}, size, (0.5,) * 3, (0.5,) * 3)
    extract = Extractor(world_config(world, "teacher.copies=4"), maps, CPU)
    assert extract.copying is not None and extract.copying.unit == (32, 32) and extract.copying.most == (0, 1)
    pixels = torch.randint(0, 256, (2, *size, 3), generator=torch.Generator().manual_seed(seeded(6))).byte()
    copies = np.stack([draw_copies(seeded(6), key, 0, extract.copying) for key in "ab"])
    found = extract.features(pixels, [0, 3], torch.from_numpy(copies))
    for place, own in enumerate(copies):
        for block, x in by_each_copy(maps, [0, 3], extract.copying, own, pixels[place]).items():
            assert np.allclose(found[block][place].numpy(), x, atol=1e-4)


def test_resuming_gives_the_same_bytes(world: Path, wide: Path, tmp_path: Path) -> None:
    part = tmp_path / "part"
    shutil.copytree(wide, part)
    (part / JOURNAL / "000001.json").unlink()
    cache_teacher(wide_config(world), shards(world), part, "resume")
    assert tree_bytes(part, "provenance.json") == tree_bytes(wide, "provenance.json")
    (part / JOURNAL / "000001.json").unlink()
    with pytest.raises(UserError, match="cannot be continued: it was started with teacher.copies 3, not 2;"):
        cache_teacher(wide_config(world, "teacher.copies=2"), shards(world), part, "resume")


def test_the_averages_are_a_variant_beside_the_plain_features(world: Path, wide: Path, tmp_path: Path) -> None:
    """--append gives it the same views, and leaves what is there as it was."""
    place = tmp_path / "c"
    shutil.copytree(wide, place)
    averaged = Cache(wide)
    plain = cache_teacher(wide_config(world, "teacher.copies=1"), shards(world), place, "append").variant
    name = averaged.manifest.teacher.variant
    assert plain != name and Cache(place).id == averaged.id
    with pytest.raises(UserError, match=rf"{name} \(copies 3\), {plain} \(copies 1\); name one"):
        Cache(place, "vit_tiny_patch16_224")
    first, second = Cache(place, name), Cache(place, plain)
    assert first.records_key == second.records_key and np.array_equal(first.index.box, second.index.box)
    records = np.arange(len(averaged))
    there, here, other = (cache.features(records, CPU)[3] for cache in (averaged, first, second))
    assert torch.equal(there, here) and not torch.allclose(there, other, atol=1e-2)


def test_verify_copies_the_views_again(world: Path, wide: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (weights,) = (world / "teacher").glob("*.safetensors")
    config = load_config(sets=[f"teacher.weights={weights}"])
    (part,) = verify(config, wide, live=True, sample=12).parts
    assert part.live is not None and part.live.records == 12 and part.live.below == 0

    def others(*args: Any) -> Tensor | None:
        copies = copies_of(*args)
        return None if copies is None else copies * torch.tensor([-1, -1, 1])

    monkeypatch.setattr(live, "copies_of", others)
    (part,) = verify(config, wide, live=True, sample=12).parts
    assert part.live is not None and part.live.below > 0


def test_a_plan_counts_every_pass(world: Path) -> None:
    config = world_config(world, *WIDE, "teacher.copies=5")
    backbone, counts = load_teacher(config.teacher), list[int]()
    teacher = open_teacher(config, backbone, CPU)
    backbone.model.patch_embed.register_forward_hook(lambda _, images, __: counts.append(len(images[0])))
    found = teacher.trial(torch.zeros(6, 32, 56, 3, dtype=torch.uint8))
    assert counts == [6] * 5 and found[3].shape == (6, 1 + 4 * 7, 24)


@pytest.mark.slow
def test_a_plan_says_how_many_passes_it_counts(world: Path) -> None:
    config = world_config(world, *WIDE, "teacher.copies=5")
    planned = plan(config, shards(world), seconds=0)
    assert planned.copies == 5 and planned.chosen.bytes_per_image == pytest.approx(2 * 2 * 29 * 24, rel=0.02)


def test_probes_of_the_teacher_take_one_pass() -> None:
    costs = Costs(100.0, 10.0, 25.0, dict.fromkeys(LADDER, 1e5), 10**8, False, 32)

    def probing(copies: int) -> float:
        own = load_config(sets=[f"teacher.copies={copies}"])
        return Chooser(own, images=100, probed=3600, costs=costs, free=10**12).choose().probing_hours

    assert probing(1) - probing(4) == pytest.approx(1 / 10 - 1 / 40)
