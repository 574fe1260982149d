"""Shards are plain tars, any image is one read away, and what is not whole is named."""

import hashlib
import json
import multiprocessing
import os
import pickle
import resource
import tarfile
from concurrent.futures import ThreadPoolExecutor

import numpy
import pytest
import torch
from encoded import encoded, picture, refusal

from cpvt.data.datasets import load_tensors, open_dataset
from cpvt.data.decode import BatchReader, decode_image
from cpvt.data.sampler import Request
from cpvt.data.shards import COLUMNS, Shards, ShardWriter, written_aside
from cpvt.errors import DataError

CLASSES = ("n00000001", "n00000002", "n00000003")
IMAGES = [encoded(picture(18, 24 + i, seed=i), "PNG" if i == 4 else "JPEG") for i in range(10)]


def write(target, images=10):
    with written_aside(target) as folder:
        writer = ShardWriter(folder, shard_bytes=6000)
        for i in range(images):
            ending = "png" if i == 4 else "jpg"
            writer.add(f"{CLASSES[i % 3]}/image_{i}", ending, IMAGES[i], i % 3)
        writer.close(classes=CLASSES)
    return target


@pytest.fixture
def folder(tmp_path):
    return write(tmp_path / "packed" / "train")


def test_a_shard_is_a_plain_tar_of_image_and_class(folder):
    data, i = Shards(folder), 0
    names = sorted(path.name for path in folder.glob("*.tar"))
    assert names == [f"{n:06}.tar" for n in range(len(names))] and len(names) > 2
    for name in names:
        assert (folder / name).stat().st_size <= 6000 + 10240  # less than a record of padding above the limit
        with tarfile.open(folder / name, "r:") as archive:
            members = archive.getmembers()
            for image, label in zip(members[::2], members[1::2], strict=True):
                assert image.name == data.key(i) + (".png" if i == 4 else ".jpg")
                assert label.name == data.key(i) + ".cls"
                assert archive.extractfile(image).read() == data.read(i) == IMAGES[i]
                assert archive.extractfile(label).read() == str(data.labels[i].item()).encode()
                assert (image.mtime, image.uid, image.uname) == (0, 0, "") and image.isreg()
                i += 1
    assert i == len(data) == 10


def test_images_selections_and_fingerprints_are_those_that_were_written(folder, tmp_path):
    data = open_dataset(folder.parent, "train")
    assert isinstance(data, Shards)
    for i in range(10):
        image, label = data[i]
        assert torch.equal(image, decode_image(IMAGES[i])) and label == data.labels[i] == i % 3
    about = json.loads((folder / "index.json").read_text())
    assert (about["images"], about["classes"]) == (10, list(CLASSES))
    chosen = data.select(torch.tensor([7, 2]))
    assert len(chosen) == 2 and chosen.classes == CLASSES and chosen.labels.tolist() == [1, 2]
    assert [chosen.read(0), chosen.read(1)] == [IMAGES[7], IMAGES[2]]
    assert chosen.key(0) == "n00000002/image_7"
    tensors = load_tensors(data, 18)
    assert tensors.images.shape == (10, 3, 18, 18) and torch.equal(tensors.labels, data.labels)
    assert "no folder 'val'" in refusal(open_dataset, folder.parent, "val")
    assert data.fingerprint == Shards(write(tmp_path / "again")).fingerprint
    others = [data.select([1, 0]), data.select([0, 1]), Shards(write(tmp_path / "fewer", images=9))]
    assert len({data.fingerprint, *(other.fingerprint for other in others)}) == 4


def read_all(data):
    for _ in range(20):
        assert [data.read(i) for i in range(10)] == IMAGES
    return True


def test_threads_forks_and_pickled_copies_read_the_same(folder):
    data = Shards(folder)
    with ThreadPoolExecutor(8) as threads:  # all start with no file open
        assert list(threads.map(data.read, list(range(10)) * 20)) == IMAGES * 20
    assert read_all(pickle.loads(pickle.dumps(data)))
    forked = multiprocessing.get_context("fork").Process(target=read_all, args=(data,))
    forked.start()
    assert read_all(data)  # at the same time, on the same descriptors
    forked.join()
    assert forked.exitcode == 0


@pytest.mark.parametrize("name, content", [("000001.tar", None), ("000001.tar", b"cut"), ("index.npz", b"")])
def test_a_damaged_file_is_named_when_the_folder_is_opened(folder, name, content):
    (folder / name).unlink() if content is None else (folder / name).write_bytes(content)
    assert refusal(Shards, folder).startswith(str(folder / name))
    for content in ("[]", "[" * 100_000, '{"format": "cpvt shards", "version": 99}'):
        (folder / "index.json").write_text(content)
        assert refusal(Shards, folder).startswith(str(folder / "index.json"))


def test_a_shard_damaged_after_opening_is_an_error_with_a_name(folder):
    data = Shards(folder)
    with open(folder / "000000.tar", "r+b") as file:
        file.write(b"\xff" * 512)  # the header before image 0
    assert data.key(0) == "000000.tar, byte 512"
    with open(folder / "000000.tar", "r+b") as file:
        file.write(bytes(40_000))
    read = BatchReader(data, False)[Request(0, *[torch.arange(10)] * 3)]
    held = len(read.faults)  # by the first shard
    assert 0 < held < 10 and [fault.index for fault in read.faults] == [*range(held)]
    assert read.faults[0].key == "000000.tar, byte 512" and "in none of the formats" in read.faults[0].reason
    os.truncate(folder / "000000.tar", 600)
    assert "000000.tar ends before byte" in refusal(data.read, 0)


def test_an_index_that_points_elsewhere_is_refused_though_its_hash_agrees(folder):
    with numpy.load(folder / "index.npz") as file:
        written = {name: file[name].astype("int64") for name in COLUMNS}
    wrong = {"length": (2**62, -1, 0, 2**28 + 1), "offset": (2**63 - 1, -512, 0), "shard": (99, -1)}
    for name, value in ((n, v) for n, values in (wrong | {"label": (3, -1, None)}).items() for v in values):
        column = written[name].copy()
        column[3:4] = value or 0
        numpy.savez(folder / "index.npz", **written | {name: column[: None if value is not None else 9]})
        about = json.loads((folder / "index.json").read_text())
        about["index_sha256"] = hashlib.sha256((folder / "index.npz").read_bytes()).hexdigest()
        (folder / "index.json").write_text(json.dumps(about))
        assert f"{folder / 'index.npz'} is not what was packed" in refusal(Shards, folder), (name, value)


def test_an_error_leaves_nothing_and_two_cannot_write_the_same(tmp_path):
    def write(ended_by):
        with written_aside(tmp_path / "train") as folder:
            (folder / "half").write_bytes(bytes(5000))
            raise ended_by

    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    with pytest.raises(KeyboardInterrupt):
        write(KeyboardInterrupt)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4000, limits[1]))
    try:
        assert "File too large" in refusal(write, KeyboardInterrupt, error=DataError)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not list(tmp_path.iterdir())
    target = tmp_path / "train"
    with written_aside(target) as folder:
        (folder / "mine").write_text("")
        assert ".train.unfinished exists" in refusal(written_aside(target).__enter__)
    assert [p.name for p in target.iterdir()] == ["mine"]
    assert f"{target} exists" in refusal(written_aside(target).__enter__)
    (tmp_path / "link").symlink_to("nowhere")
    for inside, words in (
        (target / "mine", "(Not a directory)"),
        (tmp_path / "link", "(No such file or directory)"),
    ):
        assert words in refusal(written_aside(inside / "train").__enter__)
