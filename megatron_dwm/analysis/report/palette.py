"""Colors of the page's figures, for a light page and for a dark one."""

from __future__ import annotations

INK, FAINT, GRID, PAPER = "#1d232b", "#7a828d", "#e3e6ea", "#ffffff"
"""Colors of text, of lines in the background, of grid lines, of labels' backgrounds."""
COLORS = ["#3566b8", "#d9782d", "#2e8b62", "#b8476a", "#7a5bb0", "#8f6b2f", "#3a94a8", "#6b7480"]
"""Colors of different lines."""
STAGES = ["#a9c4ee", "#7fa6e2", "#5a89d2", "#3c6cba", "#2a5196", "#1b3a70"]
"""Colors of stages, in order."""

DARK = {
    INK: "#e4e8ee",
    FAINT: "#7b8490",
    GRID: "#2b323b",
    PAPER: "#171b21",
    **dict(
        zip(
            COLORS,
            ["#7ba6ee", "#f0a263", "#67c79a", "#ee86a6", "#b59bea", "#cfae6d", "#70cadd", "#a9b2be"],
            strict=True,
        )
    ),
    **dict(zip(STAGES, ["#33517f", "#42699f", "#5682c0", "#749fdc", "#9bbdf0", "#c6dafa"], strict=True)),
}
"""The color of a dark page for each color of a light one."""


def color(number: int) -> str:
    """Return the color of a line; they repeat."""
    return COLORS[number % len(COLORS)]


def dash(number: int, colors: int = len(COLORS)) -> str:
    """Return the dashes of a line; they change where the colors repeat."""
    return ("solid", "dash", "dot")[number // colors % 3]


def stage_color(place: int, stages: int) -> str:
    """Return the color of a stage by its position: the later, the stronger."""
    return STAGES[round(place * (len(STAGES) - 1) / max(1, stages - 1))] if stages > 1 else STAGES[3]


def faded(hex_color: str, opacity: float) -> str:
    """Return a translucent version of a color."""
    red, green, blue = (int(hex_color[start : start + 2], 16) for start in (1, 3, 5))
    return f"rgba({red},{green},{blue},{opacity})"
