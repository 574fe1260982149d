"""`cpvt benchmark`: our training step and our pipeline beside timm's, in one run.

Everything on one GPU in at most ten minutes, compilation included (DIR: a folder with train/CLASS/*.JPEG, shards,
or loose JPEGs):

    cpvt benchmark --data DIR

What no longer fits the budget is named as not measured; `--only` gives such parts a run of their own. Without
tyro, which only the command line needs: python -c "from cpvt.lab.benchmark import Benchmark; Benchmark('DIR')()"

    step       training steps on images of noise: the same batch, autocast, drop path, loss and optimiser, once the
               gradients agree in double precision; what each encoding costs beside none
    pipeline   the whole recipe from JPEG files, ours and timm's `create_loader` with as many workers: the loader
               alone, and feeding the step; from the files as they are, and shrunk beforehand
    memory     what the step's bytes take at the rate of a plain copy: an estimate of the bound
    inference  the forward pass
    teacher    a forward pass of regnety_160 beside the step (random weights: they change no speed)

A teacher's answers are not kept for later runs. They could be: a sample's view is a function of (seed, epoch,
position), so its answer is too, for the same data, recipe and mixing. Of 300 epochs of 1,281,024 samples, the best
guesses take 0.77 GB (2 bytes each), distributions over 1000 classes 770 GB. But each view is seen once, so the
first run pays for every answer all the same; only more students on the same seed would be spared.
"""

from __future__ import annotations

import dataclasses
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from dataclasses import asdict, dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import Literal

import timm
import torch
from torch import Tensor

from cpvt.config import replace
from cpvt.data.decode import find_jpeg_decoder
from cpvt.data.loader import make_loader
from cpvt.errors import ConfigError, nearest
from cpvt.lab.costs import step_bytes
from cpvt.lab.jpegs import Repeated, jpeg_decoder, prepare
from cpvt.lab.results import Result
from cpvt.lab.steps import (
    AGREE,
    CPU,
    ENCODINGS,
    GPU,
    Bench,
    Budget,
    gradient_error,
    race,
)
from cpvt.lab.timing import Step, each_compiled, in_rounds, ratios, seconds_of, summary, wait
from cpvt.lab.timm_baseline import timm_loader
from cpvt.training.distributed import pick_device

LENGTH = 64  # batches in an epoch of repeated files
STARTING = 3.0  # seconds that a loader's processes may take to start
Batches = Iterator[tuple[Tensor, Tensor]]  # images and targets
ALONE, FED = "loader alone", "feeding cpvt_tiny"


# --------------------------------------------------------------------------- loaders


def drain(batches: Batches, seconds: float, device: str, warm: float = 1.0) -> float:
    """Images a second of a loader that nobody slows down, over `seconds` after `warm` seconds and a batch."""
    images = 0
    next(batches)  # processes start, kernels are compiled
    _until(batches, time.perf_counter() + warm)
    wait(device)
    started = time.perf_counter()
    images = _until(batches, started + seconds)
    wait(device)
    return images / (time.perf_counter() - started)


def _until(batches: Batches, end: float) -> int:
    images = 0
    while time.perf_counter() < end:
        images += len(next(batches)[0])
    return images


def feed(
    batches: Batches, step: Callable[[Tensor, Tensor], object], seconds: float, device: str, warm: float = 1.0
) -> tuple[float, float]:
    """-> images a second of a step that these batches feed, and the share of the time it stood idle, 0 to 1.

    Idle is what passes between a step's last kernel and the moment when the next batch is there, on the
    stream of the model, by its own clock; on a CPU what passes in waiting for the next batch.
    """
    waits, images, counting = [], 0, False
    step(*next(batches))
    wait(device)
    started = time.perf_counter()
    end = started + warm
    while True:
        if time.perf_counter() >= end:
            if counting:
                break
            wait(device)
            started, images, counting = time.perf_counter(), 0, True
            end, waits = started + seconds, []
        idle = _mark(device)
        batch = next(batches)
        waits.append((idle, _mark(device)))
        step(*batch)
        images += len(batch[0])
    wait(device)
    total = time.perf_counter() - started
    return images / total, sum(_between(*pair) for pair in waits) / total


