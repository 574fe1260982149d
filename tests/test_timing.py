"""Stop-watches, and the step that they time."""

import copy

import pytest
import torch

from cpvt.config import ModelConfig, replace
from cpvt.lab.timing import Step, in_rounds, noise, ratios, summary
from cpvt.lab.timm_baseline import timm_model
from cpvt.model.vit import VisionTransformer


def test_each_is_timed_once_a_round_in_any_order_and_ratios_are_taken_round_by_round():
    """Bounds of 20 values: the sixth from either end (96 %), from 6 on the extremes, below that nothing."""
    order = []
    found = in_rounds({name: lambda name=name: order.append(name) or 1.0 for name in "ABC"}, 4)
    rounds = [tuple(order[i : i + 3]) for i in range(0, 12, 3)]
    assert all(set(names) == set("ABC") for names in rounds) and len(set(rounds)) > 1
    assert found == {name: [1.0] * 4 for name in "ABC"}
    assert ratios([30.0, 15.0], [20.0, 10.0]) == [1.5, 1.5]
    assert summary("x", [3, 1, 2]) == {"x": 2, "x/min": 1, "x/max": 3}
    assert summary("x", [3, 1, 2, 6, 5, 4]) == {"x": 3.5, "x/min": 1, "x/max": 6, "x/low": 1, "x/high": 6}
    assert summary("x", range(20)) == {"x": 9.5, "x/min": 0, "x/max": 19, "x/low": 5, "x/high": 14}


SMALL = ModelConfig(image_size=(16, 16), patch_size=4, width=24, depth=2, heads=3, num_classes=5)


@pytest.mark.parametrize("build", [VisionTransformer, timm_model])
@pytest.mark.parametrize("rate", [0.5, 0.0])
def test_drop_path_is_drawn_for_both_sides(build, rate):
    """Two steps from the same weights differ, and do not where nothing is left out."""
    torch.manual_seed(0)
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


def test_every_model_is_compiled_however_many_there_are(monkeypatch):
    """By itself torch.compile leaves the ninth of a class as it is."""
    graphs, compiled = [], VisionTransformer.compile
    keep = lambda graph, _: graphs.append(graph) or graph.forward  # noqa: E731
    monkeypatch.setattr(VisionTransformer, "compile", lambda model, mode: compiled(model, backend=keep))
    torch.compiler.reset()
    for depth in range(1, 11):
        model = VisionTransformer(replace(SMALL, depth=depth))
        Step(model, "cpu", "default", training=False).settle(*noise(SMALL, 4, "cpu"))
    assert len(graphs) == 10
