"""Bytes -> pixels: the one decoder of the package. What counts as an image is decided here, for every reader.

A worker process reads files (`BatchReader`): plain JPEGs stay bytes where a GPU will decode them, everything else
is decoded on the spot. The main process decodes these, a micro-batch at a time (`Decoder`). What cannot be decoded
is named, and plain grey stands in for it.

Letters: B images of a micro-batch, h w height and width of one in pixels, S side of what a model sees, K classes.
"""

import os
import stat
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import cache, partial
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple

import numpy
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torch.utils.data import Dataset

from cpvt.data.randaugment import send
from cpvt.errors import DataError
from cpvt.proven import proved

# Pillow opens more, some by calling other programs; these are what image folders hold.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "PPM", "TIFF")
ENDINGS = tuple(".jpg .jpeg .jpe .jfif .png .webp .bmp .gif .ppm .pgm .tif .tiff".split())
MAX_PIXELS = 89_478_485  # where Pillow begins to warn of a decompression bomb: a quarter of a GB in RGB
MAX_BYTES = 1 << 28  # of one file: an image of so many pixels, not compressed
# Of the pixels of a micro-batch: eight of the largest images or, where that is more, 12 megapixels an image, as
# cameras make them (ImageNet has 0.2). Putting them together takes twice that, in each process that reads.
BATCH_BYTES, BATCH_IMAGE_BYTES = 1 << 31, 36 << 20
MAX_GPU_SIDE = 16_384  # of an image for the GPU's decoder
# Sampling of luma (across, down) over a chroma of (1, 1): 4:4:4, 4:2:2, 4:2:0, 4:4:0.
LUMA_FACTORS = ((1, 1), (2, 1), (2, 2), (1, 2))
GREY = b"P5 16 16 255\n" + bytes([128]) * 256  # the image (PGM) in the place of one that cannot be decoded


class DecodeError(DataError):
    """One image that cannot be decoded; the message is the reason."""


@contextmanager
def open_image(source: bytes | Path, room: int = 3 * MAX_PIXELS) -> Iterator[Image.Image]:
    """A file or its bytes -> a Pillow image whose pixels are not read yet.

    Raises DecodeError for what is empty, of no known format, of more than MAX_PIXELS, of more than `room` bytes in
    RGB, or of 32 bits a pixel, where no value is known to be white; and for whatever goes wrong within.
    """
    try:
        if not source:
            raise DecodeError("empty")
        file = BytesIO(source) if isinstance(source, bytes) else regular(source)
        with Image.open(file, formats=FORMATS) as image:
            if image.width * image.height > MAX_PIXELS:
                raise DecodeError(f"{image.width} x {image.height}, more than {MAX_PIXELS:,} pixels")
            if 3 * image.width * image.height > room:
                full = "and its micro-batch is full of pixels: make the images or the micro-batch smaller"
                raise DecodeError(f"{image.width} x {image.height}, {full}")
            if image.mode in ("I", "F"):
                raise DecodeError(f"mode {image.mode}: 32 bits a pixel, of which none is known to be white")
            yield image
    except DecodeError:
        raise
    except UnidentifiedImageError as error:
        raise DecodeError(f"in none of the formats {', '.join(FORMATS)}") from error
    except Exception as error:  # Pillow's readers let anything through that broken data may cause
        raise DecodeError(reason(error)) from error


def decode_image(data: bytes, room: int = 3 * MAX_PIXELS) -> Tensor:
    """Encoded bytes -> (3, h, w) uint8 RGB, as stored, whatever EXIF says of rotation. Raises DecodeError.

    The pixels are those of Pillow's `convert("RGB")`, the reference's loader, but for 16-bit greyscale: there
    Pillow cuts off at 255, which leaves nearly white images, and here the upper byte is kept, as Pillow does
    with 16-bit colour. Plain JPEGs go through torchcodec, which is faster and gives the same pixels.
    Never at a reduced scale: of crops of ImageNet's files for 224 pixels, 4 % are twice that on both sides.
    """
    decode_jpeg = find_jpeg_decoder()
    with open_image(data, room) as image:
        if decode_jpeg and (jpeg := plain_jpeg(data, image)):
            with suppress(RuntimeError):  # Pillow decides, and words the reason
                return decode_jpeg(jpeg)
        if image.mode.startswith("I;16"):
            image = Image.fromarray((numpy.asarray(image) >> 8).astype(numpy.uint8))
        return torch.from_numpy(numpy.array(image.convert("RGB"))).permute(2, 0, 1)


