"""What is measured on trained models of real images: shifts, attention, place, arrays kept beside the rows."""

import math
from collections import namedtuple

import pytest
import torch
from torch import nn

from cpvt.config import DataConfig, ModelConfig, TrainConfig, replace
from cpvt.data import loader
from cpvt.data.datasets import FASHION_MNIST_CLASSES, ImageDataset
from cpvt.data.loader import keep_images, open_batches
from cpvt.errors import ConfigError, ResultsError
from cpvt.lab import fashion, tables
from cpvt.lab.arrays import arrays_of, gap_by_image, keep_arrays, read_arrays, right
from cpvt.lab.experiments import EXPERIMENTS, planned_rows
from cpvt.lab.metrics import score_attention, score_maps, score_oblong, score_shifts, score_tuning
from cpvt.lab.probes import attention_maps
from cpvt.lab.tables import changed, fine_tune
from cpvt.lab.teacher import teach, teacher_top1, train_teacher
from cpvt.model.vit import VisionTransformer
from cpvt.training.evaluate import correct
from cpvt.training.train import train


@pytest.fixture(autouse=True)
def clothes(monkeypatch):
    """Fashion-MNIST in miniature: a grey square on black, the brighter the higher its class, 40 and 20 images."""

    def open_few(name, split, root):
        generator = torch.Generator().manual_seed({"train": 0, "val": 1}[split])
        count = {"train": 40, "val": 20}[split]
        labels = torch.arange(count) % 10
        images = torch.zeros(count, 28, 28, dtype=torch.uint8)
        noise = torch.randint(0, 10, (count, 16, 16), generator=generator)
        images[:, 6:22, 6:22] = (20 + 22 * labels[:, None, None] + noise).to(torch.uint8)
        return ImageDataset(
            "fashion-mnist", split, FASHION_MNIST_CLASSES, list(images.numpy()), labels.tolist()
        )

    monkeypatch.setattr(loader, "open_dataset", open_few)


def short(encoding="peg", **model) -> TrainConfig:
    config = changed(fashion.fashion_model(encoding), {"model": {"width": 16, "depth": 2, **model}})
    return changed(config, {"optim": {"global_batch_size": 10, "steps": 3, "warmup_steps": 1}})


def untrained(encoding, **model) -> VisionTransformer:
    torch.manual_seed(0)
    return VisionTransformer(short(encoding, **model).model).eval()


def pictures(count=6) -> torch.Tensor:
    images, _ = next(iter(open_batches(DataConfig(name="fashion-mnist", image_size=28), 1, 0).test()))
    return images[:count]


# --------------------------------------------------------------------------- held-out training images


def test_a_tenth_of_the_training_images_is_held_out_and_not_trained_on():
    data = DataConfig(name="fashion-mnist", image_size=28)
    whole = open_batches(data, 4, 0)
    split = open_batches(changed(TrainConfig(data=data), {"data": {"hold_out": 10}}).data, 4, 0)
    assert (len(whole.train), len(split.train), len(split.held_out)) == (40, 36, 4)
    assert torch.equal(split.held_out.images, whole.train.images[::10])
    rest = torch.arange(40) % 10 != 0
    assert torch.equal(split.train.images, whole.train.images[rest])


def test_holding_out_everything_is_refused():
    with pytest.raises(ConfigError, match="hold_out=1"):
        DataConfig(hold_out=1)


def test_a_tuning_row_never_sees_the_validation_images():
    config = changed(short(), {"data": {"hold_out": 10}})
    metrics, data, _ = score_tuning(train(config))
    assert metrics["images"] == 4 and "training images" in data
    assert all(plan.config.data.hold_out == 10 for plan in planned_rows("tuning"))
    assert all(plan.config.data.hold_out == 10 for plan in planned_rows("fashion-tuning"))


def test_the_grid_of_rates_is_the_same_for_every_encoding():
    for name, module in (("tuning", tables), ("fashion-tuning", fashion)):
        found: dict[str, set] = {}
        for plan in planned_rows(name):
            found.setdefault(plan.config.model.encoding, set()).add(plan.config.optim.lr)
        assert len(found) >= 3 and all(rates == set(module.RATES) for rates in found.values())


def test_kept_images_are_decoded_once(monkeypatch):
    data, calls, real = DataConfig(name="fashion-mnist", image_size=28), [], loader.load_tensors
    monkeypatch.setattr(loader, "load_tensors", lambda *given: calls.append(1) or real(*given))
    with keep_images():
        first, second = open_batches(data, 1, 0), open_batches(data, 1, 0)
        assert first.train is second.train and len(calls) == 2  # one for each split
        assert (
            open_batches(changed(TrainConfig(data=data), {"data": {"limit": 10}}).data, 1, 0).train
            is not first.train
        )
    assert open_batches(data, 1, 0).train is not first.train


# --------------------------------------------------------------------------- scores


