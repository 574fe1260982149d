"""Images are read by name or from folders, in one order and with one decoder; what cannot be read is named."""

import os
import unicodedata
from pathlib import Path
from unittest import mock

import pytest
import torch
from encoded import BROKEN, encoded, picture, put, refusal
from PIL import Image
from torchvision.transforms.v2 import functional as transforms

from cpvt.config import DataConfig
from cpvt.data import datasets
from cpvt.data.datasets import load_tensors, open_dataset
from cpvt.data.decode import decode_image
from cpvt.data.loader import make_loader


@pytest.fixture
def folder(tmp_path):
    """train/ and val/, three classes written out of order, two images in each, one of them below images/."""
    for split in ("train", "val"):
        for number in (3, 1, 2):
            here = tmp_path / "tiny" / split / f"n0{number}"
            put(here / "b.png", encoded(picture(8, 10, seed=number), "PNG"))
            put(here / "images" / "a.JPEG", encoded(picture(8, 10, "L")))
            put(here / "boxes.txt", b"0 0 1 1")
    return tmp_path / "tiny"


def test_a_folder_is_read_in_the_order_of_its_wordnet_ids(folder, tmp_path):
    data = open_dataset(folder, "val")
    assert data.classes == ("n01", "n02", "n03") and data.labels.tolist() == [0, 0, 1, 1, 2, 2]
    names = [str(data.path(i).relative_to(folder / "val")) for i in range(len(data))]
    assert names == [f"n0{n}/{name}" for n in (1, 2, 3) for name in ("b.png", "images/a.JPEG")]
    for i in range(6):
        image, label = data[i]
        assert label == data.labels[i] and torch.equal(image, decode_image(data.read(i)))
    assert [data.select([5, 0])[i][1] for i in range(2)] == [2, 0]
    assert data[0][0].shape == (3, 8, 10) and data.others == {".txt": 3}


def test_a_fingerprint_is_of_names_labels_and_contents_wherever_they_lie(folder, tmp_path):
    for i in range(200):
        put(folder / "train" / "n01" / f"{i:03}.png", encoded(picture(4, 4, seed=i), "PNG"))
    first = open_dataset(folder)
    with mock.patch.object(Path, "read_bytes", autospec=True, side_effect=Path.read_bytes) as read:
        assert first.fingerprint == first.fingerprint and 1 < read.call_count <= 64, "cheap, and once"
    folder = folder.rename(tmp_path / "moved")
    assert open_dataset(folder).fingerprint == first.fingerprint
    assert open_dataset(folder).select([1, 0, *range(2, len(first))]).fingerprint != first.fingerprint
    for file in (folder / "train").rglob("*.png"):
        file.write_bytes(file.read_bytes() + b"\0")  # the same names and pixels, other files
    (folder / "train" / "n01" / "b.png").unlink()
    (folder / "train" / "n01" / "b.png").symlink_to("nowhere")
    assert open_dataset(folder).fingerprint != first.fingerprint


def test_which_files_of_a_class_count(folder, tmp_path):
    here = folder / "train" / "n01"
    for name in ("c.jfif", "d.JPE", "e.gif", "f.avif", ".hidden.png", "._b.png", ".ipynb_checkpoints/b.png"):
        put(here / name)
    put(tmp_path / "elsewhere" / "linked.jpg")
    (here / "part2").symlink_to(tmp_path / "elsewhere")
    for number, up in enumerate((here, folder / "train", folder)):  # loops; two of them pass by other classes
        (here / f"up{number}").symlink_to(up)
    for name in ("again", "zagain"):  # a folder that two names lead to counts once, under the first of them
        (here / name).symlink_to(here / "images")
    (folder / "train" / "n03").rename(tmp_path / "third")
    (folder / "train" / "n03").symlink_to(tmp_path / "third")
    put(folder / "val" / "stray.JPEG")
    data = open_dataset(folder)
    found = ["/".join(data.path(i).parts[-2:]) for i in range(len(data)) if data.labels[i] == 0]
    own = ["n01/b.png", "n01/c.jfif", "n01/d.JPE", "n01/e.gif"]
    assert found == ["again/a.JPEG", *own, "part2/linked.jpg"]
    assert (data.labels == 2).sum() == 2 and data.others == {".txt": 3, ".avif": 1}
    loader = make_loader(DataConfig(name=str(folder), image_size=8), seed=0, global_batch_size=2)
    assert loader.passed_over == "train: 3 .txt, 1 .avif; val: 3 .txt, 1 .jpeg beside the class folders"
    (folder / "train" / "n04").symlink_to(folder / "train")
    assert "n04 holds no images" in refusal(open_dataset, folder)


