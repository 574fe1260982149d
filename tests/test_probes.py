"""The probes against what theory says, and against themselves where they must find nothing."""

import math
from functools import cache, partial

import pytest
import torch
import torch.nn.functional as F

from cpvt.config import ModelConfig, Peg
from cpvt.lab import probes
from cpvt.model.encodings import PEG
from cpvt.model.vit import VisionTransformer

ROUNDING = 1e-13  # float64; what is visible on these models is above 1e-12


@cache
def model(encoding: str, global_pool: str = "token", grid=(14, 14)) -> VisionTransformer:
    torch.manual_seed(0)
    size = {"image_size": grid, "patch_size": 1, "num_classes": 4, "width": 32, "depth": 4, "heads": 4}
    return VisionTransformer(ModelConfig(encoding=encoding, global_pool=global_pool, **size))


# Encoding -> the largest distance to a border that it makes visible, by 2k - 1.
PEGS = {"none": -1, "peg": 1, "peg(positions=(-1,))": 1, "peg(positions=(0, 1))": 3, "peg(repeat=2)": 3}
PEGS |= {"peg(kernel=5)": 3, "peg(positions=(0, 1, 2))": 5, "peg(on='queries_keys')": 1}
PEGS |= {"peg(padding='circular')": -1, "peg(convolution='dense', skip=False)": 1}
# Replicated, an object shows only once it is copied itself; without padding, what it has spread to is cut off.
OTHERS = {"peg(padding='replicate')": 0, "peg(padding='reflect')": 1, "peg(padding='none', skip=False)": 1}


@pytest.mark.parametrize("encoding", PEGS | OTHERS)
def test_an_object_shows_its_position_as_far_as_theory_says_and_no_farther(encoding):
    last = (PEGS | OTHERS)[encoding]
    assert probes.theory(encoding) is None if encoding in OTHERS else probes.theory(encoding)[0] == last
    for global_pool in ("token", "avg"):
        seen = probes.reach(model(encoding, global_pool), range(7)) > ROUNDING
        assert seen.tolist() == [d <= last for d in range(7)]


@pytest.mark.parametrize("k", range(4))
def test_two_objects_show_their_order_up_to_2k_and_no_farther(k):
    encoding = f"peg(positions={tuple(range(k))})" if k else "none"
    assert probes.theory(encoding)[1] == 2 * k
    seen = probes.order_reach(model(encoding, ("token", "avg")[k % 2]), range(1, 10)) > ROUNDING
    assert seen.tolist() == [s <= 2 * k for s in range(1, 10)]


# In relative, borders leak through the softmax; wrapped it has none.
WIDE = ["learned", "sine", "rotary", "relative", "relative(wrap=True)", "peg(positions=(-1,), kernel=27)"]


@pytest.mark.parametrize("encoding", WIDE)
def test_tables_see_everywhere_and_wrapped_offsets_see_no_position(encoding):
    assert (probes.reach(model(encoding)) > ROUNDING).tolist() == ["wrap" not in encoding] * 6
    assert (probes.order_reach(model(encoding, grid=(14, 30)), range(1, 9)) > ROUNDING).all()


def test_reach_and_theory_answer_what_can_be_asked_and_leave_the_model():
    one = model("peg").train()
    before = {name: value.clone() for name, value in one.state_dict().items()}
    probes.reach(one, [0])
    images = torch.randn(1, 3, *one.config.image_size)
    probes.patch_tokens(one, images), probes.attention_maps(one, images)
    assert one.training and all(value.dtype == torch.float32 for value in one.state_dict().values())
    assert all(torch.equal(value, before[name]) for name, value in one.state_dict().items())
    assert probes.theory("learned + peg") is None
    assert probes.theory("peg(positions=(-1,), kernel=27)") == (25, 26)
    assert probes.theory("peg(kernel=1)") == (-1, 0)
    with pytest.raises(probes.ProbeError, match="distances=.7.*0 to 6"):
        probes.reach(model("none"), [7])
    with pytest.raises(probes.ProbeError, match="separation 30"):
        probes.order_reach(model("none"), [30])


