"""ImageNet as people have it becomes shards: three layouts, odd and broken images, nothing half done."""

import io
import multiprocessing
import os
import signal
import sys
import time
from pathlib import Path

import pytest
from PIL import Image
from small_imagenet import (
    CLASSES,
    LAYOUTS,
    NUMBERS,
    TRAIN_IMAGES,
    TRUTH,
    VAL_IMAGES,
    archives,
    encoded,
    folders,
    kaggle,
    picture,
    put,
    refusal,
    refused,
    rotated,
    run,
    tar,
    train_images,
    val_images,
)
from torchvision.transforms.v2 import functional as transforms

from cpvt.data import pack as module
from cpvt.data import shards
from cpvt.data.datasets import Shards, open_dataset
from cpvt.data.examine import Shrink
from cpvt.data.pack import pack
from cpvt.data.sources import DEVKIT, KAGGLE, MAPPING, SOLUTION, TRAIN, VAL
from cpvt.errors import DataError


@pytest.fixture(params=LAYOUTS)
def layout(request, tmp_path):
    LAYOUTS[request.param](tmp_path / "source")
    return tmp_path / "source"


@pytest.fixture
def folder(tmp_path):
    folders(tmp_path / "source")
    return tmp_path / "source"


@pytest.fixture
def archive(tmp_path):
    archives(tmp_path / "source")
    return tmp_path / "source"


# The layouts


def test_each_layout_gives_every_image_its_class(layout, tmp_path):
    reports, said = run(layout, tmp_path / "out", expect="any")
    assert said.startswith(f"{layout}: ") and "18 images of 3 classes" in said
    for split, images in (("train", train_images()), ("val", val_images())):
        data = open_dataset(tmp_path / "out", split)
        assert data.classes == CLASSES and data.split == split
        found = {(data.key(i), data.classes[data.labels[i]]): data.read(i) for i in range(len(data))}
        assert found == {
            (f"{wnid}/{name.removesuffix('.JPEG')}", wnid): content
            for (wnid, name), content in images.items()
        }
    assert not any(report.about["refused"] for report in reports)


def test_all_layouts_give_the_same_shards(tmp_path):
    packed = {}
    for name, make in LAYOUTS.items():
        make(tmp_path / name)
        run(tmp_path / name, tmp_path / "out" / name, expect="any")
        for split in ("train", "val"):
            packed[name, split] = (tmp_path / "out" / name / split / "000000.tar").read_bytes()
    assert len({packed[name, "train"] for name in LAYOUTS}) == 1
    assert packed["archives", "val"] == packed["kaggle", "val"]  # a folder of classes goes class by class


def test_packing_again_by_more_processes_gives_the_same_bytes(folder, tmp_path):
    for out, workers in (("a", 1), ("b", 3)):
        run(folder, tmp_path / out, "train", shrink=Shrink(16), workers=workers, shard_mb=1)
    first, again = (
        {p.name: p.read_bytes() for p in (tmp_path / out / "train").iterdir()} for out in ("a", "b")
    )
    assert first == again


def test_training_images_are_mixed_and_validation_images_are_not(archive, tmp_path):
    run(archive, tmp_path / "out", expect="any")
    train, val = Shards(tmp_path / "out" / "train"), Shards(tmp_path / "out" / "val")
    assert set(train.labels[:6].tolist()) == {0, 1, 2}  # class by class they would all be of class 0
    assert [val.key(i)[-1] for i in range(4)] == ["1", "2", "3", "4"]
    assert val.labels.tolist() == [CLASSES.index(NUMBERS[number]) for number in TRUTH]


def test_tiny_imagenets_own_validation_list_is_read(folder, tmp_path):
    for path in sorted((folder / "val").rglob("*.JPEG")):
        put(folder / "val" / "images" / path.name, path.read_bytes())
        path.unlink()
    for wnid in CLASSES:
        (folder / "val" / wnid).rmdir()
    rows = "".join(f"{name}\t{wnid}\t0\t0\t9\t9\n" for wnid, name in val_images())
    put(folder / "val" / "val_annotations.txt", rows.encode())
    run(folder, tmp_path / "out", "val")
    data = Shards(tmp_path / "out" / "val")
    assert {data.read(i): data.classes[data.labels[i]] for i in range(4)} == {
        content: wnid for (wnid, _), content in val_images().items()
    }


