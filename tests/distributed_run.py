"""What `test_distributed.py` runs under torchrun, with the folder of images and one for its answers."""

import json
import os
import sys
import time
from pathlib import Path

import torch
from helpers import small_run, through
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

from cpvt.config import TrainConfig, from_json
from cpvt.training.distributed import join_world
from cpvt.training.train import Trainer, take_steps, train


def precise(images: str, **changes) -> TrainConfig:
    """Twenty steps in float64 on seven held-out images a class, 21 in all: an odd number."""
    changes = {"precision": "fp64", "steps": 20, "global_batch_size": 16, "ema_decay": 0.0, **changes}
    return small_run(Path(images), **changes)


def trained(images: str, **changes) -> dict:
    run = train(precise(images, **changes))
    weights = torch.cat([p.detach().flatten() for p in run.model.parameters()])
    return {"weights": weights, "losses": torch.tensor([e["loss"] for e in run.history]), **run.metrics}


def slowly(config: str) -> None:
    """Trains as configured, a fifth of a second a batch, and says what came of it; 75 as the command line does."""

    slow = through(lambda batches, *_: (time.sleep(0.2) or batch for batch in batches))
    run = train(from_json(TrainConfig, config), make_loader=slow)
    # One write: where Python does not buffer (PYTHONUNBUFFERED), print's pieces mix with the other process's.
    sys.stdout.write(f"ended {run.steps} {run.interrupted or json.dumps(run.metrics)}\n")
    sys.exit(75 if run.interrupted else 0)


def answers(images: str, out: str) -> None:
    rank = int(os.environ["RANK"])
    found = trained(images, micro_batch_size=4)  # batch 16, so 8 images a process in two micro-batches
    sent = []

    def count(_, bucket):
        sent.append(bucket.index())
        return allreduce_hook(None, bucket)

    with join_world("cpu") as here:
        trainer = Trainer(precise(images, micro_batch_size=4, steps=5), here)
        trainer.forward.register_comm_hook(None, count)
        take_steps(trainer)
        found["exchanges"] = sent.count(0)
        found["sum"] = here.sum(torch.tensor([rank + 1]))
        found["any"] = here.any(rank == 1), here.any(False)
        found["broadcast"] = here.broadcast(f"from {rank}")
    torch.save(found, f"{out}/{rank}.pt")


if __name__ == "__main__":
    torch.set_num_threads(1)
    {"answers": answers, "slowly": slowly}[sys.argv[1]](*sys.argv[2:])
