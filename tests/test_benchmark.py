"""`cpvt benchmark`: its stop-watches, its files, its refusal of unequal gradients, and a whole run in small."""

import dataclasses
from contextlib import closing
from functools import partial
from pathlib import Path

import pytest
import torch
from pictures import draw_pictures
from torch import nn

from cpvt.cli import main
from cpvt.data.datasets import open_dataset
from cpvt.data.decode import decode_image
from cpvt.errors import ConfigError, DataError
from cpvt.lab import benchmark, timing
from cpvt.lab.benchmark import Benchmark, drain, feed, joined, our_batches, timm_batches
from cpvt.lab.jpegs import Repeated, draw_jpeg, jpeg_decoder, prepare
from cpvt.lab.results import recorded
from cpvt.lab.steps import AGREE, CPU, ENCODINGS, GPU, MODES, TIMM, Bench, Budget, gradient_error, race
from cpvt.lab.timing import each_compiled
from cpvt.model.vit import VisionTransformer

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.fixture
def clock(monkeypatch):
    """A clock that only moves when it is told to."""

    class Clock:
        now = 0.0

        def __call__(self):
            return self.now

        def passes(self, seconds):
            self.now += seconds

    clock = Clock()
    monkeypatch.setattr(timing.time, "perf_counter", clock)
    monkeypatch.setattr(timing.time, "monotonic", clock)
    return clock


def batches(clock, seconds, size=10):
    while True:
        clock.passes(seconds)
        yield torch.zeros(size, 1), torch.zeros(size)


# --------------------------------------------------------------------------- stop-watches


def test_a_part_of_the_budget_can_be_held_back(clock):
    budget = Budget(10, until=0.5, clock=clock)
    assert budget.allows(300) and not budget.allows(301)
    clock.passes(200)
    assert budget.allows(100) and not budget.allows(101)
    budget.until = 1.0
    assert budget.allows(400) and not budget.allows(401)
    assert Budget(0).allows(1e9)
    for minutes in (-1.0, float("inf"), float("nan")):
        with pytest.raises(ConfigError, match="budget_minutes"):
            Budget(minutes)


def test_a_loader_alone(clock):
    """Ten images in a quarter of a second; a slow first batch, as processes start, is not counted."""

    def slow_start():
        clock.passes(100)
        yield from batches(clock, 0.25)

    assert drain(slow_start(), 5, "cpu") == 40
    assert drain(slow_start(), 5, "cpu", warm=0) == 40


@pytest.mark.parametrize("loading, stepping", [(0.25, 0.75), (0.5, 0.0), (0.0, 0.5)])
def test_idle_is_the_time_spent_waiting_for_images(clock, loading, stepping):
    rate, idle = feed(batches(clock, loading), lambda *batch: clock.passes(stepping), 10, "cpu")
    assert rate == pytest.approx(10 / (loading + stepping))
    assert idle == pytest.approx(loading / (loading + stepping))


def test_small_batches_are_joined_without_loss():
    pieces = [(torch.tensor([[i]]), torch.tensor([i])) for i in range(5)]
    stream = joined(pieces, 2)
    images, targets = zip(*(next(stream) for _ in range(5)), strict=True)
    assert torch.cat(targets).tolist() == [0, 1, 2, 3, 4] * 2  # epochs follow each other
    assert torch.equal(torch.cat(images)[:, 0], torch.cat(targets))


# --------------------------------------------------------------------------- files


def test_a_drawn_jpeg_is_as_large_as_imagenets():
    """ImageNet's files of 500 x 400 pixels have about 110 KB: what a decoder reads decides its speed."""
    drawn = [draw_jpeg(i, 400, 500) for i in range(4)]
    assert len(set(drawn)) == 4 and drawn[1] == draw_jpeg(1, 400, 500)
    assert 90_000 < sum(map(len, drawn)) / 4 < 130_000


@pytest.mark.parametrize("given", ["folder", "loose", "nothing"])
def test_files_and_the_same_shrunk(tmp_path, given):
    """Shards for us, files for timm: the same bytes. Drawn or given, as a data set or loose."""
    data = tmp_path / "data"
    if given == "folder":
        draw_pictures(data, 4, 1)
    if given == "loose":
        data.mkdir()
        for i in range(4):
            (data / f"{i}.JPEG").write_bytes(draw_jpeg(i, 30, 50))
    count = {"folder": 12, "loose": 4, "nothing": 3}[given]
    name = "" if given == "nothing" else str(data)
    sources = prepare(name, tmp_path / "work", 12 if name else 3, (40, 50), 16, 100, 10)
    assert sources["files"][0] is sources["files"][1] and len(sources["files"][0]) == 100
    assert len(sources["files"][0].contents) == count
    ours, theirs = sources["shrunk"]
    assert sorted(ours.contents) == sorted(theirs.contents) and ours.mean_bytes == theirs.mean_bytes
    assert ours.mean_bytes < sources["files"][0].mean_bytes
    sizes = open_dataset(tmp_path / "work" / "shrunk").sizes
    assert sizes.amin(1).tolist() == [16] * count


