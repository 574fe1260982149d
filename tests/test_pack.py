"""ImageNet as people have it becomes shards: three layouts, odd and broken images, nothing half done."""

import io
import multiprocessing
import os
import resource
import signal
import tarfile
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from encoded import BROKEN, ODD, PLAIN, SIXTEEN, encoded, exif, picture, refusal
from helpers import wait_until
from PIL import Image
from small_imagenet import (
    CLASSES,
    LAYOUTS,
    NUMBERS,
    SPLITS,
    TRAIN_IMAGES,
    TRUTH,
    VAL,
    VAL_IMAGES,
    archives,
    folders,
    kaggle,
    put,
    run,
    tar,
)
from torchvision.transforms.v2 import functional as transforms

from cpvt.cli import main
from cpvt.data import pack as module
from cpvt.data.datasets import open_dataset
from cpvt.data.decode import decode_image
from cpvt.data.pack import ARCHIVES, DEVKIT, KAGGLE, MAPPING, SOLUTION, pack
from cpvt.data.shards import Shards
from cpvt.errors import DataError


@pytest.fixture
def folder(tmp_path):
    folders(tmp_path / "source")
    return tmp_path / "source"


def refused(out):
    """File name -> reason, by the index of what was packed."""
    return {Path(name).name: reason for name, reason in Shards(out).about["refused"]}


# The layouts


@pytest.mark.parametrize("layout", LAYOUTS)
def test_each_layout_gives_every_image_its_class(layout, tmp_path, monkeypatch):
    LAYOUTS[layout](tmp_path / "source", monkeypatch)
    said = run(tmp_path / "source", tmp_path / "out", expect="any")
    assert "18 images of 3 classes" in said
    for split, images in SPLITS.items():
        data = open_dataset(tmp_path / "out", split)
        assert data.classes == CLASSES and data.split == split and not data.about["refused"]
        found = {(data.key(i), data.classes[data.labels[i]]): data.read(i) for i in range(len(data))}
        expected = images.items()
        assert found == {
            (f"{wnid}/{name.removesuffix('.JPEG')}", wnid): data for (wnid, name), data in expected
        }
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "source"], "nothing unpacked is left"


def test_training_images_are_mixed_and_validation_images_are_not(tmp_path):
    kaggle(tmp_path / "source")
    run(tmp_path / "source", tmp_path / "out", expect="any")
    train, val = Shards(tmp_path / "out" / "train"), Shards(tmp_path / "out" / "val")
    assert set(train.labels[:6].tolist()) == {0, 1, 2}  # class by class they would all be of class 0
    assert val.labels.tolist() == [CLASSES.index(NUMBERS[number]) for number in TRUTH]


def test_packing_again_by_more_processes_gives_the_same_bytes(folder, tmp_path):
    for out, workers in (("a", 1), ("b", 3)):
        run(folder, tmp_path / out, "train", short_side=16, workers=workers, shard_mb=1)
    first, again = ({p.name: p.read_bytes() for p in (tmp_path / out / "train").iterdir()} for out in "ab")
    assert first == again


def test_what_is_missing_is_named(tmp_path, monkeypatch):
    assert "no folder" in refusal(run, tmp_path / "none", tmp_path / "out")
    assert "no folder 'val'" in refusal(run, tmp_path, tmp_path / "out")
    for make, names in ((archives, (*ARCHIVES.values(), DEVKIT)), (kaggle, (MAPPING, SOLUTION))):
        here = tmp_path / make.__name__
        make(here, monkeypatch)
        for name in names:
            hidden = (here / name).rename(tmp_path / "hidden")
            assert name in refusal(run, here, tmp_path / "out")
            hidden.rename(here / name)
    image = tmp_path / "kaggle" / KAGGLE / "val" / "ILSVRC2012_val_00000002.JPEG"
    put(image.with_name("stray.JPEG"), PLAIN["4:4:4"])
    assert f"1 not in {SOLUTION}" in run(tmp_path / "kaggle", tmp_path / "stray", "val", expect="any")
    image.unlink()
    assert str(image) in refusal(run, tmp_path / "kaggle", tmp_path / "out", "val")
    assert not (tmp_path / "out").exists()


def test_archives_that_are_not_the_published_ones_are_refused(tmp_path, monkeypatch):
    archives(tmp_path / "source", monkeypatch)
    content = bytearray((tmp_path / "source" / ARCHIVES["train"]).read_bytes())
    content[2000] ^= 1
    put(tmp_path / "source" / ARCHIVES["train"], content)
    assert ARCHIVES["train"] in refusal(run, tmp_path / "source", tmp_path / "out", "train")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["../x.JPEG", "/tmp/x.JPEG", "a/../../x.JPEG"])