def test_accents_and_bytes_that_are_no_text_in_names(folder, tmp_path):
    for split, form in (("train", "NFC"), ("val", "NFD")):
        (folder / split / "n02").rename(folder / split / unicodedata.normalize(form, "café"))
    data = open_dataset(folder, "val")
    assert data.classes == open_dataset(folder).classes == ("café", "n01", "n03")
    assert data.labels.tolist() == [0, 0, 1, 1, 2, 2] and data[0][1] == 0
    put(folder / "train" / unicodedata.normalize("NFD", "café") / "a.png")
    assert "in two ways" in refusal(open_dataset, folder, "val")
    other = tmp_path / "other"
    for split in ("train", "val"):
        put(other / split / os.fsdecode(b"caf\xe9") / os.fsdecode(b"\xff.JPEG"))
    data = open_dataset(other)
    assert data[0][1] == 0 and data.key(0).endswith("\udcff.JPEG") and len(data.fingerprint) == 64


def test_folders_and_files_that_cannot_be_used_are_named(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(folder.parent))
    assert len(open_dataset("~/tiny")) == 6
    assert "'no-such'" in refusal(open_dataset, "no-such")
    for address in ("https://host/x", Path("https://host/x")):
        assert refusal(open_dataset, address).startswith("https://host/x is an address")
    assert "http://x is an address" in refusal(open_dataset, "tiny-imagenet", root="http://x")
    assert "folders: train, val" in refusal(open_dataset, folder, "test")
    (folder / "bare" / "train").mkdir(parents=True)
    assert "no class folders" in refusal(open_dataset, folder / "bare")
    for i in range(3):
        put(folder / "bare" / "train" / "n01" / f"{i}.JPEG")
        put(folder / "bare" / "val" / f"{i}.JPEG")
    words = refusal(open_dataset, folder / "bare", "val")
    assert "val holds 3 images and no class folders: move each into" in words
    (folder / "bare" / "val" / "n01").mkdir()
    assert "n01 holds no images" in (words := refusal(open_dataset, folder / "bare", "val"))
    assert "3 images lie beside it" in words
    (folder / "val" / "n04").mkdir()
    assert "n04" in refusal(open_dataset, folder, "val")
    (folder / "val" / "n04").rmdir()
    (folder / "val" / "n02").rename(tmp_path / "elsewhere")
    assert refusal(open_dataset, folder, "val").startswith(str(folder / "val" / "n02"))
    file = folder / "train" / "n02" / "b.png"
    file.write_bytes(BROKEN["PNG cut off"])
    data = open_dataset(folder)
    assert refusal(load_tensors, data, 8).startswith(str(file))
    assert data[0][0].shape == (3, 8, 10)  # the others still load
    assert "6 images of 10,000,000 x" in refusal(load_tensors, data, 10**7)
    with mock.patch("os.scandir", side_effect=PermissionError(13, "not allowed", "n01/images")):
        assert "n01/images cannot be read" in refusal(open_dataset, folder)  # and not a part for the whole


