"""Line charts as inline SVG, without a plotting library's fonts and mathematics: any word is shown as it is."""

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass

_WIDTH, _HEIGHT, _LEFT, _RIGHT, _TOP, _BOTTOM = 360, 216, 52, 10, 10, 40
_MOST = 400  # points of a line


@dataclass(frozen=True)
class Line:
    """One line of a chart; points whose ``y`` is not finite are left out.

    Attributes:
        name: what the legend calls it.
        color: a CSS colour.
        x: places, increasing.
        y: values, one per place.
        low: lower ends of an interval around ``y``, or empty for none.
        high: its upper ends.
    """

    name: str
    color: str
    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float] = ()
    high: Sequence[float] = ()

    def thinned(self) -> "Line":
        """At most 400 points, each the mean of as many neighbours."""
        n = -(-len(self.x) // _MOST)
        if n <= 1:
            return self
        columns = ([sum(v[i : i + n]) / len(v[i : i + n]) for i in range(0, len(v), n)] for v in self._columns())
        return Line(self.name, self.color, *columns)

    def finite(self) -> "Line":
        """The points whose values are all finite."""
        columns = self._columns()
        kept = [row for row in zip(*columns, strict=True) if all(map(math.isfinite, row))]
        return Line(self.name, self.color, *(list(c) for c in zip(*kept, strict=True))) if kept else self._empty()

    def _columns(self) -> list[Sequence[float]]:
        return [self.x, self.y, *([self.low, self.high] if self.low else [])]

    def _empty(self) -> "Line":
        return Line(self.name, self.color, (), ())


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """About ``count`` round numbers from ``low`` to ``high``.

    >>> ticks(0, 0.9), ticks(3, 130)
    ([0.0, 0.2, 0.4, 0.6, 0.8], [50.0, 100.0])
    """
    raw = (high - low) / count or 1.0
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= raw * (1 - 1e-9))
    found = range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)
    return [float(f"{i * step:.10g}") for i in found]


def chart(lines: Sequence[Line], x_label: str, y_label: str) -> str:
    """An ``<svg>`` of the lines with their intervals as bands, labelled axes and, for several lines, a legend.

    Returns:
        The element; empty where no line has a finite point.
    """
    lines = [line for line in (line.thinned().finite() for line in lines) if line.x]
    if not lines:
        return ""
    values = [v for line in lines for v in (*line.y, *line.low, *line.high)]
    places = [v for line in lines for v in line.x]
    left, right, low, high = min(places), max(places), min(values), max(values)
    pad = (high - low) * 0.06 or abs(high) * 0.1 or 1.0
    low, high = low - pad, high + pad

    def x(value: float) -> float:
        return round(_LEFT + (value - left) / (right - left or 1) * (_WIDTH - _LEFT - _RIGHT), 1)

    def y(value: float) -> float:
        return round(_TOP + (high - value) / (high - low) * (_HEIGHT - _TOP - _BOTTOM), 1)

    def path(xs: Sequence[float], ys: Sequence[float]) -> str:
        return "M" + "L".join(f"{x(a)} {y(b)}" for a, b in zip(xs, ys, strict=True))

    parts = []
    for value in ticks(low, high):
        parts.append(f'<path d="M{_LEFT} {y(value)}H{_WIDTH - _RIGHT}" stroke="#e8ebef"/>')
        parts.append(f'<text x="{_LEFT - 5}" y="{y(value) + 4}" text-anchor="end">{value:g}</text>')
    for value in ticks(left, right):
        parts.append(f'<text x="{x(value)}" y="{_HEIGHT - _BOTTOM + 15}" text-anchor="middle">{value:g}</text>')
    middle = (_LEFT + _WIDTH - _RIGHT) / 2
    parts.append(f'<text x="{middle}" y="{_HEIGHT - 6}" text-anchor="middle">{html.escape(x_label)}</text>')
    turned = f'transform="translate(12 {(_HEIGHT - _BOTTOM) / 2}) rotate(-90)" text-anchor="middle"'
    parts.append(f"<text {turned}>{html.escape(y_label)}</text>")
    for line in lines:
        if line.low:
            band = path([*line.x, *reversed(line.x)], [*line.high, *reversed(line.low)])
            parts.append(f'<path d="{band}Z" fill="{line.color}" opacity=".2"/>')
        parts.append(f'<path d="{path(line.x, line.y)}" fill="none" stroke="{line.color}" stroke-width="1.6"/>')
        if len(line.x) <= 30:
            parts += [
                f'<circle cx="{x(a)}" cy="{y(b)}" r="2.5" fill="{line.color}"/>'
                for a, b in zip(line.x, line.y, strict=True)
            ]
    legend = "".join(f'<span style="color:{line.color}">■</span> {html.escape(line.name)} ' for line in lines)
    head = f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{html.escape(y_label)}">'
    return head + "".join(parts) + "</svg>" + (f"<small>{legend}</small>" if len(lines) > 1 else "")
