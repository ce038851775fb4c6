"""Colours that colour-blind readers can tell apart (Okabe and Ito, 2008), for the dashboard and the figures."""

from __future__ import annotations

Colour = tuple[int, int, int]  # red, green, blue in 0..255

HUES: list[Colour] = [(0, 114, 178), (213, 94, 0), (0, 158, 115), (204, 121, 167), (86, 180, 233), (230, 159, 0)]
BLACK: Colour = (0, 0, 0)


def shade(hue: Colour, index: int, count: int) -> Colour:
    """Tint number `index` of `count`: the first is light, the last is the hue itself."""
    weight = 1 if count == 1 else 0.35 + 0.65 * index / (count - 1)
    red, green, blue = (round(255 - weight * (255 - value)) for value in hue)
    return red, green, blue


def rgb(colour: Colour) -> str:
    """The colour as "#rrggbb", which both Plotly and matplotlib understand."""
    return "#{:02x}{:02x}{:02x}".format(*colour)
