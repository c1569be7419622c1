"""Interruption: killed at any moment, stopped by Ctrl-C, spoilt by a bad row; and what goes on ends as if nothing had been.

Equality is that of the files' bytes: on the CPU a resumed run does not differ from one that never stopped.
"""
import json
import math
import os
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from glob import glob

import numpy as np
import pytest
import torch
from conftest import ROOT, dpo_flags, free_port, largest_difference, run_train

import loop
import train
from data import ResumableSampler
from loop import check_loss
from readers import Example, InputError
from resume import cut_log, resume_command

STEPS = 8
KINDS = {  # what is trained → flags
    "kept features": ["--stage", 2, "--init", "identity", "--cache_features", "FEATURES"],
    "LoRA with dropout": ["--lora_r", 4, "--lora_dropout", 0.3, "--gradient_checkpointing"],
    "the trunk by DPO": ["--tune", "projector,llama"],
    "ZeRO-1": ["--stage", 1, "--deepspeed", "ZERO1"],
    "ZeRO-2, offload": ["--stage", 1, "--deepspeed", "ZERO2", "--offload"],
    "ZeRO-0, bf16": ["--stage", 2, "--init", "identity", "--bf16"],
    "ZeRO-3, bf16, LoRA": ["--lora_r", 4, "--deepspeed", "ZERO3"],
}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A folder with DeepSpeed files; what is kept of the trunk, too."""
    folder = tmp_path_factory.mktemp("resume")
    for stage, more in ((1, {}), (2, {}), (3, {"bf16": {"enabled": True}})):
        config = {"train_batch_size": 8, "zero_optimization": {"stage": stage}, **more}
        (folder / f"zero{stage}.json").write_text(json.dumps(config))
    return folder


def flags_of(world, files, kind, output_dir, *more):
    names = {"FEATURES": files / "features", **{f"ZERO{n}": files / f"zero{n}.json" for n in (1, 2, 3)}}
    return [str(names.get(flag, flag)) for flag in (
        *KINDS[kind], "--max_steps", STEPS, "--learning_rate", "1e-2", "--per_device_train_batch_size", 4,
        *(["--gradient_accumulation_steps", 2] if "--deepspeed" not in KINDS[kind] else []), "--keep_correct",
        "--output_dir", output_dir, *dpo_flags(world), *more)]


def result(folder):
    """{name: bytes} of the tensors that a run left."""
    return {os.path.basename(path): open(path, "rb").read() for path in glob(f"{folder}/*.safetensors")}


def steps_logged(folder):
    with open(f"{folder}/metrics.jsonl") as file:
        return [json.loads(line)["step"] for line in file]


def interrupted_at(monkeypatch, step):
    """Ctrl-C comes in the middle of a step."""
    def note(loss, recent, now, *rest):
        if now == step:
            os.kill(os.getpid(), signal.SIGINT)
        return check_loss(loss, recent, now, *rest)
    monkeypatch.setattr(loop, "check_loss", note)


# ---------------------------------------------------------------------------------------------------------------------
# Ctrl-C


@pytest.mark.parametrize("kind", KINDS)
def test_stopped_and_resumed_is_not_stopped(world, files, tmp_path, monkeypatch, capsys, in_this_process, kind):
    run_train(*flags_of(world, files, kind, tmp_path / "whole"))
    flags = flags_of(world, files, kind, tmp_path / "cut")
    for step in (3, 5):
        interrupted_at(monkeypatch, step)
        with pytest.raises(SystemExit) as stop:
            run_train(*flags, *(["--resume"] if step > 3 else []))
        assert stop.value.code == 130 and f"stopped after step {step} of {STEPS}; go on with: python" in capsys.readouterr().out
        assert not os.path.exists(tmp_path / "cut") and (tmp_path / "cut.run" / "latest").read_text() == f"step-{step}"
        assert steps_logged(tmp_path / "cut.run") == list(range(1, step + 1))
    monkeypatch.setattr(loop, "check_loss", check_loss)
    run_train(*flags, "--resume")
    whole, cut = result(tmp_path / "whole"), result(tmp_path / "cut")
    assert whole and whole == cut
    assert steps_logged(tmp_path / "cut") == list(range(1, STEPS + 1)) and not os.path.exists(tmp_path / "cut.run")
    losses = [[json.loads(line)["loss"] for line in open(tmp_path / name / "metrics.jsonl")] for name in ("whole", "cut")]
    assert losses[0] == losses[1] and len(set(losses[0])) == STEPS
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler         # put back


def test_a_state_holds_what_is_trained_and_no_more(world, files, tmp_path, monkeypatch, in_this_process):
    """`--save_steps` keeps the last two, without the frozen weights and without the reference."""
    interrupted_at(monkeypatch, 7)
    with pytest.raises(SystemExit):
        run_train(*flags_of(world, files, "kept features", tmp_path / "cut", "--save_steps", 2))
    assert sorted(os.listdir(tmp_path / "cut.run")) == ["latest", "lock", "metrics.jsonl", "run.json", "step-6", "step-7"]
    state = torch.load(tmp_path / "cut.run" / "step-7" / "mp_rank_00_model_states.pt", weights_only=False)
    assert {name.split(".")[1] for name in state["module"]} == {"post_interaction_block", "lm_head"}
    assert {name.split(".")[0] for name in state["module"]} == {"head"}


def test_what_cannot_go_on(world, files, tmp_path, monkeypatch, capsys, in_this_process):
    """Other arguments, data or files than the interrupted run's are named; without --resume a run starts anew, and says so."""
    flags = flags_of(world, files, "kept features", tmp_path / "cut")
    interrupted_at(monkeypatch, 3)
    with pytest.raises(SystemExit):
        run_train(*flags)
    monkeypatch.setattr(loop, "check_loss", check_loss)
    (tmp_path / "clipped.json").write_text('{"train_batch_size": 8, "gradient_clipping": 0.1}')
    for more, said in ((["--learning_rate", "2e-2"], "learning_rate was 0.01 and is 0.02"), (["--no-keep_correct"], "examples was"),
                       (["--max_steps", "9"], "steps was 8 and is 9"), (["--seed", "43"], "seed was 42 and is 43"),
                       (["--gradient_accumulation_steps", "4"], "global batch was 8 and is 16"),
                       (["--beta", "0.2", "--stage", "1"], "beta.*stage|stage.*beta"),
                       (["--deepspeed", str(tmp_path / "clipped.json")], "gradient_clipping was 1.0 and is 0.1")):
        with pytest.raises(InputError, match=said) as error:
            run_train(*flags, "--resume", *more)
        assert "--resume" in str(error.value) and "leave --resume out" in str(error.value)
    before = (tmp_path / "cut.run" / "latest").read_text()
    capsys.readouterr()
    run_train(*flags, "--logging_steps", 3)                                      # anew: not from step 3
    assert before == "step-3" and "step-3 of an interrupted run, which is discarded" in capsys.readouterr().out
    assert steps_logged(tmp_path / "cut") == [3, 6, 8]
    run_train(*flags, "--resume")                                                # and what is finished stays
    assert "finished already" in capsys.readouterr().out and steps_logged(tmp_path / "cut") == [3, 6, 8]
    run_train(*flags, "--resume", "--max_steps", 9)                              # by other arguments it is not
    assert "no state in it; from the beginning" in capsys.readouterr().out and steps_logged(tmp_path / "cut") == list(range(1, 10))
    run_train(*flags, "--resume", "--learning_rate", "3e-2")
    assert "no state in it; from the beginning" in capsys.readouterr().out and steps_logged(tmp_path / "cut") == list(range(1, 9))


