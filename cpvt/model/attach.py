"""PEGs for timm's own transformers."""

import functools

import torch
from torch import Tensor, nn

from cpvt.config import Grid, Peg, replace
from cpvt.errors import ConfigError, typed
from cpvt.model.encodings import PEG, check_positions, on_patches, traced


class AttachedPegs(nn.ModuleDict):
    """The PEGs of a timm model, by position, and the grid of the images that it is looking at."""

    def __init__(self, config: Peg, width: int, prefix_tokens: int):
        super().__init__({str(position): PEG(width, config=config) for position in sorted(config.positions)})
        self.prefix_tokens = prefix_tokens
        self.grid: Grid | None = None

    def __getstate__(self) -> dict:
        return {**vars(self), "grid": None}  # it belongs to one forward pass, not to a copy

    def see(self, patch_embed: nn.Module, images: tuple[Tensor], tokens: Tensor) -> None:
        """Behind the patch embedding, whose tokens are (B, H, W, D), or (B, N, D) at a size of its own."""
        flat = patch_embed.flatten if traced(tokens) else tokens.ndim == 3
        sizes = patch_embed.dynamic_feat_size(images[0].shape[-2:]) if flat else tokens.shape[1:3]
        self.grid = sizes[0], sizes[1]

    def encode(self, position: int, block: nn.Module, args: tuple, tokens: Tensor) -> Tensor:
        """Behind a block, whose tokens are (B, P + N, D)."""
        return on_patches(self[str(position)], tokens, self.grid, self.prefix_tokens)

    def encode_first(self, block: nn.Module, args: tuple) -> tuple:
        """In front of block 0: position -1."""
        return self.encode(-1, block, args, args[0]), *args[1:]


@typed
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
    """
    from timm.models.eva import Eva  # here: timm takes seconds to import
    from timm.models.vision_transformer import VisionTransformer

    # Hooks, and not wrapped blocks: a wrapper would rename every key below `blocks`; a subclass would have
    # to copy the loops over blocks of forward_features and forward_intermediates, in two families. The hooks
    # are methods of a submodule: a deep copy (averaged weights) or a pickle then has hooks of its own.
    name = f"attach_peg: this {type(model).__name__}"
    if compiled(model):  # its code is made, and would go on without the PEGs
        raise ConfigError(f"{name} is compiled; attach PEGs first, then compile it")
    if not isinstance(model, VisionTransformer | Eva):
        where = type(model).__module__
        raise ConfigError(f"{name} is from {where}; expected timm's VisionTransformer or Eva")
    if getattr(model, "pegs", None) is not None:
        raise ConfigError(f"{name} has PEGs at {list(model.pegs)}; attach all positions at once")
    if not isinstance(model.patch_drop, nn.Identity | None):
        raise ConfigError(f"{name} drops patches (patch_drop_rate > 0); create it without: a PEG needs all")
    config = replace(Peg(), positions=positions, kernel=kernel, padding=padding, init=init)
    check_positions(config.positions, len(model.blocks) - 1)
    pegs = AttachedPegs(config, model.embed_dim, model.num_prefix_tokens)
    like = next(model.blocks.parameters())
    model.pegs = pegs.to(like.device, like.dtype).train(model.training)
    model.patch_embed.register_forward_hook(pegs.see)
    for position in config.positions:
        if position < 0:
            model.blocks[0].register_forward_pre_hook(pegs.encode_first)
        else:
            model.blocks[position].register_forward_hook(functools.partial(pegs.encode, position))
    model.prune_intermediate_layers = functools.partial(_prune_intermediate_layers, model)
    model.group_matcher = functools.partial(_group_matcher, model)
    if drop_pos_embed:
        _drop_pos_embed(model)
    return model


def compiled(model: nn.Module) -> bool:
    """Whether torch.compile was given the model or a part of it, in any of its three ways."""
    return any(
        module._compiled_call_impl is not None
        or "_orig_mod" in module._modules
        or hasattr(module.forward, "_torchdynamo_orig_callable")
        for module in model.modules()
    )


def _prune_intermediate_layers(model: nn.Module, *args, **kw) -> list[int]:
    """timm's; the PEGs behind removed blocks go with them."""
    kept = type(model).prune_intermediate_layers(model, *args, **kw)
    for position in [p for p in model.pegs if int(p) >= len(model.blocks)]:
        del model.pegs[position]
    return kept


def _group_matcher(model: nn.Module, coarse: bool = False) -> dict:
    """timm's; a PEG belongs to the block in front of it, before block 0 to the stem."""
    own = type(model).group_matcher(model, coarse)
    return {**own, "stem": own["stem"] + r"|^pegs\.-1", "blocks": [*own["blocks"], (r"^pegs\.(\d+)", None)]}


def _drop_pos_embed(model: nn.Module) -> None:
    """Removes the learned table, and lets the model read any multiple of the patch size."""
    from timm.layers import Format
    from timm.models.deit import VisionTransformerDistilled

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
