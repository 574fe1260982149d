"""What the pages need beyond the theme: figures for the dark, a front page that is a page, words for previews.

A figure is drawn once, dark on white, as any notebook shows it. For dark pages it gets a twin here, with lightness
turned round and hues kept; photographs and maps in it, which the file names (`cpvt.lab.styles.save_whole`), stay.
"""

import json
import math
import posixpath
import re
from html import escape
from pathlib import Path

import numpy
from docutils import nodes
from PIL import Image
from sphinx.transforms.post_transforms import SphinxPostTransform

DARK_GROUND = 18  # of 255: the theme's background in the dark, #121212
SITE = "Position in Vision Transformers"


def dark_twin(source: Path, target: Path) -> None:
    """Writes the figure for dark pages beside the one for light ones."""
    with Image.open(source) as image:
        boxes = json.loads(image.info.get("images", "[]"))
        light = numpy.asarray(image.convert("RGB")).astype(numpy.int16)
    span = light.max(2, keepdims=True) + light.min(2, keepdims=True)
    turned = light + 255 - span  # the lightness of HLS turned round
    dark = DARK_GROUND + turned * (255 - DARK_GROUND) // 255
    height, width = light.shape[:2]
    for left, top, right, bottom in boxes:
        rows = slice(math.floor(top * height), math.ceil(bottom * height))
        columns = slice(math.floor(left * width), math.ceil(right * width))
        dark[rows, columns] = light[rows, columns]
    Image.fromarray(dark.astype(numpy.uint8)).save(target, lossless=True)


class PageFigures(SphinxPostTransform):
    """In pages, a figure becomes two, for light and dark; both without loss in half the bytes."""

    default_priority = 900
    formats = ("html",)

    def run(self, **settings) -> None:
        for image in list(self.document.findall(nodes.image)):
            source = Path(self.env.srcdir) / image["uri"].lstrip("/")
            if not image["uri"].endswith(".png") or "://" in image["uri"] or not source.exists():
                continue
            light, dark = (source.with_name(f"{source.stem}{word}.webp") for word in ("", "-dark"))
            with Image.open(source) as figure:
                figure.convert("RGB").save(light, lossless=True)
            dark_twin(source, dark)
            twin = image.deepcopy()
            for node, file, word in ((image, light, "light"), (twin, dark, "dark")):
                node["uri"] = posixpath.join(posixpath.dirname(node["uri"]), file.name)
                node["candidates"] = {"*": node["uri"]}
                node["classes"] = [*node["classes"], f"figure-{word}"]
                self.env.images.add_file(self.env.docname, node["uri"])
            twin["classes"].append("dark-light")  # the theme leaves such images as they are
            image.parent.insert(image.parent.index(image) + 1, twin)


def keep_together(app, doctree) -> None:
    """No line ends between a number and its per cent, or within 8 × 8 or ± 0.9."""
    for text in list(doctree.findall(nodes.Text)):
        if isinstance(text.parent, nodes.literal | nodes.literal_block | nodes.raw):
            continue
        whole = re.sub(r"(?<=\d) (?=[%×±])|(?<=[×±]) (?=\d)", "\u00a0", text)
        if whole != text:
            text.parent.replace(text, nodes.Text(whole))


def add_description(app, pagename, templatename, context, doctree) -> None:
    """What a search engine or a preview shows of a page: its first paragraph, and one picture for all."""
    if doctree is None:
        return
    said = (
        p.astext() for p in doctree.findall(nodes.paragraph) if not isinstance(p.next_node(), nodes.emphasis)
    )
    said = next(
        (text for text in said if len(text) > 80), SITE
    )  # not the line of reading time, which is emphasised
    said = re.sub(r"\\[a-z]+ ?", "", said)  # commands of formulas
    said = re.sub(r"\s+", " ", said)
    said = said if len(said) <= 200 else said[:197].rsplit(" ", 1)[0] + " ..."
    title = re.sub(r"<[^>]*>", "", context.get("title") or SITE)
    picture, base = "_static/idea.png", app.config.html_baseurl
    picture = f"{base.rstrip('/')}/{picture}" if base else context["pathto"](picture, 1)
    tags = {"og:title": title, "og:description": said, "og:type": "article", "og:site_name": SITE}
    tags |= {"og:image": picture, "twitter:card": "summary_large_image"}
    lines = [
        f'<meta {"property" if key.startswith("og:") else "name"}="{key}" content="{escape(value)}" />'
        for key, value in ({"description": said} | tags).items()
    ]
    context["metatags"] = "\n".join([context.get("metatags", ""), *lines])


def write_front_page(app, error) -> None:
    """index.html: the root page itself, with its links as seen from there, in place of a redirect."""
    if error or app.builder.format != "html":
        return
    root = app.config.root_doc
    folder, out = posixpath.dirname(root), Path(app.outdir)
    page = (out / f"{root}.html").read_text(encoding="utf-8")

    def seen_from_above(match: re.Match) -> str:
        name, target = match.groups()
        if not target or target.startswith("#") or re.match(r"[a-z]+:", target):
            return match[0]
        path = posixpath.normpath(posixpath.join(folder, target))
        return f'{name}="{path}{"/" if target.endswith("/") and path != "." else ""}"'

    page = re.sub(r'\b(href|src|data-content_root|action)="([^"]*)"', seen_from_above, page)
    page = page.replace('content="../', 'content="')  # the preview's picture
    page = page.replace('data-content_root="."', 'data-content_root="./"')
    (out / "index.html").write_text(page, encoding="utf-8")


def setup(app) -> dict:
    app.add_post_transform(PageFigures)
    app.connect("doctree-read", keep_together)
    app.connect("html-page-context", add_description)
    app.connect("build-finished", write_front_page, priority=900)  # after the redirect that it replaces
    return {"parallel_read_safe": True, "parallel_write_safe": True}
