"""Nothing lost: a run that was interrupted, killed or out of disk ends up as one that never stopped."""

import json
import multiprocessing
import os
import random
import resource
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch
from pictures import draw_pictures, small_run

from cpvt.config import replace
from cpvt.data.loader import Images
from cpvt.errors import ConfigError
from cpvt.training import checkpoint
from cpvt.training.checkpoint import Checkpoints
from cpvt.training.train import train

WORLD = multiprocessing.get_context("forkserver")  # a clean process each, with the imports done once
WORLD.set_forkserver_preload(["cpvt.training.train", "torchvision.transforms.v2"])


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    return draw_pictures(tmp_path_factory.mktemp("pictures"))


@pytest.fixture(scope="module")
def whole(pictures, tmp_path_factory):
    """The run that nobody interrupts."""
    out = tmp_path_factory.mktemp("whole")
    return train(small_run(pictures, str(out), save_every=1))


def lasting(out) -> list[dict]:
    """The log without its configuration, notes, and what depends on the clock."""
    entries = [json.loads(line) for line in (Path(out) / "log.jsonl").read_text().splitlines()[1:]]
    clock = ("images_per_s", "seconds")
    return [{k: v for k, v in e.items() if k not in clock} for e in entries if "note" not in e]


def everything(out) -> dict:
    """All that the last checkpoint holds, flattened, but for the folder's name."""
    _, state = Checkpoints(Path(out) / "checkpoints").latest()
    flat = {f"model.{k}": v for k, v in state["model"].items()}
    for index, values in state["optimiser"]["state"].items():
        flat |= {f"optimiser.{index}.{k}": v for k, v in values.items()}
    flat |= {f"average.{i}": v for i, v in enumerate(state["average"])}
    return flat | {"skips": state["skips"], "best": torch.tensor(state["best"])}


def assert_same(out, other) -> None:
    one, two = everything(out), everything(other)
    assert one.keys() == two.keys() and len(one) > 60
    assert [name for name in one if not torch.equal(one[name], two[name])] == []
    assert lasting(out) == lasting(other)
    for name in ("model.safetensors", "model_ema.safetensors"):
        saved = [checkpoint.load_model(Path(folder) / name)[0].state_dict() for folder in (out, other)]
        assert all(torch.equal(saved[0][key], saved[1][key]) for key in saved[0])


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
@pytest.mark.parametrize("store", ["files", "memory"])
def test_a_signal_ends_the_step_saves_and_the_same_call_goes_on(pictures, whole, tmp_path, number, store):
    config = small_run(pictures, str(tmp_path / "out"), store)
    reference = whole if store == "files" else train(small_run(pictures, str(tmp_path / "ref"), store))
    entries = []

    def strike(entry):
        entries.append(entry)
        if entry["step"] in (4, 8):
            os.kill(os.getpid(), number)
            assert entry.get("loss")

    stops = []
    while not (run := train(config, report=strike)).metrics:
        stops.append((run.steps, run.interrupted))
        entries.clear()
    assert stops == [(5, signal.Signals(number).name), (9, signal.Signals(number).name)]  # the step in hand
    assert run.metrics == reference.metrics and run.history == reference.history
    assert_same(config.run.out, reference.config.run.out)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_to_the_whole_group_spares_the_reading_processes(pictures, whole, tmp_path, number):
    """torchrun, SLURM and systemd signal every process; the readers must live until the main one has saved."""
    config = small_run(pictures, str(tmp_path), save_every=100)
    config = replace(config, data=replace(config.data, workers=2))
    process = WORLD.Process(target=in_a_group, args=(config, number))
    process.start()
    process.join(120)
    assert process.exitcode == 0
    assert Checkpoints(tmp_path / "checkpoints").latest()[0] == 5
    assert train(config).metrics == whole.metrics
    assert_same(tmp_path, whole.config.run.out)


def in_a_group(config, number) -> None:
    """Trains at the head of a process group of its own, which is signalled after the fourth step."""
    torch.set_num_threads(1)
    os.setpgrp()
    run = train(config, report=lambda entry: entry["step"] == 4 and os.killpg(0, number))
    assert run.interrupted == signal.Signals(number).name and run.steps == 5


