"""Models by name, and weights from elsewhere.

| name             | body              | encoding               | top-1 in the paper         |
| ---------------- | ----------------- | ---------------------- | -------------------------- |
| `deit_tiny`      | 192 wide, 3 heads | learned table          | 72.2                       |
| `cpvt_tiny`      | the same          | one PEG, after block 0 | 72.4                       |
| `cpvt_tiny_5peg` | the same          | PEGs after blocks 0-4  | 73.4, the headline CPVT-Ti |

`small` is 384 wide with 6 heads, `base` 768 with 12. `_gap` averages the patch tokens instead of reading a class
token, `_distilled` adds DeiT's distillation token; as in `cpvt_small_5peg_gap`.
"""

import argparse
import math
import numbers
import re
import warnings
from pathlib import Path, PosixPath
from typing import Any

import numpy
import safetensors.torch
import torch
from torch import Tensor, nn

from cpvt.config import Grid, ModelConfig, replace
from cpvt.errors import UserError, check_name, typed
from cpvt.model.vit import VisionTransformer

SIZES = {"tiny": (192, 3), "small": (384, 6), "base": (768, 12)}  # width, heads
ENCODINGS = {"deit_{}": "learned", "cpvt_{}": "peg", "cpvt_{}_5peg": "peg(positions=(0, 1, 2, 3, 4))"}
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
    check_name("model", name, MODELS)
    if isinstance(overrides.get("image_size"), numbers.Integral):
        overrides["image_size"] = (overrides["image_size"],) * 2
    return replace(MODELS[name], **overrides)


@typed
def create_model(model: str | ModelConfig, **overrides: Any) -> VisionTransformer:
    """A name or a configuration, and fields to change -> a freshly initialised model.

    >>> create_model("cpvt_tiny", num_classes=10, image_size=(160, 320))
    """
    change = replace if isinstance(model, ModelConfig) else model_config
    return VisionTransformer(change(model, **overrides))


# --------------------------------------------------------------------------- weights

AVERAGES = ("state_dict_ema", "model_ema", "ema")
WRAPPERS = (*AVERAGES, "state_dict", "model")  # of training scripts, what is preferred in front
# What such checkpoints hold beside tensors and runs no code: options, and numbers of numpy, also of numpy 1.
HARMLESS = [argparse.Namespace, PosixPath, numpy.dtype, numpy.ndarray]
HARMLESS += [kind for kind in vars(numpy.dtypes).values() if isinstance(kind, type)]
for _make in (numpy._core.multiarray.scalar, numpy._core.multiarray._reconstruct):
    HARMLESS += [_make, (_make, f"numpy.core.multiarray.{_make.__name__}")]


@typed
def load_weights(model: nn.Module, weights: str | Path | dict, resample: bool | Grid = False) -> nn.Module:
    """Weights from a safetensors or torch file, or a state dict -> the model, with all of them loaded.

    Checkpoints of training scripts (timm's, DeiT's, this package's) load as they are; where one holds a running
    average of the weights, that is loaded, and a warning says so. A learned table of another grid is refused,
    unless `resample` says what its grid was: True for a square one (all of timm's and DeiT's), or (H, W).
    Everything is checked before anything is loaded. Raises UserError.
    """
    state, own = read_weights(weights, model), model.state_dict()
    if resample and "pos_embed" in state and "pos_embed" in own:
        state = {**state, "pos_embed": resampled(model, state["pos_embed"], resample)}
    own, given = ({key: _shape(value) for key, value in values.items()} for values in (own, state))
    keys = sorted({*own, *given}, key=lambda key: (key != "pos_embed", str(key)))  # a wrong table comes first
    pairs = {key: (given.get(key, "nothing"), own.get(key, "nothing")) for key in keys}
    wrong = [f"{key} has {has}, expected {wants}" for key, (has, wants) in pairs.items() if has != wants]
    if wrong:
        more = f"; and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        more += "; resample=True resamples a table" if "pos_embed" in wrong[0] else ""
        raise UserError(f"weights do not fit the model, nothing was loaded: {'; '.join(wrong[:3])}{more}")
    if wild := [key for key in keys if not state[key].float().isfinite().all()]:
        raise UserError(f"weights are not finite, nothing was loaded: {', '.join(wild[:3])}; give others")
    model.load_state_dict(state, strict=True)
    return model


def read_weights(weights: str | Path | dict, model: nn.Module) -> dict:
    """A file or a state dict, as `load_weights` takes it -> names, those of the model, and tensors."""
    state, average = weights if isinstance(weights, dict) else _read(Path(weights)), ""
    for _ in range(3):  # some are wrapped twice; none without end
        if state.get("ema") and isinstance(state["ema"], list) and isinstance(state.get("model"), dict):
            names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
            if len(names) != len(state["ema"]):
                words = f"{len(state['ema'])} averaged tensors, the model trains {len(names)}"
                raise UserError(f"weights do not fit the model, nothing was loaded: {words}")
            state, average = {**state["model"], **dict(zip(names, state["ema"], strict=True))}, "ema"
        key = next((key for key in WRAPPERS if isinstance(state.get(key), dict)), None)
        state, average = state.get(key, state), key if key in AVERAGES else average
    if average:
        words = f"the running average of the weights is taken, {average!r} of the checkpoint"
        warnings.warn(words, stacklevel=3)
    # DistributedDataParallel and torch.compile put their names in front, in any order, or in front of a block;
    # PyTorch's AveragedModel does, and counts.
    state = {key: value for key, value in state.items() if key != "n_averaged"}
    names = [re.sub(r"^(module\.)+", "", str(key).replace("_orig_mod.", "")) for key in state]
    return dict(zip(names, state.values(), strict=True)) if len({*names}) == len(names) else state


def _read(path: Path) -> dict:
    if not path.is_file():
        raise UserError(f"no weights at {path}; expected a .safetensors, .pt or .pth file")
    try:
        if path.suffix == ".safetensors":
            return safetensors.torch.load_file(path)
        with torch.serialization.safe_globals(HARMLESS):
            state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # every reader has errors of its own, and some run over many lines
        text = re.sub(r"\x1b\[[\d;]*m", "", str(error)).strip() or type(error).__name__
        reason = text.rpartition("WeightsUnpickler error: ")[2].partition(". ")[0].splitlines()[0][:120]
        words = f"no weights can be read; expected tensors and plain values ({reason})"
        raise UserError(f"{path}: {words}") from None
    if not isinstance(state, dict):
        raise UserError(f"{path} holds a {type(state).__name__}; expected a dictionary of tensors")
    return state


def _shape(value: Any) -> str:
    if not isinstance(value, Tensor):
        return type(value).__name__
    return "x".join(map(str, value.shape)) or "a scalar"


def resampled(model: nn.Module, table: Tensor, old: bool | Grid) -> Tensor:
    """(1, P + old N, D) -> (1, P + N, D), the prefix tokens' entries kept as they are."""
    if not isinstance(model, VisionTransformer):
        raise UserError(f"resample: {type(model).__name__} is not a cpvt model")
    if not isinstance(table, Tensor) or table.ndim != 3:
        return table  # refused with the rest
    patches = table.shape[1] - model.num_prefix_tokens
    old = (math.isqrt(max(patches, 0)),) * 2 if old is True else old
    if patches != old[0] * old[1] or not patches:
        raise UserError(f"pos_embed: {patches} patches are no grid of {old}; pass resample=(H, W), its grid")
    return model.encoding.learned.resampled(table, tuple(old), model.config.grid)
