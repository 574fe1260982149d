"""The training side of the recipe: rates, groups, average, skips, losses, teachers, precision, plan."""

import math
import shutil
from dataclasses import replace

import pytest
import timm
import torch
from pictures import draw_pictures, small_run
from PIL import Image
from timm.loss import SoftTargetCrossEntropy
from timm.scheduler import CosineLRScheduler
from timm.utils import ModelEmaV3

from cpvt.config import DistillConfig, ModelConfig, OptimConfig, Quirks, TrainConfig
from cpvt.data.loader import Share, open_batches
from cpvt.data.pack import pack
from cpvt.errors import ConfigError, DataError
from cpvt.model.vit import VisionTransformer
from cpvt.training import objective
from cpvt.training.checkpoint import load_model
from cpvt.training.distributed import World
from cpvt.training.logger import Monitor
from cpvt.training.loss import Criterion, cross_entropy
from cpvt.training.optim import Average, Skips, learning_rate, parameter_groups, rate_of, resolved
from cpvt.training.plan import describe
from cpvt.training.recipes import RECIPES
from cpvt.training.setup import drop_path_factors, set_up
from cpvt.training.state import State
from cpvt.training.train import train

DEIT = resolved(RECIPES["deit"]("cpvt_tiny"), epoch_steps=625)
SMALL = ModelConfig(
    image_size=(8, 8), patch_size=4, width=16, depth=3, heads=1, num_classes=5, encoding="peg"
)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    return draw_pictures(tmp_path_factory.mktemp("pictures"))


# --------------------------------------------------------------------------- rates


def reference_rates(optim: OptimConfig, epochs: int, resumed_at: int | None = None) -> list[float]:
    """The rate in each epoch, as DeiT's main.py drives timm's scheduler."""
    optimiser = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=optim.lr)
    scheduler = CosineLRScheduler(
        optimiser, t_initial=300, lr_min=optim.min_lr, warmup_t=5, warmup_lr_init=optim.warmup_lr
    )
    rates = []
    for epoch in range(epochs):
        if epoch == resumed_at:
            scheduler.step(epoch)
        rates.append(optimiser.param_groups[0]["lr"])
        scheduler.step(epoch)
    return rates


@pytest.mark.parametrize("resumed_at", [None, 3, 100])
def test_the_quirk_of_the_schedule_is_that_of_the_reference(resumed_at):
    quirks = Quirks(epoch_schedule=True, resume_ahead=True)
    own = [
        rate_of(
            epoch * 625 + 17,
            DEIT.optim,
            quirks,
            625,
            625 * resumed_at if resumed_at and epoch >= resumed_at else 0,
        )
        for epoch in range(300)
    ]
    assert own == pytest.approx(reference_rates(DEIT.optim, 300, resumed_at), rel=1e-12)
    assert own[0] == own[1] == 1e-6 < own[2]


def test_without_quirks_the_rate_is_a_function_of_the_step_alone():
    optim = DEIT.optim
    assert optim.lr == 5e-4 * 2048 / 512 and optim.steps == 300 * 625 and optim.warmup_steps == 5 * 625
    rates = [rate_of(step, optim, Quirks(), 625, resumed_at=625) for step in range(0, optim.steps, 125)]
    assert rates == [learning_rate(step, optim) for step in range(0, optim.steps, 125)]
    assert max(rates) <= optim.lr and rates[0] == pytest.approx(1e-6, rel=0.7)
    assert learning_rate(optim.warmup_steps - 1, optim) == optim.lr
    half = optim.steps // 2
    assert learning_rate(half, optim) == pytest.approx((optim.lr + 1e-5) / 2)  # the cosine counts from step 0


def test_fine_tuning_runs_at_one_rate():
    optim = resolved(RECIPES["deit-384"]("deit_tiny"), 2500).optim
    assert {learning_rate(step, optim) for step in range(0, optim.steps, 999)} == {5e-6}
    assert optim.global_batch_size == 512 and optim.weight_decay == 1e-8


# --------------------------------------------------------------------------- groups, average, skips


