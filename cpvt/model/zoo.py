"""Models by name, timm's registry, weights from elsewhere, and PEGs for timm's own transformers.

| name             | body              | encoding               | top-1 in the paper         |
| ---------------- | ----------------- | ---------------------- | -------------------------- |
| `deit_tiny`      | 192 wide, 3 heads | learned table          | 72.2                       |
| `cpvt_tiny`      | the same          | one PEG, after block 0 | 72.4                       |
| `cpvt_tiny_5peg` | the same          | PEGs after blocks 0-4  | 73.4, the headline CPVT-Ti |

`small` is 384 wide with 6 heads, `base` 768 with 12. `_gap` reads the mean patch token instead of a class
token, `_distilled` adds DeiT's distillation token; as in `cpvt_small_5peg_gap`. Importing `cpvt` registers
every name with timm.
"""

from __future__ import annotations

import functools
import math
import re
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from timm.layers import Format
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model, resolve_pretrained_cfg
from timm.models.deit import VisionTransformerDistilled
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer as TimmVisionTransformer
from torch import Tensor, nn

from cpvt.config import Learned, ModelConfig, Peg, parse_encoding, replace
from cpvt.errors import ConfigError, nearest
from cpvt.model.encodings import PEG, Grid, resample_table
from cpvt.model.vit import VisionTransformer

SIZES = {"tiny": (192, 3), "small": (384, 6), "base": (768, 12)}  # width, heads
ENCODINGS = {
    "deit": "learned",
    "cpvt": "peg",
    "cpvt_5peg": "peg(positions=(0, 1, 2, 3, 4))",
}
_NAME = re.compile(r"(deit|cpvt)_(tiny|small|base)(_5peg)?(_gap)?(_distilled)?")


def model_names() -> list[str]:
    """Every name that `create_model` knows."""
    bodies = [f"{family}_{size}" for family in ("deit", "cpvt") for size in SIZES]
    bodies += [f"cpvt_{size}_5peg" for size in SIZES]
    return [body + suffix for body in bodies for suffix in ("", "_gap", "_distilled")]


def model_config(name: str, **overrides: Any) -> ModelConfig:
    """A name, and fields of `ModelConfig` to change -> the configuration.

    `drop_path` is 0 unless overridden: the paper's 0.1 belongs to its recipe, not to the model.
    Raises ConfigError, with the nearest names or fields, for what does not exist.
    """
    match = _NAME.fullmatch(name)
    if not match:
        raise ConfigError(f"no model {name!r}; {nearest(name, model_names())}")
    family, size, five, gap, distilled = match.groups()
    if five and family == "deit":
        raise ConfigError(
            f"no model {name!r}: a DeiT has no PEG; did you mean {name.replace('deit', 'cpvt')}?"
        )
    if gap and distilled:
        raise ConfigError(
            f"no model {name!r}: a distillation token needs a class token beside it, and _gap has no tokens; "
            "choose _gap or _distilled"
        )
    width, heads = SIZES[size]
    config = ModelConfig(
        width=width,
        heads=heads,
        encoding=ENCODINGS[family + (five or "")],
        global_pool="avg" if gap else "token",
        distilled=bool(distilled),
    )
    if isinstance(overrides.get("image_size"), int):
        overrides["image_size"] = (overrides["image_size"],) * 2
    return replace(config, **overrides)


def create_model(model: str | ModelConfig, **overrides: Any) -> VisionTransformer:
    """A name or a configuration, and fields to change -> a freshly initialised model.

    >>> create_model("cpvt_tiny", num_classes=10, image_size=(160, 320))
    """
    config = (
        replace(model, **overrides) if isinstance(model, ModelConfig) else model_config(model, **overrides)
    )
    return VisionTransformer(config)


# --------------------------------------------------------------------------- timm's registry

_TIMM_ARGUMENTS = {"img_size": "image_size", "in_chans": "in_channels", "drop_path_rate": "drop_path"}

default_cfgs = generate_default_cfgs(  # where `register_model` looks for them
    {
        name: {
            "input_size": (3, 224, 224),
            "crop_pct": 0.9,  # with ImageNet's mean and deviation: DeiT's evaluation, as in timm
            "first_conv": "patch_embed.proj",
            "classifier": ("head", "head_dist") if name.endswith("_distilled") else "head",
        }
        for name in model_names()
    }
)


def _from_timm_arguments(name: str, **kw: Any) -> VisionTransformer:
    """The model that timm's argument names describe; those that cannot be honoured are refused."""
    if kw.pop("drop_rate", 0):
        raise ConfigError(f"{name}: drop_rate; this model has no dropout, leave it 0 and use drop_path_rate")
    config = model_config(
        name, **{_TIMM_ARGUMENTS.get(key, key): v for key, v in kw.items() if key != "global_pool"}
    )
    pool = "avg" if config.global_pool == "avg" else "token"
    if kw.get("global_pool", pool) != pool:
        raise ConfigError(
            f"{name}: global_pool={kw['global_pool']!r}; its read-out is {pool!r}, chosen by _gap"
        )
    model = VisionTransformer(config)
    model.in_chans = config.in_channels  # read by timm's data configuration
    return model


