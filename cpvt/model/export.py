"""A model as a file that others run: torch.export, and ONNX checked against what PyTorch computes.

Batch, height and width stay open: one file takes every image whose sides are multiples of the patch size.
"""

from __future__ import annotations

import contextlib
import copy
import logging
import os
import tempfile
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from torch.export import Dim, ExportedProgram
from torch.nn.attention import SDPBackend, sdpa_kernel

from cpvt.config import ConfigError, Learned, Peg, parse_encoding, to_json
from cpvt.model.vit import VisionTransformer

Size = tuple[int, int]

# Largest difference allowed between onnxruntime and PyTorch, relative to the largest logit. Both compute in
# float32 and differ in the order of their sums: measured, a few 1e-7. A size that was frozen into the graph
# stops the run or gives differences near 1.
TOLERANCE = 1e-5


@dataclass(frozen=True)
class Exported:
    """What was written, at which image shapes it was compared, and the largest relative difference there."""

    path: Path
    shapes: tuple[tuple[int, int, int, int], ...]
    difference: float


def smallest_grid(model: VisionTransformer) -> int:
    """-> the fewest rows (and columns) of tokens that an exported graph of this model is made for.

    Two, as torch.export takes a size of 1 for a constant; more where a convolution needs room: each one
    without padding takes kernel - 1, and mirrored or circular borders cannot be wider than the grid.
    """
    lost, room = 0, 2
    for part in parse_encoding(model.config.encoding):
        if isinstance(part, Peg) and part.padding == "none":
            lost += (part.kernel - 1) * part.repeat * len(part.positions)
        elif isinstance(part, Peg) and part.padding in ("reflect", "circular"):
            room = max(room, part.kernel // 2 + 1)
    return lost + room


def export_program(
    model: VisionTransformer, *, image_size: Size | None = None, dynamic: bool = True
) -> ExportedProgram:
    """Model -> a torch.export program (B, C, height, width) -> (B, num_classes), in evaluation mode.

    With `dynamic`, height and width are open multiples of the patch size; otherwise they are `image_size`
    (default: the trained size). The batch is open in both cases.

    Raises ValueError for an image size that is no multiple of the patch size, ConfigError for an encoding
    that knows one grid only.
    """
    return _trace(_frozen_copy(model), _checked_size(model, image_size, dynamic), dynamic)


def export_onnx(
    model: VisionTransformer, path: str | Path, *, image_size: Size | None = None, dynamic: bool = True
) -> Exported:
    """Writes `path`, an ONNX file with input `images` (B, C, height, width) and output `logits`.

    The file is compared with the model at several sizes, square and not, before it takes its name: where
    the comparison fails nothing is left behind. Its metadata hold the model's configuration (`cpvt_config`).

    Raises as `export_program`; FileNotFoundError for a missing folder; RuntimeError if onnxruntime differs by
    more than `TOLERANCE`; ImportError without the packages.
    """
    path = Path(path)
    size = _checked_size(model, image_size, dynamic)
    if not path.absolute().parent.is_dir():
        raise FileNotFoundError(f"{path}: no folder {path.parent} to write to; make it first")
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder; expected the name of a file, such as model.onnx")
    try:
        import onnxruntime
        import onnxscript  # noqa: F401  (torch.onnx needs it)
    except ImportError as error:
        raise ImportError(f"ONNX export needs {error.name}: pip install 'cpvt[export]'") from None

    frozen = _frozen_copy(model)
    with _quiet():
        program = torch.onnx.export(
            _trace(frozen, size, dynamic),
            input_names=["images"],
            output_names=["logits"],
            dynamic_shapes=(_open_sizes(model, dynamic),),  # names the axes in the file
            verbose=False,
        )
    program.model.metadata_props["cpvt_config"] = to_json(model.config)
    # Beside its place, so that the last step is a rename within one file system.
    with tempfile.TemporaryDirectory(dir=path.absolute().parent, prefix=".export-") as folder:
        draft = Path(folder) / "model.onnx"
        program.save(draft)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        session = onnxruntime.InferenceSession(draft, options, providers=["CPUExecutionProvider"])
        shapes = tuple(_shapes(model, size, dynamic))
        difference = max(_difference(session, frozen, shape) for shape in shapes)
        if not difference <= TOLERANCE:  # so written, not-a-number is refused too
            raise RuntimeError(
                f"{path}: onnxruntime differs from PyTorch by {difference:.1e} of the largest logit, expected at "
                f"most {TOLERANCE:.0e}; nothing was written"
            )
        os.replace(draft, path)
    return Exported(path, shapes, difference)


def _checked_size(model: nn.Module, image_size: Size | None, dynamic: bool) -> Size:
    """-> the image size to export or to check at; refuses by name what cannot be exported."""
    if not isinstance(model, VisionTransformer):
        raise TypeError(f"{type(model).__name__} cannot be exported; expected a model of cpvt.create_model")
    size, p = tuple(image_size or model.config.image_size), model.config.patch_size
    if len(size) != 2 or any(n < p or n % p for n in size):
        raise ValueError(f"image_size={size} with patch size {p}; expected (height, width), multiples of {p}")
    tables = [part for part in parse_encoding(model.config.encoding) if isinstance(part, Learned)]
    if any(table.resize == "refuse" for table in tables):
        own = model.config.image_size
        if dynamic:
            raise ConfigError(
                f"learned(resize='refuse') knows {own[0]}x{own[1]} pixels only and cannot be exported with open "
                "height and width; export it at that size alone (dynamic=False), or choose resize='resample'"
            )
        if size != own:
            raise ConfigError(
                f"image_size={size[0]}x{size[1]}: learned(resize='refuse') can be exported at "
                f"{own[0]}x{own[1]} only"
            )
    rows = min(size) // p
    if dynamic and rows < smallest_grid(model):
        raise ValueError(
            f"image_size={size[0]}x{size[1]}: {rows} tokens on a side; {model.config.encoding!r} is exported "
            f"with open height and width from {smallest_grid(model)} tokens ({smallest_grid(model) * p} pixels) on"
        )
    return size


def _frozen_copy(model: VisionTransformer) -> VisionTransformer:
    """The same model on the CPU, in float32 and evaluation mode; the original keeps its own."""
    return copy.deepcopy(model).cpu().float().eval().requires_grad_(False)


def _open_sizes(model: VisionTransformer, dynamic: bool) -> dict[int, Dim]:
    """-> which axes of the images are open, by name; height and width as multiples of the patch size."""
    p, axes = model.config.patch_size, {0: Dim("batch", min=1, max=2**16)}
    if dynamic:
        rows, columns = (Dim(name, min=smallest_grid(model), max=2**12) for name in ("rows", "columns"))
        axes |= {2: p * rows, 3: p * columns} if p > 1 else {2: rows, 3: columns}
    return axes


def _trace(model: VisionTransformer, size: Size, dynamic: bool) -> ExportedProgram:
    if dynamic:  # an example that is small and has no two numbers alike, so that nothing is equal by chance
        p, low = model.config.patch_size, smallest_grid(model)
        size = ((low + 1) * p, (low + 2) * p)
    example = torch.zeros(2, model.config.in_channels, *size)
    # Plain attention: a fused kernel's choice of strides would be frozen into the graph.
    with sdpa_kernel(SDPBackend.MATH):
        return torch.export.export(model, (example,), dynamic_shapes=(_open_sizes(model, dynamic),))


def _shapes(model: VisionTransformer, size: Size, dynamic: bool):
    """Image shapes to compare at: the size asked for, then a taller, a wider and the smallest one."""
    channels, p = model.config.in_channels, model.config.patch_size
    (height, width), low = size, smallest_grid(model) * p
    yield 2, channels, height, width
    yield 1, channels, height, width
    if dynamic:
        yield 3, channels, height + 3 * p, width
        yield 2, channels, height, width + 2 * p
        yield 1, channels, low, low + p


@torch.no_grad()
def _difference(session, model: VisionTransformer, shape: tuple[int, ...]) -> float:
    """-> the largest difference between the two answers to the same images, over the largest logit."""
    images = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    expected = model(images)
    try:
        found = torch.from_numpy(session.run(None, {"images": images.numpy()})[0])
    except Exception as error:  # onnxruntime's own classes are many; each means that this size does not run
        raise RuntimeError(
            f"the exported graph does not run at {shape}: {error}; nothing was written"
        ) from None
    if found.shape != expected.shape:
        return float("inf")
    return ((found - expected).abs().max() / expected.abs().max()).item()


@contextlib.contextmanager
def _quiet():
    """Silences the converter's remarks on its own optimisations."""
    loggers = [logging.getLogger(name) for name in ("onnxscript", "onnx_ir", "torch.onnx")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", category=DeprecationWarning)
            warnings.simplefilter("ignore", category=FutureWarning)
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
