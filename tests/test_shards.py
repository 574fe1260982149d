"""Shards are plain tars, any image is one read away, and what is not whole is named."""

import io
import json
import multiprocessing
import os
import pickle
import tarfile
from concurrent.futures import ThreadPoolExecutor

import numpy
import pytest
import torch
from PIL import Image

from cpvt.data import shards as module
from cpvt.data.datasets import Shards, check_resolution, load_tensors, open_dataset, stored_side_needed
from cpvt.data.shards import KEY_BYTES, ShardWriter, written_aside
from cpvt.errors import DataError

CLASSES = ("n00000001", "n00000002", "n00000003")


def encoded(seed, width=24, height=18, kind="JPEG"):
    noise = numpy.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=numpy.uint8)
    file = io.BytesIO()
    Image.fromarray(noise).save(file, kind)
    return file.getvalue()


def write(target, images=10, shard_bytes=6000, short_side=0):
    with written_aside(target) as folder:
        writer = ShardWriter(folder, shard_bytes)
        for i in range(images):
            kind, ending = ("PNG", "png") if i == 4 else ("JPEG", "jpg")
            data = encoded(i, width=24 + i, kind=kind)
            writer.add(f"{CLASSES[i % 3]}/image_{i}", ending, data, i % 3, 18, 24 + i)
        writer.close(name="tiny", split=target.name, classes=CLASSES, short_side=short_side)
    return target


@pytest.fixture
def folder(tmp_path):
    return write(tmp_path / "packed" / "train")


def refusal(call, *args, **kwargs):
    with pytest.raises(DataError) as error:
        call(*args, **kwargs)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_a_shard_is_a_plain_tar_of_image_and_class(folder):
    data, i = Shards(folder), 0
    assert len(data) == 10 and data.classes == CLASSES and (data.name, data.split) == ("tiny", "train")
    names = sorted(path.name for path in folder.glob("*.tar"))
    assert names == [f"{n:06}.tar" for n in range(len(names))] and len(names) > 2
    for name in names:
        assert (folder / name).stat().st_size <= 6000 + 10240  # less than a record of padding above the limit
        with tarfile.open(folder / name, "r:") as archive:
            members = archive.getmembers()
            for image, label in zip(members[::2], members[1::2], strict=True):
                key, ending = image.name.split(".")
                assert label.name == f"{key}.cls" and key == data.key(i) and data.about["images"] == 10
                assert archive.extractfile(image).read() == data.read(i)
                assert archive.extractfile(label).read() == str(data.labels[i].item()).encode()
                assert ending == ("png" if i == 4 else "jpg")
                assert (image.mtime, image.uid, image.uname) == (0, 0, "") and image.isreg()
                i += 1
    assert i == 10


def test_an_image_is_the_one_that_was_written(folder):
    data = Shards(folder)
    for i in range(10):
        assert data.read(i) == encoded(i, width=24 + i, kind="PNG" if i == 4 else "JPEG")
        image, label = data[i]
        assert (image.height, image.width) == tuple(data.sizes[i].tolist()) == (18, 24 + i)
        assert image.mode == "RGB" and label == data.labels[i] == i % 3
    assert data.labels.dtype == data.sizes.dtype == torch.int64


def test_a_selection_keeps_classes_and_files(folder):
    data = Shards(folder)
    chosen = data.select(torch.tensor([7, 2]))
    assert len(chosen) == 2 and chosen.classes == CLASSES and chosen.labels.tolist() == [1, 2]
    assert [chosen.read(0), chosen.read(1)] == [data.read(7), data.read(2)]
    assert chosen.key(0) == "n00000002/image_7" and chosen.sizes[1].tolist() == [18, 26]
    assert chosen.select([1]).read(0) == data.read(2)


def test_the_fingerprint_tells_packs_apart(folder, tmp_path):
    data = Shards(folder)
    assert data.fingerprint == Shards(write(tmp_path / "again")).fingerprint  # the same images, another place
    others = [data.select([1, 0]), data.select([0, 1]), Shards(write(tmp_path / "fewer", images=9))]
    assert len({data.fingerprint, *(other.fingerprint for other in others)}) == 4


