"""The pages of the project, and the blocks of code in them."""

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
# The other pages of a public project; their commands are checked and not run.
HABITS = [ROOT / name for name in ("CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md")]
DOCUMENTS = [*PAGES, *HABITS, *sorted((ROOT / "data").rglob("*.md")), *sorted((ROOT / ".github").rglob("*.md"))]


@dataclass(frozen=True)
class Fence:
    """A block of code. note: the comment right above it; line: of its first line, from 1 on."""

    page: Path
    line: int
    language: str
    text: str
    note: str

    @property
    def place(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"

    @property
    def runs(self) -> bool:
        return self.language in ("bash", "python") and not self.note.startswith("not run:")


def fences(page: Path) -> list[Fence]:
    found: list[Fence] = []
    note, start = "", 0
    language: str | None = None
    body: list[str] = []
    for number, line in enumerate(page.read_text().splitlines(), start=1):
        if line.strip().startswith("```"):
            if language is None:
                start, language, body = number + 1, line.strip().removeprefix("```"), []
            else:
                found.append(Fence(page, start, language, "\n".join(body) + "\n", note))
                language, note = None, ""
        elif language is not None:
            body.append(line)
        elif line.strip():
            comment = re.fullmatch(r"<!-- (.*) -->", line.strip())
            note = comment[1] if comment else ""
    assert language is None, f"{page}: a fence has no end"
    return found


def name_of(page: Path) -> str:
    return page.stem


def place_of(page: Path) -> str:
    return str(page.relative_to(ROOT))