def test_a_signal_during_an_evaluation_cuts_it_short_and_it_is_made_again(pictures, tmp_path):
    config = small_run(pictures, str(tmp_path / "cut"), evaluate_every=1)
    reference = train(small_run(pictures, str(tmp_path / "whole"), evaluate_every=1))
    struck = []

    def strike(self, split="val"):
        for batch in own(self, split):
            if not struck:
                struck.append(os.kill(os.getpid(), signal.SIGTERM))
            yield batch

    own, Images.test = Images.test, strike
    try:
        first = train(config)
    finally:
        Images.test = own
    assert (first.steps, first.interrupted, first.metrics) == (9, "SIGTERM", {})
    assert "top1" not in (tmp_path / "cut" / "log.jsonl").read_text()
    second = train(config)
    assert second.metrics == reference.metrics
    assert_same(tmp_path / "cut", tmp_path / "whole")


def test_a_run_that_stopped_early_is_over(pictures, tmp_path):
    config = small_run(pictures, str(tmp_path), steps=60, stop_loss=100.0)
    assert train(config).steps == 20
    assert train(config).steps == 20


def test_two_runs_in_one_folder_are_refused(pictures, tmp_path):
    config = small_run(pictures, str(tmp_path))
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    checkpoints.lock()
    process = WORLD.Process(target=refused, args=(config,))
    process.start()
    process.join(120)
    assert process.exitcode == 0


def refused(config) -> None:
    with pytest.raises(ConfigError, match="is being written by another run"):
        train(config)


def test_data_that_changed_is_another_run_and_data_that_moved_is_not(pictures, whole, tmp_path):
    moved = tmp_path / "moved"
    shutil.copytree(pictures, moved)
    out = tmp_path / "out"
    shutil.copytree(whole.config.run.out, out)
    config = small_run(moved, str(out), save_every=1)
    assert train(config).metrics == whole.metrics
    next((moved / "train").rglob("*.jpg")).unlink()
    with pytest.raises(ConfigError, match="other training images there than here"):
        train(config)


def test_between_two_logged_steps_too(pictures, whole, tmp_path):
    """The losses since the last log entry are part of the state."""
    config = small_run(pictures, str(tmp_path), save_every=5)
    with pytest.raises(KeyboardInterrupt, match="pulled"):
        train(config, report=lambda entry: pull(entry["step"] == 6))
    assert [path.name[:14] for path in (tmp_path / "checkpoints").iterdir()] == ["step-000000005"]
    assert train(config).metrics == whole.metrics
    assert_same(tmp_path, whole.config.run.out)


def pull(now: bool) -> None:
    if now:
        raise KeyboardInterrupt("pulled")


def test_a_run_that_is_done_is_not_done_again(whole, pictures):
    before = lasting(whole.config.run.out)
    again = train(small_run(pictures, whole.config.run.out, save_every=1))
    assert again.metrics == whole.metrics and again.steps == 12
    assert lasting(whole.config.run.out)[: len(before)] == before


def test_another_run_in_the_same_folder_is_refused(whole, pictures):
    config = small_run(pictures, whole.config.run.out, seed=8, rate=2e-3)
    with pytest.raises(ConfigError, match=r"optim.lr: 0.001 there, 0.002 here; run.seed: 7 there, 8 here"):
        train(config)
    free = small_run(pictures, whole.config.run.out, micro_batch_size=8, log_every=3, save_every=4)
    assert train(free).metrics == whole.metrics  # how it is cut and how often it speaks is no other run


# --------------------------------------------------------------------------- kill -9


def child(config, at: str = "") -> None:
    """Trains, and dies where it is told to: "aside" in the middle of a file, "rename" before, "flush" after."""
    torch.set_num_threads(1)
    saves = 0

    def die(name, real):
        def deadly(*arguments, **options):
            nonlocal saves
            saves += name == at and ("step-" in str(arguments) or name == "flush")
            if saves == 6:
                if at == "write":
                    with open(arguments[1], "wb") as file:
                        file.write(b"half of it")
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*arguments, **options)

        return deadly

    checkpoint.os.replace = die("rename", os.replace) if at == "rename" else os.replace
    checkpoint._flush = die("flush", checkpoint._flush)
    if at == "write":
        checkpoint.write = die("write", checkpoint.write)
    train(config)


def run_child(config, at: str = "", after: float | None = None) -> int | None:
    """-> the exit status; `after`: seconds until it is killed."""
    process = WORLD.Process(target=child, args=(config, at))
    process.start()
    process.join(after if after is not None else 120)
    if after is None:
        assert not process.is_alive()
    process.kill()
    process.join()
    return process.exitcode


@pytest.mark.parametrize("at", ["write", "rename", "flush"])
def test_killed_in_the_middle_of_a_checkpoint(pictures, whole, tmp_path, at):
    config = small_run(pictures, str(tmp_path), save_every=1)
    assert run_child(config, at) == -signal.SIGKILL
    steps, _ = Checkpoints(tmp_path / "checkpoints").latest()
    assert steps == (6 if at == "flush" else 5)
    assert run_child(config) == 0
    assert_same(tmp_path, whole.config.run.out)
    assert not list(tmp_path.glob("checkpoints/.*"))  # what the dead process left half-written


