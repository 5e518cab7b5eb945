"""What wrote an output, and from what: its command, versions and configuration, and the hashes of its inputs."""

import hashlib
from collections.abc import Mapping
from pathlib import Path

from pipeline.config import Config, dump_config
from pipeline.outputs.resuming import CONFIG
from pipeline.runtime.logs import command_line
from pipeline.runtime.machine import versions
from pipeline.storage import Store
from pipeline.storage.json_files import json_bytes, read_as, read_json, sealed, validated
from singer.errors import UserError

# Every folder that singer writes holds this file; --overwrite removes nothing that lacks it.
PROVENANCE = "provenance.json"
# This file has the hashes of what a run was started on.
INPUTS = "inputs.json"


def write_provenance(store: Store, stage: str, config: Config, seed: int | None, anew: bool = False) -> None:
    """Write the resolved configuration and its provenance, unless they are there already; anew: then, too."""
    if anew or not {CONFIG, PROVENANCE} <= set(store.sizes()) or not _fits(store):
        text = dump_config(config).encode()
        value = {"stage": stage, "command": command_line(), "seed": seed, "versions": versions()}
        value["config_sha256"] = hashlib.sha256(text).hexdigest()
        # The provenance goes first: a folder with only a configuration would look as if singer had not written it.
        store.write(PROVENANCE, json_bytes(sealed(value)))
        store.write(CONFIG, text)


def _fits(store: Store) -> bool:
    """Return whether a provenance is of the configuration beside it, and not of one that was to be written next."""
    written = read_json(store, PROVENANCE, "folder of singer").get("config_sha256")
    return bool(written == hashlib.sha256(store.read(CONFIG)).hexdigest())


def read_versions(folder: Path) -> dict[str, str]:
    """Return {package: version} that wrote a folder. Raises UserError that names the file if it is damaged."""
    found = read_json(folder, PROVENANCE, "folder of singer").get("versions", {})
    return validated(found, dict[str, str], f"{folder / PROVENANCE}")


def read_inputs(folder: Path, what: str = "run") -> dict[str, str | None]:
    """Return the hashes of what a run was started on. Raises UserError if `folder` is no such thing (`what`)."""
    return read_as(folder / INPUTS, dict[str, str | None], what)


def check_inputs(path: Path, inputs: Mapping[str, str | None]) -> None:
    """Raise UserError if the run at `path` was started on another cache or refiner."""
    before = read_inputs(path)
    for name in {**inputs, **before}:
        if before.get(name) != inputs.get(name):
            kind, _, number = name.partition(" ")
            words = kind if "." in kind else kind.replace("_", " ")  # a key of the configuration is called as it is
            what = f"{words} (number {number})" if number else words
            raise UserError(f"{path} cannot be continued: it was started with another {what}; use that or --overwrite")


def file_hash(path: Path) -> str:
    """Return the SHA-256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
