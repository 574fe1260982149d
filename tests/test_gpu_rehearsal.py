"""Nothing mixes devices on a GPU, and the host waits for it only where a list says so.

Rehearsed on tensors without data (`rehearsal.py`): whole runs, transforms, probes and scores.
"""

import itertools
import re
from collections import namedtuple
from dataclasses import replace

import pytest
import torch
from models import ENCODINGS, PAIRS, POOLS, small_model
from rehearsal import moved, on_a_gpu, watched

from cpvt.config import DataConfig, ModelConfig, OptimConfig, RunConfig, TrainConfig
from cpvt.data import randaugment
from cpvt.data.datasets import ImageTensors
from cpvt.data.decode import Decoder
from cpvt.data.transforms import TrainTransform
from cpvt.lab import metrics, probes
from cpvt.training.distributed import World
from cpvt.training.recipes import DEIT_AUGMENT
from cpvt.training.train import Trainer, take_steps

# What may wait, and why.
ALLOWED = {
    r"train\.take_steps: number": "a log entry, and the look at skipped steps",
    r"trainer\.mean_loss: number": "a log entry",
    r"evaluate\.accuracy: .*": "counts of right answers",
    r"(rng|synthetic)\..*": "drawn tasks alone, whose images take longer to draw than to wait for",
}


def small_run(encoding, pool, precision, steps=4):
    body = dict(patch_size=1, width=16, depth=4, heads=2, drop_path=0.1, **POOLS[pool])
    return TrainConfig(
        model=ModelConfig(encoding=encoding, **body),
        data=DataConfig(name="where", grid=(8, 8), train_size=16, test_size=8),
        optim=OptimConfig(global_batch_size=8, micro_batch_size=4, steps=steps, ema_decay=0.9, clip_grad=1.0),
        run=RunConfig(device="cuda", log_every=steps, precision=precision),
    )


ALL = [*itertools.product(ENCODINGS, POOLS, PRECISIONS := ("bf16", "fp32", "fp64"))]
QUICK = [(*pair, PRECISIONS[i % 3]) for i, pair in enumerate(PAIRS)][1::4]  # three seconds each
slow = [pytest.param(*run, marks=pytest.mark.slow) for run in ALL if run not in QUICK]


@pytest.mark.parametrize("encoding, pool, precision", QUICK + slow)
def test_training_and_evaluation(encoding, pool, precision):
    """Batches, drop path, two micro-batches a step, clipping, fused AdamW, skipped steps, averages, evaluation."""
    with watched() as witness:
        trainer = Trainer(small_run(encoding, pool, precision), World(device="cuda"))
        assert all(p.is_cuda for p in trainer.model.parameters())
        witness.waits.clear()
        assert take_steps(trainer)["images"] and trainer.step == 4
    assert not [what for what in witness.waits if not any(re.fullmatch(known, what) for known in ALLOWED)]
    assert witness.waits["train.take_steps: number"] <= 3, "none but those of the one entry"


def images_of(*sizes):
    return [torch.empty(3, *size, dtype=torch.uint8, device="cuda") for size in sizes]


@pytest.mark.parametrize("store", ["files", "memory"])
def test_augmentation_and_mixing(monkeypatch, store):
    """DeiT's recipe with all operations, over several epochs of draws; as it is, since its parts are compiled on a
    GPU."""
    monkeypatch.setattr(randaugment, "_compiled", lambda function: function)
    monkeypatch.setattr(torch.Tensor, "normal_", lambda tensor, **_: tensor)
    transform = TrainTransform(replace(DEIT_AUGMENT, mix_group=4), 32, 10, 0.1, 0, "cpu")
    with watched() as witness:
        transform.device = torch.device("cuda")
        transform.mean, transform.std = (torch.empty(3, 1, 1, device="cuda") for _ in range(2))
        images = images_of((40, 50), (33, 64), (90, 31), (32, 32)) * 4
        images = torch.stack(images_of((40, 40)) * 16) if store == "memory" else images
        for epoch in range(3):
            labels = torch.zeros(16, dtype=torch.int64)
            pixels, targets = transform(images, labels, epoch, torch.arange(16), torch.arange(4))
            assert pixels.is_cuda and pixels.shape == (16, 3, 32, 32) and targets.is_cuda
    assert not witness.waits


