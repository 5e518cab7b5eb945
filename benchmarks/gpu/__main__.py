"""All that only a GPU can tell, measured by one command in a few minutes, the most telling parts first.

    python benchmarks/gpu [--device cuda] [--out gpu-results] [--seconds 400] [--parts exact steps ...] [--small]

It needs singer's dependencies, no network and no data: images and weights are made at random. Each figure is printed
and appended to results.jsonl in --out at once, and table.md there is written anew after each part, so that a run that
is cut short keeps what it has. A part that fails, or for which no time is left, is a row that says so. --small runs
tiny models: with `--device cpu` it only shows that the parts work.
"""

import argparse
import json
import os
import platform
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path


def main() -> None:
    """Parse the options and run the parts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--out", type=Path, default=Path("gpu-results"))
    parser.add_argument("--seconds", type=float, default=400.0, help="no figure is begun after so many")
    parser.add_argument("--parts", nargs="+")
    parser.add_argument("--small", action="store_true")
    options = parser.parse_args()
    start = time.perf_counter()
    if options.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"], os.environ["ACCELERATE_USE_CPU"] = "", "true"
    sys.path[:0] = [str(Path(__file__).parent.parent.parent), str(Path(__file__).parent.parent)]

    # These look for a GPU when they are imported.
    import parts
    import torch
    from steps import steps

    if options.device == "cuda" and not torch.cuda.is_available():
        sys.exit("error: torch finds no GPU; --device cpu --small shows that the parts work")
    measured: dict[str, Callable[[parts.Bench], Iterator[parts.Figure]]] = {
        "exact": parts.exact,
        "caching": parts.caching,
        "steps": steps,
        "decoding": parts.decoding,
        "jpegs": parts.jpegs,
        "probes": parts.probes,
        "teachers": parts.teachers,
        "disk": parts.disk,
    }
    unknown = sorted(set(options.parts or ()) - set(measured))
    if unknown:
        sys.exit(f"error: --parts: unknown {unknown[0]!r}; known: {', '.join(measured)}")
    options.out.mkdir(parents=True, exist_ok=True)
    name = torch.cuda.get_device_name() if options.device == "cuda" else f"CPU ({os.cpu_count()} cores)"
    title = f"{name}; torch {torch.__version__}; Python {platform.python_version()}"
    rows: list[dict[str, object]] = []

    def keep(part: str, figure: parts.Figure) -> None:
        rows.append({"part": part, "what": figure.what, "value": figure.value, "unit": figure.unit})
        with (options.out / "results.jsonl").open("a") as file:
            file.write(json.dumps({"device": title, **rows[-1]}) + "\n")
        print(f"{time.perf_counter() - start:6.1f} s  {part}: {figure.what}: {figure.text()}", flush=True)

    with tempfile.TemporaryDirectory() as folder:
        bench = parts.Bench(torch.device(options.device), options.small, Path(folder))
        for part in options.parts or measured:
            if time.perf_counter() - start > options.seconds:
                keep(part, parts.Figure("all", None, "not measured: no time left"))
                continue
            try:
                for figure in measured[part](bench):
                    keep(part, figure)
                    if time.perf_counter() - start > options.seconds:
                        keep(part, parts.Figure("the rest", None, "not measured: no time left"))
                        break
            except Exception as error:  # what is measured later must not depend on it
                lines = str(error).splitlines() or [type(error).__name__]
                keep(part, parts.Figure("stopped", None, f"not measured: {lines[0]}"))
            if options.device == "cuda":
                torch.cuda.empty_cache()
            write_table(options.out / "table.md", title, rows)
    print((options.out / "table.md").read_text())


def write_table(file: Path, title: str, rows: list[dict[str, object]]) -> None:
    """Write all figures as a Markdown table."""
    lines = [title, "", "| part | what | value | unit |", "|---|---|---|---|"]
    for row in rows:
        value = "" if row["value"] is None else f"{row['value']:.4g}"
        lines.append(f"| {row['part']} | {row['what']} | {value} | {row['unit']} |")
    file.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
