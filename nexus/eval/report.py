"""One self-contained HTML file out of tables, curves and exhibits. Knows nothing of what was measured.

The page needs no network, no other file and no JavaScript: sounds are wav and pictures PNG data URLs, plots are SVG
written by hand. Equal reports give equal bytes. Everything from data is escaped, and the page's own policy forbids
requests and foreign scripts besides.
"""

import base64
import hashlib
import math
import os
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import TypeGuard, assert_never

import numpy as np

from nexus.errors import NexusError
from nexus.eval.markup import escaped, missing, rounded
from nexus.eval.plots import Curves, plot
from nexus.media import load, wav_bytes
from nexus.sight import png_bytes
from nexus.types import Audio, Image

Cell = str | int | float | bool | None | Audio | Image


@dataclass(frozen=True)
class Table:
    """Rows of cells; with sound or pictures it becomes an exhibit with roomy rows, one card per row on a phone.

    A bool is a mark (right, wrong), None is "not there" (an en dash), an Audio a player, an Image a picture. Numbers
    are rounded for the eye; the page keeps the exact value. Columns named in `bars` show a bar behind each number,
    full at 1, or at the column's largest number if that is larger.
    """

    title: str
    note: str
    columns: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    bars: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        wrong = [index for index, row in enumerate(self.rows) if len(row) != len(self.columns)]
        assert not wrong, f"table {self.title!r}: rows {wrong} do not have {len(self.columns)} cells"
        assert set(self.bars) <= set(self.columns), f"table {self.title!r}: no column for bars {self.bars}"


@dataclass(frozen=True)
class Drawing:
    """A figure that is drawn already; `svg` is trusted markup."""

    title: str
    note: str
    svg: str


Block = Table | Curves | Drawing


@dataclass(frozen=True)
class Report:
    """A page: title, a lead paragraph (an empty line starts another), facts as (name, value), and sections as
    (heading, blocks)."""

    title: str
    lead: str
    facts: tuple[tuple[str, str], ...]
    sections: tuple[tuple[str, tuple[Block, ...]], ...]


def write_report(path: Path, report: Report) -> None:
    """Write the page so that `path` is either whole or what it was before.

    Media that are still files are read (sound at 16 kHz). Raises BadMedia for those that cannot be read, and
    NexusError where the page cannot be written.
    """
    page = _page(report).encode()
    partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        partial.write_bytes(page)
        os.replace(partial, path)
    except OSError as error:
        raise NexusError(f"{path}: cannot be written ({error.strerror}); name a file in an existing folder") from None
    finally:
        partial.unlink(missing_ok=True)


