"""The fault campaign of benchmarks/faults.py, a small share of it."""

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent.parent / "benchmarks" / "faults.py"


@pytest.mark.slow
def test_a_few_faults() -> None:
    """Kills of caching runs of several processes, resumed with other numbers; a few of the other faults."""
    command = [sys.executable, str(SCRIPT), "--kills", "1", "--mutations", "4", "--flips", "3"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "kills: 1, on" in done.stdout and "equals the uninterrupted one" in done.stdout, done.stdout
    assert "flipped bits: 3, found: 3" in done.stdout, done.stdout
