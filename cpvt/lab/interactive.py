"""Many views of one thing: small multiples for the page, controls over the same drawing for the notebook.

On the page a small script (book/_static/frames.js) turns small multiples into a slider that shows one frame at a
time; where no script runs, all of them are there. With a kernel, `explore` draws any frame anew.
"""

import io
from collections.abc import Callable, Sequence
from typing import Any

import ipywidgets
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from cpvt.lab.styles import RC, WIDTH, save_whole


def small_multiples(
    draw: Callable[[Axes, Any], None],
    values: Sequence,
    titles: Sequence[str],
    columns: int = 4,
    aspect: float = 1.0,
) -> Figure:
    """One frame for each value, `draw(axes, value)` in it, row by row; they must fill their rows.

    Tag the cell `frames-RxC`, with the numbers of rows and columns, and `frames-start-I` with the number, from 0,
    of the frame that tells most: the page shows that one first. `aspect`: height / width of a frame's axes.
    """
    if len(values) != len(titles) or not values or len(values) % columns:
        raise ValueError(
            f"{len(values)} frames, {len(titles)} titles, {columns} columns: fill rows, title each"
        )
    rows, width, title, margin = len(values) // columns, WIDTH / columns, 0.34, 0.12  # inches
    wide = width - 2 * margin
    height = wide * aspect + title + margin
    whole = WIDTH, rows * height
    with plt.style.context(["default", RC]):
        figure = plt.figure(figsize=whole)
        for i, (value, words) in enumerate(zip(values, titles, strict=True)):
            left, bottom = i % columns * width + margin, (rows - 1 - i // columns) * height + margin
            size = wide / whole[0], wide * aspect / whole[1]
            axes = figure.add_axes((left / whole[0], bottom / whole[1], *size))
            draw(axes, value)
            axes.set(xticks=[], yticks=[])
            axes.set_title(words, fontsize=10)
        figure.draw_without_rendering()
        plt.close(figure)
        save_whole(figure)
    return figure


def frame_sheet(draw: Callable[[Any, Any], None], values: Sequence, columns: int, height: float) -> Figure:
    """As `small_multiples`, for frames that are whole figures: `draw(part, value)` gets a SubFigure, 7 inches wide
    and `height` high, with the book's look. They must fill their rows."""
    if not values or len(values) % columns:
        raise ValueError(f"{len(values)} frames, {columns} columns: fill rows")
    rows = len(values) // columns
    with plt.style.context(["default", RC]):
        sheet = plt.figure(figsize=(columns * WIDTH, rows * height), layout="constrained")
        parts = sheet.subfigures(rows, columns, squeeze=False, wspace=0, hspace=0).flat
        for part, value in zip(parts, values, strict=True):
            draw(part, value)
        sheet.draw_without_rendering()
        plt.close(sheet)
        save_whole(sheet)
    return sheet


def explore(draw: Callable[..., Figure], **choices: Sequence | tuple[int, int]) -> ipywidgets.Widget:
    """Controls over `draw(**values) -> Figure`: a pair of whole numbers is a slider between them, any other
    sequence a list to choose from. For a notebook with a kernel; tag the cell `remove-output`.

    >>> explore(lambda encoding, shift: shifted(encoding, shift), encoding=["learned", "peg"], shift=(-3, 3))
    """
    controls = {name: _control(name, choice) for name, choice in choices.items()}
    image = _Image(format="png")

    def redraw(*_) -> None:
        file, figure = io.BytesIO(), draw(**{name: control.value for name, control in controls.items()})
        figure.savefig(file, format="png")
        image.value = file.getvalue()

    for control in controls.values():
        control.observe(redraw, "value")
    redraw()
    return ipywidgets.VBox([*controls.values(), image])


class _Image(ipywidgets.Image):
    """An image as a widget: an output widget's would count as the cell's own where no front end collects it."""

    def __repr__(self) -> str:  # else its bytes would stand in the notebook
        return "Image()"


def _control(name: str, choice: Sequence | tuple[int, int]) -> ipywidgets.Widget:
    words = name.replace("_", " ")
    if isinstance(choice, tuple) and len(choice) == 2 and all(type(end) is int for end in choice):
        return ipywidgets.IntSlider(min=choice[0], max=choice[1], value=choice[0], description=words)
    return ipywidgets.Dropdown(options=list(choice), description=words)
