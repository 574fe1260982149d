"""The built book as a reader meets it: links, and every page in a browser, wide, dark and on a phone."""

import functools
import http.server
import json
import queue
import re
import shutil
import subprocess
import sys
import threading
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urldefrag, urlsplit

import pytest

ROOT = Path(__file__).parent.parent
SIZES = {"wide": 1300, "dark": 1300, "phone": 390}  # CSS pixels
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.fixture(scope="module")
def html(tmp_path_factory) -> Path:
    """Folder of the built pages; built anew where `_build` is missing or older than its sources."""
    built = ROOT / "_build" / "html"
    sources = [ROOT / "_config.yml", ROOT / "_toc.yml", *(p for p in ROOT.glob("book/**/*") if p.is_file())]
    newest = max(path.stat().st_mtime for path in sources)
    if (built / "searchindex.js").is_file() and (built / "searchindex.js").stat().st_mtime > newest:
        return built
    out = tmp_path_factory.mktemp("book")
    command = [Path(sys.executable).with_name("jupyter-book"), "build", ROOT, "--path-output", out]
    if not command[0].exists():
        pytest.skip("jupyter-book is not installed, so there are no pages to look at")
    build = subprocess.run(command, capture_output=True, text=True)
    log = build.stdout + build.stderr
    assert build.returncode == 0 and "build succeeded." in log, log[-3000:]
    return out / "_build" / "html"


def chapters(html: Path) -> list[Path]:
    return sorted((html / "book").glob("*.html"))


class Page(HTMLParser):
    """Names that a page defines, and what it points at."""

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


def test_links_lead_somewhere(html):
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
            if not file.is_file():
                broken.append(f"{path.name} -> {target}")
            elif name and file in pages and name not in pages[file].names:
                broken.append(f"{path.name} -> {target}")
    assert not broken


def test_every_picture_is_described(html):
    assert not {path.name: bad for path in chapters(html) if (bad := Page(path).undescribed)}


# The browser loads each page in a frame of the given width, measures it, and posts what it saw.
PROBE = """<!doctype html><body><script>
const pages = %s, sizes = %s;
const wait = (ms) => new Promise((done) => setTimeout(done, ms));
async function measure(page, size) {
  localStorage.setItem("mode", size == "dark" ? "dark" : "light");
  localStorage.setItem("theme", size == "dark" ? "dark" : "light");
  const frame = document.createElement("iframe");
  frame.style = `border: 0; width: ${sizes[size]}px; height: 900px`;
  const loaded = new Promise((done) => (frame.onload = done));
  frame.src = page;
  document.body.append(frame);
  await loaded;
  const view = frame.contentWindow, doc = view.document;
  for (let turn = 0; turn < 100; turn++) {
    await wait(50);
    if (view.MathJax?.startup?.promise) { await view.MathJax.startup.promise; break; }
    if (!doc.querySelector("script[src*=mathjax]")) break;
  }
  await wait(100);
  const seen = (node) => {
    const box = node.getBoundingClientRect(), style = view.getComputedStyle(node);
    const inside = box.width > 0 && box.height > 0 && box.right > 0 && box.left < sizes[size];
    return inside && style.visibility == "visible";
  };
  const images = [...doc.querySelectorAll(".bd-article img")];
  for (const image of images) image.loading = "eager";
  await Promise.all(images.map((image) => image.decode().catch(() => 0)));
  view.focus();
  const stops = doc.querySelectorAll("a[href], button, input, summary, [tabindex='0']");
  const unmarked = [...stops].filter((node) => {
    node.focus({focusVisible: true});
    const title = node.closest(".admonition.toggle")?.querySelector(".admonition-title") ?? node;
    const style = view.getComputedStyle(node), before = view.getComputedStyle(title, "::before");
    const marked = style.outlineStyle != "none" || style.boxShadow != "none" || before.outlineStyle != "none";
    return node == doc.activeElement && seen(node) && !marked;
  });
  const overflow = doc.documentElement.scrollWidth - doc.documentElement.clientWidth;
  const sticksOut = (node) => node.getBoundingClientRect().right > sizes[size] + 1;
  const wide = [...doc.querySelectorAll("main *")].filter(sticksOut).slice(0, 5);
  const fetched = view.performance.getEntriesByType("resource").map((entry) => entry.name);
  const report = {
    page, size, overflow,
    wide: overflow > 0 ? wide.map((node) => node.outerHTML.slice(0, 120)) : [],
    dark: doc.documentElement.dataset.theme == "dark",
    searches: [...doc.querySelectorAll(".search-button-field, .search-button")].filter(seen).length,
    broken: images.filter((image) => !image.naturalWidth).map((image) => image.src),
    dimmed: images.filter((image) => view.getComputedStyle(image).filter != "none").map((image) => image.src),
    unset: [...doc.querySelectorAll(".math")].filter((node) => !node.querySelector("mjx-container")).length,
    wrong: [...doc.querySelectorAll("mjx-merror")].map((node) => node.textContent),
    outside: fetched.filter((name) => name.startsWith("http") && !name.startsWith(location.origin)),
    unmarked: unmarked.slice(0, 5).map((node) => node.outerHTML.slice(0, 120)),
    focused: doc.activeElement != doc.body,
  };
  frame.remove();
  return report;
}
(async () => {
  const reports = [];
  for (const page of pages) for (const size in sizes) reports.push(await measure(page, size));
  await fetch("/report", {method: "POST", body: JSON.stringify(reports)});
})().catch((problem) => fetch("/report", {method: "POST", body: JSON.stringify({problem: String(problem)})}));
</script></body>"""


