"""Bytes -> pixels: read and routed by worker processes, decoded in batches on the GPU, or else by the CPU.

What no decoder can read is replaced by another image, chosen by a fixed function of its index, and reported.
Letters: n images in the source, h w height and width of one image in pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from io import BytesIO
from typing import Protocol

import numpy
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torch.utils.data import Dataset

from cpvt.data.header import Header, hide_exif, read_header
from cpvt.errors import DataError
from cpvt.rng import integers

try:
    from torchcodec.decoders import decode_jpeg
except (ImportError, OSError, RuntimeError):  # no build of it for this machine: Pillow decodes everything
    decode_jpeg = None

GPU_DECODES = decode_jpeg is not None  # where there is a GPU
MAX_PIXELS = 89_478_485  # where Pillow begins to warn of a decompression bomb: a quarter of a GB in RGB
MAX_SIDE = 16_384  # of an image for the GPU
GPU_SUBSAMPLING = ("4:0:0", "4:4:4", "4:2:2", "4:2:0", "4:4:0")
ATTEMPTS = 8  # replacements tried for one unreadable image
GREY, GREY_SIDE = 128, 16  # the image that stands in where every replacement failed too
# Pillow opens more, some by calling other programs; these are what image folders hold.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "PPM", "TIFF")


class DecodeError(DataError):
    """One image that cannot be decoded; the message is the reason."""


class Source(Protocol):
    """Encoded images by number, as a packed data set or a folder offers them."""

    labels: Tensor | Sequence[int]  # (n,) int64

    def __len__(self) -> int: ...
    def read(self, i: int) -> bytes: ...  # raises OSError or DataError
    def key(self, i: int) -> str: ...  # a name to report


@dataclass(frozen=True)
class Fault:
    """Image `index`, called `key`, could not be had for `reason`; `replaced_by` is -1 for plain grey."""

    index: int
    key: str
    reason: str
    replaced_by: int


@dataclass
class Fetched:
    """A micro-batch as a worker hands it on.

    data        uint8, 1-D: the images end to end
    spans       for each image (start, length, height, width, encoded): its JPEG bytes, or its (h, w, 3) pixels
    indices     the images asked for
    taken       the images that came, other than asked for where one was replaced; -1 for plain grey
    labels      (B,) int64, of the images that came; of the one asked for where that is plain grey
    faults      what could not be had, in the order of reading
    bytes_read  of encoded data, failed reads included
    """

    data: Tensor
    spans: list[tuple[int, int, int, int, bool]]
    indices: list[int]
    labels: Tensor
    faults: list[Fault]
    bytes_read: int
    taken: list[int]

    def view(self, position: int) -> Tensor:
        """The image at this position of the batch: 1-D where it is encoded, else (3, h, w)."""
        start, length, height, width, encoded = self.spans[position]
        data = self.data[start : start + length]
        return data if encoded else data.view(height, width, 3).permute(2, 0, 1)


@dataclass
class Decoded:
    """images (3, h, w) uint8 each, on the device; labels (B,) int64 on the CPU; faults of worker and decoder.

    `refused` counts the images that the GPU would not decode and the CPU did.
    """

    images: list[Tensor]
    labels: Tensor
    faults: list[Fault] = field(default_factory=list)
    refused: int = 0


# --------------------------------------------------------------------------- one image


def for_gpu(header: Header) -> bool:
    """Whether the GPU's decoder takes this image and makes of it what Pillow does, up to rounding.

    A whole baseline JPEG of 8 bits, grey or YCbCr in one scan, of a usual chroma subsampling. nvJPEG decodes
    cut-off files without a word and takes Adobe's RGB for YCbCr; Pillow has to see those.
    """
    return (
        header.kind == "jpeg"
        and header.baseline
        and header.whole
        and header.bits == 8
        and header.colour in ("grey", "ycbcr")
        and header.subsampling in GPU_SUBSAMPLING
        and 0 < header.height * header.width <= MAX_PIXELS
        and max(header.height, header.width) <= MAX_SIDE
    )


def decode_cpu(data: bytes) -> Tensor:
    """Encoded bytes -> (3, h, w) uint8 RGB, channels last in memory; as stored, whatever EXIF says of rotation.

    The pixels are those of Pillow's `convert("RGB")`, the reference's loader, but for 16-bit greyscale: there
    Pillow cuts off at 255, which leaves nearly white images, and here the upper byte is kept, as Pillow does
    with 16-bit colour. Plain JPEGs go through torchcodec, faster and with the same pixels.

    Raises DecodeError for what is empty, cut off, of no known format, or has more than MAX_PIXELS pixels.
    """
    if not len(data):
        raise DecodeError("empty")
    header = read_header(data)
    _refuse_bombs(header.height, header.width)
    if decode_jpeg is not None and for_gpu(header):
        try:
            return decode_jpeg(hide_exif(data, header))
        except RuntimeError:
            pass  # Pillow decides, and words the reason
    try:
        with Image.open(BytesIO(data), formats=FORMATS) as image:
            _refuse_bombs(image.height, image.width)
            if image.mode.startswith("I;16"):
                image = Image.fromarray((numpy.asarray(image) >> 8).astype(numpy.uint8))
            pixels = numpy.array(image.convert("RGB"))
    except DecodeError:
        raise
    except Exception as error:  # Pillow's readers let anything through that broken data may cause
        unknown = isinstance(error, UnidentifiedImageError)
        raise DecodeError("of no format that is known" if unknown else _reason(error)) from error
    return torch.from_numpy(pixels).permute(2, 0, 1)


def _refuse_bombs(height: int, width: int) -> None:
    if height * width > MAX_PIXELS:
        raise DecodeError(f"claims {width} x {height} pixels; more than {MAX_PIXELS} are not decoded")


def _reason(error: Exception) -> str:
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return text.splitlines()[0]


# --------------------------------------------------------------------------- replacement


def replacement(index: int, attempt: int, n: int) -> int:
    """Which of n images stands in for `index` at this attempt: a fixed function, never the image itself."""
    if n == 1:
        return index
    return (index + 1 + int(integers("replacement", n - 1, index, attempt))) % n


def first_good(
    source: Source, index: int, take: Callable[[bytes], object], faults: list[Fault], bad: str = ""
):
    """The image `index`, or the first of its replacements that can be had: (its index, take(its bytes)).

    `bad` is the reason where `index` is known to fail. After ATTEMPTS replacements: (-1, None). Every failure
    is added to `faults`.
    """
    failed = [(index, bad)] if bad else []
    for attempt in range(len(failed), ATTEMPTS + 1):
        i = replacement(index, attempt, len(source)) if attempt else index
        try:
            item = take(source.read(i))
            break
        except (OSError, ValueError) as error:  # DataError and DecodeError among them
            failed.append((i, _reason(error)))
    else:
        i, item = -1, None
    faults.extend(Fault(j, source.key(j), reason, i) for j, reason in failed)
    return i, item


def _grey() -> Tensor:
    return torch.full((3, GREY_SIDE, GREY_SIDE), GREY, dtype=torch.uint8)


# --------------------------------------------------------------------------- worker


class Reader(Dataset):
    """The worker's side: a list of indices -> Fetched. For DataLoader(batch_size=None, sampler=lists).

    With `device_decodes`, plain JPEGs are handed on encoded, with their EXIF block hidden from the decoder;
    everything else is decoded here.
    """

    def __init__(self, source: Source, device_decodes: bool):
        self.source, self.device_decodes = source, device_decodes
        self.labels = torch.as_tensor(source.labels)

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, indices: Sequence[int]) -> Fetched:
        indices = [int(i) for i in indices]
        pieces, spans, taken, faults, start = [], [], [], [], 0
        self._bytes_read = 0
        for index in indices:
            i, item = first_good(self.source, index, self._take, faults)
            piece, height, width, encoded = item or _plain(_grey())
            spans.append((start, len(piece), height, width, encoded))
            start += len(piece)
            pieces.append(piece)
            taken.append(i)
        data = numpy.concatenate(pieces) if pieces else numpy.empty(0, numpy.uint8)
        labels = self.labels[[i if i >= 0 else j for i, j in zip(taken, indices, strict=True)]]
        return Fetched(torch.from_numpy(data), spans, indices, labels, faults, self._bytes_read, taken)

    def _take(self, data: bytes):
        self._bytes_read += len(data)
        header = read_header(data)
        if self.device_decodes and for_gpu(header):
            piece = numpy.frombuffer(hide_exif(data, header), numpy.uint8)
            return piece, header.height, header.width, True
        return _plain(decode_cpu(data))


def _plain(image: Tensor):
    return image.permute(1, 2, 0).reshape(-1).numpy(), image.shape[1], image.shape[2], False


# --------------------------------------------------------------------------- main process


def bisect(decode: Callable[[list[Tensor]], list[Tensor]], batch: list[Tensor]) -> list[Tensor | Exception]:
    """Decode a batch; where that fails, its halves, and so on: for each item its image or its error.

    One bad item of n costs about 2 log2(n) more calls. An exhausted or broken device is not the items' fault
    and is raised.
    """
    if not batch:
        return []
    try:
        return list(decode(batch))
    except (torch.OutOfMemoryError, torch.AcceleratorError):
        raise
    except (RuntimeError, ValueError) as error:
        if len(batch) == 1:
            return [error]
        half = len(batch) // 2
        return bisect(decode, batch[:half]) + bisect(decode, batch[half:])


class Decoder:
    """The main process' side: Fetched -> Decoded, in the thread that calls.

    On CUDA, everything happens on a stream of its own, `stream`, and the images are ready for the stream that
    is current at the call. A caller that crops within `torch.cuda.stream(decoder.stream)` and hands on only
    the crops spares one `record_stream` an image.

    nvJPEG's hardware path does not wait for the stream it is given (torchvision's pull request 9606): it may
    write into a freed block that a queued kernel still reads. So blocks come from the own stream's pool, which
    gets them back only after the consumer's kernels (`record_stream`), and the own stream is idle before each
    decode.
    """

    def __init__(self, device: str):
        self.device = torch.empty(0, device=device).device  # "cuda" -> "cuda:0", as images will say
        self.cuda = self.device.type == "cuda"
        self.stream = torch.cuda.Stream(self.device) if self.cuda else None
        # Without torchcodec nothing is handed on encoded (see `Reader`), and there is nothing to decode here.
        by_gpu = self.cuda and decode_jpeg is not None
        self.decode = partial(decode_jpeg, device=self.device) if by_gpu else _decode_all

    def __call__(self, fetched: Fetched, source: Source) -> Decoded:
        if not self.cuda:
            return self._batch(fetched, source)
        consumer = torch.cuda.current_stream(self.device)
        with torch.cuda.stream(self.stream):
            self.stream.synchronize()
            decoded = self._batch(fetched, source)
        if consumer != self.stream:
            consumer.wait_stream(self.stream)
            for image in decoded.images:
                image.record_stream(consumer)
        return decoded

    def _batch(self, fetched: Fetched, source: Source) -> Decoded:
        images = [fetched.view(position) for position in range(len(fetched.spans))]
        encoded = [position for position, span in enumerate(fetched.spans) if span[-1]]
        decoded = Decoded(images, fetched.labels.clone(), list(fetched.faults))
        results = bisect(self.decode, [images[position] for position in encoded])
        for position, result in zip(encoded, results, strict=True):
            if isinstance(result, Tensor) and result.shape == (3, *fetched.spans[position][2:4]):
                images[position] = result
            else:
                self._by_cpu(position, fetched, source, decoded)
        decoded.images = [self._place(image) for image in images]
        return decoded

    def _by_cpu(self, position: int, fetched: Fetched, source: Source, decoded: Decoded) -> None:
        """Decode what the batch's decoder refused; replace it where the CPU refuses it too."""
        try:
            decoded.images[position] = decode_cpu(fetched.view(position).numpy().tobytes())
            decoded.refused += 1
        except DecodeError as error:
            index, bad = fetched.taken[position], _reason(error)
            i, image = first_good(source, index, decode_cpu, decoded.faults, bad)
            decoded.images[position] = _grey() if image is None else image
            decoded.labels[position] = source.labels[i if i >= 0 else index]

    def _place(self, image: Tensor) -> Tensor:
        """The image on the device; there its planes lie apart, as nvJPEG leaves them."""
        return image if image.device == self.device else image.to(self.device).contiguous()


def _decode_all(batch: list[Tensor]) -> list[Tensor]:
    return [decode_cpu(data.numpy().tobytes()) for data in batch]