def test_attention_maps_are_what_attention_multiplies_the_values_with():
    for encoding in (
        "none",
        "learned",
        "relative",
        "relative(on='keys_values')",
        "relative(on='bias')",
        "rotary",
    ):
        model, images = untrained(encoding), pictures(2)
        maps = attention_maps(model, images)
        assert set(maps) == {0, 1}
        seen = {}

        def values(attention, arguments, output, seen=seen):
            seen["x"], seen["out"] = arguments[0], output

        with torch.no_grad():
            handle = model.blocks[0].attn.register_forward_hook(values)
            model(images)
            handle.remove()
            attn = model.blocks[0].attn
            v = attn.qkv(seen["x"]).chunk(3, -1)[2].unflatten(-1, (2, -1)).transpose(1, 2)
            out = maps[0] @ v
            if encoding.endswith("values')"):
                out = out + model.encoding.values(0, maps[0], (14, 14))
            expected = attn.proj(out.transpose(1, 2).flatten(2))
        assert torch.allclose(seen["out"], expected, atol=1e-5), encoding
        assert torch.allclose(maps[0].sum(-1), torch.ones(()), atol=1e-5)


def test_blocks_without_attention_have_no_map():
    assert set(attention_maps(untrained("none", mlp_only_blocks=1), pictures(2))) == {1}


def test_attention_distance_of_who_reads_evenly_and_of_who_reads_itself():
    model = untrained("none")
    with torch.no_grad():
        for block in model.blocks:
            block.attn.qkv.weight.zero_()
    places = torch.cartesian_prod(torch.arange(14.0), torch.arange(14.0))
    even = torch.cdist(places, places).mean().item()
    found = score_attention(model, pictures(2))
    assert found["attention_distance/block0"] == pytest.approx(even, rel=1e-5) == pytest.approx(7.3, abs=0.05)


def test_shifts_by_nothing_change_nothing_and_black_comes_in():
    class FirstColumn(nn.Module):  # answers 1 where the first column of pixels is black, else 0
        config = ModelConfig(image_size=(28, 28), patch_size=2)

        def forward(self, images):
            black = (images[..., 0] < -1.5).all(-1).all(-1)
            return torch.stack([~black, black], -1).float()

    images = torch.rand(8, 3, 28, 28)  # normalised black is darker than any of these
    found = score_shifts(FirstColumn(), images, torch.zeros(8, dtype=torch.long), pixels=(3,))
    assert found["top1@14/shift0"] == 100.0
    assert (
        found["top1@14/shift3"] == found["same_class/shift3"] == 50.0
    )  # wrong to the right, right to the left


def test_maps_move_along_where_theory_says_so():
    images = pictures(4)
    for encoding, exact in (
        ("none", True),
        ("peg(padding='circular')", True),
        ("learned", False),
        ("peg", False),
    ):
        found = score_maps(untrained(encoding).double(), images.double())
        assert (found["shift_error/circular"] < 1e-12) == exact, encoding
        wanted = {"shift_error/zero", "shift_error/circular/block0", "shift_error/circular/border"}
        assert wanted <= found.keys() and "shift_error/window" not in found


def test_bands_twice_as_wide_as_high():
    batches = open_batches(DataConfig(name="fashion-mnist", image_size=28), 1, 0, train=False)
    shapes = []

    class Spy(VisionTransformer):
        def forward(self, images, keep=None):
            shapes.append(tuple(images.shape))
            return super().forward(images, keep)

    found = score_oblong(Spy(short("learned").model).eval(), batches)
    assert shapes == [(20, 3, 28, 56)] and 0 <= found["top1@14x28"] <= 100


# --------------------------------------------------------------------------- arrays


def test_right_and_wrong_of_every_image_is_kept(tmp_path):
    run = train(short("learned + peg"))
    arrays = arrays_of(run)
    assert arrays["peg0"].shape == (16, 1, 3, 3) and arrays["table"].shape == (197, 16)
    images, labels = next(iter(open_batches(run.config.data, 1, 0).test()))
    assert torch.equal(right(arrays["correct"], 20), correct(run.model, images, labels))
    assert arrays["attention"].shape == (2, 14, 14)
    middle = 1 + 7 * 14 + 7  # behind the class token: row 7, column 7
    weights = attention_maps(run.model, images)[1][:, :, middle].mean((0, 1))
    assert torch.allclose(arrays["attention"][1].flatten().float(), weights[1:], atol=1e-4)
    with pytest.raises(ResultsError, match="expected 13"):
        right(arrays["correct"], 100)

    file = tmp_path / "x.safetensors"
    keep_arrays(file, "a", 0, arrays)
    keep_arrays(file, "b", 0, {"correct": torch.zeros_like(arrays["correct"])})
    kept = read_arrays("x", "correct", tmp_path)
    assert set(kept) == {("a", 0), ("b", 0)} and torch.equal(kept["a", 0], arrays["correct"])
    assert (
        set(read_arrays("x", "table", tmp_path)) == {("a", 0)} and read_arrays("y", "table", tmp_path) == {}
    )
    assert [path.name for path in tmp_path.iterdir()] == ["x.safetensors"]

    gap, half = gap_by_image("x", "a", "b", 20, tmp_path)
    assert gap == pytest.approx(run.metrics["top1"])
    share = run.metrics["top1"] / 100
    assert half == pytest.approx(196 * math.sqrt(share * (1 - share) / 19), rel=1e-6)
    assert gap_by_image("x", "a", "nobody", 20, tmp_path) is None


