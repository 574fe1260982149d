"""What all tests share: threads that wait passively, the order of files, a folder of images, one browser."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

# Before torch is loaded; processes and notebooks' kernels inherit it. Spinning threads fight over the cores.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

ROOT = Path(__file__).parent.parent
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")

# Files of few tests that take long: begun first, or one of them runs alone at the end. After them the notebooks.
LONG = ("test_pages", "test_distributed", "test_resume", "test_compile_blocks")


def pytest_collection_modifyitems(items) -> None:
    """Long files first; tests marked slow only where CPVT_SLOW=1 asks for them; a loaded machine is no failure."""

    def rank(item) -> int:
        stem = item.path.stem
        return LONG.index(stem) if stem in LONG else len(LONG) + (item.path.suffix != ".ipynb")

    items.sort(key=rank)  # stable: files stay together and in their order
    for item in items:
        if item.get_closest_marker("slow") and os.environ.get("CPVT_SLOW") != "1":
            item.add_marker(pytest.mark.skip(reason="slow: set CPVT_SLOW=1"))
        if item.path.suffix == ".ipynb":
            item.output_timeout = 600  # nbval's own 5 s are too few for a kernel that waits for a core


@pytest.fixture(scope="session")
def image_folder(tmp_path_factory) -> Path:
    """Ninety-three small JPEGs in three classes, train and val; to be read only."""
    from helpers import draw_images  # not above: it loads torch

    return draw_images(tmp_path_factory.mktemp("images") / "folder")


@pytest.fixture(scope="session")
def clothes(tmp_path_factory) -> Path:
    """Root of Fashion-MNIST in miniature: squares on black, brighter by class, 40 and 20 images."""
    from helpers import draw_clothes

    return draw_clothes(tmp_path_factory.mktemp("clothes"))


@pytest.fixture(scope="session")
def tiny_imagenet(tmp_path_factory) -> Path:
    """Root of Tiny-ImageNet in miniature: two classes, eight and four images of 64 pixels each."""
    from helpers import draw_tiny_imagenet

    return draw_tiny_imagenet(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def html(tmp_path_factory) -> Path:
    """Folder of the book's built pages; built anew where `_build` is missing or older than its sources."""
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


@pytest.fixture(scope="session")
def browser():
    """The one browser of all tests that look at pages (playwright's sync API); every test opens its own pages."""
    if not CHROMIUM:
        pytest.skip("no chromium: `apt-get install chromium` (Debian) lets this test look at the pages")
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    flags = "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
    flags += " --disable-component-update --disable-sync --disable-dev-shm-usage"
    with sync_api.sync_playwright() as playwright:  # which brings --headless and a fresh profile
        launched = playwright.chromium.launch(executable_path=CHROMIUM, args=flags.split(), timeout=600_000)
        yield launched
        launched.close()
