"""Hooks of MkDocs. The site is laid out as the repository, so that a link between two files holds in both.

Pages keep their paths, and README.md is the first. A file or a folder of the repository that a page links to, and that
is not a page, becomes one: its text, or the list of its files.
"""

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files, InclusionLevel

import pipeline
import singer

ROOT = Path(__file__).parent.parent
PAGES = ("*.md", "docs/*.md", "data/**/*.md")
PICTURES = ("docs/*.png", "docs/*.svg")
LINK = re.compile(r"\]\(([^)\s#:]+)\)")
LANGUAGES = {".py": "python", ".sbatch": "bash", ".yaml": "yaml"}


def on_files(files: Files, config: MkDocsConfig) -> None:
    """Replace the files of docs/ by those of the repository that make the site."""
    for file in [f for f in files if f.src_dir == config.docs_dir]:
        files.remove(file)
    paths = [path for pattern in (*PAGES, *PICTURES) for path in sorted(ROOT.glob(pattern))]
    for path in paths:
        name = str(path.relative_to(ROOT))
        files.append(File(name, str(ROOT), config.site_dir, config.use_directory_urls))
    open_links = [target for path in paths if path.suffix == ".md" for target in _sources(path.read_text(), path)]
    while open_links:
        target = open_links.pop()
        name = _page_of(target)
        if files.get_file_from_path(name) is None:
            text = _text_of(target)
            page = File.generated(config, name, content=text, inclusion=InclusionLevel.NOT_IN_NAV)
            files.append(page)
            open_links += _sources(text, ROOT / name)


def on_page_markdown(markdown: str, page: Any, **_: object) -> str:
    """Lead links to files that are not pages to the pages that were made of them."""
    here = ROOT / page.file.src_uri

    def link(match: re.Match[str]) -> str:
        target = (here.parent / match[1]).resolve()
        if not _is_source(target):
            return match[0]
        return f"]({os.path.relpath(ROOT / _page_of(target), here.parent)})"

    return LINK.sub(link, markdown)


def on_post_build(config: MkDocsConfig, **_: object) -> None:
    """Raise PluginError if the reference lacks a public name, as one would whose import griffe cannot follow."""
    text = Path(config.site_dir, "docs", "api", "index.html").read_text()
    names = [f"{package.__name__}.{name}" for package in (pipeline, singer) for name in package.__all__]
    if lacking := [name for name in names if f'id="{name}"' not in text]:
        raise PluginError(f"docs/api.md lacks {', '.join(lacking)}")


def _is_source(target: Path) -> bool:
    """Tell whether a link leads to something of the repository that is neither a page nor a picture."""
    return target.is_relative_to(ROOT) and target.exists() and target.suffix not in (".md", ".png", ".svg")


def _sources(text: str, page: Path) -> Iterator[Path]:
    return (t for m in LINK.finditer(text) if _is_source(t := (page.parent / m[1]).resolve()))


def _page_of(target: Path) -> str:
    name = str(target.relative_to(ROOT))
    return f"{name}/README.md" if target.is_dir() else f"{name}.md"


def _text_of(target: Path) -> str:
    """Return the page of a file or a folder, as Markdown."""
    name = target.relative_to(ROOT)
    if target.is_dir():
        inside = "\n".join(f"- [{path.name}]({path.name})" for path in sorted(target.iterdir()))
        return f"# {name}\n\n{inside}\n"
    return f"# {name}\n\n````{LANGUAGES.get(target.suffix, 'text')}\n{target.read_text()}````\n"
