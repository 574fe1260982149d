"""What can be configured: frozen dataclasses for model, data, training and run, with a JSON round trip.

The command line is made from them. Encodings are in `encoding_text.py`, and handed on from here.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, get_type_hints

from cpvt.checked import ConfigError, check, from_json, nearest, replace, to_json
from cpvt.encoding_text import Learned, Peg, Relative, Rotary, Sine, format_encoding, parse_encoding

__all__ = [  # handed on
    "ConfigError",
    "Learned",
    "Peg",
    "Relative",
    "Rotary",
    "Sine",
    "format_encoding",
    "from_json",
    "nearest",
    "parse_encoding",
    "replace",
    "to_json",
]


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
    stem: Literal["patch", "conv"] = (
        "patch"  # conv: two 3x3 convolutions that see no border, before the patches
    )
    encoding: str = "learned"
    readout: Literal["class", "gap"] = "class"  # class token, or mean over the normed patch tokens
    distilled: bool = False  # a distillation token with a head of its own
    drop_path: float = 0.0  # at the last block; rises linearly from 0 at the first
    bare_blocks: int = 0  # so many first blocks have an MLP and no attention
    log_attention: bool = (
        False  # logits grow with log N beside that of training, N tokens, when the grid does
    )
    init_std: float = 0.02  # of the linear layers' first weights; DeiT's, too small for widths far below 192

    def __post_init__(self):
        for name, hint in get_type_hints(ModelConfig).items():
            object.__setattr__(self, name, check(getattr(self, name), hint, f"ModelConfig: {name}"))
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
        if not 0 <= self.bare_blocks <= self.depth:
            raise ConfigError(f"bare_blocks={self.bare_blocks}; expected 0 to depth={self.depth}")
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
    """What is trained on: a diagnostic (drawn, `train_size` images) or real images."""

    name: str = (
        "where"  # where, arrangement, what; tiny-imagenet, cifar10, fashion-mnist; or a folder (shards too)
    )
    root: str = "data/images"  # where real images lie or are put; never committed
    image_size: int = 64  # side in pixels of what the model sees
    store: Literal["memory", "files"] = (
        "memory"  # real images: decoded once and held, or read as they are needed
    )
    stored_size: int = 0  # memory: short side that images are held at, cut square (0: image_size)
    test_crop: float = 1.0  # evaluation: short side to image_size / this, then the centre; ImageNet's 0.875
    workers: int = -1  # files: processes that read; -1: one a core, 16 at most
    decode: Literal["auto", "gpu", "cpu"] = "auto"  # files: where JPEGs are decoded
    limit: int = 0  # real images: use only so many of each split (0: all)
    hold_out: int = (
        0  # real images: evaluate on every so-many-th training image, and train on the others; for
    )
    # choosing a recipe without a look at the validation images (0: train on all, evaluate on those)
    grid: tuple[int, int] = (14, 14)  # diagnostics: tokens down and across
    pixels: int = 1  # diagnostics: pixels a token, each way
    train_size: int = 20000  # diagnostics: images an epoch
    test_size: int = 4000  # diagnostics

    def __post_init__(self):
        _at_least(self, 1, "image_size", "pixels", "train_size", "test_size")
        _at_least(self, 0, "stored_size", "limit", "hold_out")
        if self.hold_out == 1:
            raise ConfigError("data.hold_out=1: nothing would be left to train on; use 10 for a tenth")
        if not 0 < self.test_crop <= 1:
            raise ConfigError(f"data.test_crop={self.test_crop}; expected above 0, 1 at most")


@dataclass(frozen=True)
class AugmentConfig:
    """What is done to training images, in this order; all off unless asked for."""

    crop: bool = False  # a random part of the image, resized (else the centre)
    crop_scale: tuple[float, float] = (0.08, 1.0)  # share of the image's area
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)  # width / height
    flip: float = 0.0  # probability of a mirror image
    randaugment: str = ""  # timm's notation: rand-m9-mstd0.5-inc1
    erase: float = 0.0  # probability of one box of noise, after normalisation
    mixup: float = 0.0  # both parameters of the Beta distribution of the share; 0: none
    cutmix: float = 0.0  # the same for pasted boxes
    mix_switch: float = 0.5  # where both are on: probability of CutMix
    mix_group: int = 64  # images that share one draw and are mixed among each other (the last with the first)
    repeats: int = 1  # copies of an image in an epoch; it then has only 1 / repeats of the images

    def __post_init__(self):
        _at_least(self, 1, "repeats")
        _at_least(self, 0, "mixup", "cutmix")
        for name in ("flip", "erase", "mix_switch"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"augment.{name}={getattr(self, name)}; expected a probability")
        for name in ("crop_scale", "crop_ratio"):
            low, high = getattr(self, name)
            if not 0 < low <= high or (name == "crop_scale" and high > 1):
                raise ConfigError(f"augment.{name}={low, high}; expected 0 < low <= high (scale: 1 at most)")
        if self.mix_group < 2 or self.mix_group % 2:
            raise ConfigError(f"augment.mix_group={self.mix_group}; expected an even number, 2 or more")


@dataclass(frozen=True)
class OptimConfig:
    """AdamW with a linear warm-up and a cosine; the rate is a function of the step alone."""

    batch: int = 64  # images a step, over all processes
    micro_batch: int = 0  # images that one process takes at once, at most; 0: its whole share
    steps: int = 1000
    epochs: int = 0  # instead of `steps`, where not 0
    rate: float = 1e-3  # the peak
    scale_rate: bool = False  # `rate` is meant for a batch of 512 and grows with the batch
    warmup_steps: int = 50
    warmup_epochs: int = 0  # instead of `warmup_steps`, where `epochs` is given
    warmup_rate: float = 0.0  # where the warm-up starts; never scaled, nor is the final rate
    final_rate: float = 1e-5
    weight_decay: float = 0.05  # on matrices and kernels only
    decay_pegs: bool = True  # off: PEGs are not decayed either, as in Twins
    smoothing: float = 0.0
    clip: float = 1.0  # largest gradient norm; 0: none
    ema: float = 0.0  # decay a step of a running average of the weights; 0: none
    ema_half_life: float = 0.0  # the same, given as a half-life in epochs
    skip_limit: int = 20  # steps without a finite loss and gradient, one after the other, that end the run
    stop_loss: float = 0.0  # stop early once the mean loss of the last 20 steps is below this; 0: never

    def __post_init__(self):
        _at_least(self, 1, "batch", "steps", "skip_limit")
        _at_least(self, 0, "micro_batch", "epochs", "warmup_steps", "warmup_epochs", "rate", "warmup_rate")
        _at_least(self, 0, "final_rate", "weight_decay", "clip", "ema", "ema_half_life")
        if self.epochs and self.steps != OptimConfig.steps:
            raise ConfigError(
                f"optim.epochs={self.epochs} and optim.steps={self.steps}: give one; the other is 0 or left alone"
            )
        if self.warmup_epochs and not self.epochs:
            raise ConfigError(
                f"optim.warmup_epochs={self.warmup_epochs} without optim.epochs: use warmup_steps"
            )
        if not 0 <= self.smoothing < 1:
            raise ConfigError(f"optim.smoothing={self.smoothing}; expected 0 or more, below 1")
        if self.ema >= 1 or (self.ema and self.ema_half_life):
            raise ConfigError(
                f"optim.ema={self.ema}, ema_half_life={self.ema_half_life}: a decay below 1, or a half-life"
            )


@dataclass(frozen=True)
class DistillConfig:
    """A teacher whose answers the distillation token learns (models named _distilled)."""

    teacher: str = ""  # one of timm's names, such as regnety_160; empty: no teacher
    weights: str = ""  # file of the teacher's weights; empty: timm's download
    kind: Literal["hard", "soft"] = "hard"
    alpha: float = 0.5  # share of the teacher's term in the loss
    tau: float = 1.0  # soft: temperature

    def __post_init__(self):
        if not 0 <= self.alpha <= 1 or not self.tau > 0:
            raise ConfigError(
                f"distill.alpha={self.alpha}, tau={self.tau}; expected a share, and a temperature above 0"
            )


@dataclass(frozen=True)
class Quirks:
    """What DeiT's published code does, perhaps without meaning to; each only when asked for."""

    epoch_schedule: bool = (
        False  # the rate changes once an epoch; epochs 0 and 1 both run at the warm-up rate
    )
    resume_ahead: bool = False  # with epoch_schedule: the first epoch after a resume has the next one's rate
    lone_no_repeats: bool = False  # a single process drops repeated augmentation without a word
    fixed_order: bool = False  # with repeated augmentation, the order of images ignores the seed
    forget_best: bool = False  # the best accuracy is forgotten at resume
    kl_by_elements: bool = (
        False  # soft distillation: the divergence divided by images x classes, not by images
    )