def test_the_same_images_give_the_same_bytes(folder, tmp_path):
    again = write(tmp_path / "again" / "train")
    assert {p.name: p.read_bytes() for p in again.iterdir()} == {
        p.name: p.read_bytes() for p in folder.iterdir()
    }


def _read_all(data):
    return [data.read(i) for i in range(len(data))]


def test_threads_forks_and_pickled_copies_read_the_same(folder):
    data = Shards(folder)
    with ThreadPoolExecutor(8) as threads:  # all start with no file open
        parallel = list(threads.map(data.read, list(range(10)) * 20))
    expected = _read_all(data)
    assert parallel == expected * 20
    opened = data._files.opened
    assert len(opened) == len(data.about["shards"]) and len(set(opened.values())) == len(opened)
    copy = pickle.loads(pickle.dumps(data))
    assert copy._files.opened == {} and _read_all(copy) == expected
    with multiprocessing.get_context("fork").Pool(2) as pool:
        assert pool.map(_read_all, [data, data]) == [expected, expected]
    forked = multiprocessing.get_context("fork").Process(target=_child, args=(data, expected))
    forked.start()
    assert _read_all(data) == expected  # at the same time, on the same descriptors
    forked.join()
    assert forked.exitcode == 0


def _child(data, expected):
    for _ in range(20):
        assert _read_all(data) == expected


def test_descriptors_are_given_back(folder):
    before = len(os.listdir("/proc/self/fd"))
    data = Shards(folder)
    _read_all(data.select(range(10)))
    assert len(os.listdir("/proc/self/fd")) == before + len(data.about["shards"])
    del data
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize("damage", ["missing", "short", "long"])
def test_a_shard_of_another_size_is_named_when_the_folder_is_opened(folder, damage):
    shard = folder / "000001.tar"
    content = shard.read_bytes()
    shard.unlink()
    if damage != "missing":
        shard.write_bytes(content[:-1] if damage == "short" else content + b"\0")
    message = refusal(Shards, folder)
    assert message.startswith(str(shard)) and f"expected {len(content)} bytes" in message


def test_a_changed_byte_is_found_by_its_hash(folder):
    Shards(folder).verify()
    content = bytearray((folder / "000001.tar").read_bytes())
    content[700] ^= 1
    (folder / "000001.tar").write_bytes(content)
    data = Shards(folder)  # sizes alone do not tell
    message = refusal(data.verify)
    assert "1 of" in message and "the first: 000001.tar" in message


def test_a_shard_cut_after_opening_is_an_error_and_no_short_image(folder):
    data = Shards(folder)
    os.truncate(folder / "000000.tar", 600)
    assert "000000.tar ends before byte" in refusal(data.read, 0)
    (folder / "000001.tar").unlink()
    assert "000001.tar cannot be read (No such file" in refusal(data.read, 3)


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("index.json", b"{", "is not the index of shards ("),
        ("index.json", b"[]", "is not the index of shards that `cpvt pack` wrote"),
        ("index.json", b'{"format": "cpvt shards", "version": 99}', "has version 99, expected 1"),
        ("index.npz", b"", "is not the one that index.json describes"),
    ],
)
def test_an_index_that_is_none_is_named(folder, name, content, message):
    (folder / name).write_bytes(content)
    assert message in refusal(Shards, folder)


def test_the_index_says_what_is_there(folder):
    about = json.loads((folder / "index.json").read_text())
    assert about["images"] == 10 == sum(shard["images"] for shard in about["shards"])
    assert about["min_side"] == 18 and about["classes"] == list(CLASSES)
    with numpy.load(folder / "index.npz", allow_pickle=False) as columns:
        assert columns["width"].tolist() == [24 + i for i in range(10)]


