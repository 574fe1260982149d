"""`cpvt benchmark`: its stop-watch for loaders, its files, unequal gradients, a whole run in small."""

import dataclasses
import json
import re
import subprocess
import sys
from contextlib import closing
from itertools import chain, repeat
from unittest import mock

import pytest
import torch
import tyro
from helpers import draw_images, needs_gpu
from torch import nn

from cpvt.cli import Experiments, main
from cpvt.config import TrainConfig
from cpvt.lab import benchmark
from cpvt.lab.benchmark import AGREE, CPU, ENCODINGS, MODES, MORE, PARTS, Bench, Benchmark, draw_jpeg, joined
from cpvt.lab.results import read, select
from cpvt.model.vit import VisionTransformer
from cpvt.training.recipes import deit


@pytest.mark.parametrize("loading, stepping, rate", [(0.25, 0.0, 40), (0.25, 0.75, 10), (0.0, 0.5, 20)])
def test_images_a_second_of_a_loader(loading, stepping, rate):
    now = [0.0]

    def wait(seconds):
        now[0] += seconds
        return torch.zeros(10, 1), torch.zeros(10)

    batches = map(wait, chain([100], repeat(loading)))  # the first is slow, as processes start: not counted
    found = benchmark.rate(batches, 5, "cpu", lambda *batch: wait(stepping), lambda: now[0])
    assert found == pytest.approx(rate)


def test_small_batches_are_joined_and_a_drawn_jpeg_is_as_large_as_imagenets():
    """Files of 500 x 400 pixels have about 110 KB: what a decoder reads decides its speed."""
    pieces = [(torch.tensor([[i]]), torch.tensor([i])) for i in range(5)]
    stream = joined(pieces, 2)
    images, targets = zip(*(next(stream) for _ in range(5)), strict=True)
    assert torch.cat(targets).tolist() == [0, 1, 2, 3, 4] * 2  # epochs follow each other
    assert torch.equal(torch.cat(images)[:, 0], torch.cat(targets))
    drawn = [draw_jpeg(i, 400, 500) for i in range(4)]
    assert len(set(drawn)) == 4 and drawn[1] == draw_jpeg(1, 400, 500)
    assert 90_000 < sum(map(len, drawn)) / 4 < 130_000


@pytest.mark.parametrize("given, count", [(True, 12), (False, 8)])
def test_which_files(tmp_path, given, count):
    data = str(draw_images(tmp_path / "data", 4, 1)) if given else ""
    files = benchmark.open_files(data, tmp_path, CPU)
    assert len(files) == len(files.labels) == count and files[0][0].shape[0] == 3


def test_unequal_gradients_give_no_ratio(monkeypatch):
    """To rounding they are equal in double precision; one part in a million on one side is refused."""
    bench, forward = Bench(CPU, "cpu"), VisionTransformer.forward
    assert benchmark.gradient_error(bench) < AGREE < 1e-8
    off = lambda self, x, k=None: forward(self, x, k) * (1 + 1e-6)  # noqa: E731
    monkeypatch.setattr(VisionTransformer, "forward", off)
    with pytest.raises(FloatingPointError, match="gradients differ from timm's by"):
        next(benchmark.step(bench))


def test_compiled_steps_side_by_side(monkeypatch, capsys):
    """Every mode of timm's model that works; ours compared to its fastest; what no longer fits is named."""

    broken = mock.Mock(side_effect=RuntimeError("no such kernel"))
    backends, compile_with = dict(zip(MODES, ("eager", "eager", broken), strict=True)), nn.Module.compile
    quick = lambda self, mode: compile_with(self, backend=backends[mode])  # noqa: E731
    monkeypatch.setattr(nn.Module, "compile", quick)
    monkeypatch.setattr(benchmark, "ENCODINGS", ("none", "peg"))
    size = dataclasses.replace(CPU, rounds=1, modes=MODES, model={**CPU.model, "depth": 1}, entrant=100.0)
    found = [*benchmark.step(Bench(size, "cpu"))]
    rows = {tuple(columns.values())[1:]: (metrics, told) for columns, metrics, told in found}
    assert rows.keys() == {("timm", MODES[0]), ("timm", MODES[1]), ("none", MODES[0]), ("peg", MODES[0])}
    best = rows["peg", MODES[0]][1]["ratio_to"]
    speeds = {mode: rows["timm", mode][0]["images_per_s"] for mode in MODES[:2]}
    assert best == max(speeds, key=speeds.get) and rows["timm", best][0]["ratio/min"] == 1
    assert "no such kernel" in capsys.readouterr().out
    torch.compiler.reset()


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """`cpvt benchmark` without a GPU: the rows."""
    out, data = tmp_path_factory.mktemp("results"), tmp_path_factory.mktemp("data")
    draw_images(data / "jpegs", 4, 1)
    words = ["benchmark", "--size", "cpu", "--out", str(out), "--data", str(data / "jpegs")]
    main(words)
    main([*words, "--only", "attention", "encodings", "trap"])
    return read("benchmark", out)


def test_every_part_leaves_its_rows(run):
    assert set(run.part) == {*PARTS, *MORE} - {"bytes"}
    assert [*run[run.part == "step"].model] == ["timm", *ENCODINGS]
    pipelines = run[run.part == "pipeline"]
    assert {*zip(pipelines.loader, pipelines.model, strict=True)} == {
        (loader, fed) for loader in ("cpvt", "timm") for fed in ("", "peg")
    }
    assert (run.scale == "seconds").all() and (run.device == "cpu").all()  # nobody takes it for a GPU's
    assert {*run.dataset} == {"noise", "jpegs"}  # a name, not somebody's path
    ratio = run.dropna(subset="ratio")
    assert (ratio["ratio/min"] <= ratio.ratio).all() and (ratio.ratio <= ratio["ratio/max"]).all()
    assert (select(run, part="step", model="peg", mode="eager").gradient_error < AGREE).all()