def test_a_whole_model_tells_whose_it_is(world, files, tmp_path, capsys, in_this_process):
    flags = flags_of(world, files, "the trunk by DPO", tmp_path / "whole", "--max_steps", 1)
    run_train(*flags)
    run_train(*flags, "--resume")
    assert "finished already" in capsys.readouterr().out
    run_train(*flags, "--resume", "--beta", "0.2")
    assert "no state in it; from the beginning" in capsys.readouterr().out


def test_a_sweep_goes_on_where_it_stopped(world, files, tmp_path, monkeypatch, capsys, in_this_process):
    flags = flags_of(world, files, "kept features", tmp_path / "sweep", "--learning_rate", "1e-2", "3e-3", "1e-3")
    run_train(*flags)
    whole = {name: result(tmp_path / f"sweep-{name}") for name in ("0.01", "0.003", "0.001")}
    for name in whole:
        assert len(whole[name]) == 1
        os.rename(tmp_path / f"sweep-{name}", tmp_path / f"whole-{name}")
    calls = []

    def note(loss, recent, step, *rest):
        calls.append(step)
        if len(calls) == STEPS + 4:                                              # in the second run's fourth step
            os.kill(os.getpid(), signal.SIGTERM)
        return check_loss(loss, recent, step, *rest)

    monkeypatch.setattr(loop, "check_loss", note)
    with pytest.raises(SystemExit):
        run_train(*flags)
    assert [name for name in sorted(os.listdir(tmp_path)) if name.startswith("sweep")] == ["sweep-0.003.run", "sweep-0.01"]
    run_train(*flags, "--resume")
    assert len(calls) == 3 * STEPS                                               # no step twice
    assert whole == {name: result(tmp_path / f"sweep-{name}") for name in whole}


