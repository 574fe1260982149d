"""How tokens learn where they are: every encoding of the book. The paper's idea is `PEG`; start there.

A model calls its encoding at the hooks of `Encoding`, and names none: at each position in the stack of
blocks (-1 before block 0, i after block i), and where a block forms its attention.

Letters: B batch, N = H*W patches, P prefix tokens (class, distillation), T = P + N tokens,
D width, h heads, d = D/h head width, (H, W) grid of tokens, k the width of a kernel.
"""

import dataclasses

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cpvt.config import EncodingPart, Grid, Learned, ModelConfig, Peg, Relative, Rotary, Sine, parse_encoding
from cpvt.errors import ConfigError, DataError
from cpvt.model import fused_peg
from cpvt.model.fused_peg import exporting


def traced(x: object) -> bool:
    """Whether `x` is torch.fx's stand-in for a tensor or a size, which must not be asked for its value."""
    return isinstance(x, torch.fx.Proxy)


# --------------------------------------------------------------------------- the PEG


class PEG(nn.Module):
    """(B, N, D), (H, W) -> (B, N, D): the tokens, laid out as an image, plus a convolution of that image.

    The positional encoding generator of CPVT (Chu et al., arXiv 2102.10882): by default a depthwise 3x3
    with zero padding, bias and skip. Without padding the output has (H-k+1)(W-k+1) tokens.
    """

    def __init__(self, width: int, kernel: int = 3, *, config: Peg | None = None):
        super().__init__()
        self.config = config = config or Peg(kernel=kernel)
        if type(width) is not int or width < 1:
            raise ConfigError(f"PEG: {width=}; expected the width of the tokens, 1 or more")
        self.fused: bool | None = None  # by one operator: on a GPU; True, False: always, never
        padding = {"padding": 0 if config.padding == "none" else config.kernel // 2}
        padding["padding_mode"] = "zeros" if config.padding in ("zero", "none") else config.padding
        groups = 1 if config.convolution == "dense" else width
        self.proj = nn.Conv2d(width, width, config.kernel, groups=groups, bias=config.bias, **padding)
        if config.convolution == "separable":
            self.mix = nn.Conv2d(width, width, 1, bias=config.bias)
        for layer in self.children():
            self.initialise(layer)
        self.requires_grad_(not config.frozen)

    def initialise(self, layer: nn.Conv2d) -> None:
        layer.reset_parameters()
        if self.config.init == "twins":  # N(0, sqrt(2 / fan_out)): std 0.47 for 3x3; PyTorch's default: 0.19
            nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
            layer.weight.data.mul_(layer.groups**0.5)  # PyTorch's fan_out ignores the groups
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor, grid: Grid | None = None) -> Tensor:
        if not traced(x):
            if not isinstance(grid, tuple) or x.shape[1] != grid[0] * grid[1]:
                raise ValueError(f"PEG: {x.shape[1]} tokens with {grid=}; pass grid=(H, W) with H * W tokens")
            if x.ndim != 3 or x.shape[2] != self.proj.in_channels or not x.is_floating_point():
                found = f"{tuple(x.shape)}, {x.dtype}"
                raise ValueError(f"PEG: {found}; expected (B, N, {self.proj.in_channels}), floating point")
        if self.fuses(x):
            return fused_peg.peg(x, self.proj.weight, self.proj.bias, *grid)
        if traced(x) or exporting() or not x.is_cuda:
            return self._in_steps(x, grid)
        # Not rounded to bfloat16, as in the operator above: PEGs that are compared differ in nothing else, and a
        # compiled bfloat16 gradient of five PEGs once trained badly (PyTorch 2.11).
        with torch.autocast("cuda", enabled=False):
            return self._in_steps(x.to(self.proj.weight.dtype), grid).to(x.dtype)

    def _in_steps(self, x: Tensor, grid: Grid) -> Tensor:
        if self.covers(grid):
            out = convolve_as_matrix(x, self.proj, grid)
        else:
            # Contiguous tokens, seen as (B, D, H, W), are channels-last: the fast layout of depthwise kernels.
            x = x.contiguous()
            source = torch.ones_like(x[:1]) if self.config.on == "constant" else x
            out = self.proj(source.transpose(1, 2).unflatten(2, grid))
            if self.config.convolution == "separable":
                out = self.mix(out)
            out = out.flatten(2).transpose(1, 2)
        return x + out if self.config.skip else out

    def grid_after(self, grid: Grid) -> Grid:
        """The grid that comes out: smaller without padding, else the same."""
        if self.config.padding != "none":
            return grid
        lost = self.config.kernel - 1
        if not traced(grid[0]) and min(grid) <= lost:
            raise DataError(f"PEG: grid {grid} is too small for kernel {lost + 1} without padding")
        return grid[0] - lost, grid[1] - lost

    def covers(self, grid: Grid) -> bool:
        """Whether to compute the convolution as a matrix: asked for, and every pair of tokens within reach."""
        asked = self.config.compute == "matrix" and self.config.on != "constant"
        return asked and not exporting() and not traced(grid[0]) and self.config.kernel >= 2 * max(grid) - 1

    def fuses(self, x: Tensor) -> bool:
        """Whether one operator (`fused_peg.peg`) computes this PEG of tensors like `x`."""
        c = self.config
        plain = (c.convolution, c.padding, c.skip, c.compute) == ("depthwise", "zero", True, "convolution")
        plain = plain and c.bias and c.on != "constant" and c.kernel <= fused_peg.LARGEST_KERNEL
        if not plain or traced(x):
            return False
        return (x.is_cuda if self.fused is None else self.fused) and fused_peg.available(x)


