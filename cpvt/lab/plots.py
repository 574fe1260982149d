"""Rows -> charts: what was measured and what was published. Styles and drawings are handed on from here.

Every function takes plain rows or arrays and returns the matplotlib Figure; none shows it.
"""

from __future__ import annotations

import math
import re
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from typing import Literal

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from cpvt.lab.drawings import (
    attention_map,
    encoding_maps,
    image_and_patches,
    images,
    reach_picture,
    similarity_map,
    token_grid,
)
from cpvt.lab.probes import Probe, theory
from cpvt.lab.results import NOT_YET, PROVENANCES, Published, Row, Spread, over_seeds
from cpvt.lab.styles import BLACK, GREY, PALE, STYLES, WIDTH, Style, figure, style_of

__all__ = [
    "STYLES", "Style", "accuracy_and_reach", "accuracy_by_distance", "attention_map", "differences",
    "encoding_maps", "figure", "image_and_patches", "images", "probe_chart", "published_by_size",
    "published_chart", "reach_curves", "reach_picture", "result_table", "similarity_map", "style_of",
    "token_grid",
]  # fmt: skip

TO_BORDER = "empty tokens between object and border"
APART = "columns from one object to the other"


def _nothing(fig: Figure) -> Figure:
    fig.text(0.5, 0.5, NOT_YET, ha="center", va="center", fontsize=16, color=GREY)
    return fig


def _legend_below(fig: Figure, handles: Sequence, columns: int, xlabel: str) -> None:
    """The legend of several panels, headed by the name of their common axis: laid out apart, they collide."""
    fig.legend(handles=handles, loc="outside lower center", ncols=columns, title=xlabel, title_fontsize=12)


# --------------------------------------------------------------------------- accuracy by distance


def _by_distance(rows: Iterable[Row], metric: str) -> dict[str, dict[int, Spread]]:
    """Row name -> distance -> Spread over seeds, from the metrics `metric`/d0, /d1, ..."""
    rows = list(rows)
    names = {name for row in rows for name in row.metrics}
    found: dict[str, dict[int, Spread]] = {row.row: {} for row in rows}
    for distance in sorted(
        int(m[1]) for n in names if (m := re.fullmatch(rf"{re.escape(metric)}/d(\d+)", n))
    ):
        for name, spread in over_seeds(rows, f"{metric}/d{distance}").items():
            found[name][distance] = spread
    return {name: by for name, by in found.items() if by}


def _line(axes: Axes, by: Mapping[int, Spread], style: Style, label: str) -> None:
    """The mean over seeds, and a band from the worst seed to the best."""
    worst, best = [s.min for s in by.values()], [s.max for s in by.values()]
    axes.fill_between(list(by), worst, best, color=style.colour, alpha=0.18, linewidth=0)
    axes.plot(list(by), [s.mean for s in by.values()], **{**style.line(), "label": label})


def _distance_axes(axes: Axes, distances: Sequence[int], chance: float | None, beyond: int | None) -> None:
    axes.set(xticks=distances, xlim=(distances[0] - 0.5, distances[-1] + 0.5), ylim=(0, 104))
    if beyond is not None and beyond < distances[-1]:
        start = max(beyond + 0.5, distances[0] - 0.5)
        axes.axvspan(start, distances[-1] + 0.5, color=PALE, zorder=0, linewidth=0)
    if chance is not None:
        axes.axhline(chance, color=BLACK, linewidth=1, linestyle="--", zorder=1)


def accuracy_by_distance(
    rows: Iterable[Row],
    metric: str = "top1@14",
    *,
    chance: float | None = None,
    beyond: int | None = None,
    xlabel: str = TO_BORDER,
    title: str = "",
    labels: Mapping[str, str] | None = None,
) -> Figure:
    """Accuracy against distance, all encodings in one chart: a line each, its band from the worst seed to the
    best.

    Reads the metrics `metric`/d0, /d1, ...; `chance`, in percent, is the dashed line. `beyond`: the last distance
    that theory lets these encodings see; farther on is shaded. `labels`: row name -> words of the legend.
    """
    rows = list(rows)
    found = _by_distance(rows, metric)
    encodings = {row.row: row.encoding for row in rows}
    with figure(4.4) as fig:
        if not found:
            return _nothing(fig)
        axes = fig.subplots()
        for name, by in found.items():
            style = style_of(encodings[name])
            _line(axes, by, style, (labels or {}).get(name, style.label))
        distances = sorted({d for by in found.values() for d in by})
        _distance_axes(axes, distances, chance, beyond)
        if beyond is not None and beyond < distances[-1]:
            axes.text((beyond + distances[-1] + 1) / 2, 102, "provably invisible", ha="center", va="top")
        if chance is not None:
            axes.text(distances[-1] + 0.45, chance - 1.5, "chance", ha="right", va="top")
        axes.set(xlabel=xlabel, ylabel="accuracy (%)")
        axes.set_title(title)
        fig.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return fig


