"""Odd images are packed and counted, broken ones refused by name; an archive is not trusted."""

import json
import os
import struct
import tarfile
import zlib

import pytest
from small_imagenet import (
    CLASSES,
    TRAIN_IMAGES,
    archives,
    encoded,
    folders,
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

from cpvt.data import datasets, examine
from cpvt.data.datasets import Shards
from cpvt.data.examine import Shrink
from cpvt.data.sources import TRAIN, VAL, make_key


@pytest.fixture
def folder(tmp_path):
    folders(tmp_path / "source")
    return tmp_path / "source"


@pytest.fixture
def archive(tmp_path):
    archives(tmp_path / "source")
    return tmp_path / "source"


def png(width, height, depth=8, colour=2, pixels=b""):
    """A PNG by hand: Pillow would not write these."""

    def chunk(name, content):
        return (
            struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))
        )

    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(pixels))
        + chunk(b"IEND", b"")
    )


ODD = {
    "png.JPEG": (encoded(picture(1), "PNG"), "PNG named JPEG"),
    "cmyk.JPEG": (encoded(picture(1, mode="CMYK")), "JPEG CMYK"),
    "grey.JPEG": (encoded(picture(1, mode="L")), "JPEG grey"),
    "progressive.JPEG": (encoded(picture(1), progressive=True), "JPEG progressive"),
    "turned.JPEG": (encoded(picture(1), exif=rotated()), "JPEG turned by EXIF"),
    "damaged_exif.JPEG": (encoded(picture(1), dpi=(72, 72), exif=b"Exif\0\0no TIFF"), "JPEG"),
    "deep.png": (png(2, 1, 16, 0, b"\0\1\2\3\4"), "PNG grey 16-bit"),
    "deep_colour.png": (png(1, 1, 16, 2, b"\0" + bytes(6)), "PNG 16-bit"),
    "one.JPEG": (encoded(picture(1, 1, 1)), "JPEG"),
    "palette.png": (encoded(picture(1).quantize(16), "PNG"), "PNG palette"),
}
BROKEN = {
    "cut.JPEG": (encoded(picture(1, 200, 200))[:9000], "cannot be decoded (image file is truncated"),
    "empty.JPEG": (b"", "empty"),
    "text.JPEG": (b"<html>not found</html>", "in none of the formats JPEG, PNG"),
    "bomb.png": (png(60000, 60000), "exceeds limit of 178956970 pixels"),
    "no_pixels.png": (png(4, 4), "cannot be decoded ("),
    "program.JPEG": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "in none of the formats JPEG"),
}


@pytest.mark.parametrize("short_side", [0, 16])
def test_odd_images_are_packed_and_counted_by_kind(folder, tmp_path, short_side):
    for name, (content, _) in ODD.items():
        put(folder / "train" / CLASSES[1] / name, content)
    (report,), said = run(folder, tmp_path / "out", "train", shrink=Shrink(short_side))
    assert report.about["images"] == TRAIN_IMAGES + len(ODD) and not report.about["refused"]
    expected = {"JPEG": TRAIN_IMAGES}
    for _, kind in ODD.values():
        expected[kind] = expected.get(kind, 0) + 1
    assert report.about["kinds"] == expected and "1 JPEG CMYK" in said
    data = Shards(tmp_path / "out" / "train")
    for i in range(len(data)):
        image, _ = data[i]
        assert [image.height, image.width] == data.sizes[i].tolist()  # EXIF turns nothing
    if not short_side:
        (tar_file,) = (tmp_path / "out" / "train").glob("*.tar")
        with tarfile.open(tar_file) as packed:
            assert f"{CLASSES[1]}/png.png" in packed.getnames()  # by what it is, not by what it was called


def test_broken_images_are_refused_by_name_and_the_rest_is_packed(folder, tmp_path):
    for name, (content, _) in BROKEN.items():
        put(folder / "train" / CLASSES[2] / name, content)
    os.mkfifo(folder / "train" / CLASSES[2] / "pipe.JPEG")
    (report,), said = run(folder, tmp_path / "out", "train", workers=2)
    found = refused(report)
    assert report.about["images"] == TRAIN_IMAGES and set(found) == {*BROKEN, "pipe.JPEG"}
    for name, (_, reason) in BROKEN.items():
        assert reason in found[name], found[name]
        assert f"{CLASSES[2]}/{name}: {found[name]}" in said
    assert found["pipe.JPEG"] == "not a plain file" and f"refused {len(found)}:" in said


def test_a_report_names_twenty_and_the_index_all(folder, tmp_path):
    for i in range(23):
        put(folder / "train" / CLASSES[0] / f"empty_{i:02}.JPEG", b"")
    (report,), said = run(folder, tmp_path / "out", "train")
    assert said.count(": empty") == 20 and "refused 23:" in said and "and 3 more, all in index.json" in said
    about = json.loads((tmp_path / "out" / "train" / "index.json").read_text())
    assert len(about["refused"]) == 23


def test_a_file_that_may_not_be_read_is_refused(folder, tmp_path, monkeypatch):
    def guarded(path, *args):
        if str(path).endswith(f"{CLASSES[0]}_1.JPEG"):
            raise PermissionError(13, "Permission denied", path)
        return open(path, *args)

    monkeypatch.setattr(examine, "open", guarded, raising=False)  # root may read whatever the mode says
    (report,), _ = run(folder, tmp_path / "out", "train")
    assert refused(report) == {f"{CLASSES[0]}_1.JPEG": "cannot be read (Permission denied)"}