def test_pegs_may_be_left_undecayed_as_in_twins():
    model = VisionTransformer(replace(SMALL, encoding="learned + peg(positions=(0, 1))"))
    groups = [
        {id(p) for p in parameter_groups(model, 0.05, decay_pegs)[1]["params"]}
        for decay_pegs in (True, False)
    ]
    pegs = {id(m.weight) for m in model.encoding.modules() if isinstance(m, torch.nn.Conv2d)}
    assert len(pegs) == 2 and groups[1] - groups[0] == pegs


def test_the_average_is_timms():
    torch.manual_seed(0)
    model = VisionTransformer(SMALL)
    own, theirs = Average(model, 0.9), ModelEmaV3(model, decay=0.9)
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
        for a, b in zip(model.parameters(), theirs.module.parameters(), strict=True):
            torch.testing.assert_close(a, b)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), weights, strict=True))


def test_a_half_life_is_half_a_life():
    config = replace(TrainConfig(), optim=OptimConfig(ema_half_life=2.0, epochs=30))
    assert resolved(config, 50).optim.ema_decay ** 100 == pytest.approx(0.5)
    assert 0.99996**2900 == pytest.approx(
        0.89, abs=0.005
    )  # a short run's average is mostly its initial weights


@pytest.mark.parametrize("spoil", ["loss", "gradient"])
def test_a_step_that_is_not_finite_changes_nothing_and_is_counted(spoil):
    config = TrainConfig(model=SMALL, optim=OptimConfig(ema_decay=0.9, clip_grad=1.0))
    torch.manual_seed(0)
    state = State(VisionTransformer(SMALL), config, "cpu")
    images = torch.randn(4, 3, 8, 8)

    def step(bad: bool) -> None:
        loss = state.model(images).square().mean()
        loss.backward()
        if bad and spoil == "gradient":
            state.parameters[3].grad[0] = math.inf
        state.update(loss.detach() * (math.nan if bad and spoil == "loss" else 1), rate=1e-2)

    step(bad=False)
    before = {k: v.clone() for k, v in state.model.state_dict().items()}
    average = [p.clone() for p in state.average.average]
    moments = [s["exp_avg"].clone() for s in state.optimiser.state.values()]
    counted = [float(s["step"]) for s in state.optimiser.state.values()]
    for _ in range(2):
        step(bad=True)
    assert all(torch.equal(v, before[k]) for k, v in state.model.state_dict().items())
    assert all(torch.equal(a, b) for a, b in zip(state.average.average, average, strict=True))
    states = list(state.optimiser.state.values())
    assert all(torch.equal(s["exp_avg"], m) for s, m in zip(states, moments, strict=True))
    assert [float(s["step"]) for s in states] == counted  # Adam's own count does not go on either
    assert state.skips.read() == {"skipped": 2, "scale_skips": 0, "in_a_row": 2}
    step(bad=False)
    assert state.skips.read() == {"skipped": 2, "scale_skips": 0, "in_a_row": 0}
    assert not all(torch.equal(v, before[k]) for k, v in state.model.state_dict().items())


def test_overflows_of_the_loss_scale_are_counted_apart():
    skips, finite, infinite = Skips("cpu"), torch.tensor(1.0), torch.tensor(math.inf)
    assert [
        float(skips.see(loss, norm, scaled=True)) for loss, norm in [(finite, infinite), (infinite, infinite)]
    ] == [0, 0]
    assert skips.read() == {"skipped": 1, "scale_skips": 1, "in_a_row": 2}


# --------------------------------------------------------------------------- losses and teachers


def test_mixed_labels_have_timms_loss():
    torch.manual_seed(0)
    logits, targets = torch.randn(6, 5), torch.rand(6, 5).softmax(-1)
    torch.testing.assert_close(cross_entropy(logits, targets), SoftTargetCrossEntropy()(logits, targets))


