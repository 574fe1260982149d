"""Parity with timm in models, weights and groups of parameters; names and counts; weights from elsewhere."""

import argparse
import copy
import math
import subprocess
import sys
from pathlib import Path

import numpy
import pytest
import safetensors.torch
import timm
import torch
from encoded import refusal
from models import ENCODINGS, assert_refused, logits, random_images, random_model
from models import seeded as seeded
from timm.data import resolve_model_data_config
from timm.models._hub import save_for_hf
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import VisionTransformer as TimmVisionTransformer
from timm.models.vision_transformer import checkpoint_filter_fn
from timm.optim import param_groups_layer_decay
from timm.utils import AttentionExtract
from torch.optim.swa_utils import AveragedModel

import cpvt
from cpvt import ModelConfig, create_model, model_names
from cpvt.model.vit import VisionTransformer
from cpvt.model.zoo import load_weights, model_config
from cpvt.training.optim import EMA
from cpvt.training.recipes import deit

SMALL = {"image_size": (32, 48), "width": 16, "heads": 2, "depth": 2, "num_classes": 5}


@pytest.mark.filterwarnings("ignore:.*nodes obtained by tracing")
@pytest.mark.parametrize("distilled", [True, False])
def test_logits_intermediates_and_gradients_are_timms(distilled):
    """Weights loaded strictly; at other sizes the table is resampled as timm does."""
    options = {} if distilled else {"class_token": False, "global_pool": "avg", "fc_norm": False}
    sizes = {"img_size": (32, 48), "patch_size": 16, "embed_dim": 16, "depth": 2, "num_heads": 2}
    family = VisionTransformerDistilled if distilled else TimmVisionTransformer
    theirs = family(**sizes, num_classes=5, dynamic_img_size=True, **options).eval()
    for parameter in theirs.parameters():  # biases, norms and tokens start at 0 or 1, and count too
        parameter.data.add_(torch.randn_like(parameter), alpha=0.02)
    own = {"distilled": distilled, "global_pool": options.get("global_pool", "token")}
    ours = create_model(ModelConfig(**SMALL, encoding="learned(antialias=True)", **own)).eval()
    ours.load_state_dict(theirs.state_dict(), strict=True)
    for size in ((32, 48), (64, 32), (16, 80)):
        x = torch.randn(2, 3, *size)
        found, expected = ours(x), theirs(x)
        assert (found - expected).abs().max() < 1e-5 * expected.abs().max()
    for wanted in ({"indices": 1, "norm": True}, {"output_fmt": "NLC", "return_prefix_tokens": True}):
        mine, expected = (m.forward_intermediates(x, **wanted) for m in (ours, theirs))
        torch.testing.assert_close(mine, expected, rtol=1e-4, atol=1e-5)
    mine, expected = (m.get_intermediate_layers(x, 2, True, True, True) for m in (ours, theirs))
    torch.testing.assert_close(mine, expected, rtol=1e-4, atol=1e-5)
    for block in (*ours.blocks, *theirs.blocks):
        block.attn.fused_attn = False
    looks = ((theirs, "hook"), (ours, "hook"), (ours, "fx"))
    looks = [AttentionExtract(copy.deepcopy(model), method=method)(x) for model, method in looks]
    expected, *found = ([*maps.values()] for maps in looks)
    torch.testing.assert_close(found, [expected] * 2, rtol=1e-4, atol=1e-5)
    for model in (theirs, ours):
        model(x).square().sum().backward()
    found, expected = ({name: p.grad for name, p in m.named_parameters()} for m in (ours, theirs))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


COUNTS = {  # facts of the paper's table and of DeiT's, to the digit; biases of the PEGs included
    "tiny": (5_717_416, 5_681_512, 5_689_192),
    "small": (22_050_664, 21_978_856, 21_994_216),
    "base": (86_567_656, 86_424_040, 86_454_760),
}


def parameters(name, **overrides):
    with torch.device("meta"):
        return sum(p.numel() for p in create_model(name, **overrides).parameters())


def test_names_parameter_counts_and_overrides():
    assert len(model_names()) == len(set(model_names())) == 27
    for size, numbers in COUNTS.items():
        for name, count in zip((f"deit_{size}", f"cpvt_{size}", f"cpvt_{size}_5peg"), numbers, strict=True):
            width, table = model_config(name).width, name.startswith("deit")
            assert parameters(name) == count
            # Without class token: D fewer; the table also loses the class token's entry, which CPVT has not.
            assert parameters(name + "_gap") == count - width * (1 + table)
            assert parameters(name + "_distilled") == count + width + 1000 * (width + 1) + width * table
    bare = parameters("deit_tiny", encoding="none")
    assert parameters("deit_tiny", encoding="peg(bias=False)") - bare == 1_728
    assert model_config("cpvt_tiny", image_size=160).image_size == (160, 160)
    model = create_model("cpvt_tiny_gap", depth=2, width=32, heads=2, num_classes=3, image_size=(32, 64))
    assert model(torch.randn(2, 3, 32, 64)).shape == (2, 3)
    assert create_model(model.config, num_classes=4).config.num_classes == 4


