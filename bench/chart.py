"""The chart: the ratios as bars, readable on a light and on a dark page."""

import re
from collections.abc import Sequence
from pathlib import Path

import pygal  # type: ignore[import-untyped]
from pygal.style import Style  # type: ignore[import-untyped]

from bench.figures import Row

_GREY = "#7d8590"  # readable on both
_FONT = "system-ui, sans-serif"
_USELESS = re.compile(r"<!--.*?-->|<script.*?</script>", re.DOTALL)


def draw(rows: Sequence[Row], path: Path) -> None:
    """Write the rows that are ratios as an SVG file without external references."""
    ratios = [(row, row.measured) for row in reversed(rows) if not row.figure.unit and row.measured is not None]
    highest = max([1.0, *(measured for _, measured in ratios)])
    chart = pygal.HorizontalBar(
        js=[], style=_style(), range=(0, highest), width=900, height=110 + 70 * len(ratios), **_options()
    )
    chart.title = "Throughput, relative to a bare ASGI function or to bare argon2"
    chart.x_labels = [row.figure.title for row, _ in ratios]
    chart.add("measured", [round(measured, 3) for _, measured in ratios])
    chart.add("at least", [row.figure.bound for row, _ in ratios])
    text = chart.render(is_unicode=True)
    path.write_text(_USELESS.sub("", text), encoding="utf-8")


def _options() -> dict[str, object]:
    return {
        "print_values": True,
        "print_values_position": "center",
        "value_formatter": "{:.2f}".format,
        "show_y_guides": True,
        "legend_at_bottom": True,
        "legend_at_bottom_columns": 2,
        "disable_xml_declaration": True,
        "truncate_label": -1,
        "truncate_legend": -1,
    }


def _style() -> Style:
    return Style(
        background="transparent",
        plot_background="transparent",
        foreground=_GREY,
        foreground_strong=_GREY,
        foreground_subtle=_GREY,
        value_colors=("white", "black"),
        colors=("#1f6feb", "#b0b8c1"),
        guide_stroke_color=_GREY,
        major_guide_stroke_color=_GREY,
        opacity=1,
        opacity_hover=1,
        transition="0s",
        font_family=_FONT,
        title_font_size=16,
        label_font_size=13,
        major_label_font_size=13,
        value_font_size=12,
        legend_font_size=13,
    )
