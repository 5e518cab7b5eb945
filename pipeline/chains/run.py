"""From a folder of images to a student, a report and a model for timm: `singer run PHOTOS --out DIR`.

The chain packs the images into shards, plans, rehearses, caches, refines, distils, probes on held-out images if there
are labels, reports and exports. Each stage is the ordinary one, in a folder of its own below DIR.
"""

import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from pipeline.chains.learn import PAGE, PLANNED, SHARDS, Learning, Stage, command
from pipeline.chains.rehearsal import REHEARSAL, rehearse
from pipeline.chains.split import Photos, Split, has_to_be_packed, shards_of, split
from pipeline.chains.steps import Steps, chain
from pipeline.checks import check_chain
from pipeline.config import Config, dump_config, load_config, meta
from pipeline.data import list_images
from pipeline.evaluation.classification import Accuracies
from pipeline.models.loading import check_known
from pipeline.models.names import HF, is_function, local_folder
from pipeline.outputs.chain_folder import GIVEN, REFINER, STUDENT, bound_sections, chain_has_begun
from pipeline.outputs.folder import Mode
from pipeline.outputs.resuming import CONFIG
from pipeline.planning.choice import Chooser
from pipeline.planning.quick_costs import measure_costs
from pipeline.runtime.devices import own_settings, with_precision
from pipeline.runtime.progress import say
from pipeline.runtime.watched_rank import wait_for_all
from pipeline.stages.export import export
from pipeline.storage import write_atomic
from pipeline.storage.disk import free_bytes
from singer.errors import UserError

STAGE = "run"
PLAN, TIMM, HF_FORMAT = "plan", "timm", "hf"
# With labels; without them there are fewer.
_STAGES = 10


@dataclass(frozen=True)
class RunResult:
    """The result of a chain.

    student: the run of singer distill; timm: the folder that timm loads, None if timm has no such model; report: the
    page to open; images: that were cached; views, codec, epochs: what was chosen; linear: {model: accuracies (%) on
    held-out images}, none without labels.
    """

    out: Path
    student: Path
    timm: Path | None
    report: Path
    images: int
    views: int
    codec: str
    epochs: int
    linear: dict[str, Accuracies]


@own_settings()
def run(
    config: Config,
    photos: Photos,
    out: Path,
    mode: Mode = "new",
    *,
    hours: float | None = None,
    disk_gb: float | None = None,
) -> RunResult:
    """Go from images to a student in the folder `out`.

    photos: images as --images takes them: folders, whose sub-folders are classes, shards, lists, tables; hours,
    disk_gb: what the chain may take, and its cache. The chain chooses codec, views and epochs, unless the configuration
    gives them. Raises UserError for mistakes that the user can fix, and if nothing fits.
    """
    start = time.monotonic()
    given = check_chain(config, photos, out, mode, hours, disk_gb)
    for section in ("teacher", "student"):
        name = getattr(config, section).name
        if name != "vit" and local_folder(name) is None:
            check_known(name, f"{section}.name: timm has no model {name!r}")
    with chain(STAGE, config, out, mode, _STAGES) as steps:
        if not chain_has_begun(out):
            steps.again_from(PLAN)  # its settings may be others
        for made in (REFINER, STUDENT):
            if not (out / made).exists():  # removed, to be made anew
                steps.again_from(made)
        wait_for_all(steps.process, STAGE)  # all have looked before one of them makes something
        steps.note(GIVEN, given)
        config = with_precision(config)
        shards = _packed(config, photos, out, steps).follow(steps)
        config = config.changed(prepare={"shard_images": shards["shard_images"]})
        plan = steps.alone(
            PLAN,
            "planning: measuring teacher and student",
            partial(_plan, config, shards["shards"], out, steps, given, start),
        )
        parts, planned = Split(**plan["split"]), _planned(config, plan["choice"]["sets"], out)
        if steps.main:
            write_atomic(out / PLANNED, dump_config(planned).encode())
        students = {STUDENT: not planned.distill.joint}
        learning = Learning(planned, out, parts.train, parts.probe, parts.test, students, "Student of one teacher")
        stages = [_rehearsal(learning, parts.images, steps), *learning.stages(steps), *_export(learning, steps)]
        steps.total = 2 + len(stages)
        results = {stage.name: stage.follow(steps) for stage in stages}
        if steps.main and parts.why:
            say(f"no probes: {parts.why}")
    return RunResult(
        out=out,
        student=out / STUDENT,
        timm=out / TIMM if TIMM in results else None,
        report=out / PAGE,
        images=parts.images,
        views=planned.views.count,
        codec=planned.cache.codec,
        epochs=planned.distill.epochs,
        linear={name.removeprefix("probe "): value for name, value in results.items() if name.startswith("probe ")},
    )


