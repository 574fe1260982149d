"""Figures say what their data say, can be told apart without colour, and can be read on a phone."""

import dataclasses
import io
import itertools

import matplotlib
import numpy as np
import pytest
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from matplotlib.text import Text
from PIL import Image

matplotlib.use("agg")

from cpvt.config import TrainConfig  # noqa: E402
from cpvt.data.sampler import Sampler  # noqa: E402
from cpvt.errors import ConfigError  # noqa: E402
from cpvt.lab.experiments import ENCODINGS, PADDINGS  # noqa: E402
from cpvt.lab.plots import batch_layout, drawn_image, show_images  # noqa: E402
from cpvt.lab.results import published  # noqa: E402
from cpvt.lab.styles import style_of  # noqa: E402

SAMPLER = Sampler(images=1000, global_batch_size=48, seed=3, mix_group=12, repeated_aug=3)


DRAWN = {
    "images": lambda: show_images([drawn_image(i, 24, 32) / 255 for i in range(8)], ["a house"] * 8),
    "batch": lambda: batch_layout(dataclasses.replace(SAMPLER, world_size=2, micro_batch_size=12)),
    "batch of one process": lambda: batch_layout(SAMPLER),
}


def texts(fig: Figure) -> list[Text]:
    """All texts that are drawn. Matplotlib keeps tick labels outside the limits, which are not."""
    fig.draw_without_rendering()
    found = [*fig.texts, *(text for legend in fig.legends for text in legend.findobj(Text))]
    for axes in fig.axes:
        if axes.axison:
            found += [axes.title, axes._left_title, axes.xaxis.label, axes.yaxis.label]
            found += [text for axis in (axes.xaxis, axes.yaxis) for text in drawn_ticks(axis)]
        found += axes.texts
    return [text for text in dict.fromkeys(found) if text.get_visible() and text.get_text().strip()]


def drawn_ticks(axis) -> list[Text]:
    low, high = sorted(axis.get_view_interval())
    return [tick.label1 for tick in axis.get_major_ticks() if low <= tick.get_loc() <= high]


def words(fig: Figure) -> list[str]:
    return [text.get_text() for text in texts(fig)]


def png(fig: Figure) -> bytes:
    file = io.BytesIO()
    fig.savefig(file, format="png")
    return file.getvalue()


@pytest.mark.parametrize("name", DRAWN)
def test_every_figure_can_be_read_on_a_phone(name):
    fig = DRAWN[name]()
    assert not plt.get_fignums()  # a notebook shows it once
    assert fig.get_facecolor() == (1, 1, 1, 1) and fig.get_figwidth() == 7
    found = texts(fig)
    assert found and min(text.get_fontsize() for text in found) >= 11
    boxes = [(text.get_text(), text.get_window_extent()) for text in found]
    for said, box in boxes:
        assert box.x0 >= -1 and box.y0 >= -1, f"{said!r} is cut off"
        assert box.x1 <= fig.bbox.width + 1 and box.y1 <= fig.bbox.height + 1, f"{said!r} is cut off"
    for (one, a), (other, b) in itertools.combinations(boxes, 2):
        across, down = min(a.x1, b.x1) - max(a.x0, b.x0), min(a.y1, b.y1) - max(a.y0, b.y0)
        assert across <= 1 or down <= 1, f"{one!r} lies on {other!r}"


@pytest.mark.parametrize("name", ["images", "batch"])
def test_the_same_results_give_the_same_opaque_file(name):
    first = png(DRAWN[name]())
    with plt.rc_context({"font.size": 5, "axes.facecolor": "black", "lines.linewidth": 9}):
        assert png(DRAWN[name]()) == first  # whatever the reader's own settings
    image = Image.open(io.BytesIO(first))
    assert image.mode != "RGBA" or image.getchannel("A").getextrema() == (255, 255)


# --------------------------------------------------------------------------- styles

