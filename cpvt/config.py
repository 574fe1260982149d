"""What can be configured: frozen dataclasses for model, data, training and run, with a JSON round trip.

The command line is made from them. An encoding is written as calls and sums, the way one would say it:

    none        learned        sine(resize='rescale')        relative(clip=8, on='bias')
    peg         peg(positions=(0, 1, 2, 3, 4))               learned + peg

The same text stands in configurations, on the command line and in the measured rows.
"""

import ast
import dataclasses
import json
import math
import numbers
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from types import UnionType
from typing import Any, Literal, get_args, get_type_hints

from cpvt.errors import ConfigError, nearest, typed

Grid = tuple[int, int]  # (H, W): tokens down and across
LARGEST = 2**62  # a seed has so many bits
LONGEST_ENCODING = 1000  # characters
MOST_WEIGHTS = 10**10  # of a model; the largest vision transformers have twice as many


def pair(size: int | Grid) -> Grid:
    """The side of a square, or (H, W) -> (H, W)."""
    return (size, size) if isinstance(size, numbers.Integral) else tuple(size)


class Checked:
    """A configuration: however it is made, values of a wrong type are refused, then those that make no sense."""

    def __post_init__(self):
        for name, hint in _hints(type(self)).items():
            value = _check(getattr(self, name), hint, f"{_group(self)}.{name}")
            object.__setattr__(self, name, value)
        self.check()

    def check(self) -> None:
        """Raises ConfigError for values that make no sense."""


_hints = cache(get_type_hints)


def to_json(config: Any) -> str:
    """A configuration -> one line of JSON."""
    return json.dumps(dataclasses.asdict(config))


@typed
def from_json(cls: type, text: str) -> Any:
    """One line of JSON -> a `cls`, equal to the one written. Unknown names and wrong types are refused."""
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as error:  # what is nested too deep, a number too long
        raise ConfigError(f"{cls.__name__}: not JSON ({error})") from None
    return _build(cls, values, cls.__name__)


def replace(config: Any, **values: Any) -> Any:
    """A copy with some fields changed; unlike `dataclasses.replace`, names and types are checked."""
    own = {f.name: getattr(config, f.name) for f in dataclasses.fields(config)}
    return _build(type(config), {**own, **values}, type(config).__name__)


def _build(cls: type, values: Any, where: str) -> Any:
    """Checks names and types, then builds; `where` opens every message."""
    if not isinstance(values, dict):
        raise ConfigError(f"{where}={_short(values)}; expected an object with the fields of {cls.__name__}")
    hints = _hints(cls)
    for name in values:
        if name not in hints:
            raise ConfigError(f"{where}: no option {name!r}; {nearest(name, hints)}")
    return cls(**{name: _check(value, hints[name], f"{where}: {name}") for name, value in values.items()})


def _plain(value: Any) -> Any:
    """A path, or a number of numpy's -> Python's text, or number."""
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    return value.item() if isinstance(value, numbers.Number) and hasattr(value, "item") else value


def _check(value: Any, hint: Any, where: str) -> Any:
    value = [*map(_plain, value)] if isinstance(value, list | tuple | range) else _plain(value)
    if isinstance(hint, UnionType):  # a number, or a tuple of them
        one, several = get_args(hint)
        return _check(value, several if isinstance(value, list) else one, where)
    if dataclasses.is_dataclass(hint):
        return value if isinstance(value, hint) else _build(hint, value, where)
    options = get_args(hint)
    if options and all(isinstance(option, str) for option in options):  # a Literal
        if value not in options:
            raise ConfigError(f"{where}={_short(value)}; expected one of {', '.join(map(repr, options))}")
        return value
    if options:  # a tuple of numbers, of any length (..., last) or of just this one
        length = None if options[-1] is Ellipsis else len(options)
        kinds, words = ((int, float), "numbers") if options[0] is float else ((int,), "whole numbers")
        fine = isinstance(value, list) and all(type(v) in kinds for v in value)
        if not fine or length not in (None, len(value)):
            raise ConfigError(f"{where}={_short(value)}; expected {length or 'a list of'} {words}")
        return tuple(_check(v, options[0], where) for v in value)
    if hint is float and type(value) is int and abs(value) < LARGEST:
        value = float(value)
    if type(value) is not hint:
        raise ConfigError(f"{where}={_short(value)}; expected {hint.__name__}")
    if hint in (int, float) and not abs(value) < LARGEST:  # infinity and NaN neither
        raise ConfigError(f"{where}={_short(value)}; expected a number below 2^62")
    return value


