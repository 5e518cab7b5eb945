"""Compare stored features with those that the teacher computes now."""

from collections.abc import Iterator, Sequence

import numpy as np
import torch

from pipeline.cache.codecs import CODECS
from pipeline.cache.extract import Extractor, check_finite
from pipeline.cache.format import CALIBRATION, FEATURES, IMAGES, POSITIONS
from pipeline.cache.manifest import Manifest, TeacherManifest
from pipeline.cache.pixels import views_of
from pipeline.cache.quantization import error_sums, errors, token_cosines
from pipeline.cache.segment_reader import SegmentReader, read_calibration, read_index
from pipeline.cache.segments import Segment
from pipeline.cache.variants import variants_of
from pipeline.cache.verify.files import within
from pipeline.cache.verify.findings import LiveCheck, SegmentReport
from pipeline.cache.view_reader import copies_of, drawn_as
from pipeline.cache.writer import first_difference
from pipeline.config import Config
from pipeline.data import ImageFile, Spec, accepted, check_images, relocate
from pipeline.data.jpeg_decoder import JpegDecoder
from pipeline.models.names import OWN, is_function
from pipeline.runtime.devices import this_process
from pipeline.runtime.progress import meter
from pipeline.teachers.teacher import load_teacher
from singer.errors import UserError
from singer.tokens import take_patches


def load_extractors(config: Config, segments: Sequence[Segment]) -> Iterator[Extractor]:
    """Yield the teacher of config.teacher, once for each of its variants in the cache.

    If no teacher is named, the cache's first one is taken. teacher.name may name a variant, which is then the only one;
    teacher.image_size and cache.precision choose among several. Raises UserError, naming both
    sides, if the cache holds no features of the teacher.
    """
    given, teachers = config.teacher, [v[0].manifest.teacher for v in variants_of(segments)]
    wanted = given.name if "name" in given.model_fields_set else None
    named = [t for t in teachers if wanted in (t.variant, t.name)]
    fitting = _as_set(config, named or teachers)
    known = fitting[0]
    if wanted != known.variant:  # a weights file may hold a teacher that the cache has under another name
        fitting += [t for t in _as_set(config, teachers) if t not in fitting]
    name = known.name if wanted in (None, known.variant) else wanted
    if known.architecture.startswith(OWN) and name != wanted:
        made_by = name if is_function(name) else "package.module:function"
        raise UserError(
            f"the cache's teacher is {known.architecture}, a module of your own, whose code is not run because the "
            f"cache names it; name the function that makes it: --teacher {made_by}"
        )
    first = _extractor(config, name, known)
    here, matched = first.teacher, False
    for teacher in fitting:
        # Only the same weights are tried at other sizes and precisions. Other teachers may not load from this file.
        if (teacher.architecture, teacher.weights) == (here.architecture, here.weights):
            extract = first if teacher is known else _extractor(config, name, teacher)
            if extract.teacher.digest() == teacher.digest():
                matched = True
                yield extract
    if not matched:
        difference = first_difference(known.identity(), here.identity())
        assert difference is not None
        key, there, now = difference
        source = f" with {given.weights}" if given.weights else ""
        raise UserError(f"the cache's teacher.{key} is {there} ({known.name}), here it is {now} ({name}{source})")


def _as_set(config: Config, teachers: list[TeacherManifest]) -> list[TeacherManifest]:
    """Keep the teachers that have the configured image size and precision; ignore a setting that none of them has."""
    sized = [t for t in teachers if t.image_size == config.teacher.image_size] or teachers
    given = "precision" in config.cache.model_fields_set
    return [t for t in sized if given and t.precision == config.cache.precision] or list(sized)


def _extractor(config: Config, name: str, known: TeacherManifest) -> Extractor:
    """Load a teacher at the image size, dtype and precision of a teacher in the cache.

    It is not compiled: compiling takes longer than the passes over a sample.
    """
    config = config.changed(
        teacher={"name": name, "image_size": known.image_size, "dtype": known.dtype, "copies": known.copies},
        cache={"precision": known.precision, "compile": False},
    )
    return Extractor(config, load_teacher(config.teacher), this_process().device)


