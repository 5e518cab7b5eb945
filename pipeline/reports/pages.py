"""Pages that need no other file, and pictures in them."""

import base64
import html
import io
import re
from pathlib import Path
from typing import Any

import jinja2
import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure


def render(template: Path, **values: Any) -> str:
    """Fill a template, which may include others beside it or beside this file; an HTML page."""
    loader = jinja2.FileSystemLoader([template.parent, Path(__file__).parent])
    environment = jinja2.Environment(loader=loader, autoescape=True, undefined=jinja2.StrictUndefined)
    return environment.get_template(template.name).render(values)


def as_data_url(figure: Figure) -> str:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=130)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def as_svg(figure: Figure, what: str) -> str:
    """An SVG element for a page, in which what is black takes the colour of the text around it.

    what: the figure in words, for who cannot see it. Its text is text, and nothing in it has a background.
    """
    buffer = io.StringIO()
    # Names of clip paths come from the salt; two figures of a page must not share them.
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": what}):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    # What describes the file names the places of vocabularies on the web; a page has no use for it.
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.S)
    text = re.sub(r' xmlns(:\w+)?="[^"]*"', "", text).replace("xlink:href", "href")
    # Where a fill is black, it is left out.
    text = text.replace("#000000", "currentColor")
    return text.replace("<svg ", f'<svg role="img" aria-label="{html.escape(what)}" fill="currentColor" ', 1).strip()


def without_ticks(axis: Axes) -> None:
    axis.set_xticks([])
    axis.set_yticks([])