def _short(value: Any) -> str:
    """What was given, as a refusal shows it."""
    if type(value) is int and abs(value) >= LARGEST:
        return f"a number of {value.bit_length():,} bits"
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:80]}... ({len(text):,} characters)"


def _need(config: Any, condition: bool, expected: str, *names: str) -> None:
    """Raises ConfigError with the values of the named fields unless `condition` holds."""
    if not condition:
        raise ConfigError(f"{_shown(config, names)}; expected {expected}")


def _group(config: Any) -> str:
    return type(config).__name__.removesuffix("Config").lower()


def _shown(config: Any, names: Iterable[str]) -> str:
    return ", ".join(f"{_group(config)}.{name}={_short(getattr(config, name))}" for name in names)


def _at_least(config: Any, least: int, *names: str) -> None:
    for name in names:
        _need(config, getattr(config, name) >= least, f"{least} or more", name)


def refuse_idle(config: Any, why: str, *names: str) -> None:
    """Raises ConfigError for the named fields, none of which has an effect, that are not as by default."""
    if given := [name for name in names if getattr(config, name) != getattr(type(config), name)]:
        raise ConfigError(f"{_shown(config, given)}: no effect {why}; leave it out")


def local_path(path: str | Path) -> str:
    """With the home folder in place of ~. Raises ConfigError for an address."""
    if address := re.match(r"(\w\w+):/+(.*)", str(path)):
        words = f"{address[1]}://{address[2]} is an address, and no folder or file"
        raise ConfigError(f"{words}: download what is there, unpack it, and give its path")
    return os.path.expanduser(path)


# --------------------------------------------------------------------------- encodings


@dataclass(frozen=True)
class Learned(Checked):
    """A learned table, one vector a position (DeiT). At another grid it is resampled or refused."""

    resize: Literal["resample", "refuse"] = "resample"
    antialias: bool = False  # on in timm, off in DeiT; PyTorch's two bicubics differ at every size


@dataclass(frozen=True)
class Sine(Checked):
    """Fixed 2-D sine and cosine: half the width for the row, half for the column."""

    temperature: float = 10000.0
    resize: Literal["raw", "resample", "rescale"] = "raw"  # what happens at another grid

    def check(self):
        _need(self, self.temperature > 0, "more than 0", "temperature")


@dataclass(frozen=True)
class Relative(Checked):
    """Offsets between tokens, clipped at +-clip, one row and one column table a block (Shaw et al.)."""

    clip: int = 8
    on: Literal["keys", "keys_values", "bias"] = "keys"  # bias: one scalar a head and offset
    wrap: bool = False  # offsets on a torus: no border, hence no leak of absolute position

    def check(self):
        _need(self, 1 <= self.clip <= 10**6, "1 to a million", "clip")


@dataclass(frozen=True)
class Rotary(Checked):
    """Axial rotary angles on queries and keys (Su et al.; for ViT: Heo et al.)."""

    theta: float = 100.0
    resize: Literal["raw", "rescale"] = "raw"

    def check(self):
        _need(self, self.theta > 0, "more than 0", "theta")