def test_what_is_missing_is_named(tmp_path):
    message = refusal(run, tmp_path / "none", tmp_path / "out")
    assert "no folder" in message and TRAIN in message and KAGGLE in message and "train / val" in message
    put(tmp_path / "odd" / "photo.jpg", b"")
    assert "has photo.jpg, expected" in refusal(run, tmp_path / "odd", tmp_path / "out")
    for make, missing in ((archives, (VAL, DEVKIT, TRAIN)), (kaggle, (MAPPING, SOLUTION))):
        make(tmp_path / make.__name__)
        for name in missing:
            hidden = (tmp_path / make.__name__ / name).rename(tmp_path / "hidden")
            if name == TRAIN:
                assert f"lacks {name}" in refusal(run, tmp_path / make.__name__, tmp_path / "out")
            else:
                assert f"lacks {name}" in refusal(run, tmp_path / make.__name__, tmp_path / "out", "val")
            hidden.rename(tmp_path / make.__name__ / name)
    folders(tmp_path / "half")
    (tmp_path / "half" / "val").rename(tmp_path / "elsewhere")
    assert "lacks val" in refusal(run, tmp_path / "half", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_training_archives_do_without_the_devkit(archive, tmp_path):
    (archive / DEVKIT).unlink()
    run(archive, tmp_path / "out", "train", expect="any")
    assert Shards(tmp_path / "out" / "train").classes == CLASSES


def test_without_scipy_one_line_says_what_to_install(archive, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy.io", None)
    assert "needs scipy: pip install scipy" in refusal(run, archive, tmp_path / "out", "val")


def test_a_devkit_that_is_none_is_named(archive, tmp_path):
    put(archive / DEVKIT, tar([("a/data/meta.mat", b"text")], "w:gz"))
    assert f"{DEVKIT} is not the devkit" in refusal(run, archive, tmp_path / "out", "val")
    put(archive / DEVKIT, b"text")
    assert f"{DEVKIT} is not the devkit" in refusal(run, archive, tmp_path / "out", "val")


def test_kaggles_lists_are_held_against_the_folder(tmp_path):
    kaggle(tmp_path / "source")
    here = tmp_path / "source"
    put(here / KAGGLE / "val" / "stray.JPEG", encoded(picture(0)))
    (here / KAGGLE / "val" / "ILSVRC2012_val_00000002.JPEG").unlink()
    (report,), _ = run(here, tmp_path / "out", "val", expect="any")
    assert refused(report) == {
        "stray.JPEG": f"not in {SOLUTION}",
        "ILSVRC2012_val_00000002.JPEG": "cannot be read (No such file or directory)",
    }
    put(here / SOLUTION, b"ImageId,PredictionString\n../x,n00000001 1 2 3 4\n")
    assert "line 2: '../x' of class 'n00000001'" in refusal(run, here, tmp_path / "b", "val")


# Shrinking


def test_larger_training_images_are_shrunk_and_the_rest_is_left(folder, tmp_path):
    sizes = {"wide": (81, 30), "tall": (30, 64), "same": (16, 40), "small": (12, 15)}
    for name, (width, height) in sizes.items():
        put(folder / "train" / CLASSES[0] / f"{name}.JPEG", encoded(picture(1, width, height), quality=95))
    (report, val), said = run(folder, tmp_path / "out", "train", "val", shrink=Shrink(16, 90), image_size=16)
    data = Shards(tmp_path / "out" / "train")
    place = {data.key(i).split("/")[1]: i for i in range(len(data))}
    for name in ("same", "small"):
        assert data.read(place[name]) == (folder / "train" / CLASSES[0] / f"{name}.JPEG").read_bytes()
    for name in ("wide", "tall"):
        image = Image.open(io.BytesIO(data.read(place[name])))
        original = Image.open(folder / "train" / CLASSES[0] / f"{name}.JPEG").convert("RGB")
        expected = transforms.resize(original, 16, transforms.InterpolationMode.BICUBIC, antialias=True)
        assert image.size == expected.size and image.format == "JPEG"
        assert data.read(place[name]) == encoded(expected, quality=90, subsampling="4:2:0")
        assert data.sizes[place[name]].tolist() == [image.height, image.width]
    assert (
        data.short_side == 16 and report.about["quality"] == 90 and report.about["shrunk"] == TRAIN_IMAGES + 2
    )
    assert report.about["min_side"] == 12
    small = 1 + TRAIN_IMAGES + 2 + 1  # all shrunk images, and two that were small, fall short of 18 pixels
    assert report.enlarged == (16, pytest.approx(small / len(data)))
    assert f"needs a short side of 18: {1:.1%} are enlarged" in said
    held_out = Shards(tmp_path / "out" / "val")
    assert held_out.short_side == 0 and val.about["quality"] is None and val.enlarged == (16, 0.0)
    assert {held_out.read(i) for i in range(4)} == set(val_images().values())


@pytest.mark.parametrize("chroma, factor", [("4:2:0", 2), ("4:4:4", 1)])
def test_colour_is_stored_as_asked(folder, tmp_path, chroma, factor):
    run(folder, tmp_path / "out", "train", shrink=Shrink(16, chroma=chroma))
    image = Image.open(io.BytesIO(Shards(tmp_path / "out" / "train").read(0)))
    assert image.layer[0][1:3] == (factor, factor)


def test_grey_images_stay_grey_and_lose_their_notes(folder, tmp_path):
    odd = encoded(picture(1, 40, 40, "L"), comment=b"a comment", exif=rotated())
    put(folder / "train" / CLASSES[0] / "grey.JPEG", odd)
    run(folder, tmp_path / "out", "train", shrink=Shrink(16))
    data = Shards(tmp_path / "out" / "train")
    (image,) = (
        Image.open(io.BytesIO(data.read(i))) for i in range(len(data)) if data.key(i).endswith("grey")
    )
    assert image.mode == "L" and "comment" not in image.info and "exif" not in image.info


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(short_side=-1), "short_side=-1; expected 0 or more"),
        (dict(quality=0), "quality=0; expected 1 or more, at most 95"),
        (dict(chroma="4:2:1"), "chroma='4:2:1'; expected one of 4:2:0, 4:4:4"),
    ],
)
def test_wrong_options_are_refused(options, message):
    assert message in refusal(Shrink, **options)


