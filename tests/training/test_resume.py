"""Interruption: stopped by Ctrl-C or killed at any moment, a run goes on as if nothing had been.

Equality is that of the files' bytes: on the CPU a resumed run does not differ from one that never
stopped.
"""
import os
import random
import re
import shlex
import shutil
import signal
import sys
import time
from glob import glob

import pytest
import torch
from conftest import largest_difference, run_train
from programs import ROOT, Begun
from short_runs import INTERRUPTED_STEPS as STEPS
from short_runs import KINDS, flags_of, losses_of, result, steps_logged

import train
from support.common import InputError
from training import resume
from training.guards import Guards
from training.resume import cut_log, resume_command

TRAIN = os.path.join(ROOT, "train.py")
CHECK = Guards.check                # called in the middle of every step


def interrupted_at(monkeypatch, step):
    """Ctrl-C comes in the middle of a step."""
    def noted(self, now, values, seen):
        if now == step:
            os.kill(os.getpid(), signal.SIGINT)
        CHECK(self, now, values, seen)
    monkeypatch.setattr(Guards, "check", noted)


# ---- Ctrl-C --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_stopped_and_resumed_is_not_stopped(world, tmp_path, monkeypatch, capsys, in_this_process,
                                            kind):
    run_train(*flags_of(world, kind, tmp_path / "whole"))
    flags = flags_of(world, kind, tmp_path / "cut")
    for step in (3, 5):
        interrupted_at(monkeypatch, step)
        with pytest.raises(SystemExit) as stop:
            run_train(*flags, *(["--resume"] if step > 3 else []))
        assert stop.value.code == 130
        said = f"stopped after step {step} of {STEPS}; go on with: python"
        assert said in capsys.readouterr().out
        assert not os.path.exists(tmp_path / "cut")
        assert (tmp_path / "cut.run" / "latest").read_text() == f"step-{step}"
        assert steps_logged(tmp_path / "cut.run") == list(range(1, step + 1))
    monkeypatch.setattr(Guards, "check", CHECK)
    run_train(*flags, "--resume")
    whole, cut = result(tmp_path / "whole"), result(tmp_path / "cut")
    assert whole and whole == cut
    assert steps_logged(tmp_path / "cut") == list(range(1, STEPS + 1))
    assert not os.path.exists(tmp_path / "cut.run")
    losses = [losses_of(tmp_path / name) for name in ("whole", "cut")]
    assert losses[0] == losses[1] and len(set(losses[0])) == STEPS
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler         # put back


def test_a_state_holds_what_is_trained_and_no_more(world, tmp_path, monkeypatch, in_this_process):
    """`--save_steps` keeps the last two, without the frozen weights and without the reference."""
    interrupted_at(monkeypatch, 7)
    with pytest.raises(SystemExit):
        run_train(*flags_of(world, "kept features", tmp_path / "cut", "--save_steps", 2))
    assert sorted(os.listdir(tmp_path / "cut.run")) == ["latest", "lock", "metrics.jsonl",
                                                        "run.json", "step-6", "step-7"]
    path = tmp_path / "cut.run" / "step-7" / "mp_rank_00_model_states.pt"
    names = [name.split(".") for name in torch.load(path, weights_only=False)["module"]]
    assert {part for _, part, *_ in names} == {"post_interaction_block", "lm_head"}
    assert {module for module, *_ in names} == {"head"}