@dataclass(frozen=True)
class Peg(Checked):
    """Positional encoding generator: a convolution over the tokens laid out as an image (CPVT). By default the
    paper's; the other values are its ablations."""

    positions: tuple[int, ...] = (0,)  # i: after block i; -1: before block 0
    kernel: int = 3
    convolution: Literal["depthwise", "separable", "dense"] = "depthwise"
    padding: Literal["zero", "none", "replicate", "reflect", "circular"] = "zero"
    skip: bool = True  # add the input; must be off without padding, where the grid shrinks
    bias: bool = True
    frozen: bool = False  # random and never trained
    on: Literal["tokens", "queries_keys", "constant"] = "tokens"  # constant: ones, to show the border
    repeat: int = 1  # how many, one behind the other, at each position
    init: Literal["pytorch", "twins"] = "pytorch"
    compute: Literal["convolution", "matrix"] = "convolution"  # matrix: for kernels that cover the grid

    def check(self):
        _need(self, self.kernel % 2 == 1 and 1 <= self.kernel < 1000, "an odd number, 1 to 999", "kernel")
        fine = self.positions and min(self.positions) >= -1 and len({*self.positions}) == len(self.positions)
        _need(self, bool(fine), "different numbers from -1 (before block 0) on", "positions")
        _need(self, 1 <= self.repeat <= 100, "1 to 100", "repeat")
        if self.on == "constant" and self.convolution != "depthwise":
            raise ConfigError("peg: on='constant' is the border's part of a depthwise convolution")
        if self.padding == "none" and (self.skip or self.on != "tokens"):
            raise ConfigError("peg: padding='none' shrinks the grid: only with skip=False, on='tokens'")
        if self.compute == "matrix" and (self.convolution, self.padding) != ("depthwise", "zero"):
            raise ConfigError("peg: compute='matrix' is for a depthwise convolution with zero padding")


ENCODINGS: dict[str, type] = {cls.__name__.lower(): cls for cls in (Learned, Sine, Relative, Rotary, Peg)}
EncodingPart = Learned | Sine | Relative | Rotary | Peg


@typed
def parse_encoding(text: str) -> tuple[EncodingPart, ...]:
    """Encoding text -> its parts, in the order written; `"none"` gives `()`. Raises ConfigError."""
    if text.strip() in ("none", ""):
        return ()
    if len(text) > LONGEST_ENCODING:
        raise ConfigError(f"encoding {_short(text)}; expected {LONGEST_ENCODING} characters at most")
    try:
        return tuple(_parts(ast.parse(text.strip(), mode="eval").body, text))
    except (SyntaxError, RecursionError, MemoryError, OverflowError):
        raise ConfigError(f"encoding {_short(text)} cannot be read; write, say, peg(kernel=5)") from None


def _parts(node: ast.expr, text: str) -> list[EncodingPart]:
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return _parts(node.left, text) + _parts(node.right, text)
    call = node if isinstance(node, ast.Call) else ast.Call(node, [], [])
    names = {keyword.arg for keyword in call.keywords}  # None: **options; fewer than keywords: one twice
    if not isinstance(call.func, ast.Name) or call.args or None in names or len(names) < len(call.keywords):
        raise ConfigError(f"encoding {_short(text)}: expected NAME or NAME(option=value, ...), joined by +")
    kind, where = call.func.id, f"encoding {_short(text)}"
    if kind not in ENCODINGS:
        raise ConfigError(f"{where}: no kind {kind!r}; {nearest(kind, ENCODINGS)}")
    try:
        given = {k.arg: ast.literal_eval(k.value) for k in call.keywords}
    except (ValueError, TypeError, RecursionError, MemoryError):
        raise ConfigError(f"{where}: the options must be plain values") from None
    return [_build(ENCODINGS[kind], given, where)]


def format_encoding(parts: tuple[EncodingPart, ...]) -> str:
    """The shortest text that `parse_encoding` turns back into `parts`."""
    words = []
    for part in parts:
        options = {f.name: (getattr(part, f.name), f.default) for f in dataclasses.fields(part)}
        changed = ", ".join(f"{name}={value!r}" for name, (value, usual) in options.items() if value != usual)
        words.append(type(part).__name__.lower() + (f"({changed})" if changed else ""))
    return " + ".join(words) or "none"


