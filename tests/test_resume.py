"""Nothing lost: a run that was interrupted, killed or out of disk ends up as one that never stopped."""

import errno
import fcntl
import json
import multiprocessing
import os
import random
import resource
import shutil
import signal
import time
from pathlib import Path
from unittest import mock

import pytest
import torch
from helpers import needs_gpu, small_run

from cpvt.data.loader import make_loader
from cpvt.errors import ConfigError
from cpvt.training.checkpoint import Checkpoints, load_saved, only_run
from cpvt.training.evaluate import accuracy
from cpvt.training.train import train

CLEAN = multiprocessing.get_context("forkserver")  # a clean process each, with the imports done once
CLEAN.set_forkserver_preload(["cpvt.training.train", "timm.optim", "torchvision.transforms.v2"])


ON_GPU = {"device": "cuda", "deterministic": True, "store": "memory"}


@pytest.fixture(scope="module")
def whole(image_folder, tmp_path_factory):
    """The run that nobody interrupts."""
    return train(small_run(image_folder, str(tmp_path_factory.mktemp("whole")), save_every=1))


def lasting(out) -> list[dict]:
    """The log without its configuration, notes, and what depends on the clock."""
    entries = [json.loads(line) for line in (Path(out) / "log.jsonl").read_text().splitlines()[1:]]
    clock = ("images_per_s", "hours_left", "seconds")
    return [{k: v for k, v in e.items() if k not in clock} for e in entries if "note" not in e]


def newest(out) -> dict:
    """What the newest checkpoint of a run holds."""
    checkpoints = Checkpoints(Path(out) / "checkpoints")
    step, spoiled = checkpoints.latest()
    assert step and not spoiled
    return checkpoints.read(step)


def assert_same(out, other) -> None:
    """Bit for bit: every tensor of the newest checkpoint, the log, the saved models."""
    one, two = newest(out), newest(other)
    for state in one, two:
        state["optimizer"] = state["optimizer"]["state"]
    for part in ("model", "optimizer", "ema", "skips", "losses"):
        torch.testing.assert_close(one[part], two[part], rtol=0, atol=0, equal_nan=True)
    assert lasting(out) == lasting(other)
    for name in ("model.safetensors", "model_ema.safetensors"):
        saved = [load_saved(Path(folder) / name)[0].state_dict() for folder in (out, other)]
        torch.testing.assert_close(*saved, rtol=0, atol=0)
    torch.testing.assert_close([*saved[0].values()], one["ema"], rtol=0, atol=0)


def in_a_process(work, *arguments, after: float | None = None) -> int | None:
    """-> the exit status of a process of its own; `after`: seconds until it is killed."""
    process = CLEAN.Process(target=work, args=arguments)
    process.start()
    process.join(600 if after is None else after)
    process.kill()
    process.join()
    return process.exitcode


CUT = [(signal.SIGUSR1, {"store": "memory"}), (signal.SIGINT, {"store": "files"})]
GPU = [(signal.SIGTERM, ON_GPU | {"precision": precision}) for precision in ("fp32", "bf16")]


@pytest.mark.parametrize("number, options", CUT + [pytest.param(*case, marks=needs_gpu) for case in GPU])
def test_a_signal_ends_the_step_saves_and_the_same_call_goes_on(image_folder, tmp_path, number, options):
    """On a GPU with deterministic kernels, cuBLAS workspaces of fixed size and no autotuning."""
    config = small_run(image_folder, str(tmp_path / "out"), **options)
    reference = train(small_run(image_folder, str(tmp_path / "whole"), **options))

    def strike(entry):
        if entry["step"] in (4, 8):
            os.kill(os.getpid(), number)

    stops = []
    while not (run := train(config, report=strike)).metrics:
        stops.append((run.steps, run.interrupted))
    assert stops == [(5, signal.Signals(number).name), (9, signal.Signals(number).name)]  # the step in hand
    assert run.metrics == reference.metrics and run.history == reference.history
    assert_same(config.run.out, reference.config.run.out)
    assert signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler)