def regular(path: Path) -> Path:
    """The same path, or DecodeError where there is no regular file of at most MAX_BYTES."""
    about = os.stat(path)
    if not stat.S_ISREG(about.st_mode):  # a pipe would be waited for, a device might never end
        raise DecodeError("not a regular file")
    if about.st_size > MAX_BYTES:
        raise DecodeError(f"{about.st_size:,} bytes, more than {MAX_BYTES:,}")
    return path


def reason(error: Exception) -> str:
    """What went wrong, in one line without names of files."""
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return text.splitlines()[0]


def plain_jpeg(data: bytes, image: Image.Image) -> bytes | None:
    """The JPEG, where a GPU's decoder makes of it what Pillow does, up to rounding; else None.

    Plain is a baseline JPEG, grey or YCbCr, in one scan that is ended, of a usual chroma subsampling. nvJPEG
    decodes cut-off files without a word and takes Adobe's RGB for YCbCr: Pillow has to see those. The markers of
    APP1 blocks are renamed, so that no decoder turns the image; torchcodec's for the CPU takes any APP1 for EXIF.
    """
    if image.format != "JPEG" or "progressive" in image.info or max(image.size) > MAX_GPU_SIDE:
        return None
    names, factors = [layer[0] for layer in image.layer], [layer[1:3] for layer in image.layer]
    # Without a JFIF or Adobe mark the names of the components decide. libjpeg lets JFIF win over Adobe.
    marked = "jfif" in image.info or "adobe_transform" in image.info
    rgb = image.info.get("adobe_transform") == 0 or (not marked and names == list(b"RGB"))
    usual = len(factors) == 1 or (factors[1:] == [(1, 1), (1, 1)] and factors[0] in LUMA_FACTORS and not rgb)
    # The header of the first scan, behind which Pillow stands now, must name all components. Inside a scan an FF
    # is followed by 00, so FFD9 is the end of the image.
    start, count = image.fp.tell(), len(names)
    scan = b"\xff\xda\0" + bytes((6 + 2 * count, count))
    if not usual or not data.startswith(scan, start - 8 - 2 * count) or data.rfind(b"\xff\xd9", start) < 0:
        return None
    for name, block in image.applist:
        if name == "APP1":
            block = (2 + len(block)).to_bytes(2, "big") + block
            data = data.replace(b"\xff\xe1" + block, b"\xff\xef" + block)
    return data


@cache  # an import that fails is tried anew each time, which may take longer than an image
def find_jpeg_decoder(device: str | torch.device = "cpu") -> Callable | None:
    """torchcodec's decoder of a JPEG, or of a list in one call, on a device; None where it cannot be loaded."""
    try:
        from torchcodec.decoders import decode_jpeg
    except (ImportError, OSError, RuntimeError):
        return None
    return partial(decode_jpeg, device=device)


SIDES = (331, 131, 45, 17)  # shorter sides of the images that a GPU's decoder is tried on


@cache
def gpu_decoder(device: str) -> tuple[Callable | None, int]:
    """-> the GPU's decoder of lists of JPEGs, and the shorter side in pixels from which on what it makes of drawn
    ones is right; (None, 0) where there is none, or large ones are wrong."""
    decode_jpegs, least = find_jpeg_decoder(device), 0
    for side in SIDES if decode_jpegs else ():
        name = f"JPEGs of {side} pixels or less, decoded on {device}"
        if not proved(name, partial(decoding_fault, decode_jpegs, side), "worker processes decode them"):
            break
        least = side
    return (decode_jpegs, least) if least else (None, 0)


