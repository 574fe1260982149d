"""Two processes under torchrun do what one does: the same batches, the same training, the same evaluation.

On the CPU with gloo. NCCL and several GPUs are not tested here.
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from distributed_run import batches, trained
from pictures import draw_pictures, small_run

from cpvt.config import to_json
from cpvt.training.checkpoint import Checkpoints
from cpvt.training.train import train

HERE = Path(__file__).parent
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE)}


def torchrun(*arguments, **options) -> subprocess.Popen:
    return subprocess.Popen(
        [*TORCHRUN, *map(str, arguments)],
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        **options,
    )


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    return draw_pictures(tmp_path_factory.mktemp("pictures"))


@pytest.fixture(scope="module")
def two(pictures, tmp_path_factory) -> list[dict]:
    """What each of two processes found."""
    out = tmp_path_factory.mktemp("two")
    process = torchrun(HERE / "distributed_run.py", pictures, out)
    said, _ = process.communicate(timeout=240)
    assert process.returncode == 0, said
    return [torch.load(out / f"{rank}.pt", weights_only=True) for rank in range(2)]


@pytest.mark.parametrize("micro", [0, 4])
def test_the_batches_are_those_of_one_process_bit_for_bit(pictures, two, micro):
    alone = batches(small_run(pictures), 0, 1, 0)
    together = torch.cat([found[f"batches micro {micro}"] for found in two], dim=1)
    assert alone.shape == (4, 8, 3 * 16 * 16 + 3) and torch.equal(alone, together)
    assert alone.unique(dim=0).shape[0] == 4  # and no two steps are alike


@pytest.mark.parametrize("micro", [8, 4])
def test_training_in_float64_ends_at_the_same_weights(pictures, two, micro):
    """Accumulation 1 and 2; the evaluation set has 21 images, which no two processes can share evenly."""
    alone = trained(pictures, batch=16)
    for found in (here[f"trained micro {micro}"] for here in two):
        assert (found["weights"] - alone["weights"]).abs().max() < 1e-10
        assert torch.equal(found["losses"], alone["losses"])
        assert found["images"] == 21 and found["top1"] == alone["top1"]
    assert torch.equal(*(here[f"trained micro {micro}"]["weights"] for here in two))


def test_gradients_are_sent_once_a_step_and_not_once_a_micro_batch(two):
    assert [found["exchanges"] for found in two] == [5, 5]


def test_sums_and_agreements(two):
    for found in two:
        assert found["sum"].tolist() == [3] and found["any"] == (True, False)


# --------------------------------------------------------------------------- signals and lost processes


def script(tmp_path: Path, config, slow: float = 0.2) -> Path:
    """A file that trains as configured, slowly, and says what came of it; 75 as the command line does."""
    path = tmp_path / "slowly.py"
    path.write_text(
        "import sys, time, torch\n"
        "from cpvt.config import TrainConfig, from_json\n"
        "from cpvt.training import setup\n"
        "from cpvt.training.train import train\n"
        "torch.set_num_threads(1)\n"
        "own = setup.Session.backward\n"
        f"setup.Session.backward = lambda *a: (time.sleep({slow}), own(*a))[1]\n"
        f"run = train(from_json(TrainConfig, {to_json(config)!r}))\n"
        # One write: where Python does not buffer (PYTHONUNBUFFERED), print's pieces mix with the other process's.
        "sys.stdout.write(f'ended {run.steps} {run.interrupted or run.metrics}\\n')\n"
        "sys.exit(75 if run.interrupted else 0)\n"
    )
    return path


def wait_for(condition, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.05)


def workers(process: subprocess.Popen) -> list[int]:
    tasks = Path(f"/proc/{process.pid}/task")
    children = [int(c) for task in tasks.iterdir() for c in (task / "children").read_text().split()]
    return [c for c in children if "slowly.py" in Path(f"/proc/{c}/cmdline").read_text()]


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1"])
def test_all_processes_stop_at_the_same_step_and_one_process_goes_on(pictures, tmp_path, name):
    """As SLURM announces the end: torchrun hears the signal, the processes agree, save and leave in time."""
    config = small_run(pictures, str(tmp_path / "out"), save_every=100)
    handle = ["--signals-to-handle", "SIGTERM,SIGINT,SIGUSR1"]
    process = torchrun(*handle, script(tmp_path, config))
    log = tmp_path / "out" / "log.jsonl"
    wait_for(lambda: log.exists() and '"step": 2' in log.read_text())
    started = time.monotonic()
    process.send_signal(getattr(signal, name))
    said, _ = process.communicate(timeout=60)
    assert time.monotonic() - started < 10, said
    assert process.returncode != 0
    steps, _ = Checkpoints(tmp_path / "out" / "checkpoints").latest()
    assert 2 <= steps < 12
    run = train(config)  # one process takes over from two
    reference = train(small_run(pictures, str(tmp_path / "reference")))
    assert run.metrics["images"] == 21 and run.steps == 12
    # Two processes add their gradients in another order than one: float32 is equal up to rounding.
    for a, b in zip(run.model.parameters(), reference.model.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


def test_a_lost_process_costs_the_steps_since_the_last_checkpoint(pictures, tmp_path):
    """Kill -9 of one of two: torchrun starts both again, and they go on from what is on the disk."""
    config = small_run(pictures, str(tmp_path / "out"), save_every=1)
    process = torchrun("--max-restarts", 1, script(tmp_path, config))
    log = tmp_path / "out" / "log.jsonl"
    wait_for(lambda: log.exists() and '"step": 4' in log.read_text())
    os.kill(workers(process)[1], signal.SIGKILL)
    said, _ = process.communicate(timeout=180)
    assert process.returncode == 0, said
    assert said.count("ended 12") == 2
    notes = [entry.get("note", "") for entry in map(json.loads, log.read_text().splitlines())]
    assert any(note.startswith("going on after step") for note in notes)
