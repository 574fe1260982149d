"""What an encoding costs: parameters, operations and saved bytes exactly, time and memory beside no encoding.

    cpvt experiments costs --device cpu      one thread, fp32, eager: ratios only
    cpvt experiments costs --device cuda     bf16, compiled: images a second and peak memory as well

Every row of `tables.py` that has a model of its own, on DeiT's bodies at 224 pixels. A row is timed in one process
with `none`, in rounds: each round takes one training step (or a few) and one forward pass of every model of a
group, in an order drawn anew, and gives one ratio a row. "none, again" is a second model without encoding: its
ratio shows what the stop-watch itself adds to the rows of its group.

Letters: B images of a batch, N patches, D width, h heads, k width of a kernel.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
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
from cpvt.lab import steps, timing
from cpvt.lab.results import Row, append_row, commit, fingerprint, read_rows
from cpvt.lab.steps import Bench, Size, Step, each_compiled
from cpvt.lab.tables import TableRow, rows
from cpvt.lab.timing import Budget, in_rounds, ratios, seconds_of
from cpvt.model.fused_peg import FUSED
from cpvt.model.vit import VisionTransformer
from cpvt.model.zoo import model_config

BASE, AGAIN = "none", "none, again"
CLAIMED = ("one PEG", "five PEGs")  # of these the book predicts the time
GROUP = 6  # rows that are timed together with the base: few, so that all of a round lie close in time
# From six rounds on the ranks give a 95 % interval of the median; 20 leave out the five outermost on each side.
GPU = replace(steps.GPU, rounds=12)
CPU = replace(steps.CPU, model={}, rounds=20)  # the whole DeiT-Ti at 224 pixels, eight images


def cost_rows() -> dict[str, TableRow]:
    """Name -> row: the base, its copy and the claims first, then the others in the order of `tables.py`.

    Groups are formed in this order, so that the claims are timed in the rounds of the control. Rows that differ
    in data, augmentation or length alone cost what their model costs, and are left out; so are those with two
    heads, which train on a loss that the timed step does not have.
    """
    own = (row for row in rows() if set(row.changes) <= {"model"})
    found = {row.name: row for row in own if not row.config().model.distilled}
    base, claims = found.pop(BASE), {name: found.pop(name) for name in CLAIMED}
    return {BASE: base, AGAIN: replace(base, name=AGAIN), **claims, **found}


def cost_config(row: TableRow, size: str = "tiny", **changes) -> ModelConfig:
    """The row on DeiT's body of that size ("tiny", "small", "base"), 224 pixels unless changed."""
    return model_config(f"deit_{size}", encoding=row.encoding, **row.changes.get("model", {}), **changes)


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


