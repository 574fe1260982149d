"""PEGs in timm's own transformers: the same keys, any size of image, training, copies, compilation, refusals."""

import copy
import pickle

import pytest
import timm
import torch
import torch.nn.functional as F
from models import assert_one_set_of_names, assert_refused
from models import seeded as seeded
from timm.models._features import FeatureGetterNet
from timm.models.deit import VisionTransformerDistilled
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from timm.optim import create_optimizer_v2
from timm.utils import AttentionExtract

import cpvt
from cpvt import attach_peg
from cpvt.training.optim import param_groups

SIZES = {"img_size": 64, "patch_size": 16, "embed_dim": 32, "depth": 4, "num_heads": 2, "num_classes": 5}
FAMILIES = {"class token": (VisionTransformer, {}), "distilled": (VisionTransformerDistilled, {})}
KINDS = {"registers": {"reg_tokens": 3, "no_embed_class": True}, "no table": {"pos_embed": "none"}}
KINDS |= {"no prefix": {"class_token": False, "global_pool": "avg"}}
FAMILIES |= {family: (VisionTransformer, options) for family, options in KINDS.items()}
ROTARY = {"registers": {"num_reg_tokens": 2}, "of a size": {"ref_feat_shape": (4, 4)}}
ROTARY |= {"mixed": {"rope_type": "mixed", "use_abs_pos_emb": False}}
ROTARY |= {"DINOv3": {"rope_type": "dinov3", "no_embed_class": True}}
FAMILIES |= {f"eva, rotary, {kind}": (Eva, {"use_rot_pos_emb": True, **own}) for kind, own in ROTARY.items()}


def build(family, **options):
    """A small timm model with weights large enough to matter."""
    cls, own = FAMILIES[family]
    model = cls(**{**SIZES, **own, **options}).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model


def images_of(model):
    return torch.randn(2, 3, *model.patch_embed.img_size)


def step(model, images, forward=None):
    """-> the logits, and the gradient of each parameter by its name."""
    model.zero_grad()
    out = (model if forward is None else forward)(images)
    out.square().sum().backward()
    return {"": out.detach()} | {name: p.grad.clone() for name, p in model.named_parameters()}


every = pytest.mark.parametrize("family", FAMILIES)


@every
@torch.no_grad()
def test_it_is_a_peg_between_the_blocks_and_the_keys_stay(family):
    """By hand, in the model's own type: run the blocks one by one, and put the convolution between them."""
    model = build(family).double()
    plain = copy.deepcopy(model)
    options = {"kernel": 5, "padding": "circular", "init": "twins"}
    assert attach_peg(model, positions=range(-1, 2), **options) is model
    missing, unexpected = model.load_state_dict(plain.state_dict(), strict=False)
    assert set(missing) == {f"pegs.{i}.proj.{n}" for i in (-1, 0, 1) for n in ("weight", "bias")}
    assert not unexpected and not model.pegs.training
    x, P = images_of(model).double(), model.num_prefix_tokens

    def convolved(tokens, position):
        image = tokens[:, P:].transpose(1, 2).unflatten(2, model.patch_embed.grid_size)
        proj = model.pegs[str(position)].proj
        assert proj.weight.std().item() == pytest.approx((2 / 25) ** 0.5, rel=0.1)
        image = image + F.conv2d(F.pad(image, [2] * 4, "circular"), proj.weight, groups=len(proj.weight))
        return torch.cat([tokens[:, :P], image.flatten(2).transpose(1, 2)], 1)

    tokens, rope = plain._pos_embed(plain.patch_embed(x)), None
    if isinstance(plain, Eva):
        tokens, rope = tokens
    tokens = convolved(tokens, -1)
    for i, block in enumerate(plain.blocks):
        tokens = block(tokens, **({} if rope is None else {"rope": rope[i] if plain.rope_mixed else rope}))
        tokens = convolved(tokens, i) if i < 2 else tokens
    torch.testing.assert_close(model.forward_features(x), plain.norm(tokens))


@torch.no_grad()
def test_in_a_deit_it_is_the_cpvt_of_the_same_weights():
    """timm's DeiT with a PEG and no table, and `cpvt_tiny` itself."""
    theirs = timm.create_model("deit_tiny_patch16_224", depth=3).eval()
    attach_peg(theirs, positions=(0,), drop_pos_embed=True)
    ours = cpvt.create_model("cpvt_tiny", depth=3).eval()
    state = {k.replace("pegs.", "encoding.peg."): v for k, v in theirs.state_dict().items()}
    ours.load_state_dict(state, strict=True)
    for size in ((224, 224), (160, 320)):
        x = torch.randn(1, 3, *size)
        torch.testing.assert_close(theirs(x), ours(x), rtol=1e-5, atol=1e-5)


