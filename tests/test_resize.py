"""Crops are resized as Pillow and torchvision resize them; the Triton kernel computes what Pillow does."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import numpy
import pytest
import torch
from cpvt.data.resize import centre_resize, crop_resize
from encoded import picture
from PIL import Image
from torchvision.transforms import functional as transforms

from cpvt.errors import DataError

ROOT = Path(__file__).parent.parent
gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")

# Sides of images with their boxes (top, left, height, width): shrunk, enlarged, both, tiny, fractions, whole.
CASES = [
    ((90, 120), (0, 0, 90, 120)),
    ((90, 120), (13, 27, 60, 71)),
    ((90, 120), (80, 3, 7, 100)),
    ((64, 64), (32, 31, 1, 1)),
    ((1, 1), (0, 0, 1, 1)),
    ((5, 200), (1, 11, 3, 180)),
    ((90, 120), (12.6, 30.2, 61.7, 48.9)),
    ((40, 30), (3.4, 2.2, 0.5, 20.3)),
    ((200, 150), (0.2, 0.0, 199.8, 150.0)),
]


def noise(height, width, low=0, high=256, seed=0):
    generator = torch.Generator().manual_seed(1000 * height + width + seed)
    return torch.randint(low, high, (3, height, width), generator=generator, dtype=torch.uint8)


def cases(low=0, high=256):
    """Images of CASES as noise, which is hardest, or within `low` and `high`; boxes; flips."""
    images = [noise(*sides, low, high, seed=i) for i, (sides, _) in enumerate(CASES)]
    boxes = torch.tensor([box for _, box in CASES], dtype=torch.float64)
    return images, boxes, torch.arange(len(CASES)) % 3 == 1


def pil(image):
    return Image.fromarray(image.permute(1, 2, 0).numpy())


def tensor(image):
    return torch.from_numpy(numpy.array(image)).permute(2, 0, 1)


def apart(a, b):
    """Largest and mean difference in grey levels."""
    difference = (a.int() - b.int()).abs()
    return difference.max().item(), difference.float().mean().item()


@pytest.mark.parametrize("size", [(16, 16), (210, 190)])
def test_one_call_of_pillow_gives_the_same_where_nothing_overshoots(size):
    """From 12.3 on a call may filter columns first; on mild images that changes the rounding alone."""
    images, boxes, flip = cases(80, 176)
    ours = crop_resize(images, boxes, size, flip, "image")
    for image, (top, left, high, wide), mirrored, result in zip(
        images, boxes.tolist(), flip, ours, strict=True
    ):
        theirs = tensor(pil(image).resize(size[::-1], Image.BICUBIC, (left, top, left + wide, top + high)))
        worst, mean = apart(theirs.flip(-1) if mirrored else theirs, result)
        assert worst <= 1
        assert mean < 0.1 or size == (16, 16), "enlarging, every Pillow filters rows first"


def test_training_crops_first_and_then_resizes():
    images, boxes, _ = cases()
    for i in range(6):  # whole boxes
        top, left, height, width = boxes[i].long().tolist()
        crop = images[i][:, top : top + height, left : left + width]
        wide = pil(crop).resize((24, height), Image.BICUBIC)  # rows first, whatever Pillow prefers
        theirs = tensor(wide.resize((24, 16), Image.BICUBIC))
        assert apart(crop_resize(images[i : i + 1], boxes[i : i + 1], (16, 24))[0], theirs)[0] <= 1
    # What lies outside the box is not seen in training, and is in evaluation.
    image, box = noise(60, 60), torch.tensor([[20.0, 20.0, 20.0, 20.0]])
    other = image.clone()
    other[:, :20], other[:, 40:], other[:, :, :20], other[:, :, 40:] = 0, 255, 0, 255
    for bound in ("box", "image"):
        one, two = (crop_resize([i], box, (30, 30), bound=bound) for i in (image, other))
        assert torch.equal(one, two) == (bound == "box")


def test_the_same_size_changes_nothing_and_a_flip_mirrors():
    image, box = noise(31, 47), torch.tensor([[0.0, 0, 31, 47]])
    assert torch.equal(crop_resize([image], box, (31, 47))[0], image)
    assert torch.equal(crop_resize([image], box, (31, 47), torch.tensor([True]))[0], image.flip(-1))
    plain = torch.full((3, 50, 40), 37, dtype=torch.uint8)
    for size in [(7, 9), (90, 120)]:
        assert (crop_resize([plain], torch.tensor([[3.3, 4.1, 40.2, 30]]), size) == 37).all()


def test_any_layout_of_memory_and_one_tensor_are_taken():
    batch = torch.stack([noise(40, 50, seed=s) for s in range(3)])
    boxes = torch.tensor([[1, 2, 30, 40], [0, 0, 40, 50], [5.5, 6.5, 20, 20]])
    want = crop_resize(list(batch), boxes, (16, 20))
    assert torch.equal(crop_resize(batch, boxes, (16, 20)), want)
    last = [image.permute(1, 2, 0).contiguous().permute(2, 0, 1) for image in batch]
    assert torch.equal(crop_resize(last, boxes, (16, 20)), want)


@pytest.mark.parametrize("box", [(-1, 0, 5, 5), (0, 46, 5, 5), (0, 0, 0, 5), (0, 0, float("nan"), 5)])
def test_a_box_outside_its_image_is_refused(box):
    boxes = torch.tensor([(0, 0, 5, 5), box], dtype=torch.float64)
    with pytest.raises(DataError, match=r"image 1 of \(40, 50\) pixels"):
        crop_resize([noise(40, 50)] * 2, boxes, (8, 8))


# --------------------------------------------------------------------------- evaluation


def by_torchvision(image, size, crop_pct):
    """torchvision's Resize and CenterCrop of a PIL image."""
    short = transforms.resize(image, int(size / crop_pct), transforms.InterpolationMode.BICUBIC)
    return tensor(transforms.center_crop(short, [size, size]))


