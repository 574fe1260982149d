"""What is measured on trained models: shifts, attention, position, other sizes; arrays kept beside the rows."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from cpvt.config import ModelConfig, TrainConfig, replace
from cpvt.data.datasets import ImageTensors
from cpvt.data.transforms import normalise
from cpvt.lab import metrics, photographs
from cpvt.lab.experiments import FIVE, jobs, photograph_config, photograph_loader, synthetic_config
from cpvt.lab.probes import MovedMaps, attention_maps, split_error
from cpvt.lab.results import unpack
from cpvt.lab.runner import with_teacher
from cpvt.model.vit import VisionTransformer
from cpvt.training.train import TrainingRun, train


@pytest.fixture
def few(tiny_imagenet, monkeypatch):
    """Root of photographs in miniature: two classes, eight and four images each."""
    monkeypatch.setattr(photographs, "CLASSES", 2)
    monkeypatch.setattr(photographs, "COUNTS", {"train": 8, "val": 4})
    return tiny_imagenet


def short(config: TrainConfig, root, depth: int = 2) -> TrainConfig:
    """Three steps on a CPU, at a small width; everything that makes the row stays."""
    length = {"epochs": 0, "warmup_epochs": 0, "steps": 3, "warmup_steps": 1, "global_batch_size": 4}
    data, run = replace(config.data, root=str(root)), replace(config.run, device="cpu")
    model = replace(config.model, width=16, heads=2, depth=depth)
    return replace(config, model=model, data=data, optim=replace(config.optim, **length), run=run)


def untrained(encoding: str, **model) -> VisionTransformer:
    torch.manual_seed(0)
    config = replace(photograph_config(encoding=encoding, grid=14).model, width=16, depth=2, heads=2, **model)
    return VisionTransformer(config).eval()


def images(count: int = 4) -> torch.Tensor:
    """Squares of noise on black, normalised."""
    image = torch.zeros(count, 3, 28, 28)
    image[:, :, 6:22, 6:22] = torch.rand(count, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    return normalise(image)


ROWS = [dict(encoding="learned", distilled=True, teacher="resnet10t"), dict(encoding="rotary", grid=14)]
ROWS += [dict(encoding="sine", stem="conv", shifted=True), dict(encoding="peg(padding='none', skip=False)")]
ROWS += [dict(encoding=FIVE, global_pool="avg", mlp_only_blocks=1)]


@pytest.mark.parametrize("columns", ROWS, ids=lambda columns: columns["encoding"])
def test_rows_of_photographs_are_trained_and_scored(columns, few):
    config = short(photograph_config(**columns), few, depth=6 if columns["encoding"] == FIVE else 2)
    run = train(with_teacher(config, None, photograph_loader)[0], make_loader=photograph_loader)
    found, dataset, digest = metrics.score_photographs(run, images=8)
    assert dataset == photographs.DATASET and len(digest) == 64 and all(map(math.isfinite, found.values()))
    t, sizes = columns.get("grid", 8), (10, 14, 24, 28, 32) if "grid" in columns else (6, 8, 12, 14, 16)
    wanted = {f"top1@{size}" for size in (*sizes, f"{sizes[3]}x{t}", f"{t}x{sizes[3]}", f"{t}/window")}
    assert wanted | {"kept/window4", "moved/circular8", "position_r2/noise/interior"} <= found.keys()
    assert found[f"top1@{t}"] == run.metrics["top1"]
    others = {key.partition("/")[2] for key in found if key.startswith("top1@") and "/" in key}
    rules = {"sine": {"resample", "rescale"}, "rotary": {"rescale"}}.get(columns["encoding"], set())
    assert others == {f"circular{d}" for d in (1, 2, 3, 4, 6, 8)} | {"window"} | rules
    # Without padding the map is smaller, and has no counterpart under a shift.
    shrinks = "'none'" in columns["encoding"]
    assert ("map_error/window/border/pattern" in found) != shrinks
    seen = [key for key in found if key.startswith("attention_distance")]
    assert len(seen) == (1 if shrinks else run.model.config.depth - columns.get("mlp_only_blocks", 0))


def test_arrays_of_a_row_and_larger_tests_in_detail(few):
    """Originals of 64 pixels are shown at 64 as they are; at 32 a pixel is the mean of four."""
    run = train(short(photograph_config(encoding="learned + peg"), few), make_loader=photograph_loader)
    arrays = metrics.arrays_of(run)
    assert arrays["peg0"].shape == (16, 1, 3, 3) and arrays["table"].shape == (65, 16)
    held = photographs.open_photographs(run.config.data, "val")
    ((everything, labels),) = metrics.photographs_at(held, (32, 32))
    right = unpack(arrays["correct"], 8).double().mean().item()
    assert 100 * right == run.metrics["top1"] and len(labels) == 8
    middle = 1 + 4 * 8 + 4  # behind the class token: row 4, column 4
    weights = attention_maps(run.model, everything)[1][:, :, middle].mean((0, 1))
    assert torch.allclose(arrays["attention"][1].flatten().float(), weights[1:], atol=1e-4)
    assert arrays["attention"].shape == (2, 8, 8)
    held = photographs.open_photographs(photograph_config(encoding="none", root=str(few)).data, "val")
    whole = torch.cat([x for x, _ in metrics.photographs_at(held, (64, 64))])
    assert torch.equal(whole, normalise(held.images.float() / 255))
    half = torch.cat([x for x, _ in metrics.photographs_at(held, (32, 32))])
    means = F.avg_pool2d(held.images.float(), 2)
    assert (half - normalise(means / 255)).abs().max() <= 0.5 / 255 / 0.22  # rounded to a level


def test_rows_of_the_pilot_never_see_the_validation_images_and_synthetic_ones_score_their_parts(few):
    job = next(job for job in jobs("pilot", root=str(few)) if job.columns["encoding"] == "peg")
    run = train(short(job.config, few), make_loader=photograph_loader)
    found, data, _ = metrics.score_pilot(run)
    assert found["top1@8"] == run.metrics["top1"] and "training images" in data
    held, rest = (photographs.open_photographs(run.config.data, split).images for split in ("val", "train"))
    whole = photographs.open_photographs(replace(run.config.data, hold_out=0), "train").images
    assert torch.equal(held, whole[::10]) and len(rest) == len(whole) - len(held)
    expected = {"where": {f"/d{d}" for d in range(5)}, "what": {"/trained", "/unseen", "/diagonals"}}
    for task, parts in expected.items():
        config = synthetic_config(task, "peg")
        run = TrainingRun(VisionTransformer(config.model).eval(), config)
        found, name, digest = metrics.score_synthetic(run, images=16)
        assert name == task and {key.partition("@")[2].lstrip("0123456789x") for key in found} == parts | {""}
        assert metrics.score_synthetic(run, images=16)[2] == digest  # of the images, which the seed decides


def test_attention_maps_are_what_multiplies_the_values_and_distances_those_of_who_reads_evenly():
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
    model = untrained("none")
    with torch.no_grad():
        for block in model.blocks:
            block.attn.qkv.weight.zero_()
    positions = torch.cartesian_prod(torch.arange(14.0), torch.arange(14.0))
    even = torch.cdist(positions, positions).mean().item()
    found = metrics.score_attention(model, images(2))
    assert found["attention_distance/block0"] == pytest.approx(even, rel=1e-5) == pytest.approx(7.3, abs=0.05)


def test_shifts_are_those_of_the_image_both_ways():
    class LeftHalf(nn.Module):  # answers 1 where the left half of an image is brighter than the right
        config = ModelConfig(image_size=(32, 32), patch_size=4)

        def forward(self, images):
            left, right = (part.mean((1, 2, 3)) for part in images.chunk(2, 3))
            return torch.stack([right - left, left - right], -1)

    # A line of light, brighter from image to image: of 40 pixels at 25 to 27.5, so of a window from 8 on at 17.
    pixels = torch.zeros(8, 3, 64, 64, dtype=torch.uint8)
    pixels[..., 40:44] = 100 + 10 * torch.arange(8).byte()[:, None, None, None]
    held = ImageTensors(pixels, torch.ones(8, dtype=torch.long), ("a", "b"))
    found = metrics.score_shifts(LeftHalf(), held, torch.arange(8))
    assert found["top1@8/window"] == 0 and found["kept/window8"] == 100 and found["moved/window8"] < 1e-3
    pixels[..., 40:44] = 0
    pixels[..., 30:34] = 200  # at 18.75 to 21.25: left of the middle for windows from 6 on
    found = metrics.score_shifts(LeftHalf(), held, torch.arange(8))
    assert found["kept/window1"] == 100 and found["kept/window8"] == 50  # across; down nothing changes
    assert found["moved/window8"] > 1
    # Around the ring, at 15 to 17 of 32: by eight it is right or left of the middle, each the answer once.
    assert found["kept/circular8"] == pytest.approx(75) and found["top1@8/circular8"] == pytest.approx(25)


def test_maps_move_along_where_theory_says_so():
    for encoding, exact in (("none", 1), ("peg(padding='circular')", 1), ("learned", 0), ("peg", 0)):
        wide = torch.randn(4, 3, 28, 30, dtype=torch.double, generator=torch.Generator().manual_seed(0))
        found = metrics.score_map_errors(untrained(encoding).double(), wide[..., :28], wide)
        assert (found["map_error/circular/interior"] < 1e-12) == exact, encoding
        wanted = {"map_error/circular/interior/block0/pattern", "map_error/window/border/common"}
        assert wanted <= found.keys()


def test_an_error_is_a_common_vector_and_a_pattern():
    torch.manual_seed(0)
    expected, mask = torch.randn(2, 5, 4, 4, dtype=torch.double), torch.rand(4, 4) > 0.3
    shared = torch.randn(2, 5, 1, 1, dtype=torch.double)
    pattern = torch.randn(2, 5, 4, 4, dtype=torch.double) * mask
    pattern[:, :, mask] -= pattern[:, :, mask].mean(2, keepdim=True)
    for error, zero in ((shared, "pattern"), (pattern, "common")):
        found = split_error(MovedMaps(expected + error, expected, mask, ~mask), mask)
        assert getattr(found, zero) < 1e-12 < found.total and len({*found}) == 3
    nothing = split_error(MovedMaps(expected, expected, mask, mask & False), mask & False)
    assert all(map(math.isnan, nothing))
