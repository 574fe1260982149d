"""What each encoding computes; how far it reaches and what it commutes with, see `test_probes.py`."""

import copy
import itertools
import math
from unittest import mock

import models
import pytest
import torch
import torch.nn.functional as F
from models import PAIRS, POOLS, assert_one_set_of_names, assert_refused, logits, random_images, random_model
from models import seeded as seeded
from timm.optim import param_groups_layer_decay
from torchvision.models.feature_extraction import create_feature_extractor, get_graph_node_names

from cpvt import ModelConfig
from cpvt.config import Peg, Rotary
from cpvt.errors import DataError
from cpvt.model.encodings import PEG, RotaryEncoding, sine_table
from cpvt.model.vit import VisionTransformer


def test_sine_is_the_formula_at_every_grid():
    width, temperature = 16, 100.0
    table, quarter = sine_table((3, 4), width, temperature, dtype=torch.float64), width // 4
    for row, column, c in itertools.product(range(3), range(4), range(quarter)):
        frequency = 1 / temperature ** (c / quarter)
        expected = [f(p * frequency) for p in (row, column) for f in (math.sin, math.cos)]
        assert table[row * 4 + column, c::quarter].tolist() == pytest.approx(expected, abs=1e-14)
    added = {}
    for resize in ("raw", "rescale", "resample"):
        encoding = random_model(f"sine(resize='{resize}')", (5, 6), global_pool="avg").encoding
        for grid in ((5, 6), (10, 12)):
            zeros = torch.zeros(1, grid[0] * grid[1], 16, dtype=torch.float64)
            added[resize, grid[0]] = encoding.encode(-1, zeros, grid)[0][0].unflatten(0, grid)
    table = added["raw", 5]
    assert torch.equal(table, added["rescale", 5]) and torch.equal(table, added["resample", 5])
    torch.testing.assert_close(added["raw", 10][:5, :6], table)
    torch.testing.assert_close(added["rescale", 10][::2, ::2], table)
    larger = F.interpolate(table.permute(2, 0, 1)[None], (10, 12), mode="bicubic")[0].permute(1, 2, 0)
    torch.testing.assert_close(added["resample", 10], larger)


def offset_by_hand(a, b, n, clip, wrap):
    """From a to b; on a ring the shorter way round, half-way counting as backwards."""
    offset = b - a
    if wrap:
        offset = min((offset - n, offset, offset + n), key=lambda o: (abs(o), o))
    return max(-clip, min(clip, offset)) + clip


KINDS = [("keys", "avg", True), ("keys_values", "distilled", False), ("bias", "token", True)]


@pytest.mark.parametrize("on, pool, wrap", KINDS)
def test_relative_attention_by_hand(on, pool, wrap):
    """The module against loops over pairs of tokens."""
    grid, clip, block, h, d = (3, 4), 1 + wrap, 1, 2, 8
    model = random_model(f"relative(clip={clip}, on='{on}', wrap={wrap})", (5, 6), **POOLS[pool])
    attention, part, P = model.blocks[block].attn, model.encoding.relative, model.num_prefix_tokens
    T = P + 12
    x = torch.randn(1, T, 16, dtype=torch.float64)
    q, k, v = attention.qkv(x)[0].unflatten(-1, (3, h, d)).permute(1, 2, 0, 3)  # (h, T, d) each

    def entry(name, i, j):
        if i < P or j < P:
            return getattr(part, f"{name}_prefix")[block, 0]
        (ri, ci), (rj, cj) = divmod(i - P, 4), divmod(j - P, 4)
        row, column = offset_by_hand(ri, rj, 3, clip, wrap), offset_by_hand(ci, cj, 4, clip, wrap)
        return getattr(part, f"{name}_rows")[block, row] + getattr(part, f"{name}_columns")[block, column]

    out = torch.zeros(T, h, d, dtype=torch.float64)
    for head, i in itertools.product(range(h), range(T)):
        added = [entry("keys", i, j) for j in range(T)]
        if on == "bias":
            scores = [q[head, i] @ k[head, j] / d**0.5 + a[head] for j, a in enumerate(added)]
        else:
            scores = [q[head, i] @ (k[head, j] + a) / d**0.5 for j, a in enumerate(added)]
        for j, weight in enumerate(torch.stack(scores).softmax(0)):
            out[i, head] += weight * (v[head, j] + (entry("values", i, j) if on == "keys_values" else 0))
    expected = attention.proj(out.flatten(1))[None]
    torch.testing.assert_close(attention(x, x, model.encoding, block, grid), expected, rtol=0, atol=1e-12)