# Nothing but the whole


@pytest.mark.parametrize("make", [archives, kaggle])
def test_imagenets_layouts_must_be_the_whole_of_it(make, tmp_path):
    make(tmp_path / "source")
    message = refusal(run, tmp_path / "source", tmp_path / "out")
    assert "4 images of 3 classes, expected ImageNet's 50,000 of 1,000" in message
    message = refusal(run, tmp_path / "source", tmp_path / "out", "train")
    assert "18 images of 3 classes, expected ImageNet's 1,281,167 of 1,000" in message
    assert not (tmp_path / "out").exists()


def test_a_refused_image_counts_against_the_whole(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "IMAGENET", {"train": TRAIN_IMAGES, "val": VAL_IMAGES})
    monkeypatch.setattr(module, "IMAGENET_CLASSES", 3)
    run(folder, tmp_path / "out")  # three classes named by WordNet ids are the whole here, unasked
    assert Shards(tmp_path / "out" / "train").name == "imagenet"
    put(folder / "train" / CLASSES[0] / f"{CLASSES[0]}_1.JPEG", b"text")
    said = []
    with pytest.raises(DataError, match="17 images of 3 classes, expected ImageNet's 18 of 3"):
        pack(folder, tmp_path / "b", ["train"], workers=1, report=said.append)
    assert f"{CLASSES[0]}_1.JPEG: in none of the formats" in said[-1] and not (tmp_path / "b").exists()
    run(folder, tmp_path / "b", "train", expect="any")
    assert len(Shards(tmp_path / "b" / "train")) == 17


def test_what_is_there_is_not_overwritten(folder, tmp_path):
    run(folder, tmp_path / "out", "val")
    before = (tmp_path / "out" / "val" / "index.json").stat()
    assert "val exists: delete it" in refusal(run, folder, tmp_path / "out")
    assert not (tmp_path / "out" / "train").exists()
    assert (tmp_path / "out" / "val" / "index.json").stat() == before
    assert "is packed already" in refusal(run, tmp_path / "out", tmp_path / "again", "val")


def test_a_full_disk_leaves_nothing(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "_create", lambda path: open("/dev/full", "wb"))
    message = refusal(run, folder, tmp_path / "out", "train", workers=2)
    assert "No space left on device" in message and not (tmp_path / "out").exists()


def test_killed_in_the_middle_it_leaves_nothing_and_no_process(folder, tmp_path):
    slow = encoded(picture(0, 1500, 1500))
    put(folder / "train" / CLASSES[0] / "0.JPEG", slow)
    for i in range(1, 400):
        os.link(folder / "train" / CLASSES[0] / "0.JPEG", folder / "train" / CLASSES[0] / f"{i}.JPEG")
    task = (folder, tmp_path / "out", ["train"], None, 1000, "any", 2)
    process = multiprocessing.get_context("fork").Process(target=pack, args=task)
    process.start()
    hidden = tmp_path / "out" / ".train.unfinished" / "000000.tar"
    until(lambda: hidden.exists() and hidden.stat().st_size, 60)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    assert len(children) == 2
    process.kill()
    process.join()
    assert [p.name for p in (tmp_path / "out").iterdir()] == [".train.unfinished"]
    assert "no folder" in refusal(open_dataset, tmp_path / "out" / "train", "train")
    try:
        until(lambda: not any(alive(child) for child in children), 20)
    finally:
        for child in filter(alive, children):
            os.kill(int(child), signal.SIGKILL)
    for i in range(400):
        (folder / "train" / CLASSES[0] / f"{i}.JPEG").unlink()
    run(folder, tmp_path / "out", "train")  # what was left is in nobody's way
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["train"]


def until(condition, seconds):
    limit = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < limit, "waited in vain"
        time.sleep(0.02)


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


# The command


def test_the_command_says_what_it_did_or_what_was_wrong(folder, tmp_path, capsys):
    from cpvt.cli import main

    main(["pack", str(folder), str(tmp_path / "out"), "--short-side", "16", "--workers", "1"])
    said = capsys.readouterr().out
    assert "out/val: 4 images of 3 classes" in said and "shrunk to a short side of 16: 18 images" in said
    for arguments in (
        ["pack", str(folder), str(tmp_path / "out")],
        ["pack", str(folder / "train" / CLASSES[0]), str(tmp_path / "b")],
        ["pack", str(folder), str(tmp_path / "b"), "--quality", "200"],
        ["pack", str(folder), str(tmp_path / "b"), "--expect", "imagenet"],
    ):
        with pytest.raises(SystemExit) as stop:
            main(arguments)
        assert stop.value.code == 2
        message = capsys.readouterr().err
        assert message.startswith("cpvt pack: ") and message.count("\n") == 1
    assert not (tmp_path / "b").exists()
