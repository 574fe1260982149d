"""Every kind of image file is decoded as the reference decodes it, or named and shown as grey; none ends a run."""

import contextlib
import io
import os
import struct
from collections import namedtuple
from functools import partial
from io import BytesIO
from unittest import mock

import numpy
import pytest
import torch
import torchvision
from encoded import BROKEN, ODD, PLAIN, SIXTEEN, Folder, encoded, photos, picture, png, reference, refusal
from helpers import needs_gpu
from PIL import Image
from torch.utils.data import DataLoader

from cpvt import proven
from cpvt.data import decode as module
from cpvt.data.decode import DecodeError, Decoder, decode_image

Request = namedtuple("Request", "indices, positions", defaults=[None])


def decoded(source, *indices, **options):
    decoder = Decoder(source, "cpu", **options)
    return decoder(decoder.reader[Request(torch.tensor(indices))])


def decode_each(batch):
    """What a GPU's decoder does, on the CPU."""
    return [decode_image(item.numpy().tobytes()) for item in batch]


def plain(data):
    with contextlib.suppress(DecodeError), module.open_image(data) as image:
        return module.plain_jpeg(data, image)


def test_the_header_sends_plain_jpegs_alone_to_a_gpu():
    for kind, data in (PLAIN | ODD | BROKEN).items():
        assert (plain(data) is not None) == (kind in PLAIN), kind
    jpeg = PLAIN["4:4:4"].replace(b"JFIF", b"none")  # no JFIF, no Adobe: the components' names decide
    frame = jpeg.index(b"\xff\xc0")

    def changed(*changes):
        copy = bytearray(jpeg)
        for place, value in changes:
            copy[frame + place] = value
        return plain(bytes(copy)) is not None

    assert changed()
    assert not changed((4, 12)), "12 bits"
    assert not changed((11, 0x31)), "luma three across"
    assert not changed((10, ord("R")), (13, ord("G")), (16, ord("B")))
    assert plain(jpeg + b"\0" * 5000), "padding behind the end does no harm"
    thumbnail = b"\xff\xe1" + struct.pack(">H", 2 + 6 + len(jpeg)) + b"Exif\0\0" + jpeg
    inside = jpeg[:2] + thumbnail + jpeg[2:-2]
    assert b"\xff\xd9" in inside and not plain(inside), "a thumbnail's end is not the image's"
    # EXIF is hidden from a decoder that would rotate.
    data, decode_jpeg = PLAIN["turned by EXIF"], module.find_jpeg_decoder()
    hidden = plain(data)
    assert sum(a != b for a, b in zip(hidden, data, strict=True)) == 1
    assert plain(PLAIN["4:4:4"]) is PLAIN["4:4:4"]
    if decode_jpeg:
        assert decode_jpeg(data).shape == (3, 61, 45) and decode_jpeg(hidden).shape == (3, 45, 61)


def test_pixels_are_the_references_and_sixteen_bits_lose_the_lower_byte():
    sizes = [encoded(picture(*size), subsampling=2) for size in ((1, 1), (7, 9), (17, 33), (200, 151))]
    for data in (*PLAIN.values(), *ODD.values(), *sizes):
        assert torch.equal(decode_image(data), reference(data)) and decode_image(data).dtype == torch.uint8
    grey = encoded(Image.fromarray(SIXTEEN), "PNG")
    assert decode_image(grey)[0].tolist() == [[0, 0, 1, 3, 128, 255]]
    assert reference(grey)[0].tolist() == [[0, 255, 255, 255, 255, 255]], "Pillow cuts off at 255"
    colour = png(6, 1, 16, 2, b"\0" + b"".join(struct.pack(">HHH", v, v, v) for v in SIXTEEN[0]))
    for data in (colour, encoded(Image.fromarray(SIXTEEN), "TIFF")):
        assert torch.equal(decode_image(data), decode_image(grey))


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_broken_files_bombs_and_what_is_no_file_are_refused_with_a_reason(tmp_path):
    for data in BROKEN.values():
        assert 3 < len(refusal(decode_image, data)) < 120
    assert "20000 x 5000, more than" in refusal(decode_image, png(20000, 5000, 8, 2, b""))
    os.mkfifo(tmp_path / "pipe.jpg")
    (tmp_path / "endless.jpg").symlink_to("/dev/zero")
    with open(tmp_path / "huge.jpg", "wb") as file:
        file.truncate(5 << 30)
    for name, reason in (("pipe", "not a regular"), ("endless", "not a regular"), ("huge", "bytes, more")):
        assert reason in refusal(module.regular, tmp_path / f"{name}.jpg")


