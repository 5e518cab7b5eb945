"""Train, probe and compare the students of a sweep's file, on all visible GPUs.

A refiner that several runs need is fitted once. Every run is a folder as `singer distill` makes it, so that finished
runs are skipped and interrupted runs are continued, even after the sweep was killed.
"""

import os
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from pipeline.cache.reader import Cache
from pipeline.checks import check_settings, check_start
from pipeline.config import Config, TrainingConfig
from pipeline.data import Images, Spec, list_probe_images, places_of, readable
from pipeline.evaluation.result_files import result_file
from pipeline.evaluation.tasks import TASKS
from pipeline.outputs.folder import Mode, check_output, claimed_output
from pipeline.outputs.provenance import INPUTS, check_inputs
from pipeline.outputs.resuming import REFINER_MANIFEST, RUN_RESULT, config_change, is_bound
from pipeline.runtime.devices import own_settings
from pipeline.runtime.error_kinds import DefectsFound
from pipeline.runtime.failures import Failure
from pipeline.runtime.progress import say
from pipeline.stages.distill import SHARED, check_shared, check_spec
from pipeline.storage import Place, open_store, write_atomic
from pipeline.storage.json_files import read_json, write_json
from pipeline.sweeps.file import Plan, Run, find_sweep, read_plan
from pipeline.sweeps.jobs import REFINERS, Job, Member, SweepContext, as_list, attempt, is_done, refiner_config
from pipeline.sweeps.leaderboard import Leaderboard
from pipeline.sweeps.scheduler import Scheduler
from pipeline.sweeps.worker import Worker
from pipeline.training.distilling.cached_teachers import (
    Places,
    as_places,
    check_records,
    numbered,
    open_images,
    open_teachers,
)
from pipeline.training.distilling.new_distiller import check_student
from pipeline.training.distilling.runs import StudentSpec
from pipeline.training.run_directory import RUNS
from pipeline.training.trackers import check_trackers
from singer.errors import UserError

STAGE = "sweep"
STATE = "sweep.json"
FILE = "sweep.yaml"
# Keys on which it does not depend whether a student can be built: which steps are done with it, and how.
_NOT_BUILT = {*TrainingConfig.model_fields} - {"batch_size", "accumulate", "holdout"}
# Keys that say what is read of the caches, and as which teachers.
_READ = {"teacher", "blocks", "teacher_weights", "teacher_drop"}


@dataclass(frozen=True)
class SweepResult:
    """The result of a sweep.

    failed: {run: error in one line}; defects: the runs that failed by a defect of singer; rank_by: None without probes;
    leaderboard: a row with means for every group of runs that differ only in their seeds, best first; std belongs to
    the figure that ranks. leaderboard.json in `out` has all figures.
    """

    out: Path
    page: Path
    runs: int
    done: int
    failed: dict[str, str]
    defects: list[str]
    rank_by: str | None
    leaderboard: list[dict[str, Any]]

    def check(self) -> None:
        """Raise UserError, with the runs' names, if runs failed; DefectsFound if one failed by a defect of singer."""
        if self.failed:
            kind = DefectsFound if self.defects else UserError
            names, said = ", ".join(self.failed), f"their messages are in {self.out / STATE}"
            raise kind(f"{len(self.failed)} of {self.runs} runs failed: {names}; {said}; --resume trains them")


@own_settings()
def sweep(
    file: str | Path,
    caches: Places,
    out: Path,
    mode: Mode = "new",
    *,
    train: Spec | None = None,
    test: Spec | None = None,
    images: Spec | None = None,
    workers: int | None = None,
    on_error: str | None = None,
) -> SweepResult:
    """Do all runs of a sweep's file, or of a bundled sweep by its name, in the folder `out`.

    caches: one cache, or a list for several teachers; train, test: labelled shards for the probes, without which
    students are trained but not compared; images: where the cached images are, if they moved; workers: the number of
    processes, by default one for each GPU. A single worker is this process itself; on_error: fail or skip, for images
    of the probes that cannot be read, in the place of the file's data.on_error.

    Raises UserError, before anything starts, for mistakes that the user can fix. Later failures are in the result.
    """
    if (train is None) != (test is None):
        raise UserError("probes need both --train and --test")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError("singer sweep starts its own processes; start it without accelerate launch")
    path = find_sweep(file)
    plan, content = read_plan(path, on_error), path.read_bytes()
    places = as_places(caches)
    opened = [Cache(place) for place in places]
    check_records(opened)
    check_output(out, mode, STAGE, plan.base, [*places, *places_of(opened[0].index.images)])
    if mode != "resume":  # a resumed sweep continues with its own teachers
        _check_teachers(plan, places, path)
    _check_settings(plan, places, out, mode)
    if mode != "resume" or not all((out / RUNS / run.name / RUN_RESULT).exists() for run in plan.runs):
        with open_images(opened[0], images):
            pass  # they are where the runs will look for them
    probed = list_probe_images(plan.base, train, test) if train is not None and test is not None else None
    if probed is not None and plan.base.data.on_error == "skip":
        probed = readable(probed[0]), readable(probed[1])
    inputs = {numbered("cache", number): cache.id for number, cache in enumerate(opened, start=1)}
    setting = SweepContext(places, out, as_list(images) or None, as_list(train), as_list(test), sys.argv)
    if mode == "resume":
        if (out / INPUTS).exists():
            check_inputs(out, inputs)
        _check_unchanged(plan, setting)
    files = {run.name: _result_files(run, plan.probes, out, probed) for run in plan.runs}
    if probed is not None:
        _check_probes(plan, files, *probed)
    with claimed_output(out, mode, STAGE, plan.base, None):
        write_json(out / INPUTS, inputs)
        write_atomic(out / FILE, content)
        for name in (REFINERS, RUNS):
            (out / name).mkdir(exist_ok=True)
        leaderboard = Leaderboard(plan, out, files, ranked=probed is not None)
        return _sweep(plan, setting, files, leaderboard, workers)


