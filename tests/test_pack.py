"""ImageNet as people have it becomes shards: two layouts, odd and broken images, nothing half done."""

import multiprocessing
import os
import signal
import tarfile
from pathlib import Path
from unittest import mock

import numpy
import pytest
import torch
from encoded import BROKEN, ODD, PLAIN, SIXTEEN, encoded, picture, put, refusal
from helpers import alive, descendants, run_cli, wait_until
from PIL import Image
from small_imagenet import CLASSES, LAYOUTS, SPLITS, archives, folders, run

from cpvt.cli import main
from cpvt.data import pack as module
from cpvt.data.datasets import load_tensors, open_dataset
from cpvt.data.decode import BatchReader, Decoder, decode_image
from cpvt.data.pack import ARCHIVES, DEVKIT
from cpvt.data.sampler import Request
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
    first = Shards(tmp_path / "out" / "train").labels[:6].tolist()
    assert {*first} == {0, 1, 2}, "mixed; class by class they would all be of class 0"


def test_packing_again_gives_the_same_bytes_and_the_command_overwrites_nothing(folder, tmp_path, capsys):
    for out, workers in (("a", 1), ("b", 2)):
        run(folder, tmp_path / out, "train", workers=workers)
    first, again = ({p.name: p.read_bytes() for p in (tmp_path / out / "train").iterdir()} for out in "ab")
    assert first == again
    run(folder, tmp_path / "out", "val")
    before = (tmp_path / "out" / "val" / "index.json").stat()
    status, _, said = run_cli(capsys, "pack", folder, tmp_path / "out", "--workers", 1)
    assert status == 2 and said.count("\n") == 1 and "exists" in said
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["val"]
    assert (tmp_path / "out" / "val" / "index.json").stat() == before
    assert "packed already" in refusal(run, tmp_path / "out", tmp_path / "again", "val")
    assert "no split" in refusal(module.pack, folder, tmp_path / "again", [])
    assert "workers=-1" in refusal(module.pack, folder, tmp_path / "again", workers=-1)
    assert "among the images" in refusal(module.pack, folder, folder / "train" / "again")
    out = tmp_path / os.fsdecode(b"b\xff")  # as a shell hands on what is not text
    assert "b\\udcff/train: 18 images of 3 classes" in run_cli(capsys, "pack", folder, out, "--workers", 1)[1]


def test_what_is_missing_is_named_and_no_tar_but_a_published_one_is_opened(tmp_path, monkeypatch):
    """Whatever it may hold, endless headers or names outside its folder: with another MD5 it stays closed."""
    assert "no folder" in refusal(run, tmp_path / "none", tmp_path / "out")
    assert "no folder 'val'" in refusal(run, tmp_path, tmp_path / "out")
    archives(tmp_path / "source", monkeypatch)
    own, opened = tarfile.open, []
    spy = mock.Mock(side_effect=lambda name, *a, **k: opened.append(Path(name).name) or own(name, *a, **k))
    monkeypatch.setattr(tarfile, "open", spy)
    for name in (*ARCHIVES.values(), DEVKIT):
        file = tmp_path / "source" / name
        whole = file.read_bytes()
        file.unlink()
        assert name in refusal(run, tmp_path / "source", tmp_path / "out")
        put(file, whole + b"\0")
        opened.clear()
        said = refusal(run, tmp_path / "source", tmp_path / "out")
        assert "cannot be unpacked" in said and name not in opened
        put(file, whole)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]
    run(tmp_path / "source", tmp_path / "out")
    assert {*ARCHIVES.values(), DEVKIT} <= {*opened}
    tmp_path = tmp_path / "as others have it"
    put(tmp_path / "LOC_val_solution.csv", b"ImageId,PredictionString\n")
    assert "move each image of val/ into a folder" in refusal(run, tmp_path, tmp_path / "out")
    for address in ("https://host/x.tar", Path("https://host/x.tar")):
        assert "https://host/x.tar is an address" in refusal(run, address, tmp_path / "out")
        assert "is an address" in refusal(run, tmp_path, address)


def test_every_reader_gives_every_image_the_same_pixels(tmp_path):
    """From its folder, from shards, held in memory: as a run takes them. Or names it, in all of them."""
    deep = Image.fromarray(SIXTEEN.repeat(45, 0).repeat(12, 1)[:, :61])
    images = PLAIN | ODD | {"deep": encoded(deep, "PNG"), "deep TIFF": encoded(deep, "TIFF")}
    for split in ("train", "val"):
        for kind, data in images.items():
            put(tmp_path / "source" / split / "n1" / f"{kind.replace(':', '-')}.JPEG", data)
    run(tmp_path / "source", tmp_path / "out")
    for source in open_dataset(tmp_path / "source"), open_dataset(tmp_path / "out"):
        assert {source.read(i) for i in range(len(source))} == {*images.values()}
        held, decoder = load_tensors(source, 45).images, Decoder(source, "cpu")
        batch = decoder(decoder.reader[Request(0, *[torch.arange(len(source))] * 3)])
        assert not batch.faults
        for i, image in enumerate(batch.images):
            pixels = decode_image(source.read(i))
            assert torch.equal(image, pixels) and torch.equal(source[i][0], pixels)
            assert torch.equal(held[i], pixels[:, :, 8:53]), "the middle of 61"
    for mode in ("I", "F"):
        put(tmp_path / "source" / "train" / "n1" / "0.JPEG", encoded(picture(mode=mode), "TIFF"))
        folder = open_dataset(tmp_path / "source")
        assert f"0.JPEG cannot be read (mode {mode}" in refusal(load_tensors, folder, 45)
        assert f"'train/n1/0.JPEG': mode {mode}" in run(tmp_path / "source", tmp_path / mode, "train")


