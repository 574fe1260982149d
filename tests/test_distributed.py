"""Two processes under torchrun do what one does: the same training, the same evaluation.

On the CPU with gloo. NCCL and several GPUs are not tested here.
"""

import os
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from distributed_run import trained
from helpers import descendants, small_run, wait_until

from cpvt.config import to_json
from cpvt.errors import ConfigError, DataError
from cpvt.training.distributed import Stopped, World
from cpvt.training.train import train

HERE = Path(__file__).parent
SCRIPT, PATH = HERE / "distributed_run.py", f"{HERE}:{os.environ.get('PYTHONPATH', '')}"
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": PATH}


def torchrun(*arguments) -> subprocess.Popen:
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen([*TORCHRUN, *map(str, arguments)], env=ENVIRONMENT, **options)


@pytest.fixture(scope="module")
def two(image_folder, tmp_path_factory) -> list[dict]:
    """What each of two processes found."""
    out = tmp_path_factory.mktemp("two")
    process = torchrun(SCRIPT, "answers", image_folder, out)
    said, _ = process.communicate(timeout=600)
    assert process.returncode == 0, said
    return [torch.load(out / f"{rank}.pt", weights_only=True) for rank in range(2)]


def test_training_in_float64_ends_at_the_same_weights_and_sends_once_a_step(image_folder, two):
    """The evaluation set has 21 images, which no two processes can share evenly. Gradients go once a step."""
    alone = trained(image_folder)
    for found in two:
        assert (found["weights"] - alone["weights"]).abs().max() < 1e-10
        assert torch.equal(found["losses"], alone["losses"])
        assert found["images"] == 21 and found["top1"] == alone["top1"]
    assert torch.equal(*(found["weights"] for found in two))
    for found in two:
        assert found["exchanges"] == 5
        assert found["sum"].tolist() == [3]
        assert found["any"] == (True, False) and found["broadcast"] == "from 0"


class Store(dict):
    """What `World` asks of a store, in this process; `asked` counts the questions of those who wait."""

    asked = 0
    set = dict.__setitem__

    def check(self, keys) -> bool:
        self.asked += 1
        return all(key in self for key in keys)

    def get(self, key) -> bytes:
        return self[key].encode()


class Other(threading.Thread):
    """The second of two processes, as a thread: does `work` once the main one has done its own."""

    def __init__(self, store, work):
        super().__init__(daemon=True)
        self.world, self.work, self.ended = World(1, 2, store=store), work, None
        self.start()

    def run(self) -> None:
        try:
            self.ended = self.world.main_first(self.work)
        except BaseException as error:
            self.ended = error


def test_the_others_wait_as_long_as_the_main_process_works():
    """Without a process group, so that no collective's time limit ends the wait."""
    order, store = [], Store()
    other = Other(store, lambda: order.append("other") or "done")
    main = World(0, 2, store=store)
    main.main_first(lambda: (wait_until(lambda: store.asked > 5), order.append("main")))
    other.join()
    assert order == ["main", "other"] and other.ended == "done" and not dist.is_initialized()
    assert main.broadcast("again") == other.world.broadcast() == "again"


def test_where_the_main_process_fails_or_dies_the_others_end_too():
    """torchrun sends them a signal; without it, the store is gone with the process that kept it."""
    alone = lambda: pytest.fail("went on alone")  # noqa: E731
    for error in (DataError("no images"), RuntimeError("a bug")):
        store = Store()
        other = Other(store, alone)
        with pytest.raises(type(error)):
            World(0, 2, store=store).main_first(mock.Mock(side_effect=error))
        other.join()
        assert isinstance(other.ended, ConfigError) and str(error) in str(other.ended)
    words = Store()
    other = Other(words, alone)
    wait_until(lambda: words.asked)
    other.world.signals.name = "SIGTERM"
    other.join()
    assert isinstance(other.ended, Stopped)
    store = dist.TCPStore("localhost", 0, is_master=True)
    other = Other(dist.TCPStore("localhost", store.port), alone)
    del store
    other.join()
    assert isinstance(other.ended, dist.DistNetworkError)


def workers(process: subprocess.Popen) -> list[int]:
    return [c for c in descendants(process.pid) if "slowly" in Path(f"/proc/{c}/cmdline").read_text()]


def test_all_processes_stop_at_the_same_step_and_one_process_goes_on(image_folder, tmp_path):
    """One hears the signal; they agree, save and leave."""
    config = small_run(image_folder, str(tmp_path / "out"), save_every=100)
    process = torchrun(SCRIPT, "slowly", to_json(config))
    log = tmp_path / "out" / "log.jsonl"
    wait_until(lambda: log.exists() and '"step": 2' in log.read_text())
    os.kill(workers(process)[1], signal.SIGUSR1)
    said, _ = process.communicate(timeout=600)
    assert process.returncode != 0, said
    run = train(config)  # one process takes over from two
    (step,) = re.findall(r"going on after step (\d+)", log.read_text())
    assert 2 <= int(step) < 12 and said.count(f"ended {step} ") == 2
    reference = train(small_run(image_folder, str(tmp_path / "reference")))
    assert run.metrics["images"] == 21 and run.steps == 12
    # Two processes add their gradients in another order than one: float32 is equal up to rounding.
    weights = [r.model.state_dict() for r in (run, reference)]
    torch.testing.assert_close(*weights, rtol=1e-3, atol=1e-4)


def test_a_lost_process_costs_the_steps_since_the_last_checkpoint(image_folder, tmp_path):
    """Kill -9 of one of two: torchrun starts both again, and they go on from what is on the disk."""
    config = small_run(image_folder, str(tmp_path / "out"), save_every=1)
    process = torchrun("--max-restarts", 1, SCRIPT, "slowly", to_json(config))
    log = tmp_path / "out" / "log.jsonl"
    wait_until(lambda: log.exists() and '"step": 4' in log.read_text())
    os.kill(workers(process)[1], signal.SIGKILL)
    said, _ = process.communicate(timeout=600)
    assert process.returncode == 0, said
    assert said.count("ended 12") == 2 and "going on after step" in log.read_text()