def test_noise_in_a_file_never_raises_anything_else():
    generator = numpy.random.default_rng(1)
    for data in [*PLAIN.values(), *ODD.values()]:
        for count in range(15):
            noisy = bytearray(data)
            for place in generator.integers(0, len(data) if count % 2 else min(len(data), 700), 10):
                noisy[place] = generator.integers(256)
            plain(bytes(noisy[: generator.integers(len(data))]))
            with contextlib.suppress(DecodeError):
                assert decode_image(bytes(noisy)).dtype == torch.uint8


@pytest.mark.parametrize("decode_jpegs", [None, decode_each])
def test_what_cannot_be_read_is_grey_and_named(decode_jpegs):
    good, bad = photos(6), [*BROKEN.values(), None]
    source = Folder(*good, *bad)
    decoder = Decoder(source, "cpu", decode_jpegs=decode_jpegs)
    read = decoder.reader[Request(torch.arange(len(source)), "its positions")]
    found = decoder(read)
    assert found.request.positions == "its positions" and found.faults == read.faults and not found.refused
    assert found.targets.tolist() == [10 * i for i in range(len(source))]
    assert all(torch.equal(found.images[i], decode_image(data)) for i, data in enumerate(good))
    assert all((image == 128).all() for image in found.images[len(good) :])
    assert [fault.index for fault in found.faults] == [*range(len(good), len(source))]
    assert all(fault.key == f"image {fault.index}" and fault.reason for fault in found.faults)
    assert "Permission denied" in {fault.reason for fault in found.faults}
    assert [span[3] for span in read.spans[: len(good)]] == [decode_jpegs is not None] * len(good)


@pytest.mark.parametrize("keep_jpegs", [False, True])
def test_a_micro_batch_holds_so_many_pixels_and_no_more(monkeypatch, keep_jpegs):
    """What is one too many is named; the micro-batch is always put together."""
    large = [encoded(Image.new("RGB", (400, 300)), kind) for kind in ("PNG", "JPEG")] * 4
    monkeypatch.setattr(module, "BATCH_BYTES", 3 * 400 * 300 * 3)
    monkeypatch.setattr(module, "BATCH_IMAGE_BYTES", 0)
    source = Folder(*large)
    reader = module.BatchReader(source, keep_jpegs)
    read, request = reader[Request(torch.arange(8))], Request(torch.arange(2))
    assert [fault.index for fault in read.faults] == [3, 4, 5, 6, 7]
    assert all("400 x 300, and its micro-batch is full" in fault.reason for fault in read.faults)
    assert sum(3 * height * width for _, height, width, _ in read.spans) < module.BATCH_BYTES + 8 * 1024
    assert not reader[request].faults
    join = numpy.concatenate
    monkeypatch.setattr(numpy, "concatenate", mock.Mock(side_effect=[MemoryError, join([[0] * 2])]))
    read = reader[request]
    assert [fault.index for fault in read.faults] == [0, 1] and "no memory" in read.faults[0].reason
    assert read.spans == [(768, 16, 16, False)] * 2


def test_no_picture_starts_a_program(monkeypatch):
    """Pillow hands PostScript to Ghostscript, whatever a file's name says, unless it is told its formats."""
    started = []
    for name in ("subprocess.Popen", "os.system", "os.posix_spawn", "os.execv", "os.popen"):
        monkeypatch.setattr(name, lambda *_, **__: started.append(1) or 1 / 0)
    for data in (BROKEN | ODD | PLAIN).values():
        with contextlib.suppress(DecodeError):
            decode_image(data)
    assert "in none of the formats" in refusal(decode_image, BROKEN["a program"]) and not started
    with pytest.raises(ZeroDivisionError):
        Image.open(BytesIO(BROKEN["a program"])).load()
    assert started, "as it would be"


def test_what_is_read_is_the_same_for_any_number_of_workers():
    reader = module.BatchReader(Folder(*photos(6), BROKEN["empty"], None, ODD["cmyk"]), keep_from=1)
    requests = [Request(numpy.array(indices), "p") for indices in ([0, 6, 2], [8, 7], [5, 4, 3, 1])]
    alone, beside = (
        list(DataLoader(reader, batch_size=None, sampler=requests, num_workers=workers)) for workers in (0, 2)
    )
    for a, b, request in zip(alone, beside, requests, strict=True):
        assert torch.equal(a.data, b.data) and a[2:] == b[2:]
        assert b.request.positions == "p" and b.request.indices.tolist() == request.indices.tolist()
    assert [read.spans[0][3] for read in alone] == [True, False, True], "CMYK comes decoded"


