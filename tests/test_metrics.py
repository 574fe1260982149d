"""What is measured on trained models: shifts, attention, position, other sizes; arrays kept beside the rows."""

import math

import pytest
import torch
from torch import nn

from cpvt.config import ModelConfig, TrainConfig, replace
from cpvt.data.loader import make_loader
from cpvt.data.transforms import normalise
from cpvt.lab import metrics
from cpvt.lab.experiments import FIVE, fashion_config, synthetic_config, table_config
from cpvt.lab.probes import attention_maps
from cpvt.lab.results import unpack
from cpvt.lab.runner import with_teacher
from cpvt.model.vit import VisionTransformer
from cpvt.training.evaluate import correct
from cpvt.training.train import TrainingRun, train


def short(config: TrainConfig, root, depth: int = 2) -> TrainConfig:
    """Three steps on a CPU, at a small width; everything that makes the row stays."""
    length = {"epochs": 0, "warmup_epochs": 0, "steps": 3, "warmup_steps": 1, "global_batch_size": 4}
    data = replace(config.data, root=str(root), limit=min(config.data.limit, 8))
    run = replace(config.run, device="cpu", precision="fp32", compile="off")
    model = replace(config.model, width=16, heads=2, depth=depth)
    return replace(config, model=model, data=data, optim=replace(config.optim, **length), run=run)


def untrained(encoding: str, **model) -> VisionTransformer:
    torch.manual_seed(0)
    config = replace(fashion_config(encoding=encoding).model, width=16, depth=2, **model)
    return VisionTransformer(config).eval()