def test_which_run_goes_on_in_a_folder(image_folder, whole, tmp_path):
    """One that is over is not done again; a move, or how it is cut and how often it speaks, is no other run."""
    moved, out = tmp_path / "moved", str(tmp_path / "out")
    shutil.copytree(image_folder, moved)
    shutil.copytree(whole.config.run.out, out)
    before = lasting(out)
    average, config, *_ = load_saved(f"{out}/model_ema.safetensors")
    scores = accuracy(average, make_loader(config.data, seed=7, train=False).eval_batches())
    assert scores["top1"] == whole.metrics["ema_top1"]
    assert not torch.equal(average.head.weight, load_saved(f"{out}/model.safetensors")[0].head.weight)
    for config in (
        small_run(image_folder, out, save_every=1),
        small_run(moved, out, save_every=1),
        small_run(image_folder, out, micro_batch_size=8, log_every=3, save_every=4),
    ):
        again = train(config)
        assert again.metrics == whole.metrics and again.steps == 12 and lasting(out) == before
    with pytest.raises(ConfigError, match=r"optim.lr: 0.001 there, 0.002 here; run.seed: 7 there, 8 here"):
        train(small_run(image_folder, out, seed=8, lr=2e-3))
    for path in (moved / "train").rglob("*.jpg"):  # under the same names
        path.write_bytes(path.read_bytes() + b"\0")
    with pytest.raises(ConfigError, match="other training images"):
        train(small_run(moved, out, save_every=1))
    early = small_run(image_folder, str(tmp_path / "early"), steps=60, stop_loss=100.0)
    assert [train(early).steps for _ in range(2)] == [20, 20]


def test_a_folder_belongs_to_one_run_until_its_call_ends(image_folder, tmp_path):
    """However it ends: with its traceback kept, and its reading processes living on as forks that saw the lock."""
    config = small_run(image_folder, str(tmp_path), steps=1)
    reader = multiprocessing.get_context("fork").Process(target=time.sleep, args=(3600,))
    with pytest.raises(RuntimeError, match="a step failed") as kept, only_run(tmp_path):
        reader.start()
        assert in_a_process(train, config) == 1
        raise RuntimeError("a step failed")
    assert in_a_process(train, config) == 0 and kept.value.__traceback__ and reader.is_alive()
    reader.kill()
    for number, words in (errno.EACCES, "another run"), (errno.ENOLCK, "No locks available"):
        failing = mock.patch.object(fcntl, "lockf", side_effect=OSError(number, os.strerror(number)))
        with failing, pytest.raises(ConfigError, match=words), only_run(tmp_path):
            pass


