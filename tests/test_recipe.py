"""The training side of the recipe: learning rate, groups, average, skips, losses, teachers, whole runs."""

import math
from dataclasses import replace

import pytest
import timm
import torch
from helpers import draw_images, small_run, through
from timm.utils import ModelEmaV3

from cpvt.config import DistillConfig, ModelConfig, OptimConfig, TrainConfig
from cpvt.data.transforms import normalise
from cpvt.errors import ConfigError, TrainingError, UserError
from cpvt.model.vit import VisionTransformer
from cpvt.training.checkpoint import load_saved
from cpvt.training.distributed import World
from cpvt.training.loss import Teacher, TrainingLoss, load_teacher
from cpvt.training.optim import EMA, SkipCounter, learning_rate, param_groups, resolve
from cpvt.training.recipes import RECIPES
from cpvt.training.train import Trainer, drop_path_scale, train

SIZES = {"image_size": (8, 8), "patch_size": 4, "width": 16, "depth": 3, "heads": 1, "num_classes": 5}
SMALL = ModelConfig(**SIZES, encoding="peg")


def test_the_learning_rate_is_a_function_of_the_step_and_recipes_are_what_the_facts_say():
    optim = resolve(RECIPES["deit"]("cpvt_tiny"), epoch_steps=625).optim
    assert optim.lr == 5e-4 * 2048 / 512 and optim.steps == 300 * 625 and optim.warmup_steps == 5 * 625
    assert learning_rate(0, optim) == pytest.approx(1e-6, rel=0.7)
    assert learning_rate(optim.warmup_steps - 1, optim) == optim.lr
    half = optim.steps // 2
    assert learning_rate(half, optim) == pytest.approx((optim.lr + 1e-5) / 2)  # the cosine counts from step 0
    rates = [learning_rate(step, optim) for step in range(0, optim.steps + 1, 125)]
    assert rates[:25] == sorted(rates[:25]) and rates[25:] == sorted(rates[25:], reverse=True)
    assert rates[-1] == pytest.approx(1e-5)
    fine_tuning = resolve(RECIPES["deit-384"]("deit_tiny"), 2500).optim
    assert {learning_rate(step, fine_tuning) for step in range(0, fine_tuning.steps, 999)} == {5e-6}
    deit = RECIPES["deit"]("cpvt_tiny_5peg")
    assert deit.model.encoding == "peg(positions=(0, 1, 2, 3, 4))" and deit.model.drop_path == 0.1
    assert RECIPES["deit-distilled"]("deit_tiny_distilled").distill.teacher == "regnety_160.deit_in1k"
    assert RECIPES["deit-384"]("deit_tiny").optim.weight_decay == 1e-8
    for name, build in RECIPES.items():
        assert build.__doc__.strip() and isinstance(build("deit_small_distilled"), TrainConfig), name


KEYS, VALUES = ({f"{on}_{part}" for part in ("rows", "columns", "prefix")} for on in ("keys", "values"))
SPARED = [("relative(on='keys_values')", KEYS | VALUES, 0), ("relative(on='bias')", KEYS, 0)]
SPARED += [("sine + rotary + peg(frozen=True)", set(), 0), ("peg(convolution='separable')", set(), 2)]
SPARED += [("learned + relative + peg(positions=(-1, 0, 1))", KEYS | {"pos_embed"}, 3)]


@pytest.mark.parametrize("encoding, spared, kernels", SPARED)
def test_what_is_decayed(encoding, spared, kernels):
    """Matrices and kernels; not vectors, tokens and tables; PEGs unless they are left out as in Twins."""
    model = VisionTransformer(replace(SMALL, encoding=encoding, distilled=True))
    names = {id(p): name for name, p in model.named_parameters()}
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    free = []
    for decay_pegs in (True, False):
        groups = param_groups(model, 0.05, decay_pegs)
        sets = {g["weight_decay"]: {names[id(p)] for p in g["params"]} for g in groups}
        assert sets[0.05] | sets[0.0] == trained and not sets[0.05] & sets[0.0]
        free.append({name for name in sets[0.0] if model.get_parameter(name).ndim > 1})
    assert {name.rpartition(".")[2] for name in free[0]} == spared | {"cls_token", "dist_token"}
    assert len(free[1] - free[0]) == kernels and all(name.endswith("weight") for name in free[1] - free[0])


def test_the_average_is_timms():
    torch.manual_seed(0)
    model = VisionTransformer(SMALL)
    own, theirs = EMA(model, 0.9), ModelEmaV3(model, decay=0.9)
    for step in range(5):
        with torch.no_grad():
            for p in model.parameters():
                p.add_(torch.randn_like(p))
        taken = step != 2
        own.update(torch.tensor(float(taken)))
        if taken:  # a skipped step leaves the average alone
            theirs.update(model)
    weights = [p.clone() for p in model.parameters()]
    with own.in_place():
        torch.testing.assert_close([*model.parameters()], [*theirs.module.parameters()])
    torch.testing.assert_close([*model.parameters()], weights, rtol=0, atol=0)
    config = replace(TrainConfig(), optim=OptimConfig(ema_half_life=2.0, epochs=30))
    assert resolve(config, 50).optim.ema_decay ** 100 == pytest.approx(0.5)