def test_only_without_an_encoding_may_patches_be_shuffled():
    images = torch.arange(2 * 3 * 4 * 6.0).reshape(2, 3, 4, 6)
    order = torch.tensor([5, 4, 3, 2, 1, 0])
    mixed = probes.shuffle_patches(images, 2, order)
    assert torch.equal(mixed[:, :, :2, :2], images[:, :, 2:, 4:])
    assert torch.equal(probes.shuffle_patches(mixed, 2, order), images)
    other = probes.shuffle_patches(images, (2, 3), torch.tensor([[0, 1, 2, 3], [1, 0, 2, 3]]))
    assert torch.equal(other[0], images[0]) and torch.equal(other[1, :, :2, :3], images[1, :, :2, 3:])
    images = torch.rand(2, 3, 14, 14, generator=torch.Generator().manual_seed(1))
    for global_pool in ("token", "avg"):
        error = probes.permutation_error(model("none", global_pool), images)
        assert error.tokens < ROUNDING and error.head < ROUNDING
    for encoding in ("learned", "sine", "peg", "relative", "relative(wrap=True)", "rotary"):
        error = probes.permutation_error(model(encoding), images)
        assert error.tokens > 1e-9 and error.head > 1e-12, encoding


def peg_map(padding: str, pegs: int = 1):
    torch.manual_seed(0)
    layers = [PEG(8, config=Peg(padding=padding)).double() for _ in range(pegs)]

    def run(x):
        grid = tuple(x.shape[2:])
        tokens = x.flatten(2).transpose(1, 2)
        for layer in layers:
            tokens = layer(tokens, grid)
        return tokens.transpose(1, 2).unflatten(2, grid)

    return run


