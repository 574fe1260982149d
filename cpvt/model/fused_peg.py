"""The encodings' sums, arranged for a GPU: one pass over the tokens, no table of all pairs.

Letters: B batch, N = H*W patches, P prefix tokens (class, distillation), T = P + N tokens,
D width, h heads, d = D/h head width, (H, W) grid of tokens, k the width of a kernel.

What an encoding is stands in `encodings.py`; here is the same number reached by a shorter road. The PEG's
operator runs where Triton is; it has a CPU form too, which no model uses but every test can.
"""

from __future__ import annotations

import os

import torch
import torch.nn.functional as F
from torch import Tensor

from cpvt.config import Peg, Relative
from cpvt.model.tables import Grid, offsets

try:
    import triton
    import triton.language as tl
except ImportError:  # PyTorch for CPUs, or for a Mac, comes without it
    triton = tl = None

# A switch of the environment and not of the configuration: it changes how long a step takes and not what is
# computed, and recorded rows carry the text of the configuration. 0 shows what the other road costs.
FUSED = os.environ.get("CPVT_FUSED", "1") != "0"

LARGEST_KERNEL = 5  # the backward pass keeps k * k sums in registers: 25 fit, 49 do not
LARGEST_HEAD = 128  # the widest head that the fused attention kernels take at full speed


def fast(x: Tensor) -> bool:
    """Whether tensors like `x` take the short road: on a GPU, in a precision that is not for checking."""
    low = x.dtype in (torch.float32, torch.bfloat16, torch.float16)
    return FUSED and x.is_cuda and low and not torch.compiler.is_exporting()  # ONNX has no such operators


# --------------------------------------------------------------------------- the PEG as one operator


def fuses(config: Peg, x: Tensor) -> bool:
    """Whether `peg` computes this PEG; the convolution does elsewhere."""
    plain = config.convolution == "depthwise" and config.padding == "zero" and config.skip
    plain = plain and config.on != "constant"
    small = config.kernel <= LARGEST_KERNEL and config.compute == "convolution"
    return plain and small and triton is not None and fast(x)


def _jit(function):
    return function if triton is None else triton.jit(function)