def dying(config, at: str = "") -> None:
    """Trains, and dies as the sixth checkpoint is "written" by half, before it is "renamed", or is "flushed"."""
    torch.set_num_threads(1)
    fsync, rename, sixth = os.fsync, os.replace, "step-000000006.pt"

    def deadly_fsync(number):
        path = os.readlink(f"/proc/self/fd/{number}")
        if at == "written" and f"/.{sixth}" in path:
            os.truncate(path, os.path.getsize(path) // 2)
            os.kill(os.getpid(), signal.SIGKILL)
        if at == "flushed" and path.endswith("/checkpoints") and sixth in os.listdir(path):
            os.kill(os.getpid(), signal.SIGKILL)
        fsync(number)

    def deadly_rename(source, target):
        if at == "renamed" and f"/.{sixth}" in str(source):
            os.kill(os.getpid(), signal.SIGKILL)
        rename(source, target)

    os.fsync, os.replace = deadly_fsync, deadly_rename
    train(config)


@pytest.mark.parametrize("at", ["written", "renamed", "flushed"])
def test_killed_in_the_middle_of_a_checkpoint(image_folder, whole, tmp_path, at):
    config = small_run(image_folder, str(tmp_path), save_every=1)
    assert in_a_process(dying, config, at) == -signal.SIGKILL
    assert newest(tmp_path)["step"] == (6 if at == "flushed" else 5)
    assert train(config).metrics == whole.metrics
    assert_same(tmp_path, whole.config.run.out)
    assert not list(tmp_path.glob("checkpoints/.*"))  # what the dead process left half-written


@pytest.mark.parametrize("kills", [3, pytest.param(100, marks=pytest.mark.slow)])
def test_killed_at_random_moments(image_folder, whole, tmp_path, kills):
    config = small_run(image_folder, str(tmp_path), save_every=1)
    started = time.perf_counter()
    assert in_a_process(dying, small_run(image_folder, str(tmp_path / "timed"), save_every=1)) == 0
    needed, dice, fallen = time.perf_counter() - started, random.Random(kills), 0
    while fallen < kills:
        status = in_a_process(dying, config, after=dice.uniform(0, 1.1 * needed))
        fallen += status == -signal.SIGKILL
        if status == 0:  # it got through: compare, and begin anew
            assert_same(tmp_path, whole.config.run.out)
            shutil.rmtree(tmp_path / "checkpoints")
        else:
            assert not Checkpoints(tmp_path / "checkpoints").latest()[1]
    assert train(config).metrics == whole.metrics
    assert_same(tmp_path, whole.config.run.out)


def test_the_last_whole_checkpoints_are_kept_and_a_spoiled_one_is_named(image_folder, whole, tmp_path):
    config = small_run(image_folder, str(tmp_path), save_every=1)
    shutil.copytree(whole.config.run.out, tmp_path, dirs_exist_ok=True)
    newest, *_ = sorted((tmp_path / "checkpoints").iterdir(), reverse=True)
    data = bytearray(newest.read_bytes())
    data[data.index(whole.model.head.weight.detach().numpy().tobytes())] ^= 1  # one bit of a weight
    newest.write_bytes(data)
    assert Checkpoints(tmp_path / "checkpoints").read(12) is None
    assert train(config).metrics == whole.metrics
    assert newest.name in (tmp_path / "log.jsonl").read_text()
    folder = tmp_path / "by hand"
    checkpoints = Checkpoints(folder, keep=2)
    for step in (1, 2, 3):
        checkpoints.save(step, {"step": step})
    assert len(list(folder.iterdir())) == 2
    checkpoints.save(6, {"step": 6}).write_bytes(b"spoiled")
    assert checkpoints.read(checkpoints.latest()[0])["step"] == 3
    checkpoints.save(4, {"step": 4})  # not pushed out by the spoiled one, which counts for more steps
    assert checkpoints.read(checkpoints.latest()[0])["step"] == 4


def limited(config, out: str) -> None:
    """Trains where no file may be larger than 60 kB, from the third checkpoint to the fifth."""
    torch.set_num_threads(1)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # so that the write fails, as on a full disk

    def limit(entry):
        if entry["step"] in (6, 10):
            most = 60_000 if entry["step"] == 6 else resource.RLIM_INFINITY
            resource.setrlimit(resource.RLIMIT_FSIZE, (most, resource.RLIM_INFINITY))

    Path(out).write_text(json.dumps(train(config, report=limit).metrics))


def test_a_checkpoint_that_cannot_be_written_costs_nothing_but_itself(image_folder, whole, tmp_path):
    config = small_run(image_folder, str(tmp_path / "out"), save_every=2)
    assert in_a_process(limited, config, str(tmp_path / "result")) == 0
    assert json.loads((tmp_path / "result").read_text()) == whole.metrics
    notes = [json.loads(line) for line in (tmp_path / "out" / "log.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in notes if "no checkpoint" in entry.get("note", "")] == [6, 8]
    assert not list((tmp_path / "out" / "checkpoints").glob(".*"))
    assert_same(tmp_path / "out", whole.config.run.out)
