"""What an encoding costs: parameters, operations and saved bytes exactly, time and memory beside no encoding.

    cpvt experiments costs --device cpu      one thread, fp32, eager: ratios only
    cpvt experiments costs --device cuda     bf16, compiled: images a second and peak memory as well

Every row of the paper's tables that has a model of its own, on DeiT's bodies at 224 pixels. A row is timed in
one process with `none`, in rounds: each round takes one training step (or a few) and one forward pass of every
model of a group, in an order drawn anew, and gives one ratio a row. The row `again` is a second model without
encoding: its ratio shows what the stop-watch itself adds to the rows of its group.

Letters: B images of a batch, N patches, T tokens, D width.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from cpvt.config import ModelConfig
from cpvt.lab.experiments import FIVE, table_rows
from cpvt.lab.results import (
    COLUMNS,
    Result,
    append,
    commit,
    complete,
    describe,
    fingerprint,
    recorded,
    results_folder,
)
from cpvt.lab.timing import Budget, Step, each_compiled, in_rounds, noise, ratios, seconds_of, summary
from cpvt.model.fused_peg import FUSED
from cpvt.model.vit import VisionTransformer
from cpvt.model.zoo import model_config

BASE, AGAIN = (complete("costs", {"encoding": "none", "again": again}) for again in (False, True))
CLAIMED = [complete("costs", {"encoding": text}) for text in ("peg", FIVE)]  # the book predicts their time
GROUP = 6  # rows that are timed together with the base: few, so that all of a round lie close in time


@dataclass(frozen=True)
class Size:
    """How much is timed."""

    scale: str  # of the rows
    batch_size: int
    rounds: (
        int  # from six on their ranks give a 95 % interval of the median; 20 leave out the five on each side
    )
    steps: int  # at a stretch
    mode: str  # see `timing.Step`
    model: dict = field(default_factory=dict)  # changes of DeiT-Ti


CPU = Size("seconds", 8, 20, 1, "eager")
GPU = Size("minutes", 1024, 12, 10, "default")


def cost_rows() -> list[dict]:
    """The base, its copy and the claims first, then the other rows of the tables.

    Groups are formed in this order, so that the claims are timed in the rounds of the control. Rows that differ
    in data, augmentation or length alone cost what their model costs, and are left out; so are those with two
    heads, which train on a loss that the timed step does not have.
    """
    found = [BASE, AGAIN, *CLAIMED]
    for row in sum(table_rows().values(), []):
        own = {name: row[name] for name in COLUMNS["costs"] if name in row}
        if row == complete("tables", own) and (columns := complete("costs", own)) not in found:
            found.append(columns)
    return found


def cost_config(row: dict, size: str = "tiny", **changes) -> ModelConfig:
    """The row on DeiT's body of that size ("tiny", "small", "base"), 224 pixels unless changed."""
    own = {name: value for name, value in row.items() if name != "again"}
    return model_config(f"deit_{size}", **{**own, **changes})


# --------------------------------------------------------------------------- exact


def parameters(config: ModelConfig) -> int:
    """How many numbers the model holds, those of a frozen PEG included; nothing is allocated."""
    with torch.device("meta"):
        return sum(p.numel() for p in VisionTransformer(config).parameters())


def multiply_adds(config: ModelConfig, side: int | None = None) -> int:
    """Multiply-adds of matrix products and convolutions for one image of `side` pixels, the plain way.

    Counted by PyTorch's counter while the model runs on shapes alone. It leaves out whatever is no product of
    matrices: normalisations, softmax, GELU, biases, skips, the sums of tables, the turning of rotary pairs. A
    convolution's products with padded zeros count. "Plain": as on a CPU; a GPU's relative keys go another way.
    """
    size = config.image_size if side is None else (side, side)
    with torch.device("meta"):  # no first weights are drawn
        model = VisionTransformer(config).eval()
    # A fused attention on a CPU is not among the operators that the counter knows: its two products are.
    with FakeTensorMode(), sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        weights = {name: torch.empty(p.shape) for name, p in model.named_parameters()}
        with FlopCounterMode(display=False) as counter:
            functional_call(model, weights, torch.empty(1, config.in_channels, *size))
    return counter.get_total_flops() // 2


def step_bytes(config: ModelConfig) -> int:
    """Bytes that a training step must move for each image, in 16 bits, counted kernel by kernel.

    A block's forward pass reads and writes T x D values 38 times: norms 2 + 2, queries, keys and values 4,
    attention 4, its projection 2, GELU 8, the MLP's layers 5 + 5, residuals 3 + 3; the backward pass twice that.
    Weights, images and the head are left out: less than one in a hundred at a batch of 1024.
    """
    tokens = config.prefix_tokens + config.grid[0] * config.grid[1]
    return 3 * 38 * tokens * config.width * config.depth * 2


def saved_bytes(config: ModelConfig, images: int = 1) -> int:
    """Bytes that a forward pass on a CPU keeps for the backward pass, parameters apart; each storage once.

    fp32, without drop path. What is kept depends on the operators: a GPU's fused ones keep less.
    """
    torch.manual_seed(0)
    model = VisionTransformer(replace(config, drop_path=0.0)).train()
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor  # alive until the graph goes, so that no address comes twice

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        out = model(torch.zeros(images, config.in_channels, *config.image_size))
    assert out.requires_grad
    return sum(kept.values())