@pytest.mark.parametrize("size, crop_pct", [(48, 0.9), (33, 1.0)])
def test_the_centre_is_resize_and_centre_crop_in_one_step(size, crop_pct):
    for height, width in [(64, 64), (50, 67), (67, 50), (20, 31), (9, 100), (100, 9), (33, 33)]:
        image = noise(height, width, 80, 176)
        ours, theirs = centre_resize([image], size, crop_pct)[0], by_torchvision(pil(image), size, crop_pct)
        worst, mean = apart(ours, theirs)
        assert worst <= 1 and mean < 0.1, (height, width)
    # With black and white in the image, the order of the passes shows where the filter overshoots.
    image = picture(120, 90)
    ours, theirs = centre_resize([tensor(image)], size, crop_pct)[0], by_torchvision(image, size, crop_pct)
    assert apart(ours, theirs)[1] < 0.1


# --------------------------------------------------------------------------- Triton

INTERPRETED = """
import sys, torch
from cpvt.data.resize import plans
from cpvt.data.resize_triton import by_triton
images, boxes, flip, settings = torch.load(sys.argv[1])
sides = torch.tensor([image.shape[1:] for image in images], dtype=torch.float64)
crops = [by_triton(images, *plans(sides, boxes, size, bound), size, flip) for size, bound in settings]
torch.save(crops, sys.argv[1])
"""

COMPILED = """
import sys
import cpvt.data.loader
assert "cpvt.data.resize_triton" not in sys.modules, "imported where nothing needs it"
from triton import compile
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from cpvt.data.resize_triton import COLUMNS, ROWS, resample
for known in ({"ALONG_ROWS": True, "L": ROWS, "P": COLUMNS}, {"ALONG_ROWS": False, "L": COLUMNS, "P": ROWS}):
    known |= {"H": 224, "W": 224}
    types = {"table": "*i64", "work": "*i64", "buffer": "*u8", "out": "*u8"}
    types |= dict.fromkeys(known, "constexpr")
    aligned = {(i,): [["tt.divisibility", 16]] for i in range(4)}
    made = compile(ASTSource(resample, types, known, aligned), target=GPUTarget("cuda", 90, 32))
    assert ".target sm_90" in made.asm["ptx"] and len(made.asm["cubin"]) > 1000
    print(made.asm["ptx"].count("ld.global.v2.b32"), end=" ")
"""


def run(script, *arguments, **environment):
    """In a process of its own: Triton's interpreter is chosen when a kernel is defined."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", script, *map(str, arguments)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.split()


@triton
def test_the_triton_kernel_computes_what_pillow_computes(tmp_path):
    few, file = [1, 2, 3, 4, 6, 7], tmp_path / "crops.pt"
    images, boxes, flip = cases()
    batch = [images[i] for i in few], boxes[few], flip[few]
    settings = [((13, 24), "image"), ((20, 70), "box")]
    torch.save((*batch, settings), file)
    run(INTERPRETED, file, TRITON_INTERPRET="1")
    for (size, bound), crops in zip(settings, torch.load(file), strict=True):
        worst, mean = apart(crops, crop_resize(*batch[:2], size, batch[2], bound))
        assert worst <= 1 and mean < 0.02


@triton
def test_the_triton_kernel_compiles_for_hopper(tmp_path):
    _, along_columns = run(COMPILED, TRITON_CACHE_DIR=str(tmp_path))
    assert int(along_columns) == 3, "eight bytes at a time, in each of three channels"


@gpu
@pytest.mark.parametrize("size, bound", [((224, 224), "box"), ((57, 33), "image")])
def test_gpu_and_cpu_agree(size, bound):
    images, boxes, flip = cases()
    want = crop_resize(images, boxes, size, flip, bound)
    got = crop_resize([image.cuda() for image in images], boxes, size, flip, bound)
    worst, mean = apart(got.cpu(), want)
    assert got.is_cuda and worst <= 1 and mean < 0.02
