"""HTML pages that need no other file, and the pictures in them."""

import base64
import html
import io
import re
from functools import cache
from pathlib import Path
from typing import Any

import jinja2
import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure


def render(template: Path, **values: Any) -> str:
    """Fill a template and return the HTML page; it may include templates of its own folder or of this one."""
    return _environment(template.parent).get_template(template.name).render(values)


@cache  # it holds the compiled templates
def _environment(folder: Path) -> jinja2.Environment:
    loader = jinja2.FileSystemLoader([folder, Path(__file__).parent])
    return jinja2.Environment(loader=loader, autoescape=True, undefined=jinja2.StrictUndefined)


def as_data_url(figure: Figure) -> str:
    """Return a figure as a PNG in a data URL."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=130)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def as_svg(figure: Figure, what: str) -> str:
    """Return a figure as an SVG element for a page.

    Black parts take the colour of the text around the figure; its text stays text, and it has no background. what: the
    figure in words, for readers who cannot see it.
    """
    buffer = io.StringIO()
    # The salt gives the names of clip paths, and two figures of a page must not share them.
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": what}):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    # The metadata and the name spaces contain web addresses, and a page must contain none.
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.S)
    text = re.sub(r' xmlns(:\w+)?="[^"]*"', "", text).replace("xlink:href", "href")
    # Matplotlib leaves out a fill that is black, so the element below sets fill, too.
    text = text.replace("#000000", "currentColor")
    return text.replace("<svg ", f'<svg role="img" aria-label="{html.escape(what)}" fill="currentColor" ', 1).strip()


def without_ticks(axis: Axes) -> None:
    """Remove the ticks of both axes."""
    axis.set_xticks([])
    axis.set_yticks([])