def on_patches(peg: PEG, x: Tensor, grid: Grid, prefix_tokens: int) -> Tensor:
    """(B, P + N, D) -> (B, P + N, D): a PEG over the patch tokens; the prefix tokens go around it."""
    if peg.fuses(x):  # one pass over all tokens: nothing to take apart and put together
        return fused_peg.peg(x, peg.proj.weight, peg.proj.bias, *grid)
    return torch.cat([x[:, :prefix_tokens], peg(x[:, prefix_tokens:], grid)], 1)


def offsets(n: int, clip: int, wrap: bool = False, device=None) -> Tensor:
    """-> (n, n) indices of a table of 2*clip + 1 rows: [i, j] holds j - i, clipped; on a ring if `wrap`."""
    i = torch.arange(n, device=device)
    offset = i[None, :] - i[:, None]
    if wrap:
        offset = (offset + n // 2) % torch.full_like(offset, n) - n // 2  # a tensor, as ONNX asks for
    # Not clamp: torch.compile makes a clamped index a Max of symbols, which its code for GPUs cannot order.
    return torch.where(offset < -clip, -clip, torch.where(offset > clip, clip, offset)) + clip


def convolve_as_matrix(x: Tensor, proj: nn.Conv2d, grid: Grid) -> Tensor:
    """(B, N, D) -> (B, N, D): a depthwise convolution as one N x N matrix a channel; for k >= 2 max(H, W) - 1."""
    rows, columns = (offsets(n, proj.kernel_size[0] // 2, device=x.device) for n in grid)
    # (D, k, k) -> (D, N, N); entry [m, n] is the weight from token n to token m
    matrix = proj.weight[:, 0][:, rows[:, None, :, None], columns[None, :, None, :]]
    matrix = matrix.flatten(3, 4).flatten(1, 2)
    # Turned once, (D, N, B), and kept so for the backward pass; einsum would turn it anew for each product.
    out = torch.bmm(matrix, x.permute(2, 1, 0).contiguous()).permute(2, 1, 0)
    return out if proj.bias is None else out + proj.bias.to(out.dtype)


# --------------------------------------------------------------------------- the hooks


class Encoding(nn.Module):
    """What a model calls. Each hook does nothing here; an encoding fills in those that it needs."""

    in_attention = False  # whether it has a part in what a block's attention computes
    needs_weights = False  # whether `attn_values` needs the attention weights

    def __init__(self, config: EncodingPart | None, model: ModelConfig):
        super().__init__()
        self.config, self.grid, self.prefix_tokens = config, model.grid, model.prefix_tokens

    def encode(self, position: int, x: Tensor, grid: Grid, table=None) -> tuple[Tensor, Grid]:
        """(B, T, D), grid -> the same, encoded. `table` (1, T, D): the model's learned one, where it has one."""
        return x, grid

    def qk_input(self, block: int, x: Tensor, grid: Grid) -> Tensor:
        """(B, T, D) -> (B, T, D): the tokens that the block's queries and keys are made from."""
        return x

    def rotate(self, block: int, q: Tensor, k: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
        """Two (B, h, T, d) -> two (B, h, T, d): queries and keys before their product."""
        return q, k

    def attn_bias(self, block: int, q: Tensor, grid: Grid) -> Tensor | None:
        """(B, h, T, d) -> (B or 1, h, T, T), added to the scaled attention logits; or None."""
        return None

    def attn_values(self, block: int, weights: Tensor, grid: Grid) -> Tensor | None:
        """Attention weights (B, h, T, T) -> (B, h, T, d), added to the attention's output; or None."""
        return None

    def prune(self, depth: int) -> bool:
        """Drops what belongs to the blocks from `depth` on; -> whether anything is left."""
        return True

    def block_of(self, layer: str) -> int:
        """The block that a submodule is trained like, by its name; -1: like the patch embedding."""
        return -1


class PegEncoding(Encoding):
    """PEGs at the configured positions, or on the queries and keys of the block that follows. The one at position
    i is the submodule "i"; those behind it are "i_1", "i_2", ..."""

    def __init__(self, config: Peg, model: ModelConfig):
        super().__init__(config, model)
        self.in_attention = config.on == "queries_keys"
        check_positions(config.positions, model.depth - 1 - self.in_attention)
        for position in sorted(config.positions):
            for i in range(config.repeat):
                self.add_module(f"{position}_{i}" if i else f"{position}", PEG(model.width, config=config))

    def generators(self, position: int) -> list[PEG]:
        """The PEGs of a position, in order; none where it is not configured."""
        return [peg for name, peg in self.named_children() if name.split("_")[0] == str(position)]

    def _run(self, position: int, x: Tensor, grid: Grid) -> tuple[Tensor, Grid]:
        for peg in self.generators(position):
            after = peg.grid_after(grid)  # refuses a small grid before the convolution fails
            x, grid = on_patches(peg, x, grid, self.prefix_tokens), after
        return x, grid

    def encode(self, position, x, grid, table=None):
        return (x, grid) if self.in_attention else self._run(position, x, grid)

    def qk_input(self, block, x, grid):
        return self._run(block - 1, x, grid)[0] if self.in_attention else x

    def prune(self, depth):
        for name in [name for name, _ in self.named_children() if self.block_of(name) >= depth]:
            delattr(self, name)
        left = tuple(p for p in self.config.positions if p + self.in_attention < depth)
        self.config = dataclasses.replace(self.config, positions=left or self.config.positions)
        return bool(left)

    def block_of(self, layer):
        return int(layer.split("_")[0]) + self.in_attention  # queries and keys are those of the block behind


def check_positions(positions: tuple[int, ...], last: int) -> None:
    if max(positions) > last:
        raise ConfigError(f"peg: positions={positions} in a model whose last is {last}")


# --------------------------------------------------------------------------- tables


def resample_table(table: Tensor, old: Grid, new: Grid, antialias: bool = False) -> Tensor:
    """(..., old H*W, D) -> (..., new H*W, D), bicubic, to any height and width; the same grid changes nothing."""
    if not exporting() and not traced(new[0]) and old == new:  # such a graph must not ask: its grid is open
        return table
    image = table.reshape(-1, *old, table.shape[-1]).permute(0, 3, 1, 2).to(_like(table)["dtype"])
    image = F.interpolate(image, size=new, mode="bicubic", antialias=antialias).to(table.dtype)
    return image.flatten(2).transpose(1, 2).reshape(table.shape[:-2] + (-1, table.shape[-1]))


def axial_angles(grid: Grid, n: int, base: float, step: tuple[float, float] = (1.0, 1.0), **kw) -> Tensor:
    """-> (H*W, 2, n): row and column times n frequencies, from 1 down towards 1 / base. `step` is the distance
    between neighbouring tokens, down and across; `kw`: dtype and device."""
    frequency = base ** -(torch.arange(n, **kw) / n)
    rows, columns = (torch.arange(m, **kw)[:, None] * s * frequency for m, s in zip(grid, step, strict=True))
    rows, columns = rows[:, None].expand(-1, grid[1], -1), columns[None].expand(grid[0], -1, -1)
    return torch.stack([rows, columns], 2).flatten(0, 1)


def sine_table(grid: Grid, width: int, temperature: float = 10000.0, step=(1.0, 1.0), **kw) -> Tensor:
    """-> (H*W, width): [sin row, cos row, sin column, cos column], a quarter of the width each."""
    if width % 4:
        raise ConfigError(f"sine: width={width}; a row and a column, sine and cosine, need a multiple of 4")
    angles = axial_angles(grid, width // 4, temperature, step, **kw)
    return torch.cat([angles.sin(), angles.cos()], -1).flatten(1)


def _like(x: Tensor) -> dict:
    """dtype and device for angles: those of `x`, in 32 bits at least."""
    return {"dtype": torch.promote_types(x.dtype, torch.float32), "device": x.device}


def _step(resize: str, trained: Grid, grid: Grid) -> tuple[float, float]:
    """Distance between neighbouring tokens, down and across; rescaled, the trained grid's ends stay the ends."""
    return (trained[0] / grid[0], trained[1] / grid[1]) if resize == "rescale" else (1.0, 1.0)


class LearnedEncoding(Encoding):
    """One learned vector a token, prefix tokens included, added before block 0 (DeiT). The table is handed in: it
    is the model's own parameter `pos_embed`, as in timm and DeiT."""

    def encode(self, position, x, grid, table=None):
        if position != -1:
            return x, grid
        if self.config.resize == "refuse":
            words = f"a learned table of {self.grid} with resize='refuse'; give images of the trained size"
            if traced(grid[0]):
                torch._assert((grid[0] - self.grid[0]) ** 2 + (grid[1] - self.grid[1]) ** 2 == 0, words)
            elif grid != self.grid:
                raise DataError(f"grid {grid}: {words}, or choose learned(resize='resample')")
        return x + self.resampled(table, self.grid, grid), grid

    def resampled(self, table: Tensor, old: Grid, new: Grid) -> Tensor:
        """(1, P + old N, D) -> (1, P + new N, D): the prefix tokens' entries stay as they are."""
        P = self.prefix_tokens
        return torch.cat([table[:, :P], resample_table(table[:, P:], old, new, self.config.antialias)], 1)


class SineEncoding(Encoding):
    """The fixed 2-D sine table, added to the patches before block 0. Prefix tokens get nothing."""

    def __init__(self, config: Sine, model: ModelConfig):
        super().__init__(config, model)
        self.width = model.width
        sine_table((1, 1), model.width)  # refuses an odd width now rather than at the first image

    def encode(self, position, x, grid, table=None):
        if position != -1:
            return x, grid
        resize, temperature = self.config.resize, self.config.temperature
        drawn, step = self.grid if resize == "resample" else grid, _step(resize, self.grid, grid)
        table = sine_table(drawn, self.width, temperature, step, **_like(x))
        if resize == "resample":
            table = resample_table(table, drawn, grid)
        return x + F.pad(table.to(x.dtype), (0, 0, self.prefix_tokens, 0)), grid


# --------------------------------------------------------------------------- inside attention


class RelativeEncoding(Encoding):
    """Clipped row and column offsets inside every block's attention (Shaw et al. 2018, in 2-D).

    The logit of query i and key j gains q_i . (row[r_j - r_i] + column[c_j - c_i]) / sqrt(d). A pair with
    a prefix token has an entry of its own (as AutoFormer's index 0). Each block has its tables; heads share.
    """

    in_attention = True

    def __init__(self, config: Relative, model: ModelConfig):
        super().__init__(config, model)
        self.needs_weights = config.on == "keys_values"
        entries = 2 * config.clip + 1
        shape = model.heads if config.on == "bias" else model.width // model.heads
        for name in ("keys", "values")[: 1 + self.needs_weights]:
            for axis, rows in (("rows", entries), ("columns", entries), ("prefix", 1)):
                if axis != "prefix" or self.prefix_tokens:
                    table = nn.Parameter(torch.empty(model.depth, rows, shape))
                    self.register_parameter(f"{name}_{axis}", nn.init.trunc_normal_(table, std=0.02))

    def prune(self, depth):
        for name, table in list(self.named_parameters()):
            setattr(self, name, nn.Parameter(table[:depth].detach().clone(), table.requires_grad))
        return True

    def _entries(self, name: str, block: int, grid: Grid) -> list[Tensor]:
        """-> (H, H, ...) and (W, W, ...): the table entry of each pair of rows, and of columns."""
        tables = [getattr(self, f"{name}_{axis}")[block] for axis in ("rows", "columns")]
        clip, wrap = self.config.clip, self.config.wrap
        return [table[offsets(n, clip, wrap, table.device)] for table, n in zip(tables, grid, strict=True)]

    def attn_bias(self, block, q, grid):
        P, T, scale = self.prefix_tokens, q.shape[2], q.shape[-1] ** -0.5
        rows, columns = self._entries("keys", block, grid)
        alike = self.config.on == "bias"  # one number a head, the same for all queries
        if alike:
            by_row = rows.permute(2, 0, 1)[None, :, :, None]  # (1, h, H, 1, H)
            by_column = columns.permute(2, 0, 1)[None, :, None]  # (1, h, 1, W, W)
            pairs = by_row[..., :, None] + by_column[..., None, :]  # (1, h, H, W, H, W)
        else:
            image = q[:, :, P:].unflatten(2, grid)
            # Contiguous, or torch.export would have to reason about the order of strides.
            by_row = torch.einsum("bhxyd,xjd->bhxyj", image, rows.to(q.dtype)).contiguous()
            by_column = torch.einsum("bhxyd,yjd->bhxyj", image, columns.to(q.dtype)).contiguous()
            pairs = (by_row[..., :, None] + by_column[..., None, :]) * scale
        pairs = pairs.flatten(4, 5).flatten(2, 3)  # (B, h, N, N)
        if not P:
            return pairs.to(q.dtype)
        entry = self.keys_prefix[block, 0]
        own = entry[None, :, None].expand(1, -1, T) if alike else (q @ entry.to(q.dtype)) * scale
        own = own[..., None].expand(-1, -1, -1, T)  # (B or 1, h, T, T)
        return torch.cat([own[:, :, :P], torch.cat([own[:, :, P:, :P], pairs], -1)], 2).to(q.dtype)

    def attn_values(self, block, weights, grid):
        if not self.needs_weights:
            return None
        P = self.prefix_tokens
        rows, columns = (t.to(weights.dtype) for t in self._entries("values", block, grid))
        pairs = weights[:, :, P:, P:].unflatten(3, grid).unflatten(2, grid)  # (B, h, H, W, H, W)
        by_row = torch.einsum("bhxyj,xjd->bhxyd", pairs.sum(-1), rows).contiguous()
        by_column = torch.einsum("bhxyj,yjd->bhxyd", pairs.sum(-2), columns).contiguous()
        out = (by_row + by_column).flatten(2, 3)
        if not P:
            return out
        own = self.values_prefix[block, 0].to(weights.dtype)
        out = out + weights[:, :, P:, :P].sum(-1, keepdim=True) * own
        return torch.cat([weights[:, :, :P].sum(-1, keepdim=True) * own, out], 2)


class RotaryEncoding(Encoding):
    """Axial rotary encoding: half of each head turns with the row, half with the column; no prefix turns."""

    in_attention = True

    def __init__(self, config: Rotary, model: ModelConfig):
        super().__init__(config, model)
        if (width := model.width // model.heads) % 4:
            raise ConfigError(f"rotary: head width {width}; two axes of pairs need a multiple of 4")

    def rotate(self, block, q, k, grid):
        step = _step(self.config.resize, self.grid, grid)
        angles = axial_angles(grid, q.shape[-1] // 4, self.config.theta, step, **_like(q))
        cos, sin = (part.flatten(1).to(q.dtype) for part in (angles.cos(), angles.sin()))  # (N, d/2)

        def turn(x: Tensor) -> Tensor:
            prefix, (a, b) = x[:, :, : self.prefix_tokens], x[:, :, self.prefix_tokens :].chunk(2, -1)
            return torch.cat([prefix, torch.cat([a * cos - b * sin, a * sin + b * cos], -1)], 2)

        return turn(q), turn(k)


CLASSES = [LearnedEncoding, SineEncoding, RelativeEncoding, RotaryEncoding, PegEncoding]
KINDS = dict(zip([Learned, Sine, Relative, Rotary, Peg], CLASSES, strict=True))


class EncodingSum(Encoding):
    """The encodings of a model, none or more, each acting in the order written; submodules by their kind."""

    def __init__(self, model: ModelConfig):
        super().__init__(None, model)
        for config in parse_encoding(model.encoding):
            name = type(config).__name__.lower()
            count = sum(type(part.config) is type(config) for part in self.children())
            if count and isinstance(config, Learned):
                raise ConfigError(f"encoding {model.encoding!r}: one learned table at most")
            self.add_module(f"{name}_{count + 1}" if count else name, KINDS[type(config)](config, model))
        self.prune(model.depth)

    def prune(self, depth):
        for name, part in list(self.named_children()):
            if not part.prune(depth):
                delattr(self, name)
        self.in_attention = any(part.in_attention for part in self.children())
        self.needs_weights = any(part.needs_weights for part in self.children())
        return bool(len(self._modules))

    def set_grid(self, grid: Grid) -> None:
        """Another trained grid; refused where positions are counted in parts of it: they would jump."""
        for part in self.children():
            counts = not isinstance(part, LearnedEncoding) and getattr(part.config, "resize", "raw") != "raw"
            if counts and grid != self.grid:
                trained = f"the trained grid {self.grid}, which stays"
                raise ConfigError(f"{part.config} counts in parts of {trained}; every size runs anyway")
        for part in (self, *self.children()):
            part.grid = grid

    def encode(self, position, x, grid, table=None):
        for part in self.children():
            x, grid = part.encode(position, x, grid, table)
        return x, grid

    def qk_input(self, block, x, grid):
        for part in self.children():
            x = part.qk_input(block, x, grid)
        return x

    def rotate(self, block, q, k, grid):
        for part in self.children():
            q, k = part.rotate(block, q, k, grid)
        return q, k

    def attn_bias(self, block, q, grid):
        return _sum(part.attn_bias(block, q, grid) for part in self.children())

    def attn_values(self, block, weights, grid):
        return _sum(part.attn_values(block, weights, grid) for part in self.children())


def _sum(terms) -> Tensor | None:
    terms = [term for term in terms if term is not None]
    return sum(terms[1:], terms[0]) if terms else None


def learned_table(model: ModelConfig) -> nn.Parameter | None:
    """-> (1, P + N, D), a fresh table for a model whose encoding has a learned one; else None."""
    if not any(isinstance(part, Learned) for part in parse_encoding(model.encoding)):
        return None
    table = nn.Parameter(torch.empty(1, model.prefix_tokens + model.grid[0] * model.grid[1], model.width))
    return nn.init.trunc_normal_(table, std=0.02)
