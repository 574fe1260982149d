"""Parity with what exists: timm's models, weights, resampling, PEG; names, counts, weights that do not fit."""

import pytest
import safetensors.torch
import timm
import torch
import torch.nn.functional as F
from timm.data import resolve_model_data_config
from timm.layers import resample_abs_pos_embed
from timm.models.deit import VisionTransformerDistilled
from timm.models.twins import PosConv
from timm.models.vision_transformer import VisionTransformer as TimmVisionTransformer

import cpvt
from cpvt import ModelConfig, create_model, model_names
from cpvt.errors import ConfigError
from cpvt.model.encodings import PEG, resample_table
from cpvt.model.zoo import load_weights, model_config


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@torch.no_grad()
def scattered(model):
    """Every parameter moved, so that biases, norms and tokens, which start at 0 or 1, count too."""
    for parameter in model.parameters():
        parameter.add_(torch.randn_like(parameter), alpha=0.02)
    return model.eval()


def relative_difference(a, b):
    return ((a - b).abs().max() / b.abs().max()).item()


SMALL = {"image_size": (32, 48), "patch_size": 16, "width": 16, "depth": 2, "heads": 2, "num_classes": 5}


def small_pair(distilled=False, encoding="learned", **timm_options):
    """A small timm model and ours of the same sizes."""
    family = VisionTransformerDistilled if distilled else TimmVisionTransformer
    sizes = {
        "img_size": (32, 48),
        "patch_size": 16,
        "embed_dim": 16,
        "depth": 2,
        "num_heads": 2,
        "num_classes": 5,
    }
    theirs = scattered(family(**sizes, **timm_options))
    return theirs, create_model(ModelConfig(**SMALL, distilled=distilled, encoding=encoding)).eval()


# --------------------------------------------------------------------------- parity


@pytest.mark.parametrize(
    "name, images",
    [
        ("deit_tiny", 4),
        ("deit_small", 2),
        ("deit_base", 1),
        ("deit_tiny_distilled", 4),
        ("deit_small_distilled", 2),
        ("deit_base_distilled", 1),
    ],
)
@torch.no_grad()
def test_logits_are_timms(name, images):
    """The same weights, loaded strictly, give timm's logits within 1e-5 in fp32."""
    theirs = scattered(timm.create_model(f"{name}_patch16_224"))
    with torch.device("meta"):  # no time for weights that are replaced
        ours = create_model(name).eval()
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    ours.load_state_dict(theirs.state_dict(), strict=True, assign=True)
    x = torch.randn(images, 3, 224, 224)
    tokens, expected = ours.forward_features(x), theirs.forward_features(x)
    assert relative_difference(tokens, expected) < 1e-5
    assert relative_difference(ours.forward_head(tokens), theirs.forward_head(expected)) < 1e-5


@pytest.mark.parametrize("distilled", [False, True])
@torch.no_grad()
def test_at_another_size_logits_are_timms(distilled):
    """With timm's antialiased resampling of the table."""
    theirs, ours = small_pair(distilled, encoding="learned(antialias=True)", dynamic_img_size=True)
    ours.load_state_dict(theirs.state_dict())
    for size in ((32, 48), (64, 32), (16, 80)):
        x = torch.randn(2, 3, *size)
        assert relative_difference(ours(x), theirs(x)) < 1e-5


@torch.no_grad()
def test_gap_is_timms_average_of_normed_patches():
    options = {"class_token": False, "global_pool": "avg", "fc_norm": False}
    theirs, _ = small_pair(**options)
    ours = create_model(ModelConfig(**SMALL, global_pool="avg")).eval()
    ours.load_state_dict(theirs.state_dict(), strict=False)
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    x = torch.randn(2, 3, 32, 48)
    assert relative_difference(ours(x), theirs(x)) < 1e-5


@pytest.mark.parametrize("distilled", [False, True])
def test_gradients_are_timms(distilled):
    theirs, ours = small_pair(distilled)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 3, 32, 48)
    for model in (theirs, ours):
        model(x).square().sum().backward()
    found = {name.replace("encoding.parts.0.", ""): p.grad for name, p in ours.named_parameters()}
    for name, parameter in theirs.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("grid", [(14, 14), (5, 9)])
