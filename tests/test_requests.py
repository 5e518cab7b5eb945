"""The page of requests names tests that exist."""

import re
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_tests_of_the_page_exist() -> None:
    text = (ROOT / "docs" / "requests.md").read_text()
    cited = re.findall(r"`(tests/\w+\.py)`(?: \(([^)]*)\))?", text)
    assert len(cited) > 15
    for file, names in cited:
        source = (ROOT / file).read_text()
        for name in re.findall(r"`(\w+)`", names):
            assert f"def {name}(" in source, (file, name)
    rows = [line for line in text.splitlines() if line.startswith("| ") and "---" not in line][1:]
    for row in rows:
        assert re.search(r"\| (\*\*Yes\*\*|\*\*No\*\*|\*Partly\*)", row), row
        assert "**Yes**" not in row or "tests/" in row, row
