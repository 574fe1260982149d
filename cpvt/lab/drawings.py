"""Tensors -> pictures: images, patches, grids of tokens, reach, maps of encodings, tables and attention.

Letters: C channels, N = H*W patches, D width, (H, W) grid, h heads. Every function takes plain arrays or
tensors and returns the Figure.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.collections import PatchCollection
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle
from matplotlib.ticker import MaxNLocator

from cpvt.lab.styles import BLUE, GREY, ORANGE, SKY, VERMILLION, WIDTH, figure

Grid = tuple[int, int]
Place = tuple[int, int]
_EDGE = "#999999"


def _array(values) -> np.ndarray:
    return values.detach().cpu().double().numpy() if torch.is_tensor(values) else np.asarray(values, float)


def _picture(image) -> np.ndarray:
    """(C, H, W) or (H, W), 0 to 1 -> what imshow takes."""
    image = _array(image).clip(0, 1)
    if image.ndim == 3:
        image = image.transpose(1, 2, 0)
        return image if image.shape[2] == 3 else image[:, :, 0]
    return image


def _bare(axes: Axes, title: str = "", size: float = 12) -> None:
    axes.set(xticks=[], yticks=[])
    axes.spines[:].set_visible(False)
    if title:
        axes.set_title(title, fontsize=size, loc="center")


def _ticks() -> MaxNLocator:
    return MaxNLocator(5)


def _panels(fig: Figure, count: int, columns: int) -> list[Axes]:
    """`count` axes in rows of `columns`; the last row may be shorter."""
    rows = -(-count // columns)
    every = fig.subplots(rows, columns, squeeze=False).flatten()
    for axes in every[count:]:
        axes.set_axis_off()
    return list(every[:count])


def _rows_high(count: int, columns: int, aspect: float, title: bool, extra: float = 0.0) -> float:
    rows = -(-count // columns)
    return rows * (WIDTH / columns * aspect * 0.95 + (0.35 if title else 0.05)) + extra


# --------------------------------------------------------------------------- images and patches


def images(
    pictures: Sequence, titles: Sequence[str] = (), columns: int = 4, lines: Grid | None = None
) -> Figure:
    """Pictures (C, height, width) in [0, 1] side by side, each with its title; `lines`: the grid of tokens over
    them."""
    count = len(pictures)
    columns = min(columns, count)
    shape = _picture(pictures[0]).shape
    with figure(_rows_high(count, columns, shape[0] / shape[1], bool(titles))) as fig:
        for i, axes in enumerate(_panels(fig, count, columns)):
            picture = _picture(pictures[i])
            axes.imshow(picture, cmap="gray", vmin=0, vmax=1)
            _bare(axes, titles[i] if titles else "", 11)
            axes.add_patch(_frame(picture.shape))
            if lines:
                _lines(axes, picture.shape, lines)
    return fig


def _frame(shape) -> Rectangle:
    return Rectangle((-0.5, -0.5), shape[1], shape[0], fill=False, edgecolor=_EDGE, clip_on=False)


def _lines(axes: Axes, shape, grid: Grid) -> None:
    for axis, (size, n) in enumerate(zip(shape[:2], grid, strict=True)):
        for i in range(1, n):
            (axes.axhline if axis == 0 else axes.axvline)(i * size / n - 0.5, color="white", linewidth=0.8)


def image_and_patches(image, patch_size: int) -> Figure:
    """An image (C, height, width) in [0, 1] with its patches marked; beside it the patches apart, numbered row
    by row: the sequence that the transformer sees."""
    picture = _picture(image)
    grid = picture.shape[0] // patch_size, picture.shape[1] // patch_size
    gap = max(1, patch_size // 4)
    step = patch_size + gap
    apart = np.ones((grid[0] * step - gap, grid[1] * step - gap, *picture.shape[2:]))
    for r in range(grid[0]):
        for c in range(grid[1]):
            apart[r * step :, c * step :][:patch_size, :patch_size] = picture[
                r * patch_size : (r + 1) * patch_size, c * patch_size : (c + 1) * patch_size
            ]
    with figure(3.6 * picture.shape[0] / picture.shape[1] + 0.3) as fig:
        left, right = fig.subplots(1, 2)
        left.imshow(picture, cmap="gray", vmin=0, vmax=1)
        _lines(left, picture.shape, grid)
        right.imshow(apart, cmap="gray", vmin=0, vmax=1)
        _bare(left, f"{grid[0]} × {grid[1]} patches")
        _bare(right, f"a sequence of {grid[0] * grid[1]} tokens")
        if grid[0] * grid[1] <= 64:
            box = {"facecolor": "white", "edgecolor": "none", "pad": 1.2, "alpha": 0.85}
            for i in range(grid[0] * grid[1]):
                r, c = divmod(i, grid[1])
                right.text(c * step, r * step, str(i), ha="left", va="top", fontsize=11, bbox=box)
    return fig


# --------------------------------------------------------------------------- grids of tokens


def token_grid(
    grid: Grid,
    marked: Mapping[str, Sequence[Place]] | None = None,
    numbers: bool = True,
    title: str = "",
) -> Figure:
    """The grid of tokens, numbered in reading order; `marked`: words of the legend -> (row, column) places,
    each set in a colour and hatch of its own."""
    looks = ((SKY, ""), (ORANGE, "//"), (VERMILLION, "\\\\"), (BLUE, ".."))
    marked = dict(marked or {})
    if len(marked) > len(looks):
        raise ValueError(f"{len(marked)} sets of tokens to mark; at most {len(looks)} can be told apart")
    high = min(5.5, WIDTH * 0.6 * grid[0] / grid[1])
    with figure(high + 0.5 * bool(marked) + 0.3 * bool(title)) as fig:
        axes = fig.subplots()
        _cells(axes, grid)
        handles = []
        for (words, places), (colour, hatch) in zip(marked.items(), looks, strict=False):
            handles.append(_fill(axes, places, colour, hatch, words))
        if numbers:
            for i in range(grid[0] * grid[1]):
                r, c = divmod(i, grid[1])
                box = {"facecolor": "white", "edgecolor": "none", "pad": 0.8, "alpha": 0.8}
                axes.text(c, r, str(i), ha="center", va="center", fontsize=11, bbox=box)
        _bare(axes, title)
        if handles:
            fig.legend(handles=handles, loc="outside lower center", ncols=min(3, len(handles)))
    return fig


def _cells(axes: Axes, grid: Grid) -> None:
    H, W = grid
    line = {"color": _EDGE, "linewidth": 0.6, "zorder": 2}
    axes.hlines(np.arange(H + 1) - 0.5, -0.5, W - 0.5, **line)
    axes.vlines(np.arange(W + 1) - 0.5, -0.5, H - 0.5, **line)
    axes.set(xlim=(-0.6, W - 0.4), ylim=(H - 0.4, -0.6), aspect="equal")


def _fill(axes: Axes, places, colour: str, hatch: str, words: str) -> Patch:
    look = {"facecolor": colour + "66", "edgecolor": colour, "hatch": hatch, "linewidth": 0.6}
    cells = [Rectangle((c - 0.5, r - 0.5), 1, 1) for r, c in places]
    axes.add_collection(PatchCollection(cells, zorder=1, **look), autolim=False)
    return Patch(label=words, **look)


def reach_picture(
    grid: Grid = (10, 10), place: Place = (5, 3), pegs: Sequence[int] = (1, 2, 3), kernel: int = 3
) -> Figure:
    """One panel for each number of PEGs: how far the border and an object at `place` have spread over the
    tokens, and whether they meet. Where they do, and only there, a token knows that the object is near the
    border: its place shows."""
    reach = kernel // 2
    rows, columns = np.indices(grid)
    to_border = np.minimum.reduce([rows, columns, grid[0] - 1 - rows, grid[1] - 1 - columns])
    to_object = np.maximum(abs(rows - place[0]), abs(columns - place[1]))
    with figure(WIDTH / len(pegs) * grid[0] / grid[1] + 1.05) as fig:
        for axes, k in zip(_panels(fig, len(pegs), len(pegs)), pegs, strict=True):
            border, own = to_border < k * reach, to_object <= k * reach
            _cells(axes, grid)
            handles = [
                _fill(axes, np.argwhere(border & ~own), GREY, "///", "knows the border"),
                _fill(axes, np.argwhere(own & ~border), SKY, "", "knows the object"),
                _fill(axes, np.argwhere(own & border), VERMILLION, "xxx", "knows both"),
            ]
            axes.add_patch(Rectangle((place[1] - 0.32, place[0] - 0.32), 0.64, 0.64, color="black", zorder=3))
            handles.append(Patch(color="black", label="the object"))
            verdict = "they meet" if (border & own).any() else "they do not meet"
            _bare(axes, f"{k} PEG{'s' if k > 1 else ''}\n{verdict}")
        fig.legend(handles=handles, loc="outside lower center", ncols=4, columnspacing=1.2, handlelength=1.4)
    return fig


# --------------------------------------------------------------------------- maps


def encoding_maps(
    maps, titles: Sequence[str] = (), columns: int = 4, label: str = "", per_map: bool = False
) -> Figure:
    """Maps (n, H, W), such as channels of a PEG's output minus its input or of a table: white is zero, orange
    below, purple above, on one scale for all or, with `per_map`, on one for each (then without a bar)."""
    maps = _array(maps)
    if maps.ndim != 3:
        raise ValueError(f"maps of shape {maps.shape}; expected (n, H, W)")
    count, columns = len(maps), min(columns, len(maps))
    top = abs(maps).max() or 1.0
    aspect = maps.shape[1] / maps.shape[2]
    with figure(_rows_high(count, columns, aspect, bool(titles), 0.0 if per_map else 0.7)) as fig:
        every = _panels(fig, count, columns)
        for i, axes in enumerate(every):
            limit = (abs(maps[i]).max() or 1.0) if per_map else top
            shown = axes.imshow(maps[i], cmap="PuOr", vmin=-limit, vmax=limit)
            _bare(axes, titles[i] if titles else "", 11)
            axes.add_patch(_frame(maps[i].shape))
        if not per_map:
            fig.colorbar(
                shown, ax=every, location="bottom", shrink=0.6, aspect=30, label=label, ticks=_ticks()
            )
    return fig


def similarity_map(table, grid: Grid, every: int = 1, title: str = "") -> Figure:
    """A table of positions (N, D): for each `every`-th position a small map of the cosine similarity between
    its vector and those of all positions, at its own place in the large square."""
    table = _array(table)
    if len(table) != grid[0] * grid[1]:
        raise ValueError(
            f"a table of {len(table)} rows with grid={grid}; leave prefix tokens out, give (H, W)"
        )
    unit = table / np.linalg.norm(table, axis=1, keepdims=True).clip(1e-30)
    similar = (unit @ unit.T).reshape(*grid, *grid)[::every, ::every]
    H, W = similar.shape[:2]
    gap = max(1, grid[0] // 7)
    mosaic = np.full((H * (grid[0] + gap) - gap, W * (grid[1] + gap) - gap), np.nan)
    for r in range(H):
        for c in range(W):
            mosaic[r * (grid[0] + gap) :, c * (grid[1] + gap) :][: grid[0], : grid[1]] = similar[r, c]
    with figure(WIDTH * 0.85 * mosaic.shape[0] / mosaic.shape[1] + 0.3) as fig:
        axes = fig.subplots()
        shown = axes.imshow(mosaic, cmap="cividis", vmax=1)
        _bare(axes, title)
        fig.colorbar(shown, ax=axes, shrink=0.7, label="cosine similarity", ticks=_ticks())
    return fig


def attention_map(
    weights, grid: Grid, query: int | None = None, titles: Sequence[str] = (), image=None
) -> Figure:
    """Attention of one query over the patches, (h, N) or (h, H, W): a panel a head, on one scale from 0. The
    query's own place is framed; `image` (C, height, width), if given, comes first."""
    weights = _array(weights).reshape(-1, *grid)
    count = len(weights) + (image is not None)
    columns = min(4, count)
    names = list(titles) or [f"head {i}" for i in range(len(weights))]
    with figure(_rows_high(count, columns, grid[0] / grid[1], True, 0.7)) as fig:
        every = _panels(fig, count, columns)
        if image is not None:
            every[0].imshow(_picture(image), cmap="gray", extent=(-0.5, grid[1] - 0.5, grid[0] - 0.5, -0.5))
            _bare(every[0], "image", 11)
        for axes, values, name in zip(every[count - len(weights) :], weights, names, strict=True):
            shown = axes.imshow(values, cmap="cividis", vmin=0, vmax=weights.max())
            _bare(axes, name, 11)
        if query is not None:
            r, c = divmod(query, grid[1])
            for axes in every:
                look = {"fill": False, "edgecolor": VERMILLION, "linewidth": 2.2}
                axes.add_patch(Rectangle((c - 0.5, r - 0.5), 1, 1, **look, clip_on=False))
        fig.colorbar(
            shown,
            ax=every,
            location="bottom",
            shrink=0.6,
            aspect=30,
            label="attention weight",
            ticks=_ticks(),
        )
    return fig
