"""What can be configured: frozen dataclasses, their text forms, and a JSON round trip.

An encoding is written the way one would say it, as calls and sums:

    none        learned        sine(resize='rescale')        relative(clip=8, on='bias')
    peg         peg(positions=(0, 1, 2, 3, 4))               learned + peg

The same text stands in configurations, on the command line and in the measured rows.
"""

from __future__ import annotations

import ast
import dataclasses
import difflib
import json
from dataclasses import dataclass, field
from typing import Any, Literal, get_args, get_type_hints


class ConfigError(ValueError):
    """A configuration that makes no sense; the message says what was given and what to do."""


def nearest(given: str, known) -> str:
    """A phrase naming the known words closest to `given`, for error messages."""
    known = sorted(known)
    close = difflib.get_close_matches(given, known, n=3, cutoff=0.5)
    return f"did you mean {' or '.join(close)}?" if close else f"known: {', '.join(known)}"


# --------------------------------------------------------------------------- encodings


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
    on: Literal["tokens", "queries_keys"] = "tokens"
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
    return [_build(KINDS[call.func.id], given, f"encoding {text!r}")]


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


# --------------------------------------------------------------------------- model


@dataclass(frozen=True)
class ModelConfig:
    """A vision transformer: its size, its read-out and how it knows where things are."""

    image_size: tuple[int, int] = (224, 224)  # trained size (height, width): sets the grid of tables
    patch_size: int = 16
    in_channels: int = 3
    num_classes: int = 1000
    width: int = 192
    depth: int = 12
    heads: int = 3
    mlp_ratio: float = 4.0
    encoding: str = "learned"
    readout: Literal["class", "gap"] = "class"  # class token, or mean over the normed patch tokens
    distilled: bool = False  # a distillation token with a head of its own
    drop_path: float = 0.0  # at the last block; rises linearly from 0 at the first
    init_std: float = 0.02  # of the linear layers' first weights; DeiT's, too small for widths far below 192

    def __post_init__(self):
        for name, hint in get_type_hints(ModelConfig).items():
            object.__setattr__(self, name, _check(getattr(self, name), hint, f"ModelConfig: {name}"))
        # One spelling for each encoding, so that equal models have equal configurations.
        object.__setattr__(self, "encoding", format_encoding(parse_encoding(self.encoding)))
        for name in ("patch_size", "in_channels", "width", "depth", "heads"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)}; expected 1 or more")
        height, width = self.image_size
        if height < 1 or width < 1 or height % self.patch_size or width % self.patch_size:
            raise ConfigError(
                f"image_size={height}x{width} with patch_size={self.patch_size}: "
                "expected positive multiples of the patch size"
            )
        if self.width % self.heads:
            raise ConfigError(f"width={self.width} cannot be split among heads={self.heads}")
        if self.num_classes < 0:
            raise ConfigError(f"num_classes={self.num_classes}; expected 0 (no head) or more")
        if not 0 <= self.drop_path < 1:
            raise ConfigError(f"drop_path={self.drop_path}; expected 0 or more, below 1")
        if self.distilled and self.readout == "gap":
            raise ConfigError(
                "distilled=True with readout='gap': a distillation token beside no class token "
                "has no meaning; choose readout='class' or distilled=False"
            )

    @property
    def grid(self) -> tuple[int, int]:
        """(H, W): tokens down and across at the trained size."""
        return self.image_size[0] // self.patch_size, self.image_size[1] // self.patch_size

    @property
    def prefix_tokens(self) -> int:
        """Tokens that stand before the patches: class, distillation, or none."""
        return 0 if self.readout == "gap" else 1 + self.distilled


# --------------------------------------------------------------------------- training


