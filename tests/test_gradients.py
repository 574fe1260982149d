"""Gradients of the float32 step and of the compiled bfloat16 step against float64, for every encoding.

A group's error is |g - g64| / |g64| over its parameters. Bounds:

- float32: 1e-5. Rounding is 6e-8; sums over a few hundred terms give 1e-6 (measured: up to 2e-6).
- bfloat16: 0.05. Rounding to 8 bits gives a relative error of 2^-8 / sqrt(3) = 0.0023 at each operation. A
  gradient passes about ten rounded operations a block; in six blocks sqrt(60) * 0.0023 = 0.018 (measured:
  0.01 to 0.03). A sum that misses an eighth of its terms is off by 0.1, a buffer that is never written by 1.

Where there is a GPU the compiled step runs there too, at the training size: inductor fuses and picks layouts
by size, so a small batch would test other fused_peg.
"""

import copy
import os

import pytest
import torch
import torch.nn.functional as F

from cpvt.config import ModelConfig
from cpvt.model import fused_peg
from cpvt.model.encodings import PEG
from cpvt.model.vit import VisionTransformer

FLOAT32, BFLOAT16 = 1e-5, 0.05

ENCODINGS = [
    "none",
    "learned",
    "learned(antialias=True)",
    "sine",
    "sine(resize='rescale')",
    "relative(clip=2)",
    "relative(clip=2, on='keys_values')",
    "relative(clip=2, on='bias', wrap=True)",
    "rotary",
    "peg",
    "peg(positions=(0, 1, 2, 3, 4))",
    "peg(positions=(-1, 0), shared=True, init='twins')",
    "peg(convolution='dense', kernel=1, repeat=2)",
    "peg(convolution='separable')",
    "peg(padding='none', skip=False)",
    "peg(padding='replicate')",
    "peg(padding='reflect')",
    "peg(padding='circular')",
    "peg(on='queries_keys')",
    "peg(kernel=11)",
    "peg(kernel=11, compute='matrix')",
    "learned + peg",
]
FIVE = "peg(positions=(0, 1, 2, 3, 4))"
# Generating and compiling fused_peg takes a CPU half a minute or more a model. The five PEGs always get theirs;
# for these sums, which cover all kinds, CPVT_SLOW=1 asks for it. Without, they go through the same tracing,
# decompositions and partitioning.
SUMS = [
    "learned + relative(clip=2) + rotary + peg(on='queries_keys', positions=(-1,))",
    "learned(antialias=True) + sine + peg(convolution='dense', kernel=1, repeat=2)",
    "sine(resize='rescale') + relative(clip=2, on='keys_values')",
    "relative(clip=2, on='bias', wrap=True) + peg(positions=(-1, 0), shared=True, init='twins')",
    "peg(padding='replicate') + peg(padding='reflect') + peg(padding='circular')",
    "peg(kernel=11, compute='matrix') + peg(convolution='separable') + peg(padding='none', skip=False)",
]
CUDA = pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"))


