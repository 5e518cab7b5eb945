"""Views and mixtures of fine-tuning: what is drawn depends on seed, key, epoch and step alone."""

import itertools
import random
from collections.abc import Sequence
from operator import itemgetter
from pathlib import Path

import numpy as np
import torch
from conftest import seeded, shards
from timm.data.auto_augment import LEVEL_TO_ARG, rand_augment_transform
from timm.data.mixup import mixup_target

from pipeline.config import FinetuneConfig
from pipeline.data import ImageFile, index_images
from pipeline.data.sampler import BatchIndices
from pipeline.data.views import apply_view, draw_view, generator
from pipeline.training.batch import Batch
from pipeline.training.finetuning.augmentation import OPERATIONS, arguments, erase
from pipeline.training.finetuning.labelled import LabelledLoader, views_of
from pipeline.training.finetuning.mixing import Mixing


def step_of(config: FinetuneConfig, count: int, filling: int = 0, step: int = 3) -> tuple[Batch, Batch]:
    """A batch of images that hold their number, with labels 0, 1, 2, 0 ..., and the same mixed."""
    pixels = torch.arange(count, dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 8, 8, 3)
    batch = Batch({8: pixels}, [], torch.ones(count), torch.arange(count) % 3, filling, step=step)
    return batch, Mixing(config, 3)(batch)


def test_mixup_by_hand() -> None:
    """Neighbours share one lambda, read off the pixels; labels are smoothed; the last of an odd number stays."""
    batch, mixed = step_of(FinetuneConfig(cutmix=0, smoothing=0.3), 7, filling=2)
    lam = 1 - float(mixed.pixels[8][0, 0, 0, 0])  # 0 · lam + 1 · (1 - lam)
    assert 0 < lam < 1
    smooth = 0.7 * torch.eye(3)[batch.labels] + 0.1
    for a, b in ((0, 1), (1, 0), (2, 3), (3, 2)):
        torch.testing.assert_close(mixed.pixels[8][a], torch.full((8, 8, 3), lam * a + (1 - lam) * b))
        torch.testing.assert_close(mixed.labels[a], lam * smooth[a] + (1 - lam) * smooth[b])
    assert torch.equal(mixed.pixels[8][4:], batch.pixels[8][4:].float())
    torch.testing.assert_close(mixed.labels[4:], smooth[4:])


def test_cutmix_by_hand() -> None:
    """A box comes from the neighbour, and the labels have its share of the pixels."""
    _, mixed = step_of(FinetuneConfig(mixup=0, smoothing=0), 4, step=seeded(5))
    for a, b in ((0, 1), (1, 0), (2, 3), (3, 2)):
        assert set(mixed.pixels[8][a].unique().tolist()) <= {a, b}
        own = float((mixed.pixels[8][a] == a).float().mean())
        expected = torch.zeros(3).index_add(0, torch.tensor([a % 3, b % 3]), torch.tensor([own, 1 - own]))
        torch.testing.assert_close(mixed.labels[a], expected)


def test_mixing_depends_on_seed_and_step_alone() -> None:
    """Not on how the batch is shared out; what NumPy draws besides is as it was."""
    config = FinetuneConfig()
    before = np.random.get_state()[1].copy()  # noqa: NPY002
    whole = [step_of(config, 8, step=step)[1] for step in range(6)]
    assert np.array_equal(np.random.get_state()[1], before)  # noqa: NPY002
    assert len({tuple(batch.labels[0].tolist()) for batch in whole}) == 6
    for step, batch in enumerate(whole):
        half = step_of(config, 8, step=step)[0].map(itemgetter(slice(4, None)))
        part = Mixing(config, 3)(half)
        assert torch.equal(part.pixels[8], batch.pixels[8][4:]) and torch.equal(part.labels, batch.labels[4:])
    plain = step_of(FinetuneConfig(mixup=0, cutmix=0), 8)[1]
    assert torch.equal(plain.labels, mixup_target(torch.arange(8) % 3, 3, smoothing=0.1))
    assert torch.equal(plain.pixels[8], step_of(config, 8)[0].pixels[8])
    never = step_of(FinetuneConfig(mix_prob=0), 8)[1]
    assert torch.equal(never.labels, plain.labels)


