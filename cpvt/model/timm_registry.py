"""Every name of `cpvt.model.zoo` in timm's registry: `import cpvt` brings this about (see there)."""

import functools
from typing import Any

from timm.layers import use_fused_attn
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model, resolve_pretrained_cfg
from timm.models._input import get_pretrained_grid_size
from torch import nn

from cpvt.errors import ConfigError
from cpvt.model.vit import VisionTransformer
from cpvt.model.zoo import model_config, model_names, resampled

ARGUMENTS = {"img_size": "image_size", "in_chans": "in_channels", "drop_path_rate": "drop_path"}
# What the models do whatever timm's arguments are: these values change nothing, others are refused.
FIXED = {"drop_rate": 0, "dynamic_img_size": True, "dynamic_img_pad": False, "strict_img_size": False}

# DeiT's evaluation and that of `cpvt.training.recipes`: 256 pixels, the centre's 224 (timm's own DeiT: 0.9), with
# ImageNet's mean and deviation, which are timm's defaults.
CFG = {"input_size": (3, 224, 224), "crop_pct": 0.875, "first_conv": "patch_embed.proj"}
HEADS = {name: ("head", "head_dist") if name.endswith("_distilled") else "head" for name in model_names()}
# Where `register_model` looks for them.
default_cfgs = generate_default_cfgs({name: {**CFG, "classifier": head} for name, head in HEADS.items()})


def _build(name: str, global_pool: str | None = None, **kw: Any) -> VisionTransformer:
    """The model that timm's argument names describe; those that cannot be honoured are refused."""
    for key, value in FIXED.items():
        if (given := kw.pop(key, value)) != value:
            raise ConfigError(f"{name}: {key}={given}; these models know {key}={value} only")
    config = model_config(name, **{ARGUMENTS.get(key, key): value for key, value in kw.items()})
    if global_pool not in (None, "", config.global_pool):
        raise ConfigError(f"{name}: {global_pool=}; it is chosen by the name, with or without _gap")
    model = VisionTransformer(config)
    if global_pool == "":
        model.reset_classifier(config.num_classes, global_pool)
    model.in_chans = config.in_channels  # read by timm's data configuration
    for block in model.blocks[config.mlp_only_blocks :]:
        block.attn.fused_attn = use_fused_attn()  # timm's switch for all models made from here on
    return model


def checkpoint_filter_fn(state: dict, model: VisionTransformer) -> dict:
    """Weights for another size of image -> for this model: a learned table is resampled."""
    table = state.get("pos_embed")
    if table is None or model.pos_embed is None or table.shape == model.pos_embed.shape:
        return state
    patches = table.shape[1] - model.num_prefix_tokens
    old = get_pretrained_grid_size(model, state.get("patch_embed.proj.weight"), patches) or True
    return {**state, "pos_embed": resampled(model, table, old)}


def _entry_point(name: str):
    def build(pretrained: bool = False, **kw: Any) -> nn.Module:
        source = resolve_pretrained_cfg(name, kw.get("pretrained_cfg"), kw.get("pretrained_cfg_overlay"))
        if pretrained and not (source.has_weights or source.state_dict):
            raise ConfigError(f"{name}: no public weights; use cpvt.model.zoo.load_weights(model, path)")
        kw["feature_cfg"] = {"out_indices": kw.pop("out_indices", 3), "feature_cls": "getter"}
        kw["pretrained_filter_fn"] = checkpoint_filter_fn
        return build_model_with_cfg(functools.partial(_build, name), name, pretrained, **kw)

    build.__name__ = build.__qualname__ = name
    build.__doc__ = f"`cpvt.create_model({name!r})` with timm's argument names."
    return build


for _name in model_names():
    globals()[_name] = register_model(_entry_point(_name))
