"""What all tests share: threads that wait passively, the order of files, images to read."""

import os
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


@pytest.fixture(scope="session")
def clothes(tmp_path_factory) -> Path:
    """Root of Fashion-MNIST in miniature: squares on black, brighter by class, 40 and 20 images."""
    import numpy

    rng, root = numpy.random.default_rng(0), tmp_path_factory.mktemp("clothes")
    (root / "FashionMNIST" / "raw").mkdir(parents=True)
    for split, count in (("train", 40), ("t10k", 20)):
        labels = numpy.arange(count, dtype="uint8") % 10
        images = numpy.zeros((count, 28, 28), "uint8")
        images[:, 6:22, 6:22] = 20 + 22 * labels[:, None, None] + rng.integers(0, 10, (count, 16, 16))
        for kind, array in (("images", images), ("labels", labels)):
            head = bytes((0, 0, 8, array.ndim)) + b"".join(n.to_bytes(4, "big") for n in array.shape)
            file = root / "FashionMNIST" / "raw" / f"{split}-{kind}-idx{array.ndim}-ubyte"
            file.write_bytes(head + array.tobytes())
    return root
