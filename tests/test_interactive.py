"""Small multiples and the controls over them."""

import io
import re
from pathlib import Path

import ipywidgets
import numpy
import pytest
from matplotlib import pyplot as plt
from PIL import Image

from cpvt.lab import interactive
from cpvt.lab.interactive import explore, small_multiples

SCRIPT = Path(__file__).parent.parent / "book" / "_static" / "frames.js"


def shade(axes, value):
    axes.imshow(numpy.full((4, 4), value), cmap="gray", vmin=0, vmax=1)


@pytest.mark.parametrize(("count", "columns"), [(4, 4), (6, 3), (8, 4), (2, 1)])
def test_frames_are_where_the_script_cuts_them(count, columns):
    """The script's arithmetic on the saved figure: in the middle of frame i stands the shade of value i."""
    values = [(i + 1) / (count + 2) for i in range(count)]
    figure, file = small_multiples(shade, values, [f"frame {i}" for i in range(count)], columns), io.BytesIO()
    figure.savefig(file, format="png", dpi=100, bbox_inches="tight")  # as a notebook does
    pixels = numpy.asarray(Image.open(file).convert("L"))
    inch = pixels.shape[1] / (interactive.WIDTH + 2 * interactive.PAD)
    pad, rows = interactive.PAD * inch, count // columns
    wide, high = (pixels.shape[1] - 2 * pad) / columns, (pixels.shape[0] - 2 * pad) / rows
    for i, value in enumerate(values):
        x, y = pad + (i % columns + 0.5) * wide, pad + (i // columns + 0.55) * high
        assert abs(pixels[int(y), int(x)] - 255 * value) < 3
        edge = pixels[int(pad + (i // columns) * high + 3), int(pad + (i % columns) * wide + 3)]
        assert edge == 255  # the corner of a frame is empty


def test_the_script_knows_the_sizes_of_small_multiples_and_rows_are_full():
    width, pad = re.search(r"WIDTH = ([\d.]+), PAD = ([\d.]+)", SCRIPT.read_text()).groups()
    assert (float(width), float(pad)) == (interactive.WIDTH, interactive.PAD)
    with pytest.raises(ValueError, match="3 frames, 3 titles, 2 columns"):
        small_multiples(shade, [0, 1, 2], ["a", "b", "c"], 2)


def test_controls_draw_what_they_say():
    drawn = []

    def draw(encoding, shift):
        drawn.append((encoding, shift))
        figure = plt.figure()
        plt.close(figure)
        return figure

    box = explore(draw, encoding=["learned", "peg"], shift=(-3, 3))
    choice, slider, image = box.children
    assert isinstance(choice, ipywidgets.Dropdown) and isinstance(slider, ipywidgets.IntSlider)
    choice.value = "peg"
    slider.value = 2
    assert numpy.asarray(Image.open(io.BytesIO(image.value))).size and "PNG" not in repr(box)
    assert drawn == [("learned", -3), ("peg", -3), ("peg", 2)]