@dataclass(frozen=True)
class RunConfig:
    """Where, how exactly and from which seed."""

    seed: int = 0
    device: str = "auto"  # auto: cuda where there is one
    precision: Literal["fp32", "bf16", "fp16", "fp64"] = "fp32"
    compile: bool = False
    compile_blocks: bool = (
        False  # instead: the blocks alone, once for all models of a process whose blocks are alike
    )
    deterministic: bool = False  # GPU: the same run bit for bit, slower
    init: str = ""  # file of weights to start from; a learned table is resampled to the image size
    out: str = ""  # folder of checkpoints, log and model; a run found there goes on; empty: keep nothing
    log_every: int = 50
    save_every: int = 0  # steps between checkpoints; 0: once an epoch
    keep: int = 3  # checkpoints kept
    evaluate_every: int = 0  # epochs between evaluations; 0: only at the end
    tensorboard: bool = False  # also write the log for TensorBoard

    def __post_init__(self):
        _at_least(self, 1, "log_every", "keep")
        _at_least(self, 0, "seed", "save_every", "evaluate_every")
        if self.compile and self.compile_blocks:
            raise ConfigError("run: compile and compile_blocks were given; leave one out")


@dataclass(frozen=True)
class TrainConfig:
    """A whole run. The same configuration and seed give the same run."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    distill: DistillConfig = field(default_factory=DistillConfig)
    quirks: Quirks = field(default_factory=Quirks)
    run: RunConfig = field(default_factory=RunConfig)


def _at_least(config, least: int, *names: str) -> None:
    group = type(config).__name__.removesuffix("Config").lower()
    for name in names:
        if not least <= getattr(config, name) < 2**62:  # an infinite rate is none, and a seed has 62 bits
            raise ConfigError(f"{group}.{name}={getattr(config, name)}; expected {least} or more")
