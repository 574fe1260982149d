"""The fused PEG gives what the convolution gives, in values and gradients.

Bounds: 1e-12 in float64 (rounding gives 1e-15), 1e-6 for float32 against float64; bfloat16 rounds by 2^-9 at most.
"""

import collections
import itertools
import math
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from helpers import needs_gpu
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.attention import SDPBackend, sdpa_kernel

from cpvt import create_model, proven
from cpvt.config import Peg
from cpvt.model import fused_peg
from cpvt.model.encodings import PEG
from cpvt.model.fused_peg import largest_error

needs_triton = pytest.mark.skipif(fused_peg.triton is None, reason="needs Triton")


def by_definition(x, weight, bias, grid):
    """Prefix tokens as they are; patches plus their depthwise convolution."""
    prefix, patches = x.split([x.shape[1] - grid[0] * grid[1], grid[0] * grid[1]], 1)
    image = patches.transpose(1, 2).unflatten(2, grid)
    image = image + F.conv2d(image, weight, bias, padding=weight.shape[-1] // 2, groups=len(weight))
    return torch.cat([prefix, image.flatten(2).transpose(1, 2)], 1)


def example(B, P, grid, D, k, dtype=torch.float32, device="cpu"):
    """x, a view that strides over other tokens; a gradient with channels that are not neighbours; weights."""
    draw = torch.Generator().manual_seed(0)
    T = P + grid[0] * grid[1]
    x = torch.randn(B, T + 3, D, generator=draw).to(device, dtype)[:, 2 : 2 + T]
    g = torch.randn(B, D, T, generator=draw).to(device, dtype).transpose(1, 2)
    weight = torch.randn(D, 1, k, k, generator=draw).to(device)
    return x, g, weight, torch.randn(D, generator=draw).to(device)


def exact(x, g, weight, bias, grid):
    """-> the output and all gradients, in float64 and by definition."""
    inputs = [t.double().requires_grad_() for t in (x, weight, bias)]
    out = by_definition(*inputs, grid)
    return [out.detach(), *torch.autograd.grad(out, inputs, g.double())]


def test_zeros_that_should_be_are_no_error_and_a_nan_always_is():
    zeros, ones = torch.zeros(3), torch.ones(3)
    assert largest_error([zeros, ones], [zeros, ones]) == 0
    assert largest_error([2 * ones, zeros], [ones, zeros]) == 1
    assert largest_error([ones, ones], [ones, zeros]) > 1e30
    for place in range(2):
        found = [ones, ones.clone()]
        found[place] = found[place] * torch.nan
        assert not largest_error(found, [ones, ones]) < math.inf


# B, P, grid, D, k: widths that fill no block, one and more; images of less and more than a block of tokens.
CASES = [(2, 1, (5, 6), 48, 3), (3, 2, (4, 3), 70, 3), (1, 0, (7, 1), 64, 5), (2, 1, (3, 3), 16, 1)]


def run_the_kernels():
    """In a process whose environment asks for Triton's interpreter."""
    fused_peg.PROGRAMS = 3  # so that a program has several units, and the last one fewer
    for case, dtype in [*((case, torch.float32) for case in CASES), (CASES[0], torch.bfloat16)]:
        x, g, weight, bias = example(*case, dtype)
        out = fused_peg.launch_forward(x, weight, bias, *case[2])
        gradients = fused_peg.launch_backward(g, x, weight, *case[2])
        assert out.dtype == gradients[0].dtype == dtype and out.is_contiguous()
        found, expected = [out, *gradients], exact(x, g, weight, bias, case[2])
        error = largest_error(found, expected)
        assert error < (1e-6 if dtype == torch.float32 else 2**-8), (case, dtype, error)
        assert (
            largest_error(found[2:], expected[2:]) < 1e-6
        )  # sums over tokens are float32 whatever is stored
        assert fused_peg.proven(x.device, dtype, 16, 3)


@needs_triton
def test_kernels_in_tritons_interpreter():
    code = f"import sys; sys.path[:0] = {sys.path}; import test_fused_peg; test_fused_peg.run_the_kernels()"
    subprocess.run([sys.executable, "-c", code], env={**os.environ, "TRITON_INTERPRET": "1"}, check=True)


def test_without_triton_everything_is_there():
    code = "import sys; sys.modules['triton'] = None; import cpvt.model.vit"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("fault", ["raises", "an eighth is missing", "spills"])
def test_kernels_that_do_not_prove_right_are_not_used(monkeypatch, fault):
    def launch(x, weight, bias, H, W):
        assert fault != "raises"
        return fused_peg.by_convolution(x, weight * (1 if fault == "spills" else 7 / 8), bias, H, W)

    monkeypatch.setattr(fused_peg, "launch_forward", launch)
    monkeypatch.setattr(fused_peg, "launch_backward", fused_peg.backward_by_convolution)
    if fault == "spills":
        monkeypatch.setattr(fused_peg, "_spills", {"backward": 24})
    monkeypatch.setattr(proven, "verdicts", {})
    fused_peg.proven.cache_clear()
    words = "not used: Triton PEG of kernel 3, width 16, torch.float32 on cpu"
    with pytest.warns(UserWarning, match=words) as told:
        assert not any(fused_peg.proven(torch.device("cpu"), torch.float32, 16, 3) for _ in range(3))
    assert len(told) == 1 and list(proven.verdicts.values()) != [proven.PROVEN]
    fused_peg.proven.cache_clear()


def resources(kernel, arch, dtype, K, aligned, T):
    """-> registers a thread, and bytes of its stack, where registers go that spill: as the assembler says."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names, constants = kernel.arg_names, {"K": K, "BLOCK_T": T, "BLOCK_D": fused_peg.BLOCK_D}
    pointers = dict.fromkeys(("x", "out", "g", "dx"), dtype)
    pointers |= dict.fromkeys(("weight", "bias", "sums"), "*fp32")
    types = {name: "constexpr" if name in constants else pointers.get(name, "i32") for name in names}
    # What Triton sees when it is called: tensors begin at multiples of 16 bytes, sizes may be multiples of 16.
    sizes = [n for n in names if n == "D" or n.endswith(("_batch", "_token"))] if aligned else []
    hints = {(names.index(name),): [["tt.divisibility", 16]] for name in [*pointers, *sizes] if name in names}
    source = ASTSource(kernel, types, constexprs=constants, attrs=hints)
    made = fused_peg.triton.compile(source, target=GPUTarget("cuda", arch, 32))
    tool = Path(fused_peg.triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(made.asm["cubin"])
        said = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True)
    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", said.stdout + said.stderr).groups()
    return int(registers), int(stack), re.findall(r"ld\.global\S*\.(v\d)\.b32", made.asm["ptx"])


# Ampere, Hopper, Blackwell; all of DeiT's widths are multiples of 16, and one code serves them.
MACHINES = list(itertools.product((80, 90, 100), ("*fp32", "*bf16"), (1, 3, 5), (True, False)))
QUICK = [(90, "*fp32", 3, True), (90, "*bf16", 3, False), (90, "*fp32", 5, True)]
OTHERS = [pytest.param(*m, marks=pytest.mark.slow) for m in MACHINES if m not in QUICK]


@needs_triton
@pytest.mark.parametrize("arch, dtype, K, aligned", QUICK + OTHERS)
def test_kernels_spill_no_register(arch, dtype, K, aligned):
    """Of 255. Where widths are multiples of 16, each load is of 64 bits at least: two float32, four bfloat16."""
    for kernel, T in zip((fused_peg._peg_forward, fused_peg._peg_backward), fused_peg.TOKENS[K], strict=True):
        registers, stack, wide = resources(kernel, arch, dtype, K, aligned, T)
        assert stack == 0 and registers <= (160 if K < 5 else 200), (registers, stack)
        assert bool(wide) == aligned


@pytest.mark.parametrize("case", CASES[1:3])
def test_operator_is_the_convolution(case):
    x, g, weight, bias = (t.double() for t in example(*case))
    inputs = [t.clone().requires_grad_() for t in (x, weight, bias)]
    out = fused_peg.peg(*inputs, *case[2])
    found = [out, *torch.autograd.grad(out, inputs, g)]
    assert largest_error(found, exact(x, g, weight, bias, case[2])) < 1e-12
    assert torch.equal(out[:, : case[1]], x[:, : case[1]])  # prefix tokens pass


def test_operator_keeps_pytorchs_rules():
    """Schema, gradients, shapes without data, tracing with open sizes: PyTorch's own check of an operator."""
    x, g, weight, bias = example(2, 1, (4, 5), 8, 3)
    torch.library.opcheck(fused_peg.peg, (x, weight.requires_grad_(), bias.requires_grad_(), 4, 5))
    torch.library.opcheck(fused_peg.peg_backward, (g, x.detach(), weight.detach(), 4, 5))


@needs_triton
def test_which_pegs_are_fused(monkeypatch):
    """The paper's PEG and others of small kernels, on a GPU, in a training precision, unless told otherwise."""

    def fuses(x, fused=None, **options):
        peg = PEG(8, config=Peg(**options))
        peg.fused = fused
        return peg.fuses(x)

    with FakeTensorMode():
        x = torch.empty(2, 20, 8, device="cuda")
        assert fuses(x) and fuses(x.bfloat16()) and fuses(x.half()) and fuses(x, kernel=5)
        assert not fuses(x.double()) and not fuses(x.double(), True) and not fuses(x, False)
        assert not fuses(x.cpu()) and fuses(x.cpu().double(), True)
        others = [
            {"kernel": 7},
            {"bias": False},
            {"skip": False},
            {"padding": "circular"},
            {"on": "constant"},
        ]
        others += [{"compute": "matrix"}, {"convolution": "separable"}, {"convolution": "dense"}]
        assert not any(fuses(x, True, **other) for other in others)
    monkeypatch.setattr(torch.compiler, "is_exporting", lambda: True)
    assert fused_peg.exporting()
    monkeypatch.setattr(fused_peg, "BEFORE_2_14", True)  # which says so under torch.compile, too
    assert not fused_peg.exporting()


@needs_triton
def test_five_pegs_are_five_nodes():
    """No convolution but the patches', and the class token is put in front once, not once more a PEG."""
    model = create_model("cpvt_tiny_5peg", depth=6).train()
    shapes = {name: t.shape for name, t in model.named_parameters()}
    with FakeTensorMode(), sdpa_kernel(SDPBackend.MATH):
        state = {name: torch.empty(shape, device="cuda") for name, shape in shapes.items()}
        images = torch.empty(4, 3, 224, 224, device="cuda")
        graph = make_fx(lambda: torch.func.functional_call(model, state, (images,)))().graph
    seen = collections.Counter(str(node.target) for node in graph.nodes)
    assert seen["cpvt.peg.default"] == 5
    assert seen["aten.convolution.default"] == seen["aten.cat.default"] == 1


@needs_gpu
@pytest.mark.parametrize("k", [1, 3, 5])
@pytest.mark.parametrize("dtype, bound", [(torch.float32, 2e-6), (torch.bfloat16, 2**-8)])
@pytest.mark.parametrize("B, grid, D", [(64, (14, 14), 192), (8, (24, 24), 384), (3, (7, 5), 70)])
def test_kernels_on_a_gpu(B, grid, D, dtype, bound, k):
    """Values and gradients as in float64, and the same bits again: no atomic additions."""
    x, g, weight, bias = example(B, 1, grid, D, k, dtype, "cuda")
    assert fused_peg.proven(x.device, dtype, D, k)
    inputs = [t.detach().requires_grad_() for t in (x, weight, bias)]
    found = []
    for _ in range(2):
        out = fused_peg.peg(*inputs, *grid)
        found.append([out.detach(), *torch.autograd.grad(out, inputs, g)])
    expected = exact(x, g, weight, bias, grid)
    assert largest_error(found[0], expected) < bound
    assert largest_error(found[0][2:], expected[2:]) < 1e-5
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