# Bytes that have to move, S for the stream (B*T*D numbers in its own precision: 155 MB of float32 for DeiT-Ti
# at batch 1024, autocast or not): forward 2 S (x in, out out), backward 3 S (g and x in, dx out); neighbours
# are read again from the cache. Step by step a convolution under autocast moves 7 S forward: x rounded, the
# convolution of that in bfloat16, its sum with x, and the class token put in front again.
@_jit
def _peg_forward(
    x, weight, bias, out, T, P, H, W, D, x_batch, x_token, blocks,
    HAS_BIAS: tl.constexpr, K: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_T tokens of one image, BLOCK_D channels. Prefix tokens pass unchanged."""
    unit = tl.program_id(0)
    image = (unit // blocks).to(tl.int64)  # images times stride can exceed 2^31
    token = unit % blocks * BLOCK_T + tl.arange(0, BLOCK_T)
    channel = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    here, patch = channel < D, (token >= P) & (token < T)
    row, column = (token - P) // W, (token - P) % W
    x += image * x_batch + channel[None, :]
    total = tl.load(x + token[:, None] * x_token, (token < T)[:, None] & here[None, :], 0).to(tl.float32)
    for i in tl.static_range(K):
        for j in tl.static_range(K):
            y, z = row + (i - K // 2), column + (j - K // 2)
            inside = patch & (y >= 0) & (y < H) & (z >= 0) & (z < W)
            other = token + ((i - K // 2) * W + (j - K // 2))
            value = tl.load(x + other[:, None] * x_token, inside[:, None] & here[None, :], 0)
            factor = tl.load(weight + channel * (K * K) + (i * K + j), here, 0).to(tl.float32)
            total += value.to(tl.float32) * factor[None, :]
    if HAS_BIAS:
        shift = tl.load(bias + channel, here, 0).to(tl.float32)
        total += tl.where(patch[:, None], shift[None, :], 0.0)
    place = (image * T + token[:, None]) * D + channel[None, :]
    tl.store(out + place, total.to(out.dtype.element_ty), (token < T)[:, None] & here[None, :])


# dx[m] = g[m] + sum of w[o] g[m - o] and dw[o] = sum over m of x[m] g[m - o] read the same neighbours of g, so
# one pass gives both. Each program writes its own sums; they are added afterwards in a fixed order, so that
# the same batch gives the same gradient, which atomic additions would not.
@_jit
def _peg_backward(
    g, x, weight, dx, sums, T, P, H, W, D, g_batch, g_token, x_batch, x_token, blocks, units, each,
    K: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One program: `each` units of BLOCK_T tokens, BLOCK_D channels. `sums`: (programs, K*K + 1, D)."""
    program = tl.program_id(0)
    channel = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    here = channel < D
    factors, dw = (), ()
    for o in tl.static_range(K * K):
        factors = factors + (tl.load(weight + channel * (K * K) + o, here, 0).to(tl.float32),)
        dw = dw + (tl.zeros((BLOCK_T, BLOCK_D), tl.float32),)
    db = tl.zeros((BLOCK_T, BLOCK_D), tl.float32)
    for unit in range(program * each, min(program * each + each, units)):
        image = (unit // blocks).to(tl.int64)
        token = unit % blocks * BLOCK_T + tl.arange(0, BLOCK_T)
        patch = (token >= P) & (token < T)
        row, column = (token - P) // W, (token - P) % W
        g_here, x_here = g + image * g_batch + channel[None, :], x + image * x_batch + channel[None, :]
        exists = (token < T)[:, None] & here[None, :]
        total = tl.load(g_here + token[:, None] * g_token, exists, 0).to(tl.float32)
        own = tl.load(x_here + token[:, None] * x_token, patch[:, None] & here[None, :], 0).to(tl.float32)
        db += tl.where(patch[:, None], total, 0.0)
        added = ()
        for i in tl.static_range(K):
            for j in tl.static_range(K):
                y, z = row - (i - K // 2), column - (j - K // 2)
                inside = patch & (y >= 0) & (y < H) & (z >= 0) & (z < W)
                other = token - ((i - K // 2) * W + (j - K // 2))
                value = tl.load(g_here + other[:, None] * g_token, inside[:, None] & here[None, :], 0)
                value = value.to(tl.float32)
                total += value * factors[i * K + j][None, :]
                added = added + (dw[i * K + j] + own * value,)
        dw = added
        place = (image * T + token[:, None]) * D + channel[None, :]
        tl.store(dx + place, total.to(dx.dtype.element_ty), exists)
    sums += program.to(tl.int64) * (K * K + 1) * D + channel
    for o in tl.static_range(K * K):
        tl.store(sums + o * D, tl.sum(dw[o], 0), here)
    tl.store(sums + K * K * D, tl.sum(db, 0), here)


# A program has 128 threads. 64 channels of float32 are two cache lines a token. Backward, each thread keeps
# k * k + 1 sums for each of its numbers: with 4 numbers 152 registers for a 3x3 kernel, with 8 all 255 but 17.
FORWARD = {"BLOCK_T": 32, "BLOCK_D": 64}
BACKWARD = {"BLOCK_T": 8, "BLOCK_D": 64}
PROGRAMS = 512  # rows of partial sums: a hundredth of the bytes of g and x, and enough to fill any card


def launch_forward(x: Tensor, weight: Tensor, bias: Tensor | None, H: int, W: int) -> Tensor:
    """(B, T, D), (D, 1, k, k), (D,) or None -> (B, T, D): runs the kernel, in the strides that x comes with."""
    x, weight = _channels_last(x), weight.contiguous()
    (B, T, D), out = x.shape, torch.empty(x.shape, dtype=x.dtype, device=x.device)
    blocks = -(-T // FORWARD["BLOCK_T"])
    grid = (B * blocks, -(-D // FORWARD["BLOCK_D"]))
    sizes = (T, T - H * W, H, W, D, x.stride(0), x.stride(1), blocks)
    with torch.cuda.device_of(x):
        _peg_forward[grid](
            x, weight, weight if bias is None else bias, out, *sizes,
            HAS_BIAS=bias is not None, K=weight.shape[-1], **FORWARD,
        )  # fmt: skip
    return out


def launch_backward(g: Tensor, x: Tensor, weight: Tensor, H: int, W: int) -> tuple[Tensor, Tensor, Tensor]:
    """Gradient (B, T, D), x (B, T, D), (D, 1, k, k) -> those of x, weight and bias."""
    g, x, weight = _channels_last(g), _channels_last(x), weight.contiguous()
    (B, T, D), K = x.shape, weight.shape[-1]
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    blocks = -(-T // BACKWARD["BLOCK_T"])
    units = B * blocks
    each = max(1, -(-units // PROGRAMS))
    programs = -(-units // each)
    sums = torch.empty(programs, K * K + 1, D, dtype=torch.float32, device=x.device)
    strides = (g.stride(0), g.stride(1), x.stride(0), x.stride(1))
    with torch.cuda.device_of(x):
        _peg_backward[(programs, -(-D // BACKWARD["BLOCK_D"]))](
            g, x, weight, dx, sums, T, T - H * W, H, W, D, *strides, blocks, units, each,
            K=K, **BACKWARD,
        )  # fmt: skip
    total = sums.sum(0).to(weight.dtype)
    return dx, total[:-1].t().reshape(weight.shape).contiguous(), total[-1].clone()


def _channels_last(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


# An opaque operator, whose kernel reads the strides when it runs: whatever layout the compiler chooses, the
# numbers are right. (torch.library.triton_op would fix them as constants while tracing.) It is one node of the
# graph, and the CPU form below goes through the same tracing and compiling, so that tests reach all but the
# two kernels without a GPU.
@torch.library.custom_op("cpvt::peg", mutates_args=())
def peg(x: Tensor, weight: Tensor, bias: Tensor | None, height: int, width: int) -> Tensor:
    """(B, P + H*W, D), (D, 1, k, k), (D,) or None -> (B, P + H*W, D): x + depthwise convolution + bias.

    Zero padding; the P prefix tokens pass unchanged. x keeps its precision (the stream is float32 under
    autocast, which therefore rounds nothing here), weights have theirs, sums are float32. Not for double
    backward.
    """
    return launch_forward(x, weight, bias, height, width)


@torch.library.custom_op("cpvt::peg_backward", mutates_args=())
def peg_backward(
    g: Tensor, x: Tensor, weight: Tensor, height: int, width: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradient of `peg`'s output -> those of x, weight and bias."""
    return launch_backward(g, x, weight, height, width)


@peg.register_kernel("cpu")
def _(x, weight, bias, height, width):
    with torch.autocast("cpu", enabled=False):
        prefix, image = _split(x.to(weight.dtype), height, width)
        out = F.conv2d(image, weight, bias, padding=weight.shape[-1] // 2, groups=len(weight))
        out = torch.cat([prefix, (image + out).flatten(2).transpose(1, 2)], 1)
    return out.to(x.dtype).contiguous()


@peg_backward.register_kernel("cpu")
def _(g, x, weight, height, width):
    (prefix, down), (_, image) = (_split(t.to(weight.dtype), height, width) for t in (g, x))
    border, one = [weight.shape[-1] // 2] * 2, [1, 1]
    image_g, weight_g, bias_g = torch.ops.aten.convolution_backward(
        down, image, weight, [len(weight)], one, border, one, False, [0, 0], len(weight), [True] * 3
    )
    dx = torch.cat([prefix, (down + image_g).flatten(2).transpose(1, 2)], 1)
    return dx.to(x.dtype).contiguous(), weight_g.contiguous(), bias_g


def _split(x: Tensor, height: int, width: int) -> tuple[Tensor, Tensor]:
    prefix, patches = x.split([x.shape[1] - height * width, height * width], 1)
    return prefix, patches.transpose(1, 2).unflatten(2, (height, width))


@peg.register_fake
def _(x, weight, bias, height, width):
    return x.new_empty(x.shape)


@peg_backward.register_fake
def _(g, x, weight, height, width):
    return x.new_empty(x.shape), weight.new_empty(weight.shape), weight.new_empty(weight.shape[:1])


def _remember(ctx, inputs, output):
    x, weight, bias, ctx.height, ctx.width = inputs
    ctx.has_bias = bias is not None
    ctx.save_for_backward(x, weight)


def _differentiate(ctx, g):
    x, weight = ctx.saved_tensors
    dx, dw, db = peg_backward(g, x, weight, ctx.height, ctx.width)
    return dx, dw, db if ctx.has_bias else None, None, None


peg.register_autograd(_differentiate, setup_context=_remember)


# --------------------------------------------------------------------------- a kernel that covers the grid


def peg_matrix(x: Tensor, weight: Tensor, grid: Grid) -> Tensor:
    """(B, N, D), (D, 1, k, k) -> (B, N, D): the convolution as one N x N matrix a channel.

    For k >= 2 max(H, W) - 1, so that each pair of tokens has a weight. The matrices are gathered once a call
    (D*N*N numbers: 7.4 million for DeiT-Ti, a fifth of the tokens of a batch of 1024), then multiply the whole
    batch: 15 GFLOP there, in autocast's precision with float32 sums.
    """
    centre = weight.shape[-1] // 2
    rows, columns = (offsets(n, centre, False, x.device) for n in grid)
    # (D, k, k); entry [m, n] is the weight from token n to token m
    matrix = weight[:, 0][:, rows[:, None, :, None], columns[None, :, None, :]].flatten(3, 4).flatten(1, 2)
    # On "meta" (shapes alone) there is no autocast to ask about: PyTorch refuses the question.
    if x.device.type != "meta" and torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        x, matrix = x.to(dtype), matrix.to(dtype)
    # Turned once, (D, N, B), and kept so for the backward pass; einsum would turn it anew for each product.
    return torch.bmm(matrix, x.permute(2, 1, 0).contiguous()).permute(2, 1, 0)


# --------------------------------------------------------------------------- relative offsets in longer heads


def lengthens(config: Relative, table: Tensor, q: Tensor, grid: Grid) -> bool:
    """Whether queries and keys grow by a channel for each row and column of the grid, instead of a (T, T) bias.

    `table` (..., d) is the encoding's own: `q` may have grown already.
    """
    return config.on == "keys" and table.shape[-1] + grid[0] + grid[1] <= LARGEST_HEAD and fast(q)


def lengthen(
    q: Tensor, k: Tensor, rows: Tensor, columns: Tensor, entry: Tensor | None, grid: Grid
) -> tuple[Tensor, Tensor]:
    """Two (B, h, T, d) -> two (B, h, T, d + H + W, rounded up to 8), whose products hold the relative terms.

    `rows` (H, H, d) and `columns` (W, W, d): the table's entry for each pair of rows, and of columns, a function
    of their offset alone. `entry` (d,): that of a pair with a prefix token, None without any.

    The term q . (rows[r, r'] + columns[c, c']) picks one of H numbers by the key's row and one of W by its
    column. So the query carries all H + W numbers, and the key ones at its own row and column. Towards prefix
    tokens, q . entry is reached by adding `entry` to their keys; from them, by numbers alike for all rows.
    """
    (H, W), d = grid, rows.shape[-1]
    P, extra = q.shape[2] - H * W, -(q.shape[-1] + H + W) % 8
    # Every offset from -(H-1) to H-1, then those of the columns, then the prefix: one product for all tokens.
    table = [rows[1:, 0].flip(0), rows[0], columns[1:, 0].flip(0), columns[0]]
    table = torch.cat([*table, rows.new_zeros(1, d) if entry is None else entry[None]]).to(q.dtype)
    table = F.pad(table, (0, 0, 0, -len(table) % 8))
    # By heads, (h, B*T, d): a view of what the linear layer wrote, where (B*h*T, d) would copy it.
    by_head = q[..., :d].transpose(0, 1)
    scores = torch.bmm(by_head.flatten(1, 2), table.t().expand(len(by_head), -1, -1))
    scores = scores.unflatten(1, by_head.shape[1:3]).transpose(0, 1)  # (B, h, T, M)
    M, flat = scores.shape[-1], scores[:, :, P:].flatten(2)
    # Token (r, c) needs M-long rows from H-1-r on for its H rows, from 2H-1 + W-1-c on for its W columns.
    by_row = _windows(_windows(flat, H, W * M - 1, (W - 1) * M + H, H - 1), W, M, H)
    by_column = _windows(flat.unflatten(2, (H, W * M)), W, M - 1, W, 2 * H - 1 + W - 1)
    added = torch.cat([by_row, by_column], -1).flatten(2, 3)
    place = torch.arange(H * W, device=q.device)
    r, c = torch.arange(H, device=q.device), torch.arange(W, device=q.device)
    marks = torch.cat([place[:, None] // W == r, place[:, None] % W == c], -1).to(k.dtype)
    if P:
        own = 2 * H - 1 + 2 * W - 1
        same = F.pad(scores[:, :, :P, own : own + 1].expand(-1, -1, -1, H), (0, W))
        added, marks = torch.cat([same, added], 2), F.pad(marks, (0, 0, P, 0))
        near = F.pad(entry.to(k.dtype)[None].expand(P, -1), (0, k.shape[-1] - d, 0, H * W))
        k = k + near
    marks = F.pad(marks, (0, extra)).expand(*k.shape[:2], -1, -1)
    return torch.cat([q, F.pad(added, (0, extra))], -1), torch.cat([k, marks], -1)


def _windows(x: Tensor, count: int, step: int, size: int, start: int = 0) -> Tensor:
    """(..., L) -> (..., count, size): window i begins at start + i * step. As Tensor.unfold, but what autograd
    makes of that is a scattered sum."""
    x = x[..., start : start + (count - 1) * step + size]
    return F.pad(x, (0, count * step - x.shape[-1])).unflatten(-1, (count, step))[..., :size]