@pytest.mark.parametrize("kills", [5, pytest.param(100, marks=pytest.mark.slow)])
def test_killed_at_random_moments(pictures, whole, tmp_path, kills):
    config = small_run(pictures, str(tmp_path), save_every=1)
    started = time.perf_counter()
    assert run_child(small_run(pictures, str(tmp_path / "timed"), save_every=1)) == 0
    needed, dice, fallen = time.perf_counter() - started, random.Random(kills), 0
    while fallen < kills:
        status = run_child(config, after=dice.uniform(0, 1.1 * needed))
        fallen += status == -signal.SIGKILL
        if status == 0:  # it got through: compare, and begin anew
            assert_same(tmp_path, whole.config.run.out)
            shutil.rmtree(tmp_path / "checkpoints")
        else:
            Checkpoints(tmp_path / "checkpoints").latest(lambda path: pytest.fail(f"spoiled: {path}"))
    assert run_child(config) == 0
    assert_same(tmp_path, whole.config.run.out)


# --------------------------------------------------------------------------- damage and full disks


def test_a_spoiled_checkpoint_is_passed_over_and_named(pictures, whole, tmp_path):
    config = small_run(pictures, str(tmp_path), save_every=1)
    train(replace(config, optim=replace(config.optim, steps=12)), report=None)
    newest, before, *_ = sorted((tmp_path / "checkpoints").iterdir(), reverse=True)
    data = bytearray(newest.read_bytes())
    data[len(data) // 2] ^= 1  # one bit
    newest.write_bytes(data)
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    assert checkpoints.read(newest.name) is None and checkpoints.read(before.name)[0] == 11
    assert train(config).metrics == whole.metrics
    assert newest.name in (tmp_path / "log.jsonl").read_text()


def test_a_spoiled_checkpoint_does_not_push_out_what_is_saved_later(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=1)
    checkpoints.save(6, {"x": torch.tensor(6)}).write_bytes(b"spoiled")
    assert checkpoints.latest() is None
    path = checkpoints.save(5, {"x": torch.tensor(5)})
    assert path.exists() and checkpoints.latest()[0] == 5


def test_only_the_last_ones_are_kept(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=2)
    for step in (1, 2, 3):
        checkpoints.save(step, {"x": torch.tensor(step)})
    assert len(list(tmp_path.iterdir())) == 2 and checkpoints.latest()[0] == 3


def limited(config, out: str) -> None:
    """Trains where no file may be larger than 60 kB, from the third checkpoint on."""
    torch.set_num_threads(1)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # so that the write fails, as on a full disk

    def limit(entry):
        if entry["step"] == 6:
            resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, resource.RLIM_INFINITY))
        if entry["step"] == 10:
            resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))

    run = train(config, report=limit)
    Path(out).write_text(json.dumps(run.metrics))


def test_a_checkpoint_that_cannot_be_written_costs_nothing_but_itself(pictures, whole, tmp_path):
    config = small_run(pictures, str(tmp_path / "out"), save_every=2)
    process = WORLD.Process(target=limited, args=(config, str(tmp_path / "result")))
    process.start()
    process.join(120)
    assert process.exitcode == 0 and json.loads((tmp_path / "result").read_text()) == whole.metrics
    notes = [json.loads(line) for line in (tmp_path / "out" / "log.jsonl").read_text().splitlines()]
    failed = [entry["step"] for entry in notes if "no checkpoint" in entry.get("note", "")]
    assert failed == [6, 8]
    assert not list((tmp_path / "out" / "checkpoints").glob(".*"))
    assert_same(tmp_path / "out", whole.config.run.out)


def test_on_a_full_file_system_the_older_checkpoint_stays(tmp_path):
    """A real small file system; needs the right to mount one."""
    room = tmp_path / "room"
    room.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=512k", "tmpfs", room], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"no right to mount: {mounted.stderr.decode().strip()}")
    try:
        checkpoints = Checkpoints(room, keep=3)
        first = {"x": torch.arange(60_000, dtype=torch.float32)}
        checkpoints.save(1, first)
        with pytest.raises(OSError, match="No space left"):
            checkpoints.save(2, {"x": torch.zeros(100_000)})
        assert [path.name[:14] for path in room.iterdir()] == ["step-000000001"]
        step, state = checkpoints.latest()
        assert step == 1 and torch.equal(state["x"], first["x"])
    finally:
        subprocess.run(["umount", room], check=True)