def _mark(device: str) -> float | torch.cuda.Event:
    if "cuda" not in device:
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _between(start, end) -> float:
    return end - start if isinstance(start, float) else start.elapsed_time(end) / 1000


def joined(batches: Iterable[tuple[Tensor, Tensor]], count: int) -> Batches:
    """`count` batches as one, without end: the loader's epochs follow each other."""
    images, targets = [], []
    while True:
        for image, target in batches:
            images.append(image)
            targets.append(target)
            if len(images) == count:
                yield torch.cat(images), torch.cat(targets)
                images, targets = [], []


# --------------------------------------------------------------------------- the parts


def _step(bench: Bench) -> None:
    error = gradient_error(bench)
    if not error < AGREE:
        raise FloatingPointError(
            f"gradients of deit_tiny differ from timm's by {error:.2g}, expected less than {AGREE:g}: "
            "no ratio means anything before this is mended"
        )
    race(bench, "step", True, ENCODINGS, {"gradient_error": error})


def _inference(bench: Bench) -> None:
    race(bench, "inference", False, ("deit_tiny", "cpvt_tiny", "cpvt_tiny_5peg"), {})


def _pipeline(bench: Bench) -> None:
    """All loaders in one set of rounds; each starts anew, so that none fills its queues while another is timed."""
    size, idle, measures = bench.size, {}, {}
    feeding = bench.cpvt_step()
    if bench.cuda:  # the kernels of our augmentation are compiled as they are first needed
        with closing(our_batches(bench, bench.sources["files"][0])) as batches:
            seconds_of(partial(next, batches), bench.device, 4)

    def rate(kind: str, alone: bool, side: str) -> float:
        source = bench.sources[kind][side == "timm"]
        with closing(LOADERS[side](bench, source)) as batches:
            if alone:
                return drain(batches, size.seconds, bench.device, size.warm)
            images, waiting = feed(batches, feeding, size.seconds, bench.device, size.warm)
            idle.setdefault((kind, side), []).append(100 * waiting)
            return images

    pair = 2 * (size.seconds + size.warm + STARTING * bench.cuda)
    for number, (kind, alone) in enumerate(product(bench.sources, (True, False)), start=1):
        if bench.budget.allows(number * pair):
            measures |= {(kind, alone, side): partial(rate, kind, alone, side) for side in LOADERS}
        else:
            bench.skip(f"pipeline: {kind}, {ALONE if alone else FED}")
    found = in_rounds(measures, min(size.rounds, 3))
    for (kind, alone, side), rates in found.items():
        source = bench.sources[kind][side == "timm"]
        metrics = summary("images_per_s", rates) | summary("ratio", ratios(rates, found[kind, alone, "timm"]))
        megabytes = metrics["images_per_s"] * source.mean_bytes / 1e6
        metrics |= {"bytes_per_image": source.mean_bytes, "megabytes_per_s": megabytes}
        # The copies of an image follow each other in the stream: a disk is asked once for all of them.
        metrics["disk_megabytes_per_s"] = megabytes / bench.recipe.augment.repeated_aug
        if not alone:
            metrics |= summary("idle_percent", idle[kind, side])
            synthetic = bench.rates.get(f"step: cpvt_tiny, {feeding.mode}")
            metrics |= {"ratio_to_step": metrics["images_per_s"] / synthetic} if synthetic else {}
        name = f"pipeline: {side}, {kind}, {ALONE if alone else FED}"
        _jpeg_row(bench, name, metrics, source, ratio_to="timm", mode=feeding.mode)


