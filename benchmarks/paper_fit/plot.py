"""Draws predicted against published seconds of table 6 as SVG: python benchmarks/paper_fit/plot.py"""

import math
from collections.abc import Iterator

from fit import HERE, Case, predict, read_cases, shipped_constants

from pipedit.plan.paper_variants import BASELINE, PIPEDIT

_SIDE, _GAP, _LEFT, _TOP = 360, 70, 60, 50
_LOW, _HIGH = 60.0, 8000.0
_TICKS = (100, 200, 500, 1000, 2000, 5000)
_COLOURS = {
    ("OpenSoraPlan", "A6000"): "#1f77b4",
    ("OpenSoraPlan", "L40"): "#2ca02c",
    ("HunyuanVideo", "A6000"): "#d62728",
}
_TITLES = {BASELINE: "offloading baseline", PIPEDIT: "PipeDiT (better of with and without Aco)"}


def _along(seconds: float) -> float:
    """Pixels from the lower end of an axis."""
    return _SIDE * math.log(seconds / _LOW) / math.log(_HIGH / _LOW)


def _panel(number: int, variant: str, points: list[tuple[Case, float]]) -> Iterator[str]:
    x0, y0 = _LEFT + number * (_SIDE + _GAP), _TOP + _SIDE
    yield f'<text x="{x0}" y="{_TOP - 14}" font-size="15">{_TITLES[variant]}</text>'
    yield f'<rect x="{x0}" y="{_TOP}" width="{_SIDE}" height="{_SIDE}" fill="none" stroke="#999"/>'
    for tick in _TICKS:
        at = _along(tick)
        yield f'<path d="M{x0 + at:.1f} {y0}v-{_SIDE}M{x0} {y0 - at:.1f}h{_SIDE}" stroke="#eee"/>'
        yield f'<text x="{x0 + at:.1f}" y="{y0 + 18}" text-anchor="middle">{tick}</text>'
        yield f'<text x="{x0 - 6}" y="{y0 - at + 4:.1f}" text-anchor="end">{tick}</text>'
    for factor, dashes in ((1.0, ""), (1.1, ' stroke-dasharray="4 3"'), (1 / 1.1, ' stroke-dasharray="4 3"')):
        low, high = max(_LOW, _LOW / factor), min(_HIGH, _HIGH / factor)
        start, end = (f"{x0 + _along(s):.1f} {y0 - _along(s * factor):.1f}" for s in (low, high))
        yield f'<path d="M{start}L{end}" stroke="#555"{dashes}/>'
    for case, predicted in points:
        where = f'cx="{x0 + _along(case.published_s):.1f}" cy="{y0 - _along(predicted):.1f}"'
        title = f"{case.model} {case.gpu} {case.shape}, {case.steps} steps: {case.published_s:.0f} s, {predicted:.0f} s"
        colour = _COLOURS[case.model, case.gpu]
        yield f'<circle {where} r="3" fill="{colour}" fill-opacity="0.7"><title>{title}</title></circle>'
    yield f'<text x="{x0 + _SIDE / 2}" y="{y0 + 38}" text-anchor="middle">published seconds of 10 prompts</text>'


def _legend() -> Iterator[str]:
    for number, ((model, gpu), colour) in enumerate(_COLOURS.items()):
        x = _LEFT + 230 * number
        yield f'<circle cx="{x}" cy="{_TOP + _SIDE + 62}" r="4" fill="{colour}"/>'
        yield f'<text x="{x + 10}" y="{_TOP + _SIDE + 66}">{model}, 8 x {gpu}</text>'
    yield f'<text x="{_LEFT + 690}" y="{_TOP + _SIDE + 66}">dashed: 10 %</text>'


def main() -> None:
    cases = [case for case in read_cases() if case.table == "6"]
    points = list(zip(cases, predict(cases, shipped_constants()), strict=True))
    width, height = _LEFT + 2 * _SIDE + _GAP + 20, _TOP + _SIDE + 80
    middle = f"translate(16 {_TOP + _SIDE / 2}) rotate(-90)"
    size, font = f'width="{width}" height="{height}"', 'font-family="sans-serif" font-size="12"'
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" {size} {font}>',
        f'<rect width="{width}" height="{height}" fill="white"/>',
        f'<text transform="{middle}" text-anchor="middle">predicted seconds</text>',
    ]
    for number, variant in enumerate((BASELINE, PIPEDIT)):
        lines += _panel(number, variant, [point for point in points if point[0].variant == variant])
    lines += [*_legend(), "</svg>"]
    (HERE / "table6.svg").write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
