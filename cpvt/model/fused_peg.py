"""The PEG as one operator, `peg`: in Triton on a GPU, one pass over the tokens with their prefix.

What it computes is said by `by_convolution`, which also is the operator's form on a CPU, and what a GPU gets
where the kernels do not prove right at their first use.

Letters: B batch, P prefix tokens, T = P + H*W tokens, D width, (H, W) grid of tokens, k the width of a kernel.
"""

from __future__ import annotations  # those of kernels name `tl`, which may be None

import functools
from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor

from cpvt.proven import proved

try:
    import triton
    import triton.language as tl
except ImportError:  # PyTorch for CPUs, or for a Mac, comes without it
    triton = tl = None
_jit = triton.jit if triton else lambda function: function

LARGEST_KERNEL = 5  # the backward pass keeps k * k sums in registers: 25 fit, 49 do not
BEFORE_2_14 = torch.__version__ < (2, 14) and hasattr(torch.compiler, "_is_exporting_flag")


def exporting() -> bool:
    """Whether torch.export is tracing. Before PyTorch 2.14 `is_exporting` says so inside torch.compile, too."""
    return torch.compiler._is_exporting_flag if BEFORE_2_14 else torch.compiler.is_exporting()


def available(x: Tensor) -> bool:
    """Whether `peg` computes tensors like `x` to their own precision; Triton's sums are float32."""
    low = x.dtype in (torch.float32, torch.bfloat16, torch.float16)
    return not exporting() and (not x.is_cuda or (triton is not None and low))  # ONNX has no such operator


