"""The vision transformer: image -> patches -> tokens -> blocks -> logits. It names no encoding.

Letters: B batch, C channels, p patch size, N = H*W patches, P prefix tokens (class, distillation),
T = P + N tokens, D width, h heads, d = D/h head width, (H, W) grid of tokens.
Names of parameters are timm's and DeiT's.
"""

from collections import OrderedDict

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from cpvt.config import Grid, ModelConfig, format_encoding, pair, replace
from cpvt.errors import ConfigError, DataError
from cpvt.model.encodings import PEG, Encoding, EncodingSum, learned_table, traced
from cpvt.rng import start

Logits = Tensor | tuple[Tensor, Tensor]  # a pair while a distilled model trains


class PatchEmbed(nn.Module):
    """(B, C, H*p, W*p) -> (B, N, D) and the grid (H, W): one linear map of every p x p patch."""

    def __init__(self, in_channels: int, width: int, patch_size: int, stem: str = "patch"):
        super().__init__()
        self.patch_size, self.in_channels = patch_size, in_channels
        self.stem, hidden = nn.Identity(), in_channels
        if stem == "conv":  # circular, or the zeros beyond the edge would tell every encoding its place
            hidden, around = width // 4, {"padding": 1, "padding_mode": "circular"}
            layers = nn.Conv2d(in_channels, hidden, 3, **around), nn.Conv2d(hidden, hidden, 3, **around)
            self.stem = nn.Sequential(layers[0], nn.GELU(), layers[1], nn.GELU())
        self.proj = nn.Conv2d(hidden, width, patch_size, stride=patch_size)

    def forward(self, images: Tensor) -> tuple[Tensor, Grid]:
        self._check(images)
        image = self.proj(self.stem(images))  # (B, D, H, W)
        # Under autocast the convolution gives bfloat16; the stream of tokens keeps the parameters' precision.
        return image.flatten(2).transpose(1, 2).to(self.proj.weight.dtype), (image.shape[2], image.shape[3])

    def _check(self, images: Tensor) -> None:
        p, C, shape = self.patch_size, self.in_channels, images.shape
        if traced(images):  # a convolution drops what is left over, without a word
            torch._assert(shape[2] % p + shape[3] % p == 0, f"expected multiples of {p}, a patch")
            return
        if len(shape) != 4 or shape[1] != C:
            raise DataError(f"images of shape {tuple(shape)}; expected (B, {C}, height, width)")
        if not images.is_floating_point():
            raise DataError(f"images of {images.dtype}; expected floating point, normalised")
        if shape[2] % p or shape[3] % p or min(shape[2:]) < p:
            raise DataError(f"images of {shape[2]}x{shape[3]} pixels; expected multiples of {p}, a patch")