def _packed(config: Config, photos: Photos, out: Path, steps: Steps) -> Stage:
    """Return the stage that makes shards. Its result: the shards as --images takes them, and images in a shard."""
    folder = out / SHARDS

    def pack() -> dict[str, Any]:
        packed, shards = shards_of(config, photos, folder, steps.again(folder))
        return {"shards": shards, "shard_images": packed.prepare.shard_images}

    packs = has_to_be_packed(photos)
    title = "packing the images into shards" if packs else "taking the shards as they are"
    given = [photos] if isinstance(photos, str | Path) else photos
    # The folder's own configuration has the size of the shards; that of the plan is not written yet.
    again = command("prepare", *given, "--config", folder / CONFIG, "--out", folder, "--overwrite")
    return Stage(SHARDS, title, again if packs else None, pack, together=False)


def _plan(
    config: Config, shards: list[str], out: Path, steps: Steps, given: dict[str, Any], start: float
) -> dict[str, Any]:
    """Split the shards and choose. Return the split and the choice. start: when the chain began (time.monotonic)."""
    parts = split(config, shards)
    listed = list_images(config, parts.train)
    costs = measure_costs(config, listed, steps.process.device)
    disk = None if given["disk-gb"] is None else int(given["disk-gb"] * 1e9)
    processes = steps.process.num_processes
    limits = {"hours": given["hours"], "disk": disk, "spent": time.monotonic() - start}
    choice = Chooser(config, parts.images, parts.probed, costs, free_bytes(out), processes, **limits).choose()
    for line in [*choice.reasons, choice.forecast]:
        say(f"    {line}")
    held = f"{parts.probed} images are probed, the held-out ones are in {', '.join(parts.test)}"
    say(f"    {held}" if parts.test else f"    nothing is held out, and there are no probes: {parts.why}")
    return {"split": asdict(parts), "choice": asdict(choice)}


def _planned(config: Config, choice: Mapping[str, Any], out: Path) -> Config:
    """Return the configuration with what was chosen, and of stages that have begun as these have it.

    Raises UserError if such a stage has another value of a key that is given.
    """
    planned = _chosen(config, choice)
    if not (out / PLANNED).exists():
        return planned
    before, sections = load_config(out / PLANNED), {}
    for name in bound_sections(out, config):
        there, given = getattr(before, name), getattr(config, name)
        fixed = {key for key in type(there).model_fields if meta(type(there), key).affects == "result"}
        for key in fixed & given.model_fields_set:
            about, value = meta(type(there), key), getattr(given, key)
            if value != getattr(there, key) and not about.by_machine:
                raise UserError(
                    f"{out} was planned with {name}.{key} {getattr(there, key)}, not {value}; leave it out, or start "
                    "anew with --overwrite"
                )
        sections[name] = {key: getattr(there, key) for key in fixed}
    return planned.changed(**sections)


def _chosen(config: Config, choice: Mapping[str, Any]) -> Config:
    """Return the configuration with what was chosen and is not given, or left open (auto); choice: {key: value}.

    Probes see teacher and student at the same image size.
    """
    keys = {key: key.split(".") for key in choice}
    sets = {
        key: choice[key]
        for key, (section, name) in keys.items()
        if name not in getattr(config, section).model_fields_set or getattr(getattr(config, section), name) == "auto"
    }
    size, student = config.teacher.image_size, config.student.image_size
    if size is not None and student in (None, size) and config.evaluate.image_size is None:
        sets["evaluate.image_size"] = size
    return load_config(config.model_dump(mode="json"), options=sets)


def _rehearsal(learning: Learning, images: int, steps: Steps) -> Stage:
    folder = learning.out / REHEARSAL
    work = partial(rehearse, learning.config, learning.train, images, folder, steps.process)
    return Stage(REHEARSAL, "rehearsing: building the student on a few images", None, work, together=True)


def _export(learning: Learning, steps: Steps) -> Iterator[Stage]:
    """Yield the stage of the export, if the student is a model of timm or of transformers."""
    name, source = learning.config.student.name, learning.out / STUDENT
    if is_function(name):
        return
    to = HF_FORMAT if name.startswith(HF) else TIMM
    out = learning.out / to
    yield Stage(
        to,
        f"exporting the student for {to}",
        command("export", source, "--to", to, *learning.planned, "--out", out, "--overwrite"),
        lambda: str(export(learning.config, source, out, to, steps.again(out)).export),
        together=False,
    )
