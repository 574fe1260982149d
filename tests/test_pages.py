"""The built book as a reader meets it: links, and every page in a browser, wide, dark and on a phone."""

from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urldefrag, urlsplit

import pytest

ROOT = Path(__file__).parent.parent
SIZES = {"phone": (390, "light"), "wide": (1300, "light"), "dark": (1300, "dark")}  # CSS pixels, theme
PATIENCE = 600_000  # ms, for a browser that hangs
KNOWN = "THEBE_JS_URL"  # the theme declares this constant twice


def chapters(html: Path) -> list[Path]:
    return sorted((html / "book").glob("*.html"))


class Page(HTMLParser):
    """Names that a page defines, what it points at, and its images without a description."""

    def __init__(self, path: Path):
        super().__init__()
        self.names, self.targets, self.undescribed = set(), [], []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attrs):
        found = dict(attrs)
        self.names |= {found[key] for key in ("id", "name") if found.get(key)}
        self.targets += [found[key] for key in ("href", "src") if found.get(key)]
        if tag == "img" and len(found.get("alt") or "") < 20:
            self.undescribed.append(found.get("src"))


def test_links_lead_somewhere_and_images_are_described(html):
    pages = {path: Page(path) for path in chapters(html)}
    assert len(pages) == len(list((ROOT / "book").glob("*.ipynb"))) + len(list((ROOT / "book").glob("*.md")))
    broken = []
    for path, page in pages.items():
        for target in page.targets:
            parts = urlsplit(target)
            if parts.scheme or parts.netloc:
                continue
            file = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            name = unquote(urldefrag(target).fragment)
            if not file.is_file() or (name and file in pages and name not in pages[file].names):
                broken.append(f"{path.name} -> {target}")
    assert not broken
    assert not {path.name: page.undescribed for path, page in pages.items() if page.undescribed}


SETTLE = """async () => {  // what follows the load event, or a change of size
  await window.MathJax?.startup?.promise;
  const images = [...document.querySelectorAll(".bd-article img")];
  for (const image of images) image.loading = "eager";
  await Promise.all(images.map((image) => image.decode().catch(() => 0)));
  await document.fonts.ready;
  for (const animation of document.getAnimations())
    if (animation.effect.getComputedTiming().endTime < Infinity) animation.finish();
}"""

LATE = f"new Promise((_, late) => setTimeout(late, {PATIENCE}, new Error('the page did not settle')))"

MEASURE = """() => {
  const all = (selector) => [...document.querySelectorAll(selector)];
  const html = (nodes) => nodes.slice(0, 5).map((node) => node.outerHTML.slice(0, 120));
  const seen = (node) => {
    const box = node.getBoundingClientRect();
    const inside = box.width > 0 && box.height > 0 && box.right > 0 && box.left < innerWidth;
    return inside && getComputedStyle(node).visibility == "visible";
  };
  const unmarked = all("a[href], button, input, summary, [tabindex='0']").filter(seen).filter((node) => {
    node.focus({focusVisible: true, preventScroll: true});
    const title = node.closest(".admonition.toggle")?.querySelector(".admonition-title") ?? node;
    const style = getComputedStyle(node), before = getComputedStyle(title, "::before");
    const marked = style.outlineStyle != "none" || style.boxShadow != "none" || before.outlineStyle != "none";
    return node == document.activeElement && !marked;
  });
  const root = document.documentElement, images = all(".bd-article img");
  return {
    theme: root.dataset.theme,
    focused: document.activeElement != document.body,
    unmarked: html(unmarked),
    searches: all(".search-button-field, .search-button").filter(seen).length,
    overflowing: root.scrollWidth <= root.clientWidth ? []
      : html(all("main *").filter((node) => node.getBoundingClientRect().right > root.clientWidth + 1)),
    broken: html(images.filter((image) => !image.naturalWidth)),
    dimmed: html(images.filter((image) => getComputedStyle(image).filter != "none")),
    unset: html(all(".math").filter((node) => !node.querySelector("mjx-container"))),
    wrong: html(all("mjx-merror")),
  };
}"""


@pytest.fixture(scope="module")
def reports(html, browser) -> dict[tuple[str, str], dict]:
    """(page, size) -> what the browser sees there; opened from the disk, as the README says, without a network."""
    found, heard = {}, []
    page = browser.new_page(offline=True)  # one for all chapters: their scripts are compiled once
    page.set_default_timeout(PATIENCE)
    page.on("request", lambda request: heard.append(("asked", request.url)))
    page.on("requestfailed", lambda request: heard.append(("failed", request.url)))
    page.on("pageerror", lambda error: heard.append(("thrown", str(error))))
    for path in chapters(html):
        heard.clear()
        for size, (width, theme) in SIZES.items():
            page.set_viewport_size({"width": width, "height": 900})
            page.emulate_media(color_scheme=theme)
            if size == "phone":
                page.goto(path.as_uri())
            page.wait_for_function(f"document.documentElement.dataset.theme == '{theme}'")
            page.evaluate(f"Promise.race([({SETTLE})(), {LATE}])")  # evaluate itself has no limit
            found[path.name, size] = page.evaluate(MEASURE) | {
                "outside": [url for kind, url in heard if kind == "asked" and url.startswith("http")],
                "failed": [url for kind, url in heard if kind == "failed"],
                "thrown": [error for kind, error in heard if kind == "thrown" and KNOWN not in error],
            }
    page.close()
    return found


def complaints(reports, *keys: str) -> dict:
    return {(*place, key): seen[key] for place, seen in reports.items() for key in keys if seen[key]}


def test_one_search_field(reports):
    assert {place: seen["searches"] for place, seen in reports.items() if seen["searches"] != 1} == {}


def test_nothing_overflows(reports):
    assert complaints(reports, "overflowing") == {}


def test_images_load_and_are_not_dimmed(reports):
    assert complaints(reports, "broken", "failed", "dimmed") == {}


def test_scripts_run_and_equations_are_set_without_a_network(reports):
    assert complaints(reports, "unset", "wrong", "outside", "thrown") == {}


def test_keyboard_focus_is_visible(reports):
    assert all(seen["focused"] for seen in reports.values())
    assert complaints(reports, "unmarked") == {}
