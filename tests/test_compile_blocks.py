"""One compiled block serves all blocks and models that are alike in it, and computes the same."""

import json
import warnings

import pytest
import torch
from helpers import tiny_run

from cpvt import ModelConfig, proven
from cpvt.model.vit import Block, VisionTransformer
from cpvt.training.train import train


@pytest.fixture
def graphs(monkeypatch):
    """What was compiled so far; the graphs run as they are, for what is tested is who shares one."""
    found, compiled = [], Block.compile

    def keep(graph, _):
        found.append(graph)
        return graph.forward

    torch._dynamo.reset()
    monkeypatch.setattr(Block, "compile", lambda block: compiled(block, backend=keep))
    with torch._dynamo.config.patch(recompile_limit=64):  # monkeypatch would leave the option hidden
        yield found
    torch._dynamo.reset()


def outputs(encoding, compiled):
    """-> logits and a gradient of a training step, and the logits of an evaluation."""
    torch.manual_seed(0)
    sizes = {"image_size": (8, 8), "patch_size": 1, "width": 16, "heads": 2, "depth": 3}
    model = VisionTransformer(ModelConfig(**sizes, num_classes=4, drop_path=0.1, encoding=encoding))
    images, scale = torch.randn(4, 3, 8, 8), model.drop_path_scale(torch.rand(3, 2, 4))
    for block in model.blocks if compiled else ():
        block.compile()
    logits = model.train()(images, scale)
    logits.sum().backward()
    with torch.no_grad():
        return [logits.detach(), model.patch_embed.proj.weight.grad, model.eval()(images)]


def test_blocks_are_compiled_once_for_all_models_whose_encoding_is_not_in_attention(graphs):
    for encoding in ("none", "learned", "peg(positions=(0, 1))", "relative"):
        torch.testing.assert_close(outputs(encoding, True), outputs(encoding, False), rtol=0, atol=0)
        assert len(graphs) == 2 or encoding == "relative"  # training and evaluation


def run_compiled(monkeypatch, out, compile, backend):
    """A short run; `backend` makes of a graph what is run in its place."""
    compile_with = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self: compile_with(self, backend=backend))
    monkeypatch.setattr("cpvt.training.compiled.PIECE", 3)  # of eight images
    proven.verdicts.clear()
    torch._dynamo.reset()
    return train(tiny_run(steps=2, compile=compile, out=str(out)))


def fails(graph, _):
    raise RuntimeError("no such kernel")


def wrong(graph, _):
    """A per cent more a block: gradients tell."""
    return lambda *inputs: tuple(out * 1.01 for out in graph(*inputs))


TRIED = [("model", lambda graph, _: graph.forward, 1), ("model", fails, 2), ("blocks", fails, 1)]


@pytest.mark.parametrize("compile, backend, tried", [*TRIED, ("blocks", wrong, 1)])
def test_a_compiler_that_fails_or_computes_otherwise_is_not_used(
    monkeypatch, tmp_path, compile, backend, tried
):
    compiled = backend not in (fails, wrong)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        run = run_compiled(monkeypatch, tmp_path, compile, backend)
    told = [str(w.message) for w in told if "not used" in str(w.message)]
    log = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    (noted,) = (entry["proven"] for entry in log if "proven" in entry)
    assert len(noted) == tried and len(told) == tried - compiled and run.steps == 2
    assert [verdict == proven.PROVEN for verdict in noted.values()] == [compiled] * tried
    modules = [run.model, *run.model.blocks]
    assert any(m._compiled_call_impl is not None for m in modules) == compiled
    assert all("nothing is compiled" in words for words in told[-1:])