@pytest.mark.parametrize("bad", [(3, 4), range(16)])
def test_bisection_isolates_the_bad_items(bad):
    calls = []

    def decode(batch):
        calls.append(len(batch))
        if any(int(item) in bad for item in batch):
            raise RuntimeError("nvJPEG: batch failed")
        return [10 * item for item in batch]

    results = module.bisect(decode, list(torch.arange(16)))
    assert [isinstance(r, RuntimeError) for r in results] == [i in bad for i in range(16)]
    assert all(r == 10 * i for i, r in enumerate(results) if i not in bad)
    assert len(calls) <= 1 + 2 * 4 * len(bad)
    with pytest.raises(torch.OutOfMemoryError):  # which is nobody's fault
        module.bisect(mock.Mock(side_effect=torch.OutOfMemoryError), [torch.zeros(1)] * 4)


def test_what_the_gpu_refuses_goes_to_the_cpu_and_then_is_grey():
    images = photos(12)
    table = images[4].index(b"\xff\xc4") + 5
    images[4] = images[4][:table] + b"\xff" * 16 + images[4][table + 16 :]  # impossible Huffman codes
    assert plain(images[4]), "the header does not tell"

    def decode(batch):
        if any(item.numpy().tobytes() == images[9] for item in batch):
            raise RuntimeError("nvJPEG: not supported")
        return decode_each(batch)

    found = decoded(Folder(*images), *range(12), decode_jpegs=decode)
    assert found.refused == 1, "the CPU decodes number 9"
    assert torch.equal(found.images[9], decode_image(images[9])) and found.targets[9] == 90
    assert [fault.index for fault in found.faults] == [4]
    assert found.targets[4] == 40 and (found.images[4] == 128).all()
    source = Folder(*photos(4))  # and an image of another size than its header says is not believed
    found = decoded(source, *range(4), decode_jpegs=lambda batch: [torch.zeros(3, 8, 8)] * 4)
    assert found.refused == 4 and torch.equal(found.images[1], decode_image(source.images[1]))


def nearest_chroma(batch):
    """A decoder that gives all pixels of a cell of chroma one colour, as a GPU's may."""
    found = []
    for item in batch:
        image = Image.open(io.BytesIO(item.numpy().tobytes()))
        (across, down), pixels = image.layer[0][1:3], numpy.array(image.convert("YCbCr"))
        (h, w), rest = pixels.shape[:2], ((0, -len(pixels) % down), (0, -pixels.shape[1] % across), (0, 0))
        cells = numpy.pad(pixels, rest, mode="edge")[::down, ::across].repeat(down, 0).repeat(across, 1)
        pixels[:, :, 1:] = cells[:h, :w, 1:]
        found.append(torch.from_numpy(numpy.array(Image.fromarray(pixels, "YCbCr").convert("RGB"))))
    return [image.permute(2, 0, 1) for image in found]


@pytest.mark.parametrize("side", module.SIDES)
def test_what_a_gpu_may_do_with_a_jpeg_and_what_it_may_not(side):
    def fault(change):
        return module.decoding_fault(lambda batch: [change(image) for image in decode_each(batch)], side)

    assert not fault(lambda image: image) and not module.decoding_fault(nearest_chroma, side)
    assert "levels" in fault(lambda image: image.roll(1, 1)), "a row too far"
    assert "levels" in fault(lambda image: image.flip(0)), "blue for red"
    assert "levels" in fault(lambda image: (image * (219 / 255) + 16).to(torch.uint8)), "another range"
    assert "levels" in fault(lambda image: torch.cat([image[:, :-8], image[:, :8]], 1)), "an edge of rubbish"
    assert "expected (3" in fault(lambda image: image.mT), "turned"