def test_what_cannot_go_on(world, tmp_path, monkeypatch, capsys, in_this_process):
    """Other arguments, data or files than the interrupted run's are named; without --resume a run
    starts anew, and says so."""
    flags = flags_of(world, "kept features", tmp_path / "cut")
    interrupted_at(monkeypatch, 3)
    with pytest.raises(SystemExit):
        run_train(*flags)
    monkeypatch.setattr(Guards, "check", CHECK)
    clipped = tmp_path / "clipped.json"
    clipped.write_text('{"train_batch_size": 8, "gradient_clipping": 0.1}')
    for more, said in ((["--learning_rate", "2e-2"], "learning_rate was 0.01 and is 0.02"),
                       (["--no-keep_correct"], "examples was"),
                       (["--max_steps", "9"], "steps was 8 and is 9"),
                       (["--seed", "43"], "seed was 42 and is 43"),
                       (["--gradient_accumulation_steps", "4"], "global batch was 8 and is 16"),
                       (["--beta", "0.2", "--stage", "1"], "beta.*stage|stage.*beta"),
                       (["--deepspeed", clipped], "gradient_clipping was 1.0 and is 0.1")):
        with pytest.raises(InputError, match=said) as error:
            run_train(*flags, "--resume", *more)
        assert "--resume" in str(error.value) and "leave --resume out" in str(error.value)
    before = (tmp_path / "cut.run" / "latest").read_text()
    capsys.readouterr()
    run_train(*flags, "--logging_steps", 3)                              # anew: not from step 3
    said = capsys.readouterr().out
    assert before == "step-3" and "step-3 of an interrupted run, which is discarded" in said
    assert steps_logged(tmp_path / "cut") == [3, 6, 8]
    run_train(*flags, "--resume")                                        # what is finished stays
    said = capsys.readouterr().out
    assert "finished already" in said and "unless it is this very run's, it will be" in said
    assert steps_logged(tmp_path / "cut") == [3, 6, 8]
    for more, steps in ((["--max_steps", 9], 9), (["--learning_rate", "3e-2"], 8)):
        run_train(*flags, "--resume", *more)                         # by other arguments it is not
        assert "no state in it; from the beginning" in capsys.readouterr().out
        assert steps_logged(tmp_path / "cut") == list(range(1, steps + 1))


def test_a_whole_model_tells_whose_it_is(world, tmp_path, capsys, in_this_process):
    flags = flags_of(world, "the trunk by DPO", tmp_path / "whole", "--max_steps", 1)
    run_train(*flags)
    run_train(*flags, "--resume")
    assert "finished already" in capsys.readouterr().out
    run_train(*flags, "--resume", "--beta", "0.2")
    assert "no state in it; from the beginning" in capsys.readouterr().out


def test_a_sweep_goes_on_where_it_stopped(world, tmp_path, monkeypatch, in_this_process):
    flags = flags_of(world, "kept features", tmp_path / "sweep",
                     "--learning_rate", "1e-2", "3e-3", "1e-3")
    run_train(*flags)
    whole = {name: result(tmp_path / f"sweep-{name}") for name in ("0.01", "0.003", "0.001")}
    for name in whole:
        assert len(whole[name]) == 1
        os.rename(tmp_path / f"sweep-{name}", tmp_path / f"whole-{name}")
    calls = []

    def noted(self, step, values, seen):
        calls.append(step)
        if len(calls) == STEPS + 4:                              # in the second run's fourth step
            os.kill(os.getpid(), signal.SIGTERM)
        CHECK(self, step, values, seen)

    monkeypatch.setattr(Guards, "check", noted)
    with pytest.raises(SystemExit):
        run_train(*flags)
    left = [name for name in sorted(os.listdir(tmp_path)) if name.startswith("sweep")]
    assert left == ["sweep-0.003.run", "sweep-0.01"]
    run_train(*flags, "--resume")
    assert len(calls) == 3 * STEPS                               # no step twice
    assert whole == {name: result(tmp_path / f"sweep-{name}") for name in whole}


def test_how_to_go_on(monkeypatch):
    typed = ["train.py", "--local_rank=0", "--output_dir", "two words", "--resume"]
    monkeypatch.setattr(sys, "argv", typed)
    command = "train.py --output_dir 'two words' --resume"

    def said(processes):
        monkeypatch.setattr(resume.dist, "get_world_size", lambda: processes)
        return resume_command()

    assert said(1) == f"python {command}" and said(2) == f"deepspeed --num_gpus 2 {command}"
    monkeypatch.setenv("CROSS_SIZE", "2")                        # two machines
    assert said(4) == f"deepspeed --hostfile … {command}"


