"""The charts, readable on a light and on a dark page: ratios, cost by size, latencies under load."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import pygal  # type: ignore[import-untyped]
from pygal.style import Style  # type: ignore[import-untyped]

from bench.figures import Row

_GREY = "#7d8590"  # readable on both
_FONT = "system-ui, sans-serif"
_COLORS = ("#1f6feb", "#b0b8c1")
_MANY_COLORS = ("#1f6feb", "#2da44e", "#bf8700")
_USELESS = re.compile(r"<!--.*?-->|<script.*?</script>", re.DOTALL)


def draw(rows: Sequence[Row], sizes: Sequence[str], directory: Path) -> None:
    """Write each chart for which there are rows, as an SVG file without external references.

    sizes: what the points of a row belong to.
    """
    known = [row for row in rows if row.samples]
    charts: Mapping[str, pygal.HorizontalBar | None] = {
        "bench.svg": _ratios([row for row in known if not row.figure.unit]),
        "bench-growth.svg": _growth([row for row in known if row.points], sizes),
        "bench-latency.svg": _latencies([row for row in known if row.p999_ms is not None and row.figure.unit == "ms"]),
    }
    directory.mkdir(parents=True, exist_ok=True)
    for name, chart in charts.items():
        if chart is not None:
            (directory / name).write_text(_USELESS.sub("", chart.render(is_unicode=True)), encoding="utf-8")


def _ratios(rows: Sequence[Row]) -> "pygal.HorizontalBar | None":
    if not rows:
        return None
    ratios = [(row, row.measured or 0.0) for row in reversed(rows)]
    highest = max([1.0, *(measured for _, measured in ratios)])
    chart = pygal.HorizontalBar(
        **_options(_COLORS, ("white", "black")),
        range=(0, highest),
        height=110 + 70 * len(ratios),
        value_formatter="{:.2f}".format,
    )
    chart.title = "Throughput, relative to a bare ASGI function or to bare argon2"
    chart.x_labels = [row.figure.title for row, _ in ratios]
    chart.add("measured", [round(measured, 3) for _, measured in ratios])
    chart.add("at least", [row.figure.bound for row, _ in ratios])
    return chart


def _growth(rows: Sequence[Row], sizes: Sequence[str]) -> "pygal.HorizontalBar | None":
    return _grouped(
        "Microseconds of CPU, by the number of tokens",
        [(row.figure.title.replace("10,000,000 tokens: ", ""), row.points) for row in rows],
        sizes,
        "{:,.0f}",
    )


def _latencies(rows: Sequence[Row]) -> "pygal.HorizontalBar | None":
    return _grouped(
        "Milliseconds from the planned time to the response, at half of saturation",
        [
            (
                row.figure.title.replace("mixed load: ", "").replace(", p50", ""),
                (row.measured, row.p99_ms, row.p999_ms),
            )
            for row in rows
        ],
        ("p50", "p99", "p99.9"),
        "{:.1f}",
    )


def _grouped(
    title: str, bars: Sequence[tuple[str, Sequence[float | None]]], names: Sequence[str], shown: str
) -> "pygal.HorizontalBar | None":
    """Draw a group of bars for each label; `names` are those of its bars."""
    if not bars:
        return None
    backwards = list(reversed(bars))
    chart = pygal.HorizontalBar(
        **_options(_MANY_COLORS, ["white"] * len(names)), height=110 + 90 * len(bars), value_formatter=shown.format
    )
    chart.title = title
    chart.x_labels = [label for label, _ in backwards]
    for name, values in zip(names, zip(*(values for _, values in backwards), strict=True), strict=True):
        chart.add(name, values)
    return chart


def _options(colors: Sequence[str], value_colors: Sequence[str]) -> dict[str, object]:
    return {
        "js": [],
        "width": 900,
        "style": _style(colors, value_colors),
        "print_values": True,
        "print_values_position": "center",
        "show_y_guides": True,
        "legend_at_bottom": True,
        "legend_at_bottom_columns": 3,
        "disable_xml_declaration": True,
        "truncate_label": -1,
        "truncate_legend": -1,
    }


def _style(colors: Sequence[str], value_colors: Sequence[str]) -> Style:
    return Style(
        background="transparent",
        plot_background="transparent",
        foreground=_GREY,
        foreground_strong=_GREY,
        foreground_subtle=_GREY,
        value_colors=value_colors,
        colors=colors,
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