@dataclass(frozen=True)
class ModelConfig(Checked):
    """A vision transformer: its size, its pooling and how it knows where things are."""

    image_size: tuple[int, int] = (224, 224)  # trained size (height, width): sets the grid of tables
    patch_size: int = 16
    in_channels: int = 3
    num_classes: int = 1000  # in training, as the size, the data's
    width: int = 192
    depth: int = 12
    heads: int = 3
    mlp_ratio: float = 4.0
    stem: Literal["patch", "conv"] = "patch"  # conv: two 3x3 first, that see no border
    encoding: str = "learned"
    global_pool: Literal["token", "avg"] = "token"  # class token, or mean over the normed patch tokens
    distilled: bool = False  # a distillation token with a head of its own
    drop_path: float = 0.0  # at the last block; rises linearly from 0 at the first
    mlp_only_blocks: int = 0  # so many first blocks have an MLP and no attention
    init_std: float = 0.02  # of the linear layers' first weights; DeiT's, too small for widths far below 192

    def check(self):
        # One spelling for each encoding, so that equal models have equal configurations.
        object.__setattr__(self, "encoding", format_encoding(parse_encoding(self.encoding)))
        _at_least(self, 1, "patch_size", "in_channels", "width", "heads")
        _at_least(self, 0, "num_classes", "init_std")
        _need(self, 1 <= self.depth <= 1000, "1 to 1000", "depth")
        _need(self, self.mlp_ratio * self.width >= 1, "a hidden layer of 1 or more", "mlp_ratio", "width")
        height, width = self.image_size
        fits = height >= 1 and width >= 1 and not height % self.patch_size and not width % self.patch_size
        _need(self, fits, "positive multiples of the patch size", "image_size", "patch_size")
        _need(self, self.width % self.heads == 0, "a multiple of the heads", "width", "heads")
        _need(self, 0 <= self.mlp_only_blocks <= self.depth, f"0 to depth={self.depth}", "mlp_only_blocks")
        _need(self, 0 <= self.drop_path < 1, "0 or more, below 1", "drop_path")
        block = (4 + 2 * self.mlp_ratio) * self.width  # a token of it
        tables = self.patch_size**2 * self.in_channels + math.prod(self.grid) + self.num_classes
        names = "image_size", "patch_size", "in_channels", "num_classes", "width", "depth", "mlp_ratio"
        small = (self.depth * block + tables) * self.width <= MOST_WEIGHTS
        _need(self, small, f"at most {MOST_WEIGHTS:,} weights", *names)
        if self.distilled and self.global_pool == "avg":
            raise ConfigError("distilled=True, global_pool='avg'; expected global_pool='token' with it")

    @property
    def grid(self) -> Grid:
        """(H, W): tokens down and across at the trained size."""
        return self.image_size[0] // self.patch_size, self.image_size[1] // self.patch_size

    @property
    def prefix_tokens(self) -> int:
        """Tokens that stand before the patches: class, distillation, or none."""
        return 0 if self.global_pool == "avg" else 1 + self.distilled


# --------------------------------------------------------------------------- training


@dataclass(frozen=True)
class DataConfig(Checked):
    """What is trained on: a synthetic task (drawn, `train_size` images) or real images."""

    name: str = "where"  # arrangement, what; tiny-imagenet; or a folder (shards too)
    root: str = "data/images"  # where real images lie or are put; never committed
    image_size: int | Grid = 64  # pixels of what the model sees: the side of a square, or height and width
    store: Literal["memory", "files"] = "memory"  # held decoded, or read when needed
    stored_size: int = 0  # memory: short side that images are held at, cut to shape (0: image_size's)
    interpolation: Literal["bicubic", "area"] = "bicubic"  # area: memory only; every size is a mean of pixels
    crop_pct: float = 1.0  # evaluation: short side to image_size / this, then the centre; ImageNet's 0.875
    workers: int = -1  # files: processes that read; -1: one a core, 16 at most
    decode: Literal["auto", "cpu"] = "auto"  # files: where JPEGs are decoded; auto: on a GPU by it
    limit: int = 0  # real images: use only so many of each split (0: all)
    hold_out: int = 0  # evaluate on every so-many-th training image, train on the others (0: the usual split)
    grid: Grid = (14, 14)  # synthetic: tokens down and across
    pixels: int = 1  # synthetic: pixels a token, each way
    train_size: int = 20000  # synthetic: images an epoch
    test_size: int = 4000  # synthetic

    def check(self):
        _need(self, self.name != "", "a synthetic task, a data set or a folder", "name")
        high, wide = pair(self.image_size)
        object.__setattr__(self, "image_size", high if high == wide else (high, wide))  # one spelling
        _need(self, 1 <= min(high, wide) <= max(high, wide) <= 2**15, "1 to 32768 a side", "image_size")
        _at_least(self, 1, "pixels", "train_size", "test_size")
        _need(self, 1 <= min(self.grid) <= max(self.grid) <= 2**15, "1 to 32768 a side", "grid")
        _at_least(self, 0, "stored_size", "limit", "hold_out")
        _need(self, self.hold_out != 1, "0, or 2 or more", "hold_out")
        _need(self, -1 <= self.workers <= 512, "-1 to 512", "workers")
        _need(self, 0 < self.crop_pct <= 1, "above 0, 1 at most", "crop_pct")
        fine = self.interpolation == "bicubic" or (self.store == "memory" and self.crop_pct == 1)
        _need(self, fine, "store='memory', crop_pct=1 with area", "interpolation", "store", "crop_pct")
        idle = ("stored_size",) if self.store == "files" else ("decode", "workers")[: 1 + (self.workers > 0)]
        refuse_idle(self, f"with store={self.store!r}", *idle)

    @property
    def shape(self) -> Grid:
        """(height, width) in pixels of what the model sees."""
        return pair(self.image_size)

    @property
    def held_shape(self) -> Grid:
        """(height, width) in pixels of what is held in memory."""
        short = min(self.shape)
        return tuple(round(n * (self.stored_size or short) / short) for n in self.shape)


