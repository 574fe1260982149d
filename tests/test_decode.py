"""Every kind of image file is decoded as the reference decodes it, or replaced and named; none ends a run."""

import os
import struct

import numpy
import pytest
import torch
from encoded import BROKEN, ODD, PLAIN, RGB, Folder, encoded, exif, picture, plain_images, png, reference
from PIL import Image
from torch.utils.data import DataLoader

from cpvt.data import decode as module
from cpvt.data.decode import (
    ATTEMPTS,
    GREY,
    MAX_PIXELS,
    DecodeError,
    Decoder,
    Reader,
    bisect,
    decode_cpu,
    for_gpu,
    replacement,
)
from cpvt.data.header import EXIF, Header, hide_exif, read_header

torchcodec = pytest.mark.skipif(module.decode_jpeg is None, reason="torchcodec cannot be loaded")


# What a header says


@pytest.mark.parametrize("subsampling", PLAIN)
def test_header_of_a_plain_jpeg(subsampling):
    header = read_header(PLAIN[subsampling])
    assert (header.kind, header.height, header.width, header.bits) == ("jpeg", 45, 61, 8)
    assert header.subsampling == subsampling and header.baseline and header.whole and header.exif is None
    assert header.components == (1 if subsampling == "4:0:0" else 3)
    assert for_gpu(header)


@pytest.mark.parametrize("kind", ODD)
def test_what_is_not_plain_does_not_go_to_the_gpu(kind):
    header = read_header(ODD[kind])
    assert not for_gpu(header)
    if header.kind != "webp":
        assert (header.height, header.width) == (45, 61)


def test_headers_of_odd_jpegs():
    assert not read_header(ODD["progressive"]).baseline
    assert (read_header(ODD["cmyk"]).colour, read_header(ODD["cmyk"]).components) == ("cmyk", 4)
    assert read_header(ODD["stored as RGB"]).colour == "rgb"
    assert read_header(ODD["PNG named JPEG"]).kind == "png"
    jpeg = PLAIN["4:4:4"]
    frame = jpeg.index(b"\xff\xc0")
    twelve = jpeg[: frame + 4] + b"\x0c" + jpeg[frame + 5 :]
    assert read_header(twelve).bits == 12 and not for_gpu(read_header(twelve))
    odd = jpeg[: frame + 11] + b"\x31" + jpeg[frame + 12 :]  # luma three across
    assert read_header(odd).subsampling == "other" and not for_gpu(read_header(odd))
    unmarked = bytearray(jpeg)
    unmarked[6:10] = b"none"  # no JFIF, no Adobe: the components' names decide
    assert read_header(bytes(unmarked)).colour == "ycbcr"
    for number, name in enumerate(b"RGB"):
        unmarked[frame + 10 + 3 * number] = name
    assert read_header(bytes(unmarked)).colour == "rgb"


@pytest.mark.parametrize("kind", BROKEN)
def test_broken_files_do_not_go_to_the_gpu(kind):
    assert not for_gpu(read_header(BROKEN[kind]))


def test_only_a_scan_that_is_ended_is_whole():
    jpeg = PLAIN["4:2:0"]
    assert read_header(jpeg + b"\0" * 5000).whole, "padding behind the end does no harm"
    assert not read_header(jpeg[:-2]).whole
    thumbnail = b"\xff\xe1" + struct.pack(">H", 2 + 6 + len(jpeg)) + EXIF + jpeg
    inside = jpeg[:2] + thumbnail + jpeg[2:-2]
    assert b"\xff\xd9" in inside and not read_header(inside).whole, "a thumbnail's end is not the image's"


def test_a_header_is_read_from_any_bytes():
    generator = numpy.random.default_rng(0)
    for data in [*PLAIN.values(), *ODD.values()]:
        for cut in range(0, len(data), 7):
            assert isinstance(read_header(data[:cut]), Header)
        for _ in range(50):
            noisy = bytearray(data)
            for place in generator.integers(0, min(len(data), 700), 20):
                noisy[place] = generator.integers(256)
            assert isinstance(read_header(bytes(noisy)), Header)


# One image on the CPU


@pytest.mark.parametrize("kind", [*PLAIN, *ODD])
def test_pixels_are_the_references(kind):
    data = (PLAIN | ODD)[kind]
    image = decode_cpu(data)
    assert image.dtype == torch.uint8 and image.shape == (3, 45, 61)
    assert torch.equal(image, reference(data))


def test_one_pixel_is_an_image():
    for data in (encoded(picture(1, 1)), encoded(picture(1, 1), "PNG"), encoded(picture(1, 1, "L"))):
        assert torch.equal(decode_cpu(data), reference(data)) and decode_cpu(data).shape == (3, 1, 1)