def test_a_few_files_fill_an_epoch(tmp_path):
    draw_pictures(tmp_path, 2, 1)
    source = open_dataset(tmp_path)
    repeated = Repeated(source, 20, tuple("abc"))
    assert repeated.labels.bincount().tolist() == [8, 6, 6]
    for i in (0, 5, 6, 19):
        assert repeated.read(i) == source.read(i % 6) and int(repeated.labels[i]) == source.labels[i % 6]


def test_no_jpegs_is_one_line(tmp_path):
    with pytest.raises(DataError, match="holds no JPEGs: give a folder"):
        prepare(str(tmp_path), tmp_path / "work", 4, (8, 8), 4, 8, 2)


# --------------------------------------------------------------------------- steps


def bench(out=Path("unused"), device="cpu", **changes) -> Bench:
    return Bench(dataclasses.replace(CPU, **changes), device, Budget(0), out)


def test_gradients_agree_with_timms():
    """To rounding in double precision. The bound is far below anything that a bug could hide behind."""
    assert gradient_error(bench()) < AGREE < 1e-8


def test_unequal_gradients_give_no_ratio(tmp_path, monkeypatch):
    """One part in a million on the logits of one side: refused, and no row is written."""
    forward = VisionTransformer.forward
    monkeypatch.setattr(
        VisionTransformer, "forward", lambda self, x, k=None: forward(self, x, k) * (1 + 1e-6)
    )
    with pytest.raises(FloatingPointError, match="gradients of deit_tiny differ from timm's by"):
        benchmark._step(bench(tmp_path))
    assert not list(tmp_path.iterdir())


def test_a_race_of_compiled_models(tmp_path, monkeypatch, capsys):
    """Every mode of timm's model that works; ours compared to its fastest; what no longer fits is named."""

    def broken(graph, inputs):
        raise RuntimeError("no such kernel")

    backends, compile_with = dict(zip(MODES, ("eager", "eager", broken), strict=True)), nn.Module.compile
    quick = lambda self, mode: compile_with(self, backend=backends[mode])  # noqa: E731
    monkeypatch.setattr(nn.Module, "compile", quick)
    model = {**CPU.model, "depth": 1}
    desk = bench(tmp_path, compiles=True, model=model, compiling=100.0)
    names = ("no encoding", "cpvt_tiny")
    with each_compiled():
        race(desk, "step", True, names, {"gradient_error": 0.0})
    rows = {row.columns["row"]: row for row in desk.rows}
    assert set(rows) == {f"step: {TIMM}, {mode}" for mode in ("eager", *MODES[:2])} | {
        f"step: {name}, default" for name in names
    }
    best = rows["step: cpvt_tiny, default"].config["ratio_to"]
    rates = {name: row.metrics["images_per_s"] for name, row in rows.items() if TIMM in name}
    assert max(rates, key=rates.get) == f"step: {best}" and rows[f"step: {best}"].metrics["ratio/min"] == 1
    assert desk.trained.mode == "default"
    costs = [row.columns["row"] for row in desk.rows if "cost_percent" in row.metrics]
    assert costs == ["step: cpvt_tiny, default"]

    assert "no such kernel" in capsys.readouterr().out

    desk.budget = Budget(1)  # less than one compilation is said to take
    race(desk, "step", True, names, {})
    said = capsys.readouterr().out
    assert "not measured: budget: step: cpvt_tiny, default" in said and f"{TIMM}, eager" not in said
    torch.compiler.reset()


# --------------------------------------------------------------------------- the whole


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """`cpvt benchmark` without a GPU: what was printed, and the rows."""
    out = tmp_path_factory.mktemp("results")
    data = draw_pictures(tmp_path_factory.mktemp("data") / "pictures", 4, 1)
    with pytest.MonkeyPatch.context() as patch:
        said: list[str] = []
        patch.setattr("builtins.print", lambda *words, **options: said.append(" ".join(map(str, words))))
        main(["benchmark", "--size", "cpu", "--out", str(out), "--data", str(data)])
    return "\n".join(said), {row.columns["row"]: row for row in recorded("benchmark", out)}


def test_every_part_leaves_its_rows(run):
    said, rows = run
    expected = {f"step: {name}, eager" for name in (TIMM, *ENCODINGS)}
    expected |= {f"inference: {name}, eager" for name in (TIMM, "deit_tiny", "cpvt_tiny", "cpvt_tiny_5peg")}
    expected |= {
        f"pipeline: {side}, {kind}, {how}"
        for side in ("ours", "timm")
        for kind in ("files", "shrunk")
        for how in ("loader alone", "feeding cpvt_tiny")
    }
    expected |= {"memory: copy", "teacher: regnety_002, eager"}
    assert set(rows) == expected
    assert all(f"\n{name}  " in said for name in expected) and f"{len(expected)} rows" in said  # the table