PLAIN = {
    "none": "none",
    "learned": "learned",
    "sine": "sine",
    "relative": "relative",
    "relative, wrapped": "relative(wrap=True)",
    "rotary": "rotary",
    "1 PEG": "peg",
    "2 PEGs": "peg(positions=(0, 1))",
    "3 PEGs": "peg(positions=(-1, 0, 1))",
    "5 PEGs": "peg(positions=(0, 1, 2, 3, 4))",
    "1 PEG, kernel 5": "peg(kernel=5)",
    "1 PEG, kernel 7": "peg(kernel=7)",
    "1 PEG, kernel 27": "peg(positions=(-1,), kernel=27, compute='matrix')",
}
VARIANTS = {
    "1 PEG, at 3": "peg(positions=(3,))",
    "1 PEG, at −1": "peg(positions=(-1,))",
    "1 PEG, circular padding": "peg(padding='circular')",
    "1 PEG, no padding": "peg(padding='none', skip=False)",
    "1 PEG, border alone": "peg(on='constant')",
    "1 PEG, frozen, queries and keys": "peg(frozen=True, on='queries_keys')",
    "1 PEG, separable": "peg(convolution='separable')",
    "4 PEGs": "peg(positions=(0, 1, 2, 3))",
    "4 PEGs, behind one another": "peg(repeat=4)",
    "5 PEGs, shared": "peg(positions=(0, 1, 2, 3, 4), shared=True)",
    "6 PEGs, kernel 1, dense": "peg(positions=(0, 1, 2, 3, 4, 5), kernel=1, convolution='dense')",
    "learned + PEG": "learned + peg",
    "learned + 2 PEGs": "learned + peg(positions=(0, 1))",
    "relative, bias": "relative(on='bias')",
    "relative, keys and values": "relative(on='keys_values')",
    "relative, wrapped + PEG": "relative(wrap=True) + peg",
    "sine + rotary": "sine + rotary",
}


def look(encoding: str) -> tuple:
    """What is left of a style on a black-and-white print."""
    style = style_of(encoding)
    return style.marker, style.hollow, style.linestyle


def luminance(colour: str) -> float:
    rgb = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)]) / 255
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    return float(linear @ [0.2126, 0.7152, 0.0722])


def test_labels_say_what_an_encoding_is():
    for label, encoding in (PLAIN | VARIANTS).items():
        assert style_of(encoding).label == label


def test_no_two_encodings_look_the_same_even_without_colour():
    assert len({look(encoding) for encoding in PLAIN.values()}) == len(PLAIN)


def test_variants_look_unlike_the_plain_ones():
    plain = {(style_of(encoding).colour, *look(encoding)) for encoding in PLAIN.values()}
    for encoding in VARIANTS.values():
        assert (style_of(encoding).colour, *look(encoding)) not in plain


def test_pegs_darken_with_their_number():
    pegs = [PLAIN[count] for count in ("1 PEG", "2 PEGs", "3 PEGs", "5 PEGs")]
    shades = [luminance(style_of(encoding).colour) for encoding in pegs]
    assert min((a + 0.05) / (b + 0.05) for a, b in itertools.pairwise(shades)) > 1.4


def test_what_the_experiments_compare_can_be_told_apart():
    for compared in (ENCODINGS, ("peg", *PADDINGS)):
        assert len({style_of(encoding) for encoding in compared}) == len(compared)


@pytest.mark.parametrize(
    ("encoding", "same"),
    [
        ("learned(resize='refuse')", "learned"),
        ("relative(clip=4)", "relative"),
        ("peg(positions=(0,), kernel=27)", "peg(positions=(-1,), kernel=27, compute='matrix')"),
        ("2-D sine", "sine"),
        ("5 PEGs", "peg(positions=(0, 1, 2, 3, 4))"),
        (TrainConfig().model.encoding, "learned"),
    ],
)
def test_what_is_not_compared_looks_the_same(encoding, same):
    assert style_of(encoding) == style_of(same)


def test_every_published_encoding_has_a_style_and_nonsense_has_none():
    assert all(style_of(encoding) for encoding in published().encoding.unique())
    with pytest.raises(ConfigError, match="did you mean learned"):
        style_of("learnt")


# --------------------------------------------------------------------------- what figures say


def test_the_numbers_in_the_squares_are_the_samplers():
    numbers = [int(word) for word in words(batch_layout(SAMPLER)) if word.isdigit()]
    assert numbers == (SAMPLER.positions(0)[1] // SAMPLER.repeated_aug).tolist()
    rows = [numbers[i : i + 12] for i in range(0, 48, 12)]
    assert all(len(set(row)) == len(row) for row in rows)  # no group has two copies of an image
