"""Many students from one cache: `singer sweep FILE --cache CACHE --out FOLDER`."""

from pipeline.sweeps.run import SweepResult, sweep

__all__ = ["SweepResult", "sweep"]
