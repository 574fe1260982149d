"""Figures say what their rows say, can be told apart without colour, and can be read on a phone."""

import io
import itertools
import re

import matplotlib
import numpy as np
import pytest
import torch
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from matplotlib.text import Text
from PIL import Image

matplotlib.use("agg")

from cpvt.views import figures  # noqa: E402

from cpvt.config import TrainConfig  # noqa: E402
from cpvt.errors import ConfigError
from cpvt.lab.experiments import ENCODINGS  # noqa: E402
from cpvt.lab.plots import STYLES, style_of  # noqa: E402
from cpvt.lab.probes import Probe, theory  # noqa: E402
from cpvt.lab.results import NOT_YET, Row, published, spread  # noqa: E402


def measured(
    encodings=("none", "learned", "relative(wrap=True)", "peg", "peg(positions=(0, 1))"),
    metric="top1@10",
    distances=range(5),
    seeds=3,
) -> list[Row]:
    common = {
        "experiment": "diagnostics", "scale": "seconds", "dataset": "where", "dataset_sha256": "0" * 64,
        "weights": "raw", "seconds": 1.0, "device": "cpu", "torch": torch.__version__, "cpvt_commit": "abc",
        "date": "2026-01-31",
    }  # fmt: skip
    return [
        Row(
            row=f"where, {encoding}, gap",
            seed=seed,
            config={"model": {"encoding": encoding}},
            metrics={f"{metric}/d{d}": 30.0 + 3 * d + 4 * i + 3 * seed for d in distances},
            **common,
        )
        for i, encoding in enumerate(encodings)
        for seed in range(seeds)
    ]


GENERATOR = torch.Generator().manual_seed(0)
PICTURE = torch.rand(3, 32, 32, generator=GENERATOR)
PROBE = Probe(0.37, 0.36, 0.0, 0.0, 0.8, 0.8)
DRAWN = {
    "accuracy_by_distance": lambda: figures.accuracy_by_distance(
        measured(), "top1@10", chance=25, beyond=1, title="Where"
    ),
    "accuracy_and_reach": lambda: figures.accuracy_and_reach(measured(), "top1@10", chance=25, title="Where"),
    "accuracy_and_reach of two": lambda: figures.accuracy_and_reach(
        measured(["none", "peg"], distances=range(2, 10)), "top1@10", limit="order"
    ),
    "reach_curves": lambda: figures.reach_curves(
        {"none": [1e-16] * 6, "peg": [8e-4, 7e-5, *[1e-16] * 4], "learned + peg": [1e-3] * 6}, title="Reach"
    ),
    "result_table": lambda: figures.result_table(
        [[25.2, 51.0, 99.0], [100.0, float("nan"), 70.0]], ["none", "relative, wrapped"],
        ["where", "arrangement", "what"], chance=[25, 50, 50],
        held=[[True, None, False], [True, None, None]], title="Accuracy (%)",
    ),
    "published_chart placement": lambda: figures.published_chart(published("placement"), title="Where to put it"),
    "published_chart imagenet": lambda: figures.published_chart(published("imagenet")),
    "published_chart throughput": lambda: figures.published_chart(published("throughput"), "images a second"),
    "published_by_size": lambda: figures.published_by_size(published("resolution"), title="Resolution"),
    "probe_chart": lambda: figures.probe_chart({"1 PEG": PROBE, "noise": PROBE}, ceiling=0.37, title="Probe"),
    "differences": lambda: figures.differences({"5 PEGs − learned": spread([1, 2, 4.0])}, title="Seeds"),
    "images": lambda: figures.images([PICTURE] * 5, ["top left"] * 5, lines=(4, 4)),
    "image_and_patches": lambda: figures.image_and_patches(PICTURE, 8),
    "token_grid": lambda: figures.token_grid((4, 6), {"one": [(0, 0)], "another": [(3, 5)]}, title="Tokens"),
    "reach_picture": lambda: figures.reach_picture(),
    "encoding_maps": lambda: figures.encoding_maps(
        torch.randn(6, 8, 10, generator=GENERATOR), [f"channel {i}" for i in range(6)], label="output − input"
    ),
    "similarity_map": lambda: figures.similarity_map(torch.eye(24), (4, 6), title="Table"),
    "attention_map": lambda: figures.attention_map(
        torch.rand(3, 24, generator=GENERATOR).softmax(-1), (4, 6), query=8, image=PICTURE
    ),
}  # fmt: skip


def texts(fig: Figure) -> list[Text]:
    """All texts that are drawn. Matplotlib keeps tick labels outside the limits, which are not."""
    fig.draw_without_rendering()
    found = [*fig.texts, fig._suptitle, *(t for legend in fig.legends for t in legend.findobj(Text))]
    for axes in fig.axes:
        if axes.axison:
            found += [axes.title, axes._left_title, axes._right_title, axes.xaxis.label, axes.yaxis.label]
            found += [t for axis in (axes.xaxis, axes.yaxis) for t in drawn_ticks(axis)]
        found += axes.texts
    return [t for t in dict.fromkeys(found) if t and t.get_visible() and t.get_text().strip()]


