"""How tokens learn where they are: every encoding of the book.

Letters: B batch, N = H*W patches, P prefix tokens (class, distillation), T = P + N tokens,
D width, h heads, d = D/h head width, (H, W) grid of tokens.

The model calls an encoding at hooks, and names none: at a *place* in the stack of blocks (-1 before
block 0, i after block i), and where a block forms its attention. What is said here is what is computed;
`kernels.py` has shorter roads to the same numbers, taken on a GPU.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from cpvt.config import Learned, Peg, Relative, Rotary, Sine, format_encoding, parse_encoding
from cpvt.errors import ConfigError
from cpvt.model import fused_peg
from cpvt.model.tables import Grid, axial_angles, offsets, resample_table, sine_table


class PositionEncoding(nn.Module):
    """The hooks. Each does nothing here; an encoding fills in those that it needs."""

    places: frozenset[int] = frozenset()  # where `at` acts
    query_key_blocks: frozenset[int] = frozenset()  # whose queries and keys `queries_keys` feeds
    in_attention = False  # whether it has a part in what a block's attention computes
    reads_weights = False  # whether `values` needs the attention weights
    public_names: ClassVar[dict[str, str]] = {}  # parameter here -> its name in the model's state dict

    def at(self, place: int, patches: Tensor, prefix: Tensor, grid: Grid) -> tuple[Tensor, Tensor, Grid]:
        """(B, N, D), (B, P, D), grid -> the same, encoded. Only a table with slots for prefixes changes them."""
        return patches, prefix, grid

    def encode(self, place: int, x: Tensor, prefix_tokens: int, grid: Grid) -> tuple[Tensor, Grid]:
        """(B, T, D), grid -> the same: `at`, with the one place where prefix and patch tokens part."""
        patches, prefix, grid = self.at(place, x[:, prefix_tokens:], x[:, :prefix_tokens], grid)
        return torch.cat([prefix, patches], 1), grid

    def queries_keys(self, block: int, patches: Tensor, grid: Grid) -> Tensor:
        """(B, N, D) -> (B, N, D): the patches that the block's queries and keys are made from."""
        return patches

    def rotate(self, block: int, q: Tensor, k: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
        """Two (B, h, T, d) -> two (B, h, T, d): queries and keys before their product."""
        return q, k

    def logits(self, block: int, q: Tensor, grid: Grid) -> Tensor | None:
        """(B, h, T, d) -> (B or 1, h, T, T), added to the scaled attention logits; or None."""
        return None

    def lengthen(self, block: int, q: Tensor, k: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
        """Two (B, h, T, d) -> two (B, h, T, >= d), whose products hold what `logits` left out. v stays."""
        return q, k

    def values(self, block: int, weights: Tensor, grid: Grid) -> Tensor | None:
        """Attention weights (B, h, T, T) -> (B, h, T, d), added to the attention's output; or None."""
        return None


# --------------------------------------------------------------------------- tables


class LearnedTable(PositionEncoding):
    """One learned vector a position, the prefix tokens' included, added before block 0 (DeiT)."""

    places = frozenset({-1})
    public_names: ClassVar[dict[str, str]] = {"pos_embed": "pos_embed"}  # timm's and DeiT's key

    def __init__(self, config: Learned, width: int, grid: Grid, prefix_tokens: int):
        super().__init__()
        self.config, self.grid, self.prefix_tokens = config, grid, prefix_tokens
        self.pos_embed = nn.Parameter(torch.empty(1, prefix_tokens + grid[0] * grid[1], width))
        nn.init.trunc_normal_(self.pos_embed, std=0.02)

    def at(self, place, patches, prefix, grid):
        if self.config.resize == "refuse" and grid != self.grid:
            raise ValueError(
                f"grid {grid[0]}x{grid[1]}: this learned table has {self.grid[0]}x{self.grid[1]} rows and "
                "resize='refuse'; give images of the trained size, or choose learned(resize='resample')"
            )
        own, table = self.pos_embed.split([self.prefix_tokens, self.grid[0] * self.grid[1]], 1)
        return patches + resample_table(table, self.grid, grid, self.config.antialias), prefix + own, grid


class SineTable(PositionEncoding):
    """The fixed 2-D sine table, added to the patches before block 0. Prefix tokens get nothing."""

    places = frozenset({-1})

    def __init__(self, config: Sine, width: int, grid: Grid):
        super().__init__()
        self.config, self.width, self.grid = config, width, grid
        sine_table((1, 1), width)  # refuses an odd width now rather than at the first image

    def at(self, place, patches, prefix, grid):
        kw = {"dtype": torch.promote_types(patches.dtype, torch.float32), "device": patches.device}
        if self.config.resize == "resample":
            table = sine_table(self.grid, self.width, self.config.temperature, **kw)
            table = resample_table(table, self.grid, grid)
        else:
            rescale = self.config.resize == "rescale"
            step = (self.grid[0] / grid[0], self.grid[1] / grid[1]) if rescale else (1.0, 1.0)
            table = sine_table(grid, self.width, self.config.temperature, step, **kw)
        return patches + table.to(patches.dtype), prefix, grid


# --------------------------------------------------------------------------- inside attention


class RelativeTable(PositionEncoding):
    """Clipped row and column offsets inside every block's attention (Shaw et al. 2018, in 2-D).

    The logit of query i and key j gains q_i . (row[r_j - r_i] + column[c_j - c_i]) / sqrt(d). A pair with
    a prefix token has an entry of its own (as AutoFormer's index 0). Each block has its tables; heads share.
    """

    in_attention = True

    def __init__(self, config: Relative, width: int, heads: int, depth: int, prefix_tokens: int):
        super().__init__()
        self.config, self.prefix_tokens = config, prefix_tokens
        self.reads_weights = config.on == "keys_values"
        entries = 2 * config.clip + 1
        shape = (heads,) if config.on == "bias" else (width // heads,)
        for name in ("keys", "values")[: 1 + self.reads_weights]:
            for axis, rows in (("rows", entries), ("columns", entries), ("prefix", 1)):
                if axis == "prefix" and not prefix_tokens:
                    continue
                table = nn.Parameter(torch.empty(depth, rows, *shape))
                self.register_parameter(f"{name}_{axis}", nn.init.trunc_normal_(table, std=0.02))

    def _gather(self, name: str, block: int, grid: Grid) -> tuple[Tensor, Tensor]:
        """-> (H, H, ...) and (W, W, ...): the table entry of each pair of rows, and of columns."""
        tables = getattr(self, f"{name}_rows")[block], getattr(self, f"{name}_columns")[block]
        clip, wrap = self.config.clip, self.config.wrap
        rows, columns = (t[offsets(n, clip, wrap, t.device)] for t, n in zip(tables, grid, strict=True))
        return rows, columns

    def lengthen(self, block, q, k, grid):
        if not fused_peg.lengthens(self.config, self.keys_rows, q, grid):
            return q, k
        entry = self.keys_prefix[block, 0] if self.prefix_tokens else None
        return fused_peg.lengthen(q, k, *self._gather("keys", block, grid), entry, grid)

    def logits(self, block, q, grid):
        if fused_peg.lengthens(self.config, self.keys_rows, q, grid):
            return None
        P, scale = self.prefix_tokens, q.shape[-1] ** -0.5
        rows, columns = self._gather("keys", block, grid)
        if self.config.on == "bias":
            rows, columns = (t.permute(2, 0, 1)[None] for t in (rows, columns))  # (1, h, H, H), (1, h, W, W)
            pairs = rows[:, :, :, None, :, None] + columns[:, :, None, :, None, :]
        else:
            image = q[:, :, P:].unflatten(2, grid)
            # Contiguous (they are small), so that torch.export need not reason about the order of strides.
            by_row = torch.einsum("bhxyd,xjd->bhxyj", image, rows.to(q.dtype)).contiguous()
            by_column = torch.einsum("bhxyd,yjd->bhxyj", image, columns.to(q.dtype)).contiguous()
            pairs = (by_row[..., :, None] + by_column[..., None, :]) * scale
        pairs = pairs.flatten(4, 5).flatten(2, 3)  # (B, h, N, N)
        if not P:
            return pairs.to(q.dtype)
        entry = self.keys_prefix[block, 0]
        if self.config.on == "bias":
            own = entry[None, :, None].expand(1, -1, q.shape[2])
        else:
            own = (q @ entry.to(q.dtype)) * scale  # (B, h, T)
        top = own[:, :, :P, None].expand(-1, -1, -1, q.shape[2])
        below = torch.cat([own[:, :, P:, None].expand(-1, -1, -1, P), pairs], -1)
        return torch.cat([top, below], 2).to(q.dtype)

    def values(self, block, weights, grid):
        if not self.reads_weights:
            return None
        P = self.prefix_tokens
        rows, columns = (t.to(weights.dtype) for t in self._gather("values", block, grid))
        pairs = weights[:, :, P:, P:].unflatten(3, grid).unflatten(2, grid)  # (B, h, H, W, H, W)
        by_row = torch.einsum("bhxyj,xjd->bhxyd", pairs.sum(-1), rows).contiguous()
        by_column = torch.einsum("bhxyj,yjd->bhxyd", pairs.sum(-2), columns).contiguous()
        out = (by_row + by_column).flatten(2, 3)
        if not P:
            return out
        own = self.values_prefix[block, 0].to(weights.dtype)
        out = out + weights[:, :, P:, :P].sum(-1, keepdim=True) * own
        return torch.cat([weights[:, :, :P].sum(-1, keepdim=True) * own, out], 2)


class RotaryAngles(PositionEncoding):
    """Axial rotary encoding: half of each head turns with the row, half with the column; no prefix turns."""

    in_attention = True

    def __init__(self, config: Rotary, width: int, heads: int, grid: Grid, prefix_tokens: int):
        super().__init__()
        self.config, self.grid, self.prefix_tokens = config, grid, prefix_tokens
        if width // heads % 4:
            raise ConfigError(f"rotary: head width {width // heads}; two axes of pairs need a multiple of 4")

    def rotate(self, block, q, k, grid):
        kw = {"dtype": torch.promote_types(q.dtype, torch.float32), "device": q.device}
        rescale = self.config.resize == "rescale"
        step = (self.grid[0] / grid[0], self.grid[1] / grid[1]) if rescale else (1.0, 1.0)
        angles = axial_angles(grid, q.shape[-1] // 4, self.config.theta, step, **kw).flatten(1)  # (N, d/2)
        cos, sin = angles.cos().to(q.dtype), angles.sin().to(q.dtype)

        def turn(x: Tensor) -> Tensor:
            prefix, (a, b) = x[:, :, : self.prefix_tokens], x[:, :, self.prefix_tokens :].chunk(2, -1)
            return torch.cat([prefix, torch.cat([a * cos - b * sin, a * sin + b * cos], -1)], 2)

        return turn(q), turn(k)


# --------------------------------------------------------------------------- the convolution


class PEG(nn.Module):
    """(B, N, D), (H, W) -> (B, N, D): the tokens, laid out as an image, plus a convolution of that image.

    The positional encoding generator of CPVT (Chu et al., arXiv 2102.10882): by default a depthwise 3x3
    with zero padding, bias and skip. Without padding the output has (H-k+1)(W-k+1) tokens.

    Raises ValueError where the grid is missing or does not hold N tokens.
    """

    def __init__(self, width: int, kernel: int = 3, *, config: Peg | None = None):
        super().__init__()
        self.config = config = config or Peg(kernel=kernel)
        border = 0 if config.padding == "none" else config.kernel // 2
        mode = {"zero": "zeros", "none": "zeros"}.get(config.padding, config.padding)
        groups = 1 if config.convolution == "dense" else width
        self.proj = nn.Conv2d(
            width, width, config.kernel, padding=border, padding_mode=mode, groups=groups, bias=config.bias
        )
        if config.convolution == "separable":
            self.mix = nn.Conv2d(width, width, 1, bias=config.bias)
        for layer in self.children():
            if config.init == "twins":  # N(0, sqrt(2 / fan_out)): std 0.47 for 3x3; PyTorch's default: 0.19
                nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
                layer.weight.data.mul_(layer.groups**0.5)  # PyTorch's fan_out ignores the groups
                if layer.bias is not None:
                    nn.init.zeros_(layer.bias)
        self.requires_grad_(not config.frozen)

    def forward(self, x: Tensor, grid: Grid | None = None) -> Tensor:
        if grid is None or x.shape[1] != grid[0] * grid[1]:
            raise ValueError(f"PEG: {x.shape[1]} tokens with grid={grid}; pass grid=(H, W) with H * W tokens")
        if fused_peg.fuses(self.config, x):
            return fused_peg.peg(x, self.proj.weight, self.proj.bias, *grid)
        if self.covers(grid):
            out = fused_peg.peg_matrix(x, self.proj.weight, grid)
            out = out if self.proj.bias is None else out + self.proj.bias.to(out.dtype)
        else:
            # Behind a class token the slice strides over it; a convolution would copy it in any case. Contiguous
            # tokens seen as (B, D, H, W) already are channels-last, the layout of the fast depthwise kernels.
            x = x.contiguous()
            source = torch.ones_like(x[:1]) if self.config.on == "constant" else x
            out = self.proj(source.transpose(1, 2).unflatten(2, grid))
            if self.config.convolution == "separable":
                out = self.mix(out)
            out = out.flatten(2).transpose(1, 2)
        return x + out if self.config.skip else out

    def covers(self, grid: Grid) -> bool:
        """Whether to compute the convolution as a matrix: asked for, and every pair of tokens within reach."""
        if self.config.compute != "matrix" or self.config.on == "constant" or torch.compiler.is_exporting():
            return False
        return self.config.kernel >= 2 * max(grid) - 1

    def grid_after(self, grid: Grid) -> Grid:
        """The grid that comes out: smaller without padding, else the same."""
        lost = self.config.kernel - 1 if self.config.padding == "none" else 0
        if lost and min(grid) <= lost:
            raise ValueError(
                f"PEG: grid {grid[0]}x{grid[1]} is too small for kernel {lost + 1} without padding"
            )
        return grid[0] - lost, grid[1] - lost


class PegEncoding(PositionEncoding):
    """PEGs at the configured places of the stack, or on the queries and keys of the block that follows."""

    def __init__(self, config: Peg, width: int, depth: int):
        super().__init__()
        last = depth - (2 if config.on == "queries_keys" else 1)
        if max(config.positions) > last:
            raise ConfigError(
                f"peg: positions={config.positions} in a model of {depth} blocks; the last place is {last}"
            )
        self.config = config
        places = frozenset(config.positions)
        self.places, self.query_key_blocks = places, frozenset()
        if config.on == "queries_keys":
            self.places, self.query_key_blocks = frozenset(), frozenset(p + 1 for p in places)
            self.in_attention = True
        count = config.repeat * (1 if config.shared else len(places))
        self.pegs = nn.ModuleList(PEG(width, config=config) for _ in range(count))

    def generators(self, place: int) -> list[PEG]:
        """The PEGs that act at `place`, in order."""
        first = 0 if self.config.shared else sorted(self.config.positions).index(place) * self.config.repeat
        return list(self.pegs[first : first + self.config.repeat])

    def encode(self, place, x, prefix_tokens, grid):
        if not fused_peg.fuses(self.config, x):
            return super().encode(place, x, prefix_tokens, grid)
        for peg in self.generators(place):  # over the whole stream: nothing to take apart and put together
            x = fused_peg.peg(x, peg.proj.weight, peg.proj.bias, *grid)
        return x, grid

    def at(self, place, patches, prefix, grid):
        for peg in self.generators(place):
            grid, patches = peg.grid_after(grid), peg(patches, grid)  # refuses a small grid before it fails
        return patches, prefix, grid

    def queries_keys(self, block, patches, grid):
        for peg in self.generators(block - 1):
            patches = peg(patches, grid)
        return patches


# --------------------------------------------------------------------------- sums


class Sum(PositionEncoding):
    """Several encodings at once, each acting in the order written."""

    def __init__(self, parts: list[PositionEncoding]):
        super().__init__()
        self.parts = nn.ModuleList(parts)
        self.places = frozenset().union(*(part.places for part in parts))
        self.query_key_blocks = frozenset().union(*(part.query_key_blocks for part in parts))
        self.in_attention = any(part.in_attention for part in parts)
        self.reads_weights = any(part.reads_weights for part in parts)
        self.public_names = {
            f"parts.{i}.{own}": public
            for i, part in enumerate(parts)
            for own, public in part.public_names.items()
        }

    def at(self, place, patches, prefix, grid):
        for part in self.parts:
            if place in part.places:
                patches, prefix, grid = part.at(place, patches, prefix, grid)
        return patches, prefix, grid

    def encode(self, place, x, prefix_tokens, grid):
        for part in self.parts:
            if place in part.places:
                x, grid = part.encode(place, x, prefix_tokens, grid)
        return x, grid

    def queries_keys(self, block, patches, grid):
        for part in self.parts:
            if block in part.query_key_blocks:
                patches = part.queries_keys(block, patches, grid)
        return patches

    def rotate(self, block, q, k, grid):
        for part in self.parts:
            q, k = part.rotate(block, q, k, grid)
        return q, k

    def lengthen(self, block, q, k, grid):
        for part in self.parts:
            q, k = part.lengthen(block, q, k, grid)
        return q, k

    def logits(self, block, q, grid):
        return _add(part.logits(block, q, grid) for part in self.parts)

    def values(self, block, weights, grid):
        return _add(part.values(block, weights, grid) for part in self.parts)


def _add(terms) -> Tensor | None:
    terms = [term for term in terms if term is not None]
    return sum(terms[1:], terms[0]) if terms else None


def build_encoding(text: str, *, width: int, heads: int, depth: int, grid: Grid, prefix_tokens: int) -> Sum:
    """Encoding text (see `cpvt.config`) -> the module that a model of these sizes calls."""
    builders = {
        Learned: lambda c: LearnedTable(c, width, grid, prefix_tokens),
        Sine: lambda c: SineTable(c, width, grid),
        Relative: lambda c: RelativeTable(c, width, heads, depth, prefix_tokens),
        Rotary: lambda c: RotaryAngles(c, width, heads, grid, prefix_tokens),
        Peg: lambda c: PegEncoding(c, width, depth),
    }
    config = parse_encoding(text)
    tables = [part for part in config if isinstance(part, Learned)]
    if len(tables) > 1:
        raise ConfigError(f"encoding {format_encoding(config)!r}: one learned table at most")
    return Sum([builders[type(part)](part) for part in config])