def test_peg_is_the_one_of_twins(grid):
    """timm's `PosConv` at stride 1, in values and in gradients."""
    theirs, ours = PosConv(24, 24), PEG(24)
    ours.proj.load_state_dict(theirs.proj[0].state_dict())
    x = torch.randn(2, grid[0] * grid[1], 24)
    found = []
    for peg in (ours, theirs):
        y = x.clone().requires_grad_()
        out = peg(y, grid)
        out.square().sum().backward()
        found.append((out, y.grad, *(p.grad for p in peg.parameters())))
    for own, expected in zip(*found, strict=True):
        torch.testing.assert_close(own, expected)


@pytest.mark.parametrize("old, new", [((14, 14), (10, 10)), ((14, 14), (24, 24)), ((4, 9), (10, 5))])
def test_resampled_tables_are_timms_and_deits(old, new):
    """timm resamples with antialiasing, DeiT without. They differ at every other size, not only at smaller
    ones: PyTorch's antialiased bicubic kernel is another one (a = -0.5, as in PIL, and not -0.75)."""
    table = torch.randn(1, 1 + old[0] * old[1], 8)
    timms = resample_abs_pos_embed(table, new_size=new, old_size=old, num_prefix_tokens=1)
    torch.testing.assert_close(resample_table(table[:, 1:], old, new, antialias=True), timms[:, 1:])
    image = table[:, 1:].reshape(1, *old, 8).permute(0, 3, 1, 2)
    deits = (
        F.interpolate(image, size=new, mode="bicubic", align_corners=False).permute(0, 2, 3, 1).flatten(1, 2)
    )
    torch.testing.assert_close(resample_table(table[:, 1:], old, new), deits)
    assert relative_difference(deits, timms[:, 1:]) > 0.02


@torch.no_grad()
def test_intermediates_are_timms():
    theirs, ours = small_pair()
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 3, 32, 48)
    for options in (
        {},
        {"indices": 1, "norm": True},
        {"indices": [0], "stop_early": True, "intermediates_only": True},
        {"output_fmt": "NLC", "return_prefix_tokens": True},
    ):
        mine, expected = (model.forward_intermediates(x, **options) for model in (ours, theirs))
        torch.testing.assert_close(mine, expected, rtol=1e-5, atol=1e-5)


# --------------------------------------------------------------------------- names and counts

COUNTS = {  # facts of the paper's table and of DeiT's, to the digit; biases of the PEGs included
    "deit_tiny": 5_717_416,
    "deit_small": 22_050_664,
    "deit_base": 86_567_656,
    "cpvt_tiny": 5_681_512,
    "cpvt_small": 21_978_856,
    "cpvt_base": 86_424_040,
    "cpvt_tiny_5peg": 5_689_192,
    "cpvt_small_5peg": 21_994_216,
    "cpvt_base_5peg": 86_454_760,
}


def parameters(name, **overrides):
    with torch.device("meta"):
        return sum(p.numel() for p in create_model(name, **overrides).parameters())


@pytest.mark.parametrize("name", COUNTS)
def test_parameter_counts(name):
    config = model_config(name)
    width = config.width
    assert parameters(name) == COUNTS[name]
    # Without class token: D fewer; the table also loses the class token's entry, which CPVT has not.
    assert parameters(name + "_gap") == COUNTS[name] - width * (2 if name.startswith("deit") else 1)
    distilled = width + 1000 * (width + 1) + (width if name.startswith("deit") else 0)
    assert parameters(name + "_distilled") == COUNTS[name] + distilled


def test_counts_of_one_encoding():
    """A PEG: 9 weights a channel (the paper's 1,728), and here a bias. A table: 196 entries, and the token's."""
    assert parameters("cpvt_tiny") - parameters("cpvt_tiny", encoding="none") == 1_920
    assert (
        parameters("cpvt_tiny", encoding="peg(bias=False)") - parameters("cpvt_tiny", encoding="none")
        == 1_728
    )
    assert parameters("deit_tiny") - parameters("deit_tiny", encoding="none") == 37_632 + 192
    assert (
        parameters("deit_tiny", encoding="peg(convolution='separable', bias=False)")
        - parameters("deit_tiny", encoding="none")
        == 192**2 + 9 * 192
    )


