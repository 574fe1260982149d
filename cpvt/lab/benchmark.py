"""`cpvt benchmark`: our training step and data pipeline beside timm's, in one run; and what to ask of a new GPU.

    cpvt benchmark --data DIR          the first four parts, as far as they fit the budget, compilation included
    cpvt benchmark --all --data DIR    every part but the last, each in a process and a time limit of its own
    cpvt benchmark --bytes             the last: needs no GPU

DIR: a folder with train/CLASS/*.JPEG, or shards. What no longer fits the budget is named; --only gives such parts
a run of their own. A part of --all that fails, or hangs, does not keep the next from running.

    peg       gigabytes a second of the PEG's operator, beside those of a plain copy
    step      training steps on images of noise: the same batch, autocast, drop path, loss and optimiser, once the
              gradients agree in double precision. timm's model in three modes of torch.compile, ours in the first
    decode    JPEGs a second by the decoder alone, by images a call
    pipeline  the whole recipe from the files, ours and timm's `create_loader` with as many workers: the loader
              alone, and feeding the step
    attention the kinds of PyTorch's attention, forward and backward
    encodings whether each compiles; gradients of the compiled bf16 step against double precision
    trap      five PEGs on *where*: do they learn, by which way of computing PEGs, and with which gradients
    train     with --all only: `cpvt train` from files, a few steps
    tests     the same: the repository's tests for a GPU
    photographs  the same: core rows of the book
    bytes     what the kernels of a step read and write, counted (see traffic.py), ours and timm's

For where the time of a step goes, see torch.profiler; for what an encoding costs beside none, `costs.py`.

Letters: B images of a batch, T tokens, D width.
"""

import copy
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from functools import partial
from io import BytesIO
from itertools import chain, islice, product, repeat
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from typing import Literal
from unittest.mock import patch

import numpy
import timm
import torch
import torch.nn.functional as F
from PIL import Image
from timm.data import FastCollateMixup
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils import get_total_norm

from cpvt.config import ModelConfig, TrainConfig
from cpvt.data.datasets import ImageDataset, open_dataset
from cpvt.data.decode import Decoder, find_jpeg_decoder, gpu_decoder
from cpvt.data.loader import make_loader
from cpvt.data.shards import Shards
from cpvt.errors import check_name
from cpvt.lab import experiments, results
from cpvt.lab.experiments import FIVE, KERNEL_27, synthetic_config
from cpvt.lab.results import Result, append, commit, complete, device_name, fingerprint, results_folder
from cpvt.lab.timing import Step, deadline, in_rounds, noise, ratios, seconds_of, summary, wait
from cpvt.lab.timm_baseline import timm_loader, timm_mixup, timm_model
from cpvt.model.encodings import PEG
from cpvt.model.fused_peg import largest_error, peg
from cpvt.model.vit import VisionTransformer
from cpvt.model.zoo import model_config
from cpvt.proven import verdicts
from cpvt.training.distributed import pick_device
from cpvt.training.loss import cross_entropy
from cpvt.training.optim import add_up_biases
from cpvt.training.recipes import deit
from cpvt.training.train import train

# What torch.compile is asked for. Graphs are replayed without Python; autotuning tries many kernels.
MODES = ("default", "reduce-overhead", "max-autotune-no-cudagraphs")
ENCODINGS = ("none", "learned", "peg", FIVE, KERNEL_27, "relative")
AGREE = 1e-9  # largest relative error of a gradient in double precision
Batches = Iterator[tuple[Tensor, Tensor]]  # images and targets
Rows = Iterator[tuple[dict, dict, dict]]  # columns, metrics, and what else the configuration should tell
NOISE = "noise", fingerprint(torch.zeros(0))  # name and SHA-256 of the data of the rows that read no files


