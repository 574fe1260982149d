"""The built book as a reader meets it: links, each page in a browser, wide, dark, on a phone, by file and http."""

import os
import re
import threading
from functools import partial
from html import unescape
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import nbformat
import pytest
from browser import chromium

ROOT = Path(__file__).parent.parent
SIZES = {"phone": (390, "light"), "wide": (1300, "light"), "dark": (1300, "dark")}  # CSS pixels, theme
SOUND = {"focused": True, "searches": 1}  # and nothing in any list
LARGEST = 20_000_000  # bytes of the site


@pytest.fixture(scope="module")
def chapters(built_book) -> list[Path]:
    """The front page and the book's pages."""
    return [built_book / "index.html", *sorted(built_book.glob("book/*.html"))]


@pytest.fixture(scope="module")
def pages(built_book, chapters) -> list[Path]:
    return [*chapters, built_book / "search.html"]


@pytest.fixture(scope="module")
def served(built_book):
    """The address of a server of the book on this machine; what is not there gets 404.html, as hosts do it."""

    class Handler(SimpleHTTPRequestHandler):
        error_message_format = (built_book / "404.html").read_text(encoding="utf-8").replace("%", "%%")

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=built_book))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()


def test_links_lead_somewhere_and_images_are_described(chapters):
    text = {path: path.read_text(encoding="utf-8") for path in chapters}
    names = {path: set(re.findall(r' (?:id|name)="([^"]+)"', page)) for path, page in text.items()}
    assert len(text) == 1 + len(
        [path for path in (ROOT / "book").iterdir() if path.suffix in (".ipynb", ".md")]
    )
    broken = []
    for path, page in text.items():
        assert (
            re.search(r"<title>[^<]{8,}</title>", page)
            and len(re.findall(r'<meta name="viewport"', page)) == 1
        )
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