@pytest.mark.parametrize("wrong_below, least", [(0, 17), (100, 131), (10_000, 0)])
def test_a_gpu_decodes_what_it_proves_to_decode(monkeypatch, wrong_below, least):
    """Of an H200's decoder small images came out wrong; one that refuses everything is as bad as none."""

    def decode(batch):
        if wrong_below == 10_000:
            raise RuntimeError("not supported")
        return [image.roll(2, 1) if image.shape[1] < wrong_below else image for image in decode_each(batch)]

    monkeypatch.setattr(
        module, "find_jpeg_decoder", lambda device="cpu": decode if device == "cuda" else None
    )
    monkeypatch.setattr(proven, "verdicts", {})
    module.gpu_decoder.cache_clear()
    with pytest.warns(UserWarning) if wrong_below else contextlib.nullcontext() as told:
        decoder = Decoder(Folder(*photos(2), encoded(picture(140, 200)), encoded(picture(200, 140))), "cuda")
        Decoder(Folder(), "cuda")
    module.gpu_decoder.cache_clear()
    assert (decoder.decode_jpegs is decode) == bool(least) and int(decoder.reader.keep_from) == least
    spans = decoder.reader[Request(torch.arange(4))].spans
    assert [span[3] for span in spans] == [0 < least < 40] * 2 + [least > 0] * 2
    assert len(told or ()) == bool(wrong_below), "one warning"


def test_a_gpu_that_refuses_most_images_is_asked_no_more(monkeypatch):
    asked = []

    def decode(batch):
        asked.append(len(batch))
        raise RuntimeError("nvJPEG: not supported")

    monkeypatch.setattr(proven, "verdicts", {})
    decoder = Decoder(Folder(*photos(12)), "cpu", decode_jpegs=decode)
    read = decoder.reader[Request(torch.arange(12))]
    with pytest.warns(UserWarning, match="12 of 12 refused.*worker processes decode"):
        found = decoder(read)
    count = len(asked)
    again = decoder(read)  # which a worker had read before it heard of it
    assert found.refused == again.refused == 12 and not found.faults and len(asked) == count
    assert all(torch.equal(a, b) for a, b in zip(found.images, again.images, strict=True))
    loader = DataLoader(decoder.reader, batch_size=None, sampler=[Request(torch.arange(12))], num_workers=1)
    assert not any(encoded for *_, encoded in next(iter(loader)).spans)


def on_gpu(images):
    """A decoder, of torchvision where torchcodec cannot be loaded."""
    stand_in = partial(torchvision.io.decode_jpeg, mode=torchvision.io.ImageReadMode.RGB, device="cuda")
    return Decoder(Folder(*images), "cuda", decode_jpegs=module.find_jpeg_decoder("cuda") or stand_in)


@needs_gpu
@pytest.mark.parametrize("kind", PLAIN)
def test_gpu_and_cpu_differ_by_rounding_and_chroma(kind):
    """The bound: 4 grey levels in the mean over an image, and 1 where no chroma is resampled."""
    mode, subsampling = "L" if kind == "4:0:0" else "RGB", {"4:4:4": 0, "4:2:2": 1}.get(kind, 2)
    sizes = [(45, 61), (375, 500), (333, 500), (1, 1), (17, 16), (640, 480)]
    images = [encoded(picture(*s, mode, seed=n), subsampling=subsampling) for n, s in enumerate(sizes)]
    images += [PLAIN[kind], ODD["cmyk"]]  # the last comes decoded
    decoder = on_gpu(images)
    found = decoder(decoder.reader[Request(torch.arange(len(images)))])
    apart = [(a.cpu().int() - decode_image(b).int()).abs() for a, b in zip(found.images, images, strict=True)]
    worst, mean = max(a.max().item() for a in apart), max(a.float().mean().item() for a in apart)
    assert not found.faults and all(image.is_cuda for image in found.images)
    assert (mean <= 1 and worst <= 4) if kind in ("4:4:4", "4:0:0") else mean <= 4, (worst, mean)


@needs_gpu
@pytest.mark.parametrize("repeat", range(20))
def test_decoding_ahead_spares_what_queued_kernels_still_read(repeat):
    """Blocks freed while kernels that read them wait in the queue are not written by the next decode."""
    decoder = on_gpu([encoded(picture(375, 500, seed=i)) for i in range(64)])
    read, ahead = (decoder.reader[Request(torch.arange(64)[half])] for half in (slice(32), slice(32, 64)))
    want = [int(image.long().sum()) for image in decoder(read).images]
    images = decoder(read).images
    torch.cuda._sleep(200_000_000)  # about 0.1 s in which the sums below wait
    sums = [image.long().sum() for image in images]
    del images
    decoder(ahead)
    assert [int(s) for s in sums] == want