def test_names():
    names = model_names()
    assert len(names) == len(set(names)) == 27
    assert {"cpvt_tiny", "cpvt_tiny_5peg_gap", "cpvt_base_5peg_distilled", "deit_small_distilled"} <= set(
        names
    )
    for name in names:
        config = model_config(name)
        assert config.distilled == name.endswith("_distilled")
        assert config.global_pool == ("gap" if "_gap" in name else "class")
        five = "peg(positions=(0, 1, 2, 3, 4))" if "5peg" in name else "peg"
        assert config.encoding == ("learned" if name.startswith("deit") else five)
        assert (config.depth, config.width // config.heads, config.mlp_ratio) == (12, 64, 4.0)


def test_overrides():
    assert model_config("cpvt_tiny", image_size=160).image_size == (160, 160)
    model = create_model("cpvt_tiny_gap", depth=2, width=32, heads=2, num_classes=3, image_size=(32, 64))
    assert model(torch.randn(2, 3, 32, 64)).shape == (2, 3)
    assert create_model(model.config, num_classes=4).config == model_config(
        "cpvt_tiny_gap", depth=2, width=32, heads=2, num_classes=4, image_size=(32, 64)
    )


@pytest.mark.parametrize(
    "name, overrides, words",
    [
        ("cpvt_tny", {}, ["'cpvt_tny'", "did you mean", "cpvt_tiny"]),
        ("resnet50", {}, ["'resnet50'", "cpvt_tiny", "deit_base"]),
        ("cpvt_tiny_gap_distilled", {}, ["'cpvt_tiny_gap_distilled'", "class token", "choose"]),
        ("deit_tiny_5peg", {}, ["'deit_tiny_5peg'", "no PEG", "cpvt_tiny_5peg"]),
        ("cpvt_tiny", {"classes": 3}, ["'classes'", "num_classes"]),
        ("cpvt_tiny", {"image_size": 100}, ["100x100", "multiples"]),
        ("cpvt_tiny_gap", {"distilled": True}, ["distilled=True", "global_pool='avg'"]),
    ],
)
def test_unknown_names_and_options(name, overrides, words):
    with pytest.raises(ConfigError) as caught:
        create_model(name, **overrides)
    message = str(caught.value)
    assert "\n" not in message and all(word in message for word in words), message


# --------------------------------------------------------------------------- timm's registry

TINY = {"width": 32, "heads": 2, "depth": 5}


def test_timm_lists_every_name():
    assert set(model_names()) <= set(timm.list_models("*"))
    assert not set(model_names()) & set(timm.list_models(pretrained=True))


@pytest.mark.parametrize("name", model_names())
def test_timm_creates_every_name(name):
    model = timm.create_model(name, num_classes=10, drop_path_rate=0.1, img_size=(32, 64), in_chans=1, **TINY)
    assert type(model) is cpvt.model.vit.VisionTransformer
    assert model.config == model_config(
        name, num_classes=10, drop_path=0.1, image_size=(32, 64), in_channels=1, **TINY
    )
    model.eval()
    x = torch.randn(2, 1, 32, 64)
    assert model(x).shape == (2, 10)
    assert model.forward_features(x).shape == (2, 8 + model.num_prefix_tokens, 32)
    assert model.forward_head(model.forward_features(x), pre_logits=True).shape == (2, 32)
    heads = model.get_classifier()
    heads = heads if isinstance(heads, tuple) else (heads,)
    assert [head.out_features for head in heads] == [10] * len(heads)
    model.reset_classifier(7)
    assert model(x).shape == (2, 7) and model.num_classes == model.config.num_classes == 7
    model.reset_classifier(0)
    assert model(x).shape[-1] == 32
    final, shown = model.forward_intermediates(x, indices=2)
    assert [tuple(f.shape) for f in shown] == [(2, 32, 2, 4)] * 2
    assert torch.equal(final, model.forward_features(x))


@pytest.mark.parametrize("name", ["cpvt_tiny_5peg", "cpvt_tiny_gap", "deit_tiny_distilled"])
def test_timm_feature_extraction(name):
    whole = timm.create_model(name, img_size=64, **{**TINY, "depth": 6}).eval()
    features = timm.create_model(
        name, img_size=64, features_only=True, out_indices=(1, 4), **{**TINY, "depth": 6}
    )
    features.eval().model.load_state_dict(whole.state_dict(), strict=False)
    assert features.feature_info.channels() == [32, 32] and features.feature_info.reduction() == [16, 16]
    x = torch.randn(2, 3, 64, 96)
    expected = whole.forward_intermediates(x, indices=[1, 4], intermediates_only=True)
    assert [tuple(f.shape) for f in expected] == [(2, 32, 4, 6)] * 2
    torch.testing.assert_close(features(x), expected)
    assert len(features.model.blocks) == 5


def test_timm_data_configuration_is_deits():
    ours, theirs = timm.create_model("cpvt_tiny"), timm.create_model("deit_tiny_patch16_224")
    assert resolve_model_data_config(ours) == resolve_model_data_config(theirs)
    for cfg in (ours.pretrained_cfg, ours.default_cfg):
        assert cfg["architecture"] == "cpvt_tiny" and cfg["first_conv"] == "patch_embed.proj"
        assert cfg["input_size"] == (3, 224, 224)


@pytest.mark.parametrize(
    "options, words",
    [
        ({"pretrained": True}, ["cpvt_tiny", "no public weights", "load_weights"]),
        ({"global_pool": "avg"}, ["global_pool='avg'", "_gap"]),
        ({"drop_rate": 0.1}, ["drop_rate", "drop_path_rate"]),
        ({"qk_norm": True}, ["'qk_norm'"]),
    ],
)
def test_timm_arguments_that_cannot_be_honoured(options, words):
    with pytest.raises(ConfigError) as caught:
        timm.create_model("cpvt_tiny", **options)
    message = str(caught.value)
    assert "\n" not in message and all(word in message for word in words), message


def test_timm_arguments_that_change_nothing():
    timm.create_model(
        "cpvt_tiny", pretrained=False, global_pool="token", drop_rate=0.0, drop_path_rate=None, **TINY
    )
    timm.create_model("cpvt_tiny_gap", global_pool="avg", **TINY)


def test_timm_loads_weights_of_ones_own(tmp_path):
    """`pretrained` with a file; another number of classes keeps the body, as timm does."""
    model = create_model("cpvt_tiny", **TINY)
    path = tmp_path / "weights.safetensors"
    safetensors.torch.save_file(model.state_dict(), path)
    again = timm.create_model(
        "cpvt_tiny", pretrained=True, pretrained_cfg_overlay={"file": str(path)}, **TINY
    )
    assert all(torch.equal(v, again.state_dict()[k]) for k, v in model.state_dict().items())
    ten = timm.create_model(
        "cpvt_tiny", pretrained=True, num_classes=10, pretrained_cfg_overlay={"file": str(path)}, **TINY
    )
    assert torch.equal(ten.norm.weight, model.norm.weight) and ten.head.out_features == 10


# --------------------------------------------------------------------------- weights

SIZES = {"width": 16, "heads": 2, "depth": 2, "num_classes": 5, "image_size": (64, 64)}


def snapshot(model):
    return {key: value.clone() for key, value in model.state_dict().items()}


@pytest.mark.parametrize("form", ["safetensors", "plain", "model", "state_dict", "dict"])
def test_weights_load_from_every_form(tmp_path, form):
    source, model = create_model("deit_tiny", **SIZES), create_model("deit_tiny", **SIZES)
    state = source.state_dict()
    path = tmp_path / ("w.safetensors" if form == "safetensors" else "w.pth")
    if form == "safetensors":
        safetensors.torch.save_file(state, path)
    elif form == "dict":
        path = state
    else:
        torch.save(state if form == "plain" else {form: state, "epoch": 3}, path)
    assert load_weights(model, path) is model
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())


