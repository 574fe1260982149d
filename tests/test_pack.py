"""ImageNet as people have it becomes shards: three layouts, odd and broken images, nothing half done."""

import io
import os
import tarfile
from pathlib import Path

import pytest
import torch
from encoded import BROKEN, ODD, PLAIN, SIXTEEN, encoded, exif, picture, put, refusal
from PIL import Image
from small_imagenet import CLASSES, LAYOUTS, NUMBERS, SPLITS, TRUTH, VAL, archives, folders, kaggle, run, tar
from torchvision.transforms.v2 import functional as transforms

from cpvt.cli import main
from cpvt.data import pack as module
from cpvt.data.datasets import open_dataset
from cpvt.data.decode import decode_image
from cpvt.data.pack import ARCHIVES, DEVKIT, KAGGLE, SOLUTION
from cpvt.data.shards import Shards

TRAIN_IMAGES = 18


@pytest.fixture
def folder(tmp_path):
    folders(tmp_path / "source")
    return tmp_path / "source"


@pytest.mark.parametrize("layout", LAYOUTS)
def test_each_layout_gives_every_image_its_class(layout, tmp_path, monkeypatch):
    LAYOUTS[layout](tmp_path / "source", monkeypatch)
    said = run(tmp_path / "source", tmp_path / "out")
    assert "18 images of 3 classes" in said
    for split, images in SPLITS.items():
        data = open_dataset(tmp_path / "out", split)
        assert data.classes == CLASSES and data.about["split"] == split and not data.about["refused"]
        found = {(data.key(i), data.classes[data.labels[i]]): data.read(i) for i in range(len(data))}
        assert found == {(f"{wnid}/{Path(name).stem}", wnid): image for (wnid, name), image in images.items()}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "source"], "nothing unpacked is left"
    train, val = (Shards(tmp_path / "out" / split).labels.tolist() for split in ("train", "val"))
    assert {*train[:6]} == {0, 1, 2}, "mixed; class by class they would all be of class 0"
    assert layout != "kaggle" or val == [CLASSES.index(NUMBERS[number]) for number in TRUTH]


def test_packing_again_by_more_processes_gives_the_same_bytes(folder, tmp_path):
    for out, workers in (("a", 1), ("b", 2)):
        run(folder, tmp_path / out, "train", short_side=16, workers=workers)
    first, again = ({p.name: p.read_bytes() for p in (tmp_path / out / "train").iterdir()} for out in "ab")
    assert first == again


def test_what_is_missing_is_named(tmp_path, monkeypatch):
    assert "no folder" in refusal(run, tmp_path / "none", tmp_path / "out")
    assert "no folder 'val'" in refusal(run, tmp_path, tmp_path / "out")
    for make, names in ((archives, (*ARCHIVES.values(), DEVKIT)), (kaggle, (SOLUTION,))):
        here = tmp_path / make.__name__
        make(here, monkeypatch)
        for name in names:
            hidden = (here / name).rename(tmp_path / "hidden")
            assert name in refusal(run, here, tmp_path / "out")
            hidden.rename(here / name)
    image = tmp_path / "kaggle" / KAGGLE / "val" / "ILSVRC2012_val_00000002.JPEG"
    put(image.with_name("stray.JPEG"), PLAIN["4:4:4"])
    assert "left out by their names 1" in run(tmp_path / "kaggle", tmp_path / "stray", "val")
    image.unlink()
    assert str(image) in refusal(run, tmp_path / "kaggle", tmp_path / "out", "val")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["/tmp/x.JPEG", "a/../../x.JPEG"])
def test_no_entry_of_an_archive_leaves_its_folder(tmp_path, monkeypatch, name):
    """Even where the MD5 is right. An absolute name is made relative."""
    wicked = tar([("fine.JPEG", PLAIN["4:4:4"]), (name, PLAIN["4:4:4"])])
    archives(tmp_path / "source", monkeypatch, train=[(f"{CLASSES[0]}.tar", wicked)])
    if name.startswith("/"):
        run(tmp_path / "source", tmp_path / "out", "train")
    else:
        assert "cannot be unpacked" in refusal(run, tmp_path / "source", tmp_path / "out", "train")
    assert {path.name for path in tmp_path.iterdir()} <= {"source", "out"}
    assert not Path("/tmp/x.JPEG").exists() and tarfile.TarFile.extraction_filter is None, "as it was"