def test_sixteen_bits_lose_the_lower_byte():
    values = numpy.array([[0, 255, 256, 1000, 32768, 65535]], dtype=numpy.uint16)
    grey = encoded(Image.fromarray(values), "PNG")
    assert decode_cpu(grey)[0].tolist() == [[0, 0, 1, 3, 128, 255]]
    assert reference(grey)[0].tolist() == [[0, 255, 255, 255, 255, 255]], "Pillow cuts off at 255"
    rows = b"\0" + b"".join(struct.pack(">HHH", v, v, v) for v in values[0])
    colour = png(6, 1, 16, 2, rows)
    assert torch.equal(decode_cpu(colour), decode_cpu(grey)) and torch.equal(
        decode_cpu(colour), reference(colour)
    )


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_rotation_by_exif_is_ignored(orientation, mode):
    data = encoded(picture(mode=mode), exif=exif(orientation))
    header = read_header(data)
    assert data[header.exif : header.exif + 6] == EXIF and for_gpu(header)
    assert torch.equal(decode_cpu(data), reference(data))
    assert decode_cpu(data).shape == (3, 45, 61)


@torchcodec
def test_without_hiding_exif_the_decoder_would_rotate():
    data = encoded(RGB, exif=exif(6))
    assert module.decode_jpeg(data).shape == (3, 61, 45)
    hidden = hide_exif(data, read_header(data))
    assert module.decode_jpeg(bytes(hidden)).shape == (3, 45, 61)
    assert sum(a != b for a, b in zip(hidden, data, strict=True)) == 1 and data == encoded(RGB, exif=exif(6))
    assert hide_exif(PLAIN["4:4:4"], read_header(PLAIN["4:4:4"])) is PLAIN["4:4:4"]


@torchcodec
def test_both_decoders_give_the_same_pixels(monkeypatch):
    images = [encoded(picture(*size, seed=size[0]), subsampling=s) for s in (0, 1, 2) for size in
              ((1, 1), (7, 9), (16, 16), (17, 33), (200, 151))]  # fmt: skip
    fast = [decode_cpu(data) for data in images]
    monkeypatch.setattr(module, "decode_jpeg", None)
    assert all(torch.equal(a, decode_cpu(data)) for a, data in zip(fast, images, strict=True))


@pytest.mark.parametrize("kind", BROKEN)
def test_broken_files_are_refused_with_a_reason(kind):
    with pytest.raises(DecodeError) as caught:
        decode_cpu(BROKEN[kind])
    assert 3 < len(str(caught.value)) < 120 and "\n" not in str(caught.value)


def test_a_bomb_is_refused_by_its_header():
    with pytest.raises(DecodeError, match=f"60000 x 60000 pixels; more than {MAX_PIXELS}"):
        decode_cpu(BROKEN["JPEG bomb"])
    tiff = encoded(Image.new("L", (20000, 5000)), "TIFF", compression="tiff_lzw")
    assert read_header(tiff).height == 0, "the size of a TIFF stands deeper in the file"
    with pytest.warns(Image.DecompressionBombWarning), pytest.raises(DecodeError, match="20000 x 5000"):
        decode_cpu(tiff)


def test_noise_in_a_file_never_raises_anything_else():
    generator = numpy.random.default_rng(1)
    for data in [*PLAIN.values(), *ODD.values()]:
        for _ in range(15):
            noisy = bytearray(data)
            for place in generator.integers(0, len(data), 10):
                noisy[place] = generator.integers(256)
            try:
                assert decode_cpu(bytes(noisy)).dtype == torch.uint8
            except DecodeError:
                pass


# Replacement


def test_replacement_is_a_fixed_function_and_never_the_image_itself():
    assert [replacement(5, attempt, 1000) for attempt in (1, 2, 3)] == [138, 279, 937]
    chosen = torch.tensor([[replacement(i, a, 50) for a in range(1, 9)] for i in range(50)])
    assert chosen.min() >= 0 and chosen.max() < 50
    assert (chosen != torch.arange(50)[:, None]).all()
    assert chosen.flatten().bincount().max() <= 20, "8 in the mean: none stands in for many"
    assert replacement(0, 3, 1) == 0


@pytest.mark.parametrize("device_decodes", [False, True])
def test_what_cannot_be_read_is_replaced_with_its_label_and_named(device_decodes):
    good = plain_images(20)
    bad = [*BROKEN.values(), None]
    source = Folder(*good, *bad)
    order = list(range(len(source)))
    fetched = Reader(source, device_decodes)[order]
    decoded = Decoder("cpu")(fetched, source)
    assert decoded.faults == fetched.faults and decoded.refused == 0
    assert len({fault.index for fault in decoded.faults}) == len(bad)
    for i, (image, label) in enumerate(zip(decoded.images, decoded.labels, strict=True)):
        came = fetched.taken[i]
        assert label == 10 * came and torch.equal(image, decode_cpu(source.images[came]))
        assert came == i if i < len(good) else came < len(good)
    for fault in decoded.faults:
        assert fault.key == f"image {fault.index}" and fault.reason
        assert fault.replaced_by == fetched.taken[fault.index] or fault.index in {
            replacement(i, a, len(source)) for i in order for a in range(1, ATTEMPTS + 1)
        }
    assert "Permission denied" in {fault.reason for fault in decoded.faults}
    assert fetched.bytes_read > sum(map(len, good))
    assert [span[4] for span in fetched.spans] == [device_decodes] * len(source)