def _entry_point(name: str):
    def build(pretrained: bool = False, **kw: Any) -> nn.Module:
        source = resolve_pretrained_cfg(name, kw.get("pretrained_cfg"), kw.get("pretrained_cfg_overlay"))
        if pretrained and not (source.has_weights or source.state_dict):
            raise ConfigError(
                f"{name}: pretrained=True, but there are no public weights under this name; build it with "
                "pretrained=False, then cpvt.model.zoo.load_weights(model, path)"
            )
        return build_model_with_cfg(
            functools.partial(_from_timm_arguments, name),
            name,
            pretrained,
            feature_cfg={"out_indices": kw.pop("out_indices", 3), "feature_cls": "getter"},
            **kw,
        )

    build.__name__ = build.__qualname__ = name
    build.__doc__ = f"`cpvt.create_model({name!r})` with timm's argument names."
    return build


for _name in model_names():
    globals()[_name] = register_model(_entry_point(_name))


# --------------------------------------------------------------------------- weights


def load_weights(model: nn.Module, weights: str | Path | dict, resample: bool | Grid = False) -> nn.Module:
    """Weights from a safetensors or torch file, or a state dict -> the model, with all of them loaded.

    timm's and DeiT's checkpoints load as they are, also wrapped as {"model": ...} or {"state_dict": ...}.
    A learned table of another grid is refused, unless `resample` says what its grid was: True for a square
    one (all of timm's and DeiT's), or (H, W), which cannot be told from its length. Everything is checked
    before anything is loaded. Raises ValueError or FileNotFoundError with one line.
    """
    state = _read(weights)
    for wrapper in ("model", "state_dict"):
        if isinstance(state.get(wrapper), dict):
            state = state[wrapper]
    own = model.state_dict()
    if resample and "pos_embed" in state and "pos_embed" in own:
        state = {**state, "pos_embed": _resampled(model, state["pos_embed"], resample)}
    if wrong := _mismatches(own, state):
        more = f"; and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise ValueError(
            f"weights do not fit the model: {'; '.join(wrong[:3])}{more}; nothing was loaded. "
            "Build the model that the weights were saved from, then change it"
            + (" (a learned table of another grid: resample=True)" if "pos_embed" in wrong[0] else "")
        )
    model.load_state_dict(state, strict=True)
    return model


def _read(weights: str | Path | dict) -> dict:
    if isinstance(weights, dict):
        return weights
    path = Path(weights)
    if not path.is_file():
        raise FileNotFoundError(f"no weights at {path}; expected a .safetensors, .pt or .pth file")
    try:
        if path.suffix == ".safetensors":
            return safetensors.torch.load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # every reader has errors of its own, and some run over many lines
        reason = str(error).strip().splitlines()[0][:120] if str(error).strip() else type(error).__name__
        raise ValueError(
            f"{path} cannot be read as weights ({reason}); expected safetensors or tensors only"
        ) from None
    if not isinstance(state, dict):
        raise ValueError(f"{path} holds a {type(state).__name__}; expected a dictionary of tensors")
    return state


def _mismatches(own: dict[str, Tensor], state: dict) -> list[str]:
    """One phrase for each key that keeps `state` from being loaded; wrong tables first."""
    shapes = [
        f"{key} has {_shape(state[key])}, expected {_shape(own[key])}"
        for key in sorted(own, key=lambda key: key != "pos_embed")
        if key in state and _shape(state[key]) != _shape(own[key])
    ]
    missing, unexpected = sorted(own.keys() - state.keys()), sorted(map(str, state.keys() - own.keys()))
    return (
        shapes
        + [f"{key} is missing, expected {_shape(own[key])}" for key in missing]
        + [f"{key} is unknown to the model" for key in unexpected]
    )


def _shape(value: Any) -> str:
    return (
        "x".join(map(str, value.shape)) or "a scalar" if isinstance(value, Tensor) else type(value).__name__
    )


def _resampled(model: nn.Module, table: Tensor, old: bool | Grid) -> Tensor:
    """(1, P + old N, D) -> (1, P + N, D), the prefix tokens' entries kept as they are."""
    if not isinstance(model, VisionTransformer):
        raise ValueError(
            f"resample: {type(model).__name__} is not a cpvt model; use timm's resample_abs_pos_embed"
        )
    if not isinstance(table, Tensor) or table.ndim != 3:
        return table  # refused with the rest
    P = model.num_prefix_tokens
    patches = table.shape[1] - P
    if old is True:
        side = math.isqrt(max(patches, 0))
        old = (side, side)
    if patches != old[0] * old[1] or not patches:
        raise ValueError(
            f"pos_embed has {_shape(table)}: {patches} patches beside {P} prefix tokens are not a grid of "
            f"{old[0]}x{old[1]}; pass resample=(H, W), the grid it was trained at"
        )
    (config,) = (part for part in parse_encoding(model.config.encoding) if isinstance(part, Learned))
    prefix, own = table[:, :P], table[:, P:]
    return torch.cat([prefix, resample_table(own, tuple(old), model.config.grid, config.antialias)], 1)


