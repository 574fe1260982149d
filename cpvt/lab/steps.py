"""Steps of our models and timm's, side by side; and the bench they are measured on: device, size, budget, rows.

Letters: B images of a batch, K classes, S side of an image in pixels, T tokens, D width.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from statistics import median

import timm
import torch
import torchvision
from torch import Tensor, nn

from cpvt.config import ModelConfig, TrainConfig, replace
from cpvt.errors import ConfigError
from cpvt.lab.jpegs import Repeated
from cpvt.lab.results import Result, append, commit, fingerprint
from cpvt.lab.timing import Step, in_rounds, noise, ratios, seconds_of, summary
from cpvt.lab.timm_baseline import timm_model
from cpvt.model.vit import VisionTransformer
from cpvt.model.zoo import model_config
from cpvt.training.loss import cross_entropy
from cpvt.training.recipes import deit

# --------------------------------------------------------------------------- how large


@dataclass(frozen=True)
class Size:
    """How much is measured: `model` changes deit_tiny; times are in seconds."""

    scale: str  # of the rows
    batch: int
    model: dict
    rounds: int  # of each comparison
    steps: int  # timed at a stretch
    seconds: float  # for which a loader is timed
    warm: float  # for which it runs before
    images: int  # files, which repeat
    jpeg: tuple[int, int]  # height and width of drawn files
    short_side: int  # of those shrunk beforehand
    loader_batch: int  # of timm's loader, joined up to `batch`: small ones come evenly
    copied: int  # bytes, in the test of memory
    compiles: bool
    compiling: float  # seconds that a compilation may take
    least: float  # seconds without which no part is begun


GPU = Size("minutes", 1024, {}, 5, 10, 4.0, 3.0, 512, (400, 500), 256, 128, 1 << 30, True, 45.0, 15.0)
SMALL = {"image_size": 32, "patch_size": 8, "width": 48, "depth": 6, "num_classes": 10}
CPU = Size("seconds", 8, SMALL, 2, 1, 0.2, 0.0, 8, (80, 100), 40, 8, 1 << 24, False, 0.0, 0.0)

ENCODINGS = {
    "no encoding": "none",
    "deit_tiny": "learned",
    "cpvt_tiny": "peg",
    "cpvt_tiny_5peg": "peg(positions=(0, 1, 2, 3, 4))",
    "kernel 27 at -1": "peg(positions=(-1,), kernel=27, compute='matrix')",
    "relative, keys": "relative",
}
TIMM = "timm deit_tiny"
# What torch.compile is asked for. Graphs are replayed without Python; autotuning tries many kernels.
MODES = ("default", "reduce-overhead", "max-autotune-no-cudagraphs")
AGREE = 1e-9  # largest relative error of a gradient in double precision

# --------------------------------------------------------------------------- the bench


@dataclass
class Budget:
    """Minutes that may be spent, 0: without end. `until`: the share of them that may be used up by now."""

    minutes: float = 0.0
    until: float = 1.0
    clock: Callable[[], float] = time.monotonic

    def __post_init__(self):
        if not 0 <= self.minutes < float("inf"):
            raise ConfigError(f"budget_minutes={self.minutes:g}: give minutes, or 0 for no limit")
        self.started = self.clock()

    def allows(self, seconds: float) -> bool:
        """Whether something that takes so long may still begin."""
        spent = self.clock() - self.started
        return not self.minutes or spent + seconds <= 60 * self.minutes * self.until


@dataclass
class Bench:
    """What the parts share, and what they leave for each other.

    rates    images a second of every step, by row
    trained  cpvt_tiny's step, once built
    rows     what was measured, in order
    origin   name of the folder of JPEGs; empty: they are drawn
    decoder  what decodes them, in words
    sources  what our loader and timm's read: "files" as they are, "shrunk" beforehand
    """

    size: Size
    device: str
    budget: Budget
    out: Path
    origin: str = ""
    decoder: str = ""
    decode_jpegs: Callable | None = None  # instead of torchcodec
    sources: dict[str, tuple[Repeated, Repeated]] = field(default_factory=dict)
    rates: dict[str, float] = field(default_factory=dict)
    trained: Step | None = None
    rows: list[Result] = field(default_factory=list)
    _noise: tuple[Tensor, Tensor] | None = None
    _since: float = field(default_factory=time.monotonic)

    @property
    def cuda(self) -> bool:
        return "cuda" in self.device

    @property
    def workers(self) -> int:
        """Reading processes, of our loader and of timm's: one a core, 16 at most."""
        return min(len(os.sched_getaffinity(0)), 16)

    def model(self, encoding: str) -> ModelConfig:
        return model_config("deit_tiny", encoding=encoding, drop_path=0.1, **self.size.model)

    @property
    def side(self) -> int:
        return self.model("none").image_size[0]

    @property
    def recipe(self) -> TrainConfig:
        """DeiT's, mixed in groups that the batch allows."""
        recipe = deit("cpvt_tiny")
        group = min(recipe.augment.mix_group, self.size.batch // 4)  # more groups than copies of an image
        return replace(recipe, augment=replace(recipe.augment, mix_group=group))

    def noise(self) -> tuple[Tensor, Tensor]:
        """Images (B, 3, S, S) and mixed labels (B, K) on the device, always the same."""
        if self._noise is None:
            self._noise = noise(self.model("none"), self.size.batch, self.device)
        return self._noise

    def memory(self) -> int:
        """Bytes of the GPU that are taken now; its peak counts from here on."""
        if not self.cuda:
            return 0
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()

    def cpvt_step(self) -> Step:
        """The step that the loaders feed."""
        if self.trained is None:
            mode = "default" if self.size.compiles else "eager"
            self.trained = Step(VisionTransformer(self.model("peg")), self.device, mode)
            self.trained(*self.noise())
        return self.trained

    def skip(self, what: str, reason: str = "budget") -> None:
        print(f"not measured: {reason}: {what}", flush=True)

    def row(self, name: str, metrics: dict, config: dict, *data: Tensor, dataset: str = "noise") -> None:
        """Appends a row; one of an earlier benchmark is superseded."""
        now = time.monotonic()
        facts = {
            "batch": self.size.batch,
            "image_size": self.side,
            "precision": "bf16" if self.cuda else "fp32",
            "rounds": self.size.rounds,
            "steps_a_round": self.size.steps,
            "decoder": self.decoder,
            "timm": timm.__version__,
            "torchvision": torchvision.__version__,
            "cores": len(os.sched_getaffinity(0)),
        }
        row = Result(
            experiment="benchmark",
            columns={"row": name},
            scale=self.size.scale,
            dataset=dataset,
            dataset_sha256=fingerprint(*data),
            seed=0,
            config={**facts, **config},
            metrics=metrics,
            weights="raw",
            seconds=round(now - self._since, 1),
            device=torch.cuda.get_device_name() if self.cuda else "cpu",
            torch=torch.__version__,
            cpvt_commit=commit(),
            date=datetime.now(UTC).isoformat(timespec="seconds"),
        )
        append(row, self.out, again=True)
        self.rows.append(row)
        self._since = now


# --------------------------------------------------------------------------- side by side


def gradient_error(bench: Bench) -> float:
    """The largest relative error over the parameters, ours against timm's, in double precision.

    On the same weights and images, without drop path.
    """
    config = replace(bench.model("learned"), drop_path=0.0)
    theirs = timm_model(config).to(bench.device, torch.float64)
    ours = VisionTransformer(config).to(bench.device, torch.float64)
    ours.load_state_dict(theirs.state_dict())
    images, targets = (part[:8].double() for part in bench.noise())
    found = [_gradients(model, images, targets) for model in (ours, theirs)]
    return max(float((found[0][name] - g).norm() / g.norm()) for name, g in found[1].items())


def _gradients(model: nn.Module, images: Tensor, targets: Tensor) -> dict[str, Tensor]:
    cross_entropy(model(images), targets).backward()
    for parameter in model.parameters():
        parameter.data = parameter.grad
    return model.state_dict()  # whose names are those of timm on both sides


def race(bench: Bench, part: str, training: bool, names: Iterable[str], more: dict[str, float]) -> None:
    """timm's deit_tiny, eager and in every mode, and ours by `names`, in rounds; a row each.

    Ratios are to timm's fastest mode, costs to our model without an encoding. `more`: metrics of every row.
    """
    images, targets = bench.noise()
    steps, facts = {}, {}
    for name, mode in _entrants(bench, names):
        label = f"{name}, {mode}"
        need = bench.size.compiling * (1.0 if training else 0.5)
        if mode != "eager" and not bench.budget.allows(need):
            bench.skip(f"{part}: {label}")
            continue
        config, before = bench.model(ENCODINGS.get(name, "learned")), bench.memory()
        model = VisionTransformer(config) if name in ENCODINGS else timm_model(config)
        step = Step(model, bench.device, mode, training)
        try:
            first = seconds_of(partial(step, images, targets), bench.device)
        except RuntimeError as error:  # one way to compile that fails here must not cost the others
            bench.skip(f"{part}: {label}", " ".join(str(error).split())[:200])
            continue
        steps[label], facts[label] = step, {"first_s": first}
        step(images, targets)
        if bench.cuda:
            facts[label]["gigabytes"] = (torch.cuda.max_memory_allocated() - before) / 1e9

    def rate(step: Step) -> float:
        return len(images) / seconds_of(partial(step, images, targets), bench.device, bench.size.steps)

    measures = {label: partial(rate, step) for label, step in steps.items()}
    found = in_rounds(measures, bench.size.rounds)
    best = max((label for label in found if label.startswith(TIMM)), key=lambda label: median(found[label]))
    plain = next((rates for label, rates in found.items() if label.startswith("no encoding")), None)
    for label, rates in found.items():
        name = label.rpartition(", ")[0]
        metrics = summary("images_per_s", rates) | summary("ratio", ratios(rates, found[best]))
        if plain and name in ENCODINGS and rates is not plain:
            metrics |= summary("cost_percent", [100 * (ratio - 1) for ratio in ratios(plain, rates)])
        config = {"model": asdict(bench.model(ENCODINGS.get(name, "learned"))), "ratio_to": best}
        bench.row(f"{part}: {label}", metrics | facts[label] | more, config, images[:8])
        bench.rates[f"{part}: {label}"] = metrics["images_per_s"]
        if training and name == "cpvt_tiny":
            bench.trained = steps[label]


def _entrants(bench: Bench, names: Iterable[str]) -> list[tuple[str, str]]:
    """Names and modes; timm's slower ways to compile come last, where the budget may leave them out."""
    if not bench.size.compiles:
        return [(name, "eager") for name in (TIMM, *names)]
    first, *others = MODES
    return [(TIMM, "eager"), (TIMM, first), *((name, first) for name in names), *((TIMM, m) for m in others)]