@dataclass(frozen=True)
class AugmentConfig(Checked):
    """What is done to training images, in this order; all off unless asked for."""

    crop: bool = False  # a random part of the image, resized (else the centre)
    crop_scale: tuple[float, float] = (0.08, 1.0)  # share of the image's area
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)  # width / height
    crop_place: Literal["random", "centre"] = "random"  # centre: no object is shifted
    hflip: float = 0.0  # probability of a mirror image
    randaugment: str = ""  # timm's notation: rand-m9-mstd0.5-inc1
    random_erasing: float = 0.0  # probability of one box of noise, after normalisation
    mixup: float = 0.0  # both parameters of the Beta distribution of the share; 0: none
    cutmix: float = 0.0  # the same for pasted boxes
    mixup_switch_prob: float = 0.5  # where both are on: probability of CutMix
    mix_group: int = 64  # images that share one draw and are mixed among each other (the last with the first)
    repeated_aug: int = 1  # copies of an image in an epoch; it then has only 1 / so many of the images

    def check(self):
        _at_least(self, 1, "repeated_aug")
        _at_least(self, 0, "mixup", "cutmix")
        for name in ("hflip", "random_erasing", "mixup_switch_prob"):
            _need(self, 0 <= getattr(self, name) <= 1, "a probability", name)
        for name in ("crop_scale", "crop_ratio"):
            low, high = getattr(self, name)
            fine = 0 < low <= high and (name == "crop_ratio" or high <= 1)
            _need(self, fine, "0 < low <= high (scale: 1 at most)", name)
        if not self.crop:
            refuse_idle(self, "without crop", "crop_scale", "crop_ratio", "crop_place")
        if not (self.mixup and self.cutmix):
            refuse_idle(self, "without both mixup and cutmix", "mixup_switch_prob")
        _need(self, self.mix_group >= 2 and self.mix_group % 2 == 0, "an even number, 2 or more", "mix_group")


