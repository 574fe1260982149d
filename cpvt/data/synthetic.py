"""Three synthetic tasks of position, drawn by formula at any resolution: where, arrangement, what.

Letters: n samples, H W grid of tokens.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

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
MARGIN = 2  # tokens at least between any border and the objects of *arrangement* and *what*

# Colours in [0, 1], Okabe and Ito's orange and blue on light grey. The background is not zero: a zero-padded
# convolution over zero tokens would have no border to see.
BACKGROUND = (0.9, 0.9, 0.9)
COLOUR_A = (0.902, 0.624, 0.0)
COLOUR_B = (0.0, 0.447, 0.698)

# Every shape of *what* fills three cells (row, column) of a 3 x 3 frame, the centre among them; a cell has the
# size of an object.
FRAME = 3
SHAPES = {
    "horizontal": ((1, 0), (1, 1), (1, 2)),
    "vertical": ((0, 1), (1, 1), (2, 1)),
    "falling": ((0, 0), (1, 1), (2, 2)),
    "rising": ((0, 2), (1, 1), (2, 0)),
}
PAIRS = ("bars", "diagonals")  # the first two shapes, the last two


@dataclass(frozen=True)
class SyntheticBatch:
    """A batch of one task; positions and distances are in tokens.

    images    (n, 3, H * pixels, W * pixels) float32 in [0, 1], every token of one colour
    labels    (n,) int64, an index into `classes`, which says what each label means
    distance  (n,) int64: tokens between the object (*where*) or the frame of the shape (*what*) and the
              nearest border, 0 where they touch; or the difference of columns from the one object's edge to
              the other's (*arrangement*), 2 where one column between them is empty
    border    (n, 2) int64: empty rows to the nearer of top and bottom, empty columns to that of the sides
    rows      (n, 1) or (n, 2) int64: first row of the object; of A and of B; of the frame of a shape
    columns   the same for the first column
    """

    images: Tensor
    labels: Tensor
    classes: tuple[str, ...]
    distance: Tensor
    border: Tensor
    rows: Tensor
    columns: Tensor


def draw(
    task: str,
    index: Iterable[int] | Tensor,
    *,
    grid: Grid = (14, 14),
    pixels: int = 1,
    seed: int = 0,
    split: str = "train",
    size: int = 1,
    scale: str = "tokens",
    distances: Iterable[int] | None = None,
    pair: str | None = None,
) -> SyntheticBatch:
    """Draw the samples `index` of a task, on the device of `index`.

    Sample i follows from (task, seed, split, i) and the sizes alone, so it is the same in any batch. Labels
    are balanced: each run of as many indices as there are classes, from a multiple of that number on, holds
    every label once. All samples of a task hold the same multiset of tokens: a bag of tokens knows nothing.

    where        One object in one of the four quarters; on an odd grid the middle row and column stay empty. The
                 distance to the nearest border is drawn evenly, or half of all objects would lie at 0 or 1 of a
                 14 x 14 grid; then the position evenly among those at that distance.
    arrangement  A (orange) and B (blue) in one row. The separation is drawn evenly from 2 up, then the position
                 of the two evenly, and both without regard to the label, which only says which of them is A. So
                 the filled positions tell nothing. The position of A alone tells something, and must: the sign
                 of (column of B - column of A) is the label. It tells the more, the farther apart they are:
                 small `distances`, wide grid: mostly order.
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
    distances  draw evenly from these only (*where*: to the border; *arrangement*: separations)
    pair       *what*: "bars" or "diagonals" alone, whatever the split

    Raises DataError where an argument is unknown or the objects do not fit.
    """
    choices = {"task": (task, CLASSES), "split": (split, SPLITS), "scale": (scale, SCALES)}
    choices |= {"pair": (pair, PAIRS)} if pair is not None else {}
    for option, (given, known) in choices.items():
        if given not in known:
            raise DataError(f"unknown {option} {given!r}: {nearest(given, known)}")
    if (distances if task == "what" else pair) is not None:
        raise DataError(f"{task!r} with {distances=}, {pair=}: 'what' alone has pairs, and no distances")
    if min(*grid, pixels, size) < 1:
        raise DataError(f"{grid=}, {pixels=}, {size=}: give whole numbers above 0")
    side = size if scale == "tokens" else max(1, round(size * min(grid) / REFERENCE_GRID))
    need = {
        "where": (2 * side, 2 * side),
        "arrangement": (2 * MARGIN + side, 2 * MARGIN + 2 * side + 1),
        "what": (2 * MARGIN + FRAME * side, 2 * (MARGIN + FRAME * side)),
    }[task]
    if grid[0] < need[0] or grid[1] < need[1]:
        raise DataError(f"{grid=} is too small for {task!r}, {size=}: it needs {need[0]} x {need[1]}")
    index = index if isinstance(index, Tensor) else torch.tensor(list(index), dtype=torch.int64)

    def roll(name: str, sides: int | Tensor, every: int = 1) -> Tensor:
        """Even in 0 ... sides - 1, the same for each run of `every` indices."""
        run = index.long().div(every, rounding_mode="floor")
        return integers(f"{task}/{seed}/{split}/{name}", sides, run)

    # Each label once in a run of as many indices as there are classes, in an order that turns from run to run.
    classes = len(CLASSES[task])
    labels = (index + roll("label", classes, every=classes)) % classes
    if task == "where":
        squares, *facts = _where(roll, labels, grid, side, distances)
    elif task == "arrangement":
        squares, *facts = _arrangement(roll, labels, grid, side, distances)
    else:
        squares, *facts = _what(roll, labels, grid, side, split, pair)
    return SyntheticBatch(_render(squares, grid, side, pixels), labels, CLASSES[task], *facts)


# Each of the tasks gives the squares to paint, (first row (n,), first column (n,), colour) each; then distance,
# border, rows and columns of SyntheticBatch.


def _where(roll: Callable, labels: Tensor, grid: Grid, side: int, distances):
    height, width = grid
    # Distances to the two borders of a quarter run from 0 to these numbers, less one.
    high, wide = height // 2 - side + 1, width // 2 - side + 1
    distance = _choose(roll, distances, range(min(high, wide)))
    # The positions with min(down, across) = distance: a row of `arm` of them and a column below its corner.
    arm = wide - distance
    position = roll("place", arm + high - distance - 1)
    down = torch.where(position < arm, distance, distance + 1 + position - arm)
    across = torch.where(position < arm, distance + position, distance)
    row = torch.where(labels < 2, down, height - side - down)
    column = torch.where(labels % 2 == 0, across, width - side - across)
    border = torch.stack((down, across), dim=1)
    return [(row, column, COLOUR_A)], distance, border, row[:, None], column[:, None]


def _arrangement(roll: Callable, labels: Tensor, grid: Grid, side: int, distances):
    farthest = grid[1] - 2 * MARGIN - 2 * side + 1
    distance = _choose(roll, distances, range(2, farthest + 1))
    first = MARGIN + roll("column", farthest - distance + 1)
    second = first + side - 1 + distance
    row = MARGIN + roll("row", grid[0] - 2 * MARGIN - side + 1)
    a, b = torch.where(labels == 0, first, second), torch.where(labels == 0, second, first)
    border = _border(row, row + side, first, second + side, grid)
    rows, columns = torch.stack((row, row), dim=1), torch.stack((a, b), dim=1)
    return [(row, a, COLOUR_A), (row, b, COLOUR_B)], distance, border, rows, columns


def _what(roll: Callable, labels: Tensor, grid: Grid, side: int, split: str, pair: str | None):
    frame = FRAME * side
    half = grid[1] // 2 - MARGIN - frame  # how far a bar may move within its half
    if pair is None and split == "train":  # drawn apart from the label: each pair has as many of either
        diagonal = roll("pair", 2, every=2)
    else:
        diagonal = torch.full_like(labels, pair == "diagonals")
    row = MARGIN + roll("row", grid[0] - 2 * MARGIN - frame + 1)
    left = grid[1] - MARGIN - frame - half if split == "test" else MARGIN
    anywhere = MARGIN + roll("anywhere", grid[1] - 2 * MARGIN - frame + 1)
    column = torch.where(diagonal == 1, anywhere, left + roll("column", half + 1))
    cells = torch.tensor([*SHAPES.values()], device=row.device)[2 * diagonal + labels] * side  # (n, 3, 2)
    # From the frame, not from the tokens: a bar's own distance would tell which bar it is.
    border = _border(row, row + frame, column, column + frame, grid)
    squares = [(row + cell[:, 0], column + cell[:, 1], COLOUR_A) for cell in cells.unbind(dim=1)]
    return squares, border.amin(dim=1), border, row[:, None], column[:, None]


def _render(squares: list[tuple], grid: Grid, side: int, pixels: int) -> Tensor:
    """Paint squares of `side` tokens on the background."""
    device, n = squares[0][0].device, len(squares[0][0])
    images = torch.tensor(BACKGROUND, device=device)[:, None, None].repeat(n, 1, *grid)
    for row, column, colour in squares:
        down = torch.arange(grid[0], device=device) - row[:, None]
        across = torch.arange(grid[1], device=device) - column[:, None]
        down, across = (down >= 0) & (down < side), (across >= 0) & (across < side)
        inside = down[:, None, :, None] & across[:, None, None, :]
        images = torch.where(inside, torch.tensor(colour, device=device)[:, None, None], images)
    return images.repeat_interleave(pixels, dim=2).repeat_interleave(pixels, dim=3)


def _border(top: Tensor, bottom: Tensor, left: Tensor, right: Tensor, grid: Grid) -> Tensor:
    """Empty rows and empty columns outside the box [top, bottom) x [left, right): (n, 2)."""
    return torch.stack((torch.minimum(top, grid[0] - bottom), torch.minimum(left, grid[1] - right)), dim=1)


def _choose(roll: Callable, distances: Iterable[int] | None, possible: range) -> Tensor:
    """A distance for each sample, evenly from those given, or from all that are possible."""
    distances = list(possible if distances is None else distances)
    if not distances or not set(distances) <= set(possible):
        found = f"{distances=} do not fit grid and size"
        raise DataError(f"{found}: expected {possible[0]} to {possible[-1]}")
    chosen = roll("distance", len(distances))
    return torch.tensor(distances, device=chosen.device)[chosen]