@pytest.fixture(scope="module")
def reports(html, tmp_path_factory) -> tuple[list[dict], list[str]]:
    """What a browser without a network saw of every page at every size, and which files it did not get."""
    if not CHROMIUM:
        pytest.skip("no chromium: `apt-get install chromium` (Debian) lets this test look at the pages")
    arrived, missing = queue.Queue(), []
    pages = ["/" + path.relative_to(html).as_posix() for path in chapters(html)]
    probe = (PROBE % (json.dumps(pages), json.dumps(SIZES))).encode()

    class Handler(http.server.SimpleHTTPRequestHandler):
        def do_GET(self):
            if self.path != "/probe":
                return super().do_GET()
            self.send_response(200)
            self.send_header("Content-Type", "text/html; charset=utf-8")
            self.end_headers()
            self.wfile.write(probe)

        def do_POST(self):
            arrived.put(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(204)
            self.end_headers()

        def send_error(self, code, *args, **kwargs):
            missing.append(f"{code} {self.path}")
            super().send_error(code, *args, **kwargs)

        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=html))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    options = "--headless --no-sandbox --disable-gpu --no-first-run --disable-background-networking".split()
    options += [
        "--disable-dev-shm-usage",
        "--disable-component-update",
        "--disable-sync",
        "--window-size=1400,1000",
    ]
    options += ["--host-resolver-rules=MAP * ~NOTFOUND , EXCLUDE 127.0.0.1"]
    profile = tmp_path_factory.mktemp("profile")
    with open(profile / "chromium.log", "w") as log:
        browser = subprocess.Popen(
            [CHROMIUM, *options, f"--user-data-dir={profile}", f"http://127.0.0.1:{server.server_port}/probe"]
            + ["--remote-debugging-port=0"],  # keeps a headless browser open until it is told to go
            stdout=log,
            stderr=log,
        )
        try:
            found = arrived.get(timeout=120)
        except queue.Empty:
            pytest.fail("chromium reported nothing: " + (profile / "chromium.log").read_text()[-2000:])
        finally:
            browser.terminate()
            browser.wait(timeout=30)
            server.shutdown()
    assert isinstance(found, list), found
    assert len(found) == len(pages) * len(SIZES)
    return found, [line for line in missing if "favicon" not in line]


def complaints(reports, key: str) -> dict:
    return {f"{r['page']} {r['size']}": r[key] for r in reports[0] if r[key]}


def test_one_search_field(reports):
    assert {f"{r['page']} {r['size']}": r["searches"] for r in reports[0] if r["searches"] != 1} == {}


def test_nothing_overflows(reports):
    assert {f"{r['page']} {r['size']}": r["wide"] for r in reports[0] if r["overflow"] > 0} == {}


def test_pictures_load_and_are_not_dimmed(reports):
    assert complaints(reports, "broken") == {} and reports[1] == []
    assert {r["size"] for r in reports[0] if r["dark"]} == {"dark"}
    assert complaints(reports, "dimmed") == {}


def test_equations_are_set_without_a_network(reports):
    assert complaints(reports, "unset") == {} and complaints(reports, "wrong") == {}
    assert complaints(reports, "outside") == {}


def test_keyboard_focus_is_visible(reports):
    assert all(r["focused"] for r in reports[0])
    assert complaints(reports, "unmarked") == {}


def test_pages_name_no_foreign_script(html):
    for path in chapters(html):
        scripts = re.findall(
            r"<(?:script|link)[^>]*(?:src|href)=\"(https?:[^\"]*)", path.read_text(encoding="utf-8")
        )
        assert not scripts, (path.name, scripts)
