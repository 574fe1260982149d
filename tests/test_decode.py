"""Every kind of image file is decoded as the reference decodes it, or replaced and named; none ends a run."""

import os
import struct
from collections import namedtuple
from functools import partial
from unittest.mock import Mock

import numpy
import pytest
import torch
import torchvision
from encoded import (
    BROKEN,
    ODD,
    PLAIN,
    SIXTEEN,
    Folder,
    encoded,
    exif,
    picture,
    plain_images,
    png,
    reference,
    refusal,
)
from PIL import Image
from torch.utils.data import DataLoader

from cpvt.data.decode import (
    ATTEMPTS,
    GREY,
    MAX_PIXELS,
    ChunkReader,
    DecodeError,
    Decoder,
    bisect,
    decode_image,
    find_gpu_decoder,
    find_jpeg_decoder,
    open_image,
    plain_jpeg,
    read_file,
    replacement,
)

Request = namedtuple("Request", "indices, positions", defaults=[None])
gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
torchcodec = pytest.mark.skipif(not find_jpeg_decoder(), reason="torchcodec cannot be loaded")


def ask(*indices):
    return Request(torch.tensor(indices))


def decode_each(batch):
    """What a GPU's decoder does, on the CPU."""
    return [decode_image(item.numpy().tobytes()) for item in batch]


def plain(data):
    try:
        with open_image(data) as image:
            return plain_jpeg(data, image)
    except DecodeError:
        return None


# What a header says


@pytest.mark.parametrize("kind", [*PLAIN, *ODD, *BROKEN])
def test_the_header_sends_plain_jpegs_alone_to_a_gpu(kind):
    assert (plain((PLAIN | ODD | BROKEN)[kind]) is not None) == (kind in PLAIN)


def test_headers_of_odd_jpegs():
    jpeg = bytearray(PLAIN["4:4:4"])
    frame = jpeg.index(b"\xff\xc0")

    def changed(**places):
        copy = bytearray(jpeg)
        for place, value in places.items():
            copy[int(place[1:])] = value
        return plain(bytes(copy)) is not None

    assert not changed(**{f"_{frame + 4}": 12}), "12 bits"
    assert not changed(**{f"_{frame + 11}": 0x31}), "luma three across"
    jpeg[6:10] = b"none"  # no JFIF, no Adobe: the components' names decide
    assert changed()
    assert not changed(**{f"_{frame + 10 + 3 * i}": name for i, name in enumerate(b"RGB")})


def test_only_a_scan_that_is_ended_is_whole():
    jpeg = PLAIN["4:2:0"]
    assert plain(jpeg + b"\0" * 5000), "padding behind the end does no harm"
    thumbnail = b"\xff\xe1" + struct.pack(">H", 2 + 6 + len(jpeg)) + b"Exif\0\0" + jpeg
    inside = jpeg[:2] + thumbnail + jpeg[2:-2]
    assert b"\xff\xd9" in inside and not plain(inside), "a thumbnail's end is not the image's"


@torchcodec
def test_without_hiding_exif_the_decoder_would_rotate():
    data, decode_jpeg = PLAIN["turned by EXIF"], find_jpeg_decoder()
    assert decode_jpeg(data).shape == (3, 61, 45)
    hidden = plain(data)
    assert decode_jpeg(hidden).shape == (3, 45, 61)
    assert sum(a != b for a, b in zip(hidden, data, strict=True)) == 1
    assert plain(PLAIN["4:4:4"]) is PLAIN["4:4:4"]


# One image


@pytest.mark.parametrize("kind", [*PLAIN, *ODD])
def test_pixels_are_the_references(kind):
    data = (PLAIN | ODD)[kind]
    image = decode_image(data)
    assert image.dtype == torch.uint8 and image.shape == (3, 45, 61)
    assert torch.equal(image, reference(data))


def test_pixels_of_any_size_are_the_references():
    for size in ((1, 1), (7, 9), (16, 16), (17, 33), (200, 151)):
        for subsampling in (0, 1, 2):
            data = encoded(picture(*size, seed=size[0]), subsampling=subsampling)
            assert torch.equal(decode_image(data), reference(data))


def test_sixteen_bits_lose_the_lower_byte():
    grey = encoded(Image.fromarray(SIXTEEN), "PNG")
    assert decode_image(grey)[0].tolist() == [[0, 0, 1, 3, 128, 255]]
    assert reference(grey)[0].tolist() == [[0, 255, 255, 255, 255, 255]], "Pillow cuts off at 255"
    colour = png(6, 1, 16, 2, b"\0" + b"".join(struct.pack(">HHH", v, v, v) for v in SIXTEEN[0]))
    for data in (colour, encoded(Image.fromarray(SIXTEEN), "TIFF")):
        assert torch.equal(decode_image(data), decode_image(grey))