def build(encoding: str, device="cpu", width=32, grid=(5, 6), batch=32, depth=2, **options):
    """A model and a batch. Weights large enough to matter; six blocks for five PEGs, so that all are read."""
    torch.manual_seed(0)
    depth = 6 if encoding == FIVE else depth
    sizes = {"width": width, "depth": depth, "heads": width // 16, "mlp_ratio": 2.0, "init_std": 0.1}
    model = VisionTransformer(ModelConfig(grid, 1, 3, 10, encoding=encoding, **sizes, **options))
    images, labels = torch.randn(batch, 3, *grid), torch.randint(10, (batch,))
    return model.to(device), images.to(device), labels.to(device)


def gradients(model, images, labels, bf16=False, forward=None, chunk=None) -> dict[str, torch.Tensor]:
    """One step's gradients in float64, by group. `chunk`: add up parts of the batch, to spare memory."""
    model.zero_grad(set_to_none=True)
    chunk = chunk or len(images)
    for x, y in zip(images.split(chunk), labels.split(chunk), strict=True):
        with torch.autocast(images.device.type, torch.bfloat16, enabled=bf16):
            logits = (model if forward is None else forward)(x)
        logits = logits if images.dtype == torch.float64 else logits.float()
        (F.cross_entropy(logits, y, reduction="sum") / len(images)).backward()
    groups: dict[str, list[torch.Tensor]] = {}
    for name, parameter in model.named_parameters():
        groups.setdefault(group(name), []).append(parameter.grad.double().flatten())
    return {name: torch.cat(parts) for name, parts in groups.items()}


def group(name: str) -> str:
    """Blocks apart, each PEG's kernel and bias apart, the parts of one relative table together."""
    for axis in ("_rows", "_columns", "_prefix"):
        name = name.removesuffix(axis)
    if name.startswith("encoding"):
        return name
    return ".".join(name.split(".")[:3])


def exact(model, images, labels, chunk=None):
    return gradients(copy.deepcopy(model).double(), images.double(), labels, chunk=chunk)


def errors(found: dict, expected: dict) -> dict[str, float]:
    assert found.keys() == expected.keys()
    return {name: float((found[name] - g).norm() / g.norm()) for name, g in expected.items()}


def check(found: dict, expected: dict, bound: float) -> None:
    wrong = {name: round(e, 7) for name, e in errors(found, expected).items() if not e <= bound}
    assert not wrong, f"relative errors above {bound}: {wrong}"


def view_of_the_stream(self, x, grid=None):
    """A PEG on the tokens as they stand behind a class token: a (B, D, H, W) view with batch stride (N+1) D."""
    image = x.transpose(1, 2).unflatten(2, grid)
    batch, channels, _, across = image.stride()
    assert channels == 1 and across == x.shape[2] and batch == (x.shape[1] + 1) * x.shape[2]
    return (self.proj(image) + image).flatten(2).transpose(1, 2)


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_eager(encoding):
    """Float32 and bfloat16, and gradient checkpointing, which may change nothing at all."""
    model, images, labels = build(encoding)
    expected = exact(model, images, labels)
    plain = gradients(model, images, labels)
    check(plain, expected, FLOAT32)
    check(gradients(model, images, labels, bf16=True), expected, BFLOAT16)
    model.set_grad_checkpointing()
    again = gradients(model, images, labels)
    assert all(torch.equal(again[name], plain[name]) for name in plain)


@pytest.mark.parametrize("encoding", SUMS)
def test_one_graph(encoding):
    """torch.compile takes the whole model, forward and backward, as one graph each; no fused_peg are generated."""
    torch.compiler.reset()
    model, images, labels = build(encoding, depth=1, global_pool="avg")
    expected = exact(model, images, labels)
    whole = torch.compile(model, backend="aot_eager_decomp_partition", fullgraph=True)
    check(gradients(model, images, labels, forward=whole), expected, FLOAT32)
    check(gradients(model, images, labels, forward=whole, bf16=True), expected, BFLOAT16)


@pytest.mark.skipif(os.environ.get("CPVT_SLOW") != "1", reason="minutes of compilation; CPVT_SLOW=1 runs it")
@pytest.mark.parametrize("encoding", SUMS)
def test_compiled(encoding):
    compare_compiled(*build(encoding, depth=1, global_pool="avg"))


def test_compiled_five_pegs_on_views(monkeypatch):
    """Five PEGs behind blocks 0 to 4, on channels-last views behind a class token, compiled, in bfloat16."""
    monkeypatch.setattr(PEG, "forward", view_of_the_stream)
    compare_compiled(*build(FIVE))


@pytest.mark.parametrize("device", [CUDA])
@pytest.mark.parametrize("road", ["package", "plain", "view"])
@pytest.mark.parametrize("encoding", ENCODINGS)
def test_compiled_at_training_size(encoding, road, device, monkeypatch):
    """As the package computes it, without `cpvt.model.fused_peg`, and on views of the stream."""
    if road != "package":
        monkeypatch.setattr(fused_peg, "FUSED", False)
    if road == "view":
        if encoding not in ("peg", FIVE):
            pytest.skip("the view form is the plain PEG's")
        monkeypatch.setattr(PEG, "forward", view_of_the_stream)
    model, images, labels = build(encoding, device, width=192, grid=(14, 14), batch=1024)
    compare_compiled(model, images, labels, chunk=128)


def compare_compiled(model, images, labels, chunk=None):
    """The compiled bfloat16 step: within the bound, and no worse than twice the eager one."""
    torch.compiler.reset()
    expected = exact(model, images, labels, chunk)
    eager = errors(gradients(model, images, labels, bf16=True), expected)
    whole = torch.compile(model, fullgraph=True)
    for _ in range(2):  # a buffer never written would keep the first step's numbers
        found = gradients(model, images, labels, bf16=True, forward=whole)
    check(found, expected, BFLOAT16)
    worse = {n: (e, eager[n]) for n, e in errors(found, expected).items() if e > 2 * eager[n] + 2**-8}
    assert not worse, f"compiled against eager bfloat16: {worse}"


FAULTS = {
    "an eighth is missing": lambda g: g * 7 / 8,
    "two channels swapped": lambda g: g[[1, 0, *range(2, len(g))]],
    "never written": torch.zeros_like,
}


@pytest.mark.parametrize("parameter", ["weight", "bias"])
@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS)
def test_the_bound_catches_a_wrong_peg_gradient(fault, parameter):
    """One of five PEGs gets a wrong gradient: the check names it, and nothing else."""
    model, images, labels = build(FIVE)
    expected = exact(model, images, labels)
    getattr(model.encoding.parts[0].pegs[2].proj, parameter).register_hook(fault)
    wrong = errors(gradients(model, images, labels, bf16=True), expected)
    assert [n for n, e in wrong.items() if e > BFLOAT16] == [f"encoding.parts.0.pegs.2.proj.{parameter}"]