@pytest.mark.parametrize("kind", ["hard", "soft"])
@pytest.mark.parametrize("by_elements", [False, True])
def test_distillation_written_out(kind, by_elements):
    torch.manual_seed(0)
    teacher = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 5))
    images, labels = torch.randn(4, 3, 2, 2), torch.tensor([0, 1, 2, 3])
    own, distilled = torch.randn(4, 5), torch.randn(4, 5, requires_grad=True)
    distill = DistillConfig(teacher="some", kind=kind, alpha=0.3, tau=2.0)
    loss = Criterion(0.1, distill, teacher, by_elements)((own, distilled), images, labels)
    answers = teacher(images)
    if kind == "hard":
        taught = torch.nn.functional.cross_entropy(distilled, answers.argmax(-1))
    else:
        p, q = (answers / 2).softmax(-1), (distilled / 2).log_softmax(-1)
        taught = (p * (p.log() - q)).sum() * 4 / (20 if by_elements else 4)
    expected = 0.7 * torch.nn.functional.cross_entropy(own, labels, label_smoothing=0.1) + 0.3 * taught
    torch.testing.assert_close(loss, expected)
    loss.backward()
    assert all(p.grad is None for p in teacher.parameters()) and distilled.grad.abs().sum() > 0


def test_a_run_with_a_teacher_from_a_file(pictures, tmp_path):
    """resnet10t stands for regnety_160: small, of timm, with weights from a file."""
    torch.manual_seed(0)
    weights = tmp_path / "teacher.pth"
    torch.save(timm.create_model("resnet10t", num_classes=3).state_dict(), weights)
    config = small_run(pictures, steps=2)
    config = replace(
        config,
        model=replace(config.model, distilled=True),
        data=replace(config.data, image_size=32),
        distill=DistillConfig(teacher="resnet10t", weights=str(weights), kind="soft"),
    )
    session = set_up(config, World())
    assert not session.objective.teacher.training and "teacher   resnet10t" in "\n".join(describe(session))
    assert math.isfinite(train(config).history[-1]["loss"])


@pytest.mark.parametrize(
    ("distill", "words"),
    [
        (DistillConfig(teacher="regnety_160"), "no distillation token"),
        (DistillConfig(teacher="regnety_999"), "timm has no such model"),
        (DistillConfig(teacher="resnet10t", weights="nowhere.pth"), "no weights at nowhere.pth"),
    ],
)
def test_teachers_that_cannot_be_had(distill, words):
    model = replace(SMALL, distilled="no distillation" not in words)
    with pytest.raises(ConfigError, match=words):
        objective.load_teacher(distill, model, "cpu")


# --------------------------------------------------------------------------- drop path


def test_drop_path_is_drawn_for_the_sample_and_not_for_the_batch():
    model = VisionTransformer(replace(SMALL, drop_path=0.4)).double()
    positions = torch.arange(40)
    whole = drop_path_factors(model, 2, positions, seed=1)
    cut = [drop_path_factors(model, 2, part, seed=1) for part in positions.split(13)]
    assert whole.shape == (3, 2, 40) and torch.equal(whole, torch.cat(cut, 2))
    assert not torch.equal(whole, drop_path_factors(model, 3, positions, seed=1))
    many = drop_path_factors(model, 0, torch.arange(20_000), seed=0)
    for block, rate in enumerate((0.0, 0.2, 0.4)):
        for branch in many[block]:
            kept = branch[branch != 0]
            torch.testing.assert_close(kept, torch.full_like(kept, 1 / (1 - rate)), rtol=1e-7, atol=0)
            assert abs((branch == 0).double().mean() - rate) < 4 * (0.25 / 20_000) ** 0.5
    assert (
        abs(torch.corrcoef(many.flatten(0, 1)[2:4])[0, 1]) < 4 / 20_000**0.5
    )  # the branches fall apart alone


def test_a_dropped_branch_adds_nothing_and_a_kept_one_more():
    torch.manual_seed(0)
    model = VisionTransformer(replace(SMALL, drop_path=0.5, encoding="none")).double().train()
    images = torch.randn(2, 3, 8, 8).double()
    none, all_kept = torch.zeros(3, 2, 2).double(), torch.ones(3, 2, 2).double()
    tokens, _ = model.embed(images)
    torch.testing.assert_close(model.forward_features(images, none), model.norm(tokens))
    torch.testing.assert_close(model(images, all_kept), model.eval()(images))
    mixed = torch.stack([none[..., 0], all_kept[..., 1]], -1)
    torch.testing.assert_close(model(images, mixed)[1], model(images, all_kept)[1])


