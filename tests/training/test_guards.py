"""What ends a run before it wastes time: no gradient, a wrong reference, a loss that is no loss."""
import collections
import math
import re
import zlib
from glob import glob
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import run_train
from short_runs import INTERRUPTED_STEPS, five_steps, flags_of, read_bytes, result

import train
from data import Example
from dpo import frozen_copy
from support.common import InputError
from training.batches import ResumableSampler, Share
from training.engine import start_deepspeed
from training.guards import Guards


@pytest.mark.parametrize("stage", (0, 1, 2, 3))
def test_a_trained_tensor_without_gradient_is_an_error(world, tmp_path, monkeypatch,
                                                       in_this_process, stage):
    """Nothing would train it, and nobody would notice: under every ZeRO stage the first step names
    it."""
    set_trained = train.set_trained

    def one_more(trunk, head, groups):
        head.unused = torch.nn.Parameter(torch.ones(3))
        return set_trained(trunk, head, groups) | {"unused": head.unused.requires_grad_(True)}

    monkeypatch.setattr(train, "set_trained", one_more)
    with pytest.raises(InputError, match=r"1 trained tensors get no gradient \(unused\)"):
        run_train(*five_steps(world, tmp_path, "run", stage, "--per_device_train_batch_size", 8))


def test_a_policy_that_is_not_its_reference_at_the_start(world, tmp_path, monkeypatch,
                                                         in_this_process):
    """Then the loss is not ln 2, and what is learnt is measured against something else: the run
    ends in its first step."""
    def other_reference(head):
        other, plain = frozen_copy(head), head.lm_head
        other.lm_head = torch.nn.Linear(plain.in_features, plain.out_features, bias=False)
        return other

    monkeypatch.setattr("dpo.frozen_copy", other_reference)
    with pytest.raises(RuntimeError, match="policy and reference differ before the first step"):
        run_train(*five_steps(world, tmp_path, "run", 0, "--per_device_train_batch_size", 8))


# ---- A loss that is no loss ----------------------------------------------------------------------


def test_a_bad_row_stops_before_it_spoils_the_weights(world, tmp_path, in_this_process):
    """NaN that a trunk made of one row: step, rows of that micro batch and the state before are
    named. That state is sound."""
    flags = flags_of(world, "kept features", tmp_path / "cut", "--save_steps", 1)
    run_train(*flags)
    whole = result(tmp_path / "cut")
    kept, = glob(str(tmp_path / "features" / "*"))
    sound, rows = read_bytes(f"{kept}/hidden.bin"), np.load(f"{kept}/rows.npz")
    offsets, lengths = rows["token_offsets"], np.diff(rows["position_offsets"])
    sampler = ResumableSampler(len(offsets) - 1, INTERRUPTED_STEPS, Share(8, 4), 42,
                               lengths=lengths)
    bad = list(sampler)[2 * 4 + 1]                       # the second micro batch of step 5
    width = len(sound) // int(offsets[-1])
    spoilt = bytearray(sound)
    begin, end = offsets[bad[1]] * width, offsets[bad[1] + 1] * width
    spoilt[begin:end] = np.full((end - begin) // 4, np.nan, np.float32).tobytes()
    write_in_place(f"{kept}/hidden.bin", spoilt)
    sums = read_bytes(f"{kept}/sums.bin")
    of_nan = np.frombuffer(sums, np.int64).copy()
    of_nan[bad[1]] = zlib.crc32(spoilt[begin:end]) + 1
    write_in_place(f"{kept}/sums.bin", of_nan.tobytes())
    with pytest.raises(InputError) as error:
        run_train(*flags)
    print(error.value)
    assert "the loss is nan at step 5" in str(error.value)
    assert "step-4 is the last good state" in str(error.value)
    said = re.search("from examples (.*) of the data", str(error.value))[1]
    assert [int(n) for n in re.findall(r"(\d+) \(\d+.jpg\)", said)] == bad
    write_in_place(f"{kept}/hidden.bin", sound)
    write_in_place(f"{kept}/sums.bin", sums)
    run_train(*flags, "--resume")
    assert result(tmp_path / "cut") == whole


def write_in_place(path, content):
    with open(path, "r+b") as file:
        file.write(content)


@pytest.mark.parametrize("kind", ("kept features", "ZeRO-0, bf16", "ZeRO-1", "ZeRO-3, bf16, LoRA"))
def test_a_bad_gradient_stops_before_it_is_saved(world, tmp_path, monkeypatch, in_this_process,
                                                 kind):
    """A finite loss whose gradient is no number, in the third step: the state before it is the
    last, and sound."""
    set_trained, calls = train.set_trained, []

    def spoil(gradient):
        calls.append(kind)                                                       # two a step
        return gradient * math.nan if len(calls) > 4 else gradient

    def spoilt(*args):
        trained = set_trained(*args)
        name = next(name for name in trained if "out_proj" in name or "lora_B" in name)
        trained[name].register_hook(spoil)
        return trained

    monkeypatch.setattr(train, "set_trained", spoilt)
    flags = flags_of(world, kind, tmp_path / "cut", "--save_steps", 1,
                     "--per_device_train_batch_size", 4)
    said = (r"the gradient is no number at step 3, from examples \d+ \(\d+.jpg\).*"
            "step-2 is the last good")
    with pytest.raises(InputError, match=said):
        run_train(*flags)
    assert (tmp_path / "cut.run" / "latest").read_text() == "step-2"


def test_a_loss_that_explodes(world, tmp_path, in_this_process):
    flags = flags_of(world, "kept features", tmp_path / "cut", "--learning_rate", "1e4")
    said = "the loss is .* at step [2-8], from examples .* lower --learning_rate"
    with pytest.raises(InputError, match=said):
        run_train(*flags)


def test_when_a_loss_explodes(in_this_process):
    """Over 20 times the mean of the last 20 steps, which counts as 1 at least; the first step has
    no past."""
    start_deepspeed()
    seen = [([3, 1, 2], {"loss": torch.tensor(2.5)})]
    examples = [Example(f"VG/{n}7.jpg" if n else None, []) for n in range(4)]
    run = SimpleNamespace(trained={}, args=SimpleNamespace(beta=0.1), folder="nowhere",
                          rows=SimpleNamespace(examples=examples))

    def check(loss, recent, step=2):
        guards = Guards(run)
        assert guards.recent.maxlen == 20
        guards.recent = collections.deque(recent, maxlen=20)
        guards.check(step, {"loss": loss, "grad_norm": 1.}, seen)

    def learn(losses):
        guards = Guards(run)
        for step, loss in enumerate(losses, start=1):
            guards.check(step, {"loss": loss, "grad_norm": 1.}, seen)

    check(1e6, [], step=1)
    for loss in (0.001, 19.9, 0.5):
        check(loss, [0.001] * 20)
    check(590., [30.] * 20)
    learn([0.001] * 5 + [19.9])
    said = r"from examples 3 \(37.jpg\), 1 \(17.jpg\), 2 \(27.jpg\) of the data; .* not kept: look"
    for loss, before in ((20.5, 0.001), (610., 30.), (math.nan, 1.), (math.inf, 1.)):
        with pytest.raises(InputError, match=said):
            check(loss, [before] * 20)
        with pytest.raises(InputError, match=said):
            learn([before] * 20 + [loss])