def test_long_names_fit_the_plain_header(tmp_path):
    with written_aside(tmp_path / "train") as folder:
        writer = ShardWriter(folder, 10**6)
        writer.add("k" * KEY_BYTES, "jpeg", encoded(0), 12345, 18, 24)
        writer.close(name="tiny", split="train", classes=CLASSES, short_side=0)
    assert Shards(tmp_path / "train").key(0) == "k" * KEY_BYTES


# Written whole or not at all


def test_an_error_leaves_nothing(tmp_path):
    target = tmp_path / "new" / "train"
    with pytest.raises(KeyboardInterrupt), written_aside(target) as folder:
        (folder / "half").write_text("half")
        assert not target.exists()
        raise KeyboardInterrupt
    assert not (tmp_path / "new").exists()


def test_two_cannot_write_the_same(tmp_path):
    target = tmp_path / "train"
    with written_aside(target) as folder:
        (folder / "mine").write_text("")
        assert "is being written by another process" in refusal(written_aside(target).__enter__)
    assert [p.name for p in target.iterdir()] == ["mine"]
    assert "exists: delete it" in refusal(written_aside(target).__enter__)


def test_what_a_killed_process_left_is_deleted(tmp_path):
    left = tmp_path / ".train.unfinished"
    left.mkdir()
    (left / "000009.tar").write_text("half")
    write(tmp_path / "train")
    assert not left.exists() and not (tmp_path / "train" / "000009.tar").exists()


def test_a_full_disk_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_create", lambda path: open("/dev/full", "wb"))
    message = refusal(write, tmp_path / "out" / "train")
    assert "out/train could not be written (No space left on device), nothing was kept" in message
    assert not (tmp_path / "out").exists()


# Data sets


def test_a_data_set_of_shards_opens_like_any_other(folder):
    data = open_dataset(folder.parent, "train")
    assert isinstance(data, Shards)
    tensors = load_tensors(data, 18)
    assert tensors.images.shape == (10, 3, 18, 18) and tensors.labels.tolist() == data.labels.tolist()
    assert tensors.classes == CLASSES
    assert "has no folder 'val'" in refusal(open_dataset, folder.parent, "val")


def test_files_are_read_by_the_same_names(tmp_path):
    for split in ("train",):
        for i, wnid in enumerate(CLASSES):
            (tmp_path / split / wnid).mkdir(parents=True)
            (tmp_path / split / wnid / "a.JPEG").write_bytes(encoded(i, width=30 + i))
    data = open_dataset(tmp_path)
    assert data.read(1) == encoded(1, width=31) and data.key(1) == str(tmp_path / "train/n00000002/a.JPEG")
    assert data.sizes.tolist() == [[18, 30], [18, 31], [18, 32]]
    (tmp_path / "train/n00000002/a.JPEG").write_bytes(b"text")
    changed = open_dataset(tmp_path)
    assert "n00000002/a.JPEG is not an image" in refusal(lambda: changed.sizes)
    (tmp_path / "train/n00000002/a.JPEG").unlink()
    assert "n00000002/a.JPEG cannot be read (No such file" in refusal(changed.read, 1)


# Resolution


@pytest.mark.parametrize("size, needed", [(224, 256), (384, 438), (448, 512), (512, 585), ((224, 384), 438)])
def test_the_side_needed_is_the_crop_s_by_its_share(size, needed):
    assert stored_side_needed(size) == needed


def test_shrunk_images_are_not_evaluated_above_their_size_unless_asked(folder, tmp_path):
    originals = Shards(folder)  # 18 pixels high
    assert check_resolution(originals, 15) == 0.0  # needs 17
    assert check_resolution(originals, 16) == 0.0  # needs 18
    assert check_resolution(originals, 17) == 1.0  # originals are enlarged as they are, and the share is told
    shrunk = Shards(write(tmp_path / "small", short_side=18))
    assert check_resolution(shrunk, 16) == 0.0
    message = refusal(check_resolution, shrunk, 17)
    assert "short side of 18 pixels, size 17 needs 19" in message
    assert check_resolution(shrunk, 17, allow=True) == 1.0
    assert check_resolution(shrunk, 17, crop_fraction=1.0) == 0.0
