"""One compiled block serves all blocks and models that are alike in it, and computes the same."""

import pytest
import torch

from cpvt.config import replace
from cpvt.lab.experiments import FIVE, synthetic_config
from cpvt.model.vit import Block
from cpvt.training.train import train


@pytest.fixture
def graphs(monkeypatch):
    """What was compiled so far; the graphs run as they are, for what is tested is who shares one."""
    found, own = [], Block.compile
    monkeypatch.setattr(torch._dynamo.config, "recompile_limit", 8)  # put back behind the test
    monkeypatch.setattr(torch._dynamo.config, "accumulated_recompile_limit", 256)

    def keep(graph, _):
        found.append(graph)
        return graph.forward

    torch._dynamo.reset()
    monkeypatch.setattr(Block, "compile", lambda block: own(block, backend=keep))
    yield found
    torch._dynamo.reset()


def losses(encoding, **run):
    config = synthetic_config("where", encoding, max_steps=3)
    model = replace(config.model, depth=6, drop_path=0.1)
    data = replace(config.data, test_size=48)
    run = train(replace(config, model=model, data=data, run=replace(config.run, log_every=1, **run)))
    return [entry["loss"] for entry in run.history if "loss" in entry], run.metrics["top1"]


def test_blocks_are_compiled_once_for_all_rows_whose_encoding_is_not_in_attention(graphs):
    counts = []
    for encoding in ("none", "learned", "peg", FIVE):
        assert losses(encoding, compile="blocks") == losses(encoding)
        counts.append(len(graphs))
    assert 2 <= counts[0] <= 4 and counts == counts[:1] * 4  # training and evaluation, whole and last batches
    assert losses("rotary", compile="blocks") == losses("rotary")
    assert len(graphs) >= counts[0] + 6  # in attention each block has its own