def median_interval(values: Sequence[float], inside: float = 0.95) -> tuple[float, float] | None:
    """Two of the values between which the median lies, with a probability of at least `inside`; None: too few.

    By ranks alone (the sign test), whatever the values' distribution.
    """
    ordered, n = sorted(values), len(values)
    outside, rank = 0.0, -1
    for below in range(n // 2):
        outside += 2 * math.comb(n, below) / 2**n
        if outside > 1 - inside:
            break
        rank = below
    return None if rank < 0 else (ordered[rank], ordered[n - 1 - rank])


def spread(name: str, values: Sequence[float]) -> dict[str, float]:
    """`timing.spread`, and the interval of the median as `name`/low and `name`/high where there is one."""
    found = timing.spread(name, values)
    if interval := median_interval(values):
        found |= dict(zip((f"{name}/low", f"{name}/high"), interval, strict=True))
    return found


def measure_costs(
    out: str | Path,
    device: str = "cpu",
    budget_minutes: float = 0.0,
    report: Callable[[Row, int], None] | None = None,
    names: Sequence[str] | None = None,
    size: Size | None = None,
) -> int:
    """Measures the rows that `out`/costs.jsonl lacks for this kind of device, group by group.

    A group's rows are on disk before the next group begins. One group is measured at least; a further one begins
    if the budget holds as long as the one before took (0: no limit). `names`: these rows only;
    `size`: how much is measured.
    -> how many rows are still missing.
    """
    size = size or (GPU if "cuda" in device else CPU)
    path, every = Path(out) / "costs.jsonl", cost_rows()
    done = {row.row for row in read_rows("costs", out) if row.scale == size.scale} if path.exists() else set()
    missing = [name for name in (every if names is None else names) if name not in done]
    bench, took = Bench(size, device, Budget(budget_minutes), Path(out)), 0.0
    with each_compiled(), _threads(device):
        base = _Entrant(bench, every[BASE]) if missing else None
        while missing and (not took or bench.budget.allows(took)):
            group, missing, started = missing[:GROUP], missing[GROUP:], time.monotonic()
            for row in _group(bench, base, [every[name] for name in group]):
                append_row(path, row)
                if report:
                    report(row, len(missing))
            took = time.monotonic() - started
    return len(missing)


@contextmanager
def _threads(device: str) -> Iterator[None]:
    """One thread on a CPU: two would wait for whatever else runs there."""
    before = torch.get_num_threads()
    try:
        if "cuda" not in device:
            torch.set_num_threads(1)
        yield
    finally:
        torch.set_num_threads(before)


class _Entrant:
    """One row's model, twice: training, and reading only. `memory` (bytes): what a step takes at its peak."""

    def __init__(self, bench: Bench, row: TableRow):
        self.row, self.config = row, cost_config(row, drop_path=0.1, **bench.size.model)
        mode, work = "default" if bench.size.compiles else "eager", bench.noise()
        others, self.memory, self.steps = bench.memory(), {}, {}
        for name, training in (("step", True), ("inference", False)):
            torch.manual_seed(0)
            step = Step(bench, VisionTransformer(self.config), mode, training)
            for _ in range(2):  # compiles, and takes what memory it will keep
                step(*work)
            bench.memory()  # the peak counts from here
            step(*work)
            if bench.cuda:
                self.memory[name] = torch.cuda.max_memory_allocated() - others
                others = torch.cuda.memory_allocated()
            self.steps[name] = step

    def seconds(self, bench: Bench, name: str) -> float:
        """Of one step, the mean of so many in a row as the size says."""
        return seconds_of(partial(self.steps[name], *bench.noise()), bench.device, bench.size.steps)


def _group(bench: Bench, base: _Entrant, group: Sequence[TableRow]) -> Iterator[Row]:
    """Times the group and the base in rounds; -> its rows."""
    since, entrants = time.monotonic(), {BASE: base}
    for row in group:
        if row.name != BASE:
            entrants[row.name] = _Entrant(bench, row)
    measures = {
        (name, kind): partial(entrant.seconds, bench, kind)
        for name, entrant in entrants.items()
        for kind in entrant.steps
    }
    found: dict[tuple[str, str], list[float]] = {key: [] for key in measures}
    for number in range(bench.size.rounds):  # each in its own order: who follows whom must not count
        order = random.Random(number).sample(list(measures), len(measures))
        for key, values in in_rounds({key: measures[key] for key in order}, 1, bench.budget).items():
            found[key] += values
    seconds = round((time.monotonic() - since) / max(len(group), 1), 1)
    for row in group:
        yield _row(bench, entrants[row.name], found, seconds)


def _row(bench: Bench, entrant: _Entrant, found: dict, seconds: float) -> Row:
    """`found`: (name, "step" or "inference") -> seconds of one, a value a round."""
    name, size = entrant.row.name, bench.size
    metrics = {"parameters": parameters(entrant.config), "multiply_adds": multiply_adds(entrant.config)}
    for kind in entrant.steps:
        times = found[name, kind]
        metrics |= spread(f"{kind}_ratio", ratios(times, found[BASE, kind]))
        if bench.cuda:  # on a CPU, one thread of one machine: nobody's speed
            metrics |= spread(f"{kind}_images_per_s", [size.batch / t for t in times])
            metrics[f"{kind}_gigabytes"] = entrant.memory[kind] / 1e9
    return Row(
        experiment="costs",
        row=name,
        scale=size.scale,
        dataset="noise",
        dataset_sha256=fingerprint(bench.noise()[0][:8]),
        seed=0,
        config={
            "model": asdict(entrant.config),
            "batch": size.batch,
            "precision": "bf16" if bench.cuda else "fp32",
            "mode": next(iter(entrant.steps.values())).mode,
            "fused": FUSED and bench.cuda,
            "threads": torch.get_num_threads(),
            "rounds": size.rounds,
            "steps_a_round": size.steps,
            "ratio_to": BASE,
        },
        metrics=metrics,
        weights="raw",
        seconds=seconds,
        device=torch.cuda.get_device_name() if bench.cuda else "cpu",
        torch=torch.__version__,
        cpvt_commit=commit(),
        date=datetime.now(UTC).isoformat(timespec="seconds"),
    )
