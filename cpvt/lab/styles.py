"""One colour and one marker for each encoding, throughout the book; and how every figure looks and is saved.

Colours are Okabe and Ito's, which eyes without red or green tell apart, pale ones made a little stronger: each has
a contrast of 3 or more on white, and turned round on dark pages. PEGs are blue, darker the more there are, so that
they differ in print without colour too; a table with a PEG keeps the table's colour and takes the PEG's circle;
variants of a PEG are hollow.
"""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from matplotlib import font_manager
from matplotlib import pyplot as plt
from matplotlib.collections import QuadMesh
from matplotlib.figure import Figure

from cpvt.config import EncodingPart, Learned, Peg, Relative, Rotary, Sine, parse_encoding

BLACK, ORANGE, SKY, GREEN = "#000000", "#CC8400", "#2296D8", "#009E73"
YELLOW, BLUE, VERMILLION, PURPLE = "#F0E442", "#0072B2", "#C4400B", "#BF4F99"
GREY, PALE = "#777777", "#E8E8E8"


# --------------------------------------------------------------------------- encodings

SOLID, DASHED, DOTTED, DASHDOTTED = "-", (0, (5, 2)), (0, (1.2, 1.6)), (0, (6, 2, 1.2, 2))


@dataclass(frozen=True)
class Style:
    """How an encoding is drawn and what it is called. `hollow`: the marker is white inside."""

    label: str
    colour: str
    marker: str
    linestyle: str | tuple = SOLID
    hollow: bool = False

    def line(self) -> dict:
        """Keywords for `Axes.plot`."""
        return {"label": self.label, "color": self.colour, "linestyle": self.linestyle, **self.point()}

    def point(self) -> dict:
        """The marker's keywords alone."""
        return {
            "marker": self.marker,
            "markersize": {"*": 11, "p": 8.5, "P": 8}.get(self.marker, 7),
            "markerfacecolor": "white" if self.hollow else self.colour,
            "markeredgecolor": self.colour,
        }


NONE = Style("none", GREY, "X", DOTTED)
TABLES = {Learned: (ORANGE, "s"), Sine: (PURPLE, "v"), Relative: (VERMILLION, "D"), Rotary: (GREEN, "P")}
PEGS = {1: (SKY, "o"), 2: ("#1B7AB5", "d"), 3: ("#00578A", "^"), 5: ("#00304D", "p")}
# A kernel of 5 sees as far as two PEGs, one of 7 as far as three: hence their shades.
KERNELS = {5: (PEGS[2][0], "h"), 7: (PEGS[3][0], "8"), 27: (BLUE, "*")}
PADDINGS = {"circular": "<", "replicate": ">", "reflect": "H", "none": "1"}

PUBLISHED = {  # what data/published.csv calls them
    "2-D sine": "sine",
    "relative 2-D K=8": "relative",
    "1 PEG": "peg",
    "PEG": "peg",
    "5 PEGs": "peg(positions=(0, 1, 2, 3, 4))",
    "5 PEGs at positions 0-4": "peg(positions=(0, 1, 2, 3, 4))",
    "4 PEGs at position 0": "peg(repeat=4)",
    "1 PEG depthwise k=3": "peg",
    "1 PEG separable k=3": "peg(convolution='separable')",
    "learned + 1 PEG (gain over 1 PEG)": "learned + peg",
    "twelve 1x1 convolutions": "peg(positions=(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11), kernel=1)",
}


def style_of(encoding: str) -> Style:
    """Encoding text, or a name in data/published.csv -> how it is drawn and called in every chapter."""
    parts = parse_encoding(PUBLISHED.get(encoding, encoding))
    pegs = [part for part in parts if isinstance(part, Peg)]
    if tables := [part for part in parts if not isinstance(part, Peg)]:
        return _table_style(tables, pegs)
    return _peg_style(pegs) if pegs else NONE


def _table_style(tables: Sequence[EncodingPart], pegs: Sequence[Peg]) -> Style:
    """Tables and rotary angles; the first one has the say."""
    words = [_table_words(table) for table in tables] + [_count(pegs).removeprefix("1 ")] * bool(pegs)
    colour, marker = TABLES[type(tables[0])]
    wrapped = "wrapped" in words[0]
    line = DASHDOTTED if len(words) > 1 else DASHED if wrapped else DOTTED if "," in words[0] else SOLID
    return Style(" + ".join(words), colour, "o" if pegs else marker, line, hollow=wrapped)


def _table_words(table: EncodingPart) -> str:
    words = [type(table).__name__.lower()]
    if isinstance(table, Relative):
        words += ["keys and values"] * (table.on == "keys_values") + ["bias"] * (table.on == "bias")
        words += ["wrapped"] * table.wrap
    return ", ".join(words)