def drawn_ticks(axis) -> list[Text]:
    low, high = sorted(axis.get_view_interval())
    ticks = [tick for tick in axis.get_major_ticks() if low <= tick.get_loc() <= high]
    return [label for tick in ticks for label in (tick.label1, tick.label2)]


def png(fig: Figure) -> bytes:
    file = io.BytesIO()
    fig.savefig(file, format="png")
    return file.getvalue()


@pytest.fixture(scope="module", params=DRAWN)
def drawn(request) -> tuple[str, Figure, bytes]:
    GENERATOR.manual_seed(0)
    fig = DRAWN[request.param]()
    return request.param, fig, png(fig)


def test_every_figure_can_be_read_on_a_phone(drawn):
    _, fig, _ = drawn
    assert isinstance(fig, Figure) and not plt.get_fignums()  # a notebook shows it once
    assert fig.get_facecolor() == (1, 1, 1, 1) and fig.get_figwidth() == 7
    found = texts(fig)
    assert found
    assert min(t.get_fontsize() for t in found if "$" not in t.get_text()) >= 11
    boxes = [(t.get_text(), t.get_window_extent()) for t in found]
    for words, box in boxes:
        assert box.x0 >= -1 and box.y0 >= -1, f"{words!r} is cut off"
        assert box.x1 <= fig.bbox.width + 1 and box.y1 <= fig.bbox.height + 1, f"{words!r} is cut off"
    for (one, a), (other, b) in itertools.combinations(boxes, 2):
        across, down = min(a.x1, b.x1) - max(a.x0, b.x0), min(a.y1, b.y1) - max(a.y0, b.y0)
        assert across <= 1 or down <= 1, f"{one!r} lies on {other!r}"


def test_the_same_rows_give_the_same_opaque_file(drawn):
    name, _, first = drawn
    GENERATOR.manual_seed(0)
    with plt.rc_context({"font.size": 5, "axes.facecolor": "black", "lines.linewidth": 9}):
        assert png(DRAWN[name]()) == first  # whatever the reader's own settings
    image = Image.open(io.BytesIO(first))
    assert image.mode != "RGBA" or image.getchannel("A").getextrema() == (255, 255)


# --------------------------------------------------------------------------- styles


def luminance(colour: str) -> float:
    rgb = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)]) / 255
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    return float(linear @ [0.2126, 0.7152, 0.0722])


def test_no_two_encodings_look_the_same_even_without_colour():
    looks = [(style.marker, style.hollow, str(style.linestyle)) for style in STYLES.values()]
    peg_on_top = [
        key for key in STYLES if key.endswith("+ peg")
    ]  # these share the circle, by the book's rule
    plain = [look for key, look in zip(STYLES, looks, strict=True) if key not in peg_on_top]
    assert len(set(plain)) == len(plain)
    full = {(s.colour, s.marker, s.hollow, str(s.linestyle)) for s in STYLES.values()}
    assert len(full) == len({s.label for s in STYLES.values()}) == len(STYLES)


def test_pegs_darken_with_their_number():
    shades = [luminance(STYLES[key].colour) for key in ("1 peg", "2 pegs", "3 pegs", "5 pegs")]
    steps = [(a + 0.05) / (b + 0.05) for a, b in itertools.pairwise(shades)]
    assert min(steps) > 1.4


def test_what_the_experiments_use_can_be_told_apart():
    found = [style_of(encoding) for encoding in ENCODINGS]
    assert len(set(found)) == len({style.label for style in found}) == len(ENCODINGS)


@pytest.mark.parametrize(
    ("encoding", "key"),
    [
        ("none", "none"),
        ("learned(resize='refuse')", "learned"),
        ("sine(resize='rescale')", "sine"),
        ("relative(clip=4, on='bias')", "relative"),
        ("relative(wrap=True)", "relative wrap"),
        ("peg", "1 peg"),
        ("peg(positions=(-1, 0, 1))", "3 pegs"),
        ("peg(positions=(0, 1, 2, 3, 4))", "5 pegs"),
        ("peg(positions=(-1,), kernel=27, compute='matrix')", "kernel 27"),
        ("learned + peg", "learned + peg"),
        ("2-D sine", "sine"),
        ("5 PEGs", "5 pegs"),
    ],
)
def test_encodings_find_their_style(encoding, key):
    assert style_of(encoding) == STYLES[key]
    assert style_of(key) == STYLES[key]