TINY = {"width": 32, "heads": 2, "depth": 6}


def test_timm_knows_our_models_whichever_is_imported_first():
    """And cpvt alone imports neither timm nor torchvision, which take seconds."""
    code = """if True:
        import importlib.util, os, sys, torch
        for first in ("cpvt", "timm"):
            if not (child := os.fork()):
                importlib.import_module(first)
                assert importlib.util.find_spec("timm")  # as libraries look whether it is there
                assert first == "timm" or not {"timm", "torchvision"} & set(sys.modules)
                import timm, cpvt, timm.models.vision_transformer
                assert timm.create_model("cpvt_tiny", depth=1, width=32, heads=2).config.encoding == "peg"
                assert set(cpvt.model_names()) <= set(timm.list_models()) - set(timm.list_models(pretrained=True))
                os._exit(0)
            assert os.waitpid(child, 0)[1] == 0, first"""
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("name", ["cpvt_tiny_5peg", "deit_base_distilled"])
def test_timm_creates_a_model_and_its_feature_extractor(name):
    options = {"img_size": (32, 64), "in_chans": 1, **TINY}
    model = timm.create_model(name, num_classes=10, drop_path_rate=0.1, **options).eval()
    theirs = resolve_model_data_config(timm.create_model("deit_tiny_patch16_224"))
    assert resolve_model_data_config(model) == theirs | {"crop_pct": deit(name).data.crop_pct}
    assert type(model) is cpvt.model.vit.VisionTransformer
    expected = {"num_classes": 10, "drop_path": 0.1, "image_size": (32, 64), "in_channels": 1, **TINY}
    assert model.config == model_config(name, **expected)
    x = torch.randn(2, 1, 32, 64)
    features = timm.create_model(name, features_only=True, out_indices=(1, 4), **options).eval()
    features.model.load_state_dict(model.state_dict(), strict=False)
    assert features.feature_info.channels() == [32, 32] and features.feature_info.reduction() == [16, 16]
    expected = model.forward_intermediates(x, indices=[1, 4], intermediates_only=True)
    assert expected[0].shape == (2, 32, 2, 4) and len(features.model.blocks) == 5
    torch.testing.assert_close(features(x), expected)
    assert model.forward_head(model.forward_features(x), pre_logits=True).shape == (2, 32)
    model.reset_classifier(7, "token")
    assert model.get_classifier() == ((model.head, model.head_dist) if model.config.distilled else model.head)
    assert_refused(("global_pool",), model.reset_classifier, 7, "avg")
    assert model(x).shape == (2, 7) and model.num_classes == model.config.num_classes == 7
    model.reset_classifier(0)
    assert model(x).shape == (2, 32)
    model.reset_classifier(0, "")
    bare = timm.create_model(name, num_classes=0, global_pool="", **options).eval()
    bare.load_state_dict(model.state_dict())
    assert torch.equal(model(x), bare(x)) and torch.equal(bare(x), model.forward_features(x))
    assert model.train()(x).shape == (2, 8 + model.num_prefix_tokens, 32)


def test_names_and_arguments_that_cannot_be_honoured():
    assert_refused(["'cpvt_tny'", "cpvt_tiny"], create_model, "cpvt_tny")
    assert_refused(["cpvt_tiny_distilled"], create_model, "cpvt_tiny_gap_distilled")
    assert_refused(["'classes'", "num_classes"], create_model, "cpvt_tiny", classes=3)
    assert_refused(["100", "multiples"], create_model, "cpvt_tiny", image_size=100)
    for options, words in (
        ({"pretrained": True}, ["no public weights", "load_weights"]),
        ({"global_pool": "avg"}, ["global_pool='avg'", "_gap"]),
        ({"drop_rate": 0.1}, ["drop_rate=0.1", "drop_rate=0"]),
        ({"dynamic_img_pad": True}, ["dynamic_img_pad=False"]),
        ({"dynamic_img_size": False}, ["dynamic_img_size=True"]),
        ({"global_pool": ""}, ["num_classes=1000", "0 classes"]),
        ({"qk_norm": True}, ["'qk_norm'"]),
    ):
        assert_refused(words, timm.create_model, "cpvt_tiny", **options)
    timm.create_model("cpvt_tiny_gap", global_pool="avg", drop_rate=0.0, drop_path_rate=None, **TINY)