def without(state, key):
    return {k: v for k, v in state.items() if k != key}


WRONG = {
    "another width": (
        lambda s: create_model("deit_tiny", **{**SIZES, "width": 32}).state_dict(),
        ["16", "32"],
    ),
    "another head": (
        lambda s: create_model("deit_tiny", **{**SIZES, "num_classes": 7}).state_dict(),
        ["head.weight has 7x16, expected 5x16", "head.bias has 7, expected 5"],
    ),
    "another grid": (
        lambda s: create_model("deit_tiny", **{**SIZES, "image_size": (32, 32)}).state_dict(),
        ["pos_embed has 1x5x16, expected 1x17x16", "resample=True"],
    ),
    "missing": (lambda s: without(s, "norm.bias"), ["norm.bias is missing, expected 16"]),
    "unexpected": (lambda s: {**s, "ema.rate": torch.zeros(1)}, ["ema.rate is unknown"]),
    "not a tensor": (lambda s: {**s, "norm.bias": "zero"}, ["norm.bias has str, expected 16"]),
    "another model": (lambda s: {"conv1.weight": torch.zeros(3)}, ["missing", "and", "more"]),
    "empty": (lambda s: {}, ["missing"]),
}


@pytest.mark.parametrize("case", WRONG)
def test_weights_that_do_not_fit_change_nothing(case):
    make, words = WRONG[case]
    model = create_model("deit_tiny", **SIZES)
    before = snapshot(model)
    with pytest.raises(ValueError) as caught:
        load_weights(model, make(snapshot(create_model("deit_tiny", **SIZES))))
    message = str(caught.value)
    assert "\n" not in message and "nothing was loaded" in message, message
    assert all(word in message for word in words), message
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize("name", ["w.pth", "w.safetensors"])
def test_files_that_are_no_weights(tmp_path, name):
    model = create_model("deit_tiny", **SIZES)
    path = tmp_path / name
    with pytest.raises(FileNotFoundError, match=f"no weights at .*{name}; expected"):
        load_weights(model, path)
    for content in (b"", b"not weights", b"\x80\x02]q\x00."):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="cannot be read as weights") as caught:
            load_weights(model, path)
        assert "\n" not in str(caught.value)
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(ValueError, match="list.pth holds a list; expected a dictionary"):
        load_weights(model, tmp_path / "list.pth")


