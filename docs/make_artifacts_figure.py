"""Draw docs/artifacts.png, the picture of artifacts in README.md, from what `singer demo` leaves in its folder.

    make demo
    python docs/make_artifacts_figure.py demo-out docs/artifacts.png

It shows the patch norms that the demo's report shows, of the same images: both come from pipeline.reports.measure_page.
"""

import argparse
import base64
import io
from pathlib import Path

import matplotlib as mpl
import numpy as np
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from PIL import Image

from pipeline.reports.html import without_ticks
from pipeline.reports.measure_page import measure
from pipeline.reports.pictures import MOST_MEDIANS, NORMS, Strip
from pipeline.reports.runs import find_cache, read_runs
from pipeline.reports.seeds import group_runs
from pipeline.stages.report import RECORDS
from pipeline.training.distilling.cached_teachers import open_images

# Titles of the report's rows, and what README calls them. The order is that of the picture.
ROWS = {
    "image": "image",
    "teacher": "teacher",
    "refined teacher": "teacher, refined",
    "fitnet": "student of\nraw targets",
    "singer": "student of\nrefined targets",
}
INCHES, DPI = 1.1, 100


def main() -> None:
    """Measure the runs of a demo and write the picture."""
    parser = argparse.ArgumentParser(description="Draw the patch norms of the demo's teacher and students.")
    parser.add_argument("demo", type=Path, help="folder of `singer demo`")
    parser.add_argument("out", type=Path, help="the picture, a PNG file")
    arguments = parser.parse_args()
    runs = read_runs([arguments.demo / name for name in ("fitnet", "singer")])
    cache = find_cache(runs, arguments.demo / "cache")
    with open_images(cache, f"{arguments.demo}/shards/train/*.tar") as files:
        strips = measure(cache, group_runs(runs), files, RECORDS).strips["norms"]
    draw({strip.title: strip for strip in strips}).savefig(arguments.out, dpi=DPI, bbox_inches="tight")


def draw(strips: dict[str, Strip]) -> Figure:
    """Draw one row of pictures for each model of ROWS, with a colour bar."""
    count = len(strips["image"].pictures)
    figure = Figure(figsize=(INCHES * (count + 2), INCHES * len(ROWS)), layout="constrained")
    axes = figure.subplots(len(ROWS), count, squeeze=False)
    for row, (title, label) in zip(axes, ROWS.items(), strict=True):
        row[0].set_ylabel(label, rotation=0, horizontalalignment="right", verticalalignment="center")
        for axis, url in zip(row, strips[title].pictures, strict=True):
            axis.imshow(pixels(url), interpolation="nearest")
            without_ticks(axis)
    shades = ScalarMappable(Normalize(0, MOST_MEDIANS), mpl.colormaps[NORMS])
    label = "patch norm / median of the model"
    figure.colorbar(shades, ax=axes, label=label, extend="max", aspect=50)
    return figure


def pixels(url: str) -> np.ndarray:
    """Decode a picture of a report, a data URL, into (rows, columns, 3) uint8."""
    data = base64.b64decode(url.partition(",")[2])
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


if __name__ == "__main__":
    main()
