"""What all tests share: threads that wait passively, the order of files, images to read."""

import fcntl
import os
import subprocess
import sys
from pathlib import Path

import pytest

# Before torch is loaded; processes and notebooks' kernels inherit it. Spinning threads fight over the cores.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

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
def built_book(tmp_path_factory) -> Path:
    """The folder of the book's pages, built without a warning, once for all processes of tests."""
    command = Path(sys.executable).with_name("jupyter-book")
    if not command.exists():
        pytest.skip("jupyter-book is not installed, so there are no pages to look at")
    base = tmp_path_factory.getbasetemp()
    base = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    out, pages = base / "book", base / "book" / "_build" / "html"
    with open(base / "book.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (out / "done").exists():
            arguments = [command, "build", Path(__file__).parent.parent, "--path-output", out]
            build = subprocess.run(arguments, capture_output=True, text=True)
            log = build.stdout + build.stderr
            assert build.returncode == 0 and "build succeeded." in log, log[-3000:]
            (out / "done").touch()
    return pages


@pytest.fixture(scope="session")
def image_folder(tmp_path_factory) -> Path:
    """Ninety-three small JPEGs in three classes, train and val; to be read only."""
    from helpers import draw_images  # not above: it loads torch

    return draw_images(tmp_path_factory.mktemp("images") / "folder")


@pytest.fixture(scope="session")
def tiny_imagenet(tmp_path_factory) -> Path:
    """Root of Tiny-ImageNet in miniature: two classes, eight and four images of 64 pixels each."""
    from helpers import draw_images

    root = tmp_path_factory.mktemp("tiny")
    draw_images(root / "tiny-imagenet-200", train=8, val=4, classes=2, sides=(64, 65))
    return root


@pytest.fixture(autouse=True)
def proven_anew():
    """What one test finds of a fast road is not for the log of another's run."""
    yield
    if module := sys.modules.get("cpvt.proven"):
        module.verdicts.clear()
