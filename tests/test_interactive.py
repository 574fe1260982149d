"""Small multiples and the controls over them."""

import io

import ipywidgets
import numpy
import pytest
from matplotlib import pyplot as plt
from PIL import Image

from cpvt.lab.interactive import explore, frame_sheet, small_multiples


def shade(axes, value):
    axes.imshow(numpy.full((4, 4), value), cmap="gray", vmin=0, vmax=1)


@pytest.mark.parametrize(("count", "columns"), [(4, 4), (6, 3), (8, 4), (2, 1)])
@pytest.mark.parametrize("whole", [False, True], ids=["axes", "figures"])
def test_frames_are_where_the_script_cuts_them(count, columns, whole):
    """The script's arithmetic on the saved figure: in the middle of frame i stands the shade of value i."""
    values = [(i + 1) / (count + 2) for i in range(count)]
    if whole:
        sheet = frame_sheet(
            lambda part, value: shade(part.add_axes((0, 0.1, 1, 0.8)), value), values, columns, 3
        )
    else:
        sheet = small_multiples(shade, values, [f"frame {i}" for i in range(count)], columns)
    file = io.BytesIO()
    sheet.savefig(file, format="png", dpi=100, bbox_inches="tight")  # as a notebook does
    pixels = numpy.asarray(Image.open(file).convert("L"))
    rows = count // columns
    wide, high = pixels.shape[1] / columns, pixels.shape[0] / rows
    for i, value in enumerate(values):
        x, y = (i % columns + 0.5) * wide, (i // columns + 0.55) * high
        assert abs(pixels[int(y), int(x)] - 255 * value) < 3
        assert (
            pixels[int((i // columns) * high + 3), int((i % columns) * wide + 3)] == 255
        )  # its corner is empty


def test_rows_of_frames_must_be_full():
    with pytest.raises(ValueError, match="3 frames, 3 titles, 2 columns"):
        small_multiples(shade, [0, 1, 2], ["a", "b", "c"], 2)
    with pytest.raises(ValueError, match="3 frames, 2 columns"):
        frame_sheet(shade, [0, 1, 2], 2, 3)


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