@every
@torch.no_grad()
def test_without_the_table_any_size_runs(family):
    """Equal to the model built for that size; at its own, to the model with a table of zeros."""
    cls, own = FAMILIES[family]
    model, zeros = build(family), build(family)
    zeros.load_state_dict(model.state_dict())
    if zeros.pos_embed is not None:
        zeros.pos_embed.zero_()
    attach_peg(model, positions=(0, 1), drop_pos_embed=True)
    assert "pos_embed" not in model.state_dict()
    for size in ((96, 96), (48, 80)):
        x = torch.randn(2, 3, *size)
        native = cls(**{**SIZES, **own, "img_size": size}).eval()
        attach_peg(native, positions=(0, 1), drop_pos_embed=True)
        native.load_state_dict(model.state_dict())
        assert torch.equal(model(x), native(x))
        _, shown = model.forward_intermediates(x, indices=1)
        assert shown[0].shape == (2, 32, size[0] // 16, size[1] // 16)
    attach_peg(zeros, positions=(0, 1)).load_state_dict(model.state_dict(), strict=False)
    x = images_of(zeros)
    torch.testing.assert_close(model(x), zeros(x), rtol=1e-5, atol=1e-6)


@every
def test_every_parameter_trains_with_and_without_checkpointing(family):
    model = attach_peg(build(family), positions=(-1, 1), drop_pos_embed=True).train()
    x = torch.randn(2, 3, 48, 80)
    plain = step(model, x)
    assert all(gradient.any() for gradient in plain.values())
    model.set_grad_checkpointing(True)
    torch.testing.assert_close(step(model, x), plain)


@every
def test_it_serves_timms_tools_which_see_its_attention(family):
    """Its names; layer decay as of a PEG built in; feature extraction; attention maps, by torch.fx, too."""
    model, other = (attach_peg(build(family), positions=(-1, 1, 3)).double() for _ in range(2))
    assert_one_set_of_names(model, other, images_of(model).double())
    names, scale, decayed = {p: name for name, p in model.named_parameters()}, {}, {}
    for group in create_optimizer_v2(model, weight_decay=0.1, layer_decay=0.5).param_groups:
        scale |= {names[p]: group["lr_scale"] for p in group["params"]}
        decayed |= {names[p]: group["weight_decay"] for p in group["params"]}
    stem, *blocks = "patch_embed.proj.weight", *(f"blocks.{i}.norm2.weight" for i in range(4))
    for position, like in zip((-1, 1, 3), (stem, blocks[1], blocks[3]), strict=True):
        assert scale[f"pegs.{position}.proj.weight"] == scale[f"pegs.{position}.proj.bias"] == scale[like]
    assert [scale[name] for name in (stem, *blocks)] == [0.5**i for i in (5, 4, 3, 2, 1)]
    ours = {names[p]: g["weight_decay"] for g in param_groups(model, 0.1) for p in g["params"]}
    assert decayed == ours and decayed["pegs.1.proj.weight"] == 0.1 and not decayed["pegs.1.proj.bias"]
    for features in (FeatureGetterNet(copy.deepcopy(model), [0, 2]), FeatureGetterNet(model, [0, 2])):
        sum(feature.square().sum() for feature in features(images_of(model).double())).backward()
        assert list(features.model.pegs) == ["-1", "1"] and len(features.model.blocks) == 3
        assert all(p.grad.any() for p in features.parameters())
    assert list(other.pegs) == ["-1", "1", "3"]
    for drop_pos_embed in (False, True)[: 1 + (family != "distilled")]:
        model = attach_peg(build(family), positions=(-1, 1), drop_pos_embed=drop_pos_embed)
        for block in model.blocks:
            block.attn.fused_attn = False
        x, hooked = images_of(model), AttentionExtract(copy.deepcopy(model), method="hook")
        traced = AttentionExtract(model, method="fx")
        assert copy.deepcopy(model)(x).isfinite().all()  # tracing leaves nothing behind
        torch.testing.assert_close([*traced(x).values()], [*hooked(x).values()])


def test_a_compiled_model_is_refused():
    """It would go on with the code that is made."""
    compiled = [build("class token") for _ in range(4)]
    compiled[0].compile(backend="eager")
    compiled[1].blocks[1].compile(backend="eager")
    compiled[2].forward = torch.compile(compiled[2].forward, backend="eager")
    compiled[3].blocks[1] = torch.compile(compiled[3].blocks[1], backend="eager")
    for model in (*compiled, torch.compile(build("class token"), backend="eager")):
        assert_refused(["is compiled", "then compile"], attach_peg, model)


@every
@torch.no_grad()
def test_copies_have_pegs_of_their_own(family):
    """As for averaged weights: the copy must not look at the original's convolutions or grid."""
    model = attach_peg(build(family), positions=(-1, 0), drop_pos_embed=True)
    x = torch.randn(1, 3, 48, 80)
    expected = model(x)
    copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
    for parameter in model.pegs.parameters():
        parameter.zero_()
    model(torch.randn(1, 3, 64, 64))
    for twin in copies:
        assert torch.equal(twin(x), expected)
    assert not torch.allclose(model(x), expected)


def test_compiles_whole():
    """In one graph, at two sizes, forwards and backwards (traced; generating code is PyTorch's own matter)."""
    model = build("eva, rotary, registers", depth=2).train()
    attach_peg(model, positions=(-1, 1), drop_pos_embed=True)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    for size in ((64, 64), (48, 80)):
        x = torch.randn(2, 3, *size)
        torch.testing.assert_close(step(model, x, compiled), step(model, x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", ["class token", "eva, rotary, registers"])
def test_refusals_change_nothing(family):
    wrong = [({"positions": (4,)}, ["positions=(4,)", "3"]), ({"positions": ()}, ["positions=()"])]
    wrong += [({"kernel": 2}, ["kernel=2", "odd"]), ({"padding": "none"}, ["padding='none'"])]
    for options, words in (*wrong, ({}, ["patch_drop_rate > 0"])):
        model = build(family, patch_drop_rate=0 if options else 0.25)
        before = list(model.state_dict())
        assert_refused(words, attach_peg, model, **options, drop_pos_embed=True)
        assert list(model.state_dict()) == before and not model.patch_embed._forward_hooks
    model = attach_peg(build(family), positions=(0, 2))
    assert_refused(["['0', '2']"], attach_peg, model, positions=(1,))
    for name in ("twins_pcpvt_small", "cpvt_tiny"):
        with torch.device("meta"):
            other = timm.create_model(name)
        assert_refused([f"{type(other).__name__} is from", "VisionTransformer or Eva"], attach_peg, other)
