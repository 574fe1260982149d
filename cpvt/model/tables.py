"""Positions as numbers: angles, sines, offsets, and a table brought to another grid.

Letters: N = H*W patches, D width, (H, W) grid of tokens.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from cpvt.errors import ConfigError

Grid = tuple[int, int]


def axial_angles(grid: Grid, n: int, base: float, step: tuple[float, float] = (1.0, 1.0), **kw) -> Tensor:
    """-> (H*W, 2, n): row and column times n frequencies, from 1 down towards 1 / base.

    `step` is the distance between neighbouring tokens, down and across; `kw`: dtype and device.
    """
    frequency = base ** -(torch.arange(n, **kw) / n)
    rows, columns = (torch.arange(n, **kw)[:, None] * s * frequency for n, s in zip(grid, step, strict=True))
    rows, columns = rows[:, None].expand(-1, grid[1], -1), columns[None].expand(grid[0], -1, -1)
    return torch.stack([rows, columns], 2).flatten(0, 1)


def sine_table(
    grid: Grid, width: int, temperature: float = 10000.0, step: tuple[float, float] = (1.0, 1.0), **kw
) -> Tensor:
    """-> (H*W, width): [sin row, cos row, sin column, cos column], a quarter of the width each."""
    if width % 4:
        raise ConfigError(f"sine: width={width}; a row and a column, sine and cosine, need a multiple of 4")
    angles = axial_angles(grid, width // 4, temperature, step, **kw)
    return torch.cat([angles.sin(), angles.cos()], -1).flatten(1)


def resample_table(table: Tensor, old: Grid, new: Grid, antialias: bool = False) -> Tensor:
    """(..., old H*W, D) -> (..., new H*W, D), bicubic, to any height and width; the same grid changes nothing."""
    if not torch.compiler.is_exporting() and old == new:  # an exported graph must not ask: its grid is open
        return table
    image = table.reshape(-1, *old, table.shape[-1]).permute(0, 3, 1, 2)
    image = F.interpolate(image, size=new, mode="bicubic", antialias=antialias)
    return image.flatten(2).transpose(1, 2).reshape(*table.shape[:-2], -1, table.shape[-1])


def offsets(n: int, clip: int, wrap: bool, device=None) -> Tensor:
    """-> (n, n) indices of a table of 2*clip + 1 rows: [i, j] holds j - i, clipped; on a ring if `wrap`."""
    i = torch.arange(n, device=device)
    offset = i[None, :] - i[:, None]
    if wrap:
        offset = (offset + n // 2) % torch.full_like(offset, n) - n // 2  # a tensor, as ONNX asks for
    return offset.clamp(-clip, clip) + clip
