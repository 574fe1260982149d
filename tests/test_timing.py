"""Stop-watches, and the step that they time."""

import copy
import random
from contextlib import nullcontext

import pytest
import torch
from torch import nn

from cpvt.config import ModelConfig, replace
from cpvt.lab.timing import Step, each_compiled, in_rounds, noise, ratios, summary
from cpvt.lab.timm_baseline import timm_model
from cpvt.model.vit import VisionTransformer

# --------------------------------------------------------------------------- rounds


def test_each_is_timed_once_a_round_in_an_order_drawn_anew():
    order = []
    found = in_rounds({name: lambda name=name: order.append(name) or 1.0 for name in "ABC"}, 4)
    rounds = [tuple(order[i : i + 3]) for i in range(0, 12, 3)]
    assert all(set(names) == set("ABC") for names in rounds) and len(set(rounds)) > 1
    assert found == {name: [1.0] * 4 for name in "ABC"}


def test_a_machine_that_slows_down_slows_both():
    """The clock halves in the second round: the times' spread is wide, that of their ratio is nothing."""
    ours, theirs = [30.0, 15.0, 30.0], [20.0, 10.0, 20.0]
    assert summary("time", ours) == {"time": 30.0, "time/min": 15.0, "time/max": 30.0}
    assert set(summary("ratio", ratios(ours, theirs)).values()) == {1.5}


# --------------------------------------------------------------------------- medians


def interval(values) -> tuple[float, float] | None:
    found = summary("x", list(values))
    return (found["x/low"], found["x/high"]) if "x/low" in found else None


def test_the_interval_of_a_median_is_by_ranks():
    """For 20 values the sixth from either end (96 %), from 6 on the extremes, below that nothing."""
    assert interval(range(20)) == (5, 14)
    assert interval([3, 1, 2, 6, 5, 4]) == (1, 6) and interval(range(5)) is None


def test_the_interval_holds_the_median_as_often_as_it_says():
    dice = random.Random(0)
    held = 0
    for _ in range(500):  # exponential: as lopsided as times are; the median is log 2
        low, high = interval(dice.expovariate(1) for _ in range(20))
        held += low <= 0.6931 <= high
    assert 0.92 < held / 500 < 0.995  # 0.9586 by the binomial, four deviations of 500 draws are 0.036


# --------------------------------------------------------------------------- steps

SMALL = ModelConfig(image_size=(16, 16), patch_size=4, width=24, depth=2, heads=3, num_classes=5)


@pytest.mark.parametrize("build", [VisionTransformer, timm_model])
@pytest.mark.parametrize("rate", [0.5, 0.0])
def test_drop_path_is_drawn_for_both_sides(build, rate):
    """Two steps from the same weights differ, and do not where nothing is left out."""
    batch, model = noise(SMALL, 8, "cpu"), build(replace(SMALL, drop_path=rate))
    first, second = (Step(copy.deepcopy(model), "cpu")(*batch) for _ in range(2))
    assert torch.equal(first, second) == (rate == 0)


def test_a_step_trains_and_a_forward_pass_does_not():
    batch = noise(SMALL, 4, "cpu")
    assert torch.allclose(batch[1].sum(1), torch.ones(4))
    for training in (True, False):
        model = VisionTransformer(SMALL)
        before = model.head.weight.detach().clone()
        Step(model, "cpu", training=training)(*batch)
        assert torch.equal(model.head.weight, before) != training
        assert all(parameter.grad is None for parameter in model.parameters())


class Deep(nn.Module):
    """Layers one behind the other: at another depth another program, though the same class."""

    def __init__(self, depth: int):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(2, 2) for _ in range(depth))

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


@pytest.mark.parametrize("ours, compiled", [(True, 12), (False, 8)])
def test_every_model_of_a_long_comparison_is_compiled(ours, compiled):
    """Left alone, torch.compile takes the ninth model of a class for one recompilation too many."""
    graphs = []

    def counted(graph, inputs):
        graphs.append(graph)
        return graph.forward

    torch.compiler.reset()
    with each_compiled() if ours else nullcontext():
        for depth in range(1, 13):
            model = Deep(depth)
            model.compile(backend=counted)
            model(torch.zeros(1, 2))
    assert len(graphs) == compiled
    torch.compiler.reset()
