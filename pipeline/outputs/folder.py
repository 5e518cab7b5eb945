"""Output folders: a stage claims one before work starts, and overwrites none by accident."""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Literal

from pipeline.config import Config
from pipeline.outputs.chain_folder import check_chain_settings
from pipeline.outputs.provenance import INPUTS, PROVENANCE, read_inputs, write_provenance
from pipeline.outputs.resuming import CONFIG, RESULT_SECTIONS, config_change, is_bound, sections_of
from pipeline.outputs.stage_log import stage_log
from pipeline.runtime.interrupts import output_begun
from pipeline.storage import Place, is_remote, open_store
from pipeline.storage.file_locks import check_lockable
from pipeline.storage.json_files import read_json
from singer.errors import UserError

# These outputs are for others to load or publish, so they hold no log.
_LOGLESS = ("export",)
Mode = Literal["new", "resume", "overwrite", "append"]


def begun_inputs(out: Path, mode: Mode, what: str = "run") -> dict[str, str | None] | None:
    """Return the inputs of a run that is continued (see read_inputs), or None for a new run."""
    return read_inputs(out, what) if mode == "resume" and (out / INPUTS).exists() else None


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
        above = next(folder for folder in here.parents if folder.exists())
        if not above.is_dir():
            raise UserError(f"{place}: {above} is not a folder; give another --out")
        if mode != "resume":  # what is finished is told, also if it can only be read
            check_lockable(here)
        if mode == "overwrite" and (here == Path.cwd() or here in Path.cwd().parents):
            raise UserError(
                f"--overwrite would remove the current folder; change to another one, or remove {here} first"
            )
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
        if stage == "run":
            check_chain_settings(store, config, present)
            return
        if not is_bound(stage, present):
            return
        change = config_change(store, config, sections_of(stage, config))
        if change is not None:
            own = "" if is_remote(place) else f", or give --config {Path(place) / CONFIG} in the place of all settings,"
            raise UserError(
                f"{store.url} cannot be continued: it was started with {change}; repeat its command{own} or use "
                "--overwrite"
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
        output_begun()
        if mode != "append":
            changed = mode == "resume" and config_change(store, config, sections_of(stage, config)) is not None
            write_provenance(store, stage, config, seed, changed)
        with nullcontext() if stage in _LOGLESS else stage_log(place, config):
            yield
