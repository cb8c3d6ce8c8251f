"""Two processes give what one gives with the same batches accumulated; a killed one goes on."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

SCRIPT = Path(__file__).parent / "sample.py"
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}


def launch(*arguments, processes=0):
    many = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    command = [sys.executable, *(many if processes else []), str(SCRIPT), *map(str, arguments)]
    return subprocess.Popen(
        command, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def finish(process):
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output


def here(sample, *arguments):
    """The same in this process, which need not be started."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    sample.main(*map(str, arguments))
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def alone(sample, tmp_path_factory):
    """The tensors that one process ends with."""
    out = tmp_path_factory.mktemp("alone") / "tensors"
    here(sample, out, "-", 9)
    return load_file(f"{out}.0")


@pytest.mark.slow
def test_two_processes_equal_one(alone, tmp_path):
    out = tmp_path / "tensors"
    finish(launch(out, "-", 9, processes=2))
    for rank in (0, 1):
        found = load_file(f"{out}.{rank}")
        assert found.keys() == alone.keys()
        for name, tensor in found.items():
            # a sum of two terms does not depend on their order: equal to the last bit
            assert torch.equal(tensor, alone[name]), name


@pytest.mark.slow
@pytest.mark.parametrize("processes", [0, 2])
def test_killed_and_resumed_equals_uninterrupted(alone, sample, tmp_path, processes):
    out, folder = tmp_path / "tensors", tmp_path / "state"
    victim = launch(out, folder, 9, 0.2, processes=processes)
    state = folder / "training.safetensors"
    while not state.exists():
        assert victim.poll() is None, victim.communicate()[0]
        time.sleep(0.02)
    time.sleep(0.5)
    victim.send_signal(signal.SIGKILL if not processes else signal.SIGTERM)
    victim.communicate(timeout=60)
    assert victim.returncode != 0
    assert not Path(f"{out}.0").exists()
    if processes:
        finish(launch(out, folder, 9, processes=processes))
    else:
        here(sample, out, folder, 9)
    found = load_file(f"{out}.0")
    for name, tensor in found.items():
        assert torch.equal(tensor, alone[name]), name
