"""`cpvt benchmark`: its stop-watch for loaders, its files, unequal gradients, a whole run in small."""

import dataclasses
from contextlib import closing
from itertools import chain, repeat

import pytest
import torch
from helpers import draw_images
from torch import nn

from cpvt.cli import main
from cpvt.lab import benchmark
from cpvt.lab.benchmark import AGREE, CPU, ENCODINGS, MODES, PARTS, Bench, Benchmark, draw_jpeg, joined
from cpvt.lab.results import read, select
from cpvt.model.vit import VisionTransformer

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.mark.parametrize("loading, stepping, rate", [(0.25, 0.0, 40), (0.25, 0.75, 10), (0.0, 0.5, 20)])
def test_images_a_second_of_a_loader(loading, stepping, rate):
    now = [0.0]

    def wait(seconds):
        now[0] += seconds
        return torch.zeros(10, 1), torch.zeros(10)

    batches = map(wait, chain([100], repeat(loading)))  # the first is slow, as processes start: not counted
    found = benchmark.rate(batches, 5, "cpu", lambda *batch: wait(stepping), lambda: now[0])
    assert found == pytest.approx(rate)


def test_small_batches_are_joined_without_loss():
    pieces = [(torch.tensor([[i]]), torch.tensor([i])) for i in range(5)]
    stream = joined(pieces, 2)
    images, targets = zip(*(next(stream) for _ in range(5)), strict=True)
    assert torch.cat(targets).tolist() == [0, 1, 2, 3, 4] * 2  # epochs follow each other
    assert torch.equal(torch.cat(images)[:, 0], torch.cat(targets))


def test_a_drawn_jpeg_is_as_large_as_imagenets():
    """Files of 500 x 400 pixels have about 110 KB: what a decoder reads decides its speed."""
    drawn = [draw_jpeg(i, 400, 500) for i in range(4)]
    assert len(set(drawn)) == 4 and drawn[1] == draw_jpeg(1, 400, 500)
    assert 90_000 < sum(map(len, drawn)) / 4 < 130_000


@pytest.mark.parametrize("given, count", [(True, 12), (False, 8)])
def test_which_files(tmp_path, given, count):
    data = str(draw_images(tmp_path / "data", 4, 1)) if given else ""
    files = benchmark.open_files(data, tmp_path, CPU)
    assert len(files) == len(files.labels) == count and files[0][0].shape[0] == 3


# --------------------------------------------------------------------------- steps


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

    def broken(graph, inputs):
        raise RuntimeError("no such kernel")

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


# --------------------------------------------------------------------------- the whole


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """`cpvt benchmark` without a GPU: the rows."""
    out, data = tmp_path_factory.mktemp("results"), tmp_path_factory.mktemp("data")
    draw_images(data / "jpegs", 4, 1)
    main(["benchmark", "--size", "cpu", "--out", str(out), "--data", str(data / "jpegs")])
    return read("benchmark", out)


def test_every_part_leaves_its_rows(run):
    assert set(run.part) == {*PARTS}
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
