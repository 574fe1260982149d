"""Figures look the same whatever the reader's settings; encodings can be told apart without colour."""

import io
import itertools
import re

import matplotlib
import numpy as np
import pandas
import pytest
import torch
from matplotlib import pyplot as plt
from matplotlib.text import Text
from PIL import Image

matplotlib.use("agg")

from cpvt.errors import ConfigError  # noqa: E402
from cpvt.lab.experiments import ENCODINGS, PADDINGS  # noqa: E402
from cpvt.lab.plots import Table, show_images  # noqa: E402
from cpvt.lab.results import published  # noqa: E402
from cpvt.lab.styles import figure, style_of  # noqa: E402


def lines():
    with figure(4.4) as fig:
        axes = fig.subplots()
        axes.plot(range(5), **style_of("peg").line())
        axes.set(xlabel="distance", ylabel="accuracy (%)")
        fig.legend(loc="outside lower center")
    return fig


SOME = torch.rand(8, 3, 24, 32, generator=torch.Generator().manual_seed(0))


def eight():
    return show_images(list(SOME), [f"image {i}" for i in range(8)])


@pytest.mark.parametrize("draw", [lines, eight])
def test_figures_can_be_read_on_a_phone_and_are_the_same_opaque_file_everywhere(draw):
    def png() -> bytes:
        fig, file = draw(), io.BytesIO()
        assert not plt.get_fignums() and fig.get_figwidth() == 7  # a notebook shows it once
        said = [text for text in fig.findobj(Text) if text.get_text().strip()]
        assert min(text.get_fontsize() for text in said) >= 11
        fig.savefig(file, format="png")
        return file.getvalue()

    first = png()
    with plt.rc_context({"font.size": 5, "axes.facecolor": "black", "lines.linewidth": 9, "axes.grid": True}):
        assert png() == first
    image = Image.open(io.BytesIO(first))
    assert image.mode != "RGBA" or image.getchannel("A").getextrema() == (255, 255)


def test_images_are_shown_row_by_row_under_their_titles():
    axes = eight().axes
    assert [one.get_title() for one in axes] == [f"image {i}" for i in range(8)]
    assert np.array_equal(axes[5].images[0].get_array(), SOME[5].permute(1, 2, 0))


PLAIN = {name: name for name in ("none", "learned", "sine", "relative", "rotary")}
PLAIN |= {"relative, wrapped": "relative(wrap=True)", "1 PEG": "peg", "2 PEGs": "peg(positions=(0, 1))"}
PLAIN |= {"3 PEGs": "peg(positions=(-1, 0, 1))", "5 PEGs": "peg(positions=(0, 1, 2, 3, 4))"}
PLAIN |= {"1 PEG, kernel 5": "peg(kernel=5)", "1 PEG, kernel 7": "peg(kernel=7)"}
PLAIN |= {"1 PEG, kernel 27": "peg(positions=(-1,), kernel=27, compute='matrix')"}
VARIANTS = {"1 PEG, at −1": "peg(positions=(-1,))", "1 PEG, no padding": "peg(padding='none', skip=False)"}
VARIANTS |= {"1 PEG, frozen, queries and keys": "peg(frozen=True, on='queries_keys')"}
VARIANTS |= {"4 PEGs": "peg(positions=(0, 1, 2, 3))", "4 PEGs, behind one another": "peg(repeat=4)"}
VARIANTS |= {"6 PEGs, kernel 1, dense": "peg(positions=(0, 1, 2, 3, 4, 5), kernel=1, convolution='dense')"}
VARIANTS |= {"learned + 2 PEGs": "learned + peg(positions=(0, 1))", "sine + rotary": "sine + rotary"}
VARIANTS |= {"relative, keys and values": "relative(on='keys_values')"}
VARIANTS |= {"relative, wrapped + PEG": "relative(wrap=True) + peg"}


def look(encoding: str) -> tuple:
    """What is left of a style on a black-and-white print."""
    style = style_of(encoding)
    return style.marker, style.hollow, style.linestyle


def luminance(colour: str) -> float:
    rgb = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)]) / 255
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    return float(linear @ [0.2126, 0.7152, 0.0722])


def test_encodings_can_be_told_apart_even_without_colour():
    for label, encoding in (PLAIN | VARIANTS).items():
        assert style_of(encoding).label == label
    assert len({look(encoding) for encoding in PLAIN.values()}) == len(PLAIN)
    plain = {(style_of(encoding).colour, *look(encoding)) for encoding in PLAIN.values()}
    for encoding in VARIANTS.values():
        assert (style_of(encoding).colour, *look(encoding)) not in plain
    pegs = [PLAIN[count] for count in ("1 PEG", "2 PEGs", "3 PEGs", "5 PEGs")]
    shades = [luminance(style_of(encoding).colour) for encoding in pegs]
    assert min((a + 0.05) / (b + 0.05) for a, b in itertools.pairwise(shades)) > 1.4
    assert min(1.05 / (luminance(style_of(encoding).colour) + 0.05) for encoding in PLAIN.values()) > 3
    for compared in (ENCODINGS, ("peg", *PADDINGS)):
        assert len({style_of(encoding) for encoding in compared}) == len(compared)


def test_every_published_encoding_has_a_style_and_nonsense_has_none():
    assert all(style_of(encoding) for encoding in published().encoding.unique())
    with pytest.raises(ConfigError, match="did you mean learned"):
        style_of("learnt")
    same = {"relative(clip=4)": "relative", "peg(positions=(0,), kernel=27)": PLAIN["1 PEG, kernel 27"]}
    same |= {"2-D sine": "sine"}  # as data/published.csv has it
    assert all(style_of(encoding) == style_of(other) for encoding, other in same.items())


def test_a_table_marks_the_best_mean_and_the_baseline():
    cells = {"top-1": ["28.4 ± 1.0", "34.8 ± 1.1", ""], "gain": ["−6.4", "+2", None], "share": [0.5, 1.25, 2]}
    frame = pandas.DataFrame(cells, ["none", "PEG", "a < b"])
    for lowest, best in ((False, ["34.8 ± 1.1", "+2"]), (True, ["28.4 ± 1.0", "−6.4"])):
        html = Table(frame, best=["top-1", "gain"], baseline="none", lowest=lowest)._repr_html_()
        assert re.findall(r"<strong>(.*?)</strong>", html) == sorted(best, key=html.index)
        assert re.findall(r"<em>(.*?)</em>", html) == ["none"] and "a &lt; b" in html and "id=" not in html
    assert re.findall(r"<td>(.*?)</td>", html)[-3:] == ["", "", "2.0"]
    assert repr(Table(frame)) == "Table of 3 rows, 3 columns"