@dataclass(frozen=True)
class DataConfig:
    """What is trained on: a diagnostic (drawn, `train_size` images) or real images held in memory."""

    name: str = "where"  # where, arrangement, what; tiny-imagenet, cifar10, fashion-mnist; or a folder
    root: str = "data/images"  # where real images lie or are put; never committed
    image_size: int = 64  # real images: short side resized to this, centre crop
    grid: tuple[int, int] = (14, 14)  # diagnostics: tokens down and across
    pixels: int = 1  # diagnostics: pixels a token, each way
    train_size: int = 20000  # diagnostics: images an epoch
    test_size: int = 4000  # diagnostics
    limit: int = 0  # real images: use only so many of each split (0: all)
    flip: bool = False  # real images: random horizontal flips


@dataclass(frozen=True)
class OptimConfig:
    """AdamW with a linear warm-up and a cosine; the rate is a function of the step alone."""

    batch: int = 64
    steps: int = 1000
    rate: float = 1e-3  # the peak
    warmup_steps: int = 50
    final_rate: float = 1e-5
    weight_decay: float = 0.05  # on matrices and kernels only
    smoothing: float = 0.0
    clip: float = 1.0  # largest gradient norm; 0: none
    stop_loss: float = 0.0  # stop early once the mean loss of the last 20 steps is below this; 0: never


@dataclass(frozen=True)
class RunConfig:
    """Where, how exactly and from which seed."""

    seed: int = 0
    device: str = "auto"  # auto: cuda where there is one
    precision: Literal["fp32", "bf16"] = "fp32"
    compile: bool = False
    out: str = ""  # folder of the checkpoint and the log; empty: keep nothing
    log_every: int = 50


@dataclass(frozen=True)
class TrainConfig:
    """A whole run. The same configuration and seed give the same run."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    run: RunConfig = field(default_factory=RunConfig)


# --------------------------------------------------------------------------- JSON


def to_json(config: Any) -> str:
    """A configuration -> one line of JSON."""
    return json.dumps(dataclasses.asdict(config))


def from_json(cls: type, text: str) -> Any:
    """One line of JSON -> a `cls`, equal to the one written. Unknown keys and wrong types are refused."""
    try:
        values = json.loads(text)
    except json.JSONDecodeError as error:
        raise ConfigError(f"{cls.__name__}: not JSON ({error})") from None
    return _build(cls, values, cls.__name__)


def replace(config: Any, **values: Any) -> Any:
    """A copy with some fields changed; unlike `dataclasses.replace`, names and types are checked."""
    own = {f.name: getattr(config, f.name) for f in dataclasses.fields(config)}
    return _build(type(config), {**own, **values}, type(config).__name__)


def _build(cls: type, values: Any, where: str) -> Any:
    """Checks names and types, then builds; `where` opens every message."""
    if not isinstance(values, dict):
        raise ConfigError(f"{where}: expected an object with the fields of {cls.__name__}, got {values!r}")
    hints = get_type_hints(cls)
    for name in values:
        if name not in hints:
            raise ConfigError(f"{where}: no option {name!r}; {nearest(name, hints)}")
    return cls(**{name: _check(value, hints[name], f"{where}: {name}") for name, value in values.items()})


def _check(value: Any, hint: Any, where: str) -> Any:
    if dataclasses.is_dataclass(hint):
        return value if isinstance(value, hint) else _build(hint, value, where)
    options = get_args(hint)
    if options and all(isinstance(option, str) for option in options):  # a Literal
        if value not in options:
            raise ConfigError(f"{where}={value!r}; expected one of {', '.join(map(repr, options))}")
        return value
    if options:  # a tuple of whole numbers, of any length (..., last) or of just this one
        length = None if options[-1] is Ellipsis else len(options)
        if isinstance(value, range):
            value = tuple(value)
        whole = isinstance(value, list | tuple) and all(type(v) is int for v in value)
        if not whole or length not in (None, len(value)):
            raise ConfigError(f"{where}={value!r}; expected {length or 'a list of'} whole numbers")
        return tuple(value)
    if hint is float and type(value) is int:
        return float(value)
    if type(value) is not hint:
        raise ConfigError(f"{where}={value!r}; expected {hint.__name__}")
    return value
