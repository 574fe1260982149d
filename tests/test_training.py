"""The loop, evaluation, saving a model, and the command line around them."""

import ast
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import warnings
from unittest import mock

import numpy
import pytest
import torch
from helpers import run_cli, small_run, tiny_run

from cpvt import cli
from cpvt.config import RunConfig, replace
from cpvt.data.loader import SIGNALS, make_loader
from cpvt.errors import ConfigError, DataError, TrainingError
from cpvt.lab.experiments import synthetic_config
from cpvt.model.vit import VisionTransformer
from cpvt.training.checkpoint import load_saved, save_model
from cpvt.training.evaluate import accuracy, correct
from cpvt.training.optim import param_groups
from cpvt.training.train import settings, train


def test_the_same_seed_gives_the_same_run_and_another_seed_another():
    runs = train(tiny_run()), train(tiny_run()), train(tiny_run(seed=1))
    one, two, other = (torch.cat([p.flatten() for p in run.model.parameters()]) for run in runs)
    assert torch.equal(one, two) and not torch.equal(one, other) and runs[0].history == runs[1].history
    assert [entry["step"] for entry in runs[0].history] == [2, 4]
    assert runs[0].metrics["images"] == 40 and runs[0].model.num_classes == 4


def test_training_learns_what_can_be_learnt():
    """Bars of equal tokens need neighbours: a PEG tells them apart, also on the side it never saw."""
    with_peg = train(synthetic_config("what", "peg"))
    assert with_peg.metrics["top1"] > 95 and with_peg.steps < 500
    blind = train(synthetic_config("what", "none", max_steps=10))
    assert blind.metrics["top1"] == 50  # equal multisets of tokens: exactly chance


def test_one_step_is_adamw_written_out():
    """Loss, gradient, clipping, learning rate and decay of the first step, by the formula in plain tensors."""
    config = tiny_run()
    optim = replace(config.optim, steps=1, weight_decay=0.1, label_smoothing=0.1, clip_grad=0.05)
    run = train(replace(config, optim=optim))
    model = VisionTransformer(run.config.model)
    model.draw(0)
    images, labels = make_loader(config.data, global_batch_size=8, seed=0).batch(0)
    torch.nn.functional.cross_entropy(model(images), labels, label_smoothing=0.1).backward()
    norm = torch.stack([p.grad.norm() for p in model.parameters()]).norm()
    assert norm > 0.05  # so that the clipping is at work
    decay = {id(p): group["weight_decay"] for group in param_groups(model, 0.1) for p in group["params"]}
    lr = optim.lr / 2  # the first of two warm-up steps
    for (name, before), after in zip(model.named_parameters(), run.model.parameters(), strict=True):
        grad = before.grad * 0.05 / (norm + 1e-6)
        kept = before * (1 - lr * decay[id(before)])
        expected = kept - lr * grad / (grad.abs() + 1e-8)  # Adam's first step: m / sqrt(v) is the sign
        torch.testing.assert_close(after, expected, rtol=1e-5, atol=1e-6, msg=name)


def test_accuracy_counts_images_and_answers_by_image_add_up_to_it():
    """Where classes share the largest logit too: one ranking for both."""

    model = torch.nn.Flatten()
    model.num_classes = 10
    logits = -(torch.arange(10.0)[:, None] - torch.arange(10)).abs()[:, :, None, None]
    labels = torch.arange(10)
    labels[:3] = torch.tensor([3, 9, 9])  # three wrong, one of them among the first five guesses
    assert correct(model, logits, labels).sum() == 7
    scores = accuracy(model, [(logits[:7], labels[:7]), (logits[7:], labels[7:])])
    assert scores == {"top1": 70, "top5": 80, "images": 10}
    torch.manual_seed(0)
    tied, labels = torch.randint(3, (500, 1, 1, 10)).bfloat16(), torch.arange(500) % 10
    hits = correct(model, tied, labels)
    assert accuracy(model, [(tied, labels)])["top1"] == 100 * int(hits.sum()) / 500
    assert 0 < hits.sum() < 500
    del model.num_classes  # as where it is wrapped
    assert accuracy(model, [(logits * float("nan"), labels[:10])]) == {"top1": 0, "top5": 0, "images": 10}
    with pytest.raises(DataError, match="1 of 10 labels are of no class; expected 0 to 9"):
        accuracy(model, [(logits, torch.arange(1, 11))])


def test_evaluation_leaves_each_part_of_a_model_in_its_mode():
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.BatchNorm1d(12), torch.nn.Linear(12, 3))
    model[1].eval()  # frozen statistics
    modes = [module.training for module in model.modules()]
    correct(model, torch.randn(4, 3, 2, 2), torch.zeros(4).long())
    with pytest.raises(RuntimeError):
        correct(model, torch.randn(4, 3, 2, 3), torch.zeros(4).long())
    assert [module.training for module in model.modules()] == modes == [True, True, False, True]