def _sweep(
    plan: Plan, setting: SweepContext, files: dict[str, dict[str, Path]], leaderboard: Leaderboard, workers: int | None
) -> SweepResult:
    out = setting.out

    def write(failures: dict[str, Failure]) -> None:
        failed = {name: failure.message for name, failure in failures.items()}
        states = {}
        for run in plan.runs:
            done = is_done(out / RUNS / run.name, files[run.name])
            state = "failed" if run.name in failed else "done" if done else "waiting"
            states[run.name] = {"state": state, "error": failed.get(run.name), "refiner": run.refiner}
        write_json(out / STATE, {"runs": states})
        leaderboard.write(failed)

    jobs = list(_jobs(plan, setting, files))
    done = len(plan.runs) - sum(len(job.members) for job in jobs if job.kind == "run")
    say(f"runs: {len(plan.runs)}, refiners: {len(plan.refiners)}; runs that are done already: {done}")
    scheduler = Scheduler(jobs, done, write)
    _serve(scheduler, setting, jobs, workers)
    write(scheduler.failed)
    return SweepResult(
        out=out,
        page=leaderboard.page,
        runs=len(plan.runs),
        done=scheduler.done,
        failed={name: failure.message for name, failure in scheduler.failed.items()},
        defects=[name for name, failure in scheduler.failed.items() if failure.defect],
        rank_by=leaderboard.rank_by,
        leaderboard=leaderboard.summary(),
    )


def _check_unchanged(plan: Plan, setting: SweepContext) -> None:
    """Raise UserError, with the name, if a refiner or a run was started with other settings.

    The section evaluate may change, because figures of different settings are stored in different files.
    """
    out = setting.out
    for name, config in plan.refiners.items():
        for number, folder in enumerate(setting.refiners(name)):
            store = open_store(folder)
            if not is_bound("refine", store.sizes()):
                continue
            change = config_change(store, refiner_config(config, number), ["refine"])
            _refuse(f"refiner {name}", out, change)
    for run in plan.runs:
        folder = out / RUNS / run.name
        if not (folder / INPUTS).exists() or not is_bound("distill", open_store(folder).sizes()):
            continue
        needs_refiner, joint = run.refiner is not None, run.config.distill.joint
        if (read_json(folder, INPUTS, "run").get("refiner") is not None) != needs_refiner:
            _refuse(f"run {run.name}", out, "refiner none, not fit" if needs_refiner else "refiner fit, not none")
        sections = ["student", "distill", *(["refine"] if needs_refiner or joint else [])]
        _refuse(f"run {run.name}", out, config_change(open_store(folder), run.config, sections))


def _check_teachers(plan: Plan, places: Sequence[Place], file: Path) -> None:
    """Raise UserError if a refiner or a run names a teacher that its cache lacks or has in several variants."""
    for number, place in enumerate(places):
        named = {refiner_config(config, number).refine.teacher: "refine.teacher" for config in plan.refiners.values()}
        for teachers in {run.config.distill.teachers for run in plan.runs}:
            if teachers is not None and number < len(teachers):
                named[teachers[number]] = "distill.teacher"
        for teacher, key in named.items():
            if teacher is not None:
                Cache(place, teacher, option=f"{key}: {{}} in {file.name}")


def _check_settings(plan: Plan, places: Sequence[Place], out: Path, mode: Mode) -> None:
    """Raise UserError if a new refiner or run names what does not exist, or if a run cannot train its student."""

    def begun(folder: str, name: str) -> bool:
        return mode == "resume" and (out / folder / name).exists()

    for name, config in plan.refiners.items():
        if begun(REFINERS, name):
            continue
        try:
            check_settings("refine", config)
        except UserError as error:
            raise UserError(f"refiner {name}: {error}") from None
    checked, opened = set(), {}
    for run in plan.runs:
        if begun(RUNS, run.name):
            continue
        try:
            check_settings("distill", run.config)
            check_start(run.config)
            check_trackers(run.config.distill)
            spec = StudentSpec(_as_refined(run, len(places)), out)
            check_shared([spec])
            settings = spec.config.distill
            key = (spec.config.student.model_dump_json(), settings.model_dump_json(exclude=_NOT_BUILT))
            if key not in checked:
                checked.add(key)
                read = settings.model_dump_json(include=_READ)
                if read not in opened:
                    opened[read] = open_teachers(settings, places, None)
                check_spec(spec, opened[read])
                check_student(spec.config, opened[read])
        except UserError as error:
            raise UserError(f"run {run.name}: {error}") from None


