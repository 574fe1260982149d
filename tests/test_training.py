"""Training, evaluation, schedule, checkpoint and command line: the first honest loop."""

import dataclasses
import json
import math

import pytest
import torch
from PIL import Image

from cpvt.cli import main
from cpvt.config import AugmentConfig, DataConfig, ModelConfig, OptimConfig, RunConfig, TrainConfig
from cpvt.data.loader import open_batches
from cpvt.errors import ConfigError
from cpvt.lab.experiments import ENCODINGS, PADDINGS, diagnostic, diagnostics, paddings, run_missing
from cpvt.lab.results import read_rows
from cpvt.model.vit import VisionTransformer
from cpvt.training import checkpoint, loop
from cpvt.training.evaluate import accuracy, correct
from cpvt.training.optim import learning_rate, parameter_groups


def tiny(encoding="peg", data="where", **kw) -> TrainConfig:
    return TrainConfig(
        model=ModelConfig(patch_size=1, width=16, depth=2, heads=1, encoding=encoding, init_std=0.1),
        data=DataConfig(name=data, grid=(6, 8), train_size=64, test_size=40),
        optim=OptimConfig(global_batch_size=8, steps=4, lr=1e-3, warmup_steps=2),
        run=RunConfig(device="cpu", log_every=2, **kw),
    )


def weights(run):
    return torch.cat([p.detach().flatten() for p in run.model.parameters()])


@pytest.mark.parametrize(
    "encoding",
    ["none", "learned", "sine", "relative", "rotary", "peg", "learned + peg", "peg(positions=(-1, 0, 1))"],
)
@pytest.mark.parametrize("global_pool", ["class", "gap"])
def test_every_encoding_trains(encoding, global_pool):
    config = tiny(encoding)
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, global_pool=global_pool))
    run = loop.train(config)
    assert [entry["step"] for entry in run.history] == [2, 4]
    assert all(math.isfinite(entry["loss"]) for entry in run.history)
    assert run.model.num_classes == 4 and run.metrics["images"] == 40


def test_the_same_seed_gives_the_same_run_and_another_seed_another():
    one, two = loop.train(tiny()), loop.train(tiny())
    other = loop.train(tiny(seed=1))
    assert torch.equal(weights(one), weights(two)) and one.history == two.history
    assert not torch.equal(weights(one), weights(other))


def test_training_learns_what_can_be_learnt():
    """Bars of equal tokens need neighbours: a PEG tells them apart, also on the side it never saw."""
    with_peg = loop.train(diagnostic("what", "peg"))
    assert with_peg.metrics["top1"] > 95 and with_peg.steps < 500
    blind = loop.train(diagnostic("what", "none", steps=10))
    assert blind.metrics["top1"] == 50  # equal multisets of tokens: exactly chance


def test_one_step_is_adamw_written_out():
    """Loss gradient, clipping, rate and decay of the first step, against the formula in plain tensors."""
    config = tiny()
    optim = dataclasses.replace(config.optim, steps=1, weight_decay=0.1, label_smoothing=0.1, clip_grad=0.05)
    run = loop.train(dataclasses.replace(config, optim=optim))
    torch.manual_seed(0)
    model = VisionTransformer(run.config.model)
    images, labels = open_batches(config.data, 8, 0).batch(0)
    torch.nn.functional.cross_entropy(model(images), labels, label_smoothing=0.1).backward()
    norm = torch.stack([p.grad.norm() for p in model.parameters()]).norm()
    assert norm > 0.05  # so that the clipping is at work
    decayed = {id(p) for p in parameter_groups(model, 0.1)[0]["params"]}
    rate = optim.lr / 2  # the first of two warm-up steps
    for (name, before), after in zip(model.named_parameters(), run.model.parameters(), strict=True):
        grad = before.grad * 0.05 / (norm + 1e-6)
        kept = before * (1 - rate * 0.1 * (id(before) in decayed))
        expected = kept - rate * grad / (grad.abs() + 1e-8)  # Adam's first step: m / sqrt(v) is the sign
        torch.testing.assert_close(after, expected, rtol=1e-5, atol=1e-6, msg=name)


def test_what_is_decayed():
    model = VisionTransformer(ModelConfig(width=16, depth=2, heads=1, encoding="learned + relative + peg"))
    names = {id(p): name for name, p in model.named_parameters()}
    decayed, free = ({names[id(p)] for p in group["params"]} for group in parameter_groups(model, 0.05))
    assert decayed | free == set(names.values()) and not decayed & free
    assert {"patch_embed.proj.weight", "head.weight", "blocks.0.attn.qkv.weight"} <= decayed
    assert any("peg.0.proj.weight" in name for name in decayed)
    assert {"cls_token", "norm.weight", "head.bias", "pos_embed"} <= free
    assert all(name in free for name in names.values() if "keys_" in name)