class Attention(nn.Module):
    """(B, T, D) -> (B, T, D): every token reads from all tokens."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.fused_attn = True  # off: the weights are computed, for tools that look at them in `attn_drop`
        self.attn_drop = nn.Identity()

    def forward(self, x: Tensor, qk_x: Tensor, encoding: Encoding, block: int, grid: Grid) -> Tensor:
        """`qk_x` (B, T, D): the tokens that queries and keys are made from; nearly always `x` itself."""
        q, k, v, bias = self._qkv(x, qk_x, encoding, block, grid)
        # PyTorch's own attention is slow in bfloat16 on a CPU.
        slow = not traced(q) and q.dtype == torch.bfloat16 and not q.is_cuda
        if encoding.needs_weights or not self.fused_attn or slow:
            weights = self.attn_drop(_weights(q, k, bias))  # (B, h, T, T)
            out, more = weights @ v, encoding.attn_values(block, weights, grid)
            out = out if more is None else out + more
        else:
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)  # (B, h, T, d)
        return self.proj(out.transpose(1, 2).flatten(2))

    def weights(self, x: Tensor, qk_x: Tensor, encoding: Encoding, block: int, grid: Grid) -> Tensor:
        """The same arguments -> (B, h, T, T): how much each token, down, reads from each token, across."""
        q, k, _, bias = self._qkv(x, qk_x, encoding, block, grid)
        return _weights(q, k, bias)

    def _qkv(self, x: Tensor, qk_x: Tensor, encoding: Encoding, block: int, grid: Grid):
        """-> queries, keys and values, each (B, h, T, d), and what is added to the logits, or None."""
        if qk_x is x:
            q, k, v = self.qkv(x).chunk(3, -1)
        else:
            weight, bias, D = self.qkv.weight, self.qkv.bias, x.shape[-1]
            q, k = F.linear(qk_x, weight[: 2 * D], bias[: 2 * D]).chunk(2, -1)
            v = F.linear(x, weight[2 * D :], bias[2 * D :])
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in (q, k, v))
        q, k = encoding.rotate(block, q, k, grid)
        return q, k, v, encoding.attn_bias(block, q, grid)


def _weights(q: Tensor, k: Tensor, bias: Tensor | None) -> Tensor:
    logits = q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5
    return (logits if bias is None else logits + bias).softmax(-1)


class Block(nn.Module):
    """(B, T, D) -> (B, T, D): attention, then MLP, each on normed tokens and added to the stream."""

    def __init__(self, width: int, mlp_ratio: float, attention: Attention | None):
        super().__init__()
        if attention is not None:
            self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.attn = attention
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        hidden = int(width * mlp_ratio)
        layers = {"fc1": nn.Linear(width, hidden), "act": nn.GELU(), "fc2": nn.Linear(hidden, width)}
        self.mlp = nn.Sequential(OrderedDict(layers))  # the same for each token

    def forward(self, x: Tensor, encoding: Encoding, block: int, grid: Grid, drop_path_scale=None) -> Tensor:
        """`drop_path_scale` (2, B) or None: what the two branches are multiplied by, 0 where one is dropped."""
        attn_scale, mlp_scale = (None, None) if drop_path_scale is None else drop_path_scale
        if self.attn is not None:
            normed, qk_x = _normed(self.norm1, x), encoding.qk_input(block, x, grid)
            qk_normed = normed if qk_x is x else _normed(self.norm1, qk_x)
            x = _add(x, self.attn(normed, qk_normed, encoding, block, grid), attn_scale)
        return _add(x, self.mlp(_normed(self.norm2, x)), mlp_scale)


def _normed(norm: nn.LayerNorm, x: Tensor) -> Tensor:
    return norm(x.to(norm.weight.dtype))  # as autocast has it on a GPU, and not on a CPU


def _add(x: Tensor, branch: Tensor, scale: Tensor | None) -> Tensor:
    branch = branch if scale is None else scale[:, None, None] * branch
    return x + branch.to(x.dtype)


_NO_ENCODING = Encoding(None, ModelConfig())


class VisionTransformer(nn.Module):
    """(B, C, height, width) -> (B, num_classes): a DeiT with whatever encoding its configuration says.

    Height and width may be any multiples of the patch size. With `distilled`, training gives the pair
    (class logits, distillation logits) and evaluation their mean, as in DeiT.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        D, P = config.width, config.prefix_tokens
        self.num_classes, self.num_prefix_tokens = config.num_classes, P
        self.num_features = self.head_hidden_size = self.embed_dim = D
        self.global_pool = config.global_pool
        self.grad_checkpointing = False
        self.bf16_tokens = False  # whether autocast's precision is that of the tokens between blocks, too
        self.patch_embed = PatchEmbed(config.in_channels, D, config.patch_size, config.stem)
        self.prefix_names = ("cls_token", "dist_token")[:P]
        for name in self.prefix_names:
            self.register_parameter(name, nn.Parameter(torch.empty(1, 1, D)))
        self.pos_embed = learned_table(config)
        self.encoding = EncodingSum(config)
        self.set_input_size(config.image_size)
        self.blocks = nn.ModuleList()
        for i in range(config.depth):
            attention = None if i < config.mlp_only_blocks else Attention(D, config.heads)
            self.blocks.append(Block(D, config.mlp_ratio, attention))
        self.norm = nn.LayerNorm(D, eps=1e-6)
        for name in self.prefix_names:
            nn.init.trunc_normal_(getattr(self, name), std=0.02)
        self._initialise(self)
        self.reset_classifier(config.num_classes)
        info = {"num_chs": D, "reduction": config.patch_size}  # read by timm's feature extractor
        self.feature_info = [{"module": f"blocks.{i}", **info} for i in range(config.depth)]

    def _initialise(self, module: nn.Module) -> None:
        """DeiT's: normal, cut at 2 (absolute), zero biases; convolutions keep PyTorch's default."""
        for layer in module.modules():
            if isinstance(layer, nn.Linear):
                nn.init.trunc_normal_(layer.weight, std=self.config.init_std)
                nn.init.zeros_(layer.bias)

    @torch.no_grad()
    def draw(self, seed: int) -> None:
        """Draws every parameter anew from a stream of its own, keyed by the seed and its name: models that share a
        layer start it equal, whatever else they have."""
        of_peg = {layer: peg for peg in self.modules() if isinstance(peg, PEG) for layer in peg.children()}
        drawn, own_gpu = {}, [self.norm.weight.device] if self.norm.weight.is_cuda else []
        with torch.random.fork_rng(own_gpu):
            # Not torch.manual_seed, which would leave every GPU seeded.
            dice = torch.cuda.default_generators[own_gpu[0].index] if own_gpu else torch.default_generator
            for path, module in self.named_modules():
                own = dict(module.named_parameters(path, recurse=False))
                for name in own:
                    dice.manual_seed(start(f"{seed}/{name}"))
                    if module in of_peg:
                        of_peg[module].initialise(module)
                    elif isinstance(module, nn.Linear):
                        self._initialise(module)
                    elif isinstance(module, nn.Conv2d | nn.LayerNorm):
                        module.reset_parameters()
                    else:  # a token or a table
                        nn.init.trunc_normal_(own[name], std=0.02)
                    drawn[name] = own[name].clone()
        for name, parameter in self.named_parameters():
            parameter.copy_(drawn[name])

    # ----------------------------------------------------------------- forward

    def forward(self, images: Tensor, drop_path_scale: Tensor | None = None) -> Logits:
        return self.forward_head(self.forward_features(images, drop_path_scale))

    def forward_features(self, images: Tensor, drop_path_scale: Tensor | None = None) -> Tensor:
        """(B, C, height, width) -> (B, T, D): all tokens after the last block, normed. `drop_path_scale`
        (depth, 2, B) comes from the method of this name; None: it is drawn here while training."""
        x, grid = self.embed(images)  # (B, T, D)
        if drop_path_scale is None or traced(drop_path_scale):  # torch.fx fills in every argument
            drop_path_scale = self._drawn(images)
        for i in range(len(self.blocks)):
            x, grid = self.run_block(i, x, grid, drop_path_scale)
        return self.norm(x.to(self.patch_embed.proj.weight.dtype))

    def embed(self, images: Tensor) -> tuple[Tensor, Grid]:
        """(B, C, height, width) -> (B, T, D) and the grid: everything before block 0."""
        patches, grid = self.patch_embed(images)  # (B, N, D)
        prefix = [getattr(self, name).to(patches.dtype) for name in self.prefix_names]
        prefix = [token.expand(patches.shape[0], -1, -1) for token in prefix]
        x, grid = self.encoding.encode(-1, torch.cat([*prefix, patches], 1), grid, self.pos_embed)
        if self.bf16_tokens and torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        return x, grid

    def run_block(self, i: int, x: Tensor, grid: Grid, drop_path_scale=None) -> tuple[Tensor, Grid]:
        """(B, T, D) and the grid -> the same: block i and what the encoding does behind it."""
        # An encoding without a part in attention is not shown to the block: one compiled block then serves all.
        encoding, index = (self.encoding, i) if self.encoding.in_attention else (_NO_ENCODING, 0)
        arguments = x, encoding, index, grid, None if drop_path_scale is None else drop_path_scale[i]
        if self.grad_checkpointing and self.training and torch.is_grad_enabled():
            x = checkpoint(self.blocks[i], *arguments, use_reentrant=False)
        else:
            x = self.blocks[i](*arguments)
        return self.encoding.encode(i, x, grid, self.pos_embed)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Logits:
        """(B, T, D) -> (B, num_classes), or (B, D) with `pre_logits`; as it is without pooling."""
        if not self.global_pool:
            return x
        if self.config.global_pool == "avg":
            pooled = x.mean(1)
        elif self.config.distilled and not pre_logits:
            logits, distilled = self.head(x[:, 0]), self.head_dist(x[:, 1])
            return (logits, distilled) if self.training else (logits + distilled) / 2
        else:
            pooled = x[:, :2].mean(1) if self.config.distilled else x[:, 0]
        return pooled if pre_logits else self.head(pooled)

    def drop_path_scale(self, draws: Tensor) -> Tensor:
        """(depth, 2, B), even in [0, 1) -> the factors of the branches: 0 with a block's probability (from 0 at
        the first block to `drop_path` at the last), else 1 / (1 - it)."""
        last, depth = self.config.drop_path, self.config.depth
        rates = torch.linspace(0, last, depth, dtype=draws.dtype, device=draws.device)
        rates = rates[: len(self.blocks), None, None]
        return (draws >= rates) / (1 - rates)

    def _drawn(self, images: Tensor) -> Tensor | None:
        if not (self.training and self.config.drop_path):
            return None
        return self.drop_path_scale(torch.rand(len(self.blocks), 2, images.shape[0], device=images.device))

    # ----------------------------------------------------------------- timm's conventions

    def get_classifier(self) -> nn.Module | tuple[nn.Module, nn.Module]:
        return (self.head, self.head_dist) if self.config.distilled else self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """A new head, or none for 0 classes. The pooling is the configuration's; without a head also "": none."""
        own = self.config.global_pool
        if global_pool not in (None, own) and (global_pool or num_classes):
            found = f"{global_pool=}, {num_classes=}"
            raise ConfigError(f"{found}; expected {own!r}, or '' (tokens) and 0 classes")
        self.num_classes, self.global_pool = num_classes, own if global_pool is None else global_pool
        self.config = replace(self.config, num_classes=num_classes)
        for name in ("head", "head_dist")[: 1 + self.config.distilled]:
            head = nn.Linear(self.embed_dim, num_classes) if num_classes else nn.Identity()
            self._initialise(head)
            setattr(self, name, head.to(self.patch_embed.proj.weight))

    def set_input_size(self, img_size: int | Grid | None = None, patch_size: int | Grid | None = None):
        """Another trained size: a learned table is resampled; nothing else changes, for every size runs anyway."""
        old, p = self.config, self.config.patch_size
        if patch_size not in (None, p, (p, p)):
            raise ConfigError(f"set_input_size: {patch_size=}; the patches of a model stay, {p} pixels")
        size = pair(img_size or old.image_size)
        new = replace(old, image_size=size)
        self.encoding.set_grid(new.grid)
        if self.pos_embed is not None and new.grid != old.grid:
            table = self.encoding.learned.resampled(self.pos_embed.detach(), old.grid, new.grid)
            self.pos_embed = nn.Parameter(table, self.pos_embed.requires_grad)
        embed, self.config = self.patch_embed, new
        embed.img_size, embed.grid_size, embed.num_patches = size, new.grid, new.grid[0] * new.grid[1]
        if hasattr(self, "_model_args"):  # made by timm, which writes down how to make it again
            from timm.models._input import update_model_input_size

            update_model_input_size(self, size)

    def get_intermediate_layers(self, x, n=1, reshape=False, return_prefix_tokens=False, norm=False):
        """`forward_intermediates` under DINO's name and with its defaults."""
        wanted = {"output_fmt": "NCHW" if reshape else "NLC", "intermediates_only": True}
        return self.forward_intermediates(x, n, return_prefix_tokens, norm, **wanted)

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ):
        """Tokens after chosen blocks, encoding included: what the next block sees.

        `indices`: which blocks (negative from the end), or how many of the last ones; None is all.
        Gives (B, D, H, W) or, for output_fmt="NLC", (B, N, D); with prefixes, pairs (that, (B, P, D)).
        """
        take, P, found = self._indices(indices), self.num_prefix_tokens, []
        (tokens, grid), drop_path_scale = self.embed(x), self._drawn(x)
        for i in range(max(take) + 1 if stop_early and take else len(self.blocks)):
            tokens, grid = self.run_block(i, tokens, grid, drop_path_scale)
            if i in take:
                shown = self.norm(tokens) if norm else tokens
                patches, prefix = shown[:, P:], shown[:, :P]
                if output_fmt == "NCHW":
                    patches = patches.transpose(1, 2).unflatten(2, grid).contiguous()
                found.append((patches, prefix) if return_prefix_tokens and P else patches)
        return found if intermediates_only else (self.norm(tokens), found)

    def prune_intermediate_layers(self, indices=1, prune_norm=False, prune_head=True) -> list[int]:
        """Drops the blocks behind the last one asked for, and what the encoding has there; gives the indices
        kept. For feature extraction."""
        take, old = self._indices(indices), self.config
        depth = max(take) + 1
        self.blocks = self.blocks[:depth]
        self.encoding.prune(depth)
        changes = {"depth": depth, "mlp_only_blocks": min(old.mlp_only_blocks, depth)}
        changes["drop_path"] = old.drop_path * (depth - 1) / max(old.depth - 1, 1)
        changes["encoding"] = format_encoding(tuple(part.config for part in self.encoding.children()))
        self.config = replace(old, **changes)
        if prune_norm:
            self.norm = nn.Identity()
        if prune_head:
            self.reset_classifier(0, "")
        return take

    def _indices(self, indices: int | list[int] | None) -> list[int]:
        """Block numbers in rising order, from what timm takes for them; IndexError for others."""
        blocks = range(len(self.blocks))
        if indices is None or isinstance(indices, int):
            indices = range(-(len(blocks) if indices is None else indices), 0)
        return sorted(blocks[i] for i in indices)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        self.grad_checkpointing = enable

    def no_weight_decay(self) -> set[str]:
        """Names of the parameters that are a token or a table, and no layer's weight or bias."""
        return {name for name, _ in self.named_parameters() if not name.endswith((".weight", ".bias"))}

    def group_matcher(self, coarse: bool = False) -> dict:
        """What the encoding has in front of block 0, and what all blocks share of it, belongs to the stem."""
        stem = r"^cls_token|^dist_token|^pos_embed|^patch_embed|^encoding\.\w+\.[a-z]"
        blocks = [(r"^blocks\.(\d+)", None), (r"^norm", (99999,))]
        for name, part in self.encoding.named_children():
            for layer, _ in part.named_children():
                block, path = part.block_of(layer), rf"^encoding\.{name}\.{layer}\."
                stem += f"|{path}" if block < 0 else ""
                blocks += [(path, (block,))]
        return {"stem": stem, "blocks": blocks}
