"""What the theme and its companions leave undone, mended in the built pages: scripts that nobody uses, names of
buttons, sizes of images, a page for lost readers, and files that no page loads."""

import json
import re
import shutil
from html import escape
from pathlib import Path

from PIL import Image

# jupyter-book loads all of these on every page, and the book has no live cells, tabs or toggled boxes.
UNUSED = ("thebe", "THEBE", "toggle", "design-tabs", "sphinx-design")
# Below _static; no page loads them. MathJax comes with every way of setting formulas: the pages use one.
SPARE = ("**/*.map", "locales", "images", "*macros.html", "*-solid.svg", "file.png", "minus.png", "plus.png")
SPARE += ("sphinx-thebe*", "togglebutton*", "design-tabs*", "sphinx-design*")  # of UNUSED
SPARE += ("vendor/**/*.ttf",)  # each has a twin in woff2, which browsers take
MATHJAX = ("tex-chtml.js", "output/chtml/fonts/woff-v2")
LEFT_OUT = "[The picture is left out of this download. Run the cell to draw it.]"
# The search quotes the pages that it finds; a page from the disk may not fetch them.
QUOTE = (
    '<script>if (location.protocol === "file:") DOCUMENTATION_OPTIONS.SHOW_SEARCH_SUMMARY = false;</script>'
)


def drop_unused(app, pagename, templatename, context, doctree) -> None:
    def used(file) -> bool:
        return not any(word in f"{file.filename} {file.attributes.get('body', '')}" for word in UNUSED)

    for kind in ("script_files", "css_files"):
        context[kind] = [file for file in context[kind] if used(file)]


LOST = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8" />
<meta name="viewport" content="width=device-width, initial-scale=1" />
<title>There is no such page - {title}</title>
<style>
  :root {{ color-scheme: light dark; }}
  body {{ font: 1.125rem/1.6 system-ui, sans-serif; margin: 15vh auto; max-width: 34rem; padding: 0 1rem; }}
  a {{ color: inherit; }}
</style>
</head>
<body>
<main>
<h1>There is no such page</h1>
<p>The book has moved, or the address has a slip in it. Begin at the <a href="{root}index.html">front page</a>,
or <a href="{root}search.html">search</a>.</p>
</main>
<script>
// A server shows this page for any address: unless it was told where the book lies, that is above book/.
const root = {root!r} || location.pathname.replace(/\\/(book\\/.*|[^/]*)$/, "/");
for (const link of document.links) link.href = root + link.href.split("/").pop();
</script>
</body>
</html>
"""


def mend_pages(app, error) -> None:
    if error or app.builder.format != "html":
        return
    out = Path(app.outdir)
    sizes: dict[Path, tuple[int, int]] = {}
    for path in sorted(out.rglob("*.html")):
        if "_static" in path.parts:
            continue
        text = path.read_text(encoding="utf-8")
        mended = mend(text, path.parent, sizes)
        if mended != text:
            path.write_text(mended, encoding="utf-8")
    root = app.config.html_baseurl and app.config.html_baseurl.rstrip("/") + "/"
    (out / "404.html").write_text(
        LOST.format(title=escape(app.config.html_title), root=root), encoding="utf-8"
    )
    prune(out / "_static")
    for notebook in (out / "_sources").rglob("*.ipynb"):
        lighten(notebook)


def mend(page: str, folder: Path, sizes: dict) -> str:
    """The page's text without what is wrong in it; a second time it changes nothing."""
    first, *others = re.findall(r'\s*<meta name="viewport"[^>]*>', page) or [""]
    for other in set(others) - {first}:
        page = page.replace(other, "")
    head, found, rest = page.partition(first)
    page = head + found + (rest.replace(first, "") if first else rest)
    page = re.sub(r'\s*<script type="text/x-thebe-config">.*?</script>', "", page, flags=re.S)
    page = re.sub(r"(<title>)(.+) &#8212; \2(</title>)", r"\1\2\3", page)  # of the front page
    # The name of a control begins with the words on it, or voice control cannot find it.
    page = re.sub(r'(<summary) aria-label="Toggle hidden content"', r"\1", page)
    page = re.sub(
        r'(<button class="btn search-button-field[^>]*) title="Search" aria-label="Search"', r"\1", page
    )
    page = re.sub(r'(<i class="theme-switch [^>]*) title="[^"]*"', r'\1 aria-hidden="true"', page)
    # The head of a column without words is no head; lists of sources are plain paragraphs.
    page = page.replace("<th></th>", "<td></td>").replace('<th class="head"><p></p></th>', "<td></td>")
    page = page.replace(' role="doc-biblioentry"', "").replace(
        '<div role="list" class="citation-list">', '<div class="citation-list">'
    )
    # The bar at the side holds the logo as well as the links: all of it is one landmark.
    sidebar = '<div id="pst-primary-sidebar" class="bd-sidebar-primary bd-sidebar">'
    page = page.replace(sidebar, sidebar[:-1] + ' role="complementary" aria-label="The book">')
    if QUOTE not in page:
        page = re.sub(r'(<script src="[^"]*searchtools\.js)', QUOTE + r"\n\1", page, count=1)
    start = page.find("<article")
    return page[:start] + _measure(page[start:], folder, sizes) if start >= 0 else page


def _measure(article: str, folder: Path, sizes: dict) -> str:
    """Width and height, so that nothing jumps when an image arrives; and it arrives when the reader comes near."""
    count = 0

    def attributes(match: re.Match) -> str:
        nonlocal count
        tag, source = match[0], match[1]
        file = (folder / source).resolve()
        if " width=" in tag or source.startswith("data:") or file.suffix == ".svg" or not file.is_file():
            return tag
        if file not in sizes:
            with Image.open(file) as image:
                sizes[file] = image.size
        width, height = sizes[file]
        count += 1
        lazy = ' loading="lazy"' if count > 2 else ""  # the first figure has two, for light and dark
        return f'{tag[:-1].rstrip("/ ")} width="{width}" height="{height}"{lazy} />'

    return re.sub(r'<img [^>]*?src="([^"]+)"[^>]*>', attributes, article)


def prune(static: Path) -> None:
    mathjax = static / "mathjax"
    kept = [mathjax / name for name in MATHJAX]
    spare = [path for pattern in SPARE for path in static.glob(pattern)]
    spare += [
        p for p in mathjax.rglob("*") if p.is_file() and not any(p == k or k in p.parents for k in kept)
    ]
    for path in spare:
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    for folder in sorted((p for p in mathjax.rglob("*") if p.is_dir()), reverse=True):
        if not any(folder.iterdir()):
            folder.rmdir()


def lighten(notebook: Path) -> None:
    """A notebook to download leaves its pictures out: they are on the page, and running it draws them anew."""
    held = json.loads(notebook.read_text(encoding="utf-8"))
    for cell in held["cells"]:
        for output in cell.get("outputs", []):
            if output.get("data", {}).pop("image/png", None):
                output["data"]["text/plain"] = LEFT_OUT
    notebook.write_text(json.dumps(held, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")


def setup(app) -> dict:
    app.connect("html-page-context", drop_unused, priority=900)  # after those that add them
    app.connect("build-finished", mend_pages, priority=950)  # after the front page is written
    return {"parallel_read_safe": True, "parallel_write_safe": True}
