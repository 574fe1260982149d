"""The vision transformer: image -> patches -> tokens -> blocks -> logits. It names no encoding.

Letters: B batch, N = H*W patches, P prefix tokens (class, distillation), T = P + N tokens,
D width, h heads, d = D/h head width, (H, W) grid of tokens. State-dict keys are timm's and DeiT's.
"""

from __future__ import annotations

import dataclasses
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from cpvt.config import ModelConfig
from cpvt.errors import ConfigError
from cpvt.model.conventions import TimmConventions
from cpvt.model.encodings import Grid, PositionEncoding, build_encoding


class PatchEmbed(nn.Module):
    """(B, C, H*p, W*p) -> (B, N, D) and the grid (H, W): one linear map of every p x p patch."""

    def __init__(self, in_channels: int, width: int, patch_size: int, stem: str = "patch"):
        super().__init__()
        self.patch_size, self.in_channels = patch_size, in_channels
        if (
            stem == "conv"
        ):  # around the image's edge, or the zeros beyond it would tell every encoding its place
            hidden, around = width // 4, {"padding": 1, "padding_mode": "circular"}
            layers = nn.Conv2d(in_channels, hidden, 3, **around), nn.Conv2d(hidden, hidden, 3, **around)
            self.stem = nn.Sequential(layers[0], nn.GELU(), layers[1], nn.GELU())
            in_channels = hidden
        self.proj = nn.Conv2d(in_channels, width, patch_size, stride=patch_size)

    def forward(self, images: Tensor) -> tuple[Tensor, Grid]:
        p, channels = self.patch_size, self.in_channels
        if images.ndim != 4 or images.shape[1] != channels:
            raise ValueError(
                f"images of shape {tuple(images.shape)}; expected (batch, {channels}, height, width)"
            )
        height, width = images.shape[-2:]
        if height % p or width % p:
            raise ValueError(
                f"images of {height}x{width} pixels with patch size {p}: resize or crop them to multiples of {p}"
            )
        image = self.proj(self.stem(images) if hasattr(self, "stem") else images)
        # Under autocast the convolution gives bfloat16. The stream of tokens that blocks add to keeps the
        # parameters' precision, whatever the encoding adds first (a learned table would have widened it).
        patches = image.flatten(2).transpose(1, 2).to(self.proj.weight.dtype)
        return patches, (image.shape[2], image.shape[3])


class Attention(nn.Module):
    """(B, T, D) -> (B, T, D): every token reads from all tokens."""

    def __init__(self, width: int, heads: int, trained: Grid | None = None):
        """`trained`: the grid beside which logits grow as log N does; None: they do not grow."""
        super().__init__()
        self.heads, self.trained = heads, trained
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(
        self, x: Tensor, asking: Tensor, encoding: PositionEncoding, block: int, grid: Grid
    ) -> Tensor:
        """`asking`: the tokens that queries and keys are made from; nearly always `x` itself."""
        q, k, v, logits, scale = self._parts(x, asking, encoding, block, grid)
        if encoding.reads_weights:
            weights = _weights(q, k, logits, scale)
            out = weights @ v + encoding.values(block, weights, grid)
        else:
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=logits, scale=scale)
        return self.proj(out.transpose(1, 2).flatten(2))

    def weights(
        self, x: Tensor, asking: Tensor, encoding: PositionEncoding, block: int, grid: Grid
    ) -> Tensor:
        """The same arguments -> (B, h, T, T): how much each token, down, reads from each token, across."""
        q, k, _, logits, scale = self._parts(x, asking, encoding, block, grid)
        return _weights(q, k, logits, scale)

    def _parts(self, x: Tensor, asking: Tensor, encoding: PositionEncoding, block: int, grid: Grid):
        """-> queries and keys as they are compared, values, what is added to the logits (or None), the scale."""
        if asking is x:
            q, k, v = self.qkv(x).chunk(3, -1)  # each (B, T, D)
        else:
            weight, bias, D = self.qkv.weight, self.qkv.bias, x.shape[-1]
            q, k = F.linear(asking, weight[: 2 * D], bias[: 2 * D]).chunk(2, -1)
            v = F.linear(x, weight[2 * D :], bias[2 * D :])
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in (q, k, v))  # (B, h, T, d)
        if self.trained and grid != self.trained:
            q = q * (math.log(grid[0] * grid[1]) / math.log(self.trained[0] * self.trained[1]))
        q, k = encoding.rotate(block, q, k, grid)
        logits, scale = encoding.logits(block, q, grid), q.shape[-1] ** -0.5
        q, k = encoding.lengthen(block, q, k, grid)
        return q, k, v, logits, scale


