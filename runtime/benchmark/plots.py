"""Drawings for the report page: SVG marks without text in them, text as HTML beside them.

A lane is an SVG of 1000 x its height that is stretched to whatever width there is, with strokes that do not stretch, so
that a report fits a phone and a wide screen, and its text is always readable text. Colours are CSS classes, which the
page defines for light and dark. Every drawing has a title and a description for those who do not see it.
"""

from __future__ import annotations

import html
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

__all__ = ["Scale", "axis", "band", "bars", "dots", "lane", "line_chart", "marks", "nice_ticks", "polyline"]

WIDTH = 1000
_MOST_DOTS = 600
_GOLDEN = 0.618033988749895


@dataclass(frozen=True)
class Scale:
    """Maps values from [low, high] to [0, 1000], linearly or by logarithm."""

    low: float
    high: float
    log: bool = False

    @classmethod
    def around(cls, values: Iterable[float], *, log: bool, room: float = 0.04) -> Scale:
        """A scale that holds `values`: a linear one from zero, a logarithmic one with some room on both sides."""
        given = [v for v in values if v > 0] or [1.0]
        low, high = min(given), max(given)
        if not log:
            return cls(0.0, high * (1 + room))
        width = max(math.log(high / low), 0.1) * room
        return cls(low / math.exp(width), high * math.exp(width), log=True)

    def __call__(self, value: float) -> float:
        """The place of `value`, within the drawing."""
        if self.log:
            share = math.log(max(value, self.low) / self.low) / math.log(self.high / self.low)
        else:
            share = (value - self.low) / (self.high - self.low)
        return round(WIDTH * min(1.0, max(0.0, share)), 1)


def nice_ticks(scale: Scale, count: int = 6) -> list[float]:
    """Round values (1, 2 or 5 times a power of ten) within the scale, about `count` of them."""
    if scale.log:
        powers = range(math.floor(math.log10(scale.low)), math.ceil(math.log10(scale.high)) + 1)
        for digits in ((1, 2, 3, 5, 7), (1, 2, 5), (1, 3), (1,)):
            ticks = [d * 10.0**p for p in powers for d in digits if scale.low <= d * 10.0**p <= scale.high]
            if len(ticks) <= count + 1:
                break
        if len(ticks) >= 3:
            return ticks
    span = scale.high - scale.low
    step = 10.0 ** math.floor(math.log10(span / count))
    step *= next(m for m in (1, 2, 5, 10) if m * step * count >= span)
    first = math.ceil(scale.low / step)
    return [i * step for i in range(first, math.floor(scale.high / step) + 1)]


def axis(scale: Scale, unit: str, form: str = "g") -> str:
    """The numbers under (or over) a column of lanes, as HTML placed by percent."""
    cells = []
    for value in nice_ticks(scale):
        place = scale(value) / 10
        # The outermost numbers would stick out, so they lean inwards.
        side = " first" if place < 3 else " last" if place > 97 else ""
        cells.append(f'<span class="tick{side}" style="left:{place:.2f}%">{value:{form}}</span>')
    return f'<div class="axis" aria-hidden="true">{"".join(cells)}<span class="unit">{html.escape(unit)}</span></div>'


def lane(content: str, height: int, title: str, description: str, scale: Scale | None = None) -> str:
    """One stretched SVG with its grid."""
    grid = ""
    if scale is not None:
        path = "".join(f"M{scale(v)} 0V{height}" for v in nice_ticks(scale))
        grid = f'<path class="grid" d="{path}"/>'
    return (
        f'<svg class="lane" role="img" viewBox="0 0 {WIDTH} {height}" preserveAspectRatio="none" '
        f'style="height:{height}px"><title>{html.escape(title)}</title><desc>{html.escape(description)}</desc>'
        f"{grid}{content}</svg>"
    )


