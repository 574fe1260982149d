"""Faults made on purpose: signals, full disks, killed processes, closed outputs, foreign files, refusals.

After each of them nothing is half-written, nothing is leaked, and the same call goes on, in the same process.
"""

import errno
import gc
import io
import json
import multiprocessing
import os
import pty
import shutil
import signal
import sys
import time
from contextlib import suppress
from pathlib import Path
from unittest import mock

import pytest
import torch
from helpers import alive, descendants, small_run, through, wait_until
from safetensors import safe_open
from safetensors.torch import save_file
from test_resume import assert_same, lasting

from cpvt import cli
from cpvt.config import replace, to_json
from cpvt.data import loader as loader_module
from cpvt.data.loader import make_ahead, make_loader
from cpvt.errors import ConfigError, DataError, TrainingError
from cpvt.training import distributed
from cpvt.training.checkpoint import Checkpoints, load_saved, only_run
from cpvt.training.distributed import Stopped
from cpvt.training.evaluate import accuracy
from cpvt.training.train import train


@pytest.fixture(autouse=True)
def no_nohup():
    """Signals do what they do in a terminal, also where the tests run without one."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.fixture(scope="module")
def whole(image_folder, tmp_path_factory):
    """The run that nothing happens to."""
    return train(small_run(image_folder, str(tmp_path_factory.mktemp("whole")), evaluate_every=1))


def config_of(image_folder, out, workers=0, **changes):
    config = small_run(image_folder, str(out), **{"evaluate_every": 1, "save_every": 5} | changes)
    return replace(config, data=replace(config.data, workers=workers))


def content(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


# --------------------------------------------------------------------------- signals


SET_UP = [("data", "SIGTERM"), ("data", "SIGINT"), ("checkpoint", "SIGHUP"), ("first step", "SIGUSR1")]


@pytest.mark.parametrize("where, name", SET_UP)
def test_a_signal_in_set_up_ends_at_once_and_leaves_nothing(image_folder, tmp_path, monkeypatch, where, name):
    """Whatever is at work: it would go on for an hour. A checkpoint that is read meanwhile is not spoiled."""
    config, last = config_of(image_folder, tmp_path / "new" / "out"), []
    before = {number: signal.getsignal(number) for number in loader_module.SIGNALS}

    def struck(*arguments, **options):
        os.kill(os.getpid(), signal.Signals[name])
        last.append(time.sleep(3600))

    if where == "checkpoint":
        train(replace(config, optim=replace(config.optim, steps=2, warmup_steps=1)))
        last += content(tmp_path)
        monkeypatch.setattr(torch, "load", struck)
    make = {"data": struck, "first step": through(struck)}.get(where, make_loader)
    with pytest.raises(Stopped, match=f"{name} before the first step"):
        train(config, make_loader=make)
    kept = [] if where == "data" else last or ["new", "new/out", "new/out/log.jsonl"]
    assert content(tmp_path) == kept and before == {n: signal.getsignal(n) for n in before}


def test_a_signal_in_an_evaluation_in_mid_run_loses_no_step(image_folder, whole, tmp_path):
    """Also where no checkpoint falls on its step; and the evaluation stands in the log once."""
    config = config_of(image_folder, tmp_path / "out")

    def struck(batches, *_):
        os.kill(os.getpid(), signal.SIGHUP)
        yield from batches

    run = train(config, make_loader=through(struck, "eval_batches"))
    assert (run.steps, run.interrupted) == (9, "SIGHUP")
    assert Checkpoints(tmp_path / "out" / "checkpoints").latest()[0] == 9
    assert train(config).metrics == whole.metrics
    assert_same(tmp_path / "out", whole.config.run.out)


def test_nohup_is_obeyed():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with distributed.SignalHandler() as signals:
            os.kill(os.getpid(), signal.SIGHUP)
            assert not signals.name
    finally:
        signal.signal(signal.SIGHUP, before)


# --------------------------------------------------------------------------- full disks


MODELS = ["model.safetensors", "model_ema.safetensors"]


def full(monkeypatch, part: str, times: int = 10**9) -> list[str]:
    """A disk that has no room for files whose path contains `part`, so many times; their beginning is written."""
    fails, real = [], open

    def opened(path, mode="r", *arguments, **options):
        if part in str(path) and "r" not in mode and len(fails) < times:
            fails.append(str(path))
            with real(path, "ab") as file:
                file.write(b'{"half')
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(path, mode, *arguments, **options)

    monkeypatch.setattr("io.open", opened)  # for pathlib
    monkeypatch.setattr("builtins.open", opened)
    return fails


@pytest.mark.parametrize("part", MODELS)
def test_a_model_that_cannot_be_written_is_written_by_the_same_call(
    image_folder, whole, tmp_path, monkeypatch, part
):
    config = config_of(image_folder, tmp_path)
    with monkeypatch.context() as patch:
        assert full(patch, f".{part}") == []
        with pytest.raises(TrainingError, match=r"model cannot be written .*No space.*same command"):
            train(config)
    assert {path.split("/")[0] for path in content(tmp_path)} <= {"checkpoints", "log.jsonl", MODELS[0]}
    assert train(config).metrics == whole.metrics
    assert_same(tmp_path, whole.config.run.out)


@pytest.mark.parametrize("times", [1, 4, 10**9])
def test_a_full_disk_costs_the_log_no_run_and_room_brings_it_back(
    image_folder, whole, tmp_path, monkeypatch, times, capsys
):
    config = config_of(image_folder, tmp_path)
    with monkeypatch.context() as patch:
        fails = full(patch, "log.jsonl", times)
        assert train(config).metrics == whole.metrics
    assert len(fails) >= min(times, 8) and capsys.readouterr().err.count("no room for log.jsonl") == 1
    if times < 10:
        assert lasting(tmp_path) == lasting(whole.config.run.out)
    assert not list(tmp_path.glob(".*"))


# --------------------------------------------------------------------------- processes and descriptors


def test_every_call_ends_its_processes_and_closes_its_files(image_folder, tmp_path):
    """Also after an error whose traceback is kept, and where batches are left half-read. What stays is the server
    that forks the readers, with a pipe to it, and multiprocessing's tracker."""
    config, kept, files = config_of(image_folder, tmp_path / "out", workers=2), [], []

    def opened():
        return make_loader(config.data, seed=0, global_batch_size=8)

    def failing(*_):
        raise KeyError("a step failed")

    broken = torch.nn.Linear(1, 1)
    broken.forward = failing
    calls = [
        lambda: next(opened().train_batches()),
        lambda: list(opened().eval_batches()),
        lambda: train(config),
        lambda: train(replace(config, run=replace(config.run, out="")), report=failing),
        lambda: accuracy(broken, opened().eval_batches()),
        lambda: train(replace(config, optim=replace(config.optim, lr=2.0))),  # another run is in its folder
    ]
    for _ in range(2):
        for call in calls:
            try:
                call()
            except (KeyError, ConfigError, AttributeError) as error:
                kept.append(error)
            gc.collect()  # DataLoader's objects refer to each other
            assert not descendants(os.getpid(), 2), call
        assert len(kept) == 3
        kept.clear()  # with the last batch
        files.append(len(os.listdir("/proc/self/fd")))
    assert files[1] <= files[0]