def test_gradients_are_compared_with_double_precision(run):
    """Rounding to bfloat16 shows, and nothing larger; a PEG's kernels are looked at on every road of the trap."""
    rows = run[run.part.isin(["encodings", "trap"])]
    assert (rows.gradient_error > 1e-4).all() and (rows.gradient_error < 0.05).all()
    found = rows[rows.part == "trap"]
    assert len(found) == 4 and found["gradient_error/peg"].notna().all() and found.loss.notna().all()


def test_one_after_the_other_whatever_fails(tmp_path, capfd, monkeypatch):
    """A part that fails, one that hangs and one that works, each in a process of its own."""
    real, slow = benchmark.command, [sys.executable, "-c", "import time; time.sleep(60)"]
    broken = [sys.executable, "-c", "print('so far'); raise RuntimeError('CUDA error: an illegal address')"]
    strange = {"attention": broken, "trap": slow}
    monkeypatch.setattr(benchmark, "command", lambda name, *rest: strange.get(name) or real(name, *rest))
    monkeypatch.setitem(benchmark.ORDER, "trap", 0.5)
    with pytest.raises(SystemExit) as left:
        Benchmark(out=tmp_path, size="cpu", all=True, only=("attention", "trap", "train", "peg"))()
    said = capfd.readouterr().out
    assert "RuntimeError: CUDA error: an illegal address" in said and "stopped after 0 s" in said
    assert re.search(r"train +\d+ s  done", said) and re.search(r"peg +\d+ s  done", said)
    assert left.value.code == 1 and [*read("benchmark", tmp_path).part] == ["peg"]


def test_what_a_part_runs_is_understood(tmp_path):
    """Every command of --all, without running it."""
    given = Benchmark(out=tmp_path, size="cpu")
    for name in benchmark.ORDER:
        words = benchmark.command(name, given, str(tmp_path), 1.0)[2:]
        assert words[0] == ("pytest" if name == "tests" else "cpvt")
        if words[1] == "benchmark":
            assert tyro.cli(Benchmark, args=words[2:]).only == (name,)
        elif words[1] == "experiments":
            assert tyro.cli(Experiments, args=words[2:]).budget_minutes == 1.0
        elif words[1] == "train":
            assert tyro.cli(TrainConfig, args=words[8:], default=deit("cpvt_tiny_5peg")).optim.steps == 6


@pytest.mark.skipif(not torch.backends.cuda.is_built(), reason="needs PyTorch's compiler for GPUs")
def test_bytes_of_a_step():
    """Counted without a GPU. A PEG adds 5 S, S being the bytes of the tokens, and up to 4 S for sums that are no
    longer fused; tokens in bfloat16 save. A process of its own: the compiler remembers the GPU."""
    script = """
import dataclasses, json
from cpvt.lab import benchmark
benchmark.FIVE = "peg(positions=(0, 1))"
size = dataclasses.replace(benchmark.CPU, batch_size=256, model={**benchmark.SMALL, "depth": 3})
print(json.dumps([*benchmark.count_bytes(benchmark.Bench(size, "cpu"))]))"""
    done = subprocess.run([sys.executable, "-c", script], check=True, timeout=300, stdout=subprocess.PIPE)
    rows = json.loads(done.stdout)
    count = {(c["model"], c["mode"]): 1e9 * sum([*metrics.values()][:2]) for c, metrics, _ in rows}
    two, S = "peg(positions=(0, 1))", 256 * 17 * CPU.model["width"] * 4
    for tokens, size in (("", S), ("bf16 tokens", S / 2)):
        assert 5 <= (count[two, tokens] - count["peg", tokens]) / size <= 9
    assert all(count[model, "bf16 tokens"] < 0.95 * count[model, ""] for model in ("none", "peg", two))
    assert count["none", ""] < count["timm", ""] and rows[0][1]["ratio"] == 1


def test_both_loaders_give_a_step_its_batch(tmp_path):
    files = benchmark.open_files("", tmp_path, CPU)
    bench = Bench(CPU, "cpu", files.select(torch.arange(64) % len(files)))
    for loader in benchmark.LOADERS.values():
        with closing(loader(bench)) as batches:
            images, targets = next(batches)
        assert images.shape == (CPU.batch_size, 3, 32, 32)
        assert torch.allclose(targets.sum(1), torch.ones(CPU.batch_size))


def test_what_does_not_fit_is_named(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(benchmark, "CPU", dataclasses.replace(CPU, entrant=60.0))
    Benchmark(out=tmp_path, size="cpu", budget_minutes=0.5, only=("peg", "step"))()
    said = capsys.readouterr().out
    assert "budget: peg" in said and "budget: step" in said and not (tmp_path / "benchmark.jsonl").exists()


@needs_gpu
def test_small_on_a_gpu(tmp_path):
    """The paths that only a GPU takes: streams, peak memory, both loaders."""
    small = dataclasses.replace(CPU, batch_size=64)
    files = benchmark.open_files("", tmp_path, small)
    bench = Bench(small, "cuda", files.select(torch.arange(4096) % len(files)))
    for part in PARTS.values():
        assert all(metrics for _, metrics, _ in part(bench))
