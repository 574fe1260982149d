"""Batches ahead of time: the thread that makes them, and what a GPU must not change."""

import contextlib
import threading
import time
from dataclasses import replace
from itertools import islice

import pytest
import torch
from pictures import draw_pictures, small_run

from cpvt.data import loader
from cpvt.data.loader import AHEAD, Batch, Share, open_batches
from cpvt.errors import ConfigError
from cpvt.training.train import train

on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    return draw_pictures(tmp_path_factory.mktemp("pictures"))


def opened(config, device="cpu", micro=0):
    options = dict(augment=config.augment, smoothing=config.optim.label_smoothing)
    return open_batches(
        config.data, config.optim.global_batch_size, config.run.seed, device, Share(micro=micro), **options
    )


# --------------------------------------------------------------------------- the thread, with a GPU's part played


class Stream:
    """Stands for torch.cuda.Stream and torch.cuda.Event: everything is done at once."""

    def __init__(self, device=None): ...
    def record(self, stream): ...
    def wait_event(self, event): ...


@pytest.fixture
def thread(monkeypatch):
    """`_ahead` on a machine without a GPU."""
    for name, stand_in in {
        "Stream": Stream,
        "Event": Stream,
        "stream": lambda stream: contextlib.nullcontext(),
        "current_stream": Stream,
    }.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda self, stream: None)
    return lambda batches: loader._ahead(batches, "cuda")


def numbered(count=None, made=None, fails_at=None):
    """Micro-batches 0, 1, 2 ...; `made` notes how many there are."""
    i = 0
    while count is None or i < count:
        if i == fails_at:
            raise OSError("the disk is gone")
        if made is not None:
            made.append(i)
        yield Batch(torch.full((1,), i), torch.full((1,), i), 0, torch.tensor([i]))
        i += 1


def names() -> list[str]:
    return [t.name for t in threading.enumerate() if t.name == "batches"]


def test_the_thread_keeps_the_order_and_ends(thread):
    assert [int(batch.images) for batch in thread(numbered(20))] == list(range(20))
    assert names() == []


def test_the_thread_stays_a_few_batches_ahead_and_stops_when_nobody_asks(thread):
    made = []
    batches = thread(numbered(made=made))
    assert int(next(batches).images) == 0
    end = time.monotonic() + 10
    while len(made) < AHEAD + 1 and time.monotonic() < end:
        time.sleep(0.01)
    time.sleep(0.05)
    assert AHEAD + 1 <= len(made) <= AHEAD + 2  # ready ones, and one in hand
    batches.close()
    assert names() == []


def test_an_error_in_the_thread_is_raised_where_the_batch_is_asked_for(thread):
    batches = thread(numbered(fails_at=2))
    assert [int(next(batches).images) for _ in range(2)] == [0, 1]
    with pytest.raises(OSError, match="the disk is gone"):
        next(batches)
    assert names() == []


# --------------------------------------------------------------------------- without a thread


@pytest.mark.parametrize("store", ["memory", "files"])
def test_any_step_in_any_order_and_cut_in_any_way(pictures, store):
    config = small_run(pictures, store=store)
    batches, cut = opened(config), opened(config, micro=4)
    later = [batches.batch(step) for step in (7, 2)]
    for (images, targets), step in zip(later, (7, 2), strict=True):
        parts = list(islice(cut.micro_batches(step), cut.parts))
        assert len(parts) == 2 and [part.epoch for part in parts] == [step // batches.stream.steps] * 2
        assert torch.equal(torch.cat([part.images for part in parts]), images)
        assert torch.equal(torch.cat([part.targets for part in parts]), targets)


def test_held_out_images_are_shared_out_without_loss_or_doubles(pictures):
    config = small_run(pictures)
    whole = [labels for _, labels in opened(config).test()]
    parts = [
        torch.cat([labels for _, labels in open_batches(config.data, 8, 0, share=Share(rank, 4)).test()])
        for rank in range(4)
    ]
    assert sorted(map(len, parts)) == [5, 5, 5, 6] and sum(map(len, whole)) == 21
    assert torch.cat(parts).sort().values.equal(torch.cat(whole).sort().values)


def test_a_gpu_that_is_not_there_is_not_asked_to_decode(pictures):
    config = small_run(pictures)
    with pytest.raises(ConfigError, match="data.decode='gpu' with device 'cpu'"):
        opened(replace(config, data=replace(config.data, decode="gpu")))


# --------------------------------------------------------------------------- on a GPU


@on_gpu
@pytest.mark.parametrize("decode", ["gpu", "cpu"])
def test_a_gpu_gives_the_batches_of_the_cpu(pictures, decode):
    """Labels to the bit; pixels up to decoding and resampling, which later steps may amplify in few of them."""
    config = small_run(pictures)
    calm = replace(config, augment=replace(config.augment, randaugment=""))
    own, its = opened(calm), opened(replace(calm, data=replace(calm.data, decode=decode)), "cuda")
    for step in range(4):
        (images, targets), (other, answers) = own.batch(step), its.batch(step)
        assert torch.equal(targets, answers.cpu())
        difference = (images - other.cpu()).abs() * 255 * 0.226  # grey levels
        assert difference.mean() < 1, (
            f"{decode}: mean {difference.mean():.3f}, largest {difference.max():.1f} levels"
        )


@on_gpu
def test_batches_made_ahead_are_not_overwritten(pictures):
    """Each batch is summed as it comes, while others are made; and again, one at a time."""
    config = small_run(pictures, batch=24, micro_batch_size=24)
    batches = opened(config, "cuda")
    sums = []
    for batch in islice(batches.micro_batches(0), 30):
        torch.cuda._sleep(2_000_000)  # the model is slow: three batches are waiting
        sums.append(batch.images.double().sum())
    alone = [next(opened(config, "cuda").micro_batches(step)).images.double().sum() for step in range(30)]
    assert torch.equal(torch.stack(sums), torch.stack(alone))


@on_gpu
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_deterministic_run_on_a_gpu_goes_on_bit_for_bit(pictures, tmp_path, precision):
    """run.deterministic: deterministic kernels, cuBLAS workspaces of fixed size, no autotuning."""
    options = dict(device="cuda", deterministic=True, precision=precision, store="memory", save_every=3)
    whole = train(small_run(pictures, str(tmp_path / "whole"), **options))

    def pull(entry):
        if entry["step"] == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(small_run(pictures, str(tmp_path / "cut"), **options), report=pull)
    resumed = train(small_run(pictures, str(tmp_path / "cut"), **options))
    assert resumed.history == whole.history and resumed.metrics == whole.metrics
    for a, b in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(a, b)
