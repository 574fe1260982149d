"""The controls of the experiments: parts of the model that take one thing away and leave the rest."""

import math

import pytest
import torch

from cpvt.config import ModelConfig, replace
from cpvt.errors import ConfigError
from cpvt.lab.probes import reach
from cpvt.model.encodings import PEG
from cpvt.model.vit import VisionTransformer

SMALL = ModelConfig(
    image_size=(12, 16),
    patch_size=2,
    width=16,
    depth=3,
    heads=2,
    num_classes=5,
    encoding="none",
    init_std=0.2,
)


def model(seed=0, **changes) -> VisionTransformer:
    torch.manual_seed(seed)
    return VisionTransformer(replace(SMALL, **changes)).double().eval()


def images(height=12, width=16, count=2):
    torch.manual_seed(1)
    return torch.randn(count, 3, height, width, dtype=torch.float64)


# --------------------------------------------------------------------------- border without mixing


def test_a_constant_peg_is_a_table_of_the_border_alone():
    """It adds to each token what the PEG adds to a one at its place: nothing of what the tokens say."""
    peg = model(encoding="peg(on='constant')").encoding.parts[0].pegs[0]
    one, other = torch.randn(1, 48, 16).double(), torch.randn(1, 48, 16).double()
    added = peg(one, (6, 8)) - one
    torch.testing.assert_close(added, peg(other, (6, 8)) - other)
    image = added.unflatten(1, (6, 8))[0]
    inner = image[1:-1, 1:-1].flatten(0, 1)
    torch.testing.assert_close(inner, inner[:1].expand_as(inner))  # one value inside, others on the border
    assert (image[0, 0] - image[1, 1]).abs().max() > 0.01 and (image[0, 0] - image[0, -1]).abs().max() > 0.01
    reference = PEG(16).double()
    reference.load_state_dict(peg.state_dict())
    ones = torch.ones_like(one)
    torch.testing.assert_close(added, reference(ones, (6, 8)) - ones)


def test_it_sees_order_only_through_the_border():
    net = model(encoding="peg(on='constant')")
    tokens = images().unfold(2, 2, 2).unfold(3, 2, 2)  # (B, 3, 6, 8, 2, 2)
    inner = tokens.clone()
    inner[:, :, 1:-1, 1:-1] = inner[:, :, 1:-1, 1:-1].flip(2)
    outer = tokens.flip(2).clone()
    outer[:, :, 0], outer[:, :, -1] = tokens[:, :, 1], tokens[:, :, 0]

    def image(parts):
        return parts.permute(0, 1, 2, 4, 3, 5).reshape(2, 3, 12, 16)

    with torch.no_grad():
        torch.testing.assert_close(net(image(inner)), net(image(tokens)), rtol=0, atol=1e-12)
        assert (net(image(outer)) - net(image(tokens))).abs().max() > 1e-4


def test_a_constant_peg_is_depthwise():
    with pytest.raises(ConfigError, match="on='constant'"):
        model(encoding="peg(on='constant', convolution='dense')")


# --------------------------------------------------------------------------- local features without position


def test_the_stem_sees_neighbours_and_no_border():
    """Rolling the image by whole patches rolls the tokens: no place is special. Neighbouring pixels do matter."""
    net = model(stem="conv")
    picture = images()
    with torch.no_grad():
        tokens, grid = net.patch_embed(picture)
        rolled, _ = net.patch_embed(picture.roll((4, 6), (2, 3)))
        assert grid == (6, 8)
        expected = tokens.unflatten(1, grid).roll((2, 3), (1, 2)).flatten(1, 2)
        torch.testing.assert_close(rolled, expected)
        touched = picture.clone()
        touched[:, :, 4, 4] += 1  # in patch (2, 2); two 3x3 convolutions reach two pixels on every side
        changed = (net.patch_embed(touched)[0] - tokens).abs().amax((0, 2)).unflatten(0, grid) > 1e-12
    assert changed[1:4, 1:4].all() and int(changed.sum()) == 9


def test_every_encoding_gets_the_same_stem():
    counts = {
        encoding: sum(p.numel() for p in model(stem="conv", encoding=encoding).patch_embed.parameters())
        for encoding in ("none", "learned", "peg", "rotary")
    }
    assert len(set(counts.values())) == 1


# --------------------------------------------------------------------------- blocks without attention


def test_a_bare_block_moves_nothing_between_tokens():
    net = model(mlp_only_blocks=3, global_pool="avg")
    picture, touched = images(), images()
    touched[:, :, :2, :2] += 1
    with torch.no_grad():
        moved = (net.forward_features(picture) - net.forward_features(touched)).abs().amax((0, 2)) > 0
    assert moved.nonzero().flatten().tolist() == [0]
    assert not any("attn" in name or "norm1" in name for name, _ in net.named_parameters())
    attentive = model(mlp_only_blocks=1)
    with torch.no_grad():
        assert (attentive.forward_features(picture) - attentive.forward_features(touched)).abs().amin() > 0
    assert "blocks.1.attn.qkv.weight" in attentive.state_dict()


def test_bare_blocks_train_and_drop_their_paths():
    net = model(mlp_only_blocks=1, drop_path=0.5, encoding="peg").train()
    net(images()).sum().backward()
    assert all(p.grad is not None for p in net.parameters())
    with pytest.raises(ConfigError, match="mlp_only_blocks=4"):
        model(mlp_only_blocks=4)


# --------------------------------------------------------------------------- attention at other sizes


def test_log_attention_changes_nothing_at_the_trained_size_and_sharpens_above():
    plain, sharp = model(encoding="learned"), model(encoding="learned", logn_scale=True)
    with torch.no_grad():
        assert torch.equal(plain(images()), sharp(images()))
        assert not torch.allclose(plain(images(24, 32)), sharp(images(24, 32)))
        # The same as plain attention with the queries' weights scaled by log N / log N0.
        factor = math.log(12 * 16) / math.log(6 * 8)
        for block in plain.blocks:
            block.attn.qkv.weight[:16] *= factor
            block.attn.qkv.bias[:16] *= factor
        torch.testing.assert_close(plain(images(24, 32)), sharp(images(24, 32)))


def test_log_attention_scales_relative_logits_too():
    plain, sharp = (model(encoding="relative", logn_scale=on) for on in (False, True))
    factor = math.log(12 * 16) / math.log(6 * 8)
    with torch.no_grad():
        for block in plain.blocks:
            block.attn.qkv.weight[:16] *= factor
            block.attn.qkv.bias[:16] *= factor
        torch.testing.assert_close(plain(images(24, 32)), sharp(images(24, 32)))


def test_the_stem_tells_no_encoding_where_an_object_is():
    """With a stem and no encoding the object may stand anywhere, the border included."""
    assert reach(model(stem="conv"), range(4)).max() < 1e-12
    assert (
        reach(model(stem="conv", encoding="peg"), range(4)).max() > 1e-6
    )  # a PEG behind it still sees the border