def _peg_style(pegs: Sequence[Peg]) -> Style:
    """PEGs alone: 1, 2, 3 and 5 have a shade of their own, other numbers that of the number below."""
    words, count = _count(pegs), _number(pegs)
    shade = max(number for number in PEGS if number <= count)
    colour, marker = PEGS[shade]
    notes = _notes(pegs[0]) if len(pegs) == 1 else []
    if not notes:
        return Style(words, colour, marker, hollow=shade != count)
    wide = KERNELS.get(pegs[0].kernel)
    if wide and count == 1 and notes[-1].startswith("kernel"):  # nothing else but its position is unusual
        return Style(f"{words}, {notes[-1]}", *wide, DASHED)
    marker = PADDINGS.get(pegs[0].padding) or (wide[1] if wide else marker)
    return Style(", ".join([words, *notes]), colour, marker, DASHED, hollow=True)


def _number(pegs: Sequence[Peg]) -> int:
    return sum(len(peg.positions) * peg.repeat for peg in pegs)


def _count(pegs: Sequence[Peg]) -> str:
    return "1 PEG" if _number(pegs) == 1 else f"{_number(pegs)} PEGs"


def _notes(peg: Peg) -> list[str]:
    """What tells it from the paper's PEG."""
    alone, open_border = len(peg.positions) == 1, peg.padding == "none"
    notes = {
        f"at {peg.positions[0]}".replace("-", "−"): alone and peg.positions != (0,),
        "behind one another": alone and peg.repeat > 1,
        f"{peg.repeat} at a position": not alone and peg.repeat > 1,
        f"kernel {peg.kernel}": peg.kernel != 3,
        peg.convolution: peg.convolution != "depthwise",
        "no padding" if open_border else f"{peg.padding} padding": peg.padding != "zero",
        "no skip": not peg.skip and not open_border,  # which never has one
        "no bias": not peg.bias,
        "frozen": peg.frozen,
        "queries and keys": peg.on == "queries_keys",
        "border alone": peg.on == "constant",
        "Twins' start": peg.init == "twins",
    }
    return [note for note, holds in notes.items() if holds]


# --------------------------------------------------------------------------- figures

for _file in sorted((Path(__file__).parent / "fonts").glob("*.ttf")):  # the book's interface font
    font_manager.fontManager.addfont(_file)
REGULAR, SEMIBOLD = "Source Sans 3 ExtraLight", "Source Sans 3 ExtraLight SemiBold"  # as the files call them

RC = {  # on matplotlib's defaults, whatever the reader's own settings
    "figure.dpi": 200,  # twice what a page shows
    "font.family": [REGULAR, "DejaVu Sans"],  # the second for the signs that the first has not
    "font.size": 12,
    "axes.titlesize": 13,
    "axes.titlelocation": "left",
    "axes.labelsize": 12,
    "xtick.labelsize": 11,
    "ytick.labelsize": 11,
    "legend.fontsize": 11,
    "legend.frameon": False,
    "legend.handlelength": 2.8,
    "axes.edgecolor": "#444444",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "lines.linewidth": 2,
    "image.interpolation": "nearest",
    "hatch.linewidth": 1.2,
}
WIDTH = 7.0  # inches; with fonts from 11 points on this reads on a phone


@contextmanager
def figure(height: float, width: float = WIDTH) -> Iterator[Figure]:
    """A new figure in the book's look, inches high and wide; closed for pyplot on leaving, so that a notebook
    shows it once: where it is the value of a cell."""
    with plt.style.context(["default", RC]):
        new = plt.figure(figsize=(width, height), layout="constrained")
        try:
            yield new
            for axes in new.axes:  # else the number of ticks follows the reader's font size when shown
                axes.tick_params(labelsize=RC["xtick.labelsize"])
            new.draw_without_rendering()  # texts and ticks take their look while it holds
        finally:
            plt.close(new)
            save_whole(new)


def save_whole(figure: Figure) -> None:
    """From now on the closed figure is saved at its full size, and says in the file which parts of it are images:
    the page's dark twin (book/_ext/book_pages.py) leaves these as they are."""
    plain = figure.canvas.print_figure

    def print_figure(file, *args, bbox_inches=None, metadata=None, **options):
        name = Path(file).suffix[1:] if isinstance(file, str | Path) else ""
        if (options.get("format") or name or "png").lower() == "png":
            metadata = {"images": json.dumps(_image_boxes(figure)), **(metadata or {})}
        return plain(file, *args, bbox_inches=None, metadata=metadata, **options)

    figure.canvas.print_figure = print_figure


def _image_boxes(figure: Figure) -> list[list[float]]:
    """Left, top, right, bottom of each axes that holds an image or a map of colours, as shares of the figure."""
    boxes = []
    for axes in figure.axes:
        if axes.images or any(isinstance(found, QuadMesh) for found in axes.collections):
            x0, y0, x1, y1 = axes.get_window_extent().transformed(figure.transFigure.inverted()).extents
            boxes.append([round(float(side), 5) for side in (x0, 1 - y1, x1, 1 - y0)])
    return boxes