def decoding_fault(decode_jpegs: Callable, side: int) -> str:
    """What is wrong with JPEGs of this shorter side: of each chroma subsampling, of odd sizes, turned by EXIF.

    Their colour changes slowly, by half a level a pixel: chroma, however it is interpolated, then differs by a
    few levels at the edges of JPEG's blocks. A row too far is 6 levels in the mean.
    """
    turned = Image.Exif()
    turned[0x0112] = 6
    kinds = {name: {"subsampling": name} for name in ("4:4:4", "4:2:2", "4:2:0")}
    kinds["turned by EXIF"] = {"exif": turned}
    down, across = numpy.mgrid[:side, : side * 3 // 2]
    waves = 128 + 40 * numpy.sin(down / 3) * numpy.cos(across / 5)
    shades = 25 + 20 * numpy.sin(down / 40), numpy.zeros(down.shape), 20 * numpy.sin(across / 40) - 25
    image, jpegs = Image.fromarray(numpy.stack([waves + s for s in shades], 2).astype(numpy.uint8)), []
    for options in kinds.values():
        image.save(file := BytesIO(), "JPEG", quality=90, **options)
        with open_image(file.getvalue()) as opened:
            jpegs.append(plain_jpeg(file.getvalue(), opened))
    batch = [torch.frombuffer(bytearray(jpeg), dtype=torch.uint8) for jpeg in jpegs]
    for kind, jpeg, found in zip(kinds, jpegs, decode_jpegs(batch), strict=True):
        if found.shape != (3, *down.shape):
            return f"{kind}: {tuple(found.shape)}, expected {(3, *down.shape)}"
        apart = (found.cpu().float() - decode_image(jpeg)).abs()
        mean, most = float(apart.mean()), int(apart.max())
        if most > 12 or mean > 2:
            return f"{kind}: {mean:.1f} levels from a CPU's in the mean, {most} at most; expected 2 and 12"
    return ""


@dataclass(frozen=True)
class Fault:
    """Image `index`, called `key`, could not be had for `reason`. Plain grey stands in for it."""

    index: int
    key: str
    reason: str


def take(source: Dataset, index: int, decode: Callable[[bytes], Any], faults: list[Fault]) -> Any:
    """`decode` of the bytes of an image or, where either is impossible, of a grey one; the fault is added."""
    try:
        return decode(source.read(index))
    except (OSError, ValueError, MemoryError) as error:  # DataError and DecodeError among them
        faults.append(Fault(index, source.key(index), reason(error)))
        return decode(GREY)


class ReadBatch(NamedTuple):
    """A micro-batch as a worker hands it on: one tensor, since each one that is sent takes a file descriptor.

    request  what was asked for, as it was given
    data     uint8, 1-D: the images end to end
    spans    for each image (length, height, width, encoded): its JPEG bytes, or its (h, w, 3) pixels
    faults   what could not be had
    """

    request: Any
    data: Tensor
    spans: list[tuple[int, int, int, bool]]
    faults: list[Fault]


@dataclass
class Batch:
    """A micro-batch. Decoded: images (3, h, w) uint8 on the device, labels (B,) int64. Finished, all on
    the device: normalised images (B, 3, S, S) float, and labels (B,) or mixed labels (B, K).

    request  what was asked for: epoch and positions say where in the stream
    faults   images that could not be used, for which plain grey stands in
    refused  images that the GPU would not decode and the CPU did
    """

    request: Any
    images: list[Tensor] | Tensor
    targets: Tensor
    faults: list[Fault] = field(default_factory=list)
    refused: int = 0


class BatchReader(Dataset):
    """The worker's side: a request, which has `indices` (B,) of images, -> ReadBatch. For a DataLoader with
    batch_size=None and the requests as its sampler.

    source      ImageDataset or Shards, or what has their `labels`, read(i), key(i) and length
    keep_from   plain JPEGs of this shorter side in pixels, or more, are handed on encoded; everything else is
                decoded here. 0: all. The main process may change it while workers read
    """

    def __init__(self, source: Dataset, keep_from: int = 0):
        self.source, self.keep_from = source, torch.tensor(keep_from).share_memory_() if keep_from else 0

    def __getitem__(self, request) -> ReadBatch:
        faults, found, indices = [], [], request.indices.tolist()
        room = max(BATCH_BYTES, BATCH_IMAGE_BYTES * len(indices))
        for i in indices:
            found.append(take(self.source, i, partial(self._take, room), faults))
            room = max(1 << 10, room - 3 * found[-1][1] * found[-1][2])
        try:
            data = numpy.concatenate([piece for piece, *_ in found])
        except MemoryError:
            why = "no memory for its micro-batch: make it smaller"
            faults = [Fault(i, self.source.key(i), why) for i in indices]
            found = [self._take(1 << 10, GREY)] * len(indices)
            data = numpy.concatenate([piece for piece, *_ in found])
        spans = [(len(piece), *about) for piece, *about in found]
        return ReadBatch(request, torch.from_numpy(data), spans, faults)

    def _take(self, room: int, data: bytes) -> tuple[numpy.ndarray, int, int, bool]:
        if keep_from := int(self.keep_from):
            with open_image(data, room) as image:
                # Not grey ones: an H200's decoder gave them wrong by 43 levels in the mean (torchcodec 0.17).
                large = image.mode != "L" and min(image.size) >= keep_from
                if large and (jpeg := plain_jpeg(data, image)):
                    return numpy.frombuffer(jpeg, numpy.uint8), image.height, image.width, True
        image = decode_image(data, room)
        return image.permute(1, 2, 0).reshape(-1).numpy(), image.shape[1], image.shape[2], False


def bisect(decode: Callable[[list[Tensor]], list[Tensor]], batch: list[Tensor]) -> list[Tensor | Exception]:
    """Decode a batch; where that fails, its halves, and so on: for each item its image or its error.

    An exhausted or broken device is not the items' fault and is raised.
    """
    try:
        return list(decode(batch)) if batch else []
    except (torch.OutOfMemoryError, torch.AcceleratorError):
        raise
    except (RuntimeError, ValueError) as error:
        if len(batch) == 1:
            return [error]
        half = len(batch) // 2
        return bisect(decode, batch[:half]) + bisect(decode, batch[half:])


class Decoder:
    """ReadBatch -> Batch, in the thread that calls; for a GPU in the main process. `reader` is the workers' side.

    decode        "cpu": never on the GPU
    decode_jpegs  a list of JPEGs, uint8 1-D each -> their images on the device; else, on a GPU, `gpu_decoder`'s

    A GPU that refuses most images, which then fall to the CPU, is asked no more: the workers decode.

    nvJPEG's hardware path does not wait for the stream it is given (torchvision's pull request 9606): it may write
    into a freed block that a queued kernel still reads. So the stream is idle before each decode.
    """

    def __init__(self, source: Dataset, device: str | torch.device, decode="auto", decode_jpegs=None):
        self.source, self.device = source, torch.device(device)
        least, self.asked, self.refused = 1, 0, 0
        if not decode_jpegs and decode != "cpu" and self.device.type == "cuda":
            decode_jpegs, least = gpu_decoder(str(device))
        self.decode_jpegs = decode_jpegs
        self.reader = BatchReader(source, least if decode_jpegs else 0)

    def __call__(self, read: ReadBatch) -> Batch:
        if self.decode_jpegs and self.device.type == "cuda":
            torch.cuda.current_stream(self.device).synchronize()
        lengths, indices = [span[0] for span in read.spans], read.request.indices
        faults, refused, pieces = [*read.faults], 0, read.data.split(lengths)
        jpegs = {i: pieces[i] for i, (*_, encoded) in enumerate(read.spans) if encoded}
        if len(jpegs) < len(pieces):  # what the worker decoded goes to the device in one copy
            pieces = send(read.data, self.device).split(lengths)
        spans = zip(pieces, read.spans, strict=True)
        images = [p if encoded else p.view(h, w, 3).permute(2, 0, 1) for p, (_, h, w, encoded) in spans]
        if jpegs and self.decode_jpegs:
            for i, result in zip([*jpegs], bisect(self.decode_jpegs, [*jpegs.values()]), strict=True):
                if isinstance(result, Tensor) and result.shape == (3, *read.spans[i][1:3]):
                    images[i] = result
                    del jpegs[i]
            self.asked += len(lengths)
        if jpegs:  # the GPU did not
            own = {i: [] for i in jpegs}
            with ThreadPoolExecutor() as threads:
                found = threads.map(lambda i: take(self.source, int(indices[i]), decode_image, own[i]), own)
            for (i, bad), image in zip(own.items(), found, strict=True):
                images[i] = send(image, self.device)
                faults += bad
                refused += not bad
        self.refused += refused
        if self.decode_jpegs and self.refused > max(8, self.asked / 2):
            name = f"decoding of {self.source!r:.60} on {self.device}"
            proved(name, lambda: f"{self.refused} of {self.asked} refused", "worker processes decode")
            self.decode_jpegs = None
            self.reader.keep_from.zero_()
        return Batch(read.request, images, self.source.labels[indices], faults, refused)
