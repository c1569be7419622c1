"""The benchmarks against public peers run, at tiny size on the CPU, and what they count and compare
is right.
"""
import json
import re
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from programs import TwoProcesses, succeeds
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

pytest.importorskip("transformers")
pytest.importorskip("peft")

from bench import bench_dpo, bench_pope, bench_trunk, bench_zero, measuring, peer, peer_dpo
from clip_vit import CLIPVisionConfig
from data import EOS, IMAGE, encode_conversation, expand
from dpo import Objective, frozen_copy
from eval_pope import read_pope
from llama import LlamaConfig
from model import LlavaConfig, Trunk
from support.questions import SPLITS

PEERS = ("peft", "transformers.models.llava.modeling_llava")
TINY_POPE = ("--size tiny --images 4 --batch_size 2 --peer_single 3 --peer_batched 20 "
             "--peer_batch 8").split()
TINY_TRUNK = "--size tiny --images 3 --questions 4 --peer_batch 5 --steps 2 --repeats 1".split()
TINY_DPO = ("--size tiny --tokens 6 10 --micro_batches 2 4 --peer_pairs 2 --pairs 8 --steps 2 "
            "--global_batch 8 --repeats 1 --pairs_per_image 2").split()
TINY_ZERO = "--gpus 2 --size tiny --pairs 2 --tokens 6 --repeats 1 --only full".split()


def lines_of(said):
    """Markdown tables → {first cell: [the other cells]}."""
    rows = [[cell.strip() for cell in line.strip("|").split("|")]
            for line in said.splitlines() if line.startswith("| ")]
    return {first: rest for first, *rest in rows}


def no_more_tables(monkeypatch):
    """Only bench_pope.py's main table is measured: the others compare nothing."""
    for name in ("over_questions", "over_tokens"):
        monkeypatch.setattr(bench_pope, name, lambda *_: [])


# ---- They run ------------------------------------------------------------------------------------


def test_pope(capsys):
    bench_pope.main(TINY_POPE)
    said = capsys.readouterr().out
    lines = lines_of(said)
    assert {"transformers, one by one", "transformers, batches of 8", "ours",
            "ours, base and a checkpoint", "ours, 128 tokens",
            "ours, questions about an image: 12"} <= lines.keys()
    assert lines["ours"][0] == "72"                                        # 4 × 6 × 3 answers
    assert lines["transformers, batches of 8"][0] == "20"                  # a sample
    assert re.search(r"ours against transformers in batches: 0 of 20 answers differ", said)
    assert re.search(r"first tokens, ours against transformers in batches: differ by \d", said)


def test_pope_on_several_processes():
    said = TwoProcesses("bench/bench_pope.py", PEERS)(*TINY_POPE)
    assert lines_of(said)["ours, 2 processes"][0] == "72" and "answers/s" in said


def test_trunk(capsys):
    bench_trunk.main(TINY_TRUNK)
    said = capsys.readouterr().out
    assert len([first for first in lines_of(said) if "ours" in first]) == 3    # pass, step, floor
    assert "hidden states behind every question: differ by" in said


def test_bf16_as_on_a_gpu(monkeypatch, capsys):
    def rounded(size):
        ours = peer.random_llava(size)
        return replace(ours, dtype=torch.bfloat16, trunk=ours.trunk.bfloat16(),
                       heads={"base": ours.head.bfloat16()})

    for bench in (bench_pope, bench_trunk):
        monkeypatch.setattr(bench, "random_llava", rounded)
    no_more_tables(monkeypatch)
    bench_pope.main(TINY_POPE)
    bench_trunk.main(TINY_TRUNK)
    assert capsys.readouterr().out.count("tolerance 10 %") == 2


def test_dpo(tmp_path):
    output = tmp_path / "lines.jsonl"
    said = succeeds("python", "bench/bench_dpo.py", *TINY_DPO, "--output", output, imports=PEERS)
    lines = lines_of(said)
    assert lines["6 tokens: ours, a whole run of 2 steps from kept features"][0] == "16"
    assert "6 tokens: ours, the frozen pass onto the disk, 2 pairs an image" in lines
    sides = {"ours, stage 2, 4 pairs", "ours, LoRA, 2 pairs", "ours, LoRA, checkpointing, 2 pairs",
             "peft, LoRA in bf16, checkpointing, 2 pairs", "peft, LoRA in bf16, 2 pairs",
             "peft, LoRA in fp32, autocast, checkpointing, 2 pairs",
             "transformers, frozen trunk, 2 pairs"}
    assert {f"{n} tokens: {side}" for n in (6, 10) for side in sides} <= lines.keys()
    assert "adapters off: differ by" in said
    kept = [json.loads(line) for line in output.read_text().splitlines()]
    assert {row["what"] for row in kept} | {""} == lines.keys()
    assert not any(row["out_of_memory"] for row in kept)


