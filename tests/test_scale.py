"""The chain of benchmarks/scale.py at a tiny size."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent.parent / "benchmarks" / "scale.py"


def run(work: Path, *options: str) -> str:
    command = [sys.executable, str(SCRIPT), "--work", str(work), "--fork", *options]
    # Threads that wait for each other take minutes on a machine with other work.
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, env=environment)
    assert done.returncode == 0, done.stderr + done.stdout
    return done.stdout


@pytest.mark.slow
def test_the_chain_is_killed_resumed_and_measured(tmp_path: Path) -> None:
    """Both kills happen, both stages go on, every stage is in the table; what is done is not done again."""
    said = run(tmp_path, "--images", "300", "--index-only", "1500", "--table")
    rows = [line.split(" | ") for line in said.splitlines() if line.startswith("| ")]
    stages = ["| plan", "| cache-teacher", "| open", "| refine", "| distill", "| verify", "| inspect"]
    assert [row[0] for row in rows] == ["| stage", *stages, "| stage", "| index", "| open"], said
    assert "" not in [cell for row in rows for cell in row], said
    for stage in ("cache-teacher", "distill"):
        assert f"{stage}.000: killed" in said and f"{stage}.001: done" in said, said
    # One Zarr shard holds all: what the teacher did before the kill is lost.
    lost = int(json.loads((tmp_path / "300" / "legs" / "cache-teacher.000.json").read_text())["events"]["cache"][2])
    assert 0 < lost < 300 and f"{lost} (killed), 300 (done); {lost} twice" in said, said

    # As if the script had been broken off in the last stage.
    leg = tmp_path / "300" / "legs" / "inspect.000.json"
    leg.write_text(json.dumps(json.loads(leg.read_text()) | {"ended": ""}))
    again = run(tmp_path, "--images", "300", "--index-only", "1500")
    assert [line.split(",")[0] for line in again.splitlines() if ".00" in line] == ["inspect.001: done"], again
