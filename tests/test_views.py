"""Views: drawn alike for ever, within the image, and replayed to the pixel."""

import numpy as np
import pytest
import torch
from conftest import seeded
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torchvision.transforms import RandomResizedCrop, functional

from pipeline.config import ViewsConfig
from pipeline.data.views import View, apply_view, crop_view, draw_positions, draw_view, normalise

WHOLE = (0.0, 0.0, 1.0, 1.0)
CROPS = ViewsConfig(kind="random-resized-crop", flip=0.5, color=(0.4, 0.4, 0.2, 0.1), count=2, seed=7)
SIDE = st.integers(1, 4000)
NAME = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
NUMBER = st.integers(0, 1000)


def noise(width: int = 12, height: int = 9) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seeded(0)).integers(0, 256, (height, width, 3), dtype=np.uint8))


def changed(config: ViewsConfig, **values: object) -> ViewsConfig:
    return ViewsConfig.model_validate({**config.model_dump(), **values})


@given(SIDE, SIDE, st.floats(0.05, 1.0))
def test_centre_view(width: int, height: int, crop: float) -> None:
    view = crop_view(crop, (width, height))
    left, upper, right, lower = view.box
    assert 0 <= left < right <= 1 and 0 <= upper < lower <= 1
    side = max(1, round(crop * min(width, height)))
    pixels = np.array([left * width, upper * height, right * width, lower * height])
    np.testing.assert_allclose(pixels, np.round(pixels), atol=1e-6)
    assert pixels[2] - pixels[0] == pytest.approx(side) and pixels[3] - pixels[1] == pytest.approx(side)
    assert abs(pixels[0] - (width - pixels[2])) <= 1 + 1e-6 and abs(pixels[1] - (height - pixels[3])) <= 1 + 1e-6
    drawn = draw_view(ViewsConfig(crop=crop), "any", 0, (width, height))
    assert drawn == View(tuple(float(np.float32(v)) for v in view.box))


def test_centre_view_is_not_resampled() -> None:
    """Of an odd difference of the sides, the pixels themselves."""
    image = noise(13, 8)
    for crop in (crop_view(1.0, image.size), draw_view(ViewsConfig(), "any", 0, image.size)):
        np.testing.assert_array_equal(apply_view(image, crop, 8), np.asarray(image)[:, 2:10])


def test_draws_stay_what_they_are() -> None:
    """Caches hold what was drawn, but adding shards to one draws again."""
    view = draw_view(CROPS, "class0/é", 1, (500, 375))
    assert view.box == (0.08244629949331284, 0.002593488898128271, 0.9766626358032227, 0.9389390349388123)
    assert view.flip is True
    assert view.color == (1.0836751461029053, 1.0225578546524048, 1.0507911443710327, -0.09278013557195663)


@given(NAME, NUMBER, SIDE, SIDE)
def test_draws_are_pure_and_float32(key: str, number: int, width: int, height: int) -> None:
    view = draw_view(CROPS, key, number, (width, height))
    np.random.default_rng().random()
    torch.rand(3)
    assert view == draw_view(CROPS, key, number, (width, height))
    values = [*view.box, *(view.color or ())]
    assert values == [float(np.float32(v)) for v in values]


@given(NAME, NUMBER, SIDE, SIDE)
def test_options_do_not_disturb_each_other(key: str, number: int, width: int, height: int) -> None:
    size = width, height
    view = draw_view(CROPS, key, number, size)
    plain = draw_view(changed(CROPS, flip=0, color=(0, 0, 0, 0), count=1), key, number, size)
    assert plain == View(view.box)
    centred = draw_view(changed(CROPS, kind="center"), key, number, size)
    assert (centred.flip, centred.color) == (view.flip, view.color)
    bright = draw_view(changed(CROPS, color=(0.4, 0, 0, 0), scale=(0.5, 0.5)), key, number, size)
    assert view.color is not None and bright.color == (view.color[0], 1, 1, 0)


@given(NAME, NUMBER, SIDE, SIDE, st.floats(0.01, 1), st.floats(0.01, 1), st.floats(0.2, 5), st.floats(0.2, 5))
def test_boxes_are_within_bounds(
    key: str, number: int, width: int, height: int, a: float, b: float, c: float, d: float
) -> None:
    (small, large), (narrow, wide) = sorted((a, b)), sorted((c, d))
    config = changed(CROPS, scale=(small, large), ratio=(narrow, wide))
    left, upper, right, lower = draw_view(config, key, number, (width, height)).box
    assert 0 <= left < right <= 1 and 0 <= upper < lower <= 1
    w, h = (right - left) * width, (lower - upper) * height
    near = 1e-3
    assert w >= 1 - near and h >= 1 - near
    share, ratio = w * h / (width * height), w / h
    centred = pytest.approx(1) == left + right and pytest.approx(1) == upper + lower
    if not centred:  # else perhaps the fallback, which touches two sides
        assert small * (1 - near) <= share <= large * (1 + near)
        assert narrow * (1 - near) <= ratio <= wide * (1 + near)
    elif not small * (1 - near) <= share <= large * (1 + near) or not narrow * (1 - near) <= ratio <= wide * (1 + near):
        assert w == pytest.approx(width) or h == pytest.approx(height)


