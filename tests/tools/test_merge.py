"""tools/merge.py: a checkpoint and its base become one model, which says the same."""
from dataclasses import asdict

import pytest
import torch
from conftest import largest_difference, shake
from programs import shell, succeeds
from public_checkpoints import PublicCheckpoints, agrees, prompts

from checkpoints.load import checkpoint_type, load_base, load_trained
from data import BOS, IMAGE_ID
from model import Head, answer_states

MERGE = "python", "-m", "tools.merge"


def test_merge(world, tmp_path):
    """Base and the notes' file."""
    base, whole = load_base(world.base), str(tmp_path / "whole")
    torch.manual_seed(1)
    head = shake(Head(base.config, base.config.block_config(zero_init=False)))
    torch.save(head.state_dict(), tmp_path / "non_lora_trainables.bin")
    head = load_trained(str(tmp_path), base)
    succeeds(*MERGE, tmp_path, whole, "--model_name_or_path", world.base)
    merged = load_base(whole)
    assert asdict(merged.head.block_config) == asdict(head.block_config)
    assert merged.head.block_config.outer_residual and merged.preprocess.size == 24
    state = merged.head.state_dict()
    assert all(torch.equal(tensor, state[key]) for key, tensor in head.state_dict().items())
    assert merged.fingerprint != base.fingerprint and checkpoint_type(whole) == "base"

    batch = prompts([BOS, 7, 8, IMAGE_ID, 9, 10, 11], pixels=torch.ones(1, 3, 24, 24))
    at = torch.arange(batch.input_ids.shape[1])[None]
    logits = [h(*answer_states(h, *trunk(batch), batch, at))
              for trunk, h in ((base.trunk, head), (merged.trunk, merged.head))]
    assert largest_difference("merged", *logits) == 0
    done = shell(*MERGE, tmp_path, whole, "--model_name_or_path", world.base)
    assert done.returncode == 1 and "exists already" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.fixture(scope="module")
def public(world, tmp_path_factory):
    return PublicCheckpoints(world, tmp_path_factory)


def test_merge_of_an_hf_base_and_an_adapter(public, tmp_path):
    succeeds(*MERGE, public.hf, tmp_path / "llava", fresh=True)
    agrees("HF to LLaVA", public.expected, tmp_path / "llava")
    adapter, expected = public.adapted
    succeeds(*MERGE, adapter, tmp_path / "adapted", "--model_name_or_path", public.hf)
    agrees("adapter merged", expected, tmp_path / "adapted")
