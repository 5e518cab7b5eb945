"""Create new segments: their manifests and small files."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from pipeline.cache.append import Addition, check_addition, plan_additions
from pipeline.cache.calibration import Calibration, calibrate
from pipeline.cache.codecs import CODECS, naming_block
from pipeline.cache.extract import Extractor
from pipeline.cache.format import FIDELITY
from pipeline.cache.manifest import DataManifest, Manifest, PixelsManifest, TeacherManifest
from pipeline.cache.quantization import quantization_errors
from pipeline.cache.segment_reader import read_calibration
from pipeline.cache.segments import Segment, read_segments, segment_name, segments_of
from pipeline.cache.view_reader import ViewReader
from pipeline.cache.writer import create_segment, small_files
from pipeline.config import Config, ViewsConfig
from pipeline.data import ImageFile, Images, listing_hash, longest_classes, numbered_as
from pipeline.data.source_listing import NO_LABEL
from pipeline.outputs.folder import Mode
from pipeline.outputs.provenance import write_provenance
from pipeline.outputs.resuming import CACHE_MANIFEST
from pipeline.runtime.progress import say
from pipeline.storage import Place, open_store
from pipeline.storage.json_files import read_json
from singer.backbones import resolve_blocks
from singer.errors import UserError
from singer.sizes import ImageSize, Size

STAGE = "cache-teacher"

# A Zarr shard has no more records than this, however small they are.
MAX_SHARD_RECORDS = 4096


def create_segments(config: Config, listed: Images, out: Place, mode: Mode, extract: Extractor) -> None:
    """Create the missing segments: the whole cache, or what --append adds. This numbers all their records."""
    store = open_store(out)
    for skipped in listed.skipped:
        say(f"skipped: {skipped}")
    segments = read_segments(store) if CACHE_MANIFEST in store.sizes() else []
    known = segments_of(segments, extract.teacher)
    wanted = config.cache.blocks
    if wanted is None and mode == "append" and known:
        wanted = known[0].manifest.blocks
    blocks = tuple(resolve_blocks(wanted, extract.teacher.depth))
    whole = Addition(blocks, listed, 0, config.views.count)
    additions = [whole]
    if mode == "append":
        check_addition(segments, new_manifest(config, whole, extract.teacher), out)
        listed = numbered_as(listed, longest_classes(s.index().images for s in segments))
        additions = plan_additions(segments, known, listed, config.views.count, blocks)
        if not additions:
            say("the cache already holds everything that this run asks for")
    for addition in additions:
        name = segment_name(len(segments))
        child = store.child(name) if name else store
        manifest, files = build_segment(config, addition, extract, segments)
        if name:
            write_provenance(child, STAGE, config, seed=None)
        create_segment(child, manifest, files)
        segments.append(Segment(name, child, manifest))


def build_segment(
    config: Config, addition: Addition, extract: Extractor, segments: Sequence[Segment]
) -> tuple[Manifest, dict[str, bytes]]:
    """Return the manifest and the small files of a new segment.

    segments: the earlier ones. A block that is in one of them for this teacher keeps its calibration.
    """
    manifest, known = new_manifest(config, addition, extract.teacher), segments_of(segments, extract.teacher)
    earlier = [s.manifest.tail_first_block for s in known]
    suffix = None
    if not earlier or manifest.blocks[0] < min(earlier):
        suffix = extract.suffix_state(manifest.blocks[0])
        if suffix is None:
            say(
                f"note: {extract.teacher.architecture} has no suffix that can be rebuilt; the defaults do without it, "
                "refine.cleaner adapter and projector and objectives such as relation and logits do not"
            )
    else:
        manifest = manifest.model_copy(update={"tail_first_block": min(earlier)})
    calibration: dict[int, Calibration] = {}
    measured: dict[int, Any] = {}
    for segment in known:
        stored_errors = read_json(segment.store, FIDELITY, "segment of a cache")
        calibration |= read_calibration(segment)
        measured |= {b: stored_errors[str(b)] for b in segment.manifest.blocks}
    unknown = [b for b in manifest.blocks if b not in calibration]
    with ImageFile(addition.images) as files:
        read = ViewReader(files, manifest, config.data.on_error, segments, device=extract.device, beside=False)
        for block, x in extract.sample(read, unknown).items():
            calibration[block] = calibrate(x, extract.teacher.prefix_tokens)
            with naming_block(block):
                measured[block] = quantization_errors(CODECS[manifest.codec], x, calibration[block])
    own = {b: calibration[b] for b in manifest.blocks}
    return manifest, small_files(manifest, addition.images, suffix, own, {b: measured[b] for b in manifest.blocks})


def new_manifest(config: Config, addition: Addition, teacher: TeacherManifest) -> Manifest:
    """Return the manifest of a new segment: all that its features depend on, as known before any image is read."""
    images, records = addition.images, len(addition.images) * addition.views
    if teacher.shapes is not None and config.cache.token_share < 1:
        raise UserError("cache.token_share below 1 needs a teacher whose blocks have one grid; leave it at 1 here")
    pixels = None
    if addition.drawing is None and config.views.pixels != "none":
        quality = config.views.jpeg_quality if config.views.pixels == "jpeg" else None
        pixels = PixelsManifest(
            kind=config.views.pixels, size=config.views.pixel_size or teacher.image_size, quality=quality
        )
    manifest = Manifest(
        teacher=teacher,
        data=DataManifest(
            shards=tuple(p.name for p in images.paths),
            images=len(images),
            labelled=int((images.labels != NO_LABEL).sum()),
            hash=listing_hash(images),
        ),
        views=(addition.drawing or drawing(config.views, teacher.image_size))
        | {"first": addition.first_view, "count": addition.views},
        blocks=addition.blocks,
        codec=config.cache.codec,
        stored_patches=max(1, round(config.cache.token_share * teacher.patches)),
        pixels=pixels,
        records=records,
        shard_records=1,
        tail_first_block=addition.blocks[0],
    )
    forms = [form for form in manifest.arrays().values() if form is not None]
    record_bytes = max(int(np.prod(shape)) * np.dtype(dtype).itemsize for shape, dtype in forms)
    fitting = max(1, config.cache.shard_mb * 2**20 // record_bytes)
    return manifest.model_copy(update={"shard_records": min(MAX_SHARD_RECORDS, fitting, records)})


def drawing(views: ViewsConfig, image_size: ImageSize) -> dict[str, Any]:
    """Return the settings on which the views depend; views of the teacher's shape say which it is.

    The decoder is among them if it is not Pillow.
    """
    left_out = {"count", "pixels", "pixel_size", "jpeg_quality", "shape"}
    left_out |= {"center": {"scale", "ratio"}, "random-resized-crop": {"crop"}}[views.kind]
    found = views.model_dump(mode="json", exclude=left_out | ({"decoder"} if views.decoder == "pillow" else set()))
    return {**found, "shape": list(Size.of(views.shape or image_size).shape)}