def test_rows_say_how_small_they_are(run):
    """Nobody shall take a CPU's figures for the table's."""
    for row in run[1].values():
        assert (row.scale, row.device) == ("seconds", "cpu")
        assert row.config["batch"] == CPU.batch and row.config["precision"] == "fp32"
        assert "/" not in row.dataset  # a name, not somebody's path


def test_rows_hold_what_the_comparison_asks_for(run):
    rows = run[1]
    for name, row in rows.items():
        if "ratio" in row.metrics:
            low, middle, high = (row.metrics[f"ratio{end}"] for end in ("/min", "", "/max"))
            assert 0 < low <= middle <= high
        if name.startswith("pipeline"):
            rate, size = row.metrics["images_per_s"], row.metrics["bytes_per_image"]
            assert row.metrics["megabytes_per_s"] == pytest.approx(rate * size / 1e6)
            assert row.metrics["disk_megabytes_per_s"] == pytest.approx(rate * size / 3e6)
            assert row.config["workers"] >= 1 and row.config["page_cache"]
        if "feeding" in name:
            assert 0 <= row.metrics["idle_percent"] <= 100
    assert rows["step: deit_tiny, eager"].metrics["gradient_error"] < AGREE
    assert rows["step: cpvt_tiny, eager"].encoding == "peg"
    assert 0 < rows["teacher: regnety_002, eager"].metrics["share_percent"] < 100


def test_ours_and_timms_files_are_the_same(run):
    files = [row for name, row in run[1].items() if ", files," in name]
    assert len(files) == 4 and len({row.dataset_sha256 for row in files}) == 1
    shrunk = [row for name, row in run[1].items() if ", shrunk," in name]
    assert len(shrunk) == 4 and len({row.metrics["bytes_per_image"] for row in shrunk}) == 1


def test_both_loaders_give_a_step_its_batch(tmp_path):
    desk = bench()
    desk.sources = prepare("", tmp_path, 4, (40, 50), 20, 64, 10)
    for loader, source in zip((our_batches, timm_batches), desk.sources["shrunk"], strict=True):
        with closing(loader(desk, source)) as stream:
            batch = next(stream)
        assert [part.shape for part in batch] == [part.shape for part in desk.noise()]
        assert torch.allclose(batch[1].sum(1), torch.ones(CPU.batch))


@pytest.mark.parametrize("device, stands_in", [("cpu", "Pillow, CPU"), ("cuda", "torchvision, GPU")])
def test_without_torchcodec_rows_say_so(tmp_path, device, stands_in):
    desk = bench(tmp_path)
    desk.decoder, decode_jpegs = jpeg_decoder(device, None)
    assert (decode_jpegs is not None) == (device == "cuda")
    benchmark._memory(desk)
    assert desk.rows[0].config["decoder"] == f"{stands_in}: torchcodec is missing"


@pytest.mark.filterwarnings("ignore:The image decoding")
def test_what_stands_in_for_torchcodec_decodes_the_same_picture():
    jpeg = draw_jpeg(0, 40, 50)
    stand_in = partial(jpeg_decoder("cuda", None)[1], device="cpu")
    (found,) = stand_in([torch.frombuffer(bytearray(jpeg), dtype=torch.uint8)])
    assert (found.int() - decode_image(jpeg).int()).abs().max() <= 3


def test_what_does_not_fit_is_named(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(benchmark, "CPU", dataclasses.replace(CPU, least=60.0))
    Benchmark(out=tmp_path, size="cpu", budget_minutes=0.5, only=("step", "memory"))()
    said = capsys.readouterr().out
    assert (
        "not measured: budget: step" in said and "not measured: budget: memory" in said and "0 rows" in said
    )


def test_an_unknown_part_is_one_line(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["benchmark", "--size", "cpu", "--only", "stepp"])
    assert stop.value.code == 2 and "no part 'stepp'" in capsys.readouterr().err


def test_the_gpus_sizes_are_the_papers():
    """The goals are stated at batch 1024 and 224 pixels."""
    assert GPU.batch == 1024 and not GPU.model and GPU.batch % GPU.loader_batch == 0
    desk = Bench(GPU, "cpu", Budget(0), Path("unused"))
    assert desk.side == 224 and desk.model("peg").drop_path == 0.1 and desk.recipe.augment.repeated_aug == 3


@needs_gpu
def test_small_on_a_gpu(tmp_path):
    """The paths that only a GPU takes: events, streams, peak memory, both loaders."""
    desk = bench(tmp_path / "out", device="cuda")
    desk.sources = prepare("", tmp_path, 8, (80, 100), 40, 512, 10)
    for part in (benchmark._step, benchmark._pipeline, benchmark._memory):
        part(desk)
    rows = {row.columns["row"]: row for row in desk.rows}
    assert rows["step: cpvt_tiny, eager"].metrics["gigabytes"] > 0
    assert 0 <= rows["pipeline: ours, files, feeding cpvt_tiny"].metrics["idle_percent"] <= 100
