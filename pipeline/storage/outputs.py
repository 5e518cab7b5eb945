"""Output folders: a run claims one before work starts, overwrites none by accident, and writes its provenance there."""

import hashlib
import json
import logging
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import TypeAdapter, ValidationError

from pipeline.config import Config, dump_config
from pipeline.runtime.failures import CLAIMED, setting
from pipeline.runtime.logs import LOG, command_line, log_file, logger, rank_log
from pipeline.runtime.machine import versions
from pipeline.storage import Place, Store, is_remote, open_store, write_atomic
from pipeline.storage.resuming import CONFIG, RESULT_SECTIONS, config_change
from singer.errors import UserError

# Every folder that singer writes holds this file; --overwrite removes nothing that lacks it.
PROVENANCE = "provenance.json"
# This file has the hashes of what a run was started on.
INPUTS = "inputs.json"
# The words for the inputs of a run. A refiner's file does not tell its kind.
_INPUT_WORDS = {"adapters": "refiner", "refiner": "kind of refiner"}
# These outputs are for others to load or publish, so they hold no log.
_LOGLESS = ("export",)
Mode = Literal["new", "resume", "overwrite", "append"]
Value = TypeVar("Value")


def output_mode(resume: bool, overwrite: bool, append: bool = False) -> Mode:
    """Return the mode that the options choose. Raises UserError if there are several."""
    modes: dict[Mode, bool] = {"resume": resume, "overwrite": overwrite, "append": append}
    chosen = [mode for mode, given in modes.items() if given]
    if len(chosen) > 1:
        raise UserError(f"--{chosen[0]} and --{chosen[1]} exclude each other")
    return chosen[0] if chosen else "new"


def check_output(place: Place, mode: Mode, stage: str, config: Config, inputs: Sequence[Place] = ()) -> None:
    """Raise UserError if `stage` may not write to `place`. This changes nothing.

    inputs: what the stage reads. An input may neither be inside the output nor contain it.
    """
    if isinstance(place, Path) and re.match("[a-z0-9]{2,}:/", str(place)):
        raise UserError(f"--out {place}: only a cache can be at a URL; give a folder")
    if not is_remote(place):
        here = Path(place).resolve()
        for source in (i for i in inputs if not is_remote(i)):
            there = Path(source).resolve()
            if here == there or here in there.parents or there in here.parents:
                raise UserError(f"--out {place} overlaps the input {source}; give another --out")
        if here.exists() and not here.is_dir():
            raise UserError(f"{place} exists and is not a folder; give another --out")
    store = open_store(place)
    present = store.sizes()
    if not present:
        if mode == "append":
            raise UserError(f"{place} does not exist; there is nothing to append to")
        return
    sections = RESULT_SECTIONS[stage]
    if mode == "new":
        remedies = ["continue it with --resume"] * (sections is not None) + ["replace it with --overwrite"]
        raise UserError(f"{place} exists; {', '.join(remedies)}, or give another --out")
    if PROVENANCE not in present:
        raise UserError(f"{place} was not written by singer and is left alone; give another --out")
    written = read_json(store, PROVENANCE, "folder of singer").get("stage")
    if written != stage:
        raise UserError(f"{place} was written by singer {written}, not by {stage}; give another --out")
    if mode == "resume":
        assert sections is not None
        if stage == "distill" and config.distill.joint:
            sections = (*sections, "refine")
        change = config_change(store, config, sections)
        if change is not None:
            raise UserError(
                f"{store.url} cannot be continued: it was started with {change}; repeat its command or use --overwrite"
            )


@contextmanager
def claimed_output(place: Place, mode: Mode, stage: str, config: Config, seed: int | None) -> Iterator[None]:
    """Hold an output until the block ends, emptied if overwriting, with its provenance, config and log.

    Raises UserError if another run holds it, or the stage may not write to it.
    """
    store = open_store(place)
    with store.lock():
        check_output(place, mode, stage, config)
        if mode == "overwrite":
            store.clear(last=PROVENANCE)
        if mode != "append":
            write_provenance(store, stage, config, seed)
        with nullcontext() if stage in _LOGLESS else stage_log(place, config):
            try:
                yield
            except KeyboardInterrupt as interrupt:
                setattr(interrupt, CLAIMED, True)  # what is there now is this run's own
                raise


def stage_log(place: Place, config: Config) -> AbstractContextManager[None]:
    """Open the log file of an output, to which a stage adds its messages until the block ends."""
    header = partial(setting, dump_config(config))
    return _uploaded_log(str(place), header) if is_remote(place) else log_file(Path(place) / LOG, header)