@pytest.mark.parametrize("kind", BROKEN)
def test_broken_files_are_refused_with_a_reason(kind):
    assert 3 < len(refusal(decode_image, BROKEN[kind])) < 120


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_a_bomb_is_refused_by_its_header():
    assert "3600000000 pixels" in refusal(decode_image, BROKEN["JPEG bomb"])
    tiff = encoded(Image.new("L", (20000, 5000)), "TIFF", compression="tiff_lzw")
    assert f"20000 x 5000, more than {MAX_PIXELS:,}" in refusal(decode_image, tiff)


def test_only_regular_files_of_a_bearable_size_are_read(tmp_path):
    os.mkfifo(tmp_path / "pipe.jpg")
    (tmp_path / "endless.jpg").symlink_to("/dev/zero")
    with open(tmp_path / "huge.jpg", "wb") as file:
        file.truncate(5 << 30)
    for name, reason in (("pipe", "not a regular"), ("endless", "not a regular"), ("huge", "bytes, more")):
        assert reason in refusal(read_file, tmp_path / f"{name}.jpg")


def test_noise_in_a_file_never_raises_anything_else():
    generator = numpy.random.default_rng(1)
    for data in [*PLAIN.values(), *ODD.values()]:
        for count in range(15):
            noisy = bytearray(data)
            for place in generator.integers(0, len(data) if count % 2 else min(len(data), 700), 10):
                noisy[place] = generator.integers(256)
            plain(bytes(noisy[: generator.integers(len(data))]))
            try:
                assert decode_image(bytes(noisy)).dtype == torch.uint8
            except DecodeError:
                pass


# Replacement


def test_replacement_is_a_fixed_function_and_never_the_image_itself():
    assert [replacement(5, attempt, 1000) for attempt in (1, 2, 3)] == [138, 279, 937]
    chosen = torch.tensor([[replacement(i, a, 50) for a in range(1, 9)] for i in range(50)])
    assert chosen.min() >= 0 and chosen.max() < 50 and (chosen != torch.arange(50)[:, None]).all()
    assert replacement(0, 3, 1) == 0


@pytest.mark.parametrize("decode_jpegs", [None, decode_each])
def test_what_cannot_be_read_is_replaced_with_its_label_and_named(decode_jpegs):
    good = plain_images(20)
    bad = [*BROKEN.values(), None]
    source = Folder(*good, *bad)
    request = ask(*range(len(source)))
    decoder = Decoder(source, "cpu", decode_jpegs=decode_jpegs)
    chunk = decoder.reader[request]
    decoded = decoder(chunk)
    assert decoded.request is chunk.request is request
    assert decoded.faults == chunk.faults and decoded.refused == 0
    assert len({fault.index for fault in decoded.faults}) == len(bad)
    for i, (image, label) in enumerate(zip(decoded.images, decoded.labels, strict=True)):
        came = chunk.taken[i]
        assert label == 10 * came and torch.equal(image, decode_image(source.images[came]))
        assert came == i if i < len(good) else came < len(good)
    for fault in decoded.faults:
        assert fault.key == f"image {fault.index}" and fault.reason
    assert "Permission denied" in {fault.reason for fault in decoded.faults}
    assert [span[4] for span in chunk.spans] == [decode_jpegs is not None] * len(source)


def test_where_nothing_can_be_read_a_grey_image_keeps_the_label():
    decoder = Decoder(Folder(*[None] * 30), "cpu")
    decoded = decoder(decoder.reader[ask(7)])
    assert (decoded.images[0] == GREY).all() and decoded.labels.tolist() == [70]
    assert len(decoded.faults) == ATTEMPTS + 1 and {f.replaced_by for f in decoded.faults} == {-1}


def test_chunks_are_the_same_for_any_number_of_workers():
    reader = ChunkReader(Folder(*plain_images(6), BROKEN["empty"], None, ODD["cmyk"]), keep_jpegs=True)
    lists = [[0, 6, 2], [8, 7], [5, 4, 3, 1]]
    requests = [Request(numpy.array(indices), "with its positions") for indices in lists]
    alone, beside = (
        list(DataLoader(reader, batch_size=None, sampler=requests, num_workers=workers)) for workers in (0, 2)
    )
    for a, b in zip(alone, beside, strict=True):
        assert torch.equal(a.data, b.data) and torch.equal(a.labels, b.labels)
        assert (a.spans, a.faults, a.taken) == (b.spans, b.faults, b.taken)
        assert b.request.positions == "with its positions"
    assert [b.request.indices.tolist() for b in beside] == lists
    assert [chunk.spans[0][4] for chunk in alone] == [True, False, True], "CMYK comes decoded"


# A chunk that fails


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
    with pytest.raises(torch.OutOfMemoryError):
        bisect(Mock(side_effect=torch.OutOfMemoryError), [torch.zeros(1)] * 4)


