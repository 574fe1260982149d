"""One colour and one marker for each encoding, throughout the book; and how every figure looks.

Colours are Okabe and Ito's, which eyes without red or green tell apart. PEGs are blue, darker the more there
are, so that they differ in print without colour too; a table with a PEG keeps the table's colour and takes
the PEG's circle; variants of one PEG are hollow.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import matplotlib as mpl
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

from cpvt.config import Learned, Peg, Relative, Rotary, Sine, parse_encoding

BLACK, ORANGE, SKY, GREEN = "#000000", "#E69F00", "#56B4E9", "#009E73"
YELLOW, BLUE, VERMILLION, PURPLE = "#F0E442", "#0072B2", "#D55E00", "#CC79A7"
GREY, PALE = "#777777", "#E8E8E8"


@dataclass(frozen=True)
class Style:
    """How an encoding is drawn and what it is called. `hollow`: the marker is white inside."""

    label: str
    colour: str
    marker: str
    linestyle: str | tuple = "-"
    hollow: bool = False

    def line(self) -> dict:
        """Keywords for `Axes.plot`."""
        return {
            "label": self.label,
            "color": self.colour,
            "linestyle": self.linestyle,
            **self.point(),
        }

    def point(self) -> dict:
        """The marker's keywords alone."""
        inside = "white" if self.hollow else self.colour
        size = {"*": 11, "p": 8.5, "P": 8}.get(self.marker, 7)
        return {
            "marker": self.marker,
            "markersize": size,
            "markerfacecolor": inside,
            "markeredgecolor": self.colour,
        }


_DASH, _DOT, _DASHDOT = (0, (5, 2)), (0, (1.2, 1.6)), (0, (6, 2, 1.2, 2))
STYLES: dict[str, Style] = {
    "none": Style("none", GREY, "X", _DOT),
    "learned": Style("learned", ORANGE, "s"),
    "sine": Style("sine", PURPLE, "v"),
    "relative": Style("relative", VERMILLION, "D"),
    "relative wrap": Style("relative, wrapped", VERMILLION, "D", _DASH, hollow=True),
    "rotary": Style("rotary", GREEN, "P"),
    "1 peg": Style("1 PEG", SKY, "o"),
    "2 pegs": Style("2 PEGs", "#2B8FCB", "d"),
    "3 pegs": Style("3 PEGs", "#00639C", "^"),
    "5 pegs": Style("5 PEGs", "#00304D", "p"),
    # A kernel of 5 sees as far as two PEGs, one of 7 as far as three: hence their shades.
    "kernel 5": Style("1 PEG, kernel 5", "#2B8FCB", "h", _DASH),
    "kernel 7": Style("1 PEG, kernel 7", "#00639C", "8", _DASH),
    "kernel 27": Style("1 PEG, kernel 27", BLUE, "*", _DASH),
    "learned + peg": Style("learned + PEG", ORANGE, "o", _DASHDOT),
    "sine + peg": Style("sine + PEG", PURPLE, "o", _DASHDOT),
    "relative + peg": Style("relative + PEG", VERMILLION, "o", _DASHDOT),
    "rotary + peg": Style("rotary + PEG", GREEN, "o", _DASHDOT),
}

