"""One image of a source -> what is stored of it, or the reason for which it is refused.

Every image is decoded in full. EXIF is not looked at but to count it, as nothing else here turns images by it.
"""

from __future__ import annotations

import io
import math
import os
import stat
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple, get_args

import PIL
from PIL import Image

from cpvt.data.sources import Entry
from cpvt.errors import ConfigError

MAX_PIXELS = 178_956_970  # Pillow's own limit: an image of more is taken for a decompression bomb
MAX_BYTES = 1 << 30
# Formats that are read, and the ending under which each is stored. Pillow knows more; one of them, EPS,
# runs another program on the file.
ENDINGS = {
    "JPEG": "jpg",
    "PNG": "png",
    "BMP": "bmp",
    "PPM": "ppm",
    "TIFF": "tif",
    "WEBP": "webp",
    "GIF": "gif",
}
MODES = {"RGB": "", "L": "grey", "I;16": "grey", "CMYK": "CMYK", "P": "palette", "1": "black and white"}
JPEG_NAMES = (".jpg", ".jpeg")
Chroma = Literal["4:2:0", "4:4:4"]


@dataclass(frozen=True)
class Shrink:
    """Training images whose short side is larger are resized to it and stored as JPEG again.

    Pillow's bicubic filter, which averages where it shrinks, and the long side cut to whole pixels as in
    torchvision's `Resize`. Smaller images keep their bytes.
    """

    short_side: int = 0  # pixels; 0: never
    quality: int = 92  # of the JPEG, 1 to 95
    chroma: Chroma = "4:2:0"  # colour at half the resolution, or in full: more bytes, slower to decode

    def __post_init__(self):
        known("chroma", self.chroma, Chroma)
        between("quality", self.quality, 1, 95)
        between("short_side", self.short_side, 0)


class Picture(NamedTuple):
    """An image that was decoded without an error, as it will be stored."""

    data: bytes
    ending: str
    height: int
    width: int
    kind: str  # format and what is unusual, in words
    shrunk: bool


def examine_all(entries: list[Entry], shrink: Shrink) -> list[Picture | str]:
    """For each entry its picture, or the reason for which it is refused."""
    return [_examine(entry, shrink) for entry in entries]


def _examine(entry: Entry, shrink: Shrink) -> Picture | str:
    try:
        data = _read(entry)
    except OSError as error:
        return f"cannot be read ({error.strerror or error})"
    if isinstance(data, str):
        return data
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of damaged EXIF, which is not used
            return _decode(data, Path(entry.name).suffix.lower(), shrink)
    except Exception as error:  # a decoder that is fed garbage may raise anything, and none may stop the rest
        return f"cannot be decoded ({' '.join(str(error).split()) or type(error).__name__})"


def _read(entry: Entry) -> bytes | str:
    about = os.stat(entry.path)
    length = about.st_size if entry.length < 0 else entry.length
    if not stat.S_ISREG(about.st_mode):
        return "not a plain file"
    if length == 0:
        return "empty"
    if length > MAX_BYTES:
        return f"{length:,} bytes, the limit is {MAX_BYTES:,}"
    with open(entry.path, "rb") as file:
        file.seek(entry.offset)
        data = file.read(length)
    return data if len(data) == length else f"cut short, {len(data):,} of {length:,} bytes"


def _decode(data: bytes, suffix: str, shrink: Shrink) -> Picture | str:
    try:
        image = Image.open(io.BytesIO(data), formats=list(ENDINGS))
    except PIL.UnidentifiedImageError:
        return f"in none of the formats {', '.join(ENDINGS)}"
    if image.width * image.height > MAX_PIXELS:
        return f"{image.width} x {image.height}, more than {MAX_PIXELS:,} pixels"
    kind = _kind(image, suffix)
    image.load()
    (width, height), short = image.size, min(image.size)
    if 0 < shrink.short_side < short:
        width, height = (side * shrink.short_side // short for side in (width, height))
        small = image if image.mode == "L" else image.convert("RGB")
        stored = io.BytesIO()
        small.resize((width, height), Image.Resampling.BICUBIC).save(
            stored, "JPEG", quality=shrink.quality, subsampling=shrink.chroma, comment=b""
        )
        return Picture(stored.getvalue(), "jpg", height, width, kind, True)
    return Picture(data, ENDINGS[_format(image)], height, width, kind, False)


def _format(image: Image.Image) -> str:
    return "JPEG" if image.format == "MPO" else image.format  # several JPEGs in one: the first is read


def _kind(image: Image.Image, suffix: str) -> str:
    """Format and peculiarities of an image not yet loaded, in words."""
    name = _format(image)
    notes = (
        MODES.get(image.mode, image.mode),
        "16-bit" if any(";16" in str(tile.args) for tile in image.tile) else "",
        "progressive" if image.info.get("progressive") else "",
        "turned by EXIF" if name == "JPEG" and _turned(image) else "",
        "named JPEG" if suffix in JPEG_NAMES and name != "JPEG" else "",
    )
    return " ".join([name, *filter(None, notes)])


def _turned(image: Image.Image) -> bool:
    try:
        return "exif" in image.info and image.getexif().get(0x0112) in range(2, 9)
    except Exception:  # damaged EXIF is no reason to refuse an image
        return False


# Options


def known(name: str, value: str, words) -> None:
    if value not in get_args(words):
        raise ConfigError(f"pack: {name}={value!r}; expected one of {', '.join(get_args(words))}")


def between(name: str, value: int, least: int, most: float = math.inf) -> None:
    if not least <= value <= most:
        raise ConfigError(
            f"pack: {name}={value}; expected {least} or more{f', at most {most}' * (most < math.inf)}"
        )
