"""Images side by side; measured rows as a table and as dots, one a seed."""

import math
import re
from collections.abc import Sequence
from html import escape
from typing import Any

import pandas
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch import Tensor

from cpvt.lab.stats import by_seed, spread
from cpvt.lab.styles import GREY, WIDTH, figure, style_of


def show_images(images: Sequence[Tensor], titles: Sequence[str], columns: int = 4) -> Figure:
    """Images (3, height, width) in [0, 1], all of one size, each under its title; they must fill their rows."""
    height, width = images[0].shape[1:]
    rows = len(images) // columns
    with figure(rows * (WIDTH / columns * height / width * 0.95 + 0.35)) as fig:
        every = fig.subplots(rows, columns, squeeze=False).flat
        for axes, image, title in zip(every, images, titles, strict=True):
            axes.imshow(image.permute(1, 2, 0).clamp(0, 1).numpy())
            axes.set(xticks=[], yticks=[])
            axes.spines[:].set(visible=True, color="#999999")
            axes.set_title(title, fontsize=11, loc="center")
    return fig


class Table:
    """A table for the page: the highest mean of each column in `best` stands bold, the row `baseline` in italics.

    A cell's mean is the number that it begins with, "34.8 ± 1.1" say. `lowest`: the lowest is best.
    """

    def __init__(self, frame: pandas.DataFrame, best=(), baseline: str = "", lowest: bool = False):
        self.frame, self.best, self.baseline, self.lowest = frame, list(best), baseline, lowest

    def __repr__(self) -> str:
        return f"Table of {len(self.frame)} rows, {len(self.frame.columns)} columns"

    def _repr_html_(self) -> str:
        shown = self.frame.map(_text)
        for column in self.best:
            means = [_mean(cell) for cell in self.frame[column]]
            known = [mean for mean in means if mean is not None]
            wanted = (min(known) if self.lowest else max(known)) if known else None
            cells = zip(shown[column], means, strict=True)
            shown[column] = [
                f"<strong>{c}</strong>" if mean == wanted is not None else c for c, mean in cells
            ]
        names = [escape(str(name)) for name in shown.index]
        shown.index = [f"<em>{n}</em>" if n == escape(self.baseline) else n for n in names]
        return shown.to_html(escape=False, border=0)


def _text(cell: Any) -> str:
    if cell is None or cell != cell:
        return ""
    return f"{cell:.1f}" if isinstance(cell, float) else escape(str(cell))


def _mean(cell: Any) -> float | None:
    found = re.match(r"[+−-]?[\d.]+", str(cell).replace(",", ""))
    return float(found[0].replace("−", "-")) if found else None


def seed_dots(
    axes: Axes,
    rows: pandas.DataFrame,
    named: dict[str, dict[str, Any]],
    metric: str,
    baseline: float | None = None,
) -> None:
    """name -> columns of a row: each measured row is a line of dots, one a seed, its mean a tick; from three seeds
    on a 95 % interval of the mean. `baseline`: a dashed line."""
    shown = {name: by_seed(rows, columns, metric) for name, columns in named.items()}
    shown = {name: found[metric] for name, found in shown.items() if len(found)}
    for y, (name, values) in enumerate(shown.items()):
        style, found = style_of(named[name]["encoding"]), spread(values)
        if found.low is not None:
            axes.plot([found.low, found.high], [y, y], color=style.colour, linewidth=5, alpha=0.25)
        axes.plot(values, [y] * len(values), linestyle="none", **style.point())
        axes.plot([found.mean], [y], marker="|", markersize=16, color=style.colour)
    axes.set_yticks(range(len(shown)), list(shown))
    axes.invert_yaxis()
    if baseline is not None:
        axes.axvline(baseline, color=GREY, linestyle=(0, (5, 2)), linewidth=1.2)


def show_change(axes: Axes, change: Tensor, low: float = 1e-2, high: float = 1.0) -> int:
    """A map (H, W) of changes: green and hatched where it is exactly 0, else the redder the larger, on a
    logarithmic scale from `low` to `high`; grey where it is NaN. -> the number of exact tokens."""
    exact = change == 0
    shades = ((change.clamp(low, high) / low).log() / math.log(high / low)).masked_fill(exact, float("nan"))
    axes.imshow(torch.full((*change.shape, 3), 0.8).numpy())
    axes.imshow(shades.numpy(), cmap="OrRd", vmin=-0.15, vmax=1.1)
    green = torch.zeros(*change.shape, 4)
    green[exact] = torch.tensor([0.72, 0.89, 0.80, 1.0])
    axes.imshow(green.numpy())
    for row, column in exact.nonzero().tolist():
        box = (column - 0.5, row - 0.5), 1, 1
        axes.add_patch(Rectangle(*box, fill=False, hatch="//", edgecolor="#009E73", linewidth=0))
    axes.set(xticks=[], yticks=[])
    axes.spines[:].set(visible=True, color="#444444")
    return int(exact.sum())