def _weights(q: Tensor, k: Tensor, logits: Tensor | None, scale: float) -> Tensor:
    scores = q @ k.transpose(-2, -1) * scale
    return (scores if logits is None else scores + logits).softmax(-1)


class Mlp(nn.Module):
    """(B, T, D) -> (B, T, D): the same two layers for each token."""

    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    """(B, T, D) -> (B, T, D): attention, then MLP, each on normed tokens and added to the stream."""

    def __init__(self, width: int, mlp_ratio: float, attention: Attention | None):
        super().__init__()
        if attention is not None:
            self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.attn = attention
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.mlp = Mlp(width, int(width * mlp_ratio))

    def forward(
        self, x: Tensor, encoding: PositionEncoding, block: int, grid: Grid, keep: Tensor | None = None
    ) -> Tensor:
        """`keep` (2, B): what the two branches are multiplied by, 0 where one is left out; None: all kept."""
        if self.attn is None:
            return x + self.mlp(self.norm2(x)) * (1 if keep is None else keep[1, :, None, None])
        normed = asking = self.norm1(x)
        if block in encoding.query_key_blocks:
            prefix, patches = x.split([x.shape[1] - grid[0] * grid[1], grid[0] * grid[1]], 1)
            asking = self.norm1(torch.cat([prefix, encoding.queries_keys(block, patches, grid)], 1))
        if keep is None:
            x = x + self.attn(normed, asking, encoding, block, grid)
            return x + self.mlp(self.norm2(x))
        x = x + keep[0, :, None, None] * self.attn(normed, asking, encoding, block, grid)
        return x + keep[1, :, None, None] * self.mlp(self.norm2(x))


_NOTHING = PositionEncoding()


