"""ImageNet in small: three classes, twenty-two noisy pictures, in each of the layouts that people have."""

import io
import tarfile
from pathlib import Path

import numpy
import pytest
from PIL import Image
from scipy.io import savemat

from cpvt.data import sources
from cpvt.data.pack import pack
from cpvt.data.sources import DEVKIT, KAGGLE, MAPPING, SOLUTION, TRAIN, VAL

# In the devkit's numbering the order is another one, as it is in ImageNet's.
NUMBERS = {1: "n00000003", 2: "n00000001", 3: "n00000002"}
CLASSES = tuple(sorted(NUMBERS.values()))
TRUTH = [2, 1, 1, 3]  # numbers of validation images 1 to 4
TRAIN_IMAGES, VAL_IMAGES = 18, 4


def picture(seed, width=40, height=30, mode="RGB"):
    noise = numpy.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=numpy.uint8)
    return Image.fromarray(noise).convert(mode)


def encoded(image, kind="JPEG", **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def train_images():
    return {
        (wnid, f"{wnid}_{i}.JPEG"): encoded(picture(6 * c + i))
        for c, wnid in enumerate(CLASSES)
        for i in range(6)
    }


def val_images():
    names = [f"ILSVRC2012_val_{i:08}.JPEG" for i in range(1, VAL_IMAGES + 1)]
    return {
        (NUMBERS[number], name): encoded(picture(100 + i))
        for i, (number, name) in enumerate(zip(TRUTH, names, strict=True))
    }


def put(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


def tar(members, mode="w", **kinds):
    """A tar of (name, bytes) in memory; `kinds` maps a name to the type of its entry."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode=mode) as archive:
        for name, content in members:
            entry = tarfile.TarInfo(name)
            entry.type = kinds.get(name, tarfile.REGTYPE)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    return file.getvalue()


def devkit():
    fields = ["ILSVRC2012_ID", "WNID", "words", "gloss", "num_children"]
    rows = [(n, wnid, "word, word", "gloss", 0) for n, wnid in NUMBERS.items()]
    rows.append((4, "n00000009", "more general", "gloss", 3))  # above the leaves, and no class
    synsets = numpy.array(rows, dtype=[(name, object) for name in fields])
    meta = io.BytesIO()
    savemat(meta, {"synsets": synsets})
    truth = "".join(f"{number}\n" for number in TRUTH).encode()
    folder = DEVKIT.removesuffix(".tar.gz")
    files = [(f"{folder}/{sources.META}", meta.getvalue()), (f"{folder}/{sources.TRUTH}", truth)]
    return tar(files, "w:gz")


def folders(path):
    for split, images in (("train", train_images()), ("val", val_images())):
        for (wnid, name), content in images.items():
            put(path / split / wnid / name, content)


def archives(path):
    by_class = {wnid: [] for wnid in CLASSES}
    for (wnid, name), content in train_images().items():
        by_class[wnid].append((name, content))
    put(path / TRAIN, tar([(f"{wnid}.tar", tar(members)) for wnid, members in by_class.items()]))
    put(path / VAL, tar([(name, content) for (_, name), content in reversed(val_images().items())]))
    put(path / DEVKIT, devkit())


def kaggle(path):
    for (wnid, name), content in train_images().items():
        put(path / KAGGLE / "train" / wnid / name, content)
    lines = ["ImageId,PredictionString"]
    for (wnid, name), content in reversed(val_images().items()):
        put(path / KAGGLE / "val" / name, content)
        lines.append(f"{name.removesuffix('.JPEG')},{wnid} 1 2 3 4 {wnid} 5 6 7 8 ")
    put(path / SOLUTION, "\n".join(lines).encode())
    put(path / MAPPING, "".join(f"{wnid} a word, another\n" for wnid in CLASSES).encode())


LAYOUTS = {"folders": folders, "archives": archives, "kaggle": kaggle}


def rotated():
    exif = Image.Exif()
    exif[0x0112] = 6
    return exif.tobytes()


def run(source, out, *splits, **options):
    said = []
    reports = pack(source, out, splits or ("val", "train"), report=said.append, **{"workers": 1, **options})
    return reports, "\n".join(said)


def refusal(call, *args, **kwargs):
    with pytest.raises(ValueError) as error:
        call(*args, **kwargs)
    assert "\n" not in str(error.value)
    return str(error.value)


def refused(report):
    return {Path(name).name: reason for name, reason in report.about["refused"]}
