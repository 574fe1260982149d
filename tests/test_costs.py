"""Costs: counts against formulas and against real memory, and a whole small measurement."""

from dataclasses import replace

import torch
from helpers import needs_gpu, run_cli
from torch import nn

from cpvt.config import ModelConfig
from cpvt.lab import costs
from cpvt.lab.costs import AGAIN, BASE, CLAIMED, cost_config, cost_rows, measure_costs, multiply_adds
from cpvt.lab.experiments import BAG, TABLES
from cpvt.lab.results import describe, recorded
from cpvt.lab.timm_baseline import timm_model
from cpvt.model.vit import VisionTransformer

SMALL = ModelConfig(
    image_size=(24, 40), patch_size=8, width=24, depth=3, heads=3, num_classes=5, encoding="none"
)
H, W, D, L = 3, 5, 24, 3
N, T = H * W, H * W + 1
TINY = {"image_size": 32, "patch_size": 8, "width": 24, "depth": 6}
QUICK = replace(costs.CPU, model=TINY, rounds=6, group=2)


def of(encoding: str, **changes) -> ModelConfig:
    return replace(SMALL, encoding=encoding, **changes)


def test_counts_are_those_of_formulas_and_of_a_real_model():
    body = N * 3 * 64 * D + L * (12 * T * D * D + 2 * T * T * D) + D * 5
    assert multiply_adds(SMALL) == body
    assert multiply_adds(of("none", heads=1)) == body  # pairs cost the same however many heads share them
    for encoding, more in {
        "sine + rotary + relative(on='bias')": 0,
        "relative(wrap=True)": L * D * (N * (H + W) + T),
        "relative(on='keys_values')": L * D * (2 * N * (H + W) + T),
        "learned + peg(kernel=9)": 81 * N * D,
        "peg(kernel=9, compute='matrix')": N * N * D,  # 9 = 2 * 5 - 1: it covers the grid
        "peg(kernel=7, compute='matrix')": 49 * N * D,  # it does not
    }.items():
        assert multiply_adds(of(encoding)) - multiply_adds(SMALL) == more, encoding
    for encoding in ("learned", "relative", "peg(frozen=True)", "none"):
        real = sum(p.numel() for p in VisionTransformer(of(encoding)).parameters())
        assert costs.parameters(of(encoding)) == real


def test_what_is_kept_is_what_the_gradient_needs():
    """A table keeps nothing, a PEG its input and no more; the matrices of a large kernel once a batch."""
    plain = costs.saved_per_image(SMALL)
    for encoding in ("learned", "sine"):
        assert costs.saved_per_image(of(encoding)) == plain
    for encoding, count in (("peg", 1), ("peg(positions=(0, 1))", 2), ("peg(repeat=3)", 3)):
        assert costs.saved_per_image(of(encoding)) - plain == count * N * D * 4
    matrix = of("peg(kernel=9, compute='matrix')")
    assert costs.saved_per_image(matrix) - plain == N * D * 4
    once = costs.saved_bytes(matrix, 3) - 3 * costs.saved_per_image(matrix)
    assert once >= D * N * N * 4


def test_bytes_of_a_step_are_those_of_timms_block():
    """What goes into and out of every layer of a block, by hooks; attention and residuals by their arguments."""
    config = ModelConfig(image_size=(64, 64), patch_size=8, width=48, depth=1, heads=3)
    model, moved = timm_model(config), []
    for module in model.blocks.modules():
        if isinstance(module, nn.Linear | nn.LayerNorm | nn.GELU):
            module.register_forward_hook(lambda _, given, out: moved.append(given[0].numel() + out.numel()))
    model(torch.randn(1, 3, 64, 64))
    tokens = 65 * 48
    attention, residuals = (3 + 1) * tokens, 2 * (2 + 1) * tokens
    assert costs.step_bytes(config) == 3 * 2 * (sum(moved) + attention + residuals)


def test_every_model_of_every_table_has_a_cost_and_is_listed(capsys):
    found = cost_rows()
    assert found[:4] == [BASE, AGAIN, *CLAIMED] and cost_config(AGAIN) == cost_config(BASE)
    assert min(costs.CPU.group, costs.GPU.group) >= 4  # a control vouches for no other rounds than its own
    models = [cost_config(row) for row in found]
    assert len(set(map(describe, found))) == len(found) == len(set(models)) + 1  # the copy
    for row in sum(TABLES.values(), []):
        own = {k: row[k] for k in ("encoding", "stem", "global_pool", "mlp_only_blocks") if k in row}
        assert row == BAG or row.get("distilled") or cost_config(own) in models, row
    assert cost_config(BASE, "small", image_size=384).width == 384
    lines = run_cli(capsys, "experiments", "costs", "--list")[1].splitlines()
    assert [line.split("\t")[0] for line in lines] == [describe(row) for row in cost_rows()]


def test_rows_are_measured_once_and_group_by_group(tmp_path):
    """A budget that is spent ends it behind a group; the next call goes on from there."""
    threads, seen = torch.get_num_threads(), []
    for expected in ([BASE, AGAIN], [*CLAIMED]):
        left = measure_costs(tmp_path, "cpu", 1e-9, lambda *reported: seen.append(reported), QUICK)
        assert [(result.columns, rest) for result, rest in seen[-2:]] == [(row, left) for row in expected]
    assert left == len(cost_rows()) - 4 and torch.get_num_threads() == threads
    found = recorded("costs", tmp_path)
    assert [result.columns for result in found] == [BASE, AGAIN, *CLAIMED]
    for result in found:
        assert {"threads": 1, "mode": "eager", "rounds": 6, "batch_size": 8}.items() <= result.config.items()
        assert {"step_ratio/low", "inference_ratio/high"} < result.metrics.keys()
        assert not any("images_per_s" in name or "gigabytes" in name for name in result.metrics)
    base, _, peg, _ = (result.metrics for result in found)
    assert base["step_ratio/min"] == base["inference_ratio/max"] == 1
    assert peg["multiply_adds"] - base["multiply_adds"] == 9 * 16 * 24
    assert peg["parameters"] - base["parameters"] == 10 * 24


def test_a_machine_that_slows_down_slows_both(monkeypatch):
    """The clock drifts by half a second a round; the ratio, taken round by round, does not."""
    calls = []

    def drifting(step, device, times):
        calls.append(step.func.model.config.encoding)
        return (1.0 + 0.5 * ((len(calls) - 1) // 4)) * (1.25 if calls[-1] == "peg" else 1.0)

    monkeypatch.setattr(costs, "seconds_of", drifting)
    (result,) = costs.time_group([CLAIMED[0]], QUICK, "cpu", "commit")
    for kind in ("step", "inference"):
        ends = ("", "/low", "/high", "/min", "/max")
        assert {result.metrics[f"{kind}_ratio{end}"] for end in ends} == {1.25}


@needs_gpu
def test_a_gpu_gives_speed_and_memory():
    size = replace(costs.GPU, batch_size=64, rounds=6, steps_a_round=2)
    for result in costs.time_group([BASE, CLAIMED[0]], size, "cuda", "commit"):
        assert result.metrics["step_images_per_s"] > 0 and result.config["precision"] == "bf16"
        assert result.metrics["step_gigabytes"] > result.metrics["inference_gigabytes"] > 0