def test_zero_on_several_processes(monkeypatch, capsys):
    """The two processes that torchrun would start for each line."""
    def launched(command):
        launcher, (script, *flags) = command[:6], command[6:]
        assert launcher == [sys.executable, "-m", "torch.distributed.run", "--standalone",
                            "--nproc_per_node", "2"]
        print(TwoProcesses(script, PEERS)(*flags))
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(bench_zero.subprocess, "run", launched)
    bench_zero.main(TINY_ZERO)
    said = capsys.readouterr().out
    rows = [line.split(" | ") for line in said.splitlines() if line.startswith("| 2 |")]
    assert [(row[1], row[2]) for row in rows] == [("full", "3"), ("full", "3 + offload")]
    assert all(float(row[3]) > 0 for row in rows)


# ---- Both sides are the same model ---------------------------------------------------------------


def test_both_sides_hold_the_same_memory():
    ours = peer.random_llava("tiny")
    theirs = peer.peer_of(ours)
    shared = {**ours.trunk.state_dict(), **ours.head.state_dict()}
    found = {peer.our_name(name): tensor.data_ptr()
             for name, tensor in theirs.state_dict().items()}
    assert all(found[name] == tensor.data_ptr() for name, tensor in shared.items())


def test_the_frozen_trunk_of_transformers_trains_what_stage_2_trains(tmp_path):
    """With a block that is no identity: log-probabilities as of our Objective, and the same
    loss."""
    ours = peer.random_llava("tiny")
    images = [str(tmp_path / name) for name in peer.write_images(tmp_path, 2)]
    dataset = bench_dpo.make_pairs(ours, images, 2, 6)
    sides = peer_dpo.Sides(ours, peer.peer_of(ours))
    trainer = peer_dpo.FrozenTrunk(peer_dpo.Peer("frozen trunk", 2), sides)
    reference = frozen_copy(trainer.head)
    with torch.no_grad():
        for weight in trainer.head.post_interaction_block.parameters():
            weight.add_(torch.randn_like(weight) / 10)
    objective = Objective(ours.trunk, trainer.head, peer_dpo.LOSS)
    inputs, _ = peer_dpo.peer_batch(ours, dataset, 2)
    states = trainer.states(inputs, 6)
    for head in (reference, trainer.head):
        objective.head = head
        expected = objective.policy_logps(dataset[[0, 1]])
        found = peer_dpo.answer_logps(head(*states), inputs, 6)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    before = [weight.detach().clone() for weight in trainer.update.trained]
    trainer.step(inputs, 6)
    changed = [(weight != old).any() for weight, old in
               zip(trainer.update.trained, before, strict=True)]
    assert all(changed) and len(changed) == len(list(trainer.head.parameters()))


def test_memory_that_is_missing_is_a_result(tmp_path):
    def too_large():
        raise torch.OutOfMemoryError("CUDA out of memory")

    assert measuring.attempt(too_large, torch.device("cpu")) is None
    config, rows = peer.SIZES["tiny"], [range(5)]
    missing = measuring.line_of(config, "large", None, 4, rows)
    fits = measuring.line_of(config, "small", measuring.Measured(2.0, None, None), 4, rows)
    text = measuring.table([missing, replace(fits, peers=(missing, fits))], "pair", 4, 1e9)
    assert lines_of(text)["large"][:2] == ["4", "out of memory"]
    assert lines_of(text)["small"][:3] == ["4", "2", "– / 1.00"]
    for line in (missing, fits):
        measuring.keep_line(tmp_path / "lines.jsonl", line)
    kept = [json.loads(line) for line in open(tmp_path / "lines.jsonl")]
    assert [row["out_of_memory"] for row in kept] == [True, False]
    assert [row["seconds_per_unit"] for row in kept] == [None, 0.5]


def test_a_difference_ends_the_benchmark(monkeypatch):
    """One weight of the peer is another: the program must end and not print it as a comparison."""
    def other(ours):
        theirs = peer_of(ours)
        weight = theirs.lm_head.weight.roll(1, 0)
        theirs.lm_head.weight = torch.nn.Parameter(weight, requires_grad=False)
        return theirs

    peer_of = peer.peer_of
    monkeypatch.setattr(bench_pope, "peer_of", other)
    no_more_tables(monkeypatch)
    with pytest.raises(SystemExit, match="cannot be compared"):
        bench_pope.main(TINY_POPE)


def test_answers_that_end_early_are_refused(tmp_path):
    ours = peer.random_llava("tiny")
    names = peer.write_images(tmp_path, 2)
    questions = [(name, bench_pope.question(word))
                 for name in names for word in bench_pope.OBJECTS[:20]]
    line, said = bench_pope.time_ours(ours, tmp_path, "ours", questions, 3, 2)
    assert line.units == 40 == len(said)
    first = int(said[questions[0]].split()[0].removeprefix("#"))
    # Now `</s>` has twice the logit of the first answer's first token.
    ours.head.lm_head.weight[EOS] = 2 * ours.head.lm_head.weight[first]
    with pytest.raises(SystemExit, match="3 tokens long"):
        bench_pope.time_ours(ours, tmp_path, "ours", questions, 3, 2)


