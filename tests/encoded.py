"""Image files of every kind, made here, and a source of them; for the tests of what reads images."""

import struct
import zlib
from io import BytesIO

import numpy
import pytest
import torch
from PIL import Image

from cpvt.errors import UserError


def picture(height=45, width=61, mode="RGB", seed=0):
    """A smooth random image with a few sharp edges, as photographs have."""
    rng = numpy.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (6, 8, 3), dtype=numpy.uint8))
    pixels = numpy.array(coarse.resize((width, height), Image.BICUBIC))
    pixels[height // 3 : height // 2, width // 4 : width // 2] = rng.integers(0, 256, 3)
    return Image.fromarray(pixels).convert(mode)


def encoded(image, kind="JPEG", **options):
    file = BytesIO()
    image.save(file, kind, **({"quality": 90} if kind == "JPEG" else {}) | options)
    return file.getvalue()


def reference(data):
    """What torchvision's default_loader makes of these bytes."""
    return torch.from_numpy(numpy.array(Image.open(BytesIO(data)).convert("RGB"))).permute(2, 0, 1)


def exif(orientation):
    block = Image.Exif()
    block[0x0112] = orientation
    return block


def png(width, height, bits, colour, rows):
    """A PNG by hand: 16-bit colour, or a header that lies."""

    def chunk(name, body):
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


RGB = picture()
SIXTEEN = numpy.array([[0, 255, 256, 1000, 32768, 65535]], dtype=numpy.uint16)
SAMPLINGS = {name: encoded(RGB, subsampling=i) for i, name in enumerate(("4:4:4", "4:2:2", "4:2:0"))}
PLAIN = SAMPLINGS | {"4:0:0": encoded(picture(mode="L")), "turned by EXIF": encoded(RGB, exif=exif(6))}
ODD = {"progressive": encoded(RGB, progressive=True), "stored as RGB": encoded(RGB, keep_rgb=True)}
ODD |= {"PNG named JPEG": encoded(RGB, "PNG"), "cmyk": encoded(picture(mode="CMYK"))}
ODD |= {"palette": encoded(picture(mode="P"), "GIF"), "black and white": encoded(picture(mode="1"), "PNG")}
ODD |= {f"{mode}, transparent": encoded(picture(mode=mode), "PNG") for mode in ("RGBA", "LA")}
ODD |= {kind.lower(): encoded(RGB, kind) for kind in ("WEBP", "BMP", "TIFF")}
BROKEN = {"empty": b"", "text": b"<html>404 not found</html>", "two bytes": b"\xff\xd8"}
BROKEN |= {"a program": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"}
BROKEN |= {f"cut at {place}": PLAIN["4:2:0"][:place] for place in (100, len(PLAIN["4:2:0"]) // 2)}
BROKEN |= {"PNG cut off": ODD["PNG named JPEG"][:400], "PNG bomb": png(60000, 60000, 8, 2, b"")}
SIDES = struct.pack(">HH", 45, 61), struct.pack(">HH", 60000, 60000)
BROKEN |= {"JPEG bomb": PLAIN["4:4:4"].replace(*SIDES, 1)}
BROKEN |= {mode: encoded(picture(mode=mode), "TIFF") for mode in "IF"}  # of 32 bits a pixel


class Folder:
    """A source of images in memory; what it cannot read raises as a file system does."""

    def __init__(self, *images):
        self.images, self.labels = images, torch.arange(len(images)) * 10

    def __len__(self):
        return len(self.images)

    def key(self, i):
        return f"image {i}"

    def read(self, i):
        if self.images[i] is None:
            raise PermissionError(13, "Permission denied", f"/some/where/{i}.jpg")
        return self.images[i]


def put(path, content=PLAIN["4:4:4"]):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


def photos(count):
    return [encoded(picture(40 + i, 50 - i, seed=i)) for i in range(count)]


def refusal(call, *args, error=UserError, **kwargs):
    """The one line with which a call refuses its arguments."""
    with pytest.raises(error) as caught:
        call(*args, **kwargs)
    assert "\n" not in str(caught.value)
    return str(caught.value)
