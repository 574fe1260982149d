"""Three synthetic diagnostics of position, drawn by formula at any resolution: where, arrangement, what.

Letters: n samples, H W grid of tokens.
"""

import difflib
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from cpvt.errors import DataError
from cpvt.rng import mix, start

CLASSES = {
    "where": ("top left", "top right", "bottom left", "bottom right"),
    "arrangement": ("A left of B", "B left of A"),
    "what": ("horizontal bar or falling diagonal", "vertical bar or rising diagonal"),
}
SPLITS = ("train", "val", "test")

# Colours in [0, 1], Okabe and Ito's orange and blue on light grey. The background is not zero: a zero-padded
# convolution over zero tokens would have no border to see.
BACKGROUND = (0.9, 0.9, 0.9)
COLOUR_A = (0.902, 0.624, 0.0)
COLOUR_B = (0.0, 0.447, 0.698)

# Every shape of *what* fills three cells of a 3 x 3 frame, the centre among them; a cell is k x k tokens.
SHAPES = ("horizontal", "vertical", "falling", "rising")
FRAME = 3
_PATTERNS = (
    ((0, 0, 0), (1, 1, 1), (0, 0, 0)),
    ((0, 1, 0), (0, 1, 0), (0, 1, 0)),
    ((1, 0, 0), (0, 1, 0), (0, 0, 1)),
    ((0, 0, 1), (0, 1, 0), (1, 0, 0)),
)
PAIRS = ("bars", "diagonals")  # SHAPES 0 and 1, SHAPES 2 and 3
REFERENCE_GRID = 14  # scale="share" keeps the share that an object has of this grid


@dataclass(frozen=True)
class Diagnostic:
    """A batch of one diagnostic; positions and distances are in tokens.

    images    (n, 3, H * pixels, W * pixels) float32 in [0, 1], every token of one colour
    labels    (n,) int64, an index into `classes`
    distance  (n,) int64: tokens between the object (*where*) or the frame of the shape (*what*) and the
              nearest border, 0 where they touch; or the difference of columns from the one object's edge to
              the other's (*arrangement*), 2 where one column between them is empty
    border    (n, 2) int64: empty rows to the nearer of top and bottom, empty columns to that of the sides
    rows      (n, 1) or (n, 2) int64: first row of the object; of A and of B; of the frame of a shape
    columns   the same for the first column
    shape     (n,) int64, an index into SHAPES for *what*, else -1
    side      tokens along the side of an object, or of a cell of a shape
    """

    task: str
    images: Tensor
    labels: Tensor
    distance: Tensor
    border: Tensor
    rows: Tensor
    columns: Tensor
    shape: Tensor
    side: int

    @property
    def classes(self) -> tuple[str, ...]:
        """What each label means."""
        return CLASSES[self.task]