def computable(segment: Segment, report: SegmentReport) -> bool:
    """Return whether Zarr shards can be computed again: the other files that they need are not damaged."""
    return not {within(segment, IMAGES), within(segment, CALIBRATION)} & set(report.files)


def _draw(manifest: Manifest, zarr_shards: Sequence[int], most: int) -> np.ndarray:
    """Draw at most so many records of these Zarr shards, ascending; from the same shards always the same ones."""
    rng = np.random.default_rng(int(manifest.id()[:8], 16))
    pool = np.concatenate([np.arange(*manifest.zarr_shard_range(s)) for s in zarr_shards])
    return np.sort(rng.choice(pool, min(most, len(pool)), replace=False))


def check_live(
    segment: Segment, report: SegmentReport, extract: Extractor, images: Spec | None, sample: int
) -> LiveCheck | None:
    """Compute the features of a random sample of records anew, and compare them with the stored ones.

    sample: the number of records, which are drawn from the segment's undamaged Zarr shards. Return None if there is
    nothing to compare.
    """
    manifest = segment.manifest
    whole = sorted(set(range(manifest.zarr_shards)) - {*report.missing, *report.damaged})
    if not whole or not computable(segment, report):
        return None
    device = extract.device
    chosen = _draw(manifest, whole, sample)
    entries = [segment.entry(s) for s in np.unique(chosen // manifest.shard_records).tolist()]
    reader = SegmentReader(segment, {n: f for entry in entries for n, f in entry["files"].items()})
    records, index = read_index(reader, chosen)
    if not len(records):
        return None
    located = accepted(relocate(index.images, images))
    codec, prefix = CODECS[manifest.codec], manifest.teacher.prefix_tokens
    calibration = read_calibration(segment, device)
    sums = dict.fromkeys(manifest.blocks, torch.zeros(3, 4, dtype=torch.float64))
    cosines, decoder = [], JpegDecoder(drawn_as(manifest.views).decoder, device)
    with ImageFile(located) as files, meter("live check", len(records), "records") as m:
        check_images(files, np.arange(len(records)), index.digest)
        for own in np.array_split(np.arange(len(records)), -(-len(records) // extract.config.cache.views_at_once)):
            views, batch = views_of(files, index, own, manifest.teacher.image_size, decoder), records[own]
            numbers = [(index.key(r), int(index.view[r])) for r in own.tolist()]
            copies = copies_of(manifest.views["seed"], numbers, extract.copying) if extract.copying else None
            features = extract.features(views, manifest.blocks, copies)
            check_finite(features, own, index.key)
            positions = reader.read(POSITIONS, batch) if manifest.sampled else None
            of_batch = []
            for block, live in features.items():
                parts = {n: reader.read(f"{FEATURES}/{block}/{n}", batch).to(device) for n in manifest.layout(block)}
                stored = codec.decode(parts, calibration[block])
                if isinstance(positions, torch.Tensor):
                    live = take_patches(live, prefix, positions)
                sums[block] = sums[block] + error_sums(stored, live, prefix, calibration[block].threshold)
                of_batch.append(token_cosines(stored, live).mean(-1).cpu())
            cosines.append(torch.stack(of_batch))
            m.advance(len(batch))
    by_record = torch.cat(cosines, 1)  # (blocks, records)
    block, record = divmod(int(by_record.argmin()), len(records))
    return LiveCheck(
        records=len(records),
        gate=codec.min_cosine,
        # NaN fails, too.
        below=int((~(by_record >= codec.min_cosine)).any(0).sum()),
        worst=float(by_record[block, record]),
        worst_key=index.key(record),
        worst_block=manifest.blocks[block],
        blocks={b: errors(s) for b, s in sums.items()},
    )