def spoiling(steps):
    """A `make_loader` whose images of these steps hold a NaN."""

    def spoiled(batches, start, loader):
        for number, batch in enumerate(batches):
            if sum(start) + number // loader.micro_batches_per_step in steps:
                batch.images[0, 0, 0, 0] = math.nan
            yield batch

    return through(spoiled)


def test_steps_that_are_not_finite_change_nothing_and_are_counted(image_folder, tmp_path):
    """Neither weights nor average nor moments nor Adam's own count of steps."""
    states = []
    for steps, bad in ((3, ()), (5, (3, 4))):
        out = str(tmp_path / str(steps))
        config = small_run(image_folder, out, steps=steps, warmup_steps=0, lr=1e-3, min_lr=1e-3)
        run = train(config, make_loader=spoiling(bad))
        states.append(Trainer(config, World()).state())
    for part in ("model", "ema"):
        torch.testing.assert_close(states[0][part], states[1][part], rtol=0, atol=0)
    moments = (state["optimizer"]["state"] for state in states)
    torch.testing.assert_close(*moments, rtol=0, atol=0)
    assert run.history[-1]["skipped"] == 2 and run.history[-1]["loss"] is None
    skips, one, infinite = SkipCounter("cpu"), torch.tensor(1.0), torch.tensor(math.inf)
    pairs = (one, infinite), (infinite, one), (one, one), (one, infinite)
    assert [float(skips.see(*pair)) for pair in pairs] == [0, 0, 1, 0]
    assert skips.counts.tolist() == [3, 1]
    config = small_run(image_folder, steps=1000, log_every=1000, skip_limit=5)
    with pytest.raises(TrainingError, match="step 15: no finite loss or gradient in the last 8 steps"):
        train(config, make_loader=spoiling(range(7, 1000)))


def test_distillation_written_out():
    torch.manual_seed(0)
    teacher = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 5))
    images, labels = torch.randn(4, 3, 2, 2), torch.tensor([0, 1, 2, 3])
    own, distilled = torch.randn(4, 5), torch.randn(4, 5, requires_grad=True)
    loss = TrainingLoss(0.1, 0.3, teacher)((own, distilled), images, labels)
    taught = torch.nn.functional.cross_entropy(distilled, teacher(images).argmax(-1))
    expected = 0.7 * torch.nn.functional.cross_entropy(own, labels, label_smoothing=0.1) + 0.3 * taught
    torch.testing.assert_close(loss, expected)
    loss.backward()
    assert all(p.grad is None for p in teacher.parameters()) and distilled.grad.abs().sum() > 0


def test_a_run_with_a_teacher_from_a_file(image_folder, tmp_path):
    """resnet10t stands for regnety_160: small, of timm, with weights from a file."""
    weights = tmp_path / "teacher.pth"
    torch.save(timm.create_model("resnet10t", num_classes=3).state_dict(), weights)
    config = small_run(image_folder, steps=2)
    model, data = replace(config.model, distilled=True), replace(config.data, image_size=32)
    distill, where = DistillConfig(teacher="resnet10t", weights=str(weights)), str(tmp_path / "run")
    config = replace(config, model=model, data=data, distill=distill, run=replace(config.run, out=where))
    run = train(config)
    assert math.isfinite(run.history[-1]["loss"])
    assert not load_teacher(distill, run.config.model, "cpu").training
    for classes, words in (3, "other weights of the teacher"), (4, "knows 4 classes, the data has 3"):
        torch.save(
            timm.create_model("resnet10t", num_classes=classes).state_dict(), weights
        )  # of the same name
        with pytest.raises(ConfigError, match=words):
            train(config)


def test_a_teacher_sees_images_as_it_is_used_to_or_is_refused(tmp_path):
    """Normalised by its own mean and deviation, in the one size that it reads."""
    torch.manual_seed(0)
    own = timm.create_model("vit_tiny_patch16_224", num_classes=5, depth=1).eval()
    assert own.pretrained_cfg["mean"] == (0.5, 0.5, 0.5)
    torch.save(timm.create_model("vit_tiny_patch16_224", num_classes=5).state_dict(), tmp_path / "w.pth")
    distill = DistillConfig("vit_tiny_patch16_224", str(tmp_path / "w.pth"))
    pixels = torch.rand(2, 3, 224, 224)
    with torch.no_grad():
        torch.testing.assert_close(Teacher(own)(normalise(pixels)), own((pixels - 0.5) / 0.5))
        same = timm.create_model("resnet10t").eval()  # with our mean and deviation: not a bit is changed
        assert torch.equal(Teacher(same)(normalise(pixels)), same(normalise(pixels)))
    with pytest.raises(ConfigError, match="reads 224x224 pixels alone"):
        load_teacher(distill, replace(SMALL, distilled=True), "cpu")
    load_teacher(distill, replace(SMALL, distilled=True, patch_size=16, image_size=(224, 224)), "cpu")
    for weights, words in ("", "no distillation token"), ("nowhere.pth", "nowhere.pth"):
        with pytest.raises(ConfigError, match=words):
            load_teacher(DistillConfig("resnet10t", weights), replace(SMALL, distilled=bool(weights)), "cpu")