def test_frozen_pegs_are_in_no_group():
    model = VisionTransformer(ModelConfig(width=16, depth=2, heads=1, encoding="peg(frozen=True)"))
    trained = {id(p) for group in parameter_groups(model, 0.05) for p in group["params"]}
    assert not any(id(p) in trained for p in model.encoding.parameters())


def test_the_rate_rises_then_falls_as_a_cosine():
    optim = OptimConfig(steps=100, lr=1.0, warmup_steps=10, min_lr=0.1)
    assert learning_rate(0, optim) == pytest.approx(0.1) and learning_rate(9, optim) == pytest.approx(1.0)
    assert learning_rate(50, optim) == pytest.approx(0.55) and learning_rate(100, optim) == pytest.approx(0.1)
    falling = [learning_rate(step, optim) for step in range(10, 101)]
    assert falling == sorted(falling, reverse=True)


def test_accuracy_counts_images():
    class Fixed(torch.nn.Module):
        num_classes = 10

        def forward(self, images):
            return images.flatten(1)

    logits = torch.eye(10)[:, :, None, None]
    labels = torch.arange(10)
    labels[:3] = 9  # three wrong
    assert correct(Fixed(), logits, labels).sum() == 7
    scores = accuracy(Fixed(), [(logits[:7], labels[:7]), (logits[7:], labels[7:])])
    assert scores["top1"] == 70 and scores["images"] == 10 and 70 <= scores["top5"] <= 100


def test_batches_follow_from_seed_and_step(tmp_path):
    for label, wnid in enumerate(("n01", "n02")):
        for split, count in (("train", 6), ("val", 3)):
            (tmp_path / split / wnid).mkdir(parents=True)
            for i in range(count):
                Image.new("RGB", (12, 10), (20 * i, 100 * label, 7)).save(
                    tmp_path / split / wnid / f"{i}.png"
                )
    data = DataConfig(name=str(tmp_path), image_size=8)
    flips = AugmentConfig(hflip=0.5)
    one, two = (open_batches(data, 4, seed=3, augment=flips) for _ in range(2))
    two.batch(0)
    for step in (5, 1):  # in any order
        for a, b in zip(one.batch(step), two.batch(step), strict=True):
            assert torch.equal(a, b)
    epoch = [float(image[0].mean()) for step in range(3) for image in one.batch(step)[0]]
    assert len(set(epoch)) == 6  # an epoch of 12: each of 6 shades in each of 2 classes, in the red channel
    run = loop.train(
        TrainConfig(
            model=ModelConfig(patch_size=2, width=16, depth=1, heads=1, encoding="peg"),
            data=data,
            optim=OptimConfig(global_batch_size=4, steps=2, warmup_steps=1),
            run=RunConfig(device="cpu"),
        )
    )
    assert run.model.num_classes == 2 and run.metrics["images"] == 6 and len(run.fingerprint) == 64


def test_a_model_comes_back_as_it_was_saved(tmp_path):
    run = loop.train(tiny("learned + peg", out=str(tmp_path / "run")))
    model, config = checkpoint.load_model(tmp_path / "run" / "model.safetensors")
    assert config == run.config
    images = torch.rand(2, 3, 6, 8)
    with torch.no_grad():
        assert torch.equal(model(images), run.model(images))
    log = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert "config" in log[0] and log[-1]["top1"] == run.metrics["top1"]


def test_a_failed_save_leaves_the_older_file(tmp_path, monkeypatch):
    run = loop.train(tiny())
    path = checkpoint.save_model(tmp_path / "model.safetensors", run.model, run.config)
    before = path.read_bytes()

    def broken(state, name, metadata):
        name.write_bytes(b"half")
        raise OSError("no space left")

    monkeypatch.setattr(checkpoint, "save_file", broken)
    with pytest.raises(OSError, match="no space"):
        checkpoint.save_model(path, run.model, run.config)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def test_a_loss_that_stays_infinite_stops_the_run():
    config = tiny()
    with pytest.raises(
        FloatingPointError, match="no finite loss or gradient in the last 5 steps; begin anew"
    ):
        loop.train(
            dataclasses.replace(
                config,
                optim=dataclasses.replace(config.optim, rate=1e18, steps=20, clip=0, skip_limit=5),
                run=dataclasses.replace(config.run, log_every=1),
            )
        )