def test_timm_loads_weights_of_ones_own(tmp_path):
    """`pretrained` with a file; another number of classes keeps the body, as timm does."""
    model, path = create_model("deit_tiny", **TINY), tmp_path / "weights.safetensors"
    safetensors.torch.save_file(model.state_dict(), path)
    options = {"pretrained": True, "pretrained_cfg_overlay": {"file": str(path)}, **TINY}
    again = timm.create_model("deit_tiny", **options)
    assert all(torch.equal(v, again.state_dict()[k]) for k, v in model.state_dict().items())
    ten = timm.create_model("deit_tiny", num_classes=10, **options)
    assert torch.equal(ten.pos_embed, model.pos_embed) and ten.head.out_features == 10
    wide, x = timm.create_model("deit_tiny", img_size=(64, 96), **options).eval(), torch.randn(1, 3, 64, 96)
    torch.testing.assert_close(wide(x), model.eval()(x))  # the table is resampled
    same = timm.create_model("deit_tiny", img_size=(64, 96), **TINY)
    timm.models.load_checkpoint(same, str(path), filter_fn=checkpoint_filter_fn)  # timm's own, for its models
    assert same.pos_embed.shape == wide.pos_embed.shape


@pytest.mark.parametrize("name", ["deit_tiny_gap", "cpvt_tiny_5peg", "deit_tiny_distilled"])
def test_a_folder_for_the_hub_makes_the_model_again(name, tmp_path):
    """Also after its size and its head have changed."""
    model = timm.create_model(name, encoding=f"{model_config(name).encoding} + relative", **TINY).eval()
    model.reset_classifier(7)
    model.set_input_size((64, 96))
    save_for_hf(model, tmp_path)
    again, x = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval(), torch.randn(1, 3, 64, 96)
    assert again.config == model.config and torch.equal(again(x), model(x))


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_another_trained_size(encoding):
    """timm's `set_input_size`: what the model makes of images of that size stays, and it is built for it."""
    model, x = random_model(encoding, (4, 5), depth=2), random_images(2, (6, 7))
    before, expected = model.config, logits(model, x)
    if "rescale" in encoding:
        assert_refused(["counts in parts of the trained grid (4, 5)"], model.set_input_size, (6, 7))
        assert model.config == before and model.patch_embed.grid_size == model.encoding.grid == (4, 5)
        return
    assert_refused(["patch_size=2", "1 pixels"], model.set_input_size, 6, 2)
    model.set_input_size((6, 7), 1)
    assert torch.equal(logits(model, x), expected)
    native = VisionTransformer(model.config).double().eval()
    native.load_state_dict(model.state_dict())
    assert torch.equal(logits(native, x), expected)
    for built in (model, native):
        embed = built.patch_embed
        assert (embed.img_size, embed.grid_size, embed.num_patches) == ((6, 7), (6, 7), 42)


COMPILED = {
    "wrapped": lambda model: torch.compile(model, backend="eager"),
    "in place": lambda model: model.compile(backend="eager") or model,
    "blocks": lambda model: [block.compile(backend="eager") for block in model.blocks] and model,
}


@pytest.mark.parametrize("way", COMPILED)
@torch.no_grad()
def test_a_model_may_change_after_it_was_compiled(way):
    torch.compiler.reset()
    model, images = random_model("learned + peg(positions=(0, 1))", (4, 5), depth=2), random_images(2, (4, 5))
    compiled = COMPILED[way](model)
    compiled(images)
    changes = {"set_input_size": [(5, 4)], "reset_classifier": [3], "prune_intermediate_layers": [[0]]}
    for change, arguments in changes.items():
        getattr(model, change)(*arguments)
        with torch.compiler.set_stance("force_eager"):
            expected = model(images)
        torch.testing.assert_close(compiled(images), expected, msg=change)


@pytest.mark.parametrize("encoding", ["learned + relative", "peg(positions=(-1, 0, 1), repeat=2) + peg"])
def test_groups_of_timms_optimisers(encoding):
    """A PEG is decayed and belongs to its block, before block 0 to the stem; a table is never decayed."""
    model = random_model(encoding, (4, 5), depth=2)
    names = {p: name for name, p in model.named_parameters()}
    skipped = {"cls_token", "pos_embed", *(n for n in names.values() if n.startswith("encoding.relative"))}
    assert model.no_weight_decay() == skipped & set(names.values())  # decayed or not: see `test_recipe.py`
    layers = {}  # parameter name -> how many layers it is below the head
    for group in param_groups_layer_decay(model, layer_decay=0.5):
        layers |= {names[p]: -math.log2(group["lr_scale"]) for p in group["params"]}
    assert [layers[f"blocks.{i}.norm2.weight"] for i in range(2)] == [2, 1] and layers["head.weight"] == 0
    assert layers["patch_embed.proj.weight"] == layers["cls_token"] == 3
    for name in {n for n in layers if n.startswith(("encoding", "pos_embed"))}:
        position = name.split(".")[2].split("_")[0] if "peg" in name else "-1"
        assert layers[name] == {"-1": 3, "0": 2, "1": 1}[position], name