# --------------------------------------------------------------------------- PEGs for timm's models


class AttachedPegs(nn.ModuleDict):
    """The PEGs of a timm model, by position, and the grid of the images that it is looking at."""

    def __init__(self, config: Peg, width: int, prefix_tokens: int):
        super().__init__({str(place): PEG(width, config=config) for place in sorted(config.positions)})
        self.prefix_tokens = prefix_tokens
        self.grid: Grid | None = None

    def see(self, patch_embed: nn.Module, images: tuple[Tensor], tokens: Tensor) -> None:
        """Behind the patch embedding, whose tokens are (B, H, W, D), or (B, N, D) at a size of its own."""
        pixels = images[0].shape[-2:]
        self.grid = tuple(tokens.shape[1:3] if tokens.ndim == 4 else patch_embed.dynamic_feat_size(pixels))

    def encode(self, place: int, tokens: Tensor) -> Tensor:
        """(B, P + N, D) -> the same."""
        prefix, patches = tokens[:, : self.prefix_tokens], tokens[:, self.prefix_tokens :]
        return torch.cat([prefix, self[str(place)](patches, self.grid)], 1)

    def before(self, block: nn.Module, args: tuple) -> tuple:
        return (self.encode(-1, args[0]), *args[1:])

    def after(self, place: int, block: nn.Module, args: tuple, tokens: Tensor) -> Tensor:
        return self.encode(place, tokens)


def attach_peg(
    model: nn.Module,
    positions: tuple[int, ...] = (0,),
    drop_pos_embed: bool = False,
    kernel: int = 3,
    padding: str = "zero",
    init: str = "pytorch",
) -> nn.Module:
    """Puts PEGs into a timm `VisionTransformer` or `Eva`, in place, and returns it.

    All keys of its state dict stay; the PEGs' are `pegs.POSITION.proj.*`. `positions`, `kernel`, `padding`
    and `init` are those of `cpvt.config.Peg`. With `drop_pos_embed` the learned table goes, and with it the
    one size of image that the model could read; rotary angles stay, computed for each size.

    With gradient checkpointing, finish the backward pass of one image size before running another.
    Raises ConfigError for other families, for token dropping, and for a model that has PEGs already.
    """
    # Hooks, and not wrapped blocks: a wrapper would rename every key below `blocks`; a subclass would have
    # to copy the loops over blocks of forward_features and forward_intermediates, in two families. The hooks
    # are methods of a submodule: a deep copy (averaged weights) or a pickle then has hooks of its own.
    name = type(model).__name__
    if not isinstance(model, TimmVisionTransformer | Eva):
        raise ConfigError(
            f"attach_peg: {name} from {type(model).__module__}; expected timm's VisionTransformer or Eva, "
            "whose blocks all see one grid of tokens (a cpvt model takes encoding='peg' instead)"
        )
    if getattr(model, "pegs", None) is not None:
        raise ConfigError(
            f"attach_peg: this {name} has PEGs at {list(model.pegs)}; attach all positions at once"
        )
    if not isinstance(model.patch_drop, nn.Identity | None):
        raise ConfigError(
            f"attach_peg: this {name} drops patches (patch_drop_rate > 0), and a PEG needs the whole grid; "
            "create the model with patch_drop_rate=0"
        )
    config = replace(Peg(), positions=tuple(positions), kernel=kernel, padding=padding, init=init)
    if max(config.positions) >= len(model.blocks):
        raise ConfigError(
            f"attach_peg: positions={config.positions} in a model of {len(model.blocks)} blocks; "
            f"the last place is {len(model.blocks) - 1}"
        )
    pegs = AttachedPegs(config, model.embed_dim, model.num_prefix_tokens)
    like = next(model.blocks.parameters())
    model.pegs = pegs.to(like.device, like.dtype).train(model.training)
    model.patch_embed.register_forward_hook(pegs.see)
    for place in config.positions:
        if place == -1:
            model.blocks[0].register_forward_pre_hook(pegs.before)
        else:
            model.blocks[place].register_forward_hook(functools.partial(pegs.after, place))
    if drop_pos_embed:
        _drop_pos_embed(model)
    return model


def _drop_pos_embed(model: nn.Module) -> None:
    """Removes the learned table, and lets the model read any multiple of the patch size."""
    table, model.pos_embed = model.pos_embed, None
    if isinstance(model, VisionTransformerDistilled):  # the one class that always adds a table: now zeros
        del model.pos_embed
        model.register_buffer("pos_embed", torch.zeros_like(table), persistent=False)
    model.dynamic_img_size = True
    embed = model.patch_embed
    embed.strict_img_size, embed.flatten, embed.output_fmt = False, False, Format.NHWC
    rope = getattr(model, "rope", None)
    if rope is not None and getattr(rope, "_use_cached_embed", False):
        # What timm's constructor does where no size is given: angles are made for each grid.
        rope._use_cached_embed, rope.feat_shape, rope.pos_embed = False, None, None