def test_heads_say_what_a_page_is(built_book, chapters):
    said, titles = set(), set()
    for path in chapters:
        page = path.read_text(encoding="utf-8")
        assert "thebe" not in page.lower() and 'data-default-mode="auto"' in page, path.name
        assert page.count('<link rel="icon"') == 1 and 'rel="canonical"' not in page  # without an address
        title, words, picture = (
            re.search(pattern, page)[1]
            for pattern in (
                r"<title>(.*)</title>",
                r'<meta name="description" content="(.{80,})"',
                r'<meta property="og:image" content="(.*?)"',
            )
        )
        assert "minutes to read" not in words and "\\" not in words and (path.parent / picture).is_file()
        said.add(words)
        titles.add(title)
        figures = re.findall(r"<img [^>]*>", page[page.index("<article") :])
        late = ['loading="lazy"' in image for image in figures]
        assert late == [False] * len(figures[:2]) + [True] * len(figures[2:]), path.name  # light and dark
    # The front page stands in two places.
    assert len(said) == len(titles) == len(chapters) - 1
    assert "<title>Position in Vision Transformers</title>" in (built_book / "index.html").read_text()


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
    unsaid: html(all("mjx-container").filter((node) => !node.querySelector("mjx-assistive-mml math"))),
    stops: html(all("mjx-container").filter((node) => node.tabIndex >= 0)),
    unmeasured: html(images.filter((image) => !image.getAttribute("width") || !image.getAttribute("height"))),
    ids: all("[id]").map((node) => node.id).filter((id, i, ids) => ids.indexOf(id) !== i),
  };
}"""


def test_pages_are_whole_at_every_size(pages):
    """Opened from the disk, as the README says, without a network. A visible keyboard focus, one search field;
    nothing that overflows, is dimmed, broken or asked of the network; equations set, scripts without errors; no id
    twice, no image without its size."""
    wrong = {}
    with chromium() as page:  # one tab, so that scripts are compiled once
        heard = listen(page)
        for path in pages:
            heard.clear()
            for size, (width, theme) in SIZES.items():
                page.set_viewport_size({"width": width, "height": 900})
                page.emulate_media(color_scheme=theme)
                if size == "phone":
                    page.goto(path.as_uri())
                page.wait_for_function(f"document.documentElement.dataset.theme == '{theme}'")
                page.wait_for_function(SETTLE)  # which has a limit of time, as evaluate has not
                seen = page.evaluate(MEASURE) | {"heard": list(heard)}
                wrong |= {(path.name, size, k): v for k, v in seen.items() if v != SOUND.get(k, [])}
    assert not wrong


def listen(page, home: str = "file://") -> list[tuple[str, str]]:
    """-> what a page says on its console, throws, asks of others or does not get: to be empty."""
    heard: list[tuple[str, str]] = []
    own = (home, "data:", "blob:")
    page.on("request", lambda r: None if r.url.startswith(own) else heard.append(("asked", r.url)))
    # Aborted is what was still on its way when the page was left.
    page.on("requestfailed", lambda r: None if "ABORTED" in r.failure else heard.append(("failed", r.url)))
    page.on(
        "response", lambda r: heard.append(("failed", f"{r.status} {r.url}")) if r.status >= 400 else None
    )
    page.on("pageerror", lambda error: heard.append(("thrown", str(error))))
    page.on("console", lambda m: heard.append((m.type, m.text)) if m.type in ("error", "warning") else None)
    return heard


def test_a_server_serves_them_too(pages, built_book, served):
    wrong = {}
    with chromium(offline=False) as page:
        heard = listen(page, served)
        page.route(lambda url: not url.startswith(served), lambda route: route.abort())
        for path in pages:
            page.goto(f"{served}/{path.relative_to(built_book).as_posix()}")
            page.wait_for_function(SETTLE)
            if heard:
                wrong[path.name] = list(heard)
            heard.clear()
        page.goto(f"{served}/book/no/such/page.html")  # the page for lost readers, from any depth
        page.wait_for_function(SETTLE)
        assert [h for h in heard if "404" not in h[1]] == [] and page.title().startswith(
            "There is no such page"
        )
        page.get_by_role("link", name="front page").click()
        page.wait_for_url(f"{served}/index.html")
        page.goto(f"{served}/notebook/page.html")  # were the book there: only the name's end is that of book/
        search = page.get_by_role("link", name="search")
        assert search.evaluate("link => link.href") == f"{served}/notebook/search.html"
    assert not wrong


@pytest.mark.parametrize("how", ["file", "http"])
def test_search_finds_and_its_links_lead_there(built_book, served, how):
    with chromium(offline=how == "file") as page:
        heard = listen(page, served if how == "http" else "file://")
        page.goto((served if how == "http" else built_book.as_uri()) + "/search.html?q=padding")
        page.wait_for_function("() => /[0-9]/.test(document.querySelector('.search-summary')?.textContent)")
        links = page.locator("#search-results ul.search li > a")
        assert links.count() >= 3
        address = links.first.get_attribute("href")
        links.first.click()
        page.wait_for_function(SETTLE)
        assert page.url.split("?")[0].split("#")[0].endswith(address.split("?")[0].split("#")[0])
        assert "padding" in page.locator("article").text_content() and not heard


READY = """async () => {  // answers open, live views computed: what is hidden or pending is not what is judged
  for (const closed of document.querySelectorAll("details")) closed.open = true;
  document.querySelector(".live")?.scrollIntoView();
  return true;
}"""
COMPUTED = "() => !document.querySelector('.live') || document.querySelector('.live').ariaBusy === 'false'"
AXE = """async () => (await axe.run(document, { resultTypes: ["violations"], preload: false })).violations.flatMap(
  ({ id, nodes }) => nodes.map((node) => [id, node.html.slice(0, 120)]))"""


def test_axe_finds_nothing(pages, built_book):
    """The accessibility rules of axe-core; .ci/run brings it and says in AXE_CORE where it lies."""
    if not (axe := os.environ.get("AXE_CORE")):
        pytest.skip("AXE_CORE names no axe.min.js: `npm install axe-core` brings one")
    wrong = {}
    with chromium(viewport={"width": 1300, "height": 900}) as page:
        for path in [*pages, built_book / "404.html"]:
            page.goto(path.as_uri())
            page.wait_for_function(READY)
            page.wait_for_function(COMPUTED)
            page.evaluate(Path(axe).read_text(encoding="utf-8"))
            for theme in ("light", "dark"):
                page.emulate_media(color_scheme=theme, reduced_motion="reduce")
                page.wait_for_function(SETTLE)
                if found := page.evaluate(AXE):
                    wrong[path.name, theme] = found[:5]
        page.set_content("<html><body><img src='data:,'></body></html>")  # and it does find something
        page.evaluate(Path(axe).read_text(encoding="utf-8"))
        assert "image-alt" in {name for name, _ in page.evaluate(AXE)}
    assert not wrong


def test_the_site_is_small_and_holds_what_it_needs(built_book):
    files = [path for path in built_book.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < LARGEST
    assert not [path for path in files if path.suffix == ".map"]
    assert not [path for path in built_book.glob("_static/vendor/**/*") if path.suffix == ".ttf"]
    for source in ROOT.glob("book/*.ipynb"):  # the downloads, which say where a picture is left out
        text = (built_book / "_sources" / "book" / source.name).read_text(encoding="utf-8")
        nbformat.validate(nbformat.reads(text, as_version=4))
        pictures = source.read_text(encoding="utf-8").count('"image/png": ')
        assert '"image/png"' not in text and text.count("The picture is left out") == pictures