_TABLES = {Learned: "learned", Sine: "sine", Relative: "relative", Rotary: "rotary"}
# What data/published.csv calls them.
_PUBLISHED = {
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
    """Encoding text, a key of STYLES or a name in data/published.csv -> how it is drawn.

    Raises ConfigError for a text that is no encoding.
    """
    if encoding in STYLES:
        return STYLES[encoding]
    parts = parse_encoding(_PUBLISHED.get(encoding, encoding))
    if not parts:
        return STYLES["none"]
    pegs = [part for part in parts if isinstance(part, Peg)]
    tables = [part for part in parts if not isinstance(part, Peg)]
    if not tables:
        return _peg_style(pegs[0]) if len(pegs) == 1 else _counted(sum(map(_count, pegs)))
    name = _TABLES[type(tables[0])]
    if isinstance(tables[0], Relative) and tables[0].wrap:
        name = "relative wrap"
    if len(tables) > 1:
        label = " + ".join(_TABLES[type(table)] for table in tables) + (" + PEG" if pegs else "")
        return replace(STYLES[name], label=label, linestyle=_DASHDOT)
    if not pegs:
        return STYLES[name]
    count = sum(map(_count, pegs))
    style = STYLES[f"{name.removesuffix(' wrap')} + peg"]
    wrapped = name == "relative wrap"
    if count == 1 and not wrapped:
        return style
    label = f"{STYLES[name].label} + {'PEG' if count == 1 else _words(count)}"
    return replace(style, label=label, hollow=wrapped)


def _count(peg: Peg) -> int:
    return len(peg.positions) * peg.repeat


def _words(count: int) -> str:
    return "1 PEG" if count == 1 else f"{count} PEGs"


def _counted(count: int) -> Style:
    """1, 2, 3 and 5 PEGs have a shade of their own; other numbers take that of the number below."""
    nearest = max(n for n in (1, 2, 3, 5) if n <= count)
    style = STYLES["1 peg" if nearest == 1 else f"{nearest} pegs"]
    return style if nearest == count else replace(style, label=_words(count), hollow=True)


_PADDINGS = {"circular": "<", "replicate": ">", "reflect": "H", "none": "1"}


def _peg_style(peg: Peg) -> Style:
    count = _count(peg)
    large = STYLES.get(f"kernel {peg.kernel}")
    if large and len(peg.positions) == 1 and peg == Peg(peg.positions, peg.kernel, compute=peg.compute):
        return large
    style, notes = _counted(count), []
    if peg.positions != (0,) and len(peg.positions) == 1:
        notes.append(f"at {'−1' if peg.positions[0] == -1 else peg.positions[0]}")
    if peg.repeat > 1:
        notes.append("behind one another" if len(peg.positions) == 1 else f"{peg.repeat} at a place")
    if peg.kernel != 3:
        notes.append(f"kernel {peg.kernel}")
    if peg.convolution != "depthwise":
        notes.append(peg.convolution)
    if peg.padding != "zero":
        notes.append("no padding" if peg.padding == "none" else f"{peg.padding} padding")
    if not peg.skip and peg.padding != "none":
        notes.append("no skip")
    notes += ["frozen"] * peg.frozen + ["queries and keys"] * (peg.on == "queries_keys")
    notes += ["shared"] * peg.shared + ["Twins' start"] * (peg.init == "twins")
    if not notes:
        return style
    marker = _PADDINGS.get(peg.padding) or (large or style).marker
    return replace(
        style, label=", ".join([_words(count), *notes]), marker=marker, linestyle=_DASH, hollow=True
    )


# --------------------------------------------------------------------------- how figures look

RC = {
    "figure.facecolor": "white",  # opaque: dark pages set figures on a white card
    "figure.dpi": 150,
    "savefig.facecolor": "white",
    "savefig.dpi": 150,
    "savefig.transparent": False,
    "svg.hashsalt": "cpvt",  # the same picture gives the same file
    "svg.fonttype": "path",
    "font.family": "DejaVu Sans",  # comes with matplotlib
    "font.size": 12,
    "axes.titlesize": 13,
    "axes.titlelocation": "left",
    "axes.labelsize": 12,
    "xtick.labelsize": 11,
    "ytick.labelsize": 11,
    "legend.fontsize": 11,
    "legend.frameon": False,
    "legend.handlelength": 2.8,
    "axes.facecolor": "white",
    "axes.edgecolor": "#444444",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": False,
    "lines.linewidth": 2,
    "image.interpolation": "nearest",
    "hatch.linewidth": 1.2,
}
WIDTH = 7.0  # inches; with fonts from 11 points on this reads on a phone


@contextmanager
def figure(height: float, width: float = WIDTH) -> Iterator[Figure]:
    """A new figure in the book's look, closed for pyplot on leaving, so that a notebook shows it once:
    where it is the value of a cell."""
    with mpl.rc_context(RC):
        new = plt.figure(figsize=(width, height), layout="constrained")
        try:
            yield new
            for axes in new.axes:  # else the number of ticks follows the reader's font size when shown
                axes.tick_params(labelsize=RC["xtick.labelsize"])
            new.draw_without_rendering()  # texts and ticks take their look while it holds
        finally:
            plt.close(new)