@pytest.mark.parametrize(
    ("size", "ratio", "expected"),
    [
        ((100, 10), (1.0, 2.0), (20, 10)),
        ((10, 100), (0.5, 1.0), (10, 20)),
        ((100, 100), (1.0, 1.0), (100, 100)),
        ((1, 4), (0.1, 0.1), (1, 4)),
        ((1, 4), (8.0, 9.0), (1, 1)),
        ((1, 1), (0.75, 1.33), (1, 1)),
    ],
)
def test_fallback_is_torchvisions(size: tuple[int, int], ratio: tuple[float, float], expected: tuple[int, int]) -> None:
    """Where no try fits: all of the area is asked for, in a shape that the image has not."""
    box = draw_view(changed(CROPS, scale=(1.0, 1.0), ratio=ratio), "key", 0, size).box
    got = (box[2] - box[0]) * size[0], (box[3] - box[1]) * size[1]
    assert got == pytest.approx(expected, rel=1e-5)
    if min(size) > 1:  # below a pixel torchvision makes boxes larger than the image
        crop = RandomResizedCrop.get_params(Image.new("RGB", size), [1.0, 1.0], list(ratio))
        assert (crop[3], crop[2]) == expected


@pytest.mark.parametrize("size", [(500, 375), (200, 800)])
def test_distribution_is_torchvisions(size: tuple[int, int]) -> None:
    image, count = Image.new("RGB", size), 3000
    reference = []
    for _ in range(count):
        top, left, h, w = RandomResizedCrop.get_params(image, list(CROPS.scale), list(CROPS.ratio))
        reference.append((left / size[0], top / size[1], (left + w) / size[0], (top + h) / size[1]))
    ours = np.array([draw_view(CROPS, str(i), i % 3, size).box for i in range(count)])

    def figures(boxes: np.ndarray) -> np.ndarray:
        left, upper, right, lower = boxes.T
        w, h = right - left, lower - upper
        return np.stack([w * h, np.log(w * size[0] / (h * size[1])), w, h, (left + right) / 2, (upper + lower) / 2])

    theirs, own = figures(np.array(reference)), figures(ours)
    error = np.sqrt((theirs.var(1) + own.var(1)) / count)
    # Torchvision rounds to pixels: half a pixel of a short side is 0.0025 of it.
    assert np.all(np.abs(theirs.mean(1) - own.mean(1)) < 4 * error + 0.0025)
    np.testing.assert_allclose(own.std(1), theirs.std(1), rtol=0.1)


def test_flips_and_colours_have_their_shares() -> None:
    views = [draw_view(CROPS, str(i), 0, (40, 40)) for i in range(4000)]
    assert np.mean([v.flip for v in views]) == pytest.approx(0.5, abs=0.03)
    colors = np.array([v.color for v in views])
    for column, low, high in zip(colors.T, (0.6, 0.6, 0.8, -0.1), (1.4, 1.4, 1.2, 0.1), strict=True):
        assert low - 1e-6 <= column.min() < low + 0.01 and high - 0.01 < column.max() <= high + 1e-6
        assert column.mean() == pytest.approx((low + high) / 2, abs=0.02)
    assert (
        np.abs(
            np.corrcoef(np.column_stack([colors, [v.flip for v in views], [v.box[0] for v in views]]).T) - np.eye(6)
        ).max()
        < 0.07
    )
    for probability in (0, 1):
        config = changed(CROPS, flip=probability)
        assert {draw_view(config, str(i), 0, (9, 9)).flip for i in range(100)} == {bool(probability)}


@given(NAME, SIDE, SIDE)
def test_views_of_a_key_differ(key: str, width: int, height: int) -> None:
    views = [draw_view(CROPS, key, n, (width, height)) for n in range(5)]
    views += [
        draw_view(CROPS, key + "x", 0, (width, height)),
        draw_view(changed(CROPS, seed=8), key, 0, (width, height)),
    ]
    assert len({v.color for v in views}) == len(views)


def test_apply_view() -> None:
    image = noise(8, 8)
    pixels = np.asarray(image)
    np.testing.assert_array_equal(apply_view(image, View(WHOLE), 8), pixels)
    np.testing.assert_array_equal(apply_view(image, View((0.25, 0.25, 0.75, 0.75)), 4), pixels[2:6, 2:6])
    assert apply_view(noise(5, 40), View(WHOLE), 6).shape == (6, 6, 3)