def test_the_lock_of_a_killed_run_is_free_at_once(image_folder, tmp_path):
    """Its readers do not hold it, and end."""
    config = config_of(image_folder, tmp_path, workers=2, steps=100_000)
    process = multiprocessing.get_context("spawn").Process(target=train, args=(config,))
    process.start()
    log = tmp_path / "log.jsonl"
    wait_until(lambda: log.exists() and '"loss"' in log.read_text())
    readers = descendants(process.pid, 2)
    with pytest.raises(ConfigError, match="another run"), only_run(tmp_path):
        pass
    process.kill()
    process.join()
    with only_run(tmp_path):
        pass
    assert len(readers) == 2
    wait_until(lambda: not any(map(alive, readers)), limit=60)


@pytest.mark.parametrize("kind", ["worker", "server"])
def test_a_reader_that_is_killed_costs_no_step(image_folder, whole, tmp_path, monkeypatch, kind):
    """One line, a checkpoint of the last whole step, and the same call goes on in the same process."""
    config = config_of(image_folder, tmp_path / "out", workers=2)

    def strike(entry):
        if entry["step"] == 6 and not struck:
            struck.extend(descendants(os.getpid(), 2))
            os.kill(struck[0] if kind == "worker" else int(parent_of(struck[0])), signal.SIGKILL)

    struck = []
    try:
        run = train(config, report=strike)
    except DataError as error:
        assert "killed" in str(error) and "\n" not in str(error) and "goes on after step" in str(error)
        step, spoiled = Checkpoints(tmp_path / "out" / "checkpoints").latest()
        assert step >= 6 and not spoiled and f"after step {step}" in str(error)
        run = train(config)
    else:
        assert kind == "server"  # those that it has forked may live on to the end
    wait_until(lambda: not any(map(alive, struck)), limit=60)
    assert run.metrics == whole.metrics
    assert_same(tmp_path / "out", whole.config.run.out)