def square(**changes):
    return create_model("deit_tiny", **{**SMALL, "image_size": (64, 64), **changes}).eval()


def test_weights_load_from_every_form(tmp_path):
    state = square().state_dict()
    safetensors.torch.save_file(state, tmp_path / "w.safetensors")
    options = argparse.Namespace(lr=1e-3, out=Path("x"), best=numpy.float64(71.2), counts=numpy.arange(3))
    zeros = {key: torch.zeros_like(value) for key, value in state.items()}
    plain = [state, {"model": state, "epoch": 3, "args": options}, {"state_dict": {"model": state}}]
    for prefix in ("module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."):
        plain.append({"model": {prefix + key: value for key, value in state.items()}})
    plain.append({key.replace("blocks.0.", "blocks.0._orig_mod."): value for key, value in state.items()})
    plain.append({"model": state, "ema": []})
    swa = AveragedModel(square())
    swa.module.load_state_dict(state)
    averaged = [{"model": zeros, "model_ema": swa.state_dict()}]
    averaged += [{"state_dict": zeros, "state_dict_ema": plain[3]["model"]}]
    averaged += [{"model": zeros, "ema": EMA(square(), 0.9).average}]
    for i, content in enumerate(plain):
        torch.save(content, tmp_path / f"{i}.pth")
    for content in averaged:
        with pytest.warns(UserWarning, match="running average"):
            load_weights(model := square(), content)
        assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items()) or "ema" in content
    assert torch.equal(model.cls_token, averaged[-1]["ema"][0])
    for weights in (state, *tmp_path.iterdir()):
        model = square()
        assert load_weights(model, weights) is model
        assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())


def test_weights_that_do_not_fit_and_files_that_are_none_change_nothing(tmp_path):
    model, state = square(), square().state_dict()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    for wrong, words in (
        (square(num_classes=7).state_dict(), ["head.weight has 7x16, expected 5x16", "head.bias has 7"]),
        (square(image_size=(32, 32)).state_dict(), ["pos_embed has 1x5x16", "1x17x16", "resample="]),
        ({**state, "ema.rate": torch.zeros(1)}, ["ema.rate"]),
        ({**state, "norm.bias": "zero"}, ["norm.bias has str, expected 16"]),
        ({"model": state, "ema": [torch.zeros(1)]}, ["1 averaged tensors, the model trains"]),
        ({"conv1.weight": torch.zeros(3)}, ["more"]),
        ({**state, "norm.bias": torch.full((16,), torch.nan)}, ["not finite", ": norm.bias;"]),
    ):
        assert_refused(words, load_weights, model, wrong)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    torch.save([1, 2], tmp_path / "list.pth")
    torch.save({"model": Harmful()}, tmp_path / "code.pth")
    (tmp_path / "pickle.pth").write_bytes(b"\x80\x02]q\x00.")
    (tmp_path / "w.safetensors").write_bytes(b"not weights")
    for path in (*tmp_path.iterdir(), tmp_path / "missing.pth"):
        assert_refused([path.name], load_weights, square(), path)
        assert "\x1b" not in refusal(load_weights, square(), path)
    assert_refused(["Unsupported global", "_Fail"], load_weights, square(), tmp_path / "code.pth")


class Harmful:
    def __reduce__(self):
        return (pytest.fail, ("the file ran code",))


@pytest.mark.parametrize("distilled, antialias", [(False, True), (True, False)])
def test_a_table_of_another_grid_is_resampled_when_asked(distilled, antialias):
    """As the model itself would at that size; no grid is guessed from a length that is no square."""
    options = {"distilled": distilled, "encoding": f"learned(antialias={antialias})"}
    trained, model = square(**options), square(**options, image_size=(48, 96))
    load_weights(model, trained.state_dict(), resample=True)
    x = torch.randn(2, 3, 48, 96)
    torch.testing.assert_close(model(x), trained(x))
    trained, model = square(image_size=(32, 96)), square()
    for resample in (True, (3, 3)):
        words = ["12 patches", "resample=(H, W)"]
        assert_refused(words, load_weights, model, trained.state_dict(), resample=resample)
    load_weights(model, trained.state_dict(), resample=(2, 6))
    x = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(model(x), trained(x))