def _page(report: Report) -> str:
    digest = base64.b64encode(hashlib.sha256(_SCRIPT.encode()).digest()).decode()
    policy = (
        f"default-src 'none'; img-src data:; media-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    )
    headings = [heading for heading, _ in report.sections]
    links = "".join(f'<a href="#s{i}">{escaped(heading)}</a>' for i, heading in enumerate(headings, 1))
    facts = "".join(f"<div><dt>{escaped(name)}</dt><dd>{escaped(value)}</dd></div>" for name, value in report.facts)
    parts = [
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">',
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        '<meta name="color-scheme" content="light dark">',
        f"<title>{escaped(report.title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>",
        f"<header>\n<h1>{escaped(report.title)}</h1>",
        *(f'<p class="lead">{escaped(paragraph)}</p>' for paragraph in report.lead.split("\n\n") if paragraph.strip()),
        f'<dl class="facts">{facts}</dl>' if facts else "",
        "</header>",
        f'<nav aria-label="Contents">{links}</nav>' if len(headings) > 1 else "",
        "<main>",
        *(_section(f"s{i}", heading, blocks) for i, (heading, blocks) in enumerate(report.sections, 1)),
        f"</main>\n<script>{_SCRIPT}</script>\n</body>\n</html>\n",
    ]
    return "\n".join(part for part in parts if part)


def _section(anchor: str, heading: str, blocks: Sequence[Block]) -> str:
    parts = [f'<section id="{anchor}" aria-labelledby="{anchor}-h">\n<h2 id="{anchor}-h">{escaped(heading)}</h2>']
    numbered = enumerate(blocks, 1)
    for is_plot, group in groupby(numbered, key=lambda pair: not isinstance(pair[1], Table)):
        figures = "\n".join(_figure(f"{anchor}-b{i}", block) for i, block in group)
        parts.append(f'<div class="plots">\n{figures}\n</div>' if is_plot else figures)
    return "\n".join([*parts, "</section>"])


def _figure(anchor: str, block: Block) -> str:
    note = f'<p class="note">{escaped(block.note)}</p>' if block.note else ""
    caption = f'<figcaption><h3 id="{anchor}">{escaped(block.title)}</h3>{note}</figcaption>'
    match block:
        case Table():
            body = _table(anchor, block)
        case Curves():
            body = plot(block)
        case Drawing():
            body = block.svg
    return f"<figure>{caption}\n{body}</figure>"


# Cells

BRIEF = 18  # columns of texts no longer than this do not wrap


def _decimals(cells: Sequence[Cell]) -> int:
    """Digits after the point that the column's floats have in their shortest spelling."""
    spelled = [str(float(cell)) for cell in cells if isinstance(cell, float)]
    return max((3 if "e" in number else len(number.partition(".")[2]) for number in spelled), default=3)


def _cell(cell: Cell, label: str, decimals: int) -> str:
    """The content of a cell; `label` names a sound or a picture to those who do not see it."""
    match cell:
        case None:
            return missing("–")
        case bool():
            mark, word = ("✓", "right") if cell else ("✗", "wrong")
            return f'<span class="{word}" role="img" aria-label="{word}">{mark}</span>'
        case int() | float():
            return rounded(cell, decimals)
        case str():
            return escaped(cell)
        case Audio():
            return _sound(cell, label)
        case Image():
            return _picture(cell, label)
        case _:
            assert_never(cell)


def _sound(sound: Audio, label: str) -> str:
    loaded = load(sound) if sound.samples is None else sound
    assert isinstance(loaded, Audio) and loaded.samples is not None
    if not len(loaded.samples):
        return missing("no sound")
    if not np.isfinite(loaded.samples).all():
        return missing("sound with values that are not finite")
    url = base64.b64encode(wav_bytes(loaded.samples, loaded.rate_hz)).decode()
    # Browsers limit how many players may be ready at once; without preload one is made when somebody listens.
    player = f'<audio controls preload="none" aria-label="{escaped(label)}" src="data:audio/wav;base64,{url}"></audio>'
    return f"{player}<small>{loaded.seconds:.1f} s</small>"


def _picture(picture: Image, label: str) -> str:
    loaded = load(picture) if picture.pixels is None else picture
    assert isinstance(loaded, Image) and loaded.pixels is not None
    height, width = loaded.pixels.shape[:2]
    url = base64.b64encode(png_bytes(loaded.pixels)).decode()
    return f'<img width="{width}" height="{height}" alt="{escaped(label)}" src="data:image/png;base64,{url}">'


# Tables


@dataclass(frozen=True)
class _Column:
    """How a column is set: its class, digits after the point, and the number that fills a bar (0: no bars)."""

    name: str
    kind: str
    decimals: int
    full: float


def _column(name: str, cells: Sequence[Cell], has_bars: bool) -> _Column:
    full = max([1.0, *(float(cell) for cell in cells if _is_number(cell))]) if has_bars else 0.0
    return _Column(name, _kind(cells), _decimals(cells), full)


def _kind(cells: Sequence[Cell]) -> str:
    given = [cell for cell in cells if cell is not None]
    if any(isinstance(cell, Audio | Image) for cell in given):
        return "media"
    if given and all(isinstance(cell, bool) for cell in given):
        return "mark"
    if given and all(isinstance(cell, int | float) for cell in given):
        return "number"
    return "words" if any(len(str(cell)) > BRIEF for cell in given) else "words brief"


def _is_number(cell: Cell) -> TypeGuard[int | float]:
    return isinstance(cell, int | float) and not isinstance(cell, bool) and math.isfinite(cell)


def _table(anchor: str, table: Table) -> str:
    if not table.rows:
        return f"<p>{missing('no rows')}</p>"
    by_column = zip(table.columns, zip(*table.rows, strict=True), strict=True)
    columns = [_column(name, cells, name in table.bars) for name, cells in by_column]
    heads = "".join(
        f'<th scope="col" role="columnheader" class="{column.kind}">{escaped(column.name)}</th>' for column in columns
    )
    rows = "\n".join(f'<tr role="row">{_row(row, columns, i)}</tr>' for i, row in enumerate(table.rows, 1))
    look = ' class="exhibit"' if any(column.kind == "media" for column in columns) else ""
    # Roles are written out because rows laid out as cards are no table to a screen reader otherwise.
    return (
        f'<div class="scroll" role="region" aria-labelledby="{anchor}" tabindex="0">'
        f'<table role="table" aria-labelledby="{anchor}"{look}>\n'
        f'<thead role="rowgroup"><tr role="row">{heads}</tr></thead>\n'
        f'<tbody role="rowgroup">\n{rows}\n</tbody></table></div>'
    )


def _row(row: Sequence[Cell], columns: Sequence[_Column], number: int) -> str:
    name = next((cell for cell in row if isinstance(cell, str) and cell.strip()), f"row {number}")
    cells = []
    for cell, column in zip(row, columns, strict=True):
        content = _cell(cell, f"{column.name}: {name}", column.decimals)
        if column.full and _is_number(cell):
            content = f'<span class="bar" style="--share:{max(0.0, cell / column.full):.1%}">{content}</span>'
        cells.append(f'<td role="cell" class="{column.kind}" data-column="{escaped(column.name)}">{content}</td>')
    return "".join(cells)


_SCRIPT = """// One sound at a time.
document.addEventListener("play", event => {
  for (const sound of document.querySelectorAll("audio")) if (sound !== event.target) sound.pause();
}, true);"""

_STYLE = """
:root { color-scheme: light dark; --paper: #f6f7f9; --card: #fff; --ink: #1a2130; --soft: #566072; --rule: #dfe3ea;
  --tint: #dbe6ff; --accent: #2456c8; --right: #0b7a43; --wrong: #c0282d; --c0: #2563eb; --c1: #c2500b; --c2: #0b8457;
  --c3: #9333ea; --c4: #c81e5b; --c5: #0e7490; --c6: #856404; --c7: #5b6472; }
@media (prefers-color-scheme: dark) { :root { --paper: #10141b; --card: #181e28; --ink: #e6eaf1; --soft: #9ba7b9;
  --rule: #2c3543; --tint: #26406f; --accent: #8db0ff; --right: #4ade9a; --wrong: #ff8a8a; --c0: #7aa5ff; --c1: #fb9a4b;
  --c2: #3ed6a0; --c3: #c792ff; --c4: #ff7fa6; --c5: #3fd0e6; --c6: #e5c04b; --c7: #a5afbe; } }
* { box-sizing: border-box; }
html { scroll-behavior: smooth; -webkit-text-size-adjust: 100%; }
body { margin: 0; background: var(--paper); color: var(--ink); font: 16px/1.55 system-ui, sans-serif; }
header, main { max-width: 1240px; margin: 0 auto; padding: 44px 20px 20px; }
main { padding: 0 20px 60px; }
h1 { margin: 0 0 10px; font-size: clamp(1.7rem, 4.5vw, 2.4rem); line-height: 1.15; letter-spacing: -0.02em; }
h2 { margin: 0 0 14px; font-size: 1.35rem; letter-spacing: -0.01em; }
h3 { margin: 0; font-size: 1.02rem; }
h1, h2, h3, p, dd, b { overflow-wrap: anywhere; }
.lead { max-width: 46rem; margin: 0 0 10px; font-size: 1.08rem; color: var(--soft); white-space: pre-line; }
.facts { display: grid; grid-template-columns: repeat(auto-fill, minmax(160px, 1fr)); gap: 10px; margin: 24px 0 0; }
.facts div, figure { background: var(--card); border: 1px solid var(--rule); border-radius: 12px; }
.facts div { padding: 10px 14px; }
dt { font-size: 0.82rem; color: var(--soft); }
dd { margin: 0; font-weight: 600; font-variant-numeric: tabular-nums; }
nav { position: sticky; top: 0; z-index: 1; display: flex; gap: 4px; overflow-x: auto; background: var(--paper);
  padding: 8px max(10px, calc(50% - 610px)); border-bottom: 1px solid var(--rule); }
nav a { flex: none; padding: 4px 10px; border-radius: 8px; color: var(--accent); text-decoration: none; }
nav a:hover { background: var(--tint); }
:focus-visible { outline: 2px solid var(--accent); outline-offset: 2px; }
section { padding-top: 34px; scroll-margin-top: 36px; }
figure { margin: 0 0 18px; padding: 16px 18px; }
figcaption { margin-bottom: 12px; }
.note { max-width: 46rem; margin: 2px 0 0; font-size: 0.9rem; color: var(--soft); white-space: pre-line; }
.plots { display: grid; gap: 18px; margin-bottom: 18px;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, 440px), 1fr)); }
.plots figure { margin: 0; display: flex; flex-direction: column; }
.plots figure > svg { margin-top: auto; }
.scroll { overflow-x: auto; margin: 0 -18px; padding: 0 18px; }
table { border-collapse: collapse; min-width: min(100%, 44rem); font-size: 0.94rem; }
th, td { padding: 8px 20px 8px 0; text-align: left; vertical-align: baseline; border-bottom: 1px solid var(--rule); }
th { padding-top: 0; font-size: 0.82rem; line-height: 1.3; color: var(--soft); vertical-align: bottom; }
th:last-child, td:last-child { padding-right: 0; }
tbody tr:last-child td { border-bottom: 0; padding-bottom: 0; }
.words { min-width: 8rem; max-width: 32rem; white-space: pre-line; overflow-wrap: break-word; }
.brief { min-width: 0; }
td.brief, td.number { white-space: pre; }
.number { text-align: right; font-variant-numeric: tabular-nums; }
.mark { text-align: center; }
.bar { display: block; min-width: 9rem; print-color-adjust: exact; background: no-repeat left / calc(100% - 4.2em) 8px
  linear-gradient(to right, var(--c0) var(--share), var(--rule) 0); }
.right, .wrong { font-weight: 700; color: var(--right); }
.wrong { color: var(--wrong); }
.missing { color: var(--soft); font-style: italic; }
.exhibit { width: 100%; }
.exhibit td { padding-top: 14px; padding-bottom: 14px; vertical-align: middle; }
td small { display: block; padding-left: 4px; font-size: 0.78rem; color: var(--soft); }
audio { display: block; width: 188px; height: 38px; }
img { display: block; width: auto; height: auto; min-width: 112px; max-width: min(100%, 320px); border-radius: 8px;
  border: 1px solid var(--rule); image-rendering: pixelated; }
svg { display: block; width: 100%; height: auto; overflow: visible; }
svg text { font-size: 13px; fill: var(--soft); font-variant-numeric: tabular-nums; }
text.x { text-anchor: middle; } text.y, text.scale { text-anchor: end; }
.grid, .axis { stroke: var(--rule); } .axis { stroke: var(--soft); }
.line { fill: none; stroke: var(--c); stroke-width: 1.8; stroke-linejoin: round; } .dashed { stroke-dasharray: 5 4; }
circle { fill: var(--c); } .c0 { --c: var(--c0); } .c1 { --c: var(--c1); } .c2 { --c: var(--c2); }
.c3 { --c: var(--c3); } .c4 { --c: var(--c4); } .c5 { --c: var(--c5); } .c6 { --c: var(--c6); } .c7 { --c: var(--c7); }
.legend { display: flex; flex-wrap: wrap; gap: 2px 18px; margin: 0 0 14px; padding: 0; list-style: none; }
.legend svg { display: inline-block; width: 24px; margin-right: 7px; vertical-align: middle; }
.legend path { stroke-width: 3; }
.legend b { font-size: 0.88rem; font-weight: 600; } .legend small { color: var(--soft); }
@media (max-width: 640px) {
  header, main { padding-left: 14px; padding-right: 14px; }
  figure { padding: 14px; } .scroll { margin: 0 -14px; padding: 0 14px; }
  svg text { font-size: 16px; } .words { min-width: 6.5rem; } .bar { min-width: 0; background: none; }
  .brief { min-width: 0; }
  .exhibit, .exhibit tbody, .exhibit tr, .exhibit td { display: block; }
  .exhibit thead { position: absolute; clip-path: inset(50%); }
  .exhibit tr { padding: 14px 0; border-bottom: 1px solid var(--rule); }
  .exhibit tr:last-child { border-bottom: 0; padding-bottom: 0; }
  .exhibit td { position: relative; max-width: none; min-height: 2.3rem; padding: 5px 0 5px 7rem; border: 0;
    text-align: left; white-space: pre-line; }
  .exhibit td::before { content: attr(data-column); position: absolute; left: 0; top: 7px; width: 6.4rem;
    font-size: 0.82rem; line-height: 1.3; color: var(--soft); }
  audio { width: 100%; }
}
@media print {
  body { background: none; font-size: 11pt; } nav, audio { display: none; } .scroll { overflow: visible; }
  .plots figure, tr { break-inside: avoid; } h2, figcaption { break-after: avoid; }
}
"""
