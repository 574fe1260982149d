"""ImageNet in small: three classes, twenty-two images, in each of the layouts that people have."""

import hashlib
import io
import tarfile

import numpy
from encoded import encoded, picture, put
from scipy.io import savemat
from torchvision.datasets import imagenet

from cpvt.data.pack import ARCHIVES, DEVKIT, pack

# In the devkit's numbering the order is another one, as it is in ImageNet's.
NUMBERS = {1: "n00000003", 2: "n00000001", 3: "n00000002"}
CLASSES = tuple(sorted(NUMBERS.values()))
TRUTH = [2, 1, 1, 3]  # numbers of validation images 1 to 4

names = [(wnid, f"{wnid}_{i}.JPEG") for wnid in CLASSES for i in range(6)]
TRAIN = {name: encoded(picture(30, 40, seed=i)) for i, name in enumerate(names)}
names = [(NUMBERS[number], f"ILSVRC2012_val_{i:08}.JPEG") for i, number in enumerate(TRUTH, start=1)]
VAL = {name: encoded(picture(30, 40, seed=101 + i)) for i, name in enumerate(names)}
SPLITS = {"train": TRAIN, "val": VAL}


def tar(members, mode="w"):
    """A tar of (name, bytes) in memory."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode=mode) as archive:
        for name, content in members:
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    return file.getvalue()


def devkit():
    fields = ["ILSVRC2012_ID", "WNID", "words", "gloss", "num_children"]
    rows = [(n, wnid, "word, word", "gloss", 0) for n, wnid in NUMBERS.items()]
    rows.append((4, "n00000009", "more general", "gloss", 3))  # above the leaves, and no class
    meta, truth = io.BytesIO(), "".join(f"{number}\n" for number in TRUTH).encode()
    savemat(meta, {"synsets": numpy.array(rows, dtype=[(name, object) for name in fields])})
    folder = DEVKIT.removesuffix(".tar.gz") + "/data"
    files = [("meta.mat", meta.getvalue()), ("ILSVRC2012_validation_ground_truth.txt", truth)]
    return tar([(f"{folder}/{name}", content) for name, content in files], "w:gz")


def folders(path, monkeypatch=None):
    for split, images in SPLITS.items():
        for (wnid, name), content in images.items():
            put(path / split / wnid / name, content)


def archives(path, monkeypatch, train=None):
    """`train`: other members of the archive of training images. torchvision is told the MD5 of all."""
    by_class = {wnid: [(name, data) for (w, name), data in TRAIN.items() if w == wnid] for wnid in CLASSES}
    train = train or [(f"{wnid}.tar", tar(members)) for wnid, members in by_class.items()]
    val = [(name, content) for (_, name), content in reversed(VAL.items())]
    files = {"train": (ARCHIVES["train"], tar(train)), "val": (ARCHIVES["val"], tar(val))}
    for split, (name, content) in (files | {"devkit": (DEVKIT, devkit())}).items():
        put(path / name, content)
        monkeypatch.setitem(imagenet.ARCHIVE_META, split, (name, hashlib.md5(content).hexdigest()))


LAYOUTS = {"folders": folders, "archives": archives}


def run(source, out, *splits, **options):
    """Packs -> all that was reported."""
    said = []
    pack(source, out, splits or ("val", "train"), report=said.append, **{"workers": 1, **options})
    return "\n".join(said)