def images(count: int = 4) -> torch.Tensor:
    """Squares of noise on black, normalised."""
    image = torch.zeros(count, 3, 28, 28)
    image[:, :, 6:22, 6:22] = torch.rand(count, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    return normalise(image)


# --------------------------------------------------------------------------- whole rows


@pytest.mark.parametrize(
    "columns",
    [
        {"encoding": "learned", "distilled": True, "teacher": "resnet10t"},
        {"encoding": "sine", "stem": "conv", "scale_jitter": False},
        {"encoding": "rotary", "limit": 5_000, "epochs": 0},
        {"encoding": FIVE, "global_pool": "avg", "mlp_only_blocks": 1},
        {"encoding": "peg(padding='none', skip=False)"},
    ],
    ids=lambda columns: columns["encoding"],
)
def test_rows_of_the_tables_are_trained_and_scored(columns, tiny_imagenet):
    config = short(table_config(**columns), tiny_imagenet, depth=6 if columns["encoding"] == FIVE else 2)
    run = train(with_teacher(config)[0])
    found, dataset, digest = metrics.score_table_row(run, images=8)
    assert dataset == "tiny-imagenet" and len(digest) == 64 and all(map(math.isfinite, found.values()))
    shifts = {f"shift{pixels}" for pixels in (0, 1, 2, 4, 6)}
    sizes = {f"top1@{tokens}" for tokens in (10, 14, 24, 28, 32)}
    assert sizes | {"top1@14x28", "same_class/shift4", "position_r2/noise/interior"} <= found.keys()
    assert found["top1@14"] == run.metrics["top1"]
    others = {key.partition("/")[2] for key in found if key.startswith("top1@") and "/" in key}
    rules = {"sine": {"resample", "rescale"}, "rotary": {"rescale"}}.get(columns["encoding"], set())
    assert others == shifts | rules
    # Without padding the map is smaller, and has no counterpart under a shift.
    shrinks = "'none'" in columns["encoding"]
    assert ("shift_error/window/border" in found) != shrinks
    seen = [key for key in found if key.startswith("attention_distance")]
    assert len(seen) == (1 if shrinks else run.model.config.depth - columns.get("mlp_only_blocks", 0))


def test_rows_on_clothes_and_what_is_kept_of_them(clothes):
    run = train(short(fashion_config(encoding="learned + peg"), clothes))
    found, dataset, digest = metrics.score_fashion(run, images=8)
    assert dataset == "fashion-mnist" and len(digest) == 64 and found["top1@14"] == run.metrics["top1"]
    parts = {"same_class/shift6", "position_r2/constant", "shift_error/zero", "attention_distance/block1"}
    assert parts <= found.keys()
    arrays = metrics.arrays_of(run)
    assert arrays["peg0"].shape == (16, 1, 3, 3) and arrays["table"].shape == (197, 16)
    everything, labels = metrics.held_out_images(metrics.held_out(run), 1000)
    assert torch.equal(unpack(arrays["correct"], 20), correct(run.model, everything, labels).cpu())
    middle = 1 + 7 * 14 + 7  # behind the class token: row 7, column 7
    weights = attention_maps(run.model, everything)[1][:, :, middle].mean((0, 1))
    assert torch.allclose(arrays["attention"][1].flatten().float(), weights[1:], atol=1e-4)
    assert arrays["attention"].shape == (2, 14, 14)


def test_a_tuning_row_never_sees_the_validation_images(clothes):
    config = short(fashion_config(encoding="peg"), clothes)
    run = train(replace(config, data=replace(config.data, hold_out=10)))
    found, data, _ = metrics.score_tuning(run)
    assert found["images"] == 4 and "training images" in data  # a tenth of forty
    whole = make_loader(config.data, seed=0).train_set
    assert torch.equal(metrics.held_out(run).val_set.images, whole.images[::10])


def test_synthetic_scores():
    expected = {"where": {f"/d{d}" for d in range(5)}, "what": {"/trained", "/unseen", "/diagonals"}}
    for task, parts in expected.items():
        config = synthetic_config(task, "peg")
        run = TrainingRun(VisionTransformer(config.model).eval(), config)
        found, name, digest = metrics.score_synthetic(run, images=16)
        assert name == task and {key.partition("@")[2].lstrip("0123456789x") for key in found} == parts | {""}
        assert metrics.score_synthetic(run, images=16)[2] == digest  # of the images, which the seed decides


def test_every_class_has_a_part_in_what_is_scored_and_larger_tests_show_detail(tiny_imagenet):
    """Held-out images stand class by class; those of 64 pixels are shown at 64 as they lie on the disk."""
    data = replace(short(table_config(encoding="none"), tiny_imagenet).data, image_size=64)
    loader = make_loader(data, seed=0, train=False)
    some, labels = metrics.held_out_images(loader, 4, spread=True)
    assert labels.tolist() == [0, 0, 1, 1]
    everything, _ = metrics.held_out_images(loader, 8)
    assert torch.equal(some, everything[[0, 2, 4, 7]])
    assert torch.equal(everything, normalise(loader.val_set.images.float() / 255))


# --------------------------------------------------------------------------- their parts


def test_attention_maps_are_what_attention_multiplies_the_values_with():
    for encoding in ("none", "relative(on='keys_values')", "relative(on='bias')", "rotary"):
        model, seen = untrained(encoding), []
        maps, attn = attention_maps(model, images(2)), model.blocks[0].attn
        assert set(maps) == {0, 1}
        attn.register_forward_hook(lambda _, given, out, seen=seen: seen.extend((given[0], out)))
        with torch.no_grad():
            model(images(2))
            v = attn.qkv(seen[0]).chunk(3, -1)[2].unflatten(-1, (2, -1)).transpose(1, 2)
            out = maps[0] @ v
            if encoding.endswith("values')"):
                out = out + model.encoding.attn_values(0, maps[0], (14, 14))
            expected = attn.proj(out.transpose(1, 2).flatten(2))
        assert torch.allclose(seen[1], expected, atol=1e-5), encoding
        assert torch.allclose(maps[0].sum(-1), torch.ones(()), atol=1e-5)
    assert set(attention_maps(untrained("none", mlp_only_blocks=1), images(2))) == {1}


def test_attention_distance_of_who_reads_evenly():
    model = untrained("none")
    with torch.no_grad():
        for block in model.blocks:
            block.attn.qkv.weight.zero_()
    positions = torch.cartesian_prod(torch.arange(14.0), torch.arange(14.0))
    even = torch.cdist(positions, positions).mean().item()
    found = metrics.score_attention(model, images(2))
    assert found["attention_distance/block0"] == pytest.approx(even, rel=1e-5) == pytest.approx(7.3, abs=0.05)


def test_shifts_by_nothing_change_nothing_and_black_comes_in():
    class FirstColumn(nn.Module):  # answers 1 where the first column of pixels is black, else 0
        config = ModelConfig(image_size=(28, 28), patch_size=2)

        def forward(self, images):
            black = (images[..., 0] < -1.5).all(-1).all(-1)
            return torch.stack([~black, black], -1).float()

    bright = torch.rand(8, 3, 28, 28)  # normalised black is darker than any of these
    found = metrics.score_shifts(FirstColumn(), bright, torch.zeros(8, dtype=torch.long))
    assert found["top1@14/shift0"] == 100.0  # below: wrong to the right, right to the left
    assert found["top1@14/shift4"] == found["same_class/shift4"] == 50.0


def test_maps_move_along_where_theory_says_so():
    for encoding, exact in (("none", 1), ("peg(padding='circular')", 1), ("learned", 0), ("peg", 0)):
        found = metrics.score_maps(untrained(encoding).double(), images().double())
        assert (found["shift_error/circular"] < 1e-12) == exact, encoding
        wanted = {"shift_error/zero", "shift_error/circular/block0", "shift_error/circular/border"}
        assert wanted <= found.keys() and "shift_error/window" not in found


def test_bands_twice_as_wide_as_high(clothes):
    shapes = []

    class Spy(VisionTransformer):
        def forward(self, images, *rest):
            shapes.append(tuple(images.shape))
            return super().forward(images, *rest)

    config = short(fashion_config(encoding="learned"), clothes)
    loader = make_loader(config.data, seed=0, train=False)
    found = metrics.score_oblong(Spy(config.model).eval(), loader)
    assert shapes == [(20, 3, 28, 56)] and 0 <= found["top1@14x28"] <= 100