def dots(values: Sequence[float], scale: Scale, height: int, color: str) -> str:
    """One dot per value, spread over the height so that they do not hide each other; of very many, an even choice."""
    chosen = values
    if len(values) > _MOST_DOTS:
        ordered = sorted(values)  # even over the distribution, with both ends
        last = len(ordered) - 1
        chosen = [ordered[round(i * last / (_MOST_DOTS - 1))] for i in range(_MOST_DOTS)]
    path = "".join(f"M{scale(v)} {4 + (height - 8) * ((i * _GOLDEN) % 1):.1f}h0" for i, v in enumerate(chosen))
    return f'<path class="dots {color}" d="{path}"/>'


def marks(places: Sequence[tuple[float, str]], scale: Scale, height: int) -> str:
    """Upright strokes at values, each with a CSS class."""
    return "".join(f'<path class="{name}" d="M{scale(v)} 2V{height - 2}"/>' for v, name in places)


def band(low: float, high: float, scale: Scale, top: float, height: float, name: str) -> str:
    """A filled rectangle between two values."""
    left, right = scale(low), scale(high)
    return f'<rect class="{name}" x="{left}" y="{top:g}" width="{max(right - left, 1.5):.1f}" height="{height:g}"/>'


def bars(parts: Sequence[tuple[float, str]], scale: Scale, height: int) -> str:
    """A bar of parts laid end to end, each a length and a CSS class."""
    made, start = [], 0.0
    for length, name in parts:
        made.append(band(start, start + length, scale, 4, height - 8, name))
        start += length
    return "".join(made)


def polyline(points: Sequence[tuple[float, float]], name: str) -> str:
    """A line through points given in drawing units."""
    return f'<path class="line {name}" d="M{"L".join(f"{x:.1f} {y:.1f}" for x, y in points)}"/>'


def line_chart(
    lines: Sequence[tuple[str, str, Sequence[tuple[float, float]]]],
    title: str,
    x_label: str,
    y_label: str,
) -> str:
    """A small chart of y over x, x in equal steps: an SVG of fixed shape with its text inside.

    Args:
        lines: (name, CSS class, points (x, y)).
    """
    width, height, left, bottom, top, right = 340, 220, 46, 34, 14, 12
    xs = sorted({x for _, _, points in lines for x, _ in points})
    y = Scale.around([v for _, _, points in lines for _, v in points], log=False, room=0.08)

    def place(point: tuple[float, float]) -> tuple[float, float]:
        share = xs.index(point[0]) / max(1, len(xs) - 1) if len(xs) > 1 else 0.5
        return left + share * (width - left - right), height - bottom - y(point[1]) / WIDTH * (height - bottom - top)

    made = []
    for value in nice_ticks(y, 4):
        up = place((xs[0], value))[1]
        made.append(f'<path class="grid" d="M{left} {up:.1f}H{width - right}"/>')
        made.append(f'<text class="small" x="{left - 6}" y="{up + 4:.1f}" text-anchor="end">{value:g}</text>')
    for x in xs:
        across = place((x, 0.0))[0]
        made.append(
            f'<text class="small" x="{across:.1f}" y="{height - bottom + 16}" text-anchor="middle">{x:g}</text>'
        )
    for _, color, points in lines:
        placed = [place(p) for p in points]
        made.append(polyline(placed, color))
        made += [f'<circle class="point {color}" cx="{a:.1f}" cy="{b:.1f}" r="3.5"/>' for a, b in placed]
    made.append(
        f'<text class="small" x="{(left + width - right) / 2:.0f}" y="{height - 4}" text-anchor="middle">'
        f"{html.escape(x_label)}</text>"
    )
    text = "; ".join(f"{name}: " + ", ".join(f"{v:.4g} at {x:g}" for x, v in points) for name, _, points in lines)
    return (
        f'<svg class="chart" role="img" viewBox="0 0 {width} {height}"><title>{html.escape(title)}</title>'
        f"<desc>{html.escape(f'{y_label}: {text}')}</desc>{''.join(made)}</svg>"
    )