def test_unpacked_rows_are_the_questions_alone():
    ours = peer.random_llava("tiny")
    rows, _ = bench_trunk.rows_of(ours, 2, 3)
    for row in rows:
        for number, ids in enumerate(peer.unpack(row), start=1):
            article, word = "an" if number == 1 else "a", "abc"[number - 1] * 3
            conversation = [(f"{IMAGE}\nIs there {article} {word} in the image?", None)]
            encoded = encode_conversation(ours.tokenizer, conversation)
            alone, _ = expand(*encoded, ours.config.vision.num_patches, "image")
            assert ids == alone


# ---- What is counted and printed -----------------------------------------------------------------


def counted(run):
    """Operations of run() by torch's own counter.

    The counter misses some fast attention kernels, and the CPU decides which kernel is taken. The
    math backend is made of matrix products, which are counted everywhere, in full: also what a mask
    forbids.
    """
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


@pytest.mark.parametrize("text", (peer.SIZES["tiny"].text, LlamaConfig(64, 64, 96, 2, 4, 4)),
                         ids=("grouped heads", "as many key heads"))
def test_counted_operations(text):
    vision = CLIPVisionConfig(24, 48, 3, 4, image_size=24, patch_size=8)
    config, T = LlavaConfig(text, vision), 20
    trunk, position = Trunk(config), torch.arange(T)[None]
    embeds, pixels = torch.randn(1, T, text.hidden_size), torch.randn(3, 3, 24, 24)

    decoder = counted(lambda: trunk.model(embeds, position, torch.zeros_like(position)))
    pairs = T * T - T * (T + 1) // 2                                       # that the mask forbids
    forbidden = 4 * text.hidden_size * text.num_hidden_layers * pairs
    assert measuring.decoder_flops(config, range(T)) + forbidden == decoder

    tower = counted(lambda: trunk.model.mm_projector(trunk.vision_tower(pixels)))
    patches = 2 * 3 * vision.hidden_size * 3 * 24 ** 2                # their embedding, left out
    assert measuring.tower_flops(config, 3) + patches == tower


def test_the_counter_counts_attention():
    """Else the test above would compare nothing of it: 4 · heads · T² · head_dim for a product."""
    q = torch.randn(1, 4, 20, 8)
    attend = torch.nn.functional.scaled_dot_product_attention
    assert counted(lambda: attend(q, q, q, is_causal=True)) == 4 * 4 * 20 ** 2 * 8


def test_table():
    """10 pairs in 2 s are 25.6 s for 128; 5 pairs in 8 s are eight times slower."""
    slow = measuring.Line("slow", 8.0, 5, 100, 4e9)
    fast = measuring.Line("fast", 2.0, 10, 1000, 1e9, 3 * 2 ** 30, (slow,))
    text = measuring.table([slow, fast], "pair", 128, 1e9)
    assert lines_of(text)["slow"] == ["5", "204.8", "–", "12", "50.0 %", "–"]
    assert lines_of(text)["fast"] == ["10", "25.6", "8.00", "500", "50.0 %", "3.0"]


def test_agreement():
    numbers = torch.randn(50, generator=torch.Generator().manual_seed(0))
    agreement = measuring.agreement
    agreement("same", numbers + 1e-6, numbers, torch.float32)
    agreement("rounded", numbers.bfloat16(), numbers, torch.bfloat16)
    with pytest.raises(SystemExit):
        agreement("other", numbers + 1e-3, numbers, torch.float32)
    with pytest.raises(SystemExit):
        agreement("nothing", numbers * float("nan"), numbers, torch.float32)
    agreement("control", numbers + 1, numbers, torch.float32, control=True)


def test_questions_are_in_popes_proportions(tmp_path):
    images = [f"{n}.jpg" for n in range(500)]
    bench_pope.write_pope(tmp_path, images)
    rows = {split: read_pope(str(tmp_path), split) for split in SPLITS.values()}
    yes = [{(q["image"], q["text"]) for q in questions if q["label"] == "yes"}
           for questions in rows.values()]
    assert all(len(questions) == 3000 for questions in rows.values())
    assert yes[0] == yes[1] == yes[2] and len(yes[0]) == 1500
    distinct = {(q["image"], q["text"]) for questions in rows.values() for q in questions}
    assert abs(len(distinct) / 5127 - 1) < 0.02


def test_stand_in_tokenizer():
    tokenizer, text = peer.StandInTokenizer(512), "\nIs there a dog in the image? ASSISTANT:"
    ids = tokenizer.encode(text)
    assert len(ids) == 15 and all(2 < i < 511 for i in ids) and ids == tokenizer.encode(text)
    assert tokenizer.decode([5, 2, 7]) == "#5 #2 #7"