# --------------------------------------------------------------------------- whole runs


@pytest.mark.parametrize("precision", ["fp64", "fp32", "bf16", "fp16"])
def test_every_precision_trains(pictures, precision):
    run = train(small_run(pictures, precision=precision, steps=6, store="memory"))
    assert all(math.isfinite(entry["loss"]) for entry in run.history)
    kinds = {p.dtype for p in run.model.parameters()}
    assert kinds == {torch.float64 if precision == "fp64" else torch.float32}


def test_memory_and_files_hold_the_same_images(pictures):
    """Lossless pictures of the stored size: then both ways must give the same batches."""
    config = small_run(pictures)
    root = pictures.parent / "squares"
    for path in pictures.glob("*/*/*.jpg"):
        to = root / path.relative_to(pictures).with_suffix(".png")
        to.parent.mkdir(parents=True, exist_ok=True)
        Image.open(path).resize((24, 24)).save(to)
    stored = []
    for store in ("memory", "files"):
        data = replace(config.data, name=str(root), store=store)
        loader = open_batches(data, 8, 3, augment=config.augment, smoothing=0.1)
        stored.append([*loader.batch(1), *next(iter(loader.test()))])
    for one, other in zip(*stored, strict=True):
        assert torch.equal(one, other)


def test_reading_processes_change_nothing(pictures):
    config = small_run(pictures)
    alone = train(config)
    helped = train(replace(config, data=replace(config.data, workers=2)))
    assert helped.history == alone.history and helped.metrics == alone.metrics


def test_what_the_plan_says(pictures):
    config = small_run(pictures)
    config = replace(config, optim=replace(config.optim, steps=24), quirks=Quirks(forget_best=True))
    said = "\n".join(describe(set_up(config, World()), seconds=0.5))
    for words in (
        "1 PEG, 16 x 16 pixels, 4 x 4 tokens",
        "72 images, 3 classes; an epoch is 9 steps, 72 samples of 36 distinct images",
        "8 = 1 process x 2 micro-batches x 4, mixed in groups of 4",
        "rand-m9-mstd0.5-inc1, erasing 0.25, mixup 0.8, CutMix 1, 2 copies of an image",
        "24 steps, 2.667 epochs, fp32, average of the weights with decay 0.8 a step",
        "quirks    forget_best",
        "0.5 s a step (16 images/s) for model alone, so 12 s for 24 steps",
    ):
        assert words in said, said


def test_weights_to_start_from_are_resampled_to_the_new_size(pictures, tmp_path):
    config = small_run(pictures, str(tmp_path / "first"), steps=2, store="memory")
    config = replace(config, model=replace(config.model, encoding="learned"))
    first = train(config)
    larger = replace(
        config,
        data=replace(config.data, image_size=24),
        run=replace(config.run, out="", init=str(tmp_path / "first" / "model.safetensors")),
    )
    session = set_up(larger, World())
    model = session.state.model
    assert model.state_dict()["pos_embed"].shape[1] == 37  # 6 x 6 tokens and the class token
    assert torch.equal(model.blocks[1].mlp.fc1.weight, first.model.blocks[1].mlp.fc1.weight)