# Memory traffic, S being the bytes of x: forward 2 S (x in, out out), backward 3 S (g and x in, dx out);
# neighbours come from the cache. Step by step, rounding, convolution, sum and concatenation move 7 S forward.
@_jit
def _peg_forward(
    x, weight, bias, out, T, P, H, W, D, x_batch, x_token, blocks,
    K: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
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
            factor = tl.load(weight + (i * K + j) * D + channel, here, 0).to(tl.float32)
            total += value.to(tl.float32) * factor[None, :]
    total += tl.where(patch[:, None], tl.load(bias + channel, here, 0).to(tl.float32)[None, :], 0.0)
    place = (image * T + token[:, None]) * D + channel[None, :]
    tl.store(out + place, total.to(out.dtype.element_ty), (token < T)[:, None] & here[None, :])


# dx[m] = g[m] + sum of w[o] g[m - o] and dw[o] = sum over m of x[m] g[m - o] read the same neighbours of g: one
# pass gives both. Each program writes its own sums, added afterwards in a fixed order: atomic additions would
# give another gradient each time.
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
        factors = factors + (tl.load(weight + o * D + channel, here, 0).to(tl.float32),)
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
                mask = inside[:, None] & here[None, :]
                value = tl.load(g_here + other[:, None] * g_token, mask, 0).to(tl.float32)
                total += value * factors[i * K + j][None, :]
                added = added + (dw[i * K + j] + own * value,)
        dw = added
        place = (image * T + token[:, None]) * D + channel[None, :]
        tl.store(dx + place, total.to(dx.dtype.element_ty), exists)
    sums += program.to(tl.int64) * (K * K + 1) * D + channel
    for o in tl.static_range(K * K):
        tl.store(sums + o * D, tl.sum(dw[o], 0), here)
    tl.store(sums + K * K * D, tl.sum(db, 0), here)


# A program has 128 threads. Forward, neighbours are loaded ahead; backward, each thread keeps k * k + 1 sums for
# each of its numbers: at most 152 of 255 registers for 3x3, 195 for 5x5, and at no width is one spilled.
TOKENS = {1: (16, 8), 3: (16, 8), 5: (8, 4)}  # of a program, by kernel: forward and backward
BLOCK_D = 64
PROGRAMS = 512  # rows of partial sums: a hundredth of the bytes of g and x, and enough to fill any card


def launch_forward(x: Tensor, weight: Tensor, bias: Tensor, H: int, W: int) -> Tensor:
    """(B, T, D), (D, 1, k, k), (D,) -> (B, T, D): runs the kernel, in the strides that x comes with."""
    x, K = _channels_last(x), weight.shape[-1]
    (B, T, D), out = x.shape, torch.empty(x.shape, dtype=x.dtype, device=x.device)
    blocks = -(-T // TOKENS[K][0])
    sizes = (T, T - H * W, H, W, D, x.stride(0), x.stride(1), blocks)
    with torch.cuda.device_of(x):
        run = _peg_forward[B * blocks, -(-D // BLOCK_D)]
        made = run(x, _turned(weight), bias, out, *sizes, K=K, BLOCK_T=TOKENS[K][0], BLOCK_D=BLOCK_D)
    _spills["forward"] = getattr(made, "n_spills", 0)
    return out


def launch_backward(g: Tensor, x: Tensor, weight: Tensor, H: int, W: int) -> tuple[Tensor, Tensor, Tensor]:
    """Gradient (B, T, D), x (B, T, D), (D, 1, k, k) -> those of x, weight and bias."""
    g, x, K = _channels_last(g), _channels_last(x), weight.shape[-1]
    (B, T, D), dx = x.shape, torch.empty(x.shape, dtype=x.dtype, device=x.device)
    blocks = -(-T // TOKENS[K][1])
    units = B * blocks
    each = max(1, -(-units // PROGRAMS))
    programs = -(-units // each)
    sums = torch.empty(programs, K * K + 1, D, dtype=torch.float32, device=x.device)
    sizes = (T, T - H * W, H, W, D, g.stride(0), g.stride(1), x.stride(0), x.stride(1), blocks, units, each)
    with torch.cuda.device_of(x):
        run = _peg_backward[programs, -(-D // BLOCK_D)]
        made = run(g, x, _turned(weight), dx, sums, *sizes, K=K, BLOCK_T=TOKENS[K][1], BLOCK_D=BLOCK_D)
    _spills["backward"] = getattr(made, "n_spills", 0)
    total = sums.sum(0).to(weight.dtype)
    return dx, total[:-1].t().reshape(weight.shape).contiguous(), total[-1].clone()


_spills = {}  # of the kernels that were run last, in bytes a thread; the interpreter knows none


def _channels_last(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _turned(weight: Tensor) -> Tensor:
    """(D, 1, k, k) -> (k * k, D), so that neighbouring threads load neighbouring numbers."""
    return weight.flatten(1).t().contiguous()


def by_convolution(x: Tensor, weight: Tensor, bias: Tensor, H: int, W: int) -> Tensor:
    """`launch_forward` in PyTorch's own operators."""
    with torch.autocast(x.device.type, enabled=False):
        prefix, image = _split(x.to(weight.dtype), H, W)
        out = F.conv2d(image, weight, bias, padding=weight.shape[-1] // 2, groups=len(weight))
        return torch.cat([prefix, (image + out).flatten(2).transpose(1, 2)], 1).to(x.dtype)


def backward_by_convolution(g: Tensor, x: Tensor, weight: Tensor, H: int, W: int):
    """`launch_backward` in PyTorch's own operators."""
    (prefix, down), (_, image) = (_split(t.to(weight.dtype), H, W) for t in (g, x))
    border, one = [weight.shape[-1] // 2] * 2, [1, 1]
    image_g, weight_g, bias_g = torch.ops.aten.convolution_backward(
        down, image, weight, [len(weight)], one, border, one, False, [0, 0], len(weight), [True] * 3
    )
    dx = torch.cat([prefix, (down + image_g).flatten(2).transpose(1, 2)], 1)
    return dx.to(x.dtype).contiguous(), weight_g.contiguous(), bias_g


def _split(x: Tensor, H: int, W: int) -> tuple[Tensor, Tensor]:
    prefix, patches = x.split([x.shape[1] - H * W, H * W], 1)
    return prefix, patches.transpose(1, 2).unflatten(2, (H, W))


@torch.no_grad()
def largest_error(found: Iterable[Tensor], exact: Iterable[Tensor]) -> float:
    """The largest |found - exact| / |exact| of the pairs. Zeros that should be are no error; a NaN gives NaN."""
    pairs = ((a.to(b), b) for a, b in zip(found, exact, strict=True))
    errors = [(a - b).norm() / b.norm().clamp(min=torch.finfo(b.dtype).tiny) for a, b in pairs]
    return float(torch.stack(errors).max())


@functools.cache
def proven(device: torch.device, dtype: torch.dtype, width: int, kernel: int) -> bool:
    """Whether both kernels give what the convolution gives in float64, tried once on a small case of this kind."""
    name = f"Triton PEG of kernel {kernel}, width {width}, {dtype} on {device}"
    return proved(name, lambda: _fault(device, dtype, width, kernel), "PyTorch's convolution")


def _fault(device: torch.device, dtype: torch.dtype, width: int, kernel: int) -> str:
    """What is wrong with the kernels, on odd sizes: a grid that fills no block, tokens that stride over others, a
    gradient whose channels are no neighbours, more units than programs on a GPU."""
    draw, B, (H, W) = torch.Generator().manual_seed(0), 64 if device.type == "cuda" else 2, (7, 9)
    shapes = ((B, H * W + 5, width), (B, width, H * W + 2), (width, 1, kernel, kernel), (width,))
    x, g, weight, bias = (torch.randn(shape, generator=draw).to(device) for shape in shapes)
    x, g = x.to(dtype)[:, 2:-1], g.to(dtype).transpose(1, 2)  # two prefix tokens
    bound = max(1e-5, 2 * torch.finfo(dtype).eps)  # float32 gives 1e-7; a wrong or missing term gives 0.1
    found = launch_forward(x, weight, bias, H, W), *launch_backward(g, x, weight, H, W)
    x, g, weight, bias = (t.double() for t in (x, g, weight, bias))
    exact = by_convolution(x, weight, bias, H, W), *backward_by_convolution(g, x, weight, H, W)
    if not (error := largest_error(found, exact)) < bound:
        return f"a relative error of {error:.2g}, expected below {bound:.1g}"
    spilled = {name: count for name, count in _spills.items() if count}
    return f"registers spilled to memory, in bytes: {spilled}" if spilled else ""


# --------------------------------------------------------------------------- the operator


# An opaque operator, whose kernel reads the strides when it runs: whatever layout the compiler chooses, the
# numbers are right. (torch.library.triton_op would fix them as constants while tracing.)
@torch.library.custom_op("cpvt::peg", mutates_args=())
def peg(x: Tensor, weight: Tensor, bias: Tensor, H: int, W: int) -> Tensor:
    """(B, P + H*W, D), (D, 1, k, k), (D,) -> (B, P + H*W, D): x + depthwise convolution + bias.

    Zero padding; prefix tokens pass unchanged; the output has x's precision, sums are float32. Autocast rounds
    nothing here. Not for double backward.
    """
    run = launch_forward if _kernels_serve(x, weight) else by_convolution
    return run(x, weight, bias, H, W).contiguous()


@torch.library.custom_op("cpvt::peg_backward", mutates_args=())
def peg_backward(g: Tensor, x: Tensor, weight: Tensor, H: int, W: int) -> tuple[Tensor, Tensor, Tensor]:
    """Gradient of `peg`'s output -> those of x, weight and bias."""
    run = launch_backward if _kernels_serve(x, weight) else backward_by_convolution
    return run(g, x, weight, H, W)


def _kernels_serve(x: Tensor, weight: Tensor) -> bool:
    return x.is_cuda and proven(x.device, x.dtype, x.shape[-1], weight.shape[-1])


def _shapes(g, x, weight, H, W):
    return x.new_empty(x.shape), weight.new_empty(weight.shape), weight.new_empty(weight.shape[:1])


def _remember(ctx, inputs, output):
    x, weight, _, *ctx.grid = inputs
    ctx.save_for_backward(x, weight)


def _differentiate(ctx, g):
    return *peg_backward(g, *ctx.saved_tensors, *ctx.grid), None, None


peg.register_fake(lambda x, weight, bias, H, W: x.new_empty(x.shape))
peg_backward.register_fake(_shapes)
peg.register_autograd(_differentiate, setup_context=_remember)
