"""Costs: counts against formulas and against real memory, intervals by ranks, and a whole small measurement."""

from dataclasses import replace

import pytest
import torch

from cpvt.cli import main
from cpvt.config import ModelConfig
from cpvt.lab import costs
from cpvt.lab.costs import (
    AGAIN,
    BASE,
    cost_config,
    cost_rows,
    measure_costs,
    multiply_adds,
    parameters,
    saved_bytes,
    saved_per_image,
)
from cpvt.lab.results import read_rows
from cpvt.lab.tables import rows
from cpvt.model.vit import VisionTransformer

SMALL = ModelConfig(
    image_size=(24, 40), patch_size=8, width=24, depth=3, heads=3, num_classes=5, encoding="none"
)
H, W, D, L = 3, 5, 24, 3
N, T = H * W, H * W + 1
QUICK = replace(costs.CPU, model={"image_size": 32, "patch_size": 8, "width": 24, "depth": 6}, rounds=6)


def of(encoding: str, **changes) -> ModelConfig:
    return replace(SMALL, encoding=encoding, **changes)


# --------------------------------------------------------------------------- counts


def test_a_body_is_products_of_matrices():
    body = N * 3 * 64 * D + L * (12 * T * D * D + 2 * T * T * D) + D * 5
    assert multiply_adds(SMALL) == body
    assert multiply_adds(of("none", heads=1)) == body  # pairs cost the same however many heads share them


@pytest.mark.parametrize(
    "encoding, more",
    [
        ("learned", 0),
        ("sine", 0),
        ("rotary", 0),
        ("relative(on='bias')", 0),
        ("relative", L * D * (N * (H + W) + T)),
        ("relative(wrap=True)", L * D * (N * (H + W) + T)),
        ("relative(on='keys_values')", L * D * (2 * N * (H + W) + T)),
        ("peg", 9 * N * D),
        ("peg(positions=(0, 1, 2), shared=True)", 3 * 9 * N * D),
        ("peg(kernel=9)", 81 * N * D),
        ("peg(kernel=9, compute='matrix')", N * N * D),  # 9 = 2 * 5 - 1: it covers the grid
        ("peg(kernel=7, compute='matrix')", 49 * N * D),  # it does not
        ("learned + peg", 9 * N * D),
    ],
)
def test_what_an_encoding_adds(encoding, more):
    assert multiply_adds(of(encoding)) - multiply_adds(SMALL) == more