X = torch.randn(2, 8, 18, 15, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


SHIFTS = [("circular", (0, 1), 1), ("circular", (-4, 2), 2), ("zero", (2, -3), 1), ("zero", (-1, 0), 2)]
SHIFTS += [("window", (-4, 2), 1), ("window", (2, -3), 2)]


@pytest.mark.parametrize("kind, shift, pegs", SHIFTS)
def test_away_from_borders_a_peg_commutes_with_a_shift(kind, shift, pegs):
    error = probes.equivariance_error(peg_map("zero", pegs), X, shift, kind, border=pegs)
    assert error.interior < ROUNDING and error.border > 1e-3
    too_thin = probes.equivariance_error(peg_map("zero", pegs), X, shift, kind, border=pegs - 1)
    assert too_thin.interior > 1e-3


def test_a_wrapped_peg_commutes_with_wrapped_shifts_which_are_counted_in_tokens():
    error = probes.equivariance_error(peg_map("circular"), X, (2, -3), "circular", border=1)
    assert error.interior < ROUNDING and error.border < ROUNDING
    table = torch.randn(8, 18, 15, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    error = probes.equivariance_error(lambda x: x + table, X, (1, 1), "circular")
    assert error.interior > 0.1 and error.border > 0.1
    assert probes.equivariance_error(torch.zeros_like, X, (1, 1), "circular", border=1) == (0, 0)
    pool = partial(F.avg_pool2d, kernel_size=3)
    error = probes.equivariance_error(pool, X, (1, -1), "window", border=0, stride=3)
    assert error.interior < ROUNDING and math.isnan(error.border)
    whole = peg_map("zero"), (18, 0), "zero"
    wrong = {"stride=1": (pool, (1, -1), "circular"), "kind='diagonal'": (pool, (1, -1), "diagonal")}
    for words, (fn, shift, kind) in (wrong | {r"shift=\(18, 0\)": whole}).items():
        with pytest.raises(probes.ProbeError, match=words):
            probes.equivariance_error(fn, X, shift, kind)


@pytest.mark.parametrize(("pegs", "known"), [(1, 0.37), (2, 0.64), (5, 0.98)])
def test_on_a_constant_image_pegs_reach_the_ceiling_exactly(pegs, known):
    ceiling = probes.probe_ceiling(14, pegs)
    assert round(ceiling, 2) == known and probes.probe_ceiling(14, 7) == 1.0
    torch.manual_seed(0)
    # A line can tell (2 * pegs + 1)^2 kinds of token apart only in as many dimensions.
    tokens = torch.randn(192, dtype=torch.float64).expand(2, 196, 192)
    for _ in range(pegs):
        tokens = PEG(192).double()(tokens, (14, 14))
    probe = probes.position_probe(tokens, (14, 14), ridge=1e-12)
    assert abs(probe.row - ceiling) < 1e-9 and abs(probe.column - ceiling) < 1e-9
    # The interior of one PEG is one plain field.
    assert abs(probe.row_interior) < 1e-9 if pegs == 1 else probe.row_interior > 0.4


@pytest.mark.parametrize(("encoding", "known"), [("peg", 1), ("none", 0), ("relative(wrap=True)", 0)])
def test_no_transformer_beats_the_ceiling_on_constant_images(encoding, known):
    exact = VisionTransformer(model(encoding).config).double()
    exact.load_state_dict(model(encoding).state_dict())
    images = torch.full((4, 3, 14, 14), 0.7, dtype=torch.float64)
    for block in (None, 1):
        probe = probes.position_probe(probes.patch_tokens(exact, images, block), (14, 14))
        assert abs(probe.row - probes.probe_ceiling(14, known)) < 1e-4
        assert abs(probe.column - probes.probe_ceiling(14, known)) < 1e-4


def test_the_probe_finds_what_is_planted_and_is_split_by_image():
    grid, noise = (5, 9), torch.randn(40, 45, 6, generator=torch.Generator().manual_seed(4))
    features = noise.clone()
    features[..., 2] = torch.arange(45) // 9 * 3.0 + 1
    probe = probes.position_probe(features, grid)
    assert probe.row > 0.999 and probe.row_interior > 0.999 and abs(probe.column) < 0.05
    chance = probes.position_probe(noise, grid)
    assert max(abs(chance.row), abs(chance.column)) < 0.05
    features = torch.randn(8, 36, 36, generator=torch.Generator().manual_seed(5))
    assert probes.position_probe(features, (6, 6)).row < 0.1
    mixed = torch.cat([features[:1]] * 8)  # the same images on both sides are known by heart
    assert probes.position_probe(mixed, (6, 6)).row > 0.99
    wrong = {"197 tokens": torch.zeros(4, 197, 8), "1 image": torch.zeros(1, 196, 8)}
    for words, features in (wrong | {"NaN": torch.full((2, 196, 8), torch.nan)}).items():
        with pytest.raises(probes.ProbeError, match=words):
            probes.position_probe(features, (14, 14))


def test_controls_keep_what_they_say_and_no_more():
    up = torch.linspace(1, 0, 8)[:, None].expand(8, 8)  # the sky is up
    images = up + 0.1 * torch.rand(32, 3, 8, 8, generator=torch.Generator().manual_seed(7))
    controls = probes.control_images(images, 1)
    assert controls["images"] is images
    assert torch.allclose(controls["constant"].mean((2, 3)), images.mean((2, 3)))
    assert controls["constant"].var((2, 3)).max() == 0
    assert torch.allclose(controls["noise"].mean(), images.mean(), atol=0.02)
    same = [x.flatten(2).sort(-1).values for x in (controls["shuffled"], images)]
    assert torch.equal(*same) and not torch.equal(controls["shuffled"], images)
    tokens = (x.flatten(2).transpose(1, 2) for x in controls.values())
    known, *rest = (probes.position_probe(x, (8, 8)).row for x in tokens)
    assert known > 0.9 and all(abs(row) < 0.05 for row in rest)