def parent_of(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def test_what_goes_wrong_outside_of_a_step_costs_no_step(image_folder, whole, tmp_path):
    """Batches made ahead by a thread, a report, an evaluation; and what goes wrong in an update is not kept."""
    config = config_of(image_folder, tmp_path / "out")

    def broken(batches, start, _):
        def some():
            for i, batch in enumerate(batches):
                if i == 14 - 2 * start[0]:
                    raise MemoryError("no memory")
                yield batch

        return make_ahead(some())

    with pytest.raises(MemoryError):
        train(config, make_loader=through(broken))
    assert Checkpoints(tmp_path / "out" / "checkpoints").latest()[0] == 7
    with mock.patch("torch.optim.AdamW.step", side_effect=RuntimeError), pytest.raises(RuntimeError):
        train(config)
    assert Checkpoints(tmp_path / "out" / "checkpoints").latest()[0] == 7
    with mock.patch("cpvt.training.trainer.accuracy", side_effect=RuntimeError), pytest.raises(RuntimeError):
        train(config)
    assert Checkpoints(tmp_path / "out" / "checkpoints").latest()[0] == 9
    assert train(config).metrics == whole.metrics
    assert_same(tmp_path / "out", whole.config.run.out)


# --------------------------------------------------------------------------- outputs

FORK = multiprocessing.get_context("fork")  # of one thread, with the imports done
SMALL = "--data where --data.grid 6 6 --model.patch-size 1 --model.width 8 --model.depth 1 --model.heads 1 "
SMALL += "--optim.global_batch_size 4 --data.test-size 20 --run.device cpu --run.log-every 1"
LIST = ["experiments", "padding", "--list"]


def program(arguments, outputs, noise) -> None:
    """`cpvt ...` as Python starts it, with 1 or 2 as told: a closed pipe, a full disk, closed."""
    os.dup2(os.open(noise, os.O_WRONLY | os.O_CREAT), 2)
    for number, name in ((1, "stdout"), (2, "stderr")):
        kind = outputs.get(number)
        if kind == "pipe":
            reader, writer = os.pipe()
            os.dup2(writer, number)
            os.close(reader)
            os.close(writer)
        elif kind == "full":
            os.dup2(os.open("/dev/full", os.O_WRONLY), number)
        elif kind == "closed":
            os.close(number)
        stream = None if kind == "closed" else open(number, "w", closefd=False, buffering=number == 2 or -1)
        if kind == "pipe":  # as where PYTHONUNBUFFERED is set
            stream = io.TextIOWrapper(stream.buffer.detach(), write_through=True)
        setattr(sys, name, stream)
    torch.set_num_threads(1)
    cli.main(arguments)


def status_of(arguments, outputs, noise) -> int:
    process = FORK.Process(target=program, args=(arguments, outputs, noise))
    process.start()
    process.join()
    return process.exitcode


@pytest.mark.parametrize("kind", ["pipe", "full", "closed"])
def test_printing_ends_no_run_and_fails_what_only_prints(tmp_path, kind):
    noise = tmp_path / "noise"
    for numbers in ([1], [1, 2]):
        out = tmp_path / f"out{len(numbers)}"
        train_it = ["train", *SMALL.split(), "--optim.steps", "3", "--run.out", str(out)]
        assert status_of(train_it, dict.fromkeys(numbers, kind), noise) == 0, noise.read_text()
        assert load_saved(out / "model.safetensors") and len(lasting(out)) == 4
    status = status_of(LIST, {1: kind}, noise)
    assert status == (0 if kind == "pipe" else 2)
    said = noise.read_text()
    assert "Traceback" not in said and said.count("cpvt experiments: writing: ") == (kind != "pipe")


def in_a_terminal(arguments, name, master) -> None:
    os.close(master)
    os.setsid()
    terminal = os.open(name, os.O_RDWR)  # the first that a session opens is its own
    for number in range(3):
        os.dup2(terminal, number)
    sys.stdout, sys.stderr = (open(number, "w", closefd=False, buffering=1) for number in (1, 2))
    torch.set_num_threads(1)
    cli.main(arguments)


def test_a_terminal_that_is_closed_ends_a_run_as_a_signal_does(tmp_path):
    master, terminal = pty.openpty()
    arguments = ["train", *SMALL.split(), "--optim.steps", "1000000", "--run.out", str(tmp_path)]
    process = FORK.Process(target=in_a_terminal, args=(arguments, os.ttyname(terminal), master))
    process.start()
    os.set_blocking(master, False)

    def trained() -> bool:
        with suppress(BlockingIOError, OSError):
            os.read(master, 10**6)  # or who prints would wait
        log = tmp_path / "log.jsonl"
        return log.exists() and log.read_text().count("\n") > 5

    wait_until(trained)
    os.close(terminal)
    os.close(master)
    process.join(120)
    assert process.exitcode == cli.INTERRUPTED
    assert Checkpoints(tmp_path / "checkpoints").latest()[0] > 4


# --------------------------------------------------------------------------- refusals


@pytest.mark.parametrize("before", ["nothing", "a folder", "a link"])
def test_what_is_refused_leaves_nothing_behind(image_folder, tmp_path, before):
    out, precious = tmp_path / "new" / "out", tmp_path / "precious"
    precious.write_text("all I have")
    if before != "nothing":
        out.mkdir(parents=True)
    if before == "a link":
        (out / ".lock").symlink_to(precious)
    found, config = content(tmp_path), config_of(image_folder, out)
    data = replace(config.data, name=str(tmp_path / "nowhere"))
    wrong = [replace(config, data=data), replace(config, run=replace(config.run, init=str(precious)))]
    (tmp_path / "images").symlink_to(image_folder)
    among = str(image_folder / "train" / "new")
    wrong += [replace(config, run=replace(config.run, out=out)) for out in (str(precious), among)]
    wrong += [replace(wrong[-1], data=replace(data, name=str(tmp_path / "images")))]
    for refused in wrong:
        with pytest.raises(ValueError) as caught:
            train(refused)
        assert "\n" not in str(caught.value)
    (tmp_path / "images").unlink()
    assert not Path(among).exists()
    assert content(tmp_path) == found and precious.read_text() == "all I have"
    (tmp_path / "rows").mkdir()
    for arguments in (
        ["pack", str(tmp_path / "rows"), str(tmp_path / "new2" / "packed")],
        ["pack", str(image_folder), str(precious / "packed")],
        ["evaluate", str(precious)],
        ["experiments", "photographs", "--root", str(tmp_path), "--out", str(tmp_path / "new2")],
        ["benchmark", "--only", "nothing", "--out", str(tmp_path / "new2")],
        ["benchmark", "--size", "cpu", "--out", str(precious)],
        ["experiments", "costs", "--out", str(precious / "new2")],
        ["experiments", "baselines", "--out", str(precious), "--root", str(tmp_path)],
        ["experiments", "photographs", "--out", str(precious), "--root", str(tmp_path / "new3")],
        ["train", "--data", "where", "--optim.steps", "0", "--run.out", str(tmp_path / "new2")],
    ):
        with pytest.raises(SystemExit) as end:
            cli.main(arguments)
        assert end.value.code == 2
    assert content(tmp_path) == sorted([*found, "rows"])


@pytest.mark.parametrize(
    "task, step, words", [("0", "2", "by itself"), ("1", "", "by itself"), ("0", "", "")]
)
def test_tasks_of_slurm_without_torchrun(image_folder, monkeypatch, capsys, task, step, words):
    """Each would train the whole run; a batch script is alone, and is told."""
    config = small_run(image_folder, steps=1)
    for name, value in (("PROCID", task), ("STEP_NUM_TASKS", step), ("NTASKS", "2")):
        monkeypatch.setenv(f"SLURM_{name}", value)
    if words:
        with pytest.raises(ConfigError, match=words):
            train(config)
    else:
        train(config)
        assert "torchrun" in capsys.readouterr().err
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert train(config).steps == 1 and not capsys.readouterr().err


@pytest.mark.parametrize(
    "given, words",
    [
        ({"RANK": "x"}, "RANK='x'"),
        ({"RANK": "5", "WORLD_SIZE": "2"}, "RANK='5'"),
        ({"WORLD_SIZE": "-1"}, "WORLD_SIZE='-1'"),
        ({"WORLD_SIZE": "2"}, "RANK"),
        ({"RANK": "0", "WORLD_SIZE": "2"}, "MASTER_ADDR"),
        ({"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "x"}, "'x'"),
    ],
)
def test_what_torchrun_would_not_set_is_refused(monkeypatch, capsys, given, words):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit) as end:
        cli.main(["train", "--model.patch-size", "2"])
    said = capsys.readouterr().err
    assert end.value.code == 2 and words in said and "torchrun" in said and said.count("\n") == 1


# --------------------------------------------------------------------------- foreign files


def changes(state: dict) -> dict[str, object]:
    """What a checkpoint may hold that is whole, and not ours."""
    narrow = json.loads(state["config"])
    narrow["model"]["width"] = 8
    moments = {i: m | {"exp_avg": torch.zeros(1)} for i, m in state["optimizer"]["state"].items()}
    weights = {name: tensor[..., :1] for name, tensor in state["model"].items()}
    return {
        "a tensor": torch.zeros(3),
        "no dict": [1, 2],
        "other keys": {"weights": state["model"]},
        "no average": state | {"ema": []},
        "other weights": state | {"model": weights},
        "another configuration": state | {"config": json.dumps(narrow)},
        "no configuration": state | {"config": "{"},
        "other moments": state | {"optimizer": state["optimizer"] | {"state": moments}},
        "a log without steps": state | {"log": [{"loss": 1.0}]},
        "a step in words": state | {"step": "nine"},
    }


def test_a_checkpoint_of_foreign_content_is_passed_over(image_folder, whole, tmp_path):
    folder = Path(whole.config.run.out)
    good = Checkpoints(folder / "checkpoints").read(12)
    for what, foreign in changes(good).items():
        out = tmp_path / what
        shutil.copytree(folder, out)
        Checkpoints(out / "checkpoints", keep=9).save(13, foreign)
        run = train(config_of(image_folder, out))
        assert run.metrics == whole.metrics and run.steps == 12, what
        assert "passed over step-000000013" in (out / "log.jsonl").read_text(), what


def test_a_model_without_its_checkpoints_is_not_trained_over(image_folder, whole, tmp_path):
    shutil.copytree(whole.config.run.out, tmp_path, dirs_exist_ok=True)
    shutil.rmtree(tmp_path / "checkpoints")
    before = (tmp_path / "model.safetensors").read_bytes()
    with pytest.raises(ConfigError, match="holds a model.safetensors and no checkpoint"):
        train(config_of(image_folder, tmp_path))
    assert (tmp_path / "model.safetensors").read_bytes() == before


def test_a_model_whose_configuration_does_not_fit_is_named(whole, tmp_path):
    file = Path(whole.config.run.out) / "model.safetensors"
    with safe_open(file, "pt") as saved:
        tensors = {name: saved.get_tensor(name) for name in saved.keys()}
    about = to_json(whole.config)
    for state, said in (
        (tensors, about.replace('"width": 16', '"width": 8')),
        (tensors, about.replace('"width": 16', '"width": 1000000000')),
        ({"head.weight": torch.zeros(1)}, about),
        (tensors | {"more": torch.zeros(1)}, about),
        (tensors, "3"),
        (tensors, "[" * 100_000),
    ):
        save_file(state, tmp_path / "model.safetensors", metadata={"config": said})
        with pytest.raises(ConfigError, match="model.safetensors cannot be read") as caught:
            load_saved(tmp_path / "model.safetensors")
        assert "\n" not in str(caught.value)