def test_a_larger_picture_has_more_of_the_same():
    """Everything but the pairs, and the head, is paid by the token."""
    for side in (32, 64):
        n = (side // 8) ** 2
        expected = n * 3 * 64 * D + L * (12 * (n + 1) * D * D + 2 * (n + 1) ** 2 * D) + D * 5
        assert multiply_adds(SMALL, side) == expected


def test_parameters_are_those_of_a_real_model():
    for encoding in ("learned", "relative", "peg(frozen=True)", "none"):
        real = sum(p.numel() for p in VisionTransformer(of(encoding)).parameters())
        assert parameters(of(encoding)) == real


def test_what_is_kept_is_what_the_gradient_needs():
    """A table keeps nothing, a PEG its input and no more; the matrices of a large kernel once a batch."""
    plain = saved_per_image(SMALL)
    for encoding in ("learned", "sine"):
        assert saved_per_image(of(encoding)) == plain
    for encoding, count in (("peg", 1), ("peg(positions=(0, 1))", 2), ("peg(repeat=3)", 3)):
        assert saved_per_image(of(encoding)) - plain == count * N * D * 4
    matrix = of("peg(kernel=9, compute='matrix')")
    assert saved_per_image(matrix) - plain == N * D * 4
    once = saved_bytes(matrix, 3) - 3 * saved_per_image(matrix)
    assert once >= D * N * N * 4


def test_every_model_of_every_table_has_a_cost():
    """Under its own name or that of an equal model; new rows come last, so that those behind claims stay first."""
    found = cost_rows()
    assert list(found)[:2] == [BASE, AGAIN] and cost_config(found[AGAIN]) == cost_config(found[BASE])
    models = [cost_config(row) for row in found.values()]
    for row in rows():
        assert (cost_config(row) in models) != cost_config(row).distilled, row.name
    first = {row.name for row in rows() if row.table in ("encodings", "placement")} | {AGAIN}
    assert set(list(found)[: len(first)]) == first
    for name, row in found.items():
        assert row.name == name and cost_config(row, "small").width == 384


def test_claims_are_timed_in_the_rounds_of_the_control(tmp_path, monkeypatch):
    """The control vouches for no other rounds than its own."""
    groups = []

    def timed(base, group, size, device):
        groups.append([row.name for row in group])
        return iter(())

    monkeypatch.setattr(costs, "_timed", timed)
    measure_costs(tmp_path, "cpu", size=QUICK)
    assert sum(groups, []) == list(cost_rows()) and max(map(len, groups)) == costs.GROUP
    (beside,) = (group for group in groups if AGAIN in group)
    assert {"one PEG", "five PEGs"} <= set(beside)


# --------------------------------------------------------------------------- measured


def test_rows_are_measured_once_and_group_by_group(tmp_path, monkeypatch):
    monkeypatch.setattr(costs, "GROUP", 2)
    threads, seen = torch.get_num_threads(), []
    names = [BASE, AGAIN, "one PEG", "kernel 27 at -1"]
    left = measure_costs(tmp_path, "cpu", 1e-9, lambda row, left: seen.append((row.row, left)), names, QUICK)
    assert left == 2 and seen == [(BASE, 2), (AGAIN, 2)]  # a budget that is spent ends it behind a group
    assert measure_costs(tmp_path, "cpu", names=names, size=QUICK) == 0
    assert torch.get_num_threads() == threads
    found = {row.row: row for row in read_rows("costs", tmp_path)}
    assert list(found) == names and measure_costs(tmp_path, "cpu", names=names, size=QUICK) == 0
    assert len(read_rows("costs", tmp_path)) == 4
    for row in found.values():
        assert row.config["threads"] == 1 and row.config["mode"] == "eager" and row.config["rounds"] == 6
        assert row.metrics["step_ratio/low"] <= row.metrics["step_ratio"] <= row.metrics["step_ratio/high"]
        assert not any("images_per_s" in name or "gigabytes" in name for name in row.metrics)
    base = found[BASE].metrics
    assert base["step_ratio/min"] == base["inference_ratio/max"] == 1
    assert found["one PEG"].metrics["multiply_adds"] - base["multiply_adds"] == 9 * 16 * 24
    assert found["one PEG"].metrics["parameters"] - base["parameters"] == 10 * 24


def test_a_machine_that_slows_down_slows_both(tmp_path, monkeypatch):
    """The clock drifts by half a second a round; the ratio, taken round by round, does not."""
    calls = []

    def drifting(work, device, times):
        calls.append(work.func.model.config.encoding)
        return (1.0 + 0.5 * ((len(calls) - 1) // 4)) * (1.25 if calls[-1] == "peg" else 1.0)

    monkeypatch.setattr(costs, "seconds_of", drifting)
    measure_costs(tmp_path, "cpu", names=["one PEG"], size=QUICK)
    (row,) = read_rows("costs", tmp_path)
    for kind in ("step", "inference"):
        assert {row.metrics[f"{kind}_ratio{end}"] for end in ("", "/low", "/high", "/min", "/max")} <= {1.25}
    rounds = [tuple(calls[i : i + 4]) for i in range(0, len(calls), 4)]
    assert len(rounds) == 6 and all(turn.count("peg") == 2 for turn in rounds) and len(set(rounds)) > 1


def test_the_command_lists_what_it_would_measure(capsys):
    main(["experiments", "costs", "--list"])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("\t")[0] for line in lines] == list(cost_rows())


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["costs", "--root", "images"], "'costs' has no root"),
        (["tables", "--device", "cpu"], "--device is for the experiment costs"),
        (["where", "--list"], "no experiment 'where'"),
        (["tables", "--scale", "fashion-mnist"], "leave one out"),
    ],
)
def test_options_that_would_be_ignored_are_refused(options, reason, capsys, tmp_path):
    with pytest.raises(SystemExit) as stop:
        main(["experiments", *options, "--out", str(tmp_path)])
    said = capsys.readouterr()
    assert stop.value.code == 2 and reason in said.err and len(said.err.splitlines()) == 1
    assert not said.out and not list(tmp_path.iterdir())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_gives_speed_and_memory(tmp_path):
    size = replace(costs.GPU, batch=64, rounds=6, steps=2)
    measure_costs(tmp_path, "cuda", names=[BASE, "one PEG"], size=size)
    for row in read_rows("costs", tmp_path):
        assert row.metrics["step_images_per_s"] > 0 and row.config["precision"] == "bf16"
        assert row.metrics["step_gigabytes"] > row.metrics["inference_gigabytes"] > 0