def test_the_diagnostics_matrix_is_whole():
    planned = list(diagnostics())
    assert len(planned) == 3 * len(ENCODINGS) * 2 * 3
    assert len({(p.row, p.config.run.seed) for p in planned}) == len(planned)
    for plan in planned[: 3 * len(ENCODINGS)]:  # every configuration builds
        VisionTransformer(plan.config.model)


def test_every_padding_is_planned_and_differs_from_zero_padding_in_the_encoding_alone():
    (zero,) = diagnostics(["where"], ["peg"], ["class"], [0])
    for plan in (planned := list(paddings())):
        VisionTransformer(plan.config.model)
        model = dataclasses.replace(plan.config.model, encoding="peg")
        same = dataclasses.replace(plan.config, model=model, run=zero.config.run)
        assert same == zero.config and plan.experiment == "paddings"
    assert len({(p.row, p.config.run.seed) for p in planned}) == len(planned) == 3 * len(PADDINGS)


def test_experiments_run_what_is_missing_and_stop_at_their_budget(tmp_path, monkeypatch):
    few = list(diagnostics(tasks=["what"], encodings=["peg"], readouts=["class"], seeds=[0, 1]))
    monkeypatch.setitem(run_missing.__globals__["EXPERIMENTS"], "diagnostics", lambda: iter(few))
    assert run_missing("diagnostics", tmp_path, budget_minutes=1e-9) >= 1
    assert run_missing("diagnostics", tmp_path) == 0
    rows = read_rows("diagnostics", tmp_path)
    assert [row.seed for row in rows] == [0, 1] and rows[0].metrics["top1@8x12/unseen"] > 95
    size = (tmp_path / "diagnostics.jsonl").stat().st_size
    assert run_missing("diagnostics", tmp_path) == 0
    assert (tmp_path / "diagnostics.jsonl").stat().st_size == size  # nothing was measured twice


def run_cli(*arguments, capsys) -> tuple[int, str, str]:
    try:
        main(list(arguments))
        status = 0
    except SystemExit as stop:
        status = stop.code
    out, err = capsys.readouterr()
    return status, out, err


SMALL = "--data where --data.grid 6 6 --model.patch-size 1 --model.width 8 --model.depth 1 --model.heads 1".split()


def test_train_evaluate_export_from_the_command_line(tmp_path, capsys):
    steps = [
        "--optim.steps",
        "3",
        "--optim.global_batch_size",
        "4",
        "--data.test-size",
        "20",
        "--run.device",
        "cpu",
    ]
    status, out, err = run_cli("train", *SMALL, *steps, "--run.out", str(tmp_path), capsys=capsys)
    assert status == 0 and "done: 3 steps" in out, err
    saved = str(tmp_path / "model.safetensors")
    status, out, err = run_cli("evaluate", saved, "--sizes", "6", "9", "--device", "cpu", capsys=capsys)
    assert status == 0 and "where 6x6  top1" in out and "where 9x9  top1" in out, err
    status, out, err = run_cli("export", saved, str(tmp_path / "model.onnx"), capsys=capsys)
    assert status == 0 and (tmp_path / "model.onnx").exists(), err


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["trian"], "did you mean train"),
        (["train", "--model", "cpvt_tny"], "did you mean cpvt_tiny"),
        (["train", "--data", "nowhere"], "no folder and no data set 'nowhere'"),
        (["train", "--model.encoding", "pegg"], "did you mean peg"),
        (["train", "--run.device", "tpu"], "expected 'auto', 'cpu' or 'cuda'"),
        (
            ["train", "--model.global_pool", "gap", "--model.distilled"],
            "distilled=True with global_pool='avg'",
        ),
        (["train", "--data", "where", "--data.grid", "5", "5"], "multiples of the patch size"),
        (["evaluate", "nothing.safetensors"], "no such file"),
        (["export", "cpvt_tny", "x.onnx"], "did you mean cpvt_tiny"),
        (["experiments", "diagnostic"], "did you mean diagnostics"),
    ],
)
def test_wrong_input_gets_one_line(arguments, expected, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    status, out, err = run_cli(*arguments, capsys=capsys)
    assert status == 2 and expected in err and err.count("\n") == 1, err
    assert not list(tmp_path.iterdir())  # nothing half-written


def test_a_file_that_is_no_checkpoint_is_refused(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"not a model")
    with pytest.raises(ConfigError, match="not a safetensors file"):
        checkpoint.load_model(tmp_path / "model.safetensors")