def test_no_entry_of_an_archive_leaves_its_folder(tmp_path, monkeypatch, name):
    """Even where the MD5 is right."""
    wicked = tar([("fine.JPEG", PLAIN["4:4:4"]), (name, PLAIN["4:4:4"])])
    archives(tmp_path / "source", monkeypatch, train=[(f"{CLASSES[0]}.tar", wicked)])
    (tmp_path / "scratch").mkdir()
    outcome = {"expect": "any", "unpack": tmp_path / "scratch"}
    if name.startswith("/"):  # made relative
        run(tmp_path / "source", tmp_path / "out", "train", **outcome)
    else:
        assert "cannot be unpacked" in refusal(run, tmp_path / "source", tmp_path / "out", "train", **outcome)
    assert not list((tmp_path / "scratch").iterdir()) and not Path("/tmp/x.JPEG").exists()
    assert tarfile.TarFile.extraction_filter is None, "as it was"


# Shrinking


def test_larger_training_images_are_shrunk_and_the_rest_is_left(folder, tmp_path):
    sizes = {"wide": (81, 30), "tall": (30, 64), "same": (16, 40), "small": (12, 15)}
    originals = {name: encoded(picture(height, width)) for name, (width, height) in sizes.items()}
    originals["grey"] = encoded(picture(40, 40, "L"), comment=b"a comment", exif=exif(6))
    for name, content in originals.items():
        put(folder / "train" / CLASSES[0] / f"{name}.JPEG", content)
    said = run(folder, tmp_path / "out", short_side=16, quality=90)
    data = Shards(tmp_path / "out" / "train")
    stored = {data.key(i).split("/")[1]: data.read(i) for i in range(len(data))}
    for name in ("same", "small"):
        assert stored[name] == originals[name]
    for name in ("wide", "tall"):
        original = Image.open(io.BytesIO(originals[name]))
        expected = transforms.resize(original, 16, transforms.InterpolationMode.BICUBIC, antialias=True)
        assert stored[name] == encoded(expected, quality=90, subsampling="4:2:0")
    grey = Image.open(io.BytesIO(stored["grey"]))
    assert grey.mode == "L" and "comment" not in grey.info and "exif" not in grey.info
    about = data.about
    assert (about["short_side"], about["quality"], about["shrunk"]) == (16, 90, TRAIN_IMAGES + 3)
    assert about["min_side"] == 12 and f"{TRAIN_IMAGES + 3} images" in said
    held_out = Shards(tmp_path / "out" / "val")
    assert held_out.short_side == 0 and {held_out.read(i) for i in range(4)} == set(VAL.values())


# Odd and broken images


@pytest.mark.parametrize("short_side", [0, 16])
def test_packed_and_refused_are_all_there_is(folder, tmp_path, short_side):
    images = {f"{kind}.JPEG": data for kind, data in (PLAIN | ODD | BROKEN).items()}
    images |= {"deep.png": encoded(Image.fromarray(SIXTEEN.repeat(40, 0).repeat(10, 1)), "PNG")}
    images |= {"deep.tif": images["deep.png"], "two.dots.JPEG": PLAIN["4:4:4"]}
    images["x" * 200 + ".JPEG"] = PLAIN["4:4:4"]
    for name, content in images.items():
        put(folder / "train" / CLASSES[1] / name.replace(":", "-"), content)
    os.mkfifo(folder / "train" / CLASSES[1] / "pipe.JPEG")
    said = run(folder, tmp_path / "out", "train", workers=2, short_side=short_side)
    data, missing = Shards(tmp_path / "out" / "train"), refused(tmp_path / "out" / "train")
    assert set(missing) == {f"{kind}.JPEG" for kind in BROKEN} | {"pipe.JPEG"}
    assert len(data) + len(missing) == TRAIN_IMAGES + len(images) + 1
    assert missing["empty.JPEG"] == "empty" and "not a regular file" in missing["pipe.JPEG"]
    assert f"refused {len(missing)}," in said and "1 JPEG CMYK" in said and "2 PNG I;16" in said
    keys = [data.key(i) for i in range(len(data))]
    assert len(set(keys)) == len(keys) and all("." not in key and len(key) <= 90 for key in keys)
    stored = dict(zip(keys, range(len(data)), strict=True))
    if not short_side:
        for name in (*PLAIN, *ODD):
            i = stored[f"{CLASSES[1]}/{name.replace(':', '-').replace(' ', '%20')}"]
            assert torch.equal(data[i][0], decode_image(images[f"{name}.JPEG"]))
            assert data.sizes[i].tolist() == [45, 61], "EXIF turns nothing"
    levels = data[stored[f"{CLASSES[1]}/deep"]][0]
    assert abs(levels.float().mean() - decode_image(images["deep.png"]).float().mean()) < 2, "not white"