def test_where_nothing_can_be_read_a_grey_image_keeps_the_label():
    source = Folder(*[None] * 30)
    fetched = Reader(source, True)[[7]]
    decoded = Decoder("cpu")(fetched, source)
    assert (decoded.images[0] == GREY).all() and decoded.labels.tolist() == [70]
    assert len(decoded.faults) == ATTEMPTS + 1 and {f.replaced_by for f in decoded.faults} == {-1}


def test_an_unreadable_file_of_a_file_system_is_a_fault(tmp_path):
    path = tmp_path / "closed.jpg"
    path.write_bytes(PLAIN["4:4:4"])
    path.chmod(0)
    if os.access(path, os.R_OK):
        path.unlink()  # who may read everything still cannot read what is gone

    class Files(Folder):
        def read(self, i):
            return path.read_bytes() if i == 0 else super().read(i)

    fetched = Reader(Files(None, PLAIN["4:2:0"]), False)[[0]]
    assert fetched.taken == [1] and fetched.labels.tolist() == [10]
    assert fetched.faults[0].reason in ("Permission denied", "No such file or directory")


def test_batches_are_the_same_for_any_number_of_workers():
    source = Folder(*plain_images(6), BROKEN["empty"], None, ODD["cmyk"])
    lists = [[0, 6, 2], [8, 7], [5, 4, 3, 1]]
    batches = []
    for workers in (0, 2):
        loader = DataLoader(Reader(source, True), batch_size=None, sampler=lists, num_workers=workers)
        batches.append(list(loader))
    for alone, beside in zip(*batches, strict=True):
        assert torch.equal(alone.data, beside.data) and torch.equal(alone.labels, beside.labels)
        assert (alone.spans, alone.faults, alone.taken) == (beside.spans, beside.faults, beside.taken)
        assert alone.indices == beside.indices and alone.bytes_read == beside.bytes_read
    assert [batch.spans[0][4] for batch in batches[0]] == [True, False, True], "CMYK comes decoded"


# A batch that fails


@pytest.mark.parametrize("bad", [(), (0,), (13,), (15,), (3, 4), range(16)])
def test_bisection_isolates_the_bad_items(bad):
    calls = []

    def decode(batch):
        calls.append(len(batch))
        if any(int(item) in bad for item in batch):
            raise RuntimeError("nvJPEG: batch failed")
        return [10 * item for item in batch]

    results = bisect(decode, list(torch.arange(16)))
    assert [isinstance(r, RuntimeError) for r in results] == [i in bad for i in range(16)]
    assert all(r == 10 * i for i, r in enumerate(results) if i not in bad)
    assert len(calls) <= 1 + 2 * 4 * len(bad)
    assert bisect(decode, []) == []


def test_an_exhausted_device_is_not_blamed_on_the_images():
    def decode(batch):
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(torch.OutOfMemoryError):
        bisect(decode, [torch.zeros(1)] * 4)


def test_what_the_batch_decoder_refuses_goes_to_the_cpu_and_then_is_replaced():
    images = plain_images(12)
    table = images[4].index(b"\xff\xc4") + 5
    images[4] = images[4][:table] + b"\xff" * 16 + images[4][table + 16 :]  # impossible Huffman codes
    assert for_gpu(read_header(images[4])), "the header does not tell"
    source = Folder(*images)
    decoder = Decoder("cpu")
    plain = decoder.decode

    def decode(batch):
        if any(
            torch.equal(item, torch.frombuffer(bytearray(images[9]), dtype=torch.uint8)) for item in batch
        ):
            raise RuntimeError("nvJPEG: not supported")
        return plain(batch)

    decoder.decode = decode
    decoded = decoder(Reader(source, True)[range(12)], source)
    assert decoded.refused == 1, "the CPU decodes number 9"
    assert torch.equal(decoded.images[9], decode_cpu(images[9])) and decoded.labels[9] == 90
    assert [fault.index for fault in decoded.faults] == [4]
    other = decoded.faults[0].replaced_by
    assert other == replacement(4, 1, 12) and decoded.labels[4] == 10 * other
    assert torch.equal(decoded.images[4], decode_cpu(images[other]))


def test_an_image_of_another_size_than_its_header_says_is_decoded_again():
    source = Folder(*plain_images(3))
    decoder = Decoder("cpu")
    decoder.decode = lambda batch: [torch.zeros(3, 8, 8, dtype=torch.uint8) for _ in batch]
    decoded = decoder(Reader(source, True)[[0, 1]], source)
    assert decoded.refused == 2 and torch.equal(decoded.images[1], decode_cpu(source.images[1]))
