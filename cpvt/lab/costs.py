"""What an encoding costs: parameters, operations and saved bytes exactly, time and memory beside no encoding.

    cpvt experiments costs --device cpu      one thread, fp32, eager: ratios only
    cpvt experiments costs --device cuda     bf16, compiled: images a second and peak memory as well

Every model of the paper's tables, in DeiT's sizes at 224 pixels. It is timed in one process with that without an
encoding, in rounds: each takes a training step (or a few) and a forward pass of every model of a group, and gives
one ratio a model. The row `again` is a second model without encoding: its ratio shows what the stop-watch itself
adds to the rows of its group.

Letters: T tokens, D width.
"""

import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from itertools import chain, product
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from cpvt.config import ModelConfig
from cpvt.lab import results, timing
from cpvt.lab.experiments import BAG, FIVE, TABLES
from cpvt.lab.results import COLUMNS, Result, complete, describe
from cpvt.lab.timing import Step, in_rounds, noise, ratios, seconds_of, summary
from cpvt.model.vit import VisionTransformer
from cpvt.model.zoo import model_config

Row = dict[str, Any]  # the columns of a result
BASE, AGAIN = (complete("costs", {"encoding": "none", "again": again}) for again in (False, True))
CLAIMED = tuple(complete("costs", {"encoding": text}) for text in ("peg", FIVE))  # predicted in the book


def cost_rows() -> list[Row]:
    """The base, its copy and the claims first, then every other model of the tables, in their order.

    Groups are formed in this order, so that the claims are timed in the rounds of the control. Left out: rows that
    differ in data, augmentation or length alone, and two heads, whose loss the timed step does not have.
    """
    found = [BASE, AGAIN, *CLAIMED]
    for row in sum(TABLES.values(), []):
        own = {name: row[name] for name in COLUMNS["costs"] if name in row}
        if row == own != BAG and (columns := complete("costs", own)) not in found:
            found.append(columns)
    return found


def cost_config(row: Row, size: str = "tiny", **changes) -> ModelConfig:
    """The row's model in DeiT's size "tiny", "small" or "base", for 224 pixels unless changed."""
    own = {name: value for name, value in row.items() if name != "again"}
    return model_config(f"deit_{size}", **own | changes)


# --------------------------------------------------------------------------- exact


def parameters(config: ModelConfig) -> int:
    """How many numbers the model holds, those of a frozen PEG included; nothing is allocated."""
    with torch.device("meta"):
        return sum(p.numel() for p in VisionTransformer(config).parameters())


def multiply_adds(config: ModelConfig) -> int:
    """Multiply-adds of matrix products and convolutions for one image.

    Counted by PyTorch while the model runs on shapes alone. Left out is what is no product of matrices: norms,
    softmax, GELU, biases, skips, sums of tables, turns of rotary pairs. A convolution's products with padded zeros
    count.
    """
    with torch.device("meta"):  # no first weights are drawn
        model = VisionTransformer(config).eval()
    # A fused attention on a CPU is not among the operators that the counter knows: its two products are.
    with FakeTensorMode(), sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        tensors = chain(model.named_parameters(), model.named_buffers())
        weights = {name: torch.empty(t.shape, dtype=t.dtype) for name, t in tensors}
        with FlopCounterMode(display=False) as counter:
            functional_call(model, weights, torch.empty(1, config.in_channels, *config.image_size))
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
    own = {p.untyped_storage().data_ptr() for p in chain(model.parameters(), model.buffers())}
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


@dataclass(frozen=True)
class Size:
    """How much is timed."""

    scale: str  # of the results
    batch_size: int
    mode: str  # see `timing.Step`
    group: int  # rows that are timed together: few, so that all of a round lie close in time
    rounds: int  # six at least, for an interval of their median; of 20 it leaves out five on either side
    steps_a_round: int  # timed at a stretch
    model: dict = field(default_factory=dict)  # changes of DeiT-Ti


CPU = Size("seconds", batch_size=8, mode="eager", group=6, rounds=20, steps_a_round=1)
GPU = Size("minutes", batch_size=1024, mode="default", group=4, rounds=12, steps_a_round=10)


def measure_costs(
    out=None, device="cpu", budget_minutes=0.0, report=lambda result, left: None, size: Size | None = None
) -> int:
    """Times the rows that the folder lacks for this kind of device, group by group -> how many are still missing.

    One group is timed at least; see `timing.until`. `report` gets each result and how many rows are left.
    """
    size = size or (GPU if "cuda" in device else CPU)
    out, commit, end = results.results_folder(out), results.commit(), timing.deadline(budget_minutes)
    results.check_writable(out)
    there = results.recorded("costs", out) if out.is_dir() else []
    done = [result.columns for result in there if result.scale == size.scale]
    missing = [row for row in cost_rows() if row not in done]
    groups, left = [missing[i : i + size.group] for i in range(0, len(missing), size.group)], len(missing)
    threads = torch.get_num_threads()
    if "cuda" not in device:
        torch.set_num_threads(1)  # two would wait for whatever else runs there
    try:
        for group in timing.until(end, groups):
            if size.mode != "eager":
                torch.compiler.reset()  # after 256 graphs in all it would compile no more
            left -= len(group)
            for result in time_group(group, size, device, commit):
                results.append(result, out)
                report(result, left)
    finally:
        torch.set_num_threads(threads)
    return left


def time_group(rows: Sequence[Row], size: Size, device: str, commit: str) -> Iterator[Result]:
    """Times a training step and a forward pass of these rows and of the base, in rounds; -> the rows' results."""
    cuda, started, watches, facts = "cuda" in device, time.monotonic(), {}, {}
    configs = {describe(row): cost_config(row, drop_path=0.1, **size.model) for row in (BASE, *rows)}
    base, batch = describe(BASE), noise(configs[describe(BASE)], size.batch_size, device)
    for key in product(configs, ("step", "inference")):
        torch.manual_seed(0)
        step = Step(VisionTransformer(configs[key[0]]), device, size.mode, training=key[1] == "step")
        facts[key] = step.settle(*batch)
        watches[key] = partial(seconds_of, partial(step, *batch), device, size.steps_a_round)
    seconds = in_rounds(watches, size.rounds)
    took = round((time.monotonic() - started) / len(rows), 1)
    told = asdict(size) | {"precision": "bf16" if cuda else "fp32", "threads": torch.get_num_threads()}
    for row in rows:
        name = describe(row)
        metrics = {"parameters": parameters(configs[name]), "multiply_adds": multiply_adds(configs[name])}
        for kind in ("step", "inference"):
            metrics |= summary(f"{kind}_ratio", ratios(seconds[name, kind], seconds[base, kind]))
            if cuda:  # on a CPU, one thread of one machine: nobody's speed
                rates = [size.batch_size / of_one for of_one in seconds[name, kind]]
                metrics |= summary(f"{kind}_images_per_s", rates)
                metrics[f"{kind}_gigabytes"] = facts[name, kind]["gigabytes"]
        yield Result(
            experiment="costs",
            columns=row,
            scale=size.scale,
            dataset="noise",
            dataset_sha256=results.fingerprint(batch[0][:8]),
            config=told | {"model": asdict(configs[name])},
            metrics=metrics,
            seconds=took,
            device=results.device_name(device),
            cpvt_commit=commit,
        )
