"""What an image file says of itself before its pixels: kind, size, and all that decides who decodes it."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass, replace

EXIF = b"Exif\0\0"
START_OF_SCAN, APP0, APP1, APP14, APP15 = 0xDA, 0xE0, 0xE1, 0xEE, 0xEF
# Start-of-frame markers; C4, C8 and CC among them mean other things. All but SOF0 are not baseline.
FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
ALONE = frozenset({0x01, *range(0xD0, 0xD8)})  # markers without a length
# Sampling factors (across, down) of the luma where both chroma have (1, 1).
SUBSAMPLING = {
    (1, 1): "4:4:4",
    (2, 1): "4:2:2",
    (2, 2): "4:2:0",
    (1, 2): "4:4:0",
    (4, 1): "4:1:1",
    (4, 2): "4:1:0",
}
PNG_COLOURS = {0: ("grey", 1), 2: ("rgb", 3), 3: ("palette", 1), 4: ("grey", 2), 6: ("rgb", 4)}


@dataclass(frozen=True)
class Header:
    """What was found; 0, "" and None stand for what was not.

    kind         "jpeg", "png", "gif", "webp", "bmp", "tiff" or "unknown", by the first bytes and not by a name
    components   channels as stored; bits of each
    baseline     a JPEG of the sequential kind with Huffman codes (SOF0)
    subsampling  of the chroma, "4:2:0" and so on; "4:0:0" for grey; "other"
    colour       "grey", "ycbcr", "rgb", "cmyk" (YCCK too); "palette" (PNG); by libjpeg's rules for a JPEG
    whole        a JPEG whose one scan holds all components and is ended by its marker: not cut off
    exif         where the payload of the first Exif block starts, in bytes
    """

    kind: str = "unknown"
    height: int = 0
    width: int = 0
    components: int = 0
    baseline: bool = False
    bits: int = 0
    subsampling: str = ""
    exif: int | None = None
    colour: str = ""
    whole: bool = False


def read_header(data: bytes) -> Header:
    """The first bytes of a file, or all of it -> Header. Never raises; `whole` needs the whole file."""
    for start, kind, read in KINDS:
        if data[: len(start)] == start and (kind != "webp" or data[8:12] == b"WEBP"):
            try:
                return read(data, Header(kind))
            except (struct.error, IndexError):
                return Header(kind)
    return Header()


def hide_exif(data: bytes, header: Header) -> bytes | bytearray:
    """The same JPEG in which no decoder finds an orientation: a copy with its APP1 blocks renamed, or `data`.

    The marker is renamed and not the signature overwritten, because torchcodec's decoder for the CPU takes any
    APP1 for Exif without looking.
    """
    if header.kind != "jpeg" or header.exif is None:
        return data
    copy = bytearray(data)
    for marker, start, _ in _segments(data):
        if marker == APP1:
            copy[start - 3] = APP15
    return copy


def _segments(data: bytes) -> Iterator[tuple[int, int, int]]:
    """The marker, start and length of each block of a JPEG up to its first scan."""
    place = 2
    while place + 4 <= len(data) and data[place] == 0xFF:
        marker = data[place + 1]
        if marker == 0xFF or marker in ALONE:
            place += 1 if marker == 0xFF else 2  # a fill byte, or a marker without a block
            continue
        length = int.from_bytes(data[place + 2 : place + 4], "big")
        if length < 2 or place + 2 + length > len(data):
            return
        yield marker, place + 4, length - 2
        if marker == START_OF_SCAN:
            return
        place += 2 + length


def _jpeg(data: bytes, header: Header) -> Header:
    jfif, adobe, names = False, None, b""
    for marker, start, length in _segments(data):
        block = data[start : start + min(length, 64)]
        if marker in FRAMES:
            bits, height, width, components = struct.unpack_from(">BHHB", block)
            names, factors = block[6 : 6 + 3 * components : 3], block[7 : 7 + 3 * components : 3]
            header = replace(
                header,
                height=height,
                width=width,
                components=components,
                bits=bits,
                baseline=marker == 0xC0,
                subsampling=_subsampling(factors),
            )
        elif marker == APP0 and block[:5] == b"JFIF\0":
            jfif = True
        elif marker == APP1 and block[:6] == EXIF and header.exif is None:
            header = replace(header, exif=start)
        elif marker == APP14 and block[:5] == b"Adobe" and len(block) >= 12:
            adobe = block[11]
        elif marker == START_OF_SCAN:
            # Inside a scan an FF is followed by 00, so FFD9 behind its start is the end of the image.
            one_scan = block[0] == header.components
            header = replace(header, whole=one_scan and data.rfind(b"\xff\xd9", start + length) >= 0)
    return replace(header, colour=_colour(header.components, jfif, adobe, names))


def _subsampling(factors: bytes) -> str:
    if len(factors) == 1:
        return "4:0:0"
    pairs = [(f >> 4, f & 15) for f in factors]
    return SUBSAMPLING.get(pairs[0], "other") if pairs[1:] == [(1, 1), (1, 1)] else "other"


def _colour(components: int, jfif: bool, adobe: int | None, names: bytes) -> str:
    """By the rules of libjpeg, but that an Adobe mark of RGB counts beside a JFIF one: decoders differ there."""
    if components == 3:
        unmarked = not jfif and adobe is None
        return "rgb" if adobe == 0 or (unmarked and names == b"RGB") else "ycbcr"
    return {1: "grey", 4: "cmyk"}.get(components, "")


def _png(data: bytes, header: Header) -> Header:
    width, height, bits, kind = struct.unpack_from(">IIBB", data, 16)
    colour, components = PNG_COLOURS.get(kind, ("", 0))
    return replace(header, height=height, width=width, bits=bits, colour=colour, components=components)


def _gif(data: bytes, header: Header) -> Header:
    width, height = struct.unpack_from("<HH", data, 6)
    return replace(header, height=height, width=width, bits=8, colour="palette", components=1)


def _bmp(data: bytes, header: Header) -> Header:
    width, height = struct.unpack_from("<ii", data, 18)
    return replace(header, height=abs(height), width=abs(width))


def _kind_alone(data: bytes, header: Header) -> Header:
    return header


KINDS = (
    (b"\xff\xd8", "jpeg", _jpeg),
    (b"\x89PNG\r\n\x1a\n", "png", _png),
    (b"GIF8", "gif", _gif),
    (b"RIFF", "webp", _kind_alone),
    (b"BM", "bmp", _bmp),
    (b"II*\0", "tiff", _kind_alone),
    (b"MM\0*", "tiff", _kind_alone),
)
