"""Views by torchvision: how far from Pillow's they are, what is left to Pillow, and that a cache keeps its decoder."""

from collections.abc import Sequence
from pathlib import Path
from random import Random

import numpy as np
import pytest
import torch
from conftest import seeded, tree_bytes, world_config
from files import CASES, PICTURE, saved
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from tars import write_tar
from test_files import exif
from torch import Tensor

from pipeline.cache import Cache
from pipeline.cache.append import Addition
from pipeline.cache.create import new_manifest
from pipeline.cache.view_reader import ViewReader
from pipeline.config import ViewsConfig
from pipeline.data import ImageFile, Images, index_images
from pipeline.data import jpeg_decoder as decoding
from pipeline.data.decoding import decode_rgb
from pipeline.data.jpeg_decoder import JpegDecoder, cut_view, size_of
from pipeline.data.views import View, apply_view, draw_view
from pipeline.planning.plan import plan
from pipeline.stages.cache_teacher import cache_teacher
from pipeline.stages.verify import verify
from singer.errors import UserError

CPU = torch.device("cpu")
TORCH = "views.decoder=torchvision"
CROPS = ViewsConfig(kind="random-resized-crop", flip=0.5, scale=(0.05, 1.0))
COLOURS = CROPS.model_copy(update={"color": (0.4, 0.4, 0.2, 0.1)})
DIFFERING = ("provenance.json", "config.yaml")


def photo(random: np.random.Generator, width: int, height: int, noise: float = 0.1) -> Image.Image:
    """Return a picture with parts of several scales, as photographs have them; noise: the share of single pixels."""
    fine, *rough = (
        Image.fromarray(random.integers(0, 256, (2 + height // side, 2 + width // side, 3), dtype=np.uint8)).resize(
            (width, height), Image.Resampling.BICUBIC
        )
        for side in (1, 4, 16, 60)
    )
    found = Image.blend(Image.blend(rough[2], rough[1], 0.3), rough[0], 0.2)
    return Image.blend(found, fine, noise)


def jpeg(number: int, orientation: int = 1) -> bytes:
    random = np.random.default_rng(seeded(number))
    width, height = random.integers(20, 400, 2).tolist()
    image = photo(random, width, height).convert("L" if number % 7 == 6 else "RGB")
    return saved(
        image,
        "JPEG",
        quality=int(random.integers(30, 100)),
        subsampling=number % 3,
        progressive=bool(number % 2),
        exif=exif(orientation),
    )


def decoded(images: Sequence[bytes], max_pixels: int = 10**8) -> list[Tensor | None]:
    encoded = [(data, f"image {number}") for number, data in enumerate(images)]
    return [pixels for _, pixels in JpegDecoder("torchvision", CPU)(encoded, max_pixels)]


def chosen(pixels: Tensor | None) -> Tensor:
    assert pixels is not None
    return pixels


def differences(config: ViewsConfig, count: int, size: int | tuple[int, int]) -> np.ndarray:
    """Return the absolute differences of the views of some JPEGs, one orientation after the other, in levels."""
    images = [jpeg(n, 1 + n % 8) for n in range(count)]
    found = []
    for number, (data, pixels) in enumerate(zip(images, decoded(images), strict=True)):
        image, pixels = decode_rgb(data), chosen(pixels)
        assert size_of(pixels) == size_of(image)
        view = draw_view(config, str(number), 0, image.size)
        mine = cut_view(pixels, view, size).numpy().astype(int)
        found.append(np.abs(mine - apply_view(image, view, size)).ravel())
    return np.concatenate(found)


def test_views_differ_by_a_level() -> None:
    """Pillow rounds after each side. With other versions of libjpeg than those of the wheels, it may be one more."""
    for config, size in ((CROPS, 224), (CROPS, (64, 128)), (ViewsConfig(), 96)):
        found = differences(config, 16, size)
        assert found.max() <= 2 and found.mean() < 0.25


def test_colours_differ_by_little() -> None:
    """Pillow changes hues in HSV of 8 bits."""
    found = differences(COLOURS, 16, 96)
    assert found.max() <= 24 and found.mean() < 1.2


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 90), st.integers(1, 90), st.integers(1, 40), st.integers(1, 40), st.integers(0, 99))
def test_the_filter_is_pillows(width: int, height: int, rows: int, columns: int, number: int) -> None:
    """Of any size and any fraction of a pixel. Noise overshoots 0 and 255, which Pillow cuts off after each side."""
    image = photo(np.random.default_rng(seeded(number)), width, height, noise=0.7)
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)
    view = draw_view(CROPS, str(number), 0, image.size)
    found = np.abs(
        cut_view(pixels, view, (rows, columns)).numpy().astype(int) - apply_view(image, view, (rows, columns))
    )
    assert found.max() <= 16 and found.mean() < 0.5
    whole = cut_view(pixels, View((0.0, 0.0, 1.0, 1.0)), (height, width)).numpy()
    np.testing.assert_array_equal(whole, np.asarray(image))