def test_what_the_gpu_refuses_goes_to_the_cpu_and_then_is_replaced(recwarn):
    images = plain_images(12)
    table = images[4].index(b"\xff\xc4") + 5
    images[4] = images[4][:table] + b"\xff" * 16 + images[4][table + 16 :]  # impossible Huffman codes
    assert plain(images[4]), "the header does not tell"

    def decode(batch):
        if any(item.numpy().tobytes() == images[9] for item in batch):
            raise RuntimeError("nvJPEG: not supported")
        return decode_each(batch)

    decoder = Decoder(Folder(*images), "cpu", decode_jpegs=decode)
    decoded = decoder(decoder.reader[ask(*range(12))])
    assert decoded.refused == 1, "the CPU decodes number 9"
    assert torch.equal(decoded.images[9], decode_image(images[9])) and decoded.labels[9] == 90
    assert [fault.index for fault in decoded.faults] == [4]
    other = decoded.faults[0].replaced_by
    assert other == replacement(4, 1, 12) and decoded.labels[4] == 10 * other
    assert torch.equal(decoded.images[4], decode_image(images[other]))
    assert not recwarn, "a few refusals are counted, not said"


def test_a_gpu_that_refuses_everything_is_counted_and_said_once():
    source = Folder(*plain_images(4))
    # Of another size than the header says: not believed.
    wrong = Decoder(source, "cpu", decode_jpegs=lambda batch: [torch.zeros(3, 8, 8)] * len(batch))
    with pytest.warns(UserWarning, match="all 4 JPEGs") as said:
        decoded = [wrong(wrong.reader[ask(0, 1, 2, 3)]) for _ in range(3)]
    assert len(said) == 1 and [chunk.refused for chunk in decoded] == [4, 4, 4]
    assert torch.equal(decoded[2].images[1], decode_image(source.images[1]))


def test_who_decodes_is_asked_when_a_decoder_is_made():
    assert find_gpu_decoder("cpu") is None and find_gpu_decoder("cuda", "cpu") is None
    assert (find_gpu_decoder("cuda") is not None) == (find_jpeg_decoder() is not None)
    assert "data.decode='gpu' with device 'cpu'" in refusal(Decoder, Folder(), "cpu", "gpu")


# On a GPU


def on_gpu(images):
    """A decoder, of torchvision where torchcodec cannot be loaded."""
    stand_in = partial(torchvision.io.decode_jpeg, mode=torchvision.io.ImageReadMode.RGB, device="cuda")
    return Decoder(Folder(*images), "cuda", decode_jpegs=find_gpu_decoder("cuda") or stand_in)


@gpu
@pytest.mark.parametrize("kind", [*PLAIN, "mixed"])
def test_gpu_and_cpu_differ_by_rounding_and_chroma(kind, capsys):
    """The bound: 4 grey levels in the mean over an image, and 1 where no chroma is resampled."""
    options = {"4:4:4": {"subsampling": 0}, "4:2:2": {"subsampling": 1}, "turned by EXIF": {"exif": exif(6)}}
    images = [
        encoded(picture(*size, "L" if name == "4:0:0" else "RGB", seed=n), **options.get(name, {}))
        for name in ([*PLAIN] if kind == "mixed" else [kind])
        for n, size in enumerate([(45, 61), (375, 500), (333, 500), (1, 1), (17, 16), (640, 480)])
    ]
    images += [ODD["cmyk"]] if kind == "mixed" else []
    decoder = on_gpu(images)
    decoded = decoder(decoder.reader[ask(*range(len(images)))])
    apart = [
        (a.cpu().int() - decode_image(b).int()).abs() for a, b in zip(decoded.images, images, strict=True)
    ]
    worst, mean = max(a.max().item() for a in apart), max(a.float().mean().item() for a in apart)
    with capsys.disabled():
        print(
            f"\nGPU and CPU, {kind}: at most {worst} and in the mean {mean:.3f} grey levels apart,", end=" "
        )
        print(f"{decoded.refused} of {len(images)} refused by the GPU")
    assert not decoded.faults and all(image.is_cuda for image in decoded.images)
    assert mean <= (1 if kind in ("4:4:4", "4:0:0") else 4)
    assert kind not in ("4:4:4", "4:0:0") or worst <= 4


@gpu
@pytest.mark.parametrize("repeat", range(20))
def test_decoding_ahead_spares_what_queued_kernels_still_read(repeat):
    """Blocks freed while kernels that read them wait in the queue are not written by the next decode."""
    decoder = on_gpu([encoded(picture(375, 500, seed=i)) for i in range(64)])
    chunk, ahead = decoder.reader[ask(*range(32))], decoder.reader[ask(*range(32, 64))]
    want = [int(image.long().sum()) for image in decoder(chunk).images]
    for on_own_stream in (False, True):
        with torch.cuda.stream(decoder.stream if on_own_stream else torch.cuda.current_stream()):
            images = decoder(chunk).images
            torch.cuda._sleep(200_000_000)  # about 0.1 s in which the sums below wait
            sums = [image.long().sum() for image in images]
            del images
            decoder(ahead)
            assert [int(s) for s in sums] == want
