"""The built book as a reader meets it: links, and every page in a browser, wide, dark and on a phone."""

import re
import shutil
import subprocess
import sys
from html import unescape
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

ROOT = Path(__file__).parent.parent
SIZES = {"phone": (390, "light"), "wide": (1300, "light"), "dark": (1300, "dark")}  # CSS pixels, theme
PATIENCE = 600_000  # ms, for a browser that hangs
SOUND = {"focused": True, "searches": 1}  # and nothing in any list
KNOWN = "THEBE_JS_URL"  # the theme declares this constant twice


@pytest.fixture(scope="module")
def chapters(tmp_path_factory) -> list[Path]:
    """The front page and the book's pages, built without a warning."""
    out = tmp_path_factory.mktemp("book")
    command = [Path(sys.executable).with_name("jupyter-book"), "build", ROOT, "--path-output", out]
    if not command[0].exists():
        pytest.skip("jupyter-book is not installed, so there are no pages to look at")
    build = subprocess.run(command, capture_output=True, text=True)
    log = build.stdout + build.stderr
    assert build.returncode == 0 and "build succeeded." in log, log[-3000:]
    return [out / "_build" / "html" / "index.html", *sorted(out.glob("_build/html/book/*.html"))]


def test_links_lead_somewhere_and_images_are_described(chapters):
    text = {path: path.read_text(encoding="utf-8") for path in chapters}
    names = {path: set(re.findall(r' (?:id|name)="([^"]+)"', page)) for path, page in text.items()}
    assert len(text) == 1 + len(
        [path for path in (ROOT / "book").iterdir() if path.suffix in (".ipynb", ".md")]
    )
    broken = []
    for path, page in text.items():
        for target in re.findall(r'<[^<>]* (?:href|src)="([^"]+)"', page):
            parts = urlsplit(unescape(target))
            file = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            name = unquote(parts.fragment)
            here = file.is_file() and (not name or file not in names or name in names[file])
            broken += [f"{path.name} -> {target}"] if not (here or parts.scheme or parts.netloc) else []
        for image in re.findall(r"<img[^>]*>", page):
            said, source = (re.search(rf' {key}="([^"]*)"', image) for key in ("alt", "src"))
            # For want of words, Sphinx says the file's name.
            assert said and len(said[1]) >= 20 and said[1] != source[1], f"{path.name}: {image}"
    assert not broken


SETTLE = """async () => {  // what follows the load event, or a change of size
  await window.MathJax?.startup?.promise;
  const images = [...document.querySelectorAll(".bd-article img")];
  for (const image of images) image.loading = "eager";
  await Promise.all(images.map((image) => image.decode().catch(() => 0)));
  await document.fonts.ready;
  for (const animation of document.getAnimations())
    if (animation.effect.getComputedTiming().endTime < Infinity) animation.finish();
  return true;
}"""

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
    focused: document.activeElement != document.body,
    unmarked: html(unmarked),
    searches: all(".search-button-field, .search-button").filter(seen).length,
    overflowing: root.scrollWidth <= root.clientWidth ? []
      : html(all("main *").filter((node) => node.getBoundingClientRect().right > root.clientWidth + 1)),
    broken: html(images.filter((image) => !image.naturalWidth)),
    dimmed: html(images.filter(seen).filter((image) => getComputedStyle(image).filter != "none")),
    twice: html(images.filter(seen).filter((image) => image.matches(".figure-light") ==
      (root.dataset.theme == "dark") && image.matches(".figure-light, .figure-dark"))),
    unset: html(all(".math").filter((node) => !node.querySelector("mjx-container"))),
    wrong: html(all("mjx-merror")),
  };
}"""


def test_pages_are_whole_at_every_size(chapters):
    """Opened from the disk, as the README says, without a network. A visible keyboard focus, one search field;
    nothing that overflows, is dimmed, broken or asked of the network; equations set, scripts without errors."""
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if not chromium:
        pytest.skip("no chromium: `apt-get install chromium` (Debian) lets this test look at the pages")
    flags = "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
    flags += " --disable-component-update --disable-sync --disable-dev-shm-usage"
    with sync_api.sync_playwright() as playwright:  # which brings --headless and a fresh profile
        browser = playwright.chromium.launch(executable_path=chromium, args=flags.split(), timeout=PATIENCE)
        wrong = look(browser.new_page(offline=True), chapters)
        browser.close()
    assert not wrong


def look(page, chapters):
    """-> {(page, size, what): found} for all that should not be; one tab, so that scripts are compiled once."""
    wrong, heard = {}, []
    page.set_default_timeout(PATIENCE)
    page.on("request", lambda request: heard.append(("asked", request.url)))
    page.on("requestfailed", lambda request: heard.append(("failed", request.url)))
    page.on("pageerror", lambda error: heard.append(("thrown", str(error))))
    for path in chapters:
        heard.clear()
        for size, (width, theme) in SIZES.items():
            page.set_viewport_size({"width": width, "height": 900})
            page.emulate_media(color_scheme=theme)
            if size == "phone":
                page.goto(path.as_uri())
            page.wait_for_function(f"document.documentElement.dataset.theme == '{theme}'")
            page.wait_for_function(SETTLE)  # which has a limit of time, as evaluate has not
            seen = page.evaluate(MEASURE)
            news = ((k, v) for k, v in heard if KNOWN not in v)
            seen["heard"] = [(k, v) for k, v in news if k != "asked" or v.startswith("http")]
            wrong |= {(path.name, size, k): v for k, v in seen.items() if v != SOUND.get(k, [])}
    return wrong