def test_a_batch_is_one_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of so many pixels at most; what is broken in it does not spoil the rest."""
    calls = []

    def counted(images: list[Tensor], mode: object, device: torch.device) -> list[Tensor]:
        calls.append(len(images))
        return plain(images, mode, device)

    plain = decoding.decode_jpeg
    monkeypatch.setattr(decoding, "decode_jpeg", counted)
    images = [jpeg(n) for n in range(6)]
    whole = decoded(images)
    assert calls == [1, 6]  # the first one is the trial
    monkeypatch.setattr(decoding, "_PIXELS_TOGETHER", 1)
    for one, other in zip(whole, decoded(images), strict=True):
        assert torch.equal(chosen(one), chosen(other))
    assert calls[2:] == [1] * 7

    monkeypatch.undo()
    broken = saved(Image.fromarray(PICTURE), "JPEG")
    broken = broken[:200] + broken[-2:]
    found = decoded([images[0], broken, b"", images[1]])
    assert [pixels is None for pixels in found] == [False, True, True, False]


def test_what_is_left_to_pillow() -> None:
    """All other formats and kinds of JPEG: CMYK, several frames, RGB as it is, cut off, too many pixels."""
    image = Image.fromarray(PICTURE)
    plain = saved(image, "JPEG")
    others = [
        saved(image.convert("CMYK"), "JPEG"),
        saved(image, "MPO", save_all=True, append_images=[image]),
        saved(image, "JPEG", keep_rgb=True),
        plain[:-9],
        saved(image, "PNG"),
        b"no image",
    ]
    assert decoded(others) == [None] * len(others)
    assert decoded([plain], max_pixels=image.width * image.height - 1) == [None]
    assert chosen(decoded([plain])[0]).shape == (3, 32, 48)


def folder_of(images: dict[str, bytes], path: Path) -> Images:
    return index_images(str(write_tar(path, images)))


def damaged(data: bytes, random: Random) -> bytes:
    """Return a JPEG with some other bytes, or without some."""
    bytes_ = bytearray(data)
    for _ in range(random.randrange(1, 6)):
        bytes_[random.randrange(len(bytes_))] = random.randrange(256)
    start = random.randrange(len(bytes_))
    return bytes(bytes_[:start] + bytes_[start + random.choice((0, 0, 30)) :])


def test_the_same_images_are_unreadable_for_the_same_reasons(world: Path, tmp_path: Path) -> None:
    """Of all kinds of files, whole and damaged."""
    random = Random(seeded(0))
    members = {f"{n}-{case.format}.jpg": case.data() for n, case in enumerate(CASES)}
    members |= {f"damaged-{n}.jpg": damaged(jpeg(n % 5), random) for n in range(80)}
    images = folder_of(members, tmp_path / "a.tar")
    teacher = Cache(world / "cache").manifest.teacher
    found = {}
    for kind in ("pillow", "torchvision"):
        manifest = new_manifest(world_config(world, f"views.decoder={kind}"), Addition((0,), images, 0, 1), teacher)
        with ImageFile(images) as files:
            found[kind] = ViewReader(files, manifest, "skip")(np.arange(len(images)))
    one, other = found["pillow"], found["torchvision"]
    assert one.unreadable == other.unreadable and 10 < len(one.unreadable) < len(images) - 50
    np.testing.assert_array_equal(one.found, other.found)
    assert int((one.pixels.int() - other.pixels.int()).abs().max()) <= 16


def test_a_cache_keeps_to_its_decoder(world: Path, tmp_path: Path) -> None:
    """It is in the manifest: another one is refused, and checks and repairs decode as the cache was made."""
    members = {f"{n:03d}.jpg": jpeg(n, 1 + n % 8) for n in range(12)}
    shard = str(write_tar(tmp_path / "a.tar", members))
    crops = ("views.kind=random-resized-crop", "views.count=2", "views.pixels=uint8")
    by_torch, by_pillow = world_config(world, TORCH, *crops), world_config(world, *crops)
    place = tmp_path / "cache"
    cache_teacher(by_torch, shard, place)
    cache_teacher(by_pillow, shard, tmp_path / "other")
    views = Cache(place).manifest.views
    assert views["decoder"] == "torchvision"
    assert {k: v for k, v in views.items() if k != "decoder"} == Cache(tmp_path / "other").manifest.views

    with pytest.raises(UserError, match=r"views\.decoder torchvision, not pillow"):
        cache_teacher(by_pillow, shard, place, "resume")
    more = str(write_tar(tmp_path / "b.tar", {f"more-{n}.jpg": jpeg(50 + n) for n in range(4)}))
    for config, there, there_is, here in (
        (by_pillow, place, "torchvision", "pillow"),
        (by_torch, tmp_path / "other", "pillow", "torchvision"),
    ):
        with pytest.raises(UserError, match=rf"its views\.decoder is {there_is}, this run has {here}"):
            cache_teacher(config, more, there, "append")
    assert cache_teacher(by_torch, more, place, "append").records == 32

    before = tree_bytes(place, *DIFFERING)
    next((place / "features" / "3").rglob("c/*/*/*")).unlink()
    assert verify(world_config(world), place, repair=True).whole
    assert tree_bytes(place, *DIFFERING) == before


def test_the_live_check_decodes_as_the_cache_was_made(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shard = str(write_tar(tmp_path / "a.tar", {f"{n}.jpg": jpeg(n) for n in range(8)}))
    cache_teacher(world_config(world, TORCH), shard, tmp_path / "cache")
    calls = []
    plain = decoding.decode_jpeg
    monkeypatch.setattr(decoding, "decode_jpeg", lambda *a: calls.append(a) or plain(*a))
    assert verify(world_config(world), tmp_path / "cache", live=True).whole
    assert len(calls) > 1


def test_a_torchvision_without_jpeg(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*_: object) -> None:
        raise RuntimeError("not compiled with nvJPEG")

    monkeypatch.setattr(decoding, "decode_jpeg", missing)
    message = r"cannot decode JPEGs on cpu \(not compiled with nvJPEG\).*--set views\.decoder=pillow"
    with pytest.raises(UserError, match=message):
        cache_teacher(world_config(world, TORCH), str(world / "train" / "*.tar"), tmp_path / "cache")


def test_a_plan_measures_the_configured_decoder(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its stage "decoding" is that of the decoder."""
    shard = str(write_tar(tmp_path / "a.tar", {f"{n}.jpg": jpeg(n) for n in range(8)}))
    calls = []
    plain = decoding.decode_jpeg
    monkeypatch.setattr(decoding, "decode_jpeg", lambda *a: calls.append(a) or plain(*a))
    plan(world_config(world), shard, seconds=0)
    assert not calls
    plan(world_config(world, TORCH), shard, seconds=0)
    assert calls
