"""The forecast of `cache plan`, compared with the real run: same data, teacher, student and disk.

    python benchmarks/plan_forecast.py --shards PATTERN [--recipe tinyimagenet-ti-to-w96] [--set KEY=VALUE ...]
        [--teacher FILE] [--plan-seconds 20] [--rounds 3] [--folder FOLDER]

Each round plans, caches all images, fits a refiner and trains one student. It prints the forecast over the real value
for the speed of caching with its setup, the bytes of the cache and the speed of the student. For a speed, a ratio below
1 means that the plan was pessimistic.
"""

import argparse
import tempfile
from pathlib import Path

from setting import DEVICE_NAME, add_options, read_config

from pipeline.config import Config
from pipeline.planning.plan import plan
from pipeline.stages.cache_teacher import cache_teacher
from pipeline.stages.distill import distill
from pipeline.stages.refine import refine


def main() -> None:
    """Parse the options and run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser)
    parser.add_argument("--plan-seconds", type=float, default=20.0)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    print(f"{DEVICE_NAME}\n\n| round | caching rate | bytes | student's rate | bottlenecks |\n|---|---|---|---|---|")
    for number in range(1, options.rounds + 1):
        with tempfile.TemporaryDirectory(dir=options.folder) as folder:
            config = read_config(options, Path(folder))
            print(f"| {number} | {compare(config, options, Path(folder))} |", flush=True)


def compare(config: Config, options: argparse.Namespace, scratch: Path) -> str:
    """Return the ratios of forecast to real value in one round, as cells of a table."""
    forecast = plan(config, options.shards, scratch / "cache", options.plan_seconds)
    cached = cache_teacher(config, options.shards, scratch / "cache")
    refine(config, scratch / "cache", scratch / "adapters")
    trained = distill(config, scratch / "cache", scratch / "run", scratch / "adapters")
    step = next(stage for stage in forecast.stages if stage.stage == "cached")

    def ratio(planned: float | None, real: float) -> str:
        return "not measured" if planned is None else f"{planned / real:.2f}"

    hours = ratio(None if forecast.hours is None else 1 / forecast.hours, 3600 / cached.seconds)
    cells = [hours, ratio(forecast.chosen.bytes, cached.bytes), ratio(step.per_second, trained.images_per_second)]
    return " | ".join([*cells, f"{forecast.caching_bottleneck}; {forecast.training_bottleneck}"])


if __name__ == "__main__":
    main()
