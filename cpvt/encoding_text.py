"""Encodings as data and as text.

An encoding is written the way one would say it, as calls and sums:

    none        learned        sine(resize='rescale')        relative(clip=8, on='bias')
    peg         peg(positions=(0, 1, 2, 3, 4))               learned + peg

The same text stands in configurations, on the command line and in the measured rows.
"""

from __future__ import annotations

import ast
import dataclasses
from dataclasses import dataclass
from typing import Literal

from cpvt.checked import ConfigError, build, nearest


@dataclass(frozen=True)
class Learned:
    """A learned table, one vector a position (DeiT). At another grid it is resampled or refused."""

    resize: Literal["resample", "refuse"] = "resample"
    antialias: bool = False  # on in timm, off in DeiT; PyTorch's two bicubics differ at every size


@dataclass(frozen=True)
class Sine:
    """Fixed 2-D sine and cosine: half the width for the row, half for the column."""

    temperature: float = 10000.0
    resize: Literal["raw", "resample", "rescale"] = "raw"  # what happens at another grid

    def __post_init__(self):
        if not self.temperature > 0:
            raise ConfigError(f"sine: temperature={self.temperature}; expected more than 0")


@dataclass(frozen=True)
class Relative:
    """Offsets between tokens, clipped at +-clip, one row and one column table a block (Shaw et al.).

    `on="keys"` adds to the logits, `"keys_values"` to the values too, `"bias"` is one scalar a head
    and offset. `wrap=True` measures offsets on a torus: no border, hence no leak of absolute place.
    """

    clip: int = 8
    on: Literal["keys", "keys_values", "bias"] = "keys"
    wrap: bool = False

    def __post_init__(self):
        if self.clip < 1:
            raise ConfigError(f"relative: clip={self.clip}; expected 1 or more")


@dataclass(frozen=True)
class Rotary:
    """Axial rotary angles on queries and keys (Su et al.; for ViT: Heo et al.)."""

    theta: float = 100.0
    resize: Literal["raw", "rescale"] = "raw"

    def __post_init__(self):
        if not self.theta > 0:
            raise ConfigError(f"rotary: theta={self.theta}; expected more than 0")


@dataclass(frozen=True)
class Peg:
    """Positional encoding generator: a convolution over the tokens laid out as an image (CPVT).

    Position -1 is before block 0, position i is after block i. The defaults are the paper's PEG;
    the other values are its ablations.
    """

    positions: tuple[int, ...] = (0,)
    kernel: int = 3
    convolution: Literal["depthwise", "separable", "dense"] = "depthwise"
    padding: Literal["zero", "none", "replicate", "reflect", "circular"] = "zero"
    skip: bool = True  # add the input; must be off without padding, where the grid shrinks
    bias: bool = True
    frozen: bool = False  # random and never trained
    on: Literal["tokens", "queries_keys", "constant"] = (
        "tokens"  # constant: of an image of ones, not of the tokens
    )
    repeat: int = 1  # how many, one behind the other, at each position
    shared: bool = False  # the same weights at all positions
    init: Literal["pytorch", "twins"] = "pytorch"
    compute: Literal["convolution", "matrix"] = "convolution"  # matrix: for kernels that cover the grid

    def __post_init__(self):
        if self.kernel < 1 or self.kernel % 2 == 0:
            raise ConfigError(f"peg: kernel={self.kernel}; expected an odd number, 1 or more")
        if not self.positions or min(self.positions) < -1 or len(set(self.positions)) < len(self.positions):
            raise ConfigError(
                f"peg: positions={self.positions}; expected different numbers from -1 (before block 0) on"
            )
        if self.repeat < 1:
            raise ConfigError(f"peg: repeat={self.repeat}; expected 1 or more")
        if self.on == "constant" and self.convolution != "depthwise":
            raise ConfigError("peg: on='constant' is the border's part of a depthwise convolution")
        if self.padding == "none" and (self.skip or self.on != "tokens"):
            raise ConfigError(
                "peg: padding='none' shrinks the grid, so there is nothing of its size to add to; "
                "write peg(padding='none', skip=False), on tokens"
            )
        if self.compute == "matrix" and (self.convolution, self.padding) != ("depthwise", "zero"):
            raise ConfigError("peg: compute='matrix' is for a depthwise convolution with zero padding")


KINDS: dict[str, type] = {
    "learned": Learned,
    "sine": Sine,
    "relative": Relative,
    "rotary": Rotary,
    "peg": Peg,
}
_NAMES = {cls: name for name, cls in KINDS.items()}
EncodingPart = Learned | Sine | Relative | Rotary | Peg


def parse_encoding(text: str) -> tuple[EncodingPart, ...]:
    """Encoding text -> its parts, in the order written; `"none"` gives `()`.

    Raises ConfigError, naming the nearest known word, for anything it does not understand.
    """
    if text.strip() in ("none", ""):
        return ()
    try:
        return tuple(_parts(ast.parse(text.strip(), mode="eval").body, text))
    except SyntaxError:
        raise ConfigError(
            f"encoding {text!r} cannot be read; expected a form such as 'learned + peg(positions=(0, 1))'"
        ) from None


def _parts(node: ast.expr, text: str) -> list[EncodingPart]:
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return _parts(node.left, text) + _parts(node.right, text)
    call = node if isinstance(node, ast.Call) else ast.Call(node, [], [])
    names = {keyword.arg for keyword in call.keywords}  # None: **options; fewer than keywords: one twice
    odd = call.args or None in names or len(names) < len(call.keywords)
    if not isinstance(call.func, ast.Name) or odd:
        raise ConfigError(f"encoding {text!r}: expected NAME or NAME(option=value, ...), joined by +")
    if call.func.id not in KINDS:
        raise ConfigError(f"encoding {text!r}: no kind {call.func.id!r}; {nearest(call.func.id, KINDS)}")
    try:
        given = {k.arg: ast.literal_eval(k.value) for k in call.keywords}
    except ValueError:
        raise ConfigError(f"encoding {text!r}: the options must be plain values") from None
    return [build(KINDS[call.func.id], given, f"encoding {text!r}")]


def format_encoding(parts: tuple[EncodingPart, ...]) -> str:
    """The shortest text that `parse_encoding` turns back into `parts`."""
    return " + ".join(_format_part(part) for part in parts) or "none"


def _format_part(part: EncodingPart) -> str:
    changed = [
        f"{f.name}={getattr(part, f.name)!r}"
        for f in dataclasses.fields(part)
        if getattr(part, f.name) != f.default
    ]
    return _NAMES[type(part)] + (f"({', '.join(changed)})" if changed else "")