def test_a_report_names_twenty_and_the_index_all(folder, tmp_path):
    for i in range(23):
        put(folder / "train" / CLASSES[0] / f"empty_{i:02}.JPEG", b"")
    put(folder / "train" / CLASSES[0] / "notes.txt", b"text")
    said = run(folder, tmp_path / "out", "train")
    assert said.count(": empty") == 20 and "refused 23" in said and "1 .txt" in said
    assert len(refused(tmp_path / "out" / "train")) == 23


def test_a_class_without_an_image_is_an_error(folder, tmp_path):
    for path in (folder / "train" / CLASSES[1]).iterdir():
        path.write_bytes(b"")
    message = refusal(run, folder, tmp_path / "out", "train", expect="any")
    assert "1 have no image" in message and CLASSES[1] in message and not (tmp_path / "out").exists()


# Nothing but the whole


@pytest.mark.parametrize("make", [archives, kaggle])
def test_imagenets_layouts_must_be_the_whole_of_it(make, tmp_path, monkeypatch):
    make(tmp_path / "source", monkeypatch)
    for split, found, expected in (("val", "4", "50,000"), ("train", "18", "1,281,167")):
        message = refusal(run, tmp_path / "source", tmp_path / "out", split)
        assert f"{found} images of 3 classes, expected ImageNet's {expected} of 1,000" in message
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
    assert f"{CLASSES[0]}_1.JPEG" in said[-1] and not (tmp_path / "b").exists()
    run(folder, tmp_path / "b", "train", expect="any")
    assert len(Shards(tmp_path / "b" / "train")) == 17


def test_what_is_there_is_not_overwritten(folder, tmp_path):
    run(folder, tmp_path / "out", "val")
    before = (tmp_path / "out" / "val" / "index.json").stat()
    assert "exists" in refusal(run, folder, tmp_path / "out")
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["val"]
    assert (tmp_path / "out" / "val" / "index.json").stat() == before
    assert "packed already" in refusal(run, tmp_path / "out", tmp_path / "again", "val")


def test_after_a_full_disk_the_same_call_may_follow_at_once(folder, tmp_path):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (9000, limits[1]))
    try:
        with pytest.raises(DataError, match="nothing was kept") as kept:
            run(folder, tmp_path / "out", "train", workers=2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    run(folder, tmp_path / "out", "train", workers=2)
    assert len(Shards(tmp_path / "out" / "train")) == TRAIN_IMAGES and kept.tb, "its processes lived on"


def test_killed_in_the_middle_it_leaves_nothing_and_no_process(folder, tmp_path):
    slow = folder / "train" / CLASSES[0] / "0.JPEG"
    put(slow, encoded(picture(1500, 1500)))
    links = [slow.with_name(f"{i}.JPEG") for i in range(1, 400)]
    for link in links:
        link.hardlink_to(slow)
    task, options = (folder, tmp_path / "out", ["train"]), {"expect": "any", "workers": 2}
    process = multiprocessing.get_context("fork").Process(target=pack, args=task, kwargs=options)
    process.start()
    hidden = tmp_path / "out" / ".train.unfinished" / "000000.tar"
    wait_until(lambda: hidden.exists() and hidden.stat().st_size)
    process.kill()
    process.join()
    assert [p.name for p in (tmp_path / "out").iterdir()] == [".train.unfinished"]
    for link in links:
        link.unlink()

    def again():
        with suppress(DataError):
            run(folder, tmp_path / "out", "train")
            return True

    wait_until(again)  # the processes that decode hold the lock until they notice
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["train"]


def test_a_process_that_dies_ends_the_packing(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "decode_image", lambda data: os.kill(os.getpid(), signal.SIGKILL))
    assert "--workers" in refusal(run, folder, tmp_path / "out", "train", workers=2)
    assert not (tmp_path / "out").exists()


# The command


def test_the_command_says_what_it_did_or_what_was_wrong(folder, tmp_path, capsys):
    command = ["pack", str(folder), str(tmp_path / "out"), "--workers", "1"]
    main([*command, "--short-side", "16"])
    said = capsys.readouterr().out
    assert "out/val: 4 images of 3 classes" in said and "short side of 16: 18 images" in said
    for more in ([], ["--quality", "200"], ["--expect", "imagenet"]):
        with pytest.raises(SystemExit) as stop:
            main([*command, *more])
        assert stop.value.code == 2 and capsys.readouterr().err.count("\n") == 1
