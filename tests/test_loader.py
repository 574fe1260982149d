"""Batches: the same for any step, parts, workers and device; what goes wrong is said and not waited for."""

import dataclasses
import multiprocessing
import os
import signal
import threading
import time
from contextlib import closing
from functools import partial
from itertools import count, islice

import pytest
import torch
from helpers import EVERYTHING, alive, draw_images, needs_gpu, small_run, wait_until

from cpvt.config import AugmentConfig, DataConfig, replace
from cpvt.data.decode import find_jpeg_decoder
from cpvt.data.loader import AHEAD, Batch, ImageLoader, make_ahead, make_loader, open_split
from cpvt.data.transforms import centre_resize, normalise
from cpvt.errors import ConfigError, DataError


def opened(config, **options) -> ImageLoader:
    optim = dict(global_batch_size=config.optim.global_batch_size, label_smoothing=0.1)
    return make_loader(config.data, seed=config.run.seed, augment=config.augment, **optim | options)


def with_data(config, **changes):
    return replace(config, data=replace(config.data, **changes))


def same(one, other) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("store, workers", [("memory", 0), ("files", 0), ("files", 2)])
def test_any_step_in_any_order_and_cut_in_any_way(image_folder, store, workers):
    config = with_data(small_run(image_folder, store=store), workers=workers)
    loader, cut = opened(with_data(config, workers=0)), opened(config, micro_batch_size=4)
    for step in (7, 2):
        images, targets = loader.batch(step)
        with closing(cut.train_batches(step)) as batches:
            parts = list(islice(batches, cut.micro_batches_per_step))
        assert [part.request.epoch for part in parts] == [step // loader.sampler.steps_per_epoch] * 2
        assert torch.cat([part.request.positions for part in parts]).equal(loader.sampler.positions(step)[1])
        assert torch.cat([part.images for part in parts]).equal(images)
        assert torch.cat([part.targets for part in parts]).equal(targets)
    for one, other in zip(loader.eval_batches(), cut.eval_batches(), strict=True):
        assert same(one, other)


@pytest.mark.parametrize("store", ["memory", "files"])
def test_a_cpu_finishes_batches_in_one_thread_and_gives_the_others_back(image_folder, store):
    """Threads would wait for each other at each of many small operations, and take the cores from readers."""
    loader, threads, seen = opened(small_run(image_folder, store=store)), torch.get_num_threads(), []
    finish = loader.transform
    loader.transform = lambda *batch: (seen.append(torch.get_num_threads()), finish(*batch))[1]
    torch.set_num_threads(3)
    try:
        next(loader.train_batches())
        assert seen == [1] and torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(threads)


def test_memory_and_files_hold_the_same_images(tiny_imagenet):
    """At the stored size both ways must give the same batches."""
    config = small_run(tiny_imagenet / "tiny-imagenet-200")
    in_memory = {"store": "memory", "stored_size": 64, "workers": -1}
    files, memory = opened(config), opened(with_data(config, **in_memory))
    assert same(memory.batch(1), files.batch(1))
    assert same(next(memory.eval_batches()), next(files.eval_batches()))
    expected = centre_resize([image for image, _ in map(files.val_set.__getitem__, range(8))], 16, 0.875)
    assert torch.equal(next(files.eval_batches())[0], normalise(expected.float() / 255))


def test_held_out_images_are_shared_out_and_parts_taken(image_folder):
    config = small_run(image_folder)
    (whole,) = (labels for _, labels in opened(config).eval_batches())
    options = dict(seed=0, world_size=30, train=False)  # more processes than images
    ranks = [make_loader(config.data, rank=rank, **options).eval_batches() for rank in range(30)]
    assert torch.cat([labels for rank in ranks for _, labels in rank]).equal(whole)
    config = small_run(image_folder)
    split = opened(with_data(config, hold_out=10))
    assert len(split.train_set) == 64 and split.val_set.labels.tolist() == [0] * 3 + [1] * 2 + [2] * 3
    few = open_split(replace(config.data, limit=6), "train")
    assert few.labels.tolist() == [0, 0, 1, 1, 2, 2]
    other_names = lambda _, split, *__: dataclasses.replace(few, classes=("a", split))  # noqa: E731
    with pytest.raises(DataError, match="2 classes to train on, 2 held out"):
        opened(config, open_split=other_names)
    config, cache = small_run(image_folder, store="memory"), {}
    first, second = opened(config, cache=cache), opened(config, cache=cache)
    assert first.train_set is second.train_set and first.val_set is second.val_set
    for other in opened(with_data(config, stored_size=16), cache=cache), opened(config):
        assert other.train_set is not first.train_set


def test_a_synthetic_task_goes_round_its_images():
    data = DataConfig(name="where", train_size=20, test_size=5)
    loader, part = (make_loader(data, seed=1, global_batch_size=8, world_size=world) for world in (1, 2))
    batch = next(loader.train_batches(2))
    assert (batch.request.epoch, batch.request.positions.tolist()) == (1, [16, 17, 18, 19, 0, 1, 2, 3])
    assert torch.equal(batch.images[4:], loader.batch(0)[0][:4])
    assert torch.equal(part.batch(2)[0], batch.images[:4])
    assert [len(labels) for _, labels in part.eval_batches()] == [3]
    with pytest.raises(ConfigError, match="never augmented"):
        make_loader(data, seed=1, global_batch_size=8, augment=EVERYTHING)


def test_a_third_of_bad_images_never_ends_a_run_and_a_disk_that_dies_soon_does(tmp_path):
    """However small the micro-batches: of four, three are bad in one of nine."""
    root = draw_images(tmp_path, train=100, val=1)
    files = sorted((root / "train").rglob("*.jpg"))
    for path in files[::3]:
        path.write_bytes(b"")
    augment = AugmentConfig(mix_group=4, repeated_aug=3)
    sizes = dict(global_batch_size=12, micro_batch_size=4)
    batches = make_loader(small_run(root).data, seed=0, augment=augment, **sizes).train_batches()
    bad = [len(batch.faults) for batch in islice(batches, 600)]
    assert max(bad) >= 3 and 600 < sum(bad) < 1000
    for path in files:
        path.write_bytes(b"")
    with pytest.raises(DataError, match=r"0\.jpg, empty\): see to files and disk"):
        [*islice(batches, 1 + 256 // 4)]
    with pytest.raises(DataError, match="cannot be used"):
        [
            *islice(opened(small_run(root), global_batch_size=8).train_batches(), 38)
        ]  # as many as there are images


SIGNALS = (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


def reading(folder, pipe) -> None:
    """Reads with two workers: tells their numbers, how a process that is no reader ends, whether a fork reads the
    same, then for each word what thirty batches gave."""
    os.setsid()
    for number in SIGNALS:
        signal.signal(number, lambda *_: None)
    data = replace(small_run(folder).data, workers=2)
    loader = partial(make_loader, data, seed=0, global_batch_size=8)
    batches = loader().train_batches()
    first = next(batches)
    pipe.send([child.pid for child in multiprocessing.active_children()])
    other = multiprocessing.get_context("forkserver").Process(target=time.sleep, args=(600,))
    other.start()
    other.terminate()
    other.join(20)
    pipe.send(other.exitcode)
    other.kill()
    if not (fork := os.fork()):
        pipe.send(torch.equal(loader().batch(0)[0], first.images))
        os._exit(0)
    os.waitpid(fork, 0)
    while pipe.recv():
        try:
            pipe.send(sum(len(next(batches).images) for _ in range(30)))
        except DataError as error:
            pipe.send(str(error))


def test_workers_outlive_signals_to_the_group_and_end_with_the_main_process(image_folder):
    """torchrun, SLURM and a terminal signal the group; the main process still needs its workers to save. Other
    processes of its own end as ever."""
    pipe, its = multiprocessing.Pipe()
    main = multiprocessing.get_context("spawn").Process(target=reading, args=(image_folder, its))
    main.start()
    its.close()
    workers = pipe.recv()
    assert pipe.recv() == -signal.SIGTERM and pipe.recv()
    for number in SIGNALS:
        os.killpg(main.pid, number)
    pipe.send("on")
    assert len(workers) == 2 and pipe.recv() == 240
    os.kill(workers[0], signal.SIGKILL)
    pipe.send("on")
    assert "DataLoader worker" in pipe.recv()  # an error, and no wait
    main.kill()
    wait_until(lambda: not any(alive(pid) for pid in workers))


def numbered(made: list, fails_at: int = -1):
    """Micro-batches 0, 1, 2 ...; `made` notes how many there are."""
    for i in count():
        if i == fails_at:
            raise OSError("the disk is gone")
        made.append(i)
        yield Batch(None, torch.full((1,), i), torch.full((1,), i))


def threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("batches")]


def test_a_thread_keeps_the_order_a_few_batches_ahead_and_stops_where_nobody_asks_or_it_fails():
    batches = make_ahead(numbered([], fails_at=20))
    assert [int(next(batches).images) for _ in range(20)] == list(range(20))
    with pytest.raises(OSError, match="the disk is gone"):
        next(batches)
    assert threads() == []
    made = []
    batches = make_ahead(numbered(made))
    assert [int(next(batches).images) for _ in range(2)] == [0, 1]
    wait_until(lambda: len(made) == AHEAD + 2)
    batches.close()
    assert len(made) == AHEAD + 2 and threads() == []


@needs_gpu
@pytest.mark.parametrize("decode", ["auto", "cpu"])
def test_a_gpu_gives_the_batches_of_the_cpu(image_folder, decode):
    """Labels to the bit; pixels up to decoding and resampling, which later steps may amplify in some."""
    if decode == "auto" and not find_jpeg_decoder():
        pytest.skip("torchcodec cannot be loaded")
    config = small_run(image_folder)
    # Without the two whose results a GPU does not share: operations that amplify, and its own erasing noise.
    calm = replace(config, augment=replace(config.augment, randaugment="", random_erasing=0.0))
    own, its = opened(calm), opened(with_data(calm, decode=decode, workers=2), device="cuda")
    batches = [(own.batch(step), its.batch(step)) for step in range(4)]
    batches += zip(own.eval_batches(), its.eval_batches(), strict=True)
    for (images, targets), (other, answers) in batches:
        assert torch.equal(targets, answers.cpu())
        difference = (images - other.cpu()).abs() * 255 * 0.226  # grey levels
        assert difference.mean() < 1


@needs_gpu
def test_batches_made_ahead_are_not_overwritten(image_folder):
    """Each batch is summed as it comes, while others are made; and again, one at a time."""
    loader, sums = opened(small_run(image_folder), global_batch_size=24, device="cuda"), []
    for batch in islice(loader.train_batches(), 30):
        torch.cuda._sleep(2_000_000)  # the model is slow: three batches are waiting
        sums.append(batch.images.double().sum())
    alone = [loader.batch(step)[0].double().sum() for step in range(30)]
    assert torch.equal(torch.stack(sums), torch.stack(alone))


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # DataLoader's own half
def test_workers_whose_start_is_broken_off_are_ended(image_folder, monkeypatch):
    def break_off(*_):  # once all are started
        raise KeyboardInterrupt

    config = with_data(small_run(image_folder, store="files"), workers=2)
    before = {*multiprocessing.active_children()}
    monkeypatch.setattr("torch.utils.data._utils.signal_handling._set_worker_pids", break_off)
    with pytest.raises(KeyboardInterrupt):
        next(opened(config).train_batches())
    left = {*multiprocessing.active_children()} - before
    for worker in left:
        worker.join(10)
    assert not {*multiprocessing.active_children()} - before