def process_state():
    dtype, env = torch.get_default_dtype(), dict(os.environ)
    strict = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    handlers = [signal.getsignal(number) for number in SIGNALS]
    random_ = random.getstate(), numpy.random.get_state()[1].tolist(), torch.get_num_threads()
    return dtype, env, strict, handlers, random_, torch.backends.cudnn.benchmark, [*warnings.filters]


@pytest.mark.parametrize("deterministic", [False, True])
def test_a_run_is_the_same_whatever_the_process_has_set_and_leaves_that_as_it_was(
    deterministic, image_folder
):
    config = small_run(image_folder, deterministic=deterministic, steps=4)
    options = {"seed": 0, "global_batch_size": 8, "augment": config.augment}
    expected, batch = train(config).history, make_loader(config.data, **options).batch(0)
    try:
        torch.set_default_dtype(torch.float64)
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.backends.cudnn.benchmark = True
        before, found = process_state(), train(config).history
        assert process_state() == before and found == expected
        assert all(map(torch.equal, make_loader(config.data, **options).batch(0), batch))
    finally:
        torch.set_default_dtype(torch.float32)
        torch.use_deterministic_algorithms(False)
        torch.backends.cudnn.benchmark = False
    limits = torch._dynamo.config.recompile_limit
    with settings(RunConfig(compile="model")):
        assert torch._dynamo.config.recompile_limit == 1024
    assert torch._dynamo.config.recompile_limit == limits


def test_a_model_comes_back_as_it_was_saved(tmp_path):
    run = train(tiny_run("learned + sine + relative + rotary + peg", out=str(tmp_path / "run")))
    model, config, *_ = load_saved(tmp_path / "run" / "model.safetensors")
    assert config == run.config
    images = torch.rand(2, 3, 6, 8)
    with torch.no_grad():
        assert torch.equal(model(images), run.model(images))
    log = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert "config" in log[0] and log[-1]["top1"] == run.metrics["top1"]
    with pytest.raises(OSError), mock.patch("os.fsync", side_effect=OSError):
        save_model(tmp_path / "run" / "model.safetensors", model, config)  # which leaves the older file
    load_saved(tmp_path / "run" / "model.safetensors")
    denied = PermissionError(13, "Permission denied")
    with pytest.raises(ConfigError, match="Permission denied"), mock.patch("io.open", side_effect=denied):
        load_saved(tmp_path / "run" / "model.safetensors")
    (tmp_path / "model.safetensors").write_bytes(b"not a model")
    with pytest.raises(ConfigError, match="cannot be read"):
        load_saved(tmp_path / "model.safetensors")


SMALL = "--data where --data.grid 6 6 --model.patch-size 1 --model.width 8 --model.depth 1 --model.heads 1".split()