@pytest.mark.parametrize(
    ("encoding", "label"),
    [
        ("peg(positions=(3,))", "1 PEG, at 3"),
        ("peg(positions=(-1,))", "1 PEG, at −1"),
        ("peg(padding='circular')", "1 PEG, circular padding"),
        ("peg(padding='none', skip=False)", "1 PEG, no padding"),
        ("peg(repeat=4)", "4 PEGs, behind one another"),
        ("peg(positions=(0, 1, 2, 3))", "4 PEGs"),
        ("peg(frozen=True, on='queries_keys')", "1 PEG, frozen, queries and keys"),
        ("learned + peg(positions=(0, 1))", "learned + 2 PEGs"),
        ("relative(wrap=True) + peg", "relative, wrapped + PEG"),
        ("sine + rotary", "sine + rotary"),
    ],
)
def test_variants_say_what_they_are_and_look_unlike_the_plain_one(encoding, label):
    style = style_of(encoding)
    assert style.label == label and style not in STYLES.values()
    assert all((style.marker, style.colour, style.hollow, style.linestyle)
               != (s.marker, s.colour, s.hollow, s.linestyle)
               for s in STYLES.values()) or label == "learned + 2 PEGs"  # fmt: skip


def test_every_published_encoding_has_a_style_and_nonsense_has_none():
    assert all(style_of(one.encoding) for one in published())
    with pytest.raises(ConfigError, match="did you mean learned"):
        style_of("learnt")


# --------------------------------------------------------------------------- what charts say


def test_lines_are_means_and_bands_are_extremes_over_seeds():
    axes = figures.accuracy_by_distance(measured(["peg"]), "top1@10").axes[0]
    assert axes.lines[0].get_xydata().tolist() == [[d, 33.0 + 3 * d] for d in range(5)]
    band = axes.collections[0].get_paths()[0].vertices
    assert (band[:, 1].min(), band[:, 1].max()) == (30.0, 48.0)


@pytest.mark.parametrize(("limit", "column"), [("border", 0), ("order", 1)])
def test_shading_starts_where_theory_says(limit, column):
    encodings = ["none", "peg", "peg(positions=(0, 1))", "learned"]
    fig = figures.accuracy_and_reach(measured(encodings, distances=range(8)), "top1@10", limit=limit)
    for encoding, axes in zip(encodings, fig.axes, strict=False):
        known = theory(encoding)
        starts = [patch.get_x() for patch in axes.patches]
        assert starts == ([] if known is None else [max(known[column] + 0.5, -0.5)])


def test_the_table_prints_values_marks_and_what_is_missing():
    words = {t.get_text() for t in texts(DRAWN["result_table"]())}
    assert {"25  ✓", "51", "99  ✗", "100  ✓", NOT_YET, "70"} <= words


def test_published_dots_stand_at_their_values_and_say_how_they_were_read():
    rows = published("resolution")
    assert {one.provenance for one in rows} == {"official figure", "secondary", "digitised"}
    axes = figures.published_chart(rows).axes[0]
    dots = [line for line in axes.lines if line.get_marker() != "None"]
    for row, dot in zip(rows, dots, strict=True):
        assert dot.get_xdata()[0] == row.value
        full = dot.get_markerfacecolor() != "white"
        assert full == (row.provenance == "official figure")
        assert (dot.get_marker() == "D") == (row.provenance == "digitised")


def test_reach_picture_meets_exactly_where_theory_says():
    for distance in range(4):
        panels = figures.reach_picture((9, 9), (4, distance), pegs=[1, 2]).axes
        for k, axes in zip((1, 2), panels, strict=True):
            meets = distance <= theory(f"peg(repeat={k})")[0]
            assert axes.get_title().endswith("they meet" if meets else "they do not meet")


def test_patches_are_numbered_as_the_model_reads_them():
    words = [t.get_text() for t in texts(DRAWN["image_and_patches"]())]
    assert [w for w in words if re.fullmatch(r"\d+", w)] == [str(i) for i in range(16)]


def test_nothing_measured_says_so():
    for fig in (
        figures.accuracy_by_distance([]),
        figures.accuracy_and_reach(measured(), "top1@99"),
        figures.published_chart([]),
        figures.published_by_size([]),
        figures.differences({}),
    ):
        assert [t.get_text() for t in texts(fig)] == [NOT_YET]


def test_wrong_shapes_are_refused():
    with pytest.raises(ValueError, match=r"shape \(1, 2\) for 2 rows"):
        figures.result_table([[1, 2]], ["a", "b"], ["c"])
    with pytest.raises(ValueError, match="5 rows with grid"):
        figures.similarity_map(torch.eye(5), (2, 2))
    with pytest.raises(ValueError, match="expected .n, H, W."):
        figures.encoding_maps(torch.eye(5))
    with pytest.raises(ValueError, match="at most 4"):
        figures.token_grid((2, 2), {str(i): [] for i in range(5)})


def test_default_configuration_has_a_style():
    assert style_of(TrainConfig().model.encoding) == STYLES["learned"]
