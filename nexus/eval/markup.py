"""Text and numbers as HTML: what every part of a page says in the same way."""

import math
from html import escape

# What a browser would drop, replace or refuse (C0, C1, surrogates, bidirectional overrides) is shown by its code.
_CODES = [*range(9), 11, 12, *range(13, 32), *range(127, 160), *range(0x202A, 0x202F), *range(0x2066, 0x206A)]
_VISIBLE = {code: ascii(chr(code))[1:-1] for code in [*_CODES, *range(0xD800, 0xE000)]}


def escaped(text: str) -> str:
    """Any text, safe between tags and in quoted attributes."""
    return escape(text.translate(_VISIBLE), quote=True)


def missing(text: str) -> str:
    """What stands where something is not there; `text` is ours and not escaped."""
    return f'<span class="missing">{text}</span>'


def rounded(value: int | float, most_decimals: int = 3) -> str:
    """The rounded number, with the exact one as its machine-readable value."""
    size = abs(value)
    if isinstance(value, int):
        return f'<data value="{value}">{value:{"," if size >= 10_000 else ""}}</data>'
    if not math.isfinite(value):
        return missing(str(float(value)))
    if 0 < size < 1e-3 or size >= 1e9:
        shown = f"{value:.2g}" if size < 1 else f"{value:.3g}"
    else:
        decimals = min(most_decimals, 3 if size < 10 else 1 if size < 10_000 else 0)
        shown = f"{value + 0.0:,.{decimals}f}"  # + 0.0 makes -0.0 a plain 0
    return f'<data value="{float(value)!r}">{shown}</data>'
