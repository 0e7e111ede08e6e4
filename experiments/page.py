"""`report.html`: one self-contained page, light or dark as the reader's system is, readable on a phone."""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from html import escape
from pathlib import Path

from experiments import page_comparison, plots
from experiments.backbones import statement
from experiments.comparison import Comparison
from experiments.page_comparison import commands, measured_on
from experiments.page_parts import bullets, part, section
from experiments.paper_report import READING as PAPERS
from experiments.results import Row
from experiments.summary import series_of
from experiments.tables import Section

STYLE = Path(__file__).with_name("page.css")
LIGHT = {plots.css_name(plots.INK): "#1f2430", plots.css_name(plots.FAINT): "#d5dae3"}
DARK = {plots.css_name(plots.INK): "#e6e9ef", plots.css_name(plots.FAINT): "#3b424f"}
__all__ = ["commands", "heading", "html", "machine", "measured_on", "title"]


def html(
    comparisons: Sequence[Comparison],
    reading: Sequence[str],
    private: Sequence[Section] = (),
    papers: Sequence[Section] = (),
) -> str:
    """The page.

    Args:
        comparisons: rows, learning curves and pictures; one is shown on its own, several under a heading each.
        reading: paragraphs that say how the numbers were made.
        private: what `privacy_report.sections` gives.
        papers: what `paper_report.sections` gives.
    """
    several = len(comparisons) > 1
    parts = [_head(comparisons), _contents(comparisons, private, papers) if several or papers else ""]
    for number, one in enumerate(comparisons):
        parts += [_group(one, number)] if several else [page_comparison.body(one)]
    if private:
        text = "\n".join(map(part, private))
        parts.append(f'<div class="group" id="private"><h2>Private training</h2>\n{text}</div>' if several else text)
    if papers:
        intro = f'<p class="lead">{escape(PAPERS)}</p>'
        parts.append(f'<div class="group" id="papers"><h2>The papers’ tables</h2>{intro}\n{_parts(papers)}</div>')
    if comparisons:
        parts.append(section("How to read this", bullets(reading, "reading")))
    return _document(heading(comparisons), "\n".join(filter(None, parts)))


def heading(comparisons: Sequence[Comparison]) -> str:
    """What the page is about."""
    if not comparisons:
        return "Private training"
    if len(comparisons) == 1:
        return title(comparisons[0].results.rows)
    return "Kernel normalization against its rivals: what was measured"


def title(rows: Sequence[Row]) -> str:
    """What was compared on what."""
    models = list(dict.fromkeys(one.backbone for one in series_of(rows)))
    return f"{' and '.join(dict.fromkeys(row.recipe for row in rows))}: {', '.join(models)} by normalization"


def machine(rows: Sequence[Row]) -> str:
    """Devices and torch versions the runs report."""
    devices = sorted({row.device or row.cost_device for row in rows if row.device or row.cost_device})
    versions = sorted({row.torch for row in rows if row.torch})
    return f"device {', '.join(devices) or 'not recorded'}, torch {', '.join(versions) or 'not recorded'}"


def _head(comparisons: Sequence[Comparison]) -> str:
    if not comparisons:
        return '<p class="eyebrow">digits</p>\n<h1>Private training</h1>'
    if len(comparisons) > 1:
        runs = [row for one in comparisons for row in one.results.rows]
        lead = f"{len(comparisons)} comparisons, {_runs(runs)}; made by python -m experiments report"
        return f'<h1>{escape(heading(comparisons))}</h1>\n<p class="lead">{escape(lead)}</p>'
    rows = comparisons[0].results.rows
    return f'<p class="eyebrow">{escape(title(rows))}</p>\n<h1>{_sentence(rows)}</h1>\n{_lead(rows)}'


def _group(one: Comparison, number: int) -> str:
    rows = one.results.rows
    heads = (
        f'<p class="eyebrow">{escape(one.name)} · {escape(title(rows))}</p>\n<h2>{_sentence(rows)}</h2>{_lead(rows)}'
    )
    return f'<div class="group" id="comparison-{number}">{heads}\n{page_comparison.body(one)}</div>'


def _contents(comparisons: Sequence[Comparison], private: Sequence[Section], papers: Sequence[Section]) -> str:
    links = [(f"comparison-{i}", title(one.results.rows)) for i, one in enumerate(comparisons)]
    links += [("private", "Private training")] * bool(private) + [("papers", "The papers’ tables")] * bool(papers)
    items = "".join(f'<li><a href="#{anchor}">{escape(text)}</a></li>' for anchor, text in links)
    return f'<nav aria-label="contents"><ol>{items}</ol></nav>'


def _sentence(rows: Sequence[Row]) -> str:
    return escape(statement(rows)).replace(" %", "&nbsp;%")


def _lead(rows: Sequence[Row]) -> str:
    networks = len({(one.model, one.norm) for one in series_of(rows)})
    return f'<p class="lead">{networks} networks, {_runs(rows)}; {escape(machine(rows))}</p>'


def _parts(sections: Sequence[Section]) -> str:
    return "\n".join(map(part, sections))


def _runs(rows: Sequence[Row]) -> str:
    finished, seeds = sum(row.finished for row in rows), len({row.seed for row in rows})
    return f"{finished} finished runs of {len(rows)}, {seeds} seed{'s' if seeds > 1 else ''}"


def unique_names(text: str) -> str:
    """HTML in which no two SVGs name a part alike: names get the picture's number, those that nothing uses go."""
    numbers = itertools.count()
    return re.sub(r"<svg.*?</svg>", lambda found: _renamed(found.group(), next(numbers)), text, flags=re.DOTALL)


def _renamed(svg: str, number: int) -> str:
    used = set(re.findall(r'(?:href="#|url\(#)([^")]+)', svg))
    svg = re.sub(r' id="([^"]*)"', lambda found: f' id="s{number}-{found[1]}"' if found[1] in used else "", svg)
    return re.sub(r'(href="#|url\(#)', rf"\g<1>s{number}-", svg)


def _document(name: str, body: str) -> str:
    light, dark = plots.themes()
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{escape(name)}</title>
<style>
:root {{ {_variables(LIGHT | light)} }}
@media (prefers-color-scheme: dark) {{ :root {{ {_variables(DARK | dark)} }} }}
{STYLE.read_text(encoding="utf-8")}</style>
</head>
<body><main>
{unique_names(body)}
</main></body>
</html>
"""


def _variables(values: dict[str, str]) -> str:
    return " ".join(f"{name}: {value};" for name, value in values.items())