def test_train_and_evaluate_from_the_command_line(tmp_path, capsys):
    steps = "--optim.steps 3 --optim.global_batch_size 4 --data.test-size 20 --run.device cpu".split()
    status, out, err = run_cli(capsys, "train", *SMALL, *steps, "--run.out", tmp_path)
    assert status == 0 and "done: 3 steps" in out and "top1" in out, err
    saved = tmp_path / "model.safetensors"
    status, out, err = run_cli(capsys, "evaluate", saved, "--sizes", "6", "9", "--device", "cpu")
    assert status == 0 and "where 6x6  top1" in out and "where 9x9  top1" in out, err


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ("trian", "did you mean train"),
        ("train --model cpvt_tny", "did you mean cpvt_tiny"),
        ("train --recipe dei", "did you mean deit"),
        ("train --data nowhere", "no folder and no data set 'nowhere'"),
        ("train --run.device tpu", "device='tpu'"),
        ("train --data where --data.grid 5 5", "multiples of the patch size"),
        ("evaluate nothing.safetensors", "cannot be read"),
        ("experiments synthetics", "did you mean synthetic"),
        ("experiments --only core", "no only"),
        ("experiments photographs --list --budget-minutes 3", "no budget_minutes"),
        ("experiments photographs --list --out x", "no out"),
        ("experiments photographs --device cpu", "'photographs' has no device"),
        ("experiments baselines --budget-minutes 3", "no budget_minutes"),
        ("experiments baselines --list", "no list"),
        ("experiments costs --root images", "'costs' has no root"),
        ("experiments synthetic --only core", "no only"),
        ("benchmark --size cpu --only stepp", "no part 'stepp'"),
    ],
)
def test_wrong_input_gets_one_line(arguments, expected, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    status, out, err = run_cli(capsys, *arguments.split())
    assert status == 2 and expected in err and err.count("\n") == 1 and not out, err
    assert not list(tmp_path.iterdir())  # nothing half-written


def test_what_is_no_option_is_explained_by_tyro(capsys):
    for words in (
        "train --optim.learning-rate 1",
        "pack DOWNLOADS imagenet --shards 4",
        "evaluate x --model y",
    ):
        status, _, err = run_cli(capsys, *words.split())
        assert status == 2 and words.split()[-2] in err and "Traceback" not in err


def test_help_is_there_before_torch():
    """And whoever imports the package finds OpenMP told to wait passively, unless the user says otherwise."""
    code = "import os, runpy, sys, cpvt; policy = os.environ['OMP_WAIT_POLICY']; "
    code += "runpy.run_module('cpvt', run_name='__main__'); print(sorted(sys.modules)); print(policy)"
    environment = {k: v for k, v in os.environ.items() if k != "OMP_WAIT_POLICY"}
    for given, expected in ({}, "PASSIVE"), ({"OMP_WAIT_POLICY": "ACTIVE"}, "ACTIVE"):
        command, options = [sys.executable, "-c", code], {"env": {**environment, **given}, "text": True}
        said = subprocess.run(command, stdout=subprocess.PIPE, check=True, **options).stdout
        *_, modules, policy = said.splitlines()
        assert policy == expected and said.startswith("usage: cpvt COMMAND")
        assert not {"torch", "timm", "torchvision", "numpy", "pandas"} & set(ast.literal_eval(modules))
    assert all(f"\n  {command} " in said for command in cli.COMMANDS)


REAL = "--data {folder} --data.image-size 16 --model.patch-size 4 --model.width 16 --model.depth 1 --model.heads 1"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ("{real} --model.num_classes=7", "model.num_classes=7, but the data has 3"),
        ("{real} --model.image-size 32 16", "model.image_size=(32, 16), but the data has (16, 16)"),
        ("{real} --data.grid 8 8", "data.grid=(8, 8): no effect"),
        ("{real} --data.root elsewhere", "data.root='elsewhere': no effect"),
        ("{real} --data.decode cpu", "data.decode='cpu': no effect"),
        ("{real} --optim.steps 3 --optim.warmup-steps 4", "warm-up of 4 steps, longer than the run of 3"),
        ("{real} --optim.epochs 1 --optim.warmup-epochs 2", "longer than the run"),
        ("{real} --run.freeze 2", "run.freeze=2"),
        ("--data what --data.image-size 32", "data.image_size=32: no effect"),
        ("--data what --model.num-classes 4 --model.patch-size 1", "model.num_classes=4, but the data has 2"),
        ("--data {one} --optim.global-batch-size 8", "one class, nothing to learn"),
    ],
)
def test_what_is_given_acts_or_is_refused(options, words, image_folder, tmp_path, capsys):
    """In one line, and nothing is left behind; also where the value is what it is by default."""
    for split in ("train", "val"):
        shutil.copytree(image_folder / split / "n00000001", tmp_path / "one" / split / "n00000001")
    filled = {"folder": image_folder, "one": tmp_path / "one"}
    options = options.format(real=REAL.format(**filled), **filled).split()
    options += ["--run.out", tmp_path / "out", "--run.device", "cpu"]
    status, out, err = run_cli(capsys, "train", *options)
    assert status == 2 and words in err and err.count("\n") == 1 and not out, err
    assert not [file for file in (tmp_path / "out").rglob("*") if file.name != ".lock"]


def test_a_warm_up_in_steps_acts_beside_epochs_and_a_long_one_is_told(image_folder, capsys):
    options = REAL.format(folder=image_folder) + " --optim.global-batch-size 8 --run.device cpu"
    options += " --optim.epochs 1 --run.log-every 1 --optim.min-lr 0.001"  # nine steps
    for length, more, said in ((50, "", "warm-up of 50 steps, longer than the run of 9"), (4, "4", "")):
        more = ["--optim.warmup-steps", more] if more else []
        status, out, err = run_cli(capsys, "train", *options.split(), *more)
        found = [float(line.split("  lr ")[1].split()[0]) for line in out.splitlines() if "  lr " in line]
        assert not status and said in out and ("longer" in out) == bool(said), err
        assert found == pytest.approx([0.001 * min(1, (step + 1) / length) for step in range(9)], rel=1e-4)


def test_an_operator_that_is_not_deterministic_is_named(monkeypatch):
    said = "upsample_cuda does not have a deterministic implementation, but you set 'torch.use_..."
    monkeypatch.setattr(VisionTransformer, "forward", mock.Mock(side_effect=RuntimeError(said)))
    words = "^run.deterministic: upsample_cuda has no deterministic impl.*; run without"
    with pytest.raises(TrainingError, match=words):
        train(tiny_run())
