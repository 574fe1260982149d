"""One compiled block serves all blocks and models that are alike in it, and computes the same."""

import pytest
import torch

from cpvt import ModelConfig
from cpvt.model.vit import Block, VisionTransformer


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
