"""Plots as inline SVG. Colours, fonts and dark mode are the page's: a shape has a class, not a colour."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from html import escape
from itertools import pairwise

WIDTH, HEIGHT = 440, 300
_MARGIN, _TOP, _BOTTOM, _ROW = 8, 24, 44, 62
_LETTER = 7.2  # width of one, about


@dataclass(frozen=True)
class Axis:
    """An axis: its title, its range, and whether it is logarithmic."""

    title: str
    low: float
    high: float
    is_log: bool = False
    ticks: Sequence[float] = ()  # none: round numbers

    @classmethod
    def around(cls, title: str, values: Sequence[float], is_log: bool = False, margin: float = 0.08) -> "Axis":
        """An axis that holds these values with some room."""
        finite = [value for value in values if math.isfinite(value) and (value > 0 or not is_log)] or [1.0]
        low, high = min(finite), max(finite)
        if is_log:
            room = (high / low) ** margin if high > low else 2.0
            return cls(title, low / room, high * room, True)
        room = (high - low) * margin or abs(high) * margin or 1.0
        return cls(title, low - room, high + room)

    def unit(self, value: float) -> float:
        """Where a value is between the ends, 0 to 1."""
        low, high = (math.log(self.low), math.log(self.high)) if self.is_log else (self.low, self.high)
        return ((math.log(value) if self.is_log else value) - low) / (high - low)

    def holds(self, value: float) -> bool:
        """Whether a value can be drawn."""
        return math.isfinite(value) and (value > 0 or not self.is_log)

    def marks(self, most: int = 5) -> Sequence[tuple[float, str]]:
        """Round numbers of this axis, and their texts."""
        round_ones = _log_marks if self.is_log else partial(_even_marks, most=most)
        values = self.ticks or round_ones(self.low, self.high)
        return [(value, number(value)) for value in values]


@dataclass(frozen=True)
class Line:
    """A line of a plot; one with a `vae` is highlighted with it, one without is a reference."""

    name: str
    xs: Sequence[float]
    ys: Sequence[float]
    vae: int | None = None


@dataclass(frozen=True)
class Point:
    """A point of a scatter plot, with the interval of y."""

    name: str
    x: float
    y: float
    interval: tuple[float, float] | None = None
    vae: int | None = None


@dataclass(frozen=True)
class Histogram:
    """How the values of one VAE are distributed; one edge more than counts."""

    name: str
    edges: Sequence[float]
    counts: Sequence[int]
    median: float
    vae: int


def number(value: float) -> str:
    """A number as short as it is exact enough for an axis."""
    if value and (abs(value) >= 1e5 or abs(value) < 1e-3):
        mantissa, _, exponent = f"{value:.0e}".partition("e")
        power = f"10{str(int(exponent)).translate(str.maketrans('-0123456789', '⁻⁰¹²³⁴⁵⁶⁷⁸⁹'))}"
        return power if mantissa == "1" else f"{mantissa}·{power}"
    return f"{value:g}".replace("-", "−")


def lines(series: Sequence[Line], x: Axis, y: Axis, summary: str) -> str:
    """Lines, each with its name at its end."""
    room = max((len(line.name) for line in series), default=0) * _LETTER + 8
    frame = _Frame(x, y, right=WIDTH - _MARGIN - room)
    drawn, ends = [], []
    for line in series:
        places = [
            (frame.across(a), frame.down(b)) for a, b in zip(line.xs, line.ys, strict=True) if x.holds(a) and y.holds(b)
        ]
        if not places:
            continue
        path = "M" + "L".join(f"{a:.1f} {b:.1f}" for a, b in places)
        dots = (
            "".join(f'<circle cx="{a:.1f}" cy="{b:.1f}" r="2.5"/>' for a, b in places)
            if line.vae is not None and len(places) <= 8
            else ""
        )
        drawn.append(f'<g {_of(line.vae)}><path class="line" d="{path}"/>{dots}</g>')
        ends.append((line, places[-1]))
    for (line, (across, _)), down in zip(ends, _spread([down for _, (_, down) in ends]), strict=True):
        drawn.append(
            f'<text {_of(line.vae, "label")} x="{across + 8:.1f}" y="{down + 4:.1f}">{escape(line.name)}</text>'
        )
    return _svg(frame.grid() + "".join(drawn), summary)


def scatter(points: Sequence[Point], x: Axis, y: Axis, summary: str) -> str:
    """Points with their names beside them."""
    frame = _Frame(x, y)
    places = [(frame.across(point.x), frame.down(point.y)) for point in points]
    drawn = []
    for point, (across, down), text in zip(points, places, _spread([down for _, down in places]), strict=True):
        whisker = ""
        if point.interval:
            low, high = (frame.down(value) for value in point.interval)
            whisker = f'<path class="whisker" d="M{across:.1f} {low:.1f}V{high:.1f}"/>'
        is_right = across + 12 + len(point.name) * _LETTER > WIDTH
        side = f'x="{across - 10:.1f}" text-anchor="end"' if is_right else f'x="{across + 10:.1f}"'
        drawn.append(
            f'<g {_of(point.vae)}>{whisker}<circle cx="{across:.1f}" cy="{down:.1f}" r="5"/>'
            f'<text class="label" {side} y="{text + 4:.1f}">{escape(point.name)}</text></g>'
        )
    return _svg(frame.grid() + "".join(drawn), summary)


def distribution(rows: Sequence[Histogram], x: Axis, summary: str) -> str:
    """One histogram a VAE, below each other on one axis, each with a bar at its median."""
    height = _ROW * len(rows) + _BOTTOM
    frame = _Frame(x, None, left=_MARGIN, height=height)
    highest = max((max(row.counts, default=0) for row in rows), default=0) or 1
    drawn = []
    for place, row in enumerate(rows):
        base = _ROW * (place + 1) - 4
        columns = ""
        for low, high, count in zip(row.edges, row.edges[1:], row.counts, strict=False):
            left, right = frame.across(low), frame.across(high)
            tall = (_ROW - 24) * count / highest
            columns += (
                f'<rect x="{left + 0.5:.1f}" y="{base - tall:.1f}" width="{right - left - 1:.1f}" height="{tall:.1f}"/>'
            )
        middle = frame.across(row.median)
        drawn.append(
            f'<g {_of(row.vae)}><text class="label" x="{_MARGIN}" y="{base - _ROW + 18}">{escape(row.name)}</text>'
            f'{columns}<path class="rule" d="M{_MARGIN} {base}H{WIDTH - _MARGIN}"/>'
            f'<path class="median" d="M{middle:.1f} {base - _ROW + 22}V{base + 4}"/></g>'
        )
    return _svg(frame.x_axis() + "".join(drawn), summary, height)


def bars(values: Sequence[tuple[str, float, str]], summary: str) -> str:
    """Horizontal bars: name, length, and what is written behind it."""
    step = 38
    longest = max((value for _, value, _ in values), default=1) or 1
    drawn = []
    for row, (name, value, text) in enumerate(values):
        top = step * row
        width = max(1.5, value / longest * (WIDTH - 90))
        drawn.append(
            f'<text class="label" x="0" y="{top + 13}">{escape(name)}</text>'
            f'<rect class="bar" x="0" y="{top + 19}" width="{width:.1f}" height="8" rx="1"/>'
            f'<text class="tick" x="{width + 8:.1f}" y="{top + 27}">{escape(text)}</text>'
        )
    return _svg("".join(drawn), summary, max(step, step * len(values)))


@dataclass(frozen=True)
class _Frame:
    """Where numbers lie on the paper."""

    x: Axis
    y: Axis | None
    left: float = 52
    right: float = WIDTH - _MARGIN
    height: float = HEIGHT

    def across(self, value: float) -> float:
        return self.left + self.x.unit(value) * (self.right - self.left)

    def down(self, value: float) -> float:
        assert self.y is not None
        return self.height - _BOTTOM - self.y.unit(value) * (self.height - _BOTTOM - _TOP)

    def grid(self) -> str:
        assert self.y is not None
        parts = [f'<text class="axis" x="0" y="10">{escape(self.y.title)}</text>']
        for value, text in self.y.marks():
            down = self.down(value)
            parts.append(f'<path class="rule" d="M{self.left} {down:.1f}H{self.right:.1f}"/>')
            parts.append(f'<text class="tick" x="{self.left - 8}" y="{down + 4:.1f}" text-anchor="end">{text}</text>')
        return "".join(parts) + self.x_axis()

    def x_axis(self) -> str:
        base = self.height - _BOTTOM
        parts = [
            f'<text class="axis" x="{self.right:.1f}" y="{base + 36}" text-anchor="end">{escape(self.x.title)}</text>'
        ]
        for value, text in self.x.marks():
            across = self.across(value)
            parts.append(f'<path class="tickmark" d="M{across:.1f} {base}v4"/>')
            parts.append(f'<text class="tick" x="{across:.1f}" y="{base + 17}" text-anchor="middle">{text}</text>')
        return "".join(parts)


def _svg(body: str, summary: str, height: int = HEIGHT) -> str:
    return f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{escape(summary)}">{body}</svg>'


def _of(vae: int | None, kind: str = "") -> str:
    classes = f"{kind} {'reference' if vae is None else 'vae'}".strip()
    return f'class="{classes}"' + ("" if vae is None else f' data-vae="{vae}"')


def _spread(places: Sequence[float], gap: float = 15.0) -> list[float]:
    """Where labels go so that none covers another, in the order given."""
    order = sorted(range(len(places)), key=lambda index: places[index])
    spread = list(places)
    for before, index in pairwise(order):
        spread[index] = max(spread[index], spread[before] + gap)
    over = max(0.0, max(spread, default=0.0) - (HEIGHT - _BOTTOM - 8))
    limit = math.inf
    for index in reversed(order):
        spread[index] = min(spread[index] - (over if limit == math.inf else 0.0), limit)
        limit = spread[index] - gap
    return spread


def _even_marks(low: float, high: float, most: int) -> list[float]:
    raw = (high - low) / most
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= raw)
    first = math.ceil(low / step - 1e-9)
    return [round(place * step, 12) for place in range(first, math.floor(high / step + 1e-9) + 1)]


def _log_marks(low: float, high: float) -> list[float]:
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    steps = (1,) if math.log10(high / low) > 2 else (1, 2, 5)
    marks = [factor * 10.0**power for power in powers for factor in steps]
    return [mark for mark in marks if low <= mark <= high]