# ---------------------------------------------------------------------------------------------------------------------
# Other processes


def start(*flags):
    """train.py as a process of its own, its output into one pipe."""
    command = [sys.executable, os.path.join(ROOT, "train.py"), *map(str, flags)]
    return subprocess.Popen(command, env=os.environ | {"OMP_NUM_THREADS": "1", "MASTER_PORT": free_port()}, text=True, cwd=ROOT,
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def wait_for(process, condition, limit=100):
    """Until the condition holds; False when the process has ended before."""
    began = time.monotonic()
    while not condition():
        if process.poll() is not None:
            return False
        assert time.monotonic() < began + limit
        time.sleep(0.0003)
    return True


@pytest.mark.parametrize("kind, kills", (("kept features", 3), ("LoRA with dropout", 1)))
def test_kill_9_at_any_moment(world, files, tmp_path, in_this_process, kind, kills):
    """Inside a save, between two, before the first: then --resume, which ends with the bytes of a run that was left alone."""
    steps = ["--max_steps", 40, "--save_steps", 1]
    run_train(*flags_of(world, files, kind, tmp_path / "whole", "--max_steps", 40))
    run, rng, moments = str(tmp_path / "cut.run"), random.Random(0), []

    def saved():
        return int(open(f"{run}/latest").read().removeprefix("step-")) if os.path.isfile(f"{run}/latest") else 0

    def inside_a_save():                    # behind step 12, and DeepSpeed has begun to write
        return saved() > 12 and any(glob(f"{run}/step-{saved() + 1}.partial/*.pt"))

    for condition in (inside_a_save, lambda: saved() > 4, lambda: os.path.isfile(f"{run}/run.json"))[kills - 1::-1]:
        process = start(*flags_of(world, files, kind, tmp_path / "cut", *steps, "--resume"))
        assert wait_for(process, condition), process.stdout.read()
        time.sleep(0 if condition is inside_a_save else 0.02 * rng.random())
        process.kill()
        process.communicate()
        assert process.returncode == -signal.SIGKILL and not os.path.exists(tmp_path / "cut")
        moments.append((saved(), sorted(os.path.basename(p) for p in glob(f"{run}/step-*"))))
    print("killed with", moments)
    before = [saved for saved, _ in moments]
    assert 13 <= before[-1] < 40 and (kills == 1 or before[0] < 4 < before[1] < 13)
    run_train(*flags_of(world, files, kind, tmp_path / "cut", *steps, "--resume"))
    whole, cut = result(tmp_path / "whole"), result(tmp_path / "cut")
    assert whole and whole == cut and steps_logged(tmp_path / "cut") == list(range(1, 41))


@pytest.mark.parametrize("more", ([], ["--resume"]), ids=str)
def test_a_run_that_still_lives_is_left_alone(world, files, tmp_path, more):
    """As after kill -9 of the launcher alone: its process trains on, and another one may not write there."""
    flags = flags_of(world, files, "kept features", tmp_path / "cut", "--max_steps", 100_000, "--save_steps", 5)
    first = start(*flags)
    assert wait_for(first, lambda: os.path.isfile(tmp_path / "cut.run" / "latest")), first.stdout.read()
    second = start(*flags, *more)
    said, _ = second.communicate()
    assert second.returncode == 1 and re.search(f"error: .*cut.run: process {first.pid} on .* still trains there; wait for it", said)
    assert first.poll() is None
    first.kill()
    first.communicate()
    third = start(*flags, "--resume")                                            # its death frees the folder
    assert any("going on from" in line for line in third.stdout)
    third.kill()
    third.communicate()


def test_every_moment_of_a_save(world, files, tmp_path, monkeypatch, in_this_process):
    """A save stopped in front of each of its file operations, as a kill would: `latest` always names a whole state."""
    flags = flags_of(world, files, "kept features", tmp_path / "cut", "--save_steps", 2)
    run_train(*flags_of(world, files, "kept features", tmp_path / "whole"))

    class Killed(BaseException):
        pass

    counted, limit = [], None

    def counting(function):
        def call(*args, **options):
            counted.append(function.__name__)
            if len(counted) == limit:
                raise Killed
            return function(*args, **options)
        return call

    save_state = loop.save_state

    def watched(engine, folder, step):
        with pytest.MonkeyPatch.context() as patch:
            if step == 4:
                patch.setattr(engine, "save_checkpoint", counting(engine.save_checkpoint))
                for module, name in ((os, "rename"), (os, "replace"), (shutil, "rmtree"), (torch, "load")):
                    patch.setattr(module, name, counting(getattr(module, name)))
            save_state(engine, folder, step)

    monkeypatch.setattr(loop, "save_state", watched)
    run_train(*flags)
    moments = list(counted)
    print(moments)
    assert len(moments) >= 4
    for limit in range(1, len(moments) + 1):
        counted.clear()
        with pytest.raises(Killed):
            run_train(*flags)
        latest = (tmp_path / "cut.run" / "latest").read_text()
        assert latest == ("step-4" if "replace" in counted[:limit - 1] else "step-2")
        count, limit = len(counted), None
        counted.clear()
        run_train(*flags, "--resume")
        assert result(tmp_path / "cut") == result(tmp_path / "whole") and count


def test_ctrl_c_typed(world, files, tmp_path, capsys, in_this_process):
    """The process says how to go on, and leaves with 130; what it says, typed, does go on."""
    run_train(*flags_of(world, files, "kept features", tmp_path / "whole", "--max_steps", 400))
    log = tmp_path / "cut.run" / "metrics.jsonl"
    process = start(*flags_of(world, files, "kept features", tmp_path / "cut", "--max_steps", 400, "--dataloader_num_workers", 1))
    assert wait_for(process, lambda: os.path.isfile(log) and os.path.getsize(log) > 1000), process.stdout.read()
    process.send_signal(signal.SIGINT)
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in said, said
    program, script, *flags = shlex.split(re.search(r"go on with: (.*)", said)[1])
    assert (program, os.path.basename(script), flags[-1]) == ("python", "train.py", "--resume")
    run_train(*flags)
    assert "going on from" in capsys.readouterr().out
    assert result(tmp_path / "cut") == result(tmp_path / "whole")


@pytest.mark.parametrize("more, tolerance", (([], 1e-4), (["--bf16"], 2e-2)))
def test_other_numbers_of_processes(world, files, two, tmp_path, monkeypatch, in_this_process, more, tolerance):
    """ZeRO-0: two processes go on from one's state, and follow it to rounding. Where each has a part: refused, with the number."""
    flags = [*flags_of(world, files, "kept features", tmp_path / "cut", *more), "--gradient_accumulation_steps", 1]
    run_train(*flags_of(world, files, "kept features", tmp_path / "whole", *more))
    interrupted_at(monkeypatch, 4)
    with pytest.raises(SystemExit):
        run_train(*flags_of(world, files, "kept features", tmp_path / "cut", *more))
    with pytest.raises(SystemExit):
        run_train(*flags_of(world, files, "ZeRO-1", tmp_path / "parts"))
    two(*flags, "--resume")
    losses = [[json.loads(line)["loss"] for line in open(tmp_path / name / "metrics.jsonl")] for name in ("whole", "cut")]
    assert losses[0][:4] == losses[1][:4] and largest_difference("losses", *losses) < tolerance
    two.begin(*flags_of(world, files, "ZeRO-1", tmp_path / "parts"), "--resume")
    for how, said in two.end():
        assert how == "exit 1" and re.search("error: .*written by 1 processes.* so 2 cannot go on; start 1", said)


def test_two_processes_stop_together(world, files, two, tmp_path):
    """SIGTERM to one of them: both finish the step, and one command is said."""
    log = tmp_path / "cut.run" / "metrics.jsonl"
    two.begin(*flags_of(world, files, "kept features", tmp_path / "cut", "--max_steps", 2000), "--gradient_accumulation_steps", 1)
    assert wait_for(two.processes[1], lambda: os.path.isfile(log) and os.path.getsize(log) > 3000), two.end()
    two.processes[1].send_signal(signal.SIGTERM)
    (how, said), (other, quiet) = two.end()
    assert how == other == "exit 130", said + quiet
    assert "go on with: deepspeed --num_gpus 2 train.py --stage 2" in said and "go on with" not in quiet
    assert len(steps_logged(tmp_path / "cut.run")) == int((tmp_path / "cut.run" / "latest").read_text().removeprefix("step-"))


# ---------------------------------------------------------------------------------------------------------------------
# A loss that is no loss


def test_a_bad_row_stops_before_it_spoils_the_weights(world, files, tmp_path, in_this_process):
    """NaN in one row's kept features: step, rows of that micro batch and the state before are named; that state is sound."""
    flags = flags_of(world, files, "kept features", tmp_path / "cut", "--cache_features", tmp_path / "features", "--save_steps", 1)
    run_train(*flags)
    whole = result(tmp_path / "cut")
    kept, = glob(str(tmp_path / "features" / "*"))
    with open(f"{kept}/hidden.bin", "r+b") as file:
        sound = file.read()
    rows = np.load(f"{kept}/rows.npz")
    offsets, lengths = rows["token_offsets"], np.diff(rows["position_offsets"])
    sampler = ResumableSampler(len(offsets) - 1, STEPS, 8, 4, 0, 1, 42, lengths=lengths)
    bad = list(sampler)[2 * 4 + 1]                                               # the second micro batch of step 5
    width = len(sound) // int(offsets[-1])
    spoilt = bytearray(sound)
    begin, end = offsets[bad[1]] * width, offsets[bad[1] + 1] * width
    spoilt[begin:end] = np.full((end - begin) // 4, np.nan, np.float32).tobytes()
    with open(f"{kept}/hidden.bin", "r+b") as file:
        file.write(spoilt)
    with pytest.raises(InputError) as error:
        run_train(*flags)
    print(error.value)
    assert "the loss is nan at step 5" in str(error.value) and "step-4 is the last good state" in str(error.value)
    said = re.search("from examples (.*) of the data", str(error.value))[1]
    assert [int(n) for n in re.findall(r"(\d+) \(\d+.jpg\)", said)] == bad
    with open(f"{kept}/hidden.bin", "r+b") as file:
        file.write(sound)
    run_train(*flags, "--resume")
    assert result(tmp_path / "cut") == whole


@pytest.mark.parametrize("kind", ("kept features", "ZeRO-0, bf16", "ZeRO-1", "ZeRO-3, bf16, LoRA"))
def test_a_bad_gradient_stops_before_it_is_saved(world, files, tmp_path, monkeypatch, in_this_process, kind):
    """A finite loss whose gradient is no number, in the third step: the state before it is the last, and sound."""
    set_trained, calls = train.set_trained, []

    def spoilt(*args):
        trained = set_trained(*args)
        name = next(name for name in trained if "out_proj" in name or "lora_B" in name)
        trained[name].register_hook(lambda g: g * math.nan if calls.append(name) or len(calls) > 4 else g)     # two calls a step
        return trained

    monkeypatch.setattr(train, "set_trained", spoilt)
    flags = flags_of(world, files, kind, tmp_path / "cut", "--save_steps", 1, "--per_device_train_batch_size", 4)
    with pytest.raises(InputError, match=r"the gradient is no number at step 3, from examples \d+ \(\d+.jpg\).*step-2 is the last good"):
        run_train(*flags)
    assert (tmp_path / "cut.run" / "latest").read_text() == "step-2"


def test_a_loss_that_explodes(world, files, tmp_path, in_this_process):
    with pytest.raises(InputError, match="the loss is .* at step [2-8], from examples .* lower --learning_rate"):
        run_train(*flags_of(world, files, "kept features", tmp_path / "cut", "--learning_rate", "1e4"))


def test_when_a_loss_explodes(in_this_process):
    """Over 20 times the mean of the last 20 steps, which counts as 1 at least; the first step has no past."""
    from collections import deque
    seen, examples = [([3, 1, 2], {"loss": torch.tensor(2.5)})], [Example(f"VG/{n}7.jpg" if n else None, []) for n in range(4)]
    recent = deque(maxlen=20)
    check_loss(1e6, recent, 1, seen, "nowhere", examples)
    for loss in (0.001, 19.9, 0.5):
        check_loss(loss, deque([0.001] * 20, maxlen=20), 2, seen, "nowhere", examples)
    check_loss(590., deque([30.] * 20, maxlen=20), 2, seen, "nowhere", examples)
    for loss, before in ((20.5, 0.001), (610., 30.), (math.nan, 1.), (math.inf, 1.)):
        with pytest.raises(InputError, match=r"from examples 3 \(37.jpg\), 1 \(17.jpg\), 2 \(27.jpg\) of the data; .* not kept: look"):
            check_loss(loss, deque([before] * 20, maxlen=20), 2, seen, "nowhere", examples)


def test_how_to_go_on(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train.py", "--local_rank=0", "--output_dir", "two words", "--resume"])
    typed = "train.py --output_dir 'two words' --resume"
    assert resume_command(1) == f"python {typed}" and resume_command(2) == f"deepspeed --num_gpus 2 {typed}"
    monkeypatch.setenv("CROSS_SIZE", "2")                                        # two machines
    assert resume_command(4) == f"deepspeed --hostfile … {typed}"


def test_the_log_is_cut_back(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"st')
    cut_log(str(path), 2)
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n'