def test_tensors_hold_the_pixels_and_their_fingerprint(folder):
    put(folder / "train" / "n01" / "b.png", encoded(picture(61, 45), "PNG"))
    data = open_dataset(folder)
    exact = load_tensors(data.select([2]), 8)
    assert exact.images.shape == (1, 3, 8, 8) and exact.images.dtype == torch.uint8
    assert torch.equal(exact.images[0], data[2][0][:, :, 1:9]), "only the centre is cut out"
    for size in (7, 50):
        large = transforms.resize(Image.open(data.path(0)), size, transforms.InterpolationMode.BICUBIC)
        expected = transforms.pil_to_tensor(transforms.center_crop(large, [size, size]))
        found = load_tensors(data.select([0]), size).images[0]
        assert (found.int() - expected.int()).abs().max() <= 1
    assert exact.labels.tolist() == [1] and exact.classes == data.classes
    assert exact.fingerprint == load_tensors(data.select([2]), 8).fingerprint
    others = [load_tensors(data.select([4]), 8), load_tensors(data.select([2]), 4)]
    assert len({exact.fingerprint, *(o.fingerprint for o in others)}) == 3


def test_tiny_imagenet_is_read_as_published_and_with_folders(folder, tmp_path):
    tiny = folder.rename(tmp_path / "tiny-imagenet-200")
    assert open_dataset("tiny-imagenet", "val", root=tmp_path).labels.tolist() == [0, 0, 1, 1, 2, 2]
    (tiny / "val").rename(tmp_path / "unused")
    here, names = tiny / "val", ("n02", "n03", "n01")
    for i in range(3):
        put(here / "images" / f"val_{i}.JPEG", encoded(picture(8, 10, seed=i)))
    lines = [f"val_{i}.JPEG\t{wnid}\t0\t32\t44\t62\n" for i, wnid in enumerate(names)]
    put(here / "val_annotations.txt", "".join(lines).encode())
    data = open_dataset("tiny-imagenet", "val", root=tmp_path)
    assert data.classes == open_dataset("tiny-imagenet", root=tmp_path).classes == ("n01", "n02", "n03")
    assert data.labels.tolist() == [1, 2, 0] and data[1][0].shape == (3, 8, 10)
    assert "no folder 'test'" in refusal(open_dataset, "tiny-imagenet", "test", root=tmp_path)
    for name in ("extra.JPEG", "extra.txt", "._val_0.JPEG", ".hidden/x.JPEG"):
        put(here / "images" / name)
    put(here / "val_annotations.txt", "\ufeff".encode() + "".join(lines).replace("\n", "\r\n").encode())
    spreadsheet = open_dataset("tiny-imagenet", "val", root=tmp_path)
    assert spreadsheet.fingerprint == data.fingerprint and spreadsheet.others == {".jpeg": 1, ".txt": 1}
    put(here / "val_annotations.txt", b"val_0.JPEG\n")
    assert "val_0.JPEG or its class" in refusal(open_dataset, "tiny-imagenet", "val", root=tmp_path)
    put(here / "val_annotations.txt", "".join(lines).encode())
    (here / "images" / "val_1.JPEG").unlink()
    assert "val_1.JPEG" in refusal(open_dataset, "tiny-imagenet", "val", root=tmp_path)
    put(here / "val_annotations.txt", b"val_0.JPEG\tn09\t0\t0\t1\t1\n")
    assert "val_0.JPEG or its class" in refusal(open_dataset, "tiny-imagenet", "val", root=tmp_path)


def test_missing_data_name_the_folder_to_fill_and_a_download_is_moved_in_whole(tmp_path, monkeypatch, folder):
    fail = mock.Mock(side_effect=OSError("no route to host"))
    monkeypatch.setattr("torchvision.datasets.utils._urlretrieve", fail)
    monkeypatch.setattr("torchvision.datasets.utils.urllib.request.urlopen", fail)
    for name, place in datasets.NAMED.items():
        assert str(tmp_path / "new" / place) in refusal(open_dataset, name, root=tmp_path / "new")
    assert [path.name for path in tmp_path.iterdir()] == [folder.name]

    def bring(url, aside, md5):
        assert (url, len(md5)) == (datasets.TINY_IMAGENET, 32)
        folder.rename(Path(aside) / "tiny-imagenet-200")

    monkeypatch.setattr("torchvision.datasets.utils.download_and_extract_archive", bring)
    assert len(open_dataset("tiny-imagenet", root=tmp_path / "images")) == 6
    assert [p.name for p in (tmp_path / "images").iterdir()] == ["tiny-imagenet-200"]
