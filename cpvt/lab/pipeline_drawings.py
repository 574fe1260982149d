"""Drawings of training: what becomes of a picture on its way to a step, and who handles which place of a batch.

Functions named _picture return the matplotlib Figure; none shows it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch, Rectangle
from torch import Tensor

from cpvt.data.sampler import Share, Stream
from cpvt.lab.styles import BLUE, GREEN, GREY, ORANGE, PALE, SKY, VERMILLION, figure
from cpvt.rng import uniform

BYTES, UINT8, FLOAT = PALE, "#CBE6F7", "#F8DFA8"  # paler than the lines, so that black reads on them

# Who does it -> what is done, what comes out of it, and what that is made of.
STAGES: dict[str, Sequence[tuple[str, str, str]]] = {
    "worker processes, on the CPU": (
        ("read", "bytes as stored", BYTES),
        ("look at the header", "plain JPEGs stay bytes; the rest is decoded here", BYTES),
    ),
    "one thread, on the GPU, a few batches ahead": (
        ("decode", "B pictures (3, h, w), uint8", UINT8),
        ("crop, resize, flip", "(B, 3, 224, 224), uint8", UINT8),
        ("RandAugment", "(B, 3, 224, 224), uint8", UINT8),
        ("normalise", "(B, 3, 224, 224), float32", FLOAT),
        ("erase", "(B, 3, 224, 224), float32", FLOAT),
        ("mix", "the same, and targets (B, 1000), float32", FLOAT),
    ),
    "the loop, on the GPU": (
        ("model", "logits (B, 1000); bfloat16 inside", FLOAT),
        ("loss, backward", "gradients, added up over micro-batches", FLOAT),
        ("step", "weights, float32", FLOAT),
        ("average", "a second set of weights, float32", FLOAT),
    ),
}


def pipeline_picture(stages: dict[str, Sequence[tuple[str, str, str]]] = STAGES) -> Figure:
    """From the file to the step, from top to bottom: a band for each who, a box for each what, and what it leaves.

    stages  who -> (what, what comes out, colour of the box)
    """
    rows = sum(len(steps) for steps in stages.values()) + 0.9 * len(stages)
    with figure(0.42 * rows) as fig:
        axes = fig.subplots()
        axes.set(xlim=(0, 10), ylim=(rows, 0))
        axes.set_axis_off()
        top, before = 0.0, None
        for (who, steps), colour in zip(stages.items(), (SKY, ORANGE, GREEN), strict=True):
            high = len(steps) + 0.75
            axes.add_patch(Rectangle((0, top), 10, high, facecolor="white", edgecolor=colour, linewidth=2))
            axes.text(3.65, top + 0.42, who, va="center", fontweight="bold")  # beside the arrow
            for i, (what, result, filled) in enumerate(steps):
                middle = top + 1.15 + i
                _box(axes, what, middle, filled)
                axes.text(3.65, middle, result, va="center", fontsize=11.5)
                if before is not None:
                    axes.annotate(
                        "",
                        (1.7, middle - 0.36),
                        (1.7, before + 0.36),
                        arrowprops={"arrowstyle": "->", "color": GREY},
                    )
                before = middle
            top += len(steps) + 0.9
    return fig


def _box(axes: Axes, words: str, middle: float, colour: str) -> None:
    look = {"boxstyle": "round,pad=0,rounding_size=0.12", "facecolor": colour, "edgecolor": GREY}
    axes.add_patch(FancyBboxPatch((0.25, middle - 0.34), 3.1, 0.68, linewidth=0.8, **look))
    axes.text(1.8, middle, words, ha="center", va="center", fontsize=11.5)


def places_picture(stream: Stream, world: int = 1, micro: int = 0, marked: Sequence[int] = (0, 5)) -> Figure:
    """The places of one batch: a row a mixing group, in each square the number of the image in the stream.

    Thin frames are micro-batches, thick ones processes. `marked`: images whose copies are set in colour.
    """
    groups, size = stream.batch // stream.group, stream.group
    _, positions = stream.places(0)
    shares = [Share(rank, world, micro).parts(stream.batch, size) for rank in range(world)]
    colours = dict(zip(marked, (VERMILLION, BLUE, GREEN), strict=False))
    with figure(0.62 * groups + 0.65) as fig:
        axes = fig.subplots()
        for place, position in enumerate(positions.tolist()):
            row, column = divmod(place, size)
            image = position // stream.repeated_aug
            look = {"facecolor": colours.get(image, "white"), "edgecolor": GREY, "linewidth": 0.6}
            axes.add_patch(Rectangle((column, row + 0.19), 1, 0.62, **look))
            axes.text(
                column + 0.5,
                row + 0.5,
                str(image),
                ha="center",
                va="center",
                color="white" if image in colours else "black",
                fontweight="bold" if image in colours else "normal",
            )
        for rank, parts in enumerate(shares):
            for part in parts:
                _around(axes, part.start // size, part.stop // size, size, 0.09, 1.2)
            first, last = parts[0].start // size, parts[-1].stop // size
            _around(axes, first, last, size, 0.03, 3.0)
            axes.text(-0.35, (first + last) / 2, f"process {rank}", ha="right", va="center")
        for row in range(groups):
            axes.text(size + 0.35, row + 0.5, f"group {row}", ha="left", va="center")
        axes.set(xlim=(-2.6, size + 2.2), ylim=(groups + 0.05, -0.05))
        axes.set_axis_off()
    return fig


def _around(axes: Axes, first: int, last: int, wide: int, gap: float, width: float) -> None:
    """A frame around rows `first` to `last`."""
    place, high = (-0.12 + gap, first + gap), last - first - 2 * gap
    axes.add_patch(
        Rectangle(place, wide + 0.24 - 2 * gap, high, fill=False, linewidth=width, edgecolor="black")
    )


def scene(seed: int = 0, height: int = 240, width: int = 320) -> Tensor:
    """A house in front of hills, drawn by formula: (3, height, width) uint8. Another seed, another house.

    It stands in for a photograph where a figure shows what is done to one. Without grain or texture: the files
    of such figures stay small.
    """
    y = torch.linspace(0, 1, height, dtype=torch.float64)[:, None]
    x = torch.linspace(0, width / height, width, dtype=torch.float64)[None, :]
    u = uniform("scene", seed, torch.arange(7)).tolist()
    low, high = torch.tensor([[0.9, 0.75, 0.6], [0.3, 0.55, 0.9]], dtype=torch.float64)[..., None, None]
    picture = (low * y + high * (1 - y)).expand(3, height, width).clone()

    def paint(where: Tensor, *colour: float) -> None:
        picture[:, where] = torch.tensor(colour, dtype=torch.float64)[:, None]

    paint((x - 0.25 - 0.8 * u[0]) ** 2 + (y - 0.22) ** 2 < 0.008, 1.0, 0.9, 0.4)  # the sun
    for level, colour in ((0.5, (0.35, 0.5, 0.55)), (0.65, (0.3, 0.55, 0.25))):
        ridge = level + 0.07 * torch.sin(5 * x + 6 * u[1] + 9 * level) + 0.02 * torch.sin(17 * x + u[2])
        paint(y > ridge, *colour)
    x = x - 0.2 - 0.6 * u[3]
    paint(
        (abs(x - 0.15) < 0.15) & (abs(y - 0.72) < 0.13),
        0.55 + 0.4 * u[4],
        0.3 + 0.4 * u[5],
        0.25 + 0.3 * u[6],
    )
    paint((abs(x - 0.15) + 0.9 * abs(y - 0.59) < 0.2) & (y < 0.6), 0.5, 0.15, 0.12)  # the roof
    paint((abs(x - 0.08) < 0.035) & (abs(y - 0.77) < 0.08), 0.25, 0.15, 0.1)
    paint((abs(x - 0.21) < 0.04) & (abs(y - 0.69) < 0.045), 0.95, 0.9, 0.6)
    return (255 * picture).round().clamp(0, 255).to(torch.uint8)