def test_packed_and_refused_are_all_there_is(folder, tmp_path):
    images = {f"{kind}.JPEG": data for kind, data in (PLAIN | ODD | BROKEN).items()}
    images |= {"deep.png": encoded(Image.fromarray(SIXTEEN.repeat(40, 0).repeat(10, 1)), "PNG")}
    images |= {"deep.tif": images["deep.png"], "two.dots.JPEG": PLAIN["4:4:4"]}
    images |= {"x" * 200 + ending: PLAIN["4:4:4"] for ending in (".JPEG", ".png")}
    images[os.fsdecode(b"\xff.JPEG")] = PLAIN["4:4:4"]
    images[os.fsdecode(b"\xfe.JPEG")] = b""
    for name, content in images.items():
        put(folder / "train" / CLASSES[1] / name.replace(":", "-"), content)
    os.mkfifo(folder / "train" / CLASSES[1] / "pipe.JPEG")
    put(folder / "train" / CLASSES[1] / "new.avif")
    said = run(folder, tmp_path / "out", "train", workers=2)
    data = Shards(tmp_path / "out" / "train")
    missing = {Path(name).name: reason for name, reason in data.about["refused"]}
    assert set(missing) == {f"{kind}.JPEG" for kind in BROKEN} | {"pipe.JPEG", "\udcfe.JPEG"}
    assert len(data) + len(missing) == TRAIN_IMAGES + len(images) + 1
    assert missing["empty.JPEG"] == "empty" and "not a regular file" in missing["pipe.JPEG"]
    assert f"passed over by their names: 1 .avif; refused {len(missing)}\n" in said
    assert "'JPEG CMYK': 1" in said and "'PNG I;16': 2" in said
    assert not BatchReader(data, False)[Request(0, *[torch.arange(len(data))] * 3)].faults, "all train"
    keys = [data.key(i) for i in range(len(data))]
    assert len(set(keys)) == len(keys) and all("." not in key and len(key) <= 90 for key in keys)


@pytest.mark.parametrize("victim", ["worker", "main", "command"])
def test_killed_in_the_middle_it_leaves_nothing_and_no_process(tmp_path, victim):
    """Without its worker it ends in an error, soon; without their main process the workers end; a command that is
    asked to end takes away what it has written."""
    source, out = tmp_path / "source", tmp_path / "out"
    noise = numpy.random.default_rng(0).integers(0, 256, (500, 500, 3), dtype=numpy.uint8)
    put(source / "train" / "n1" / "0.png", encoded(Image.fromarray(noise), "PNG"))
    for i in range(1, 3000):  # a minute's work
        os.link(source / "train" / "n1" / "0.png", source / "train" / "n1" / f"{i}.png")
    words = ["pack", str(source), str(out), "--splits", "train", "--workers", "2"]
    process = multiprocessing.get_context("spawn").Process(target=main, args=(words,))
    process.start()
    wait_until(lambda: len(descendants(process.pid, 2)) == 2)  # its own child is the server that forks them
    workers = descendants(process.pid, 2)
    if victim == "command":
        wait_until(lambda: any(tar.stat().st_size for tar in out.glob(".train.unfinished/*.tar")))
    number = signal.SIGTERM if victim == "command" else signal.SIGKILL
    os.kill(workers[0] if victim == "worker" else process.pid, number)
    wait_until(lambda: not any(map(alive, [process.pid, *workers])), limit=40)
    assert not (out / "train").exists() and (victim == "main" or not out.exists())


def test_a_thousand_classes_must_be_the_whole_of_imagenet(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "IMAGENET_CLASSES", 3)
    assert "ImageNet has 50,000" in refusal(run, folder, tmp_path / "out")
    monkeypatch.setattr(module, "IMAGENET", {"train": TRAIN_IMAGES, "val": 4})
    run(folder, tmp_path / "out")
    put(folder / "train" / CLASSES[0] / f"{CLASSES[0]}_1.JPEG", b"text")
    assert "17 images of 3 classes" in refusal(run, folder, tmp_path / "b", "train"), "one is refused"
    assert not (tmp_path / "b").exists()
    run(folder, tmp_path / "b", "train", partial=True)
    assert len(Shards(tmp_path / "b" / "train")) == 17
    for path in (folder / "train" / CLASSES[1]).iterdir():
        path.write_bytes(b"")
    message = refusal(run, folder, tmp_path / "c", "train", partial=True)
    assert "1 have no image" in message and CLASSES[1] in message and not (tmp_path / "c").exists()