def test_bad_images_are_named_counted_and_never_fatal(pictures, tmp_path):
    root = tmp_path / "data"
    draw_pictures(root, train=24)
    folder = root / "train" / "n00000000"
    whole = (folder / "0000.jpg").read_bytes()
    (folder / "0000.jpg").write_bytes(whole[: len(whole) // 2])
    (folder / "0001.jpg").write_bytes(b"")
    (folder / "0002.jpg").write_bytes(b"no picture at all")
    Image.new("CMYK", (30, 30)).save(folder / "0003.jpg")  # unusual, and fine
    config = replace(small_run(root, str(tmp_path / "out"), steps=18))
    config = replace(config, augment=replace(config.augment, repeated_aug=1))
    run = train(config)
    assert run.faults == 3 and run.steps == 18
    said = (tmp_path / "out" / "faults.jsonl").read_text()
    assert all(f"000{i}.jpg" in said for i in range(3)) and "0003.jpg" not in said
    for path in (root / "train").rglob("*.jpg"):
        path.write_bytes(b"")
    with pytest.raises(DataError, match="cannot be used .*see to the disk"):
        train(
            replace(
                config,
                optim=replace(config.optim, batch=32, micro_batch_size=32),
                run=replace(config.run, out=""),
            )
        )


def test_held_out_images_that_cannot_be_read_count_as_wrong(tmp_path):
    root = draw_pictures(tmp_path / "data")
    config = small_run(root, str(tmp_path / "out"), steps=2)
    fine = train(replace(config, run=replace(config.run, out="")))
    for path in (root / "val").rglob("*.jpg"):
        path.write_bytes(b"")
    run = train(config)
    assert run.metrics["images"] == fine.metrics["images"] == 21
    assert run.metrics["top1"] == 0 < fine.metrics["top1"] and run.faults == 21
    assert (tmp_path / "out" / "faults.jsonl").read_text().count("/val/") == 21


def test_splits_with_other_classes_are_refused(tmp_path):
    root = draw_pictures(tmp_path / "data", train=8, val=2)
    packed = tmp_path / "packed"
    for split in ("train", "val"):
        source = tmp_path / split
        shutil.copytree(root / split, source / split)
        if split == "val":
            (source / "val" / "n00000002").rename(source / "val" / "n00000009")
        pack(source, packed, (split,), report=lambda text: None)
    config = small_run(packed, steps=2)
    with pytest.raises(DataError, match="3 classes to train on, 3 held out, or other ones"):
        train(config)


def test_an_average_begins_at_the_weights_to_start_from(pictures, tmp_path):
    first = train(small_run(pictures, str(tmp_path / "first"), steps=2, store="memory"))
    config = small_run(pictures, str(tmp_path / "second"), steps=1, store="memory", rate=0.0, min_lr=0.0)
    config = replace(config, run=replace(config.run, init=str(tmp_path / "first" / "model.safetensors")))
    train(config)
    for name in ("model", "model_ema"):
        saved, _ = load_model(tmp_path / "second" / f"{name}.safetensors")
        for a, b in zip(saved.parameters(), first.model.parameters(), strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-7)


def test_fewer_held_out_images_than_processes(pictures):
    config = small_run(pictures)
    for rank in range(30):
        batches = open_batches(config.data, 8, 0, share=Share(rank, 30), train=False)
        assert sum(len(labels) for _, labels in batches.test()) == (1 if rank < 21 else 0)


def test_a_full_disk_costs_the_log_and_not_the_run(pictures, tmp_path, monkeypatch, capsys):
    whole = train(small_run(pictures))

    def full(self, name, entry, own=Monitor._append):
        with monkeypatch.context() as now:
            now.setattr("builtins.open", no_room)
            own(self, name, entry)

    def no_room(*arguments, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Monitor, "_append", full)
    run = train(small_run(pictures, str(tmp_path)))
    assert run.metrics == whole.metrics and capsys.readouterr().err.count("the run goes on") == 1
    assert (tmp_path / "log.jsonl").read_text().count(
        "\n"
    ) == 1  # the configuration, written before the disk was full


def test_tensorboard_gets_the_log(pictures, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = train(small_run(pictures, str(tmp_path), tensorboard=True, steps=4))
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(e.step, round(e.value, 4)) for e in events.Scalars("loss")] == [
        (entry["step"], pytest.approx(entry["loss"])) for entry in run.history
    ]
    assert "top1" in events.Tags()["scalars"]


def test_the_recipes_are_what_the_facts_say():
    deit = RECIPES["deit"]("cpvt_tiny_5peg")
    assert deit.model.encoding == "peg(positions=(0, 1, 2, 3, 4))" and deit.model.drop_path == 0.1
    assert RECIPES["deit-distilled"]("deit_tiny_distilled").distill.teacher == "regnety_160.deit_in1k"
    for name, build in RECIPES.items():
        assert build.__doc__.strip() and isinstance(build("deit_small_distilled"), TrainConfig), name