def test_a_folder_that_may_not_be_read_is_an_error(folder, tmp_path, monkeypatch):
    def closed(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(datasets, "_folders", closed)
    message = refusal(run, folder, tmp_path / "out", "train")
    assert f"cannot be read ({folder / 'train'}: Permission denied)" in message


def test_a_class_without_an_image_is_an_error(folder, tmp_path):
    for path in sorted((folder / "train" / CLASSES[1]).iterdir()):
        path.write_bytes(b"")
    message = refusal(run, folder, tmp_path / "out", "train", expect="any")
    assert f"1 of 3 classes have no image (the first: {CLASSES[1]})" in message
    for path in sorted((folder / "train" / CLASSES[1]).iterdir()):
        path.unlink()
    assert f"{CLASSES[1]} holds no images" in refusal(run, folder, tmp_path / "out", "train")
    assert not (tmp_path / "out").exists()


def test_a_name_comes_once_in_a_class(folder, tmp_path):
    name = f"{CLASSES[0]}_0"
    put(folder / "train" / CLASSES[0] / f"{name}.png", encoded(picture(7), "PNG"))
    put(folder / "train" / CLASSES[1] / f"{name}.JPEG", encoded(picture(7)))  # another class
    (report,), _ = run(folder, tmp_path / "out", "train")
    assert refused(report) == {f"{name}.png": "its class has an image of this name already"}
    assert report.about["images"] == TRAIN_IMAGES + 1


def test_keys_suit_webdataset_and_stay_apart():
    assert make_key("n01", "images/a_1") == "n01/images/a_1"
    odd = [
        make_key("n01", stem) for stem in ("a.b", "a_b", "a%2Eb", "é", "\udcff", "a b", "x" * 300, "x" * 301)
    ]
    assert len(set(odd)) == len(odd) and all(
        "." not in key and key.isascii() and len(key) <= 90 for key in odd
    )


# Archives not to be trusted


def test_entries_that_climb_out_are_refused_by_name(archive, tmp_path):
    good = next(iter(train_images().values()))
    wicked = [("../x.JPEG", good), ("/etc/x.JPEG", good), ("a/../../x.JPEG", good)]
    odd = {"link.JPEG": tarfile.SYMTYPE, "hard.JPEG": tarfile.LNKTYPE, "null.JPEG": tarfile.CHRTYPE}
    members = [*wicked, *((name, b"") for name in odd), ("notes.txt", b"text"), ("fine.JPEG", good)]
    outer = [(f"{wnid}.tar", tar([(f"{wnid}_0.JPEG", good)])) for wnid in CLASSES[1:]]
    outer += [(f"{CLASSES[0]}.tar", tar(members, **odd)), ("../n00000002.tar", tar([("y.JPEG", good)]))]
    outer += [("n00000007.tar", tar([("z.JPEG", good)])), ("folder", b"")]
    put(archive / TRAIN, tar(outer, folder=tarfile.DIRTYPE))
    (report,), _ = run(archive, tmp_path / "out", "train", expect="any")
    assert dict(report.about["refused"]) == {
        f"{TRAIN}/{CLASSES[0]}.tar/../x.JPEG": "climbs out of its folder",
        f"{TRAIN}/{CLASSES[0]}.tar//etc/x.JPEG": "climbs out of its folder",
        f"{TRAIN}/{CLASSES[0]}.tar/a/../../x.JPEG": "climbs out of its folder",
        f"{TRAIN}/{CLASSES[0]}.tar/link.JPEG": "a link",
        f"{TRAIN}/{CLASSES[0]}.tar/hard.JPEG": "a link",
        f"{TRAIN}/{CLASSES[0]}.tar/null.JPEG": "a device",
        f"{TRAIN}/{CLASSES[0]}.tar/notes.txt": "not named as an image",
        f"{TRAIN}/../n00000002.tar": "climbs out of its folder",
        f"{TRAIN}/n00000007.tar": "not the archive of a class",
    }
    assert report.about["images"] == 3 and not list(tmp_path.parent.glob("x.JPEG"))


@pytest.mark.parametrize("split, name", [("train", TRAIN), ("val", VAL)])
@pytest.mark.parametrize("damage", ["cut in an image", "cut between", "a header", "text"])
def test_a_damaged_archive_is_an_error_and_not_a_shorter_one(archive, tmp_path, split, name, damage):
    content = (archive / name).read_bytes()
    with tarfile.open(archive / name) as whole:
        last = whole.getmembers()[-1]
    header = last.offset
    damaged = {
        "cut in an image": content[: last.offset_data + 10],
        "cut between": content[:header],
        "a header": content[:header] + b"\x01" * 512 + content[header + 512 :],
        "text": b"<html>not found</html>" * 100,
    }
    put(archive / name, damaged[damage])
    message = refusal(run, archive, tmp_path / "out", split, expect="any")
    assert name in message and "fetch it again" in message


def test_a_damaged_class_inside_a_whole_archive_is_named(archive, tmp_path):
    images = [(f"{i}.JPEG", encoded(picture(i))) for i in range(3)]
    inner = [(f"{wnid}.tar", tar(images)) for wnid in CLASSES]
    inner[1] = (inner[1][0], inner[1][1][:3000])
    put(archive / TRAIN, tar(inner))
    assert f"{TRAIN}/{CLASSES[1]}.tar is damaged" in refusal(run, archive, tmp_path / "out", "train")


def test_validation_images_without_a_line_are_refused(archive, tmp_path):
    images = [(name, content) for (_, name), content in val_images().items()]
    more = [("ILSVRC2012_val_00000005.JPEG", images[0][1]), ("photo.JPEG", images[0][1])]
    put(archive / VAL, tar([more[0], *images, more[1]]))
    (report,), _ = run(archive, tmp_path / "out", "val", expect="any")
    assert set(refused(report)) == {name for name, _ in more}
    assert Shards(tmp_path / "out" / "val").labels.tolist() == [0, 2, 2, 1]
