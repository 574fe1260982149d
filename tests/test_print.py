"""The built pages on paper: what a browser prints of a dark page with everything closed."""

import pytest
from browser import chromium

PAPER = 627  # CSS pixels: A4 less its margins
MEASURE = """() => {
  const all = (selector) => [...document.querySelectorAll(selector)];
  const html = (nodes) => nodes.slice(0, 3).map((node) => node.outerHTML.slice(0, 120));
  const seen = (node) => node.checkVisibility({ contentVisibilityAuto: true, visibilityProperty: true })
    && node.getBoundingClientRect().height > 0;
  const article = document.querySelector("article").getBoundingClientRect();
  const outside = (node) => {
    const box = node.getBoundingClientRect();
    return box.right > article.right + 1 || box.left < article.left - 1;
  };
  const colour = (node, kind) => getComputedStyle(node)[kind].match(/[\\d.]+/g).map(Number);
  const ground = (node) => { const c = colour(node, "backgroundColor"); return c[3] === 0 || c[0] > 250; };
  const blocks = all("article pre, article .cell_output, article blockquote, article div.highlight");
  const sheets = all(".frames-view img").filter(seen);
  return {
    cut: html(all("article pre, article table, article figure, article .math, article p").filter(seen)
      .filter((node) => outside(node) || node.scrollWidth > node.clientWidth + 1 && node.matches("pre"))),
    closed: html(all("details.answer, details.solution").filter((node) =>
      [...node.querySelectorAll(":scope > :not(summary)")].some((child) => !seen(child))
      || !node.querySelector(":scope > p") || node.getBoundingClientRect().height < 40)),
    dark: html(all("article .figure-dark").filter(seen)),
    missing: html(all("article .figure-light").filter((node) => !seen(node))),
    frames: html(all(".frames-view").filter((view) => {
      const outer = view.getBoundingClientRect(), images = sheets.filter((image) => view.contains(image));
      if (images.length != 1) return true;
      const [image] = images, box = image.getBoundingClientRect(), style = getComputedStyle(image);
      const [width, height] = [parseFloat(style.width), parseFloat(style.height)];
      const inner = style.boxSizing == "border-box" ? 2 * parseFloat(style.paddingLeft) : 0;
      const shape = (width - inner) / (height - inner) / (image.naturalWidth / image.naturalHeight);
      return Math.abs(shape - 1) > 0.02 || box.left < outer.left - 1 || box.right > outer.right + 1
        || box.top < outer.top - 1 || box.bottom > outer.bottom + 1;
    })),
    grey: html(blocks.filter(seen).filter((node) => !ground(node)
      || getComputedStyle(node).boxShadow != "none" || colour(node, "color")[0] > 100)),
    pale: html(all("article p, article li, article h1, article h2, article pre span, article mjx-container")
      .filter(seen).filter((node) => colour(node, "color").slice(0, 3).some((value) => value > 120))),
    controls: html(all("button, input, select, dialog, nav, header, footer, details.hide").filter(seen)),
  };
}"""
FAULTS = {  # what is wrong -> style that brings it about
    "cut": "article pre { font-size: 1rem !important; white-space: pre !important }",
    "closed": "details::details-content { content-visibility: hidden !important }",
    "dark": "html[data-theme] .bd-article img.figure-dark { display: inline !important }",
    "missing": "html[data-theme] .bd-article img.figure-light { display: none !important }",
    "frames": ".bd-article .frames-view:not(.frames-all) img.figure-light { transform: scale(2) !important }",
    "grey": "html .bd-article pre { background: #eee !important }",
    "pale": ".bd-article p { color: #ddd !important }",
    "controls": "html .bd-article .frames-bar, html .bd-article .frames-bar button { display: block !important }",
}


@pytest.fixture(scope="module")
def paper(built_book):
    """-> opens a page of the book, dark, as it will be printed."""
    with chromium(color_scheme="dark", viewport={"width": PAPER, "height": 900}) as page:

        def show(path):
            page.emulate_media(media="screen", color_scheme="dark")
            page.goto(path.as_uri())
            page.wait_for_function("document.documentElement.dataset.theme == 'dark'")
            page.wait_for_function("async () => (await window.MathJax?.startup?.promise, true)")
            page.evaluate(
                "document.querySelectorAll('article img').forEach((image) => image.loading = 'eager')"
            )
            page.emulate_media(media="print", color_scheme="dark")
            page.wait_for_function(
                "[...document.querySelectorAll('article img')].every((image) => image.complete)"
            )
            return page

        yield show


def test_every_page_is_whole_on_paper(built_book, paper):
    wrong = {}
    for path in sorted(built_book.glob("book/*.html")):
        found = paper(path).evaluate(MEASURE)
        wrong |= {(path.name, what): nodes for what, nodes in found.items() if nodes}
    assert not wrong


def test_a_fault_on_paper_is_noticed(built_book, paper):
    page = paper(built_book / "book" / "when_the_picture_moves.html")
    assert page.evaluate("document.querySelectorAll('.frames-view').length") == 1
    for what, style in FAULTS.items():
        sheet = page.add_style_tag(content=style)
        assert page.evaluate(MEASURE)[what], what
        sheet.evaluate("(node) => node.remove()")
    assert not any(page.evaluate(MEASURE).values())