def accuracy_and_reach(
    rows: Iterable[Row],
    metric: str = "top1@14",
    *,
    limit: Literal["border", "order"] = "border",
    chance: float | None = None,
    columns: int = 3,
    title: str = "",
    labels: Mapping[str, str] | None = None,
) -> Figure:
    """Accuracy against distance, a panel an encoding; shaded are the distances at which theory says that nothing
    can be known, so that points there belong on the dashed line of chance.

    `limit`: "border" for an object's distance to the border (2k - 1 for k PEGs), "order" for the separation of
    two (2k). Tables and angles have no such limit.
    """
    rows = list(rows)
    found = _by_distance(rows, metric)
    encodings = {row.row: row.encoding for row in rows}
    columns = max(1, min(columns, len(found)))
    high = -(-len(found) // columns)
    with figure(2.25 * high + 1.0 if found else 3) as fig:
        if not found:
            return _nothing(fig)
        every = fig.subplots(high, columns, sharex=True, sharey=True, squeeze=False)
        distances = sorted({d for by in found.values() for d in by})
        for axes, (name, by) in zip(every.flatten(), found.items(), strict=False):
            style, last = style_of(encodings[name]), theory(encodings[name])
            _line(axes, by, style, "_")
            _distance_axes(axes, distances, chance, last and last[limit == "order"])
            axes.set_title((labels or {}).get(name, style.label), fontsize=12)
            axes.set_xticks(distances if len(distances) < 8 else distances[::2])
            axes.tick_params(labelbottom=True)
        for axes in every.flatten()[len(found) :]:
            axes.set_axis_off()
        fig.supylabel("accuracy (%)", fontsize=12)
        fig.suptitle(title, fontsize=13)
        handles = [Line2D([], [], color=PALE, linewidth=9, label="provably invisible")]
        if chance is not None:
            handles.append(Line2D([], [], color=BLACK, linewidth=1, linestyle="--", label="chance"))
        _legend_below(fig, handles, 2, TO_BORDER if limit == "border" else APART)
    return fig


def reach_curves(
    changes: Mapping[str, Sequence[float]],
    distances: Sequence[int] | None = None,
    *,
    xlabel: str = TO_BORDER,
    rounding: float = 1e-13,
    title: str = "",
) -> Figure:
    """How much a model's output changes with an object's place, against distance, on a logarithmic scale; shaded:
    below `rounding`, where float64 cannot tell it from nothing. `changes`: encoding -> what `probes.reach` gave.
    """
    with figure(4.4) as fig:
        axes = fig.subplots()
        for encoding, values in changes.items():
            values = np.asarray(values, float).clip(1e-17)
            axes.plot(
                range(len(values)) if distances is None else list(distances),
                values,
                **style_of(encoding).line(),
            )
        high = axes.get_ylim()[1]
        axes.set_yscale("log")
        axes.set(ylim=(1e-17, max(10 * high, 1e-2)), xlabel=xlabel, ylabel="relative change of the output")
        axes.axhspan(1e-17, rounding, color=PALE, zorder=0, linewidth=0, label="rounding: invisible")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.set_title(title)
        fig.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return fig


# --------------------------------------------------------------------------- tables and dots


def result_table(
    values: Sequence[Sequence[float]],
    rows: Sequence[str],
    columns: Sequence[str],
    *,
    chance: Sequence[float] | float = 0.0,
    held: Sequence[Sequence[bool | None]] | None = None,
    title: str = "",
) -> Figure:
    """Accuracies as a table of colours, from chance (pale) to 100 (dark): encodings down, tasks across.

    `values` in percent, NaN where not yet measured; `chance`, one number or one a column, sets where colour
    begins. `held`: whether the prediction for the cell held (a tick) or was contradicted (a cross); None for
    neither.
    """
    values = np.array(values, float)
    if values.shape != (len(rows), len(columns)):
        raise ValueError(f"values of shape {values.shape} for {len(rows)} rows and {len(columns)} columns")
    begin = np.broadcast_to(np.array(chance, float), (len(columns),))
    shade = ((values - begin) / (100 - begin)).clip(0, 1)
    with figure(0.36 * len(rows) + 0.75 + 0.3 * bool(title)) as fig:
        axes = fig.subplots()
        axes.imshow(shade, cmap="Blues", vmin=0, vmax=1.25, aspect="auto")
        for r in range(len(rows)):
            for c in range(len(columns)):
                missing = math.isnan(values[r, c])
                mark = None if held is None or held[r][c] is None else "✓" if held[r][c] else "✗"
                words = NOT_YET if missing else f"{values[r, c]:.0f}" + (f"  {mark}" if mark else "")
                dark = not missing and shade[r, c] > 0.88
                axes.text(c, r, words, ha="center", va="center_baseline", color="white" if dark else BLACK,
                          fontsize=11, weight="bold" if mark == "✗" and not missing else "normal")  # fmt: skip
        axes.set_xticks(range(len(columns)), columns)
        axes.set_yticks(range(len(rows)), rows)
        axes.tick_params(length=0, labeltop=True, labelbottom=False)
        axes.set_xticks(np.arange(len(columns) - 1) + 0.5, minor=True)
        axes.set_yticks(np.arange(len(rows) - 1) + 0.5, minor=True)
        axes.grid(which="minor", color="white", linewidth=1.5)
        axes.tick_params(which="minor", length=0)
        axes.spines[:].set_visible(False)
        axes.set_title(title)
    return fig


_FROM = {
    "official figure": {"marker": "o", "label": "the authors' own table"},
    "secondary": {"marker": "o", "markerfacecolor": "white", "label": "read in notes and posts"},
    "digitised": {"marker": "D", "markerfacecolor": "white", "label": "read off a plot, ±0.1"},
}


def published_chart(
    figures: Sequence[Published],
    xlabel: str = "ImageNet top-1 (%)",
    title: str = "",
    names: Sequence[str] | None = None,
) -> Figure:
    """Published figures as dots, a line each, in their order; colour says the encoding, the dot how the figure
    was read: full for the authors' own table, hollow for notes and posts, a diamond for a plot.

    `names`: what to write instead of model, encoding and setting.
    """
    figures = list(figures)
    several = len({one.model for one in figures}) > 1
    names = names or [
        f.name if several else ", ".join(filter(None, (f.encoding, f.setting))) for f in figures
    ]
    with figure(0.4 * len(figures) + 1.3 + 0.3 * bool(title) if figures else 3) as fig:
        if not figures:
            return _nothing(fig)
        axes = fig.subplots()
        values = [one.value for one in figures]
        margin = (max(values) - min(values)) or 1.0
        for i, one in enumerate(figures):
            colour = style_of(one.encoding).colour
            axes.plot([min(values) - margin, one.value], [i, i], color=PALE, linewidth=1.5, zorder=1)
            axes.plot([one.value], [i], color=colour, markeredgewidth=2, markersize=8, zorder=3,
                      **{**_FROM[one.provenance], "label": "_"})  # fmt: skip
            axes.annotate(f"{one.value:g}", (one.value, i), (9, 0), textcoords="offset points", va="center")
        axes.set_yticks(
            range(len(figures)), [textwrap.fill(re.sub(r"(?<!\w)-(?=\d)", "−", name), 34) for name in names]
        )
        axes.tick_params(axis="y", length=0)
        axes.set(xlim=(min(values) - 0.12 * margin, max(values) + 0.2 * margin), xlabel=xlabel)
        axes.set_ylim(len(figures) - 0.4, -0.6)
        axes.set_title(title)
        _provenance_legend(fig, figures)
    return fig


def _provenance_legend(fig: Figure, figures: Sequence[Published]) -> None:
    used = [kind for kind in PROVENANCES if any(one.provenance == kind for one in figures)]
    look = {"linestyle": "none", "color": GREY, "markeredgewidth": 2, "markersize": 8}
    handles = [Line2D([], [], **look, **_FROM[kind]) for kind in used]
    fig.legend(
        handles=handles, loc="outside lower center", ncols=len(handles), columnspacing=1.0, handletextpad=0.2
    )


def published_by_size(figures: Sequence[Published], title: str = "") -> Figure:
    """Published top-1 against the side of the test image, trained at 224: a panel a model size, a line an
    encoding; hollow points were read in notes, posts or off a plot, full ones in the authors' own table."""
    sizes = {"tiny": "tiny", "Ti": "tiny", "small": "small", "S": "small", "base": "base", "B": "base"}
    found: dict[str, dict[str, dict[int, Published]]] = {}
    for one in figures:
        size = sizes.get(one.model.split("-")[1] if "-" in one.model else "", one.model)
        pixels = int(re.search(r"\d+", one.setting)[0])
        found.setdefault(size, {}).setdefault(one.encoding, {})[pixels] = one
    with figure(3.9 if found else 3) as fig:
        if not found:
            return _nothing(fig)
        ticks = sorted({pixels for lines in found.values() for by in lines.values() for pixels in by})
        every = fig.subplots(1, len(found), squeeze=False)[0]
        drawn: dict[str, Line2D] = {}
        for axes, (size, lines) in zip(every, found.items(), strict=True):
            for encoding, by in lines.items():
                style, by = style_of(encoding), dict(sorted(by.items()))
                line = {**style.line(), "marker": "none"}
                axes.plot(list(by), [one.value for one in by.values()], **line)
                for pixels, one in by.items():
                    inside = style.colour if one.provenance == "official figure" else "white"
                    axes.plot([pixels], [one.value], **{**style.point(), "markerfacecolor": inside})
                drawn[style.label] = Line2D([], [], **style.line())
            axes.set_title(size)
            axes.set_xticks(ticks, [str(tick) for tick in ticks], rotation=60 if len(found) > 2 else 0)
            axes.set_xlim(ticks[0] - 30, ticks[-1] + 30)
        every[0].set_ylabel("ImageNet top-1 (%)")
        fig.suptitle(title, fontsize=13)
        hollow = Line2D([], [], linestyle="none", marker="o", markerfacecolor="white", markeredgecolor=GREY,
                        markersize=7, label="hollow: second-hand")  # fmt: skip
        _legend_below(fig, [*drawn.values(), hollow], 3, "side of the test image (pixels)")
    return fig


def probe_chart(probes: Mapping[str, Probe], ceiling: float | None = None, title: str = "") -> Figure:
    """What a linear probe reads off the tokens: R2 of the row and of the column on held-out images, a line a
    model or control; 0 is nothing, 1 everything. `ceiling`: what reach allows at most, the dashed line."""
    with figure(0.4 * len(probes) + 1.4 + 0.3 * bool(title)) as fig:
        axes = fig.subplots()
        for i, probe in enumerate(probes.values()):
            for value, shift, marker, inside, word in (
                (probe.row, -0.13, "o", BLACK, "row"),
                (probe.column, 0.13, "D", "white", "column"),
            ):
                look = {"linestyle": "none", "markersize": 7, "color": BLACK, "markerfacecolor": inside}
                axes.plot([max(value, -0.05)], [i + shift], marker, label=word if i == 0 else "_", **look)
        if ceiling is not None:
            axes.axvline(ceiling, color=BLACK, linewidth=1, linestyle="--", label="ceiling", zorder=0)
        axes.set_yticks(range(len(probes)), list(probes))
        axes.tick_params(axis="y", length=0)
        axes.set(xlim=(-0.08, 1.04), xlabel="R² of a linear probe on held-out images")
        axes.set_ylim(len(probes) - 0.4, -0.6)
        axes.set_title(title)
        fig.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return fig


def differences(
    spreads: Mapping[str, Spread], xlabel: str = "difference (points)", title: str = ""
) -> Figure:
    """Differences over paired seeds, a line each: the mean, and its 95 % interval (thin: from the worst seed to
    the best, while there are fewer than three). An interval that crosses zero resolves nothing."""
    with figure(0.4 * len(spreads) + 1.0 + 0.3 * bool(title) if spreads else 3, WIDTH) as fig:
        if not spreads:
            return _nothing(fig)
        axes = fig.subplots()
        axes.axvline(0, color=BLACK, linewidth=1, linestyle="--", zorder=0)
        for i, spread in enumerate(spreads.values()):
            known = spread.low is not None
            ends = (spread.low, spread.high) if known else (spread.min, spread.max)
            axes.plot(ends, [i, i], color=BLACK, linewidth=3 if known else 1)
            axes.plot([spread.mean], [i], marker="o", markersize=8, color=BLACK)
        axes.set_yticks(range(len(spreads)), list(spreads))
        axes.tick_params(axis="y", length=0)
        axes.set(xlabel=xlabel)
        axes.set_ylim(len(spreads) - 0.5, -0.5)
        axes.set_title(title)
    return fig