def rotary(grid, **options):
    return RotaryEncoding(Rotary(**options), ModelConfig(image_size=grid, patch_size=1, width=16, heads=2))


def test_rotary_logits_depend_on_offsets_and_rescaled_keep_the_trained_ends():
    grid, P = (4, 5), 1
    one = torch.randn(2, 1, 2, 1, 8, dtype=torch.float64)
    q, k = rotary(grid).rotate(0, *one.expand(-1, -1, -1, P + 20, -1), grid)
    assert torch.equal(q[:, :, :P], one[0]) and torch.equal(k[:, :, :P], one[1])  # prefixes do not turn
    pairs = (q @ k.transpose(-2, -1))[0, 0, P:, P:]
    by_offset = {}
    for i, j in itertools.product(range(20), repeat=2):
        by_offset.setdefault((j // 5 - i // 5, j % 5 - i % 5), []).append(pairs[i, j].item())
    assert all(max(values) - min(values) < models.SAME for values in by_offset.values())
    means = {round(values[0], 9) for values in by_offset.values()}
    assert len(means) == len(by_offset) == 7 * 9  # and each offset has a logit of its own
    encoding, x = rotary((3, 4), resize="rescale"), torch.randn(1, 1, 1, 8, dtype=torch.float64)
    small, _ = encoding.rotate(0, x.expand(-1, -1, 13, -1), x.expand(-1, -1, 13, -1), (3, 4))
    large, _ = encoding.rotate(0, x.expand(-1, -1, 49, -1), x.expand(-1, -1, 49, -1), (6, 8))
    every_second = large[:, :, 1:].unflatten(2, (6, 8))[:, :, ::2, ::2].flatten(2, 3)
    torch.testing.assert_close(every_second, small[:, :, 1:])


def test_a_peg_on_queries_and_keys_leaves_the_values_alone():
    images = random_images(2, (5, 6))
    encoded = random_model("peg(on='queries_keys', positions=(-1, 0))", (5, 6))
    plain = random_model("none", (5, 6))
    plain.load_state_dict(encoded.state_dict(), strict=False)
    assert models.difference(logits(encoded, images), logits(plain, images)) > models.CHANGE
    for model in (encoded, plain):  # equal weights for all keys: only the values are left
        for block in model.blocks[:2]:
            torch.nn.init.zeros_(block.attn.qkv.weight[:32].detach())
            torch.nn.init.zeros_(block.attn.qkv.bias[:32].detach())
    assert models.difference(logits(encoded, images), logits(plain, images)) < models.SAME


def peg_image(peg, x):
    """(B, D, H, W) -> (B, D, H, W): a PEG seen as a map of images."""
    grid = tuple(x.shape[2:])
    return peg(x.flatten(2).transpose(1, 2), grid).transpose(1, 2).unflatten(2, peg.grid_after(grid))


@pytest.mark.parametrize("kernel, grid, bias", [(27, (9, 14), True), (9, (5, 4), False)])
def test_a_kernel_that_covers_the_grid_is_one_matrix(kernel, grid, bias):
    """The same values and gradients either way of computing them; on a larger grid it is convolved."""
    found = []
    for compute in ("convolution", "matrix"):
        torch.manual_seed(0)
        peg = PEG(4, config=Peg(kernel=kernel, compute=compute, bias=bias)).double()
        assert peg.covers(grid) == (compute == "matrix") and not peg.covers((grid[0], kernel // 2 + 2))
        x = torch.randn(2, 4, *grid, dtype=torch.float64, requires_grad=True)
        out = peg_image(peg, x)
        out.square().sum().backward()
        found.append([out, x.grad, *(p.grad for p in peg.parameters())])
    torch.testing.assert_close(*found, rtol=1e-12, atol=1e-12)
    with torch.device("meta"):  # where there is no autocast to ask about
        assert PEG(4, config=peg.config)(torch.empty(2, grid[0] * grid[1], 4), grid).shape[2] == 4


def test_generators_and_convolutions_of_a_peg():
    """Twins: N(0, sqrt(2 / fan_out)), 0.471 for a depthwise 3x3. PyTorch: uniform within 1/3, deviation 0.192."""
    twice = random_model("peg(positions=(0, 2), repeat=2)", (5, 6)).encoding
    assert sum(p.numel() for p in twice.parameters()) == 4 * 160 and twice.peg.generators(1) == []
    one, two = twice.peg.generators(2)
    x = torch.randn(1, 31, 16, dtype=torch.float64)
    found, _ = twice.encode(2, x, (5, 6))
    assert torch.equal(found[:, 1:], two(one(x[:, 1:], (5, 6)), (5, 6)))
    assert torch.equal(found[:, :1], x[:, :1])  # the class token goes around
    twins, own = PEG(4096, config=Peg(init="twins")), PEG(4096)
    assert twins.proj.weight.std().item() == pytest.approx(math.sqrt(2 / 9), rel=0.02)
    assert not twins.proj.bias.any()
    assert own.proj.weight.std().item() == pytest.approx(1 / 3 / math.sqrt(3), rel=0.02)
    assert own.proj.weight.abs().max() <= 1 / 3 and own.proj.bias.any()
    x = torch.randn(2, 8, 5, 6, dtype=torch.float64)
    for kernel, padding in ((3, "zero"), (5, "none"), (3, "replicate"), (5, "reflect"), (5, "circular")):
        peg = PEG(8, config=Peg(kernel=kernel, padding=padding, skip=False)).double()
        mode = {"zero": "constant"}.get(padding, padding)
        padded = x if padding == "none" else F.pad(x, [kernel // 2] * 4, mode=mode)
        expected = F.conv2d(padded, peg.proj.weight, peg.proj.bias, groups=8)
        torch.testing.assert_close(peg_image(peg, x), expected, rtol=0, atol=1e-14)
    separable = PEG(8, config=Peg(convolution="separable", skip=False)).double()
    expected = separable.mix(F.conv2d(x, separable.proj.weight, separable.proj.bias, padding=1, groups=8))
    torch.testing.assert_close(peg_image(separable, x), expected)
    dense = PEG(8, config=Peg(convolution="dense", bias=False)).double()
    torch.testing.assert_close(peg_image(dense, x), x + F.conv2d(x, dense.proj.weight, padding=1))


@pytest.mark.parametrize("encoding, pool", PAIRS)
def test_any_rectangular_grid(encoding, pool):
    """Built for 4 x 5, run at other grids; equal to the model built for that grid where no size is trained in."""
    model = random_model(encoding, (4, 5), depth=2, **POOLS[pool])
    # The names mean the same to an optimiser's groups, timm's loaders and a checkpoint.
    other = random_model(encoding, (4, 5), seed=1, depth=2, **POOLS[pool])
    assert_one_set_of_names(model, other, random_images(2, (4, 5)))
    assert ("pos_embed" in model.state_dict()) == ("learned" in encoding)
    for grid in ((7, 3), (3, 8)):
        images = random_images(2, grid)
        out = logits(model, images)
        assert out.shape == (2, 7) and out.isfinite().all()
        if "learned" not in encoding and "resize" not in encoding:
            native = random_model(encoding, grid, depth=2, **POOLS[pool])
            assert torch.equal(logits(native, images), out)
        with torch.no_grad():
            shown = model.forward_intermediates(images, indices=1, intermediates_only=True)[0]
        lost = 2 if "padding='none'" in encoding else 0
        assert shown.shape == (2, 16, grid[0] - lost, grid[1] - lost)


SEVERAL = ["learned + peg(positions=(0, 1, 2, 3))", "peg + peg(positions=(3,))", "sine(resize='resample')"]
SEVERAL += ["peg(on='queries_keys', positions=(-1, 0, 1))", "learned(resize='refuse')"]
each = pytest.mark.parametrize("encoding, pool", [*zip(models.ENCODINGS + SEVERAL, itertools.cycle(POOLS))])


@each
def test_what_belongs_to_a_pruned_block_goes_with_it(encoding, pool):
    """Every parameter that is left, and every block's share of it, gets a gradient; the features stay."""
    model, images = random_model(encoding, (4, 5), drop_path=0.3, **POOLS[pool]), random_images(2, (4, 5))
    wanted = {"indices": [0, 1], "intermediates_only": True}
    expected = model.forward_intermediates(images, **wanted)
    before = model.drop_path_scale(torch.ones(4, 2, 1))
    assert model.prune_intermediate_layers([0, 1], prune_norm=True) == [0, 1]
    found = model.forward_intermediates(images, **wanted)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    sum(feature.square().sum() for feature in found).backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            shares = parameter.grad if name.startswith("encoding.relative") else [parameter.grad]
            assert all(share.any() for share in shares), name
    again = VisionTransformer(model.config)  # the configuration says what is left
    assert [k for k in again.state_dict() if not k.startswith(("norm.", "head"))] == list(model.state_dict())
    torch.testing.assert_close(again.drop_path_scale(torch.ones(2, 2, 1)), before[:2])
    optimised = {id(p) for group in param_groups_layer_decay(model) for p in group["params"]}
    assert optimised == {id(p) for p in model.parameters() if p.requires_grad}


@each
@pytest.mark.filterwarnings("ignore:.*nodes obtained by tracing")
def test_torch_fx_traces_it_for_every_size(encoding, pool):
    """In training and evaluation; the traced model still refuses what the convolution would cut off."""
    sizes = {"patch_size": 2, "image_size": (8, 12), "drop_path": 0.3}
    sizes["depth"] = 4 if ", 1" in encoding or "3" in encoding else 2  # as the positions ask for
    model = random_model(encoding, (4, 6), **sizes, **POOLS[pool])
    last = get_graph_node_names(model)[1][-1]
    traced = create_feature_extractor(model.eval(), [last])
    for grid in ((8, 12), (14, 6)):
        if grid == (8, 12) or "refuse" not in encoding:
            images = random_images(2, grid)
            torch.testing.assert_close(traced(images)[last], model(images), rtol=1e-12, atol=1e-12)
    with pytest.raises(AssertionError, match="multiples of 2"):
        traced(random_images(1, (9, 12)))
    if "refuse" in encoding:
        with pytest.raises(AssertionError, match="learned table of"):
            traced(random_images(1, (12, 8)))


def test_what_cannot_be_taken():
    wrong = {
        "peg(positions=(0, 4))": ["positions=(0, 4)", "3"],
        "peg(on='queries_keys', positions=(3,))": ["2"],
    }
    for encoding, words in (wrong | {"learned + learned(antialias=True)": ["one learned table"]}).items():
        assert_refused(words, random_model, encoding, (4, 5))
    for encoding, width, words in (("sine", 18, "width=18"), ("rotary", 12, "width 6")):
        assert_refused([words, "multiple of 4"], random_model, encoding, (4, 5), width=width)
    for grid in (None, (4, 4)):
        assert_refused(["20 tokens", f"grid={grid}"], PEG(8), torch.zeros(1, 20, 8), grid, error=ValueError)
    patches = {"image_size": (8, 12), "patch_size": 2}
    bordered = random_model("peg(padding='none', skip=False)", (4, 6), **patches)
    fixed = random_model("learned(resize='refuse')", (4, 6), **patches)
    assert logits(fixed, random_images(1, (8, 12))).isfinite().all()
    for model, shape, words in (
        (bordered, (1, 3, 9, 12), ["9x12 pixels", "multiples of 2"]),
        (bordered, (1, 1, 8, 12), ["(B, 3, height, width)"]),
        (bordered, (1, 3, 4, 12), ["grid (2, 6) is too small for kernel 3"]),
        (fixed, (1, 3, 16, 14), ["grid (8, 7)", "(4, 6)", "resize='refuse'"]),
    ):
        assert_refused(words, model, torch.zeros(shape, dtype=torch.float64), error=DataError)


@pytest.mark.parametrize("encoding", models.ENCODINGS)
@torch.no_grad()
def test_a_model_in_half_precision_takes_every_size(encoding):
    model = random_model(encoding, (5, 6), std=0.05)
    for grid in ((5, 6), (7, 4)):
        images, half = random_images(2, grid), copy.deepcopy(model).bfloat16()
        found = half(images.bfloat16())
        assert found.dtype == torch.bfloat16 and models.difference(found.double(), model(images)) < 0.1


def test_drawing_a_model_seeds_no_gpu():
    with mock.patch("torch.cuda.manual_seed_all") as seeding:
        random_model("peg", (5, 6)).draw(0)
    assert seeding.call_count == 1  # by random_model