def test_views_are_new_in_every_epoch(world: Path) -> None:
    """And are those that draw_view draws from key and epoch."""
    images, settings = index_images(shards(world)), FinetuneConfig(batch_size=4, seed=seeded(1))
    numbers = np.array([7, 2, 30, 31, 55, 4])
    with ImageFile(images) as files:
        load = LabelledLoader(files, numbers, 32, settings)

        def pixels(epoch: int) -> torch.Tensor:
            return load.pixels(BatchIndices(np.array([0, 3]), np.ones(2, np.float32), epoch))[1]

        first, again, later = pixels(0), pixels(0), pixels(1)
        for row, number in enumerate((7, 31)):
            image = files.read(number)
            view = draw_view(views_of(settings, 32), images.keys[number], 1, image.size)
            assert np.array_equal(later[row].numpy(), apply_view(image, view, 32))
    assert torch.equal(first, again) and not torch.equal(first, later)


def test_randaugment_is_timms() -> None:
    """Its operations, how often and at which spread they are applied, and what they take; only the draws are ours."""
    theirs = rand_augment_transform("rand-m9-mstd0.5-inc1", {})
    assert [op.name for op in theirs.ops] == list(OPERATIONS)
    assert {(op.prob, op.magnitude_std) for op in theirs.ops} == {(0.5, 0.5)}
    for name, magnitude in itertools.product(OPERATIONS, (0.0, 2.5, 9.0, 10.0)):
        drawn = LEVEL_TO_ARG[name]
        wanted = {()} if drawn is None else {drawn(magnitude, {}) for _ in range(64)}
        np.testing.assert_allclose(sorted({arguments(name, magnitude, sign) for sign in (1, -1)}), sorted(wanted))


def test_stronger_augmentation_depends_on_seed_key_and_epoch_alone(world: Path) -> None:
    """Not on threads, on the order and division of batches, or on generators that others share."""
    images, settings = index_images(shards(world)), FinetuneConfig(randaugment=(2, 9), erasing=0.5, seed=seeded(1))
    count = 40

    def views(settings: FinetuneConfig, parts: Sequence[Sequence[int]], workers: int, epoch: int = 0) -> torch.Tensor:
        load = LabelledLoader(files, np.arange(count), 32, settings)
        lists = [[BatchIndices(np.array(part), np.ones(len(part), np.float32), epoch)] for part in parts]
        return torch.cat([batch.pixels[32] for batch in load(lists, workers)])

    shared = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()  # noqa: NPY002
    with ImageFile(images) as files:
        one = views(settings, [range(count)], 1)
        many = views(settings, [[number] for number in reversed(range(count))], 4).flip(0)
        later = views(settings, [range(count)], 1, epoch=1)
        other = views(settings.model_copy(update={"seed": seeded(2)}), [range(count)], 1)
        plain = views(settings.model_copy(update={"randaugment": None, "erasing": 0.0}), [range(count)], 1)
        erased = views(settings.model_copy(update={"randaugment": None}), [range(count)], 1)
        alone = views(settings.model_copy(update={"erasing": 0.0}), [range(count)], 1)
    assert torch.equal(one, many) and not torch.equal(one, later) and not torch.equal(one, other)
    assert shared == (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist())  # noqa: NPY002
    # What one of them draws does not change what the other does: views are the same where nothing is erased.
    same = (erased == plain).flatten(1).all(1)
    assert 0 < int(same.sum()) < count
    assert torch.equal(one[same], alone[same])


def test_erasing_by_its_figures() -> None:
    """How often, how large and with which noise; the view that it is given stays as it is."""
    view, shares, noise = np.zeros((40, 60, 3), np.uint8), [], []
    for number in range(400):
        erased = erase(view, 0.25, generator(seeded(3), f"image {number}", 0, 4))
        changed = erased.any(-1)
        if changed.any():
            rows, columns = (np.flatnonzero(changed.any(axis)) for axis in (1, 0))
            inside = erased[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
            assert changed.sum() > 0.99 * inside[..., 0].size  # all of a rectangle, and nothing else
            shares.append(inside[..., 0].size / changed.size)
            noise.append(inside.flatten())
    assert not view.any() and 0.14 < len(shares) / 400 < 0.36
    assert 0.015 < min(shares) < 0.1 and 0.25 < max(shares) < 0.35
    values = np.concatenate(noise)
    assert abs(values.mean() - 127.5) < 2 and abs(values.std() - 73.9) < 2 and values.max() == 255
