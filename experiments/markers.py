"""Pages of which a part is made by a script: what stands between two marker comments is replaced, the rest stays."""

from __future__ import annotations

from pathlib import Path

from experiments.results import write_text
from knport.errors import KNPortError


def rewrite(page: Path, begin: str, end: str, content: str) -> None:
    """Replace what stands between the markers in a file. Raises `KNPortError` as `replaced`, and without a file."""
    if not page.is_file():
        raise KNPortError(f"{page} does not exist; expected a page with the line {begin!r} (run it from the checkout?)")
    write_text(page, replaced(page.read_text(encoding="utf-8"), begin, end, content, str(page)))


def replaced(text: str, begin: str, end: str, content: str, page: str) -> str:
    """`text` with what stands between the lines `begin` and `end` replaced by `content`.

    Args:
        page: what the text is called in an error.

    Raises:
        KNPortError: a marker is missing, stands twice, or the two are in the wrong order.
    """
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
        raise KNPortError(f"{page}: expected the line {begin!r} once and after it the line {end!r} once")
    return f"{text[: text.index(begin)]}{begin}\n\n{content}\n\n{text[text.index(end) :]}"