def test_pairing_by_image_cancels_what_is_hard_for_both(tmp_path):
    hard = torch.arange(800) % 2 == 0
    first, second = hard.clone(), hard.clone()
    second[:8] = False
    for name, hits in (("first", first), ("second", second)):
        packed = torch.from_numpy(__import__("numpy").packbits(hits.numpy()))
        keep_arrays(tmp_path / "x.safetensors", name, 0, {"correct": packed})
    gap, half = gap_by_image("x", "first", "second", 800, tmp_path)
    unpaired = 1.96 * 100 * math.sqrt(2 * 0.25 / 800)
    assert gap == pytest.approx(0.5) and half < unpaired / 5


# --------------------------------------------------------------------------- teachers and fine-tuning


def test_a_teacher_is_trained_once_on_the_students_images(tmp_path):
    student = changed(
        short("peg", distilled=True),
        {"data": {"root": str(tmp_path)}, "distill": {"teacher": "resnet10t"}, "optim": {"steps": 2}},
    )
    taught = teach(student)
    (file,) = (tmp_path / "teachers").iterdir()
    assert taught.distill.weights == str(file)
    when = file.stat().st_mtime_ns
    assert 0 <= teacher_top1(taught)["teacher_top1"] <= 100 and teacher_top1(student) == {}
    assert teach(student) == taught and file.stat().st_mtime_ns == when
    assert teach(changed(student, {"run": {"seed": 1}})).distill.weights != str(file)
    assert teach(short("peg")) == short("peg")
    assert train(taught).model.config.distilled


def test_a_teacher_learns():
    student = changed(short(), {"optim": {"steps": 12, "lr": 3e-3}})
    _, top1 = train_teacher(student)
    assert top1 > 20  # of ten classes


def test_fine_tuning_goes_on_from_the_trained_weights_at_the_other_size():
    run = train(short("learned"))
    tuned = fine_tune(run, 40)
    assert tuned.model.config.grid == (20, 20) and tuned.steps == 1
    assert tuned.config.optim.lr == pytest.approx(run.config.optim.lr / 10)
    data = replace(run.config.data, stored_size=50)
    run.config = changed(
        replace(run.config, data=data), {"augment": {"crop": True, "crop_scale": (0.25, 1.0)}}
    )
    low, high = fine_tune(run, 40).config.augment.crop_scale
    assert (low, high) == (pytest.approx(0.64), 1.0)  # 40 of 50 pixels and more
    moved = (tuned.model.head.weight - run.model.head.weight).abs().max()
    assert 0 < moved < 2 * tuned.config.optim.lr  # AdamW's first step is about the rate


# --------------------------------------------------------------------------- the rows


def test_every_claim_is_about_rows_that_are_measured_at_every_seed():
    planned = {(plan.row, plan.config.run.seed) for plan in planned_rows("fashion")}
    for *pair, metric in fashion.CLAIMS:
        for name in pair:
            assert {(name, seed) for seed in fashion.SEEDS} <= planned, name
        assert metric.startswith(("top1@14", "same_class"))
    first = [plan.row for plan in planned_rows("fashion")][: len(fashion.CLAIMED)]
    assert first == list(fashion.CLAIMED)


def test_claims_on_length_compare_the_same_seeds_of_a_short_and_a_long_run():
    """Leads of 2 at 300 steps and 1 at 900, in every seed: two claims are positive, two measure what shrank."""
    planned = {(plan.row, plan.config.run.seed): plan for plan in planned_rows("fashion-length")}
    row = namedtuple("Row", "row seed metrics dataset_sha256", defaults=["0" * 64])
    gain = {"none": 0.0, "learned": 1.0, "one PEG": 3.0, "circular padding": 2.0}
    rows = []
    for seed in fashion.SEEDS:
        for name in fashion.LENGTHENED:
            assert planned[f"{name}, 900 steps", seed].config.optim.steps == 900
            rows += [row(name, seed, {"top1@14": 50 + seed + gain[name]})]
            rows += [row(f"{name}, 900 steps", seed, {"top1@14": 70 - seed + gain[name] / 2})]
    judged = fashion.judged_lengths(rows)
    assert [found.mean for found, _ in judged.values()] == [1.0, 0.5, 1.5, 1.0]
    assert all(found.n == 3 and verdict == "supported" for found, verdict in judged.values())
    assert all(found is None for found, _ in fashion.judged_lengths(rows[::2]).values())


def test_a_root_reaches_what_has_one_and_is_refused_by_what_is_drawn():
    for name in ("tables", "tuning", "fashion", "fashion-tuning", "fashion-length"):
        assert next(planned_rows(name, root="/images")).config.data.root == "/images"
    with pytest.raises(ConfigError, match="no root"):
        planned_rows("diagnostics", root="/images")
    assert set(EXPERIMENTS) >= {"diagnostics", "paddings", "pipelines", "tables", "fashion"}
