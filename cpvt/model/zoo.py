"""Models by name, and weights from elsewhere.

| name             | body              | encoding               | top-1 in the paper         |
| ---------------- | ----------------- | ---------------------- | -------------------------- |
| `deit_tiny`      | 192 wide, 3 heads | learned table          | 72.2                       |
| `cpvt_tiny`      | the same          | one PEG, after block 0 | 72.4                       |
| `cpvt_tiny_5peg` | the same          | PEGs after blocks 0-4  | 73.4, the headline CPVT-Ti |

`small` is 384 wide with 6 heads, `base` 768 with 12. `_gap` averages the patch tokens instead of reading a class
token, `_distilled` adds DeiT's distillation token; as in `cpvt_small_5peg_gap`.
"""

import math
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from cpvt.config import Grid, Learned, ModelConfig, parse_encoding, replace
from cpvt.errors import ConfigError, UserError, nearest
from cpvt.model.encodings import resample_table
from cpvt.model.vit import VisionTransformer

SIZES = {"tiny": (192, 3), "small": (384, 6), "base": (768, 12)}  # width, heads
ENCODINGS = {
    "deit_{}": "learned",
    "cpvt_{}": "peg",
    "cpvt_{}_5peg": "peg(positions=(0, 1, 2, 3, 4))",
}
SUFFIXES = {"": {}, "_gap": {"global_pool": "avg"}, "_distilled": {"distilled": True}}
MODELS = {
    name.format(size) + suffix: ModelConfig(width=width, heads=heads, encoding=encoding, **changes)
    for name, encoding in ENCODINGS.items()
    for size, (width, heads) in SIZES.items()
    for suffix, changes in SUFFIXES.items()
}


def model_names() -> list[str]:
    """Every name that `create_model` knows."""
    return list(MODELS)


def model_config(name: str, **overrides: Any) -> ModelConfig:
    """A name, and fields of `ModelConfig` to change -> the configuration. `drop_path` is 0 unless overridden: the
    paper's 0.1 belongs to its recipe, not to the model."""
    if name not in MODELS:
        raise ConfigError(f"no model {name!r}; {nearest(name, MODELS)}")
    if isinstance(overrides.get("image_size"), int):
        overrides["image_size"] = (overrides["image_size"],) * 2
    return replace(MODELS[name], **overrides)


def create_model(model: str | ModelConfig, **overrides: Any) -> VisionTransformer:
    """A name or a configuration, and fields to change -> a freshly initialised model.

    >>> create_model("cpvt_tiny", num_classes=10, image_size=(160, 320))
    """
    change = replace if isinstance(model, ModelConfig) else model_config
    return VisionTransformer(change(model, **overrides))


# --------------------------------------------------------------------------- weights


def load_weights(model: nn.Module, weights: str | Path | dict, resample: bool | Grid = False) -> nn.Module:
    """Weights from a safetensors or torch file, or a state dict -> the model, with all of them loaded.

    timm's and DeiT's checkpoints load as they are, also wrapped as {"model": ...} or {"state_dict": ...}.
    A learned table of another grid is refused, unless `resample` says what its grid was: True for a square
    one (all of timm's and DeiT's), or (H, W). Everything is checked before anything is loaded. Raises UserError.
    """
    state = weights if isinstance(weights, dict) else _read(Path(weights))
    for wrapper in ("model", "state_dict"):
        state = state[wrapper] if isinstance(state.get(wrapper), dict) else state
    own = model.state_dict()
    if resample and "pos_embed" in state and "pos_embed" in own:
        state = {**state, "pos_embed": _resampled(model, state["pos_embed"], resample)}
    own, given = ({key: _shape(value) for key, value in values.items()} for values in (own, state))
    keys = sorted({*own, *given}, key=lambda key: (key != "pos_embed", str(key)))  # a wrong table comes first
    pairs = {key: (given.get(key, "nothing"), own.get(key, "nothing")) for key in keys}
    wrong = [f"{key} has {has}, expected {wants}" for key, (has, wants) in pairs.items() if has != wants]
    if wrong:
        more = f"; and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        more += "; resample=True resamples a table" if "pos_embed" in wrong[0] else ""
        raise UserError(f"weights do not fit the model, nothing was loaded: {'; '.join(wrong[:3])}{more}")
    model.load_state_dict(state, strict=True)
    return model


def _read(path: Path) -> dict:
    if not path.is_file():
        raise UserError(f"no weights at {path}; expected a .safetensors, .pt or .pth file")
    try:
        if path.suffix == ".safetensors":
            return safetensors.torch.load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # every reader has errors of its own, and some run over many lines
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:120]
        raise UserError(f"{path}: no weights can be read; expected tensors only ({reason})") from None
    if not isinstance(state, dict):
        raise UserError(f"{path} holds a {type(state).__name__}; expected a dictionary of tensors")
    return state


def _shape(value: Any) -> str:
    if not isinstance(value, Tensor):
        return type(value).__name__
    return "x".join(map(str, value.shape)) or "a scalar"


def _resampled(model: nn.Module, table: Tensor, old: bool | Grid) -> Tensor:
    """(1, P + old N, D) -> (1, P + N, D), the prefix tokens' entries kept as they are."""
    if not isinstance(model, VisionTransformer):
        raise UserError(f"resample: {type(model).__name__} is not a cpvt model")
    if not isinstance(table, Tensor) or table.ndim != 3:
        return table  # refused with the rest
    P, patches = model.num_prefix_tokens, table.shape[1] - model.num_prefix_tokens
    old = (math.isqrt(max(patches, 0)),) * 2 if old is True else old
    if patches != old[0] * old[1] or not patches:
        raise UserError(f"pos_embed: {patches} patches are no grid of {old}; pass resample=(H, W), its grid")
    (config,) = (part for part in parse_encoding(model.config.encoding) if isinstance(part, Learned))
    resampled = resample_table(table[:, P:], tuple(old), model.config.grid, config.antialias)
    return torch.cat([table[:, :P], resampled], 1)
