"""Every name of `cpvt.model.zoo` in timm's registry: `import cpvt` brings this about (see there)."""

import functools
from typing import Any

from timm.models import build_model_with_cfg, generate_default_cfgs, register_model, resolve_pretrained_cfg
from torch import nn

from cpvt.errors import ConfigError
from cpvt.model.vit import VisionTransformer
from cpvt.model.zoo import model_config, model_names

ARGUMENTS = {"img_size": "image_size", "in_chans": "in_channels", "drop_path_rate": "drop_path"}

# DeiT's evaluation, as in timm: with ImageNet's mean and deviation, which are timm's defaults.
CFG = {"input_size": (3, 224, 224), "crop_pct": 0.9, "first_conv": "patch_embed.proj"}
HEADS = {name: ("head", "head_dist") if name.endswith("_distilled") else "head" for name in model_names()}
default_cfgs = generate_default_cfgs(  # where `register_model` looks for them
    {name: {**CFG, "classifier": head} for name, head in HEADS.items()}
)


def _build(name: str, drop_rate: float = 0, global_pool: str | None = None, **kw: Any) -> VisionTransformer:
    """The model that timm's argument names describe; those that cannot be honoured are refused."""
    if drop_rate:
        raise ConfigError(f"{name}: drop_rate={drop_rate}; there is no dropout, use drop_path_rate")
    config = model_config(name, **{ARGUMENTS.get(key, key): value for key, value in kw.items()})
    if global_pool not in (None, config.global_pool):
        raise ConfigError(f"{name}: {global_pool=}; it is chosen by the name, with or without _gap")
    model = VisionTransformer(config)
    model.in_chans = config.in_channels  # read by timm's data configuration
    return model


def _entry_point(name: str):
    def build(pretrained: bool = False, **kw: Any) -> nn.Module:
        source = resolve_pretrained_cfg(name, kw.get("pretrained_cfg"), kw.get("pretrained_cfg_overlay"))
        if pretrained and not (source.has_weights or source.state_dict):
            raise ConfigError(f"{name}: no public weights; use cpvt.model.zoo.load_weights(model, path)")
        kw["feature_cfg"] = {"out_indices": kw.pop("out_indices", 3), "feature_cls": "getter"}
        return build_model_with_cfg(functools.partial(_build, name), name, pretrained, **kw)

    build.__name__ = build.__qualname__ = name
    build.__doc__ = f"`cpvt.create_model({name!r})` with timm's argument names."
    return build


for _name in model_names():
    globals()[_name] = register_model(_entry_point(_name))
