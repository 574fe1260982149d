"""Three synthetic tasks of position, drawn by formula at any resolution: where, arrangement, what.

Letters: n samples, H W grid of tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from cpvt.config import Grid
from cpvt.errors import DataError, nearest
from cpvt.rng import integers

CLASSES = {
    "where": ("top left", "top right", "bottom left", "bottom right"),
    "arrangement": ("A left of B", "B left of A"),
    "what": ("horizontal bar or falling diagonal", "vertical bar or rising diagonal"),
}
SPLITS = ("train", "val", "test")
SCALES = ("tokens", "share")
REFERENCE_GRID = 14  # scale="share" keeps the share that an object has of this grid

# Colours in [0, 1], Okabe and Ito's orange and blue on light grey. The background is not zero: a zero-padded
# convolution over zero tokens would have no border to see.
BACKGROUND = (0.9, 0.9, 0.9)
COLOUR_A = (0.902, 0.624, 0.0)
COLOUR_B = (0.0, 0.447, 0.698)

# Every shape of *what* fills three cells of a 3 x 3 frame, the centre among them; a cell is k x k tokens.
FRAME = 3
SHAPES = {
    "horizontal": ((0, 0, 0), (1, 1, 1), (0, 0, 0)),
    "vertical": ((0, 1, 0), (0, 1, 0), (0, 1, 0)),
    "falling": ((1, 0, 0), (0, 1, 0), (0, 0, 1)),
    "rising": ((0, 0, 1), (0, 1, 0), (1, 0, 0)),
}
PAIRS = ("bars", "diagonals")  # the first two shapes, the last two
BLOCK = (((1,),),)  # the pattern of an object that is one cell


@dataclass(frozen=True)
class SyntheticBatch:
    """A batch of one task; positions and distances are in tokens.

    images    (n, 3, H * pixels, W * pixels) float32 in [0, 1], every token of one colour
    labels    (n,) int64, an index into `classes`
    distance  (n,) int64: tokens between the object (*where*) or the frame of the shape (*what*) and the
              nearest border, 0 where they touch; or the difference of columns from the one object's edge to
              the other's (*arrangement*), 2 where one column between them is empty
    border    (n, 2) int64: empty rows to the nearer of top and bottom, empty columns to that of the sides
    rows      (n, 1) or (n, 2) int64: first row of the object; of A and of B; of the frame of a shape
    columns   the same for the first column
    shape     (n,) int64, the number of the shape in SHAPES for *what*, else -1
    """

    task: str
    images: Tensor
    labels: Tensor
    distance: Tensor
    border: Tensor
    rows: Tensor
    columns: Tensor
    shape: Tensor

    @property
    def classes(self) -> tuple[str, ...]:
        """What each label means."""
        return CLASSES[self.task]


def draw(
    task: str,
    index: int | Iterable[int] | Tensor,
    *,
    grid: Grid = (14, 14),
    pixels: int = 1,
    seed: int = 0,
    split: str = "train",
    size: int = 1,
    scale: str = "tokens",
    margin: int | None = None,
    distances: int | Iterable[int] | None = None,
    pair: str | None = None,
) -> SyntheticBatch:
    """Draw the samples `index` of a task, on the device of `index`.

    Sample i follows from (task, seed, split, i) and the sizes alone, so it is the same in any batch. Labels
    are balanced: each run of as many indices as there are classes, from a multiple of that number on, holds
    every label once. All samples of a task hold the same multiset of tokens: a bag of tokens knows nothing.

    where        One object in one of the four quarters; on an odd grid the middle row and column stay empty. The
                 distance to the nearest border is drawn evenly, or half of all objects would lie at 0 or 1 of a
                 14 x 14 grid; then the position evenly among those at that distance.
    arrangement  A (orange) and B (blue) in one row, `margin` tokens or more from every border. The separation
                 is drawn evenly from 2 up, then the position of the two evenly, and both without regard to the
                 label, which only says which of them is A. So the filled positions tell nothing. The position
                 of A alone tells something, and must: the sign of (column of B - column of A) is the label. It
                 tells the more, the farther apart they are: small `distances`, wide grid: mostly order.
    what         Bars (horizontal, vertical) on the left half in "train" and "val", on the right in "test";
                 half of "train" are diagonals (falling, rising) anywhere, so that the right half of a table
                 is trained as well. They share the two labels and tell nothing of the bars: a mirror swaps
                 the labels of the diagonals and keeps those of the bars.

    The splits of *where* and *arrangement* are other draws from the same finite set of images.

    grid       rows and columns of tokens
    pixels     side of a token in pixels
    size       side of an object (of a cell of a shape) in tokens
    scale      "tokens": an object has `size` tokens a side on every grid; "share": it keeps its share of the
               shorter side, size / 14, rounded to whole tokens, at least one
    margin     least distance to any border; by default 0 for *where*, 2 for the others
    distances  draw evenly from these only (*where*: to the border; *arrangement*: separations)
    pair       *what*: "bars" or "diagonals" alone, whatever the split

    Raises DataError where an argument is unknown or the objects do not fit.
    """
    choices = {"task": (task, CLASSES), "split": (split, SPLITS), "scale": (scale, SCALES)}
    choices |= {"pair": (pair, PAIRS)} if pair is not None else {}
    for option, (given, known) in choices.items():
        if given not in known:
            raise DataError(f"unknown {option} {given!r}: {nearest(given, known)}")
    margin = (0 if task == "where" else 2) if margin is None else margin
    grid = tuple(grid) if isinstance(grid, Iterable) else (grid,)
    whole = len(grid) == 2 and all(isinstance(number, int) for number in (*grid, pixels, size, margin))
    if not whole or min(*grid, pixels, size, margin + 1) < 1:
        raise DataError(
            f"{grid=}, {pixels=}, {size=}, {margin=}: give (rows, columns) and whole numbers above 0"
        )
    if (distances if task == "what" else pair) is not None:
        raise DataError(
            f"{task!r} with {distances=}, {pair=}: 'what' has no distances, and it alone has pairs"
        )
    side = size if scale == "tokens" else max(1, round(size * min(grid) / REFERENCE_GRID))
    need = {
        "where": (2 * (side + margin), 2 * (side + margin)),
        "arrangement": (2 * margin + side, 2 * margin + 2 * side + 1),
        "what": (2 * margin + FRAME * side, 2 * (margin + FRAME * side)),
    }[task]
    if grid[0] < need[0] or grid[1] < need[1]:
        raise DataError(
            f"{grid=} is too small for {task!r}, {size=}, {margin=}: it needs {need[0]} x {need[1]}"
        )
    index = _as_index(index)
    roll = partial(_roll, index, f"{task}/{seed}/{split}")
    # Each label once in a run of as many indices as there are classes, in an order that turns from run to run.
    classes = len(CLASSES[task])
    labels = (index + roll("label", classes, every=classes)) % classes
    if task == "where":
        objects, drawn = _where(roll, labels, grid, side, margin, distances)
    elif task == "arrangement":
        objects, drawn = _arrangement(roll, labels, grid, side, margin, distances)
    else:
        objects, drawn = _what(roll, labels, grid, side, margin, split, pair)
    images = _render(objects, grid, side, pixels)
    return SyntheticBatch(task, images, labels, **{"shape": torch.full_like(index, -1), **drawn})


def _where(roll: Callable, labels: Tensor, grid: Grid, side: int, margin: int, distances):
    height, width = grid
    # Distances to the two borders of a quarter run from 0 to these numbers, less one.
    high, wide = height // 2 - side + 1, width // 2 - side + 1
    distance = _choose(roll, distances, margin, min(high, wide) - 1)
    # The positions with min(down, across) = distance: a row of `arm` of them and a column below its corner.
    arm = wide - distance
    place = roll("place", arm + high - distance - 1)
    down = torch.where(place < arm, distance, distance + 1 + place - arm)
    across = torch.where(place < arm, distance + place, distance)
    row = torch.where(labels < 2, down, height - side - down)
    column = torch.where(labels % 2 == 0, across, width - side - across)
    drawn = {"distance": distance, "border": torch.stack((down, across), dim=1)}
    return [(row, column, BLOCK, COLOUR_A)], drawn | {"rows": row[:, None], "columns": column[:, None]}


def _arrangement(roll: Callable, labels: Tensor, grid: Grid, side: int, margin: int, distances):
    farthest = grid[1] - 2 * margin - 2 * side + 1
    distance = _choose(roll, distances, 2, farthest)
    first = margin + roll("column", farthest - distance + 1)
    second = first + side - 1 + distance
    row = margin + roll("row", grid[0] - 2 * margin - side + 1)
    a, b = torch.where(labels == 0, first, second), torch.where(labels == 0, second, first)
    drawn = {"distance": distance, "border": _border(row, row + side, first, second + side, grid)}
    drawn |= {"rows": torch.stack((row, row), dim=1), "columns": torch.stack((a, b), dim=1)}
    return [(row, a, BLOCK, COLOUR_A), (row, b, BLOCK, COLOUR_B)], drawn


def _what(roll: Callable, labels: Tensor, grid: Grid, side: int, margin: int, split: str, pair: str | None):
    frame = FRAME * side
    half = grid[1] // 2 - margin - frame  # how far a bar may move within its half
    if pair is None and split == "train":
        diagonal = roll(
            "pair", 2, every=2
        )  # drawn apart from the label, so that each pair has as many of either
    else:
        diagonal = torch.full_like(labels, PAIRS.index(pair or "bars"))
    shape = 2 * diagonal + labels
    row = margin + roll("row", grid[0] - 2 * margin - frame + 1)
    left = grid[1] - margin - frame - half if split == "test" else margin
    anywhere = margin + roll("anywhere", grid[1] - 2 * margin - frame + 1)
    column = torch.where(diagonal == 1, anywhere, left + roll("column", half + 1))
    patterns = torch.tensor([*SHAPES.values()], device=row.device)
    # From the frame, not from the tokens: a bar's own distance would tell which bar it is.
    border = _border(row, row + frame, column, column + frame, grid)
    drawn = {"distance": border.amin(dim=1), "border": border, "shape": shape}
    drawn |= {"rows": row[:, None], "columns": column[:, None]}
    return [(row, column, patterns[shape], COLOUR_A)], drawn


def _render(objects: list[tuple], grid: Grid, side: int, pixels: int) -> Tensor:
    """Paint objects, each (row (n,), column (n,), pattern (n or 1, c, c), colour), on the plain background."""
    device, count = objects[0][0].device, len(objects[0][0])
    colours = torch.tensor((BACKGROUND, *(colour for *_, colour in objects)), device=device)
    canvas = torch.zeros(count, *grid, dtype=torch.int64, device=device)
    sample = torch.arange(count, device=device)[:, None, None]
    for number, (row, column, pattern, _) in enumerate(objects, start=1):
        pattern = torch.as_tensor(pattern, device=device).bool().expand(count, -1, -1)
        # The cell of the object in which each row (n, H, 1) and each column (n, 1, W) of the grid lies.
        down, across = (
            (torch.arange(n, device=device) - first[:, None]).div(side, rounding_mode="floor")
            for n, first in zip(grid, (row, column), strict=True)
        )
        down, across, cells = down[:, :, None], across[:, None, :], pattern.shape[-1]
        inside = (down >= 0) & (down < cells) & (across >= 0) & (across < cells)
        canvas[inside & pattern[sample, down.clamp(0, cells - 1), across.clamp(0, cells - 1)]] = number
    images = torch.stack([channel[canvas] for channel in colours.unbind(dim=1)], dim=1)
    return images.repeat_interleave(pixels, dim=2).repeat_interleave(pixels, dim=3) if pixels > 1 else images


def _border(top: Tensor, bottom: Tensor, left: Tensor, right: Tensor, grid: Grid) -> Tensor:
    """Empty rows and empty columns outside the box [top, bottom) x [left, right): (n, 2)."""
    return torch.stack((torch.minimum(top, grid[0] - bottom), torch.minimum(left, grid[1] - right)), dim=1)


def _roll(index: Tensor, key: str, name: str, sides: int | Tensor, every: int = 1) -> Tensor:
    """Even in 0 ... sides - 1, the same for each run of `every` indices: a function of key, name and index."""
    return integers(f"{key}/{name}", sides, index.div(every, rounding_mode="floor"))


def _choose(roll: Callable, distances: int | Iterable[int] | None, lowest: int, highest: int) -> Tensor:
    """A distance for each sample, evenly from those given, or from all that fit."""
    distances = range(lowest, highest + 1) if distances is None else distances
    distances = [distances] if isinstance(distances, int) else list(distances)
    if not distances or not set(distances) <= set(range(lowest, highest + 1)):
        raise DataError(f"{distances=} do not fit grid, size and margin: expected {lowest} to {highest}")
    chosen = roll("distance", len(distances))
    return torch.tensor(distances, device=chosen.device)[chosen]


def _as_index(index: int | Iterable[int] | Tensor) -> Tensor:
    if not isinstance(index, Tensor):
        index = [index] if isinstance(index, int) else list(index)
        index = torch.tensor(index) if index else torch.empty(0, dtype=torch.int64)
    if index.dim() != 1 or index.is_floating_point() or index.is_complex() or index.dtype == torch.bool:
        raise DataError(f"index of {index.dtype}, shape {tuple(index.shape)}: give whole numbers, shape (n,)")
    return index.long()
