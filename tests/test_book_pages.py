"""The build's own extension: dark twins of figures, the front page's links."""

import sys
from pathlib import Path
from types import SimpleNamespace

import numpy
import pytest
from PIL import Image

from cpvt.lab.styles import figure

sys.path.insert(0, str(Path(__file__).parent.parent / "book" / "_ext"))
book_pages = pytest.importorskip("book_pages", reason="needs docutils: the book's packages")


def test_a_dark_twin_turns_lightness_and_leaves_photographs(tmp_path):
    with figure(3) as fig:
        plot, photograph = fig.subplots(1, 2)
        plot.axhspan(0, 1, color="#0072B2")
        plot.set(xlim=(0, 1), ylim=(0, 2), xticks=[], yticks=[])
        photograph.imshow(numpy.full((8, 8, 3), 0.75))
    fig.savefig(tmp_path / "figure.png")
    book_pages.dark_twin(tmp_path / "figure.png", tmp_path / "dark.png")
    light, dark = (
        numpy.asarray(Image.open(tmp_path / name).convert("RGB"), int) for name in ("figure.png", "dark.png")
    )
    corner, bar = (3, 3), (int(0.75 * light.shape[0]), int(0.25 * light.shape[1]))
    grey = light.shape[0] // 2, int(0.75 * light.shape[1])
    assert light[corner].tolist() == [255] * 3 and dark[corner].tolist() == [book_pages.DARK_GROUND] * 3
    assert light[bar].tolist() == [0, 0x72, 0xB2] and dark[bar].argmax() == 2 and dark[bar].sum() > 450
    assert (light[grey] == dark[grey]).all() and abs(light[grey] - 191).max() <= 1


def test_the_front_page_is_a_page_whose_links_lead_from_above(tmp_path):
    (tmp_path / "book").mkdir()
    links = (
        'href="../_static/a.css" src="../_images/b.png" href="c.html#d" href="#e" href="https://f" href="../"'
    )
    page = f'<html data-content_root="../" {links}><meta content="width=device-width" content="../_static/g.png">'
    (tmp_path / "book" / "front.html").write_text(page)
    config = SimpleNamespace(root_doc="book/front")
    app = SimpleNamespace(builder=SimpleNamespace(format="html"), config=config, outdir=tmp_path)
    book_pages.write_front_page(app, None)
    links = (
        'href="_static/a.css" src="_images/b.png" href="book/c.html#d" href="#e" href="https://f" href="."'
    )
    page = f'<html data-content_root="./" {links}><meta content="width=device-width" content="_static/g.png">'
    assert (tmp_path / "index.html").read_text() == page


@pytest.mark.parametrize("base", ["", "https://example.org/cpvt", "https://example.org/cpvt/"])
def test_previews_have_words_and_a_picture_with_the_address_that_is_known(base):
    from docutils import nodes

    words = "A transformer reads an image as a bag of patches, and somebody has to tell it where each was."
    minutes = nodes.emphasis("", "13 minutes to read, " + "and more words so that this line is long, " * 3)
    page = nodes.section("", nodes.paragraph("", "", minutes), nodes.paragraph("", words + r" \mathbf q"))
    app = SimpleNamespace(config=SimpleNamespace(html_baseurl=base))
    context = {"title": "<em>Sizes</em>", "pathto": lambda path, _: f"../{path}"}
    book_pages.add_description(app, "book/sizes", "page.html", context, page)
    picture = "https://example.org/cpvt/_static/idea.png" if base else "../_static/idea.png"
    for line in (
        f'name="description" content="{words} q"',
        'property="og:title" content="Sizes"',
        f'property="og:image" content="{picture}"',
    ):
        assert f"<meta {line} />" in context["metatags"]


def test_numbers_stay_with_their_signs():
    from docutils import nodes

    page = nodes.section(
        "", nodes.paragraph("", "10 % of 8 × 8, 2.0 ± 0.9, 10 more"), nodes.literal("", "10 % 3")
    )
    book_pages.keep_together(None, page)
    assert page.astext().replace("\u00a0", "_").split("\n\n") == [
        "10_% of 8_×_8, 2.0_±_0.9, 10 more",
        "10 % 3",
    ]