class VisionTransformer(TimmConventions, nn.Module):
    """(B, C, height, width) -> (B, num_classes): a DeiT with whatever encoding its configuration says.

    Height and width may be any multiples of the patch size. With `distilled`, training gives the pair
    (class logits, distillation logits) and evaluation their mean, as in DeiT.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        D, P = config.width, config.prefix_tokens
        self.num_classes, self.num_prefix_tokens = config.num_classes, P
        self.num_features = self.embed_dim = self.head_hidden_size = D
        self.grad_checkpointing = False
        self.patch_embed = PatchEmbed(config.in_channels, D, config.patch_size, config.stem)
        if P:
            self.cls_token = nn.Parameter(torch.empty(1, 1, D))
        if config.distilled:
            self.dist_token = nn.Parameter(torch.empty(1, 1, D))
        self.encoding = build_encoding(
            config.encoding,
            width=D,
            heads=config.heads,
            depth=config.depth,
            grid=config.grid,
            prefix_tokens=P,
        )
        trained = config.grid if config.logn_scale else None
        self.blocks = nn.ModuleList(
            Block(
                D,
                config.mlp_ratio,
                Attention(D, config.heads, trained) if i >= config.mlp_only_blocks else None,
            )
            for i in range(config.depth)
        )
        self.norm = nn.LayerNorm(D, eps=1e-6)
        self.feature_info = [
            {"module": f"blocks.{i}", "num_chs": D, "reduction": config.patch_size}
            for i in range(config.depth)
        ]
        self.head = self.head_dist = nn.Identity()
        self._initialise()
        self.reset_classifier(config.num_classes)
        self.register_state_dict_post_hook(_to_public_names)
        self.register_load_state_dict_pre_hook(_from_public_names)

    def _initialise(self) -> None:
        """DeiT's: normal, cut at 2 (absolute), zero biases; convolutions keep PyTorch's default."""
        for name in ("cls_token", "dist_token"):
            if hasattr(self, name):
                nn.init.trunc_normal_(getattr(self, name), std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=self.config.init_std)
                nn.init.zeros_(module.bias)

    # ----------------------------------------------------------------- forward

    def forward(self, images: Tensor, keep: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        return self.forward_head(self.forward_features(images, keep))

    def forward_features(self, images: Tensor, keep: Tensor | None = None) -> Tensor:
        """(B, C, height, width) -> (B, T, D): all tokens after the last block, normed.

        `keep` (depth, 2, B): factors of the blocks' branches (drop path), 0 or 1 / (1 - rate). None: drawn here
        while training, so that a caller who wants the same draw again passes it in.
        """
        x, grid = self._tokens(images)
        keep = self.draw_keep(x.shape[0], x.device) if keep is None else keep
        for i in range(len(self.blocks)):
            x, grid = self._block(i, x, grid, keep)
        return self.norm(x)

    def draw_keep(self, batch: int, device: torch.device) -> Tensor | None:
        """-> (depth, 2, B) factors for `forward`, or None where nothing is ever left out."""
        if not (self.training and self.config.drop_path):
            return None
        return self.keep_factors(torch.rand(len(self.blocks), 2, batch, device=device))

    def keep_factors(self, draws: Tensor) -> Tensor:
        """(depth, 2, B), even in [0, 1) -> the factors: 0 with a block's probability, else 1 / (1 - it)."""
        like = {"dtype": draws.dtype, "device": draws.device}
        rates = torch.linspace(0, self.config.drop_path, self.config.depth, **like)[
            : len(self.blocks), None, None
        ]
        return (draws >= rates) / (1 - rates)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor | tuple[Tensor, Tensor]:
        """(B, T, D) -> (B, num_classes), or (B, D) with `pre_logits`."""
        if self.config.global_pool == "avg":
            x = x.mean(1)
            return x if pre_logits else self.head(x)
        if not self.config.distilled:
            return x[:, 0] if pre_logits else self.head(x[:, 0])
        if pre_logits:
            return (x[:, 0] + x[:, 1]) / 2
        logits, distilled = self.head(x[:, 0]), self.head_dist(x[:, 1])
        return (logits, distilled) if self.training else (logits + distilled) / 2

    def _tokens(self, images: Tensor) -> tuple[Tensor, Grid]:
        """(B, C, height, width) -> (B, T, D) and the grid: everything before block 0."""
        patches, grid = self.patch_embed(images)
        names = ("cls_token", "dist_token")[: self.num_prefix_tokens]
        prefix = [getattr(self, name).to(patches.dtype).expand(patches.shape[0], -1, -1) for name in names]
        return self._encode(-1, torch.cat([*prefix, patches], 1), grid)

    def _block(self, i: int, x: Tensor, grid: Grid, keep: Tensor | None) -> tuple[Tensor, Grid]:
        """Block i and what the encoding does behind it."""
        # An encoding without a part in attention is not shown to the block: one compiled block then serves all.
        encoding, index = (self.encoding, i) if self.encoding.in_attention else (_NOTHING, 0)
        arguments = x, encoding, index, grid, None if keep is None else keep[i]
        if self.grad_checkpointing and self.training and torch.is_grad_enabled():
            x = checkpoint(self.blocks[i], *arguments, use_reentrant=False)
        else:
            x = self.blocks[i](*arguments)
        return self._encode(i, x, grid)

    def _encode(self, place: int, x: Tensor, grid: Grid) -> tuple[Tensor, Grid]:
        """(B, T, D) -> the same, after the encoding's turn at `place`."""
        if place not in self.encoding.places:
            return x, grid
        return self.encoding.encode(place, x, self.num_prefix_tokens, grid)

    # ----------------------------------------------------------------- heads

    def get_classifier(self) -> nn.Module | tuple[nn.Module, nn.Module]:
        return (self.head, self.head_dist) if self.config.distilled else self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """A new head, or none for 0 classes. The read-out is part of the configuration and stays."""
        own = "avg" if self.config.global_pool == "avg" else "token"
        if global_pool not in (None, own):
            raise ConfigError(
                f"global_pool={global_pool!r} in a model that reads out by {own!r}; build it so instead"
            )
        self.num_classes = num_classes
        self.config = dataclasses.replace(self.config, num_classes=num_classes)
        for name in ("head", "head_dist")[: 1 + self.config.distilled]:
            head = nn.Linear(self.embed_dim, num_classes) if num_classes else nn.Identity()
            if num_classes:
                nn.init.trunc_normal_(head.weight, std=self.config.init_std)
                nn.init.zeros_(head.bias)
                head.to(
                    self.norm.weight if isinstance(self.norm, nn.LayerNorm) else self.patch_embed.proj.weight
                )
            setattr(self, name, head)


def _to_public_names(model: VisionTransformer, state: dict, prefix: str, _) -> None:
    for own, public in model.encoding.public_names.items():
        state[prefix + public] = state.pop(f"{prefix}encoding.{own}")


def _from_public_names(model: VisionTransformer, state: dict, prefix: str, *_) -> None:
    for own, public in model.encoding.public_names.items():
        if prefix + public in state:
            state[f"{prefix}encoding.{own}"] = state.pop(prefix + public)