def test_drop_path_is_drawn_for_the_sample_and_not_for_the_batch():
    model, like = VisionTransformer(replace(SMALL, drop_path=0.4)), torch.zeros((), dtype=torch.float64)
    positions = torch.arange(40)
    whole = drop_path_scale(model, 2, positions, seed=1, like=like)
    cut = [drop_path_scale(model, 2, part, seed=1, like=like) for part in positions.split(13)]
    assert whole.shape == (3, 2, 40) and torch.equal(whole, torch.cat(cut, 2))
    assert not torch.equal(whole, drop_path_scale(model, 3, positions, seed=1, like=like))
    many = drop_path_scale(model, 0, torch.arange(20_000), seed=0, like=like)
    for block, rate in enumerate((0.0, 0.2, 0.4)):
        assert abs((many[block] == 0).double().mean() - rate) < 4 * (0.25 / 40_000) ** 0.5
        assert many[block].max() == many[block][many[block] > 0].min() == pytest.approx(1 / (1 - rate))
    apart = torch.corrcoef(many.flatten(0, 1)[2:4])[0, 1]
    assert abs(apart) < 4 / 20_000**0.5  # the branches fall apart alone


@pytest.mark.parametrize(("precision", "dtype"), [("fp64", torch.float64), ("bf16", torch.float32)])
def test_every_precision_trains(image_folder, precision, dtype):
    run = train(small_run(image_folder, precision=precision, steps=6, store="memory"))
    assert all(math.isfinite(entry["loss"]) for entry in run.history)
    assert {p.dtype for p in run.model.parameters()} == {dtype}


def test_what_a_run_says_beforehand_and_how_long_it_takes(image_folder):
    said, entries = [], []
    train(small_run(image_folder, steps=24, evaluate_every=2), entries.append, said.append)
    assert [entry["step"] for entry in entries if "top1" in entry] == [18, 24]
    for words in ("4 x 4 tokens, 3 classes", "36 images in 9 steps", "2 micro-batches", "optim.steps=24"):
        assert words in said[0].replace("\n", " "), said[0]
    timed = [entry["hours_left"] for entry in entries if "hours_left" in entry]
    assert len(timed) == 12 and timed[-1] == 0


def test_weights_to_start_from(image_folder, tmp_path):
    """A learned table is resampled to the new size; the average begins there too; no file is one clear line."""
    config = small_run(image_folder, str(tmp_path / "first"), steps=2, store="memory")
    config = replace(config, model=replace(config.model, encoding="learned"))
    first = train(config)
    file = str(tmp_path / "first" / "model.safetensors")
    at_24, start = replace(config.data, image_size=24), replace(config.run, out="", init=file)
    model = Trainer(replace(config, data=at_24, run=start), World()).model
    assert model.state_dict()["pos_embed"].shape[1] == 37  # 6 x 6 tokens and the class token
    assert torch.equal(model.blocks[1].mlp.fc1.weight, first.model.blocks[1].mlp.fc1.weight)
    still = replace(config, optim=replace(config.optim, steps=1, lr=0.0, min_lr=0.0))
    train(replace(still, run=replace(config.run, init=file, out=str(tmp_path / "second"))))
    for name in ("model", "model_ema"):
        saved, *_ = load_saved(tmp_path / "second" / f"{name}.safetensors")
        torch.testing.assert_close(saved.state_dict(), first.model.state_dict(), rtol=0, atol=1e-7)
    with pytest.raises(UserError, match="no weights at"):
        train(replace(config, run=replace(config.run, out="", init=str(tmp_path / "none.pth"))))


def test_bad_images_are_named_counted_and_never_fatal(tmp_path):
    root = draw_images(tmp_path / "data")
    for i, content in enumerate((b"", b"no image at all")):
        (root / "train" / "n00000000" / f"000{i}.jpg").write_bytes(content)
    for path in (root / "val").rglob("*.jpg"):
        path.write_bytes(b"")
    config = small_run(root, str(tmp_path / "out"), steps=18)
    run = train(replace(config, augment=replace(config.augment, repeated_aug=1)))
    assert run.faults == 2 + 21 and run.steps == 18
    said = (tmp_path / "out" / "faults.jsonl").read_text()
    assert all(f"n00000000/000{i}.jpg" in said for i in range(2)) and said.count("/val/") == 21
    assert run.metrics["images"] == 21 and run.metrics["top1"] == 0  # what cannot be read counts as wrong
