"""PEGs for timm's own transformers."""

import functools

import torch
from torch import Tensor, nn

from cpvt.config import Grid, Peg, replace
from cpvt.errors import ConfigError
from cpvt.model.encodings import PEG, check_positions, on_patches


class AttachedPegs(nn.ModuleDict):
    """The PEGs of a timm model, by position, and the grid of the images that it is looking at."""

    def __init__(self, config: Peg, width: int, prefix_tokens: int):
        super().__init__({str(position): PEG(width, config=config) for position in sorted(config.positions)})
        self.prefix_tokens = prefix_tokens
        self.grid: Grid | None = None

    def see(self, patch_embed: nn.Module, images: tuple[Tensor], tokens: Tensor) -> None:
        """Behind the patch embedding, whose tokens are (B, H, W, D), or (B, N, D) at a size of its own."""
        pixels = images[0].shape[-2:]
        self.grid = tuple(tokens.shape[1:3] if tokens.ndim == 4 else patch_embed.dynamic_feat_size(pixels))

    def encode(self, position: int, block: nn.Module, args: tuple, tokens: Tensor) -> Tensor:
        """Behind a block, whose tokens are (B, P + N, D)."""
        return on_patches(self[str(position)], tokens, self.grid, self.prefix_tokens)


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
    if not isinstance(model, VisionTransformer | Eva):
        where = type(model).__module__
        raise ConfigError(f"{name} is from {where}; expected timm's VisionTransformer or Eva")
    if getattr(model, "pegs", None) is not None:
        raise ConfigError(f"{name} has PEGs at {list(model.pegs)}; attach all positions at once")
    if not isinstance(model.patch_drop, nn.Identity | None):
        raise ConfigError(f"{name} drops patches (patch_drop_rate > 0); create it without: a PEG needs all")
    config = replace(Peg(), positions=tuple(positions), kernel=kernel, padding=padding, init=init)
    check_positions(config.positions, len(model.blocks) - 1)
    pegs = AttachedPegs(config, model.embed_dim, model.num_prefix_tokens)
    like = next(model.blocks.parameters())
    model.pegs = pegs.to(like.device, like.dtype).train(model.training)
    model.patch_embed.register_forward_hook(pegs.see)
    modules = [model.norm_pre, *model.blocks]  # all tokens pass through each, also where it is an Identity
    for position in config.positions:
        modules[position + 1].register_forward_hook(functools.partial(pegs.encode, position))
    if drop_pos_embed:
        _drop_pos_embed(model)
    return model


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
