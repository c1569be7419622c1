"""The fingerprint of a base: the same in memory and in its files, and another for other numbers."""
import os
import shutil
from types import SimpleNamespace

import pytest
import torch

from checkpoints.load import fingerprint, load_base, load_weights
from support.tensors import read_file


@pytest.mark.parametrize("layout", ("safetensors", "bin"))
def test_fingerprint_of_a_trunk_in_its_files(world, tmp_path, layout):
    """The same as of the one in memory, in any dtype, though no tensor of it is read. When it is
    loaded, it is that trunk."""
    folder = str(tmp_path / "base")
    shutil.copytree(world.base, folder)
    if layout == "bin":
        path = f"{folder}/model.safetensors"
        tensors = {key: lazy.read() for key, lazy in read_file(path).items()}
        torch.save(tensors, f"{folder}/pytorch_model.bin")
        os.remove(path)
    expected = load_base(world.base)
    expected = fingerprint(expected.trunk, expected.head)
    for dtype in (None, torch.bfloat16):
        loaded = load_base(folder, dtype=dtype)
        lying = load_base(folder, dtype=dtype, read_trunk=False)
        read = {name: p.in_file[0].read for name, p in lying.trunk.named_parameters()}
        for p in lying.trunk.parameters():
            p.in_file[0].read = lambda: pytest.fail("a tensor was read")
        assert fingerprint(lying.trunk, lying.head) == expected == lying.fingerprint
        assert fingerprint(loaded.trunk, loaded.head) == expected == loaded.fingerprint
        for name, p in lying.trunk.named_parameters():
            p.in_file[0].read = read[name]
        filled = load_weights(lying.trunk).state_dict()
        assert all(torch.equal(t, filled[name]) for name, t in loaded.trunk.state_dict().items())
        assert not any(p.is_meta or p.requires_grad for p in lying.trunk.parameters())


def test_fingerprint_of_large_tensors():
    """A tensor of more than 2^24 numbers, as a 7B model has: its last sample is its last number,
    not one behind it."""
    large = torch.nn.Linear(1, 2 ** 25 + 1, bias=False)
    head = SimpleNamespace(lm_head=torch.nn.Linear(1, 1), block_config=None)
    before = fingerprint(large, head)
    with torch.no_grad():
        large.weight[-1] += 1
    assert fingerprint(large, head) != before