@settings(max_examples=40)
@given(NAME, st.integers(1, 60), st.integers(1, 60), st.integers(1, 20))
def test_flip_mirrors_the_same_pixels(key: str, width: int, height: int, size: int) -> None:
    image, box = noise(width, height), draw_view(CROPS, key, 0, (width, height)).box
    straight = apply_view(image, View(box), size)
    np.testing.assert_array_equal(apply_view(image, View(box, flip=True), size), straight[:, ::-1])
    np.testing.assert_array_equal(apply_view(image, View(box, True, (1, 1, 1, 0)), size), straight[:, ::-1])


@pytest.mark.parametrize("box", [WHOLE, (1e-9, 0.0, 1.0 + 6e-8, 1.0), (-1e-9, 0.2, 1.0, 1.0 + 6e-8)])
def test_boxes_never_leave_the_image(box: tuple[float, float, float, float]) -> None:
    assert apply_view(noise(4001, 3), View(box), 5).shape == (5, 5, 3)


@settings(max_examples=30)
@given(st.floats(0, 2), st.floats(0, 2), st.floats(0, 2), st.floats(-0.5, 0.5))
def test_colours_are_torchvisions_in_order(b: float, c: float, s: float, h: float) -> None:
    box = (0.25, 0.0, 0.75, 1.0)
    crop = Image.fromarray(apply_view(noise(), View(box), 9))
    steps = (functional.adjust_brightness, functional.adjust_contrast, functional.adjust_saturation)
    expected = crop
    for adjust, factor in zip(steps, (b, c, s), strict=True):
        expected = adjust(expected, factor)
    if h:  # through HSV and back an image changes even without a shift
        expected = functional.adjust_hue(expected, h)
    np.testing.assert_array_equal(apply_view(noise(), View(box, color=(b, c, s, h)), 9), np.asarray(expected))


def test_contrast_is_that_of_the_crop() -> None:
    """A crop in which all pixels are alike has no contrast to change, whatever is beside it."""
    image = Image.new("RGB", (8, 4), (200, 200, 200))
    image.paste((0, 0, 0), (4, 0, 8, 4))
    seen = apply_view(image, View((0.0, 0.0, 0.25, 1.0), color=(1, 0.5, 1, 0)), 4)
    np.testing.assert_array_equal(seen, np.full((4, 4, 3), 200))


def test_no_change_of_colour_is_identity() -> None:
    pixels = apply_view(noise(), View(WHOLE), 7)
    np.testing.assert_array_equal(apply_view(noise(), View(WHOLE, color=(1, 1, 1, 0)), 7), pixels)
    for number in range(4):
        color = [1.0, 1.0, 1.0, 0.0]
        color[number] += 0.3
        assert not np.array_equal(apply_view(noise(), View(WHOLE, color=tuple(color)), 7), pixels)


def test_stored_box_gives_nearly_the_exact_crop() -> None:
    """Rounding of boxes to float32 is far below what a pixel of 8 bits shows."""
    image = noise(500, 375)
    for number in range(20):
        box = draw_view(CROPS, "key", number, image.size).box
        moved = tuple(v + (1 - v) * v * 3e-8 for v in box)
        difference = apply_view(image, View(box), 32).astype(int) - apply_view(image, View(moved), 32)
        assert np.abs(difference).max() <= 1


def test_normalise() -> None:
    pixels = np.asarray(noise())
    x = normalise(torch.from_numpy(pixels[None].copy()), (0.5, 0.4, 0.3), (0.5, 0.2, 0.1))
    expected = (pixels / 255 - np.array([0.5, 0.4, 0.3])) / np.array([0.5, 0.2, 0.1])
    np.testing.assert_allclose(x[0].permute(1, 2, 0).numpy(), expected, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_normalising_does_not_write_to_its_input(dtype: torch.dtype) -> None:
    """Also where the pixels lie in memory as the images do."""
    pixels = torch.arange(2 * 3 * 4 * 4).view(2, 3, 4, 4).to(dtype).permute(0, 2, 3, 1)
    before = pixels.clone()
    normalise(pixels, (0.5, 0.4, 0.3), (0.5, 0.2, 0.1))
    assert torch.equal(pixels, before)


@given(NAME, NUMBER, st.integers(1, 300), st.data())
def test_positions(key: str, number: int, patches: int, data: st.DataObject) -> None:
    count = data.draw(st.integers(1, patches))
    places = draw_positions(3, key, number, patches, count)
    assert places.dtype == np.int16 and len(places) == count
    assert np.all(np.diff(places) > 0) and places.min() >= 0 and places[-1] < patches
    np.testing.assert_array_equal(places, draw_positions(3, key, number, patches, count))