def saved_per_image(config: ModelConfig) -> int:
    """What one more image adds to `saved_bytes`. The third: a batch of one is spared a few copies."""
    return saved_bytes(config, 3) - saved_bytes(config, 2)


# --------------------------------------------------------------------------- measured


def measure_costs(
    out: str | Path | None = None,
    device: str = "cpu",
    budget_minutes: float = 0.0,
    report: Callable[[Result, int], None] | None = None,
    rows: Sequence[dict] | None = None,
    size: Size | None = None,
) -> int:
    """Measures the rows that the folder's results lack for this kind of device, group by group.

    A group's rows are on disk before the next group begins. One group is measured at least; a further one begins
    if the budget holds as long as the one before took (0: no limit). `rows`: these only;
    `size`: how much is measured.
    -> how many rows are still missing.
    """
    size = size or (GPU if "cuda" in device else CPU)
    out, budget, took, version = results_folder(out), Budget(budget_minutes), 0.0, commit()
    there = recorded("costs", out) if out.is_dir() else []
    done = [result.columns for result in there if result.scale == size.scale]
    missing = [row for row in (cost_rows() if rows is None else rows) if row not in done]
    with each_compiled(), _one_thread(device):
        base = Entrant(BASE, size, device) if missing else None
        while missing and (not took or budget.allows(took)):
            group, missing, started = missing[:GROUP], missing[GROUP:], time.monotonic()
            for result in _timed(base, group, size, device, version):
                append(result, out)
                if report:
                    report(result, len(missing))
            took = time.monotonic() - started
    return len(missing)


@contextmanager
def _one_thread(device: str) -> Iterator[None]:
    """On a CPU: two would wait for whatever else runs there."""
    before = torch.get_num_threads()
    try:
        if "cuda" not in device:
            torch.set_num_threads(1)
        yield
    finally:
        torch.set_num_threads(before)


class Entrant:
    """One row's model, twice: "step" trains it, "inference" reads only. On a GPU `memory` is what one takes at its
    peak, in bytes."""

    def __init__(self, row: dict, size: Size, device: str):
        self.row, self.config = row, cost_config(row, drop_path=0.1, **size.model)
        self.batch = noise(self.config, size.batch_size, device)
        self.steps: dict[str, Step] = {}
        self.memory: dict[str, int] = {}
        for name in ("step", "inference"):
            others = torch.cuda.memory_allocated()
            torch.manual_seed(0)
            step = Step(VisionTransformer(self.config), device, size.mode, training=name == "step")
            for _ in range(2):  # compiles, and takes what memory it will keep
                step(*self.batch)
            if "cuda" in device:
                torch.cuda.reset_peak_memory_stats()
                step(*self.batch)
                self.memory[name] = torch.cuda.max_memory_allocated() - others
            self.steps[name] = step


def _timed(base: Entrant, group: Sequence[dict], size: Size, device: str, version: str) -> Iterator[Result]:
    """Times the group and the base in rounds; -> the group's results."""
    since = time.monotonic()
    entrants = {describe(row): base if row == BASE else Entrant(row, size, device) for row in group}
    measures = {
        (name, kind): partial(seconds_of, partial(step, *entrant.batch), device, size.steps)
        for name, entrant in {describe(BASE): base, **entrants}.items()
        for kind, step in entrant.steps.items()
    }
    found = in_rounds(measures, size.rounds)
    seconds = round((time.monotonic() - since) / len(group), 1)
    for name, entrant in entrants.items():
        metrics = {"parameters": parameters(entrant.config), "multiply_adds": multiply_adds(entrant.config)}
        for kind in entrant.steps:
            times = found[name, kind]
            metrics |= summary(f"{kind}_ratio", ratios(times, found[describe(BASE), kind]))
            if "cuda" in device:  # on a CPU, one thread of one machine: nobody's speed
                metrics |= summary(f"{kind}_images_per_s", [size.batch_size / t for t in times])
                metrics[f"{kind}_gigabytes"] = entrant.memory[kind] / 1e9
        yield _result(entrant, size, device, metrics, seconds, version)


def _result(
    entrant: Entrant, size: Size, device: str, metrics: dict[str, float], seconds: float, version: str
) -> Result:
    cuda = "cuda" in device
    return Result(
        experiment="costs",
        columns=entrant.row,
        scale=size.scale,
        dataset="noise",
        dataset_sha256=fingerprint(entrant.batch[0][:8]),
        seed=0,
        config={
            "model": asdict(entrant.config),
            "batch_size": size.batch_size,
            "precision": "bf16" if cuda else "fp32",
            "mode": size.mode,
            "fused": FUSED and cuda,
            "threads": torch.get_num_threads(),
            "rounds": size.rounds,
            "steps_a_round": size.steps,
            "ratio_to": BASE["encoding"],
        },
        metrics=metrics,
        weights="raw",
        seconds=seconds,
        device=torch.cuda.get_device_name() if cuda else "cpu",
        torch=torch.__version__,
        cpvt_commit=version,
        date=datetime.now(UTC).isoformat(timespec="seconds"),
    )