def draw(
    task: str,
    index: int | Iterable[int] | Tensor,
    *,
    grid: tuple[int, int] = (14, 14),
    pixels: int = 1,
    seed: int = 0,
    split: str = "train",
    size: int = 1,
    scale: str = "tokens",
    margin: int | None = None,
    distances: Iterable[int] | None = None,
    pair: str | None = None,
) -> Diagnostic:
    """Draw the samples `index` of a diagnostic, on the device of `index`.

    Sample i follows from (task, seed, split, i) and the sizes alone, so it is the same in any batch. Labels
    are balanced: each run of as many indices as there are classes, from a multiple of that number on, holds
    every label once. All samples of a task hold the same multiset of tokens: a bag of tokens knows nothing.

    where        One object in one of the four quarters; on an odd grid the middle row and column stay empty.
                 The distance to the nearest border is drawn evenly, then the place evenly among those at that
                 distance. (Even places would put half of all objects at distance 0 or 1 of a 14 x 14 grid.)
    arrangement  A (orange) and B (blue) in one row, `margin` tokens or more from every border. The separation
                 is drawn evenly from 2 up, then the place of the two evenly, and both without regard to the
                 label, which only says which of them is A. So the filled places tell nothing. The place of A
                 alone tells something, and must: if neither the column of A nor that of B told the label,
                 the mean of (column of B - column of A) would not depend on it, yet its sign is the label.
                 It tells the more, the farther apart they are: small `distances`, wide grid: mostly order.
                 A model that sees no border from `margin` tokens away cannot use it.
    what         Bars (horizontal, vertical) on the left half in "train" and "val", on the right in "test";
                 half of "train" are diagonals (falling, rising) anywhere, so that the right half of a table
                 is trained as well. They share the two labels and tell nothing of the bars: a mirror swaps
                 the labels of the diagonals and keeps those of the bars. All stay `margin` tokens from every
                 border.

    The splits of *where* and *arrangement* are other draws from the same finite set of pictures.

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
    _known("task", task, CLASSES)
    _known("split", split, SPLITS)
    _known("scale", scale, ("tokens", "share"))
    if pair is not None:
        _known("pair", pair, PAIRS)
    height, width = _sides("grid", grid)
    pixels, size = _whole("pixels", pixels, 1), _whole("size", size, 1)
    margin = (0 if task == "where" else 2) if margin is None else _whole("margin", margin, 0)
    side = size if scale == "tokens" else max(1, round(size * min(height, width) / REFERENCE_GRID))
    if task == "what" and distances is not None:
        raise DataError(f"distances={distances!r} was given for 'what', which draws places: leave it out")
    if task != "what" and pair is not None:
        raise DataError(
            f"pair={pair!r} was given for {task!r}: only 'what' has pairs of shapes, leave it out"
        )
    dice = _Dice(_index(index), f"{task}/{seed}/{split}")
    grid = (height, width)
    if task == "where":
        return _draw_where(dice, grid, pixels, side, margin, distances)
    if task == "arrangement":
        return _draw_arrangement(dice, grid, pixels, side, margin, distances)
    return _draw_what(dice, grid, pixels, side, margin, split, pair)


def _draw_where(dice, grid, pixels, side, margin, distances) -> Diagnostic:
    height, width = grid
    # Distances to the two borders of a quarter run from 0 to these numbers, less one.
    high, wide = height // 2 - side + 1, width // 2 - side + 1
    allowed = _allowed("where", distances, margin, min(high, wide) - 1, grid, side, margin)
    label = dice.label(4)
    distance = dice.choose("distance", allowed)
    # The places with min(down, across) = distance: a row of `arm` of them and a column below its corner.
    arm = wide - distance
    place = dice.roll("place", arm + high - distance - 1)
    down = torch.where(place < arm, distance, distance + 1 + place - arm)
    across = torch.where(place < arm, distance + place, distance)
    rows = torch.where(label < 2, down, height - side - down)[:, None]
    columns = torch.where(label % 2 == 0, across, width - side - across)[:, None]
    block = _block(dice)
    images = _render([(rows[:, 0], columns[:, 0], block, COLOUR_A)], grid, side, pixels)
    border = torch.stack((down, across), dim=1)
    return Diagnostic("where", images, label, distance, border, rows, columns, dice.fill(-1), side)


def _draw_arrangement(dice, grid, pixels, side, margin, distances) -> Diagnostic:
    height, width = grid
    farthest = width - 2 * margin - 2 * side + 1 if height >= 2 * margin + side else 0
    allowed = _allowed("arrangement", distances, 2, farthest, grid, side, margin)
    label = dice.label(2)
    distance = dice.choose("distance", allowed)
    first = margin + dice.roll("column", farthest - distance + 1)
    second = first + side - 1 + distance
    row = margin + dice.roll("row", height - 2 * margin - side + 1)
    a, b = torch.where(label == 0, first, second), torch.where(label == 0, second, first)
    block = _block(dice)
    images = _render([(row, a, block, COLOUR_A), (row, b, block, COLOUR_B)], grid, side, pixels)
    border = _border(row, row + side, first, second + side, grid)
    rows, columns = torch.stack((row, row), dim=1), torch.stack((a, b), dim=1)
    return Diagnostic("arrangement", images, label, distance, border, rows, columns, dice.fill(-1), side)


def _draw_what(dice, grid, pixels, side, margin, split, pair) -> Diagnostic:
    height, width = grid
    frame = FRAME * side
    down, half, across = height - 2 * margin - frame, width // 2 - margin - frame, width - 2 * margin - frame
    if min(down, half) < 0:
        need = (2 * margin + frame, 2 * (margin + frame))
        raise _too_small("what", grid, f"shapes of {frame} x {frame}", margin, need)
    label = dice.label(2)
    if pair is None:
        # Drawn apart from the label, so that each pair has as many of either.
        diagonal = dice.roll("pair", 2, every=2) if split == "train" else dice.fill(0)
    else:
        diagonal = dice.fill(PAIRS.index(pair))
    shape = 2 * diagonal + label
    row = margin + dice.roll("row", down + 1)
    left = width - margin - frame - half if split == "test" else margin
    column = torch.where(
        diagonal == 1, margin + dice.roll("anywhere", across + 1), left + dice.roll("column", half + 1)
    )
    patterns = torch.tensor(_PATTERNS, device=row.device, dtype=torch.bool)
    images = _render([(row, column, patterns[shape], COLOUR_A)], grid, side, pixels)
    # From the frame, not from the tokens: a bar's own distance would tell which bar it is.
    border = _border(row, row + frame, column, column + frame, grid)
    distance = border.amin(dim=1)
    return Diagnostic("what", images, label, distance, border, row[:, None], column[:, None], shape, side)


def _render(objects, grid: tuple[int, int], side: int, pixels: int) -> Tensor:
    """Paint objects, each (row (n,), column (n,), pattern (n, c, c), colour), on the plain background."""
    height, width = grid
    device, count = objects[0][0].device, len(objects[0][0])
    colours = torch.tensor((BACKGROUND, *(colour for *_, colour in objects)), device=device)
    canvas = torch.zeros(count, height, width, dtype=torch.int64, device=device)
    for number, (row, column, pattern, _) in enumerate(objects, start=1):
        cells = pattern.shape[-1]
        down = (torch.arange(height, device=device) - row[:, None]).div(side, rounding_mode="floor")  # (n, H)
        across = (torch.arange(width, device=device) - column[:, None]).div(
            side, rounding_mode="floor"
        )  # (n, W)
        inside = ((down >= 0) & (down < cells))[:, :, None] & ((across >= 0) & (across < cells))[:, None, :]
        down, across = down.clamp(0, cells - 1), across.clamp(0, cells - 1)
        sample = torch.arange(count, device=device)[:, None, None]
        canvas[inside & pattern[sample, down[:, :, None], across[:, None, :]]] = number
    images = torch.stack([channel[canvas] for channel in colours.unbind(dim=1)], dim=1)
    if pixels > 1:
        images = images.repeat_interleave(pixels, dim=2).repeat_interleave(pixels, dim=3)
    return images


def _border(top, bottom, left, right, grid) -> Tensor:
    """Empty rows and empty columns outside the box [top, bottom) x [left, right): (n, 2)."""
    return torch.stack((torch.minimum(top, grid[0] - bottom), torch.minimum(left, grid[1] - right)), dim=1)


def _block(dice) -> Tensor:
    return torch.ones(len(dice.index), 1, 1, dtype=torch.bool, device=dice.index.device)


class _Dice:
    """Random whole numbers as a pure function of (key, name, index): no state to share or to store."""

    def __init__(self, index: Tensor, key: str):
        self.index, self.key = index, key

    def roll(self, name: str, sides: int | Tensor, every: int = 1) -> Tensor:
        """Even in 0 ... sides - 1, the same for each run of `every` indices."""
        counter = self.index.div(every, rounding_mode="floor") + start(f"{self.key}/{name}")
        return (mix(counter) & (2**63 - 1)) % sides

    def label(self, classes: int) -> Tensor:
        """Each of the labels once in a run of `classes` indices, in an order that turns from run to run."""
        return (self.index + self.roll("label", classes, every=classes)) % classes

    def choose(self, name: str, values: list[int]) -> Tensor:
        return torch.tensor(values, device=self.index.device)[self.roll(name, len(values))]

    def fill(self, value: int) -> Tensor:
        return torch.full_like(self.index, value)


def _allowed(task, distances, lowest, highest, grid, side, margin) -> list[int]:
    if highest < lowest:
        quarters = (2 * (side + margin), 2 * (side + margin))
        need = quarters if task == "where" else (2 * margin + side, 2 * margin + 2 * side + 1)
        raise _too_small(task, grid, f"objects of {side} x {side}", margin, need)
    if distances is None:
        return list(range(lowest, highest + 1))
    distances = [distances] if isinstance(distances, int) else list(distances)
    if not distances or any(d not in range(lowest, highest + 1) for d in distances):
        raise DataError(
            f"distances={distances} was given for {task!r}: a grid of {grid[0]} x {grid[1]} with objects of "
            f"{side} x {side} tokens and margin {margin} has {lowest} to {highest}, choose among those"
        )
    return distances


def _too_small(task, grid, objects, margin, need) -> DataError:
    return DataError(
        f"a grid of {grid[0]} x {grid[1]} is too small for {task!r}: {objects} tokens with margin {margin} "
        f"need {need[0]} x {need[1]}, enlarge the grid or lessen size or margin"
    )


def _index(index) -> Tensor:
    if isinstance(index, int):
        index = [index]
    if not isinstance(index, Tensor):
        index = list(index)
        index = torch.tensor(index) if index else torch.empty(0, dtype=torch.int64)
    if index.dim() != 1 or index.is_floating_point() or index.is_complex() or index.dtype == torch.bool:
        raise DataError(
            f"index was a {index.dtype} of shape {tuple(index.shape)}: give whole numbers, shape (n,)"
        )
    return index.long()


def _whole(name: str, value, least: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise DataError(f"{name}={value!r} was given: give a whole number, {least} or more")
    return value


def _sides(name: str, value) -> tuple[int, int]:
    if not isinstance(value, (tuple, list)) or len(value) != 2:
        raise DataError(f"{name}={value!r} was given: give (rows, columns)")
    return _whole(f"rows of {name}", value[0], 1), _whole(f"columns of {name}", value[1], 1)


def _known(what: str, name, names: Iterable[str]) -> None:
    if name not in names:
        near = difflib.get_close_matches(str(name), names, n=3, cutoff=0.4) or list(names)
        raise DataError(f"unknown {what} {name!r}: use {' or '.join(map(repr, near))}")