@dataclass(frozen=True)
class OptimConfig(Checked):
    """AdamW with a linear warm-up and a cosine; the learning rate is a function of the step alone."""

    global_batch_size: int = 64  # images a step, over all processes
    micro_batch_size: int = 0  # images that one process takes at once, at most; 0: its whole share
    steps: int = 1000
    epochs: int = 0  # instead of `steps`, where not 0
    lr: float = 1e-3  # the peak
    scale_lr: bool = False  # `lr` is meant for a batch of 512 and grows with the batch
    warmup_steps: int = 50
    warmup_epochs: int = 0  # instead of `warmup_steps`, where not 0; with `epochs`
    warmup_lr: float = 0.0  # where the warm-up starts; never scaled, nor is `min_lr`
    min_lr: float = 1e-5
    weight_decay: float = 0.05  # on matrices and kernels only
    decay_pegs: bool = True  # off: PEGs are not decayed either, as in Twins
    label_smoothing: float = 0.0
    clip_grad: float = 1.0  # largest gradient norm; 0: none
    ema_decay: float = 0.0  # a step, of a running average of the weights; 0: none
    ema_half_life: float = 0.0  # the same, given as a half-life in epochs
    skip_limit: int = 20  # steps without a finite loss and gradient, one after the other, that end the run
    stop_loss: float = 0.0  # stop early once the mean loss of the last 20 steps is below this; 0: never

    def check(self):
        _at_least(self, 1, "global_batch_size", "steps", "skip_limit")
        _at_least(self, 0, "micro_batch_size", "epochs", "warmup_steps", "warmup_epochs", "lr", "warmup_lr")
        _at_least(self, 0, "min_lr", "weight_decay", "clip_grad", "ema_decay", "ema_half_life", "stop_loss")
        one = not self.epochs or self.steps == OptimConfig.steps
        _need(self, one, "one of them; the other is 0 or left alone", "epochs", "steps")
        _need(self, self.epochs or not self.warmup_epochs, "epochs too, or warmup_steps", "warmup_epochs")
        if self.warmup_epochs:
            refuse_idle(self, "beside warmup_epochs", "warmup_steps")
        _need(self, 0 <= self.label_smoothing < 1, "0 or more, below 1", "label_smoothing")
        fine = self.ema_decay < 1 and not (self.ema_decay and self.ema_half_life)
        _need(self, fine, "a decay below 1, or a half-life", "ema_decay", "ema_half_life")


@dataclass(frozen=True)
class DistillConfig(Checked):
    """A teacher whose best guesses the distillation token learns as labels (models named _distilled)."""

    teacher: str = ""  # one of timm's names, such as regnety_160; empty: no teacher
    weights: str = ""  # file of the teacher's weights; empty: timm's download
    alpha: float = 0.5  # share of the teacher's term in the loss

    def check(self):
        object.__setattr__(self, "weights", local_path(self.weights))
        _need(self, 0 <= self.alpha <= 1, "a share, 0 to 1", "alpha")
        if not self.teacher:
            refuse_idle(self, "without distill.teacher", "weights", "alpha")


@dataclass(frozen=True)
class RunConfig(Checked):
    """Where, how exactly and from which seed."""

    seed: int = 0
    device: str = "auto"  # auto: cuda where there is one
    precision: Literal["fp32", "bf16", "fp64"] = "fp32"
    bf16_tokens: bool = False  # bf16: keep tokens in it between blocks, too; gradients are less exact
    compile: Literal["off", "model", "blocks"] = "off"  # blocks: once for all that are alike
    deterministic: bool = False  # GPU: the same run bit for bit, slower
    init: str = ""  # file of weights to start from; a table is resampled, a head for other classes drawn anew
    freeze: int = 0  # first blocks, and what stands before them, that are not trained; -1: all but the head
    out: str = ""  # folder of checkpoints, log and model; a run found there goes on; empty: keep nothing
    log_every: int = 50  # steps
    save_every: int = 0  # steps between checkpoints; 0: once an epoch
    keep_checkpoints: int = 3
    evaluate_every: int = 0  # epochs between evaluations; 0: only at the end

    def check(self):
        for name in filter(self.__dict__.get, ("init", "out")):
            object.__setattr__(self, name, local_path(getattr(self, name)))
        _at_least(self, 1, "log_every", "keep_checkpoints")
        _at_least(self, 0, "seed", "save_every", "evaluate_every")
        _at_least(self, -1, "freeze")
        if not self.out:
            refuse_idle(self, "without run.out", "save_every", "keep_checkpoints")
        fine = self.precision == "bf16" or not self.bf16_tokens
        _need(self, fine, "precision=bf16 with bf16_tokens", "bf16_tokens", "precision")


@dataclass(frozen=True)
class TrainConfig(Checked):
    """A whole run. The same configuration and seed give the same run."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    distill: DistillConfig = field(default_factory=DistillConfig)
    run: RunConfig = field(default_factory=RunConfig)

    def check(self):
        if self.run.freeze > self.model.depth:
            raise ConfigError(f"run.freeze={self.run.freeze}; model.depth={self.model.depth} at most")