def _jpeg_row(bench: Bench, name: str, metrics: dict, source: Repeated, **more) -> None:
    facts = {
        "workers": bench.workers,
        "different_files": len(source.contents),
        "page_cache": True,  # a few files over and over: no disk was read
        "augment": asdict(bench.recipe.augment),
    }
    origin = bench.origin or "JPEGs drawn by formula"
    bench.row(name, metrics, {**facts, **more}, source.bytes_in_order, dataset=origin)


def our_batches(bench: Bench, source: Repeated) -> Iterator[tuple[Tensor, Tensor]]:
    recipe = bench.recipe
    data = replace(recipe.data, image_size=bench.side, workers=bench.workers)
    loader = make_loader(
        data,
        global_batch_size=bench.size.batch,
        seed=0,
        device=bench.device,
        augment=recipe.augment,
        label_smoothing=recipe.optim.label_smoothing,
        open_split=lambda *which: source,
    )
    loader = dataclasses.replace(loader, decode_jpegs=bench.decode_jpegs)
    with closing(loader.train_batches()) as batches:
        for batch in batches:
            yield batch.images, batch.targets


def timm_batches(bench: Bench, source: Repeated) -> Iterator[tuple[Tensor, Tensor]]:
    """As timm's training script has them: mixed where a batch is put together, on the GPU ahead of time."""
    augment, smoothing, size = bench.recipe.augment, bench.recipe.optim.label_smoothing, bench.size
    loader = timm_loader(
        source,
        size.loader_batch,
        bench.side,
        len(source.classes),
        augment,
        smoothing,
        bench.device,
        bench.workers,
        mix_in_workers=True,
    )
    yield from joined(loader, size.batch // size.loader_batch)


LOADERS = {"ours": our_batches, "timm": timm_batches}


def _memory(bench: Bench) -> None:
    """A copy reads and writes each byte."""
    here = torch.zeros(bench.size.copied, dtype=torch.uint8, device=bench.device)
    there, config = torch.empty_like(here), bench.model("learned")
    times = [seconds_of(lambda: there.copy_(here), bench.device, 5, 1) for _ in range(bench.size.rounds)]
    metrics = summary("copy_gigabytes_per_s", [2 * len(here) / seconds / 1e9 for seconds in times])
    bound = 2 * len(here) / min(times) / step_bytes(config)
    metrics |= {"step_megabytes_per_image": step_bytes(config) / 1e6, "bound_images_per_s": bound}
    for label, rate in bench.rates.items():
        if label.startswith("step: ") and "deit_tiny" in label:
            side, mode = "timm" if "timm" in label else "ours", label.rpartition(", ")[2]
            metrics[f"bound_share/{side}/{mode}"] = rate / bound
    bench.row("memory: copy", metrics, {"model": asdict(config)}, here[:1])


def _teacher(bench: Bench) -> None:
    images, targets = bench.noise()
    name = "regnety_160" if bench.cuda else "regnety_002"  # on a CPU the smallest of its family
    runs = {"step": bench.cpvt_step()}
    for mode in ("eager", "default") if bench.size.compiles else ("eager",):
        if mode == "eager" or bench.budget.allows(3 * bench.size.compiling):
            teacher = timm.create_model(name, num_classes=targets.shape[1])
            runs[mode] = Step(teacher, bench.device, mode, training=False)
            runs[mode](images, targets)
        else:
            bench.skip(f"teacher: {name}, {mode}")

    def seconds(run: Step) -> float:
        return seconds_of(partial(run, images, targets), bench.device, bench.size.steps)

    found = in_rounds({mode: partial(seconds, run) for mode, run in runs.items()}, bench.size.rounds)
    for mode in [mode for mode in found if mode != "step"]:
        pairs = list(zip(found[mode], found["step"], strict=True))
        metrics = summary("images_per_s", [len(images) / its for its, _ in pairs])
        metrics |= summary("share_percent", [100 * its / (its + own) for its, own in pairs])
        told = {"teacher": name, "student": "cpvt_tiny", "student_mode": runs["step"].mode}
        bench.row(f"teacher: {name}, {mode}", metrics, told, images[:8])


# A part may go on until this share of the budget is spent; the rest is kept for those that follow.
PARTS: dict[str, tuple[Callable[[Bench], None], float]] = {
    "step": (_step, 0.55),
    "pipeline": (_pipeline, 0.80),
    "memory": (_memory, 0.84),
    "inference": (_inference, 0.97),
    "teacher": (_teacher, 1.0),
}


# --------------------------------------------------------------------------- the command


@dataclass(frozen=True)
class Benchmark:
    """Measure training step, data pipeline and inference beside timm's, in one run of ten minutes on one GPU."""

    data: str = ""  # JPEGs: a folder with train/CLASS/*.JPEG, shards, or loose files; none: drawn by formula
    out: Path = Path("data/results")  # folder of benchmark.jsonl
    budget_minutes: float = 9.0  # begin nothing that would end after this; 0: no limit
    size: Literal["auto", "gpu", "cpu"] = "auto"  # cpu: a small version that takes seconds and proves little
    only: tuple[str, ...] = ()  # some of: step pipeline memory inference teacher; none: all

    def __call__(self) -> None:
        device = pick_device({"auto": "auto", "gpu": "cuda", "cpu": "cpu"}[self.size])
        for name in self.only:
            if name not in PARTS:
                raise ConfigError(f"benchmark: no part {name!r}; {nearest(name, PARTS)}")
        chosen = {name: part for name, part in PARTS.items() if name in self.only or not self.only}
        size = GPU if device == "cuda" else CPU
        bench = Bench(size, device, Budget(self.budget_minutes), self.out, origin=Path(self.data).name)
        try:
            with tempfile.TemporaryDirectory(prefix="cpvt-benchmark-") as folder:
                self._measure(bench, chosen, Path(folder))
        finally:  # whatever went wrong, there may be rows already
            lines = "\n".join(table(bench.rows))
            print(f"\n{lines}\n\n{len(bench.rows)} rows in {self.out}/benchmark.jsonl")

    def _measure(self, bench: Bench, chosen: dict, folder: Path) -> None:
        size = bench.size
        if "pipeline" in chosen:
            length, classes = LENGTH * size.batch, bench.model("none").num_classes
            workers = bench.workers if bench.cuda else 1
            drawn = size.images, size.jpeg, size.short_side
            bench.sources = prepare(self.data, folder, *drawn, length, classes, workers)
        bench.decoder, bench.decode_jpegs = jpeg_decoder(bench.device, find_jpeg_decoder())
        with each_compiled():
            for name, (measure, until) in chosen.items():
                bench.budget.until = 1.0 if self.only else until
                if bench.budget.allows(size.least):
                    print(f"{name} ...", flush=True)
                    measure(bench)
                else:
                    bench.skip(name)


COLUMNS = {"images_per_s": "images/s", "ratio": "to timm", "cost_percent": "cost %", "idle_percent": "idle %"}
COLUMNS |= {"share_percent": "share %", "gigabytes": "GB"}


def table(rows: list[Result]) -> list[str]:
    """Lines: a row each, medians over rounds, and the extremes of the ratio."""
    lines = [f"{'':52}" + "".join(f"{title:>10}" for title in COLUMNS.values()) + "   ratios"]
    for row in rows:
        values = row.metrics
        cells = [_cell(values.get(name)) for name in COLUMNS]
        extremes = f"   {values['ratio/min']:.3f} - {values['ratio/max']:.3f}" if "ratio" in values else ""
        lines.append(f"{row.columns['row']:52}" + "".join(f"{cell:>10}" for cell in cells) + extremes)
        if row.columns["row"].startswith("memory"):
            lines += [f"    {name:46}{value:12.5g}" for name, value in values.items()]
    return lines


def _cell(value: float | None) -> str:
    return "" if value is None else f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