def test_decoding():
    """The stream is idle before each decode, for the reason that `Decoder` gives; nothing else waits."""
    from encoded import ODD, Folder, photos

    source, request = Folder(*photos(3), ODD["cmyk"]), namedtuple("Request", "indices")(torch.arange(4))
    decoder = Decoder(source, "cuda", decode_jpegs=lambda batch: [])
    read = decoder.reader[request]
    with watched() as witness:
        sizes = [span[1:3] for span in read.spans if span[3]]
        decoder.decode_jpegs = lambda batch: images_of(*sizes)
        found = decoder(read)
        assert len(sizes) == 3 and all(image.is_cuda for image in found.images) and not found.refused
    assert witness.waits == {"decode.__call__: stream": 1}


@pytest.mark.parametrize("encoding", ["learned(antialias=True)", "peg", "relative(clip=2) + peg + rotary"])
def test_probes_and_scores(encoding):
    """Of a model on a GPU they need no more than to be given it; they may wait."""
    model = small_model(encoding, (8, 8), num_classes=7)
    with watched():
        moved(model).eval()
        images = torch.empty(4, 3, 8, 8, device="cuda")
        pixels, labels = images_of((64, 64)), torch.zeros(4, dtype=torch.int64, device="cuda")
        probes.reach(model, range(2), (8, 8))
        probes.order_reach(model, range(1, 3), (8, 8))
        for score in (probes.permutation_error, probes.attention_maps, metrics.score_position):
            score(model, images)
        metrics.score_attention(model, images)
        metrics.score_map_errors(model, images, images.repeat(1, 1, 1, 2)[..., :9])
        held = ImageTensors(torch.stack(pixels * 4), labels, ("a",) * 7)
        metrics.score_shifts(model, held, torch.arange(4), "bf16")


def test_the_witness_sees_what_waits():
    """Without which the tests above could not fail."""
    with watched() as witness:
        x, mask = torch.ones(4, device="cuda"), torch.tensor([True, False, True, True])
        quiet = x * 2 + torch.ones(4).pin_memory().to("cuda", non_blocking=True)
        assert quiet.is_cuda and not witness.waits
        assert x[mask].shape == (3,)
        float(x.sum()), x.cpu().tolist(), torch.ones(4).to("cuda"), x.new_tensor([1.0]), x[x > 0]
        torch.ones(4).to("cuda", non_blocking=True)  # from memory that is not pinned
        with pytest.raises(RuntimeError, match="two different devices|same device"):
            x + torch.ones(4)
    seen = {what.split(": ")[1]: n for what, n in witness.waits.items()}
    assert seen == {"index": 2, "number": 1, "to the CPU": 1, "from the CPU": 3}


@pytest.mark.parametrize(
    "encoding", ["peg(padding='circular')", "peg(kernel=7)", "peg(skip=False, bias=False)", "peg"]
)
def test_pegs_of_every_kind_compute_in_the_weights_precision(encoding):
    """Under autocast, too: rows that compare paddings must not compare two kinds of arithmetic as well."""
    seen = []

    class Seen(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
            if "convolution" in str(operator) or "cpvt" in str(operator):
                seen.append(args[0].dtype)
            return operator(*args, **kwargs or {})

    model = small_model(encoding, (8, 8))
    with on_a_gpu():
        images = torch.empty(2, 3, 8, 8, device="cuda")
        with torch.autocast("cuda", torch.bfloat16), Seen():
            loss = moved(model)(images).float().sum()
            loss.backward()
    assert len(seen) == 4 and seen.count(torch.bfloat16) == 2, (
        "the patches' convolution is rounded, the PEG's not"
    )