def _as_refined(run: Run, caches: int) -> Config:
    """Return a run's configuration with the teachers and blocks of its refiner, unless the run names its own."""
    settings, refine = run.config.distill, run.config.refine
    if run.refiner is None:
        return run.config
    read: dict[str, Any] = {}
    if settings.teacher is None and refine.teacher is not None:
        read["teacher"] = (refine.teacher,) * caches
    if settings.blocks is None and refine.blocks is not None:
        read["blocks"] = (refine.blocks,) * caches
    return run.config.changed(distill=read)


def _refuse(what: str, out: Path, change: str | None) -> None:
    if change is not None:
        raise UserError(
            f"{what} in {out} was started with {change}; restore this setting, give a new name, or use another --out"
        )


def _result_files(run: Run, probes: Sequence[str], out: Path, images: tuple[Images, Images] | None) -> dict[str, Path]:
    """Return {task: file of a run's figures}; it is empty without labelled shards."""
    if images is None:
        return {}
    return {task: result_file(out / RUNS / run.name, task, images, run.config) for task in probes}


def _check_probes(plan: Plan, files: dict[str, dict[str, Path]], train: Images, test: Images) -> None:
    """Raise UserError, before anything is trained, if a probe that is not done yet does not fit these shards."""
    left = {
        (task, run.config.evaluate.model_dump_json()): run
        for run in plan.runs
        for task, file in files[run.name].items()
        if not file.exists()
    }
    for (task, _), run in left.items():
        try:
            TASKS[task].check(train, test, run.config.evaluate)
        except UserError as error:
            raise UserError(f"probe {task} of run {run.name}: {error}") from None


def _jobs(plan: Plan, setting: SweepContext, files: dict[str, dict[str, Path]]) -> Iterator[Job]:
    """Yield the jobs that are not done yet, each refiner before the first run that needs it."""
    finished = {name for name in plan.refiners if all((f / REFINER_MANIFEST).exists() for f in setting.refiners(name))}
    left = []
    for run in plan.runs:
        folder = setting.out / RUNS / run.name
        if is_done(folder, files[run.name]):
            continue
        needs = None if (folder / RUN_RESULT).exists() else run.refiner
        probes = tuple(task for task, file in files[run.name].items() if not file.exists())
        left.append(Member(run.name, run.config, needs, probes))
    for members in shared_passes(left, plan.together):
        for needs in dict.fromkeys(m.needs for m in members):
            if needs is not None and needs not in finished:
                finished.add(needs)
                yield Job("refiner", (Member(needs, plan.refiners[needs]),))
        yield Job("run", members)


def shared_passes(members: Sequence[Member], together: int) -> list[tuple[Member, ...]]:
    """Group the runs that may share a pass over the data, at most `together` in a group; first runs give the order."""
    open_: dict[str, list[Member]] = {}
    passes: list[list[Member]] = []
    for member in members:
        settings = member.config.distill
        key = repr([getattr(settings, name) for name in SHARED])
        if key not in open_ or len(open_[key]) == together or settings.precision == "fp16":
            open_[key] = []
            passes.append(open_[key])
        open_[key].append(member)
    return [tuple(p) for p in passes]


def _serve(scheduler: Scheduler, setting: SweepContext, jobs: Sequence[Job], workers: int | None) -> None:
    """Let as many workers as were asked for, or else one for each GPU, do the jobs."""
    devices = gpus()
    count = min(workers or max(1, len(devices)), max(1, len(jobs)))
    if count == 1:
        scheduler.serve(partial(attempt, setting), f"GPU {devices[0]}" if devices else "the CPU")
        return
    threads = max(1, len(os.sched_getaffinity(0)) // count)
    started: dict[str, Worker] = {}
    for number in range(count):
        gpu = devices[number % len(devices)] if devices else None
        name = f"worker {number}" + (f" (GPU {gpu})" if gpu is not None else "")
        started[name] = Worker(setting, gpu, threads, setting.out / f"worker-{number}.log")
    try:
        with ThreadPoolExecutor(count) as pool:
            try:
                for future in [pool.submit(scheduler.serve, worker.do, name) for name, worker in started.items()]:
                    future.result()
            except BaseException:
                scheduler.stop()
                for worker in started.values():
                    worker.kill()
                raise
    finally:
        for worker in started.values():
            worker.close()


def gpus() -> list[str]:
    """Return the visible GPUs, as CUDA_VISIBLE_DEVICES names them."""
    count = torch.cuda.device_count()
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    return named.split(",")[:count] if named else [str(number) for number in range(count)]
