"""Marked places: what a benchmark writes into a page stands between two comments, and the rest stays as it is."""

from __future__ import annotations

from pathlib import Path

PAGE = Path(__file__).resolve().parents[2] / "docs" / "performance.md"
PLOTS = PAGE.parent / "images"
"""Where the page's pictures are."""


def check(name: str) -> None:
    """Make sure that the page has a place of that name, before anything is measured for it.

    Raises:
        SystemExit: it has none.
    """
    text = PAGE.read_text(encoding="utf-8") if PAGE.exists() else ""
    begin, end = _marks(name)
    if not 0 <= text.find(begin) < text.find(end):
        raise SystemExit(f"{PAGE} has no lines {begin} and, after it, {end}: there is no place to write to")


def fill(name: str, content: str) -> None:
    """Replace what stands in a place."""
    check(name)
    text = PAGE.read_text(encoding="utf-8")
    begin, end = _marks(name)
    before, _, rest = text.partition(begin)
    after = rest.partition(end)[2]
    PAGE.write_text(f"{before}{begin}\n{content.strip()}\n{end}{after}", encoding="utf-8")


def _marks(name: str) -> tuple[str, str]:
    return f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
