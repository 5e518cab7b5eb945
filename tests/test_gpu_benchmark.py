"""The benchmark for GPUs, on a CPU and at a tiny size."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent.parent / "benchmarks" / "gpu"


@pytest.mark.slow
def test_every_part_yields_its_figures(tmp_path: Path) -> None:
    """Each is a line of the results and a row of the table; the CPU equals itself."""
    command = [sys.executable, str(SCRIPT), "--device", "cpu", "--small", "--out", str(tmp_path)]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=600, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    parts = ["exact", "caching", "steps", "decoding", "jpegs", "probes", "teachers", "disk"]
    assert list(dict.fromkeys(row["part"] for row in rows)) == parts
    assert all(row["value"] is not None for row in rows), [row for row in rows if row["value"] is None]
    assert {row["value"] for row in rows if row["part"] == "exact"} == {0, 100}
    assert len((tmp_path / "table.md").read_text().splitlines()) == 4 + len(rows)
