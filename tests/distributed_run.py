"""What `test_distributed.py` runs under torchrun, with the folder of pictures and one for its answers."""

import os
import sys
from pathlib import Path

import torch
from pictures import small_run
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

from cpvt.config import replace
from cpvt.data.loader import Share, open_batches
from cpvt.training.distributed import World, join_world
from cpvt.training.train import train


def batches(config, rank: int, world: int, micro: int, steps: int = 4) -> torch.Tensor:
    """The images and mixed labels of this process, step by step, in one tensor."""
    loader = open_batches(
        config.data,
        config.optim.global_batch_size,
        config.run.seed,
        share=Share(rank, world, micro),
        augment=config.augment,
        smoothing=config.optim.label_smoothing,
    )
    found = [loader.batch(step) for step in range(steps)]
    return torch.stack([torch.cat([images.flatten(1), targets], 1) for images, targets in found])


def precise(pictures: str, **changes):
    """Twenty steps in float64 on seven held-out images a class, 21 in all: an odd number."""
    config = small_run(Path(pictures), **{"precision": "fp64", "steps": 20, **changes})
    return replace(config, optim=replace(config.optim, ema=0.0))


def trained(pictures: str, **changes) -> dict:
    run = train(precise(pictures, **changes))
    weights = torch.cat([p.detach().flatten() for p in run.model.parameters()])
    return {"weights": weights, "losses": torch.tensor([e["loss"] for e in run.history]), **run.metrics}


def exchanges(pictures: str) -> int:
    """How often gradients are sent in five steps of two micro-batches."""
    sent, own = [], World.wrap

    def counted(world: World, model):
        def hook(_, bucket):
            sent.append(bucket.index())
            return allreduce_hook(None, bucket)

        wrapped = own(world, model)
        wrapped.register_comm_hook(None, hook)
        return wrapped

    World.wrap = counted
    train(precise(pictures, batch=16, micro_batch_size=4, steps=5))
    World.wrap = own
    return sent.count(0)


if __name__ == "__main__":
    torch.set_num_threads(1)
    pictures, out = sys.argv[1:]
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    found = {
        f"batches micro {micro}": batches(small_run(Path(pictures)), rank, world, micro) for micro in (0, 4)
    }
    for micro in (8, 4):  # batch 16, so 8 images a process: one micro-batch, and two
        found[f"trained micro {micro}"] = trained(pictures, batch=16, micro_batch_size=micro)
    found["exchanges"] = exchanges(pictures)
    with join_world("cpu") as here:
        found["sum"] = here.sum(torch.tensor([rank + 1]))
        found["any"] = here.any(rank == 1), here.any(False)
    torch.save(found, f"{out}/{rank}.pt")