def test_the_log_is_cut_back(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"st')
    cut_log(str(path), 2)
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n'


# ---- Other processes -----------------------------------------------------------------------------


def wait_for(process, condition, limit=100):
    """Until the condition holds; False when the process has ended before."""
    began = time.monotonic()
    while not condition():
        if process.poll() is not None:
            return False
        assert time.monotonic() < began + limit
        time.sleep(0.002)
    return True


@pytest.mark.parametrize("kind, kills", (("kept features", 3), ("LoRA with dropout", 1)))
def test_kill_9_at_any_moment(world, tmp_path, in_this_process, kind, kills):
    """Inside a save, between two, before the first: then --resume, which ends with the bytes of a
    run that was left alone."""
    run_train(*flags_of(world, kind, tmp_path / "whole", "--max_steps", 40))
    flags = flags_of(world, kind, tmp_path / "cut", "--max_steps", 40, "--save_steps", 1,
                     "--resume")
    run, rng, moments = str(tmp_path / "cut.run"), random.Random(0), []

    def saved():
        if not os.path.isfile(f"{run}/latest"):
            return 0
        with open(f"{run}/latest") as file:
            return int(file.read().removeprefix("step-"))

    def has_begun():
        return os.path.isfile(f"{run}/run.json")

    def between_saves():
        return saved() > 4

    def inside_a_save():                    # behind step 12, and DeepSpeed has begun to write
        return saved() > 12 and any(glob(f"{run}/step-{saved() + 1}.partial/*.pt"))

    for condition in (has_begun, between_saves, inside_a_save)[-kills:]:
        process = Begun(TRAIN, *flags)
        assert wait_for(process, condition), process.output.read()
        time.sleep(0 if condition is inside_a_save else 0.02 * rng.random())
        process.kill()
        process.end()
        assert process.returncode == -signal.SIGKILL and not os.path.exists(tmp_path / "cut")
        states = sorted(os.path.basename(path) for path in glob(f"{run}/step-*"))
        moments.append((saved(), states))
    print("killed with", moments)
    before = [step for step, _ in moments]
    assert 13 <= before[-1] < 40 and (kills == 1 or before[0] < 4 < before[1] < 13)
    run_train(*flags)
    whole, cut = result(tmp_path / "whole"), result(tmp_path / "cut")
    assert whole and whole == cut and steps_logged(tmp_path / "cut") == list(range(1, 41))


@pytest.mark.parametrize("more", ([], ["--resume"]), ids=str)
def test_a_run_that_still_lives_is_left_alone(world, tmp_path, more):
    """As after kill -9 of the launcher alone: its process trains on, and another one may not write
    there."""
    flags = flags_of(world, "kept features", tmp_path / "cut", "--max_steps", 100_000,
                     "--save_steps", 5)
    first, latest = Begun(TRAIN, *flags), tmp_path / "cut.run" / "latest"
    assert wait_for(first, lambda: os.path.isfile(latest)), first.output.read()
    second = Begun(TRAIN, *flags, *more)
    said = second.end()
    refused = f"error: .*cut.run: process {first.pid} on .* still trains there; wait for it"
    assert second.returncode == 1 and re.search(refused, said)
    assert first.poll() is None
    first.kill()
    first.end()
    third = Begun(TRAIN, *flags, "--resume")                            # its death frees the folder
    assert any("going on from" in line for line in third.output)
    third.kill()
    third.end()


def test_every_moment_of_a_save(world, tmp_path, monkeypatch, in_this_process):
    """A save stopped in front of each of its file operations, as a kill would: `latest` always
    names a whole state."""
    flags = flags_of(world, "kept features", tmp_path / "cut", "--save_steps", 2)
    run_train(*flags_of(world, "kept features", tmp_path / "whole"))

    class Killed(BaseException):
        pass

    counted, limit, save_state = [], None, train.save_state

    def counting(function):
        def call(*args, **options):
            counted.append(function.__name__)
            if len(counted) == limit:
                raise Killed
            return function(*args, **options)
        return call

    def watched(engine, folder, step):
        with pytest.MonkeyPatch.context() as patch:
            if step == 4:
                patch.setattr(engine, "save_checkpoint", counting(engine.save_checkpoint))
                for module, name in ((os, "rename"), (os, "replace"), (shutil, "rmtree"),
                                     (torch, "load")):
                    patch.setattr(module, name, counting(getattr(module, name)))
            save_state(engine, folder, step)

    monkeypatch.setattr(train, "save_state", watched)
    run_train(*flags)
    moments = list(counted)
    print(moments)
    assert len(moments) >= 4
    for moment in range(1, len(moments) + 1):
        counted.clear()
        limit = moment
        with pytest.raises(Killed):
            run_train(*flags)
        latest = (tmp_path / "cut.run" / "latest").read_text()
        assert latest == ("step-4" if "replace" in counted[:limit - 1] else "step-2")
        assert counted
        counted.clear()
        limit = None
        run_train(*flags, "--resume")
        assert result(tmp_path / "cut") == result(tmp_path / "whole")


def test_ctrl_c_typed(world, tmp_path, capsys, in_this_process):
    """The process says how to go on, and leaves with 130; what it says, typed, does go on."""
    run_train(*flags_of(world, "kept features", tmp_path / "whole", "--max_steps", 200))
    log = tmp_path / "cut.run" / "metrics.jsonl"
    process = Begun(TRAIN, *flags_of(world, "kept features", tmp_path / "cut", "--max_steps", 200,
                              "--dataloader_num_workers", 1))
    written = wait_for(process, lambda: os.path.isfile(log) and os.path.getsize(log) > 1000)
    assert written, process.output.read()
    process.send_signal(signal.SIGINT)
    said = process.end()
    assert process.returncode == 130 and "Traceback" not in said, said
    program, script, *flags = shlex.split(re.search(r"go on with: (.*)", said)[1])
    assert (program, os.path.basename(script), flags[-1]) == ("python", "train.py", "--resume")
    run_train(*flags)
    assert "going on from" in capsys.readouterr().out
    assert result(tmp_path / "cut") == result(tmp_path / "whole")


@pytest.mark.parametrize("more, tolerance", (([], 1e-4), (["--bf16"], 2e-2)))
def test_other_numbers_of_processes(world, two, tmp_path, monkeypatch, in_this_process, more,
                                    tolerance):
    """ZeRO-0: two processes go on from one's state, and follow it to rounding. Where each has a
    part: refused, with the number."""
    cut = flags_of(world, "kept features", tmp_path / "cut", *more)
    parts = flags_of(world, "ZeRO-1", tmp_path / "parts")
    run_train(*flags_of(world, "kept features", tmp_path / "whole", *more))
    interrupted_at(monkeypatch, 4)
    for flags in (cut, parts):
        with pytest.raises(SystemExit):
            run_train(*flags)
    two(*cut, "--gradient_accumulation_steps", 1, "--resume")
    losses = [losses_of(tmp_path / name) for name in ("whole", "cut")]
    assert losses[0][:4] == losses[1][:4] and largest_difference("losses", *losses) < tolerance
    two.begin(*parts, "--resume")
    refused = "error: .*written by 1 processes.* so 2 cannot go on; start 1"
    for code, said in two.end():
        assert code == 1 and re.search(refused, said)


def test_two_processes_stop_together(world, two, tmp_path):
    """SIGTERM to one of them: both finish the step, and one command is said."""
    log = tmp_path / "cut.run" / "metrics.jsonl"
    two.begin(*flags_of(world, "kept features", tmp_path / "cut", "--max_steps", 2000),
              "--gradient_accumulation_steps", 1)
    last = two.processes[1]
    written = wait_for(last, lambda: os.path.isfile(log) and os.path.getsize(log) > 3000)
    assert written, two.end()
    last.send_signal(signal.SIGTERM)
    (code, said), (other, quiet) = two.end()
    assert code == other == 130, said + quiet
    assert "go on with: deepspeed --num_gpus 2 train.py --stage 2" in said
    assert "go on with" not in quiet
    latest = (tmp_path / "cut.run" / "latest").read_text()
    assert len(steps_logged(tmp_path / "cut.run")) == int(latest.removeprefix("step-"))
