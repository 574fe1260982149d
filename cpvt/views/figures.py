"""Rows -> charts: what was measured and what was published. The drawings are handed on from here.

Every function takes plain rows or arrays and returns the matplotlib Figure; none shows it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from cpvt.lab.results import NOT_YET, Row, over_seeds
from cpvt.views.styles import BLACK, GREY, PALE, STYLES, Style, figure, style_of

__all__ = ["STYLES", "Style", "accuracy_by_distance", "style_of"]


def accuracy_by_distance(
    rows: Sequence[Row],
    metric: str = "top1@14",
    *,
    chance: float | None = None,
    beyond: int | Mapping[str, int] | None = None,
    xlabel: str = "empty tokens between object and nearest border",
    title: str = "",
    labels: Mapping[str, str] | None = None,
) -> Figure:
    """Accuracy against distance: a line an encoding, its band from the worst seed to the best.

    Reads the metrics `metric`/d0, /d1, ... of the rows; `chance` in percent is the dashed line. `beyond`: the
    last distance that theory lets an encoding see: one number for all, shaded from there on, or one for each
    row name, whose points from there on are hollow. `labels`: row name -> words of the legend.
    """
    distances = sorted({int(d) for row in rows for d in _found(rf"{re.escape(metric)}/d(\d+)", row)})
    with figure(4.4) as fig:
        axes = fig.subplots()
        if not distances:
            return _nothing(axes, fig)
        for name, encoding in {row.row: row.encoding for row in rows}.items():
            own = [row for row in rows if row.row == name]
            found = {d: over_seeds(own, f"{metric}/d{d}").get(name) for d in distances}
            found = {d: s for d, s in found.items() if s}
            x = np.array(list(found))
            style, last = style_of(encoding), beyond.get(name) if isinstance(beyond, Mapping) else None
            label = (labels or {}).get(name, style.label)
            axes.fill_between(
                x,
                [s.min for s in found.values()],
                [s.max for s in found.values()],
                color=style.colour,
                alpha=0.18,
                linewidth=0,
            )
            line = {**style.line(), "label": label}
            mean = np.array([s.mean for s in found.values()])
            if last is None:
                axes.plot(x, mean, **line)
                continue
            axes.plot(x, mean, **{**line, "marker": "none", "label": "_"})
            axes.plot(x[x <= last], mean[x <= last], **{**line, "linestyle": "none", "label": "_"})
            axes.plot(
                x[x > last],
                mean[x > last],
                **{**line, "linestyle": "none", "label": "_", "markerfacecolor": "white"},
            )
            axes.plot([], [], **line)
        if isinstance(beyond, int) and beyond < distances[-1]:
            axes.axvspan(beyond + 0.5, distances[-1] + 0.5, color=PALE, zorder=0, linewidth=0)
            axes.text(
                (beyond + distances[-1] + 1) / 2,
                99,
                "provably invisible",
                ha="center",
                va="top",
                color="#444444",
            )
        if chance is not None:
            axes.axhline(chance, color=BLACK, linewidth=1, linestyle="--", zorder=1)
            axes.text(distances[-1] + 0.45, chance - 1.5, "chance", ha="right", va="top")
        handles, _ = axes.get_legend_handles_labels()
        if isinstance(beyond, Mapping):
            handles.append(
                Line2D(
                    [],
                    [],
                    linestyle="none",
                    marker="o",
                    markerfacecolor="white",
                    markeredgecolor=GREY,
                    markersize=7,
                    label="hollow: out of sight",
                )
            )
        axes.set(xlabel=xlabel, ylabel="accuracy (%)", ylim=(0, 103), xticks=distances)
        axes.set_xlim(distances[0] - 0.5, distances[-1] + 0.5)
        axes.set_title(title)
        fig.legend(handles=handles, loc="outside lower center", ncols=3)
    return fig


def _found(pattern: str, row: Row) -> list[str]:
    return [match[1] for name in row.metrics if (match := re.fullmatch(pattern, name))]


def _nothing(axes, fig: Figure) -> Figure:
    axes.set_axis_off()
    axes.text(0.5, 0.5, NOT_YET, ha="center", va="center", fontsize=16, color=GREY)
    return fig
