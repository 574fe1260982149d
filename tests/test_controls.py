"""The controls of the experiments: parts of the model that take one thing away and leave the rest."""

import torch
from models import random_images, random_model

from cpvt.model.encodings import PEG


def model(encoding="none", **options):
    return random_model(encoding, (6, 8), depth=3, **options)


def images(grid=(6, 8)):
    return random_images(2, grid)


def test_a_constant_peg_is_a_table_of_the_border_alone():
    """It adds to each token what the PEG adds to a one at its position: nothing of what the tokens say."""
    (peg,) = model(encoding="peg(on='constant')").encoding.peg.generators(0)
    one, other = torch.randn(2, 1, 48, 16).double()
    reference, ones = PEG(16).double(), torch.ones_like(one)
    reference.load_state_dict(peg.state_dict())
    expected = reference(ones, (6, 8)) - ones
    for x in (one, other):
        torch.testing.assert_close(peg(x, (6, 8)) - x, expected)


def test_the_stem_sees_neighbours_and_no_border():
    """Rolling the image by whole patches rolls the tokens: no position is special. Neighbouring pixels matter."""
    embed, picture = model(stem="conv", image_size=(12, 16), patch_size=2).patch_embed, images((12, 16))
    with torch.no_grad():
        tokens, grid = embed(picture)
        expected = tokens.unflatten(1, grid).roll((2, 3), (1, 2)).flatten(1, 2)
        torch.testing.assert_close(embed(picture.roll((4, 6), (2, 3)))[0], expected)
        touched = picture.clone()
        touched[:, :, 4, 4] += 1  # in patch (2, 2); two 3x3 convolutions reach two pixels on every side
        changed = (embed(touched)[0] - tokens).abs().amax((0, 2)).unflatten(0, grid) > 1e-12
    assert changed[1:4, 1:4].all() and int(changed.sum()) == 9


def test_a_block_without_attention_moves_nothing_between_tokens():
    net, touched = model(mlp_only_blocks=3, global_pool="avg"), images()
    touched[:, :, 0, 0] += 1
    with torch.no_grad():
        moved = (net.forward_features(images()) - net.forward_features(touched)).abs().amax((0, 2)) > 0
    assert moved.nonzero().flatten().tolist() == [0]
    assert not any("attn" in name or "norm1" in name for name in net.state_dict())
    assert "blocks.1.attn.qkv.weight" in model(mlp_only_blocks=1).state_dict()
    net = model(mlp_only_blocks=1, drop_path=0.5, encoding="peg").train()
    net(images()).sum().backward()
    assert all(p.grad is not None for p in net.parameters())