class Harmful:
    def __reduce__(self):
        return (pytest.fail, ("the file ran code",))


def test_files_cannot_run_code(tmp_path):
    torch.save({"model": Harmful()}, tmp_path / "w.pth")
    with pytest.raises(ValueError, match="cannot be read as weights"):
        load_weights(create_model("deit_tiny", **SIZES), tmp_path / "w.pth")


@pytest.mark.parametrize("distilled", [False, True])
@pytest.mark.parametrize("antialias", [False, True])
def test_a_table_of_another_grid_is_resampled_when_asked(distilled, antialias):
    """As the model itself would at that size; the prefix tokens' entries stay."""
    sizes = {**SIZES, "distilled": distilled, "encoding": f"learned(antialias={antialias})"}
    trained = create_model("deit_tiny", **sizes).eval()
    model = create_model("deit_tiny", **{**sizes, "image_size": (48, 96)}).eval()
    load_weights(model, trained.state_dict(), resample=True)
    x = torch.randn(2, 3, 48, 96)
    torch.testing.assert_close(model(x), trained(x))
    P = model.num_prefix_tokens
    assert torch.equal(model.state_dict()["pos_embed"][:, :P], trained.state_dict()["pos_embed"][:, :P])


def test_the_grid_of_a_table_is_never_guessed_from_a_length_that_is_no_square():
    trained = create_model("deit_tiny", **{**SIZES, "image_size": (32, 96)}).eval()
    model = create_model("deit_tiny", **SIZES).eval()
    before = snapshot(model)
    for resample in (True, (3, 3)):
        with pytest.raises(ValueError, match=r"12 patches beside 1 prefix tokens.*pass resample=\(H, W\)"):
            load_weights(model, trained.state_dict(), resample=resample)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    load_weights(model, trained.state_dict(), resample=(2, 6))
    x = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(model(x), trained(x))


def test_resampling_is_a_matter_of_tables():
    """A PEG has no size: the same weights fit any grid, asked or not."""
    trained = create_model("cpvt_tiny", **SIZES)
    for resample in (False, True):
        model = create_model("cpvt_tiny", **{**SIZES, "image_size": (32, 160)})
        load_weights(model, trained.state_dict(), resample=resample)
        assert all(torch.equal(v, trained.state_dict()[k]) for k, v in model.state_dict().items())