def process_log(place: Place) -> AbstractContextManager[None]:
    """Open the log file of a process other than the first; it appears with the first warning or error."""
    folder = Path(tempfile.gettempdir()) if is_remote(place) else Path(place)
    return log_file(folder / rank_log(), setting, logging.WARNING)


@contextmanager
def _uploaded_log(url: str, header: Callable[[], str]) -> Iterator[None]:
    """Log to a temporary file, as nothing can be added to an object; at the end, add it to the store's log."""
    file = Path(tempfile.mkdtemp(prefix="singer-")) / LOG
    logger.info("the log is %s until the end, then %s/%s", file, url, LOG)

    def upload() -> None:
        store = open_store(url)
        before = b""
        with suppress(FileNotFoundError):
            before = store.read(LOG)
        store.write(LOG, before + file.read_bytes())

    try:
        with log_file(file, header):
            yield
    except OSError:
        raise  # the store may be out of reach
    except BaseException:
        with suppress(UserError, OSError):
            upload()
        raise  # the file stays, because the message names it
    with suppress(UserError, OSError):
        upload()
        shutil.rmtree(file.parent)


def write_provenance(store: Store, stage: str, config: Config, seed: int | None) -> None:
    """Write the resolved configuration and its provenance, unless they are there already."""
    if not {CONFIG, PROVENANCE} <= set(store.sizes()):
        text = dump_config(config).encode()
        value = {"stage": stage, "command": command_line(), "seed": seed, "versions": versions()}
        value["config_sha256"] = hashlib.sha256(text).hexdigest()
        # The provenance goes first: a folder with only a configuration would look as if singer had not written it.
        store.write(PROVENANCE, json_bytes(sealed(value)))
        store.write(CONFIG, text)


def read_versions(folder: Path) -> dict[str, str]:
    """Return {package: version} that wrote a folder. Raises UserError that names the file if it is damaged."""
    found = read_json(folder, PROVENANCE, "folder of singer").get("versions", {})
    return validated(found, dict[str, str], f"{folder / PROVENANCE}")


def check_inputs(path: Path, inputs: Mapping[str, str | None]) -> None:
    """Raise UserError if the run at `path` was started on another cache or refiner."""
    before = read_as(path / INPUTS, dict[str, str | None], "run")
    for name in {**inputs, **before}:
        if before.get(name) != inputs.get(name):
            kind, _, number = name.partition(" ")
            what = _INPUT_WORDS.get(kind, kind) + (f" (number {number})" if number else "")
            raise UserError(f"{path} cannot be continued: it was started with another {what}; use that or --overwrite")


def file_hash(path: Path) -> str:
    """Return the SHA-256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def json_bytes(value: Any) -> bytes:
    """Return a value as JSON."""
    return (json.dumps(value, indent=1, allow_nan=False) + "\n").encode()


def write_json(path: Path, value: Any) -> None:
    """Write a value as JSON, durably, all or nothing."""
    write_atomic(path, json_bytes(value))


def sealed(value: dict[str, Any]) -> dict[str, Any]:
    """Add a value's own checksum to it, so that a flipped bit in its file is noticed."""
    return {**value, "sha256": _digest(value)}


def is_sealed(value: dict[str, Any]) -> bool:
    """Return whether a value matches the checksum in it."""
    rest = {k: v for k, v in value.items() if k != "sha256"}
    return bool(value.get("sha256") == _digest(rest))


def _digest(value: dict[str, Any]) -> str:
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def read_json(place: Path | Store, name: str, what: str) -> dict[str, Any]:
    """Read the JSON object in a file of singer. Raises UserError that names the file if it is missing or broken.

    what: what `place` should be, for messages.
    """
    store = open_store(place) if isinstance(place, Path) else place
    file = f"{store.url}/{name}"
    try:
        value = json.loads(store.read(name))
    except FileNotFoundError:
        if not is_remote(store.url) and not Path(store.url).exists():
            raise UserError(f"{store.url} does not exist") from None
        raise UserError(f"{store.url} is not a {what}: it has no {name}") from None
    except (ValueError, RecursionError):
        raise UserError(f"{file} is damaged: it holds no JSON") from None
    if not isinstance(value, dict):
        raise UserError(f"{file} is damaged: it holds no JSON object")
    return value


def validated(value: dict[str, Any], kind: type[Value], file: str) -> Value:
    """Validate a JSON object as a model or dataclass. Raises UserError that names the file."""
    try:
        return TypeAdapter(kind).validate_python(value)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise UserError(f"{file} is damaged: {place}: {first['msg'].lower()}") from None


def read_as(path: Path, kind: type[Value], what: str) -> Value:
    """Read the JSON in a file of singer as a validated model or dataclass. Raises UserError that names the file."""
    return validated(read_json(path.parent, path.name, what), kind, str(path))