@dataclass(frozen=True)
class Size:
    """How much is measured. `model` changes deit_tiny; times are in seconds."""

    scale: str  # of the rows
    batch_size: int
    model: dict
    modes: tuple[str, ...]  # of torch.compile: timm's model in all of them, ours in the first
    widths: tuple[int, ...]  # of PEGs
    rounds: int  # of each comparison
    steps: int  # timed at a stretch
    seconds: float  # for which a loader is timed, after as long a time that is not counted
    drawn: tuple[int, int, int]  # JPEGs, where none are given: how many, height, width
    entrant: float  # seconds that one more entrant takes, compilation included


GPU = Size("minutes", 1024, {}, MODES, (192, 384, 768), 5, 10, 4.0, (256, 400, 500), 40.0)
SMALL = {"image_size": 32, "patch_size": 8, "width": 48, "depth": 6, "num_classes": 10}
CPU = Size("seconds", 8, SMALL, ("eager",), (16,), 2, 1, 0.2, (8, 80, 100), 0.0)


@dataclass
class Bench:
    """What the parts share."""

    size: Size
    device: str
    files: ImageDataset | Shards | None = None  # a few images over and over, an epoch of 64 steps
    end: float = float("inf")  # by the clock

    @property
    def cuda(self) -> bool:
        return "cuda" in self.device

    @property
    def workers(self) -> int:
        """Processes of our loader and of timm's: one a core, 16 at most."""
        return min(len(os.sched_getaffinity(0)), 16)

    def model(self, encoding: str) -> ModelConfig:
        encoding = "learned" if encoding == "timm" else encoding
        return model_config("deit_tiny", encoding=encoding, drop_path=0.1, **self.size.model)

    @property
    def recipe(self) -> TrainConfig:
        """DeiT's, mixed in groups that the batch allows: more groups than copies of an image."""
        recipe, size = deit("cpvt_tiny"), self.model("none").image_size[0]
        group = min(recipe.augment.mix_group, self.size.batch_size // 4)
        data = replace(recipe.data, name="files", image_size=size, workers=self.workers)
        return replace(recipe, augment=replace(recipe.augment, mix_group=group), data=data)

    def fits(self, seconds: float, what: str) -> bool:
        """Whether so many seconds are left; says so where they are not."""
        if time.monotonic() + seconds <= self.end:
            return True
        print(f"not measured: budget: {what}", flush=True)
        return False


# --------------------------------------------------------------------------- one operator, one step


def peg_operator(bench: Bench) -> Rows:
    """(B, 1 + 14 * 14, D) float32, as the stream of tokens is under autocast."""
    for width in bench.size.widths:
        shape = (max(bench.size.batch_size * 192 // width, 1), 197, width)
        shapes, made = (shape, (width, 1, 3, 3), (width,)), {"device": bench.device, "requires_grad": True}
        parts = [torch.randn(each, **made) for each in shapes]
        forward, there, metrics = partial(peg, *parts, 14, 14), torch.empty(shape, device=bench.device), {}
        out = forward()
        backward = partial(torch.autograd.grad, out, parts, torch.ones_like(out), retain_graph=True)
        works = {"copy": partial(there.copy_, parts[0].detach()), "forward": forward, "backward": backward}
        for name, work in works.items():
            moved = 3 if name == "backward" else 2  # times that the tokens are read or written
            metrics[f"{name}_gigabytes_per_s"] = moved * out.nbytes / _seconds(bench, work) / 1e9
        yield {"part": "peg", "size": width}, metrics, {"shape": shape}


def step(bench: Bench) -> Rows:
    """Ratios are to timm's fastest mode, round by round."""
    error = gradient_error(bench)
    if not error < AGREE:
        raise FloatingPointError(f"gradients differ from timm's by {error:.2g}, not below {AGREE:g}")
    first, *others = bench.size.modes
    entrants = [(model, first) for model in ("timm", *ENCODINGS)] + [("timm", mode) for mode in others]
    batch, steps, facts = noise(bench.model("none"), bench.size.batch_size, bench.device), {}, {}
    for model, mode in entrants:
        if bench.fits(bench.size.entrant, f"step: {model}, {mode}"):
            try:
                build = timm_model if model == "timm" else VisionTransformer
                one = Step(build(bench.model(model)), bench.device, mode)
                facts[model, mode] = one.settle(*batch)
                steps[model, mode] = partial(_seconds, bench, partial(one, *batch))
            except RuntimeError as failure:  # one way to compile that fails here must not cost the others
                print(f"not measured: {model}, {mode}: {' '.join(str(failure).split())[:200]}", flush=True)
    times = in_rounds(steps, bench.size.rounds)
    best = min((key for key in times if key[0] == "timm"), key=lambda key: median(times[key]))
    for (model, mode), own in times.items():
        speeds = [bench.size.batch_size / seconds for seconds in own]
        metrics = summary("images_per_s", speeds) | summary("ratio", ratios(times[best], own))
        metrics |= facts[model, mode] | {"gradient_error": error}
        told = {"model": asdict(bench.model(model)), "ratio_to": best[1]}
        yield {"part": "step", "model": model, "mode": mode}, metrics, told


def _seconds(bench: Bench, work: Callable[[], object]) -> float:
    return seconds_of(work, bench.device, bench.size.steps, warm=1)


def gradient_error(bench: Bench) -> float:
    """The largest relative error over the parameters, ours against timm's: on the same weights and images, without
    drop path, in double precision."""
    config = replace(bench.model("learned"), drop_path=0.0)
    ours, theirs = VisionTransformer(config), timm_model(config)
    ours.load_state_dict(theirs.state_dict())
    images, targets = (part[:8].double() for part in noise(config, bench.size.batch_size, bench.device))
    for model in (ours, theirs):
        cross_entropy(model.to(images)(images), targets).backward()
    exact = dict(theirs.named_parameters())
    pairs = [(p.grad, exact[name].grad) for name, p in ours.named_parameters()]
    return largest_error(*zip(*pairs, strict=True))


# --------------------------------------------------------------------------- from the files


def open_files(data: str, folder: Path, size: Size) -> ImageDataset | Shards:
    """The training images of a folder or of shards; without `data`, JPEGs that are drawn into `folder`."""
    count, *shape = size.drawn
    for number in range(0 if data else count):
        file = folder / "train" / f"{number:06}" / "0.jpg"  # each a class of its own
        file.parent.mkdir(parents=True)
        file.write_bytes(draw_jpeg(number, *shape))
    return open_dataset(data or folder, "train")


def draw_jpeg(number: int, height: int, width: int) -> bytes:
    """Image `number` by formula, three waves of colour under noise: with ImageNet's usual bytes a pixel."""
    down, across = numpy.mgrid[:height, :width] / max(height, width)
    turns = 2 * numpy.pi * (number % 7 + 1)
    waves = [numpy.sin(turns * (down * a + across * b)) for a, b in ((1, 0), (0, 1), (1, 1))]
    grain = numpy.random.default_rng(number).normal(0, 18, (height, width, 1))
    pixels, file = 128 + 60 * numpy.stack(waves, axis=2) + grain, BytesIO()
    Image.fromarray(pixels.clip(0, 255).astype(numpy.uint8)).save(file, "JPEG", quality=90)
    return file.getvalue()


def decoder_name(device: str) -> str:
    """What decodes our JPEGs, and where."""
    on_gpu = device == "cuda" and gpu_decoder(device)[0]
    return f"{'torchcodec' if find_jpeg_decoder() else 'Pillow'}, {'the GPU' if on_gpu else 'workers'}"


def decode(bench: Bench) -> Rows:
    decoder = Decoder(bench.files, bench.device)
    for count in (128, 1024) if bench.cuda else (4,):
        request = SimpleNamespace(indices=numpy.arange(count))
        read = decoder.reader[request]  # by one process, which decodes what no GPU will
        read_again = partial(decoder.reader.__getitem__, request)
        work = partial(decoder, read) if decoder.decode_jpegs else read_again
        refused, seconds = decoder(read).refused, seconds_of(work, bench.device, 3, 1)
        metrics = {"images_per_s": count / seconds, "refused": refused}
        yield {"part": "decode", "size": count}, metrics, {"decoder": decoder_name(bench.device)}


def our_batches(bench: Bench) -> Batches:
    recipe = bench.recipe
    images = {"global_batch_size": bench.size.batch_size, "open_split": lambda *_: bench.files}
    images |= {"augment": recipe.augment, "label_smoothing": recipe.optim.label_smoothing}
    with closing(make_loader(recipe.data, seed=0, device=bench.device, **images).train_batches()) as batches:
        for batch in batches:
            yield batch.images, batch.targets


def timm_batches(bench: Bench) -> Batches:
    """As timm's training script has them: mixed where a batch is put together, on the GPU ahead of time. Its
    batches are an eighth of a step's: small ones come evenly."""
    recipe, small = bench.recipe, max(bench.size.batch_size // 8, 2)
    augment, side = recipe.augment, recipe.data.image_size
    mixup = timm_mixup(augment, recipe.optim.label_smoothing, len(bench.files.classes), FastCollateMixup)
    loader = timm_loader(bench.files, small, side, augment, bench.device, bench.workers, mixup)
    return joined(loader, bench.size.batch_size // small)


def joined(batches: Iterable[tuple[Tensor, Tensor]], count: int) -> Batches:
    """`count` batches as one, without end: the loader's epochs follow each other."""
    endless = chain.from_iterable(repeat(batches))
    while True:
        images, targets = zip(*islice(endless, count), strict=True)
        yield torch.cat(images), torch.cat(targets)


LOADERS = {"cpvt": our_batches, "timm": timm_batches}


def rate(batches: Batches, seconds: float, device: str, use: Callable, clock=time.perf_counter) -> float:
    """Images a second of a loader with what uses its batches; after as long a time uncounted."""
    use(*next(batches))  # processes start, kernels are compiled
    for _ in ("not counted", "counted"):
        wait(device)
        images, started = 0, clock()
        while clock() < started + seconds:
            batch = next(batches)
            use(*batch)
            images += len(batch[0])
        wait(device)
    return images / (clock() - started)


def pipeline(bench: Bench) -> Rows:
    """Each loader starts anew for each round, so that none fills its queues while another is timed."""
    size, config = bench.size, bench.model("peg")
    config = replace(config, num_classes=len(bench.files.classes))
    feeding = Step(VisionTransformer(config), bench.device, size.modes[0])
    feeding.settle(*noise(config, size.batch_size, bench.device))

    def one(loader: str, fed: bool) -> float:
        with closing(LOADERS[loader](bench)) as batches:
            return rate(batches, size.seconds, bench.device, feeding if fed else lambda *_: None)

    timed = {(loader, fed): partial(one, loader, fed) for loader in LOADERS for fed in (False, True)}
    found = in_rounds(timed, min(size.rounds, 2))
    for (loader, fed), rates in found.items():
        metrics = summary("images_per_s", rates) | summary("ratio", ratios(rates, found["timm", fed]))
        columns = {"part": "pipeline", "loader": loader, "model": "peg" if fed else ""}
        facts = {"augment": asdict(bench.recipe.augment), "workers": bench.workers, "page_cache": True}
        yield columns, metrics, facts | {"decoder": decoder_name(bench.device)}


# --------------------------------------------------------------------------- what to ask of a new GPU


def attention(bench: Bench) -> Rows:
    """(B, h, T, d) as in the model, h = 3, T = 197."""
    kinds = ["FLASH_ATTENTION", "MATH"] + ["EFFICIENT_ATTENTION", "CUDNN_ATTENTION"] * bench.cuda
    options = {"device": bench.device, "dtype": torch.bfloat16 if bench.cuda else torch.float32}
    parts = [torch.randn(bench.size.batch_size, 3, 197, 64, requires_grad=True, **options) for _ in "qkv"]
    for name in kinds:

        def both():
            F.scaled_dot_product_attention(*parts).sum().backward()

        with attempt(f"attention: {name}"), sdpa_kernel(getattr(SDPBackend, name)):
            milliseconds = 1000 * _seconds(bench, both)
            yield {"part": "attention", "mode": name}, {"milliseconds": milliseconds}, {}


@contextmanager
def attempt(what: str) -> Iterator[None]:
    """One way of computing that fails here, in the driver or in a compiler, must not cost the others."""
    try:
        yield
    except Exception as failure:
        print(f"failed: {what}: {' '.join(str(failure).split())[:200]}", flush=True)


def rounding(model: VisionTransformer, bench: Bench, mode: str) -> dict[str, float]:
    """Metrics: how far the gradients of a bf16 step are from those in double precision, all together and the
    farthest layer; and the farthest kernel of a PEG, where there is one."""
    images, targets = noise(model.config, min(bench.size.batch_size, 64), bench.device)
    exact, model = copy.deepcopy(model).to(images.double()), copy.deepcopy(model).to(images)
    add_up_biases(model)
    if mode != "eager":
        model.compile(mode=mode)
    cross_entropy(exact(images.double()), targets.double()).backward()
    with torch.autocast(images.device.type, torch.bfloat16):
        logits = model(images)
    cross_entropy(logits.float(), targets).backward()
    true = {name: p.grad for name, p in exact.named_parameters() if p.grad.any()}
    off = {name: p.grad - true[name] for name, p in model.named_parameters() if name in true}
    apart = {name: float(off[name].norm() / grad.norm()) for name, grad in true.items()}
    metrics = {"gradient_error": float(get_total_norm(off.values()) / get_total_norm(true.values()))}
    metrics["gradient_error/farthest"] = max(apart.values())
    kernels = [error for name, error in apart.items() if ".peg" in name and name.endswith("weight")]
    return metrics | ({"gradient_error/peg": max(kernels)} if kernels else {})


def encodings(bench: Bench) -> Rows:
    """Those first that a compiler finds hardest."""
    first = ("relative", "relative(on='bias')", FIVE, "peg", KERNEL_27)
    for encoding in dict.fromkeys((*first, *experiments.ENCODINGS) if bench.cuda else first[:1]):
        if bench.fits(bench.size.entrant / 2, f"encodings: {encoding}"):
            with attempt(f"encodings: {encoding}"):
                config = replace(bench.model("none"), drop_path=0.0, encoding=encoding, depth=6)
                torch.compiler.reset()
                metrics = rounding(VisionTransformer(config), bench, bench.size.modes[0])
                yield {"part": "encodings", "model": encoding, "mode": bench.size.modes[0]}, metrics, {}


def trap(bench: Bench) -> Rows:
    """Five PEGs once learned nothing on a GPU whose gradients were wrong: 150 steps at a constant rate."""
    compiled, steps = bench.size.modes[0], 150 if bench.cuda else 2
    plain = lambda peg, x: False  # noqa: E731
    roads = {"fused": (PEG.fuses, compiled, False), "convolution": (plain, compiled, False)}
    roads["convolution, eager"] = plain, "eager", False
    roads["fused, bf16 tokens"] = PEG.fuses, compiled, True
    config = synthetic_config("where", FIVE)
    change = {"device": bench.device, "precision": "bf16", "log_every": steps}
    optim = replace(config.optim, steps=steps, global_batch_size=256 if bench.cuda else 8, stop_loss=0.0)
    for name, (fuses, mode, low) in roads.items():
        with attempt(f"trap: {name}"), patch.object(PEG, "fuses", fuses):
            torch.compiler.reset()
            metrics = rounding(VisionTransformer(config.model), bench, mode)
            change |= {"bf16_tokens": low, "compile": "off" if mode == "eager" else "model"}
            found = train(replace(config, optim=optim, run=replace(config.run, **change)))
            losses = [entry["loss"] for entry in found.history if "loss" in entry]
            metrics |= {"loss": losses[-1], "top1@10": found.metrics["top1"]}
            yield {"part": "trap", "model": FIVE, "mode": name}, metrics, {"steps": steps}


def count_bytes(bench: Bench) -> Rows:
    """Of every model that is compared; ratios to timm's."""
    from cpvt.lab.traffic import kernel_bytes  # the inside of a compiler, which no other part needs

    model, base, B = bench.model, 0, bench.size.batch_size
    for name, low in [("timm", False), *product(("none", "peg", FIVE), (False, True))]:
        found = kernel_bytes(config := model(name), B, timm=name == "timm", bf16_tokens=low)
        base = base or sum(found.values())
        metrics = {f"{part}_gigabytes": count / 1e9 for part, count in found.items()}
        metrics["ratio"] = sum(found.values()) / base
        columns = {"part": "bytes", "model": name, "mode": "bf16 tokens" if low else "", "size": config.depth}
        yield columns, metrics, {"counted_for": "H100", "precision": "bf16"}


PARTS: dict[str, Callable] = {"peg": peg_operator, "step": step, "decode": decode, "pipeline": pipeline}
MORE = {"attention": attention, "encodings": encodings, "trap": trap, "bytes": count_bytes}
FROM_FILES = "decode", "pipeline", "train"

# The order of --all: the cheapest answers first; seconds that a part may take.
ORDER = {"peg": 60, "attention": 60, "encodings": 60, "trap": 100, "step": 150, "decode": 60, "pipeline": 120}
ORDER |= {"train": 90, "tests": 120, "photographs": 480}


def command(name: str, given: "Benchmark", data: str, minutes: float) -> list[str]:
    """What a part of --all runs, in a process of its own: an error of CUDA spoils all that follows in one."""
    cpvt, out = [sys.executable, "-m", "cpvt"], ["--out", str(given.out)] if given.out else []
    if name == "tests":
        tests = Path(__file__).resolve().parents[2] / "tests"
        return [sys.executable, "-m", "pytest", "-q", "-n", "0", "-k", "gpu or training_size", str(tests)]
    if name == "photographs":
        rows = ["photographs", "--only", "core", "--grid", "14", "--budget-minutes", f"{minutes:.2f}"]
        return [*cpvt, "experiments", *rows, *out]
    if name == "train":
        words = "--data.hold-out 4 --augment.repeated-aug 1 --augment.mix-group 2 --run.evaluate-every 0"
        words += " --run.log-every 2 --optim.epochs 0 --optim.warmup-epochs 0 --optim.steps 6"
        words += " --optim.warmup-steps 2"
        if given.size == "cpu" or not torch.cuda.is_available():
            words += " --optim.micro-batch-size 2 --optim.global-batch-size 4 --data.workers 2"
            words += " --data.image-size 32 --run.precision fp32 --run.compile off --run.device cpu"
        else:
            words += " --optim.micro-batch-size 64 --optim.global-batch-size 128"
        return [*cpvt, *"train --recipe deit --model cpvt_tiny_5peg --data".split(), data, *words.split()]
    options = ["--data", data, "--size", given.size, "--budget-minutes", f"{minutes:.2f}"]
    return [*cpvt, "benchmark", "--only", name, *options, *out]


def run_part(name: str, words: list[str], seconds: float) -> str:
    """-> "done", or why not. What it leaves running ends with it."""
    eager = {"TORCHDYNAMO_DISABLE": "1"} if name in ("peg", "attention", "decode", "photographs") else {}
    with tempfile.TemporaryFile("w+") as errors:
        environment = os.environ | eager
        process = subprocess.Popen(words, stderr=errors, env=environment, start_new_session=True)
        try:
            process.wait(seconds)
            reason = f"status {process.returncode}" if process.returncode else ""
        except subprocess.TimeoutExpired:
            reason = f"stopped after {seconds:.0f} s"
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        errors.seek(0)
        last = ([line.strip() for line in errors if line.strip()] or [""])[-1]
    return f"{reason}: {last[:150]}".rstrip(": ") if reason else "done"


# --------------------------------------------------------------------------- the command


@dataclass(frozen=True)
class Benchmark:
    """Measure training step and data pipeline beside timm's, in one run."""

    data: str = ""  # a folder with train/CLASS/*.JPEG, or shards; none: JPEGs drawn by formula
    out: Path | None = None  # folder of benchmark.jsonl (default: data/results of the repository)
    budget_minutes: float = 8.0  # begin nothing that would end after this; 0: no limit
    size: Literal["auto", "gpu", "cpu"] = "auto"  # cpu: a small version that takes seconds and proves little
    only: tuple[str, ...] = ()  # some parts; none: peg step decode pipeline, or with --all all
    all: bool = False  # those and short training, tests, photographs, each in a process and a time of its own
    bytes: bool = False  # bytes that the kernels of a step move, counted without a GPU

    def __call__(self) -> None:
        known = ORDER if self.all else PARTS | MORE
        for name in self.only:
            check_name("part", name, known)
        results.check_writable(self.out)
        if self.all:
            return self._one_by_one()
        names = ("bytes",) if self.bytes else self.only or tuple(PARTS)
        device = pick_device({"auto": "auto", "gpu": "cuda", "cpu": "cpu"}[self.size])
        small = device == "cpu" and not (self.bytes and self.size == "auto")
        bench = Bench(CPU if small else GPU, device, end=deadline(self.budget_minutes))
        with tempfile.TemporaryDirectory(prefix="cpvt-benchmark-") as folder:
            if {*names} & {*FROM_FILES}:
                files = open_files(self.data, Path(folder), bench.size)
                bench.files = files.select(torch.arange(64 * bench.size.batch_size) % len(files))
            for name in names:
                if not bench.fits(bench.size.entrant, name):
                    continue
                data, started = NOISE, time.monotonic()
                if name in ("decode", "pipeline"):
                    data = Path(self.data).name or "drawn JPEGs", files.fingerprint
                for columns, metrics, facts in (PARTS | MORE)[name](bench):
                    took = round(time.monotonic() - started, 1)
                    append(_result(bench, data, columns, metrics, facts, took), self.out, again=True)
                    medians = [f"{m} {v:.4g}" for m, v in metrics.items() if "/" not in m]
                    print(f"{' '.join(map(str, filter(None, columns.values()))):60}", *medians, flush=True)
        print(f"rows in {results_folder(self.out)}/benchmark.jsonl")

    def _one_by_one(self) -> None:
        end, said = deadline(self.budget_minutes), {}
        size = CPU if self.size == "cpu" or not torch.cuda.is_available() else GPU
        with tempfile.TemporaryDirectory(prefix="cpvt-benchmark-") as folder:
            data = self.data or str(Path(folder, "drawn JPEGs"))
            # A row of photographs takes a core a quarter of an hour: not in this miniature.
            names = self.only or tuple(name for name in ORDER if size is GPU or name != "photographs")
            if {*names} & {*FROM_FILES} and not self.data:
                open_files("", Path(data), size)
            for name in names:
                started = time.monotonic()
                seconds = min(ORDER[name], end - started)
                said[name] = "no time left", 0.0
                if seconds > 0:
                    print(f"--- {name}", flush=True)
                    outcome = run_part(name, command(name, self, data, seconds / 60), seconds)
                    said[name] = outcome, time.monotonic() - started
        table = [f"{name:12} {took:5.0f} s  {outcome}" for name, (outcome, took) in said.items()]
        print("---", *table, f"rows in {results_folder(self.out)}", sep="\n")
        if any(outcome not in ("done", "no time left") for outcome, _ in said.values()):
            raise SystemExit(1)


def _result(bench: Bench, data: tuple[str, str], columns, metrics, facts: dict, seconds: float) -> Result:
    size, (dataset, sha256) = bench.size, data
    config = {"batch_size": size.batch_size, "rounds": size.rounds, "steps_a_round": size.steps}
    config |= {"precision": "bf16" if bench.cuda else "fp32", "cores": len(os.sched_getaffinity(0))}
    config |= {"timm": timm.__version__, "proven": dict(verdicts), **facts}
    return Result(
        experiment="benchmark",
        columns=complete("benchmark", columns),
        scale=size.scale,
        dataset=dataset,
        dataset_sha256=sha256,
        config=config,
        metrics=metrics,
        seconds=seconds,
        device=device_name(bench.device),
        cpvt_commit=commit(),
    )
