"""Start-up: a GPU that cannot be used, and an error that only one process meets."""
import re

import pytest
import torch
from programs import ROOT, shell

from support import common
from support.common import InputError, can_use_gpu


@pytest.fixture
def machine(monkeypatch):
    """A machine that says it has a GPU, whatever this one has."""
    def devices(pattern):
        return ["/dev/nvidia0"] if pattern.startswith("/dev/nvidia") else []

    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(common.glob, "glob", devices)
    return monkeypatch


def test_a_gpu_that_torch_cannot_use(machine):
    """Pitfall 3: a torch built without CUDA, or for a newer driver, sees none; the three versions
    are said, and what to install."""
    machine.setattr(torch.cuda, "is_available", lambda: False)
    said = "GPU cannot be used.*finds none.*driver.*install a torch.*CUDA_VISIBLE_DEVICES="
    with pytest.raises(InputError, match=said) as error:
        can_use_gpu()
    assert f"torch {torch.__version__}" in str(error.value)
    assert re.search(r"deepspeed \d+\.\d+", str(error.value))
    machine.setenv("CUDA_VISIBLE_DEVICES", "")                   # the CPU is asked for
    assert can_use_gpu() is False
    machine.delenv("CUDA_VISIBLE_DEVICES")
    machine.setattr(common.glob, "glob", lambda pattern: [])     # there is none
    assert can_use_gpu() is False


def test_a_gpu_without_kernels(machine):
    """Pitfall 3: torch sees the GPU, but was not built for it; or there are too many processes."""
    def fails(*args, device):
        raise RuntimeError("CUDA error: no kernel image is available for execution on "
                           f"{device}\nCUDA kernel errors might be …")
    machine.setattr(torch.cuda, "is_available", lambda: True)
    machine.setattr(torch.cuda, "device_count", lambda: 4)
    machine.setattr(torch, "ones", fails)
    machine.setenv("LOCAL_RANK", "3")
    said = "no kernel image is available for execution on cuda:3.. Here are torch"
    with pytest.raises(InputError, match=said):
        can_use_gpu()


ONE_FAILS = f"""
import os, sys, time
sys.path.insert(0, {ROOT!r})
from support.common import InputError, run_program
def main():
    if os.environ['RANK'] in sys.argv[1:]:
        raise InputError('row 7: mend it')
    time.sleep(60)
run_program(main)
"""


def test_another_ranks_error_is_said_too(tmp_path):
    """What only one process meets (a bad image among its rows) must not vanish because it is not
    the first."""
    (tmp_path / "one.py").write_text(ONE_FAILS)
    for ranks in (["1"], ["0", "1"]):
        done = shell("torchrun", "--nproc_per_node", 2, tmp_path / "one.py", *ranks)
        said = done.stderr.count("error: row 7: mend it\n")
        assert done.returncode and said == 1, done.stderr