def test_larger_training_images_are_shrunk_and_the_rest_is_left(folder, tmp_path):
    sizes = {"wide": (81, 30), "tall": (30, 64), "same": (16, 40), "small": (12, 15)}
    originals = {name: encoded(picture(height, width)) for name, (width, height) in sizes.items()}
    originals["grey"] = encoded(picture(40, 40, "L"), comment=b"a comment", exif=exif(6))
    for name, content in originals.items():
        put(folder / "train" / CLASSES[0] / f"{name}.JPEG", content)
    said = run(folder, tmp_path / "out", short_side=16)
    data = Shards(tmp_path / "out" / "train")
    stored = {data.key(i).split("/")[1]: data.read(i) for i in range(len(data))}
    for name in ("same", "small"):
        assert stored[name] == originals[name]
    for name in ("wide", "tall"):
        original = Image.open(io.BytesIO(originals[name]))
        expected = transforms.resize(original, 16, transforms.InterpolationMode.BICUBIC, antialias=True)
        assert stored[name] == encoded(expected, quality=module.QUALITY, subsampling="4:2:0")
    grey = Image.open(io.BytesIO(stored["grey"]))
    assert grey.mode == "L" and "comment" not in grey.info and "exif" not in grey.info
    assert (data.short_side, data.about["shrunk"], data.about["min_side"]) == (16, TRAIN_IMAGES + 3, 12)
    assert f"shrunk {TRAIN_IMAGES + 3};" in said
    held_out = Shards(tmp_path / "out" / "val")
    assert held_out.short_side == 0 and {held_out.read(i) for i in range(4)} == set(VAL.values())


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
    data = Shards(tmp_path / "out" / "train")
    missing = {Path(name).name: reason for name, reason in data.about["refused"]}
    assert set(missing) == {f"{kind}.JPEG" for kind in BROKEN} | {"pipe.JPEG"}
    assert len(data) + len(missing) == TRAIN_IMAGES + len(images) + 1
    assert missing["empty.JPEG"] == "empty" and "not a regular file" in missing["pipe.JPEG"]
    assert f"refused {len(missing)}\n" in said and "'JPEG CMYK': 1" in said and "'PNG I;16': 2" in said
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


def test_a_thousand_classes_must_be_the_whole_of_imagenet(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "IMAGENET_CLASSES", 3)
    assert "ImageNet has 50,000" in refusal(run, folder, tmp_path / "out")
    monkeypatch.setattr(module, "IMAGENET", {"train": TRAIN_IMAGES, "val": 4})
    run(folder, tmp_path / "out")
    put(folder / "train" / CLASSES[0] / f"{CLASSES[0]}_1.JPEG", b"text")
    assert "17 images of 3 classes" in refusal(run, folder, tmp_path / "b", "train"), "one is refused"
    assert not list((tmp_path / "b").iterdir())
    run(folder, tmp_path / "b", "train", partial=True)
    assert len(Shards(tmp_path / "b" / "train")) == 17
    for path in (folder / "train" / CLASSES[1]).iterdir():
        path.write_bytes(b"")
    message = refusal(run, folder, tmp_path / "c", "train", partial=True)
    assert "1 have no image" in message and CLASSES[1] in message and not list((tmp_path / "c").iterdir())


def test_the_command_overwrites_nothing(folder, tmp_path, capsys):
    run(folder, tmp_path / "out", "val")
    before = (tmp_path / "out" / "val" / "index.json").stat()
    with pytest.raises(SystemExit) as stop:
        main(["pack", str(folder), str(tmp_path / "out"), "--workers", "1"])
    said = capsys.readouterr().err
    assert stop.value.code == 2 and said.count("\n") == 1 and "exists" in said
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["val"]
    assert (tmp_path / "out" / "val" / "index.json").stat() == before
    assert "packed already" in refusal(run, tmp_path / "out", tmp_path / "again", "val")
    main(["pack", str(folder), str(tmp_path / "b"), "--workers", "1", "--short-side", "16"])
    assert "shrunk 18;" in capsys.readouterr().out
