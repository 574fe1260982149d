"""What torch.compile makes of a training step for a GPU, on a machine without one (`rehearsal.py` says how)."""

import pytest
import torch
from models import ENCODINGS, random_model
from rehearsal import compiled, gradients, moved, on_a_gpu

from cpvt.config import ModelConfig
from cpvt.model.vit import VisionTransformer

# The relative ones index by offsets that are computed, which the code generator once could not order.
QUICK = ("peg", "relative(clip=2, on='keys_values')", "relative(clip=2, on='bias', wrap=True)")
slow = [pytest.param(encoding, marks=pytest.mark.slow) for encoding in ENCODINGS]


def training_step(encoding, depth=1, batch_size=8, **options):
    """-> the code of forward and backward pass of DeiT-tiny's block, in bf16, without an update."""
    model = VisionTransformer(ModelConfig(depth=depth, encoding=encoding, drop_path=0.1, **options)).train()

    def step(images, scale):
        with torch.autocast("cuda", torch.bfloat16):
            return model(images, scale).float().square().mean()

    with on_a_gpu():
        moved(model)
        images = torch.empty(batch_size, 3, *model.config.image_size, device="cuda")
        return compiled(step, images, torch.ones(depth, 2, batch_size, device="cuda"))


@pytest.mark.parametrize("encoding", [*QUICK, *slow])
def test_code_for_a_gpu_is_written(encoding):
    depth = 3 if "(-1, 0, 1)" in encoding else 2 if "queries_keys" in encoding else 1
    forward, backward = training_step(encoding, depth)
    assert forward.kernels > 5 and backward.kernels > forward.kernels
    if encoding == "peg":  # by the operator, whose strides the compiler leaves alone
        assert forward.source.count("ops.cpvt.peg.default(") == 1
        assert backward.source.count("ops.cpvt.peg_backward.default(buf") == 1


def test_gradients_are_those_of_pytorchs_engine():
    """On which everything else here stands: with a custom function, checkpoints, sums over broadcast axes."""
    model = random_model("relative(clip=2) + peg", (4, 5)).train()
    model.set_grad_checkpointing(True)
    loss = model(torch.randn(3, 3, 4, 5, dtype=torch.float64)).square().sum()
    expected = torch.autograd.grad(loss, [*model.parameters()], retain_graph=True)
    torch.testing.assert_close(gradients(loss, model.parameters()), expected, rtol=1e-12, atol=0)
