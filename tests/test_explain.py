"""explain.py: what it prints are the repository's own numbers, and the lines that it names hold what it says."""
import math
import os
import re
from dataclasses import asdict

import pytest
import torch
from conftest import ROOT, largest_difference, preference_rows, shake, succeeds

from checkpoint import fingerprint, load_base, save_trained
from data import IMAGE_ID, Row
from dpo import dpo_loss, sequence_logps
from explain import answer_tokens, explain, load, main, objective_of, shaded, shown_tokens
from objective import Objective
from post_decoder import VARIANTS, PostInteractionBlock
from readers import InputError

PLACE = re.compile(r"\b(\w+\.py):(\d+)\b")


@pytest.fixture(scope="module")
def base(world):
    return load_base(world.base)


def explained(objective, rows, i):
    """→ the lines, as {first word: list of lines} of each numbered stage."""
    stages = []
    for line in explain(objective, rows, i):
        assert len(line) <= 110, line
        if re.match(r"\d  ", line):
            stages.append([])
        if line:
            stages[-1].append(line)
    assert [stage[0][0] for stage in stages] == list("12345678")
    return stages


def number(lines, start):
    """The number with four digits behind the point in the line that starts so."""
    line, = (line for line in lines if line.strip().startswith(start))
    return float(re.findall(r"-?\d+\.\d{4}\b", line)[-1])


def check_places(stages, holds):
    """Every place named is a line of that file, and {beginning of a line: what its place holds}."""
    found = {}
    for text in (line for stage in stages for line in stage):
        for file, n in PLACE.findall(text):
            with open(os.path.join(ROOT, file), encoding="utf-8") as source:
                found[text] = source.read().splitlines()[int(n) - 1]
    for start, code in holds.items():
        lines = [code in line for text, line in found.items() if text.strip().startswith(start)]
        assert lines and all(lines), (start, code)


def test_step_0(world, base):
    """The first pair before training: tokens, mask, an identity, ln 2, and the two tensors that a gradient reaches."""
    trunk, head, _, _ = base
    rows = preference_rows(world, trunk)
    objective = objective_of(trunk, head, None, ("post_decoder",))
    row, batch = rows.row(0), rows[[0]]
    text, tokens, mask, frozen, block, logps, loss, gradients = stages = explained(objective, rows, 0)

    prefix = row.branch.count(0)
    assert f"tokens 0 to {prefix - 1}," in tokens[1] and f"<image> × {row.input_ids.count(IMAGE_ID)} " in "".join(tokens)
    table = [line[3:].split() for line in tokens if re.match(r"   +\d+ +\d+ ", line)]
    for number_of_branch, columns in (1, [line[:5] for line in table]), (2, [line[5:] for line in table]):
        for (t, k), (token, position, piece, label, source) in zip(answer_tokens(row, number_of_branch), columns, strict=True):
            assert (t, row.position[t], row.target[k], row.source[k]) == (int(token), int(position), int(label), int(source))
            assert piece == rows.tokenizer.model.id_to_piece(row.input_ids[t]) and row.input_ids[t] == row.target[k]
            assert position == str(prefix + columns.index([token, position, piece, label, source]))

    shown = shown_tokens(row)
    drawn = [re.findall("[■·]", line) for line in mask[1:-1]]
    assert [int(line.split()[0]) for line in mask[1:-1]] == shown and shown[-1] == len(row.input_ids) - 1
    assert drawn == [["■" if row.position[j] <= row.position[i] and row.branch[j] in (0, row.branch[i]) else "·" for j in shown]
                     for i in shown]

    A, config = len(row.source), trunk.config
    P, C, H = config.vision.num_patches, config.vision.hidden_size, config.text.hidden_size
    for name, shape in {"pixel values": batch.pixel_values.shape, "CLIP's features F": (1, P, C), "projected": (1, P, H),
                        "embeddings": (1, batch.input_ids.shape[1], H), "hidden states": (1, batch.input_ids.shape[1], H),
                        "h  ": (1, A, H)}.items():
        assert any(line.strip().startswith(name) and str(tuple(shape)) in line for line in frozen), name
    assert [number(block, f"eq. {n}") for n in (2, 3, 4)] == [0, 0, 0] and number(block, "eq. 1") > 0
    assert any("identity" in line for line in block)

    policy = objective.eval()(batch)[0]
    sums = [float(x) for x in re.findall(r"-\d+\.\d{4}", logps[-1])]
    assert largest_difference("sums", sums, policy.repeat_interleave(2)) < 1e-4            # policy, reference; chosen, rejected
    assert abs(number(loss, "loss ") - math.log(2)) < 1e-4 and "= ln 2" in "".join(loss)
    assert [number(loss, name) for name in ("reward, chosen", "reward, rejected", "margin")] == [0, 0, 0]
    nll = -policy[0] / len(answer_tokens(row, 1))
    assert abs(number(loss, "NLL") - nll) < 1e-4
    assert sorted(line.split()[0].split(".")[-2] for line in gradients[1:3]) == ["fc2", "out_proj"] and "14 others" in gradients[3]
    check_places(stages, {"1 ": "def read_hadpo", "3 ": "def branch_mask", "eq. 1": "# eq. 1", "eq. 2": "# eq. 2", "eq. 3": "# eq. 3",
                          "eq. 4": "# eq. 4", "margin": "margin =", "dpo": "F.logsigmoid(margin)", "h  ": "def answer_states",
                          "NLL": "def mean_nll", "sum": "def sequence_logps", "8 ": "def set_trained"})


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_block(world, base, variant):
    """A block that is no identity: loss and rewards are those of the numbers that are printed, and equations those of this block."""
    trunk, head, _, _ = base
    rows = preference_rows(world, trunk)
    block = shake(PostInteractionBlock(trunk.config.block(**VARIANTS[variant])), 3)
    other = objective_of(trunk, head, None, ("post_decoder",)).head
    other.post_interaction_block = block
    objective = objective_of(trunk, other, head, ("post_decoder", "lm_head"), loss="ipo", beta=0.5, sft_weight=0.25)
    *_, equations, logps, loss, gradients = stages = explained(objective, rows, 1)
    chosen, ref_chosen, rejected, ref_rejected = (torch.tensor([float(x)]) for x in re.findall(r"-\d+\.\d{4}", logps[-1]))
    losses, *rewards = dpo_loss(chosen, rejected, ref_chosen, ref_rejected, 0.5, "ipo")
    said = [number(loss, name) for name in ("ipo", "reward, chosen", "reward, rejected")]
    assert largest_difference("loss and rewards", said, torch.cat((losses, *rewards))) < 2e-3         # of four printed digits
    assert abs(number(loss, "loss ") - said[0] - 0.25 * number(loss, "NLL")) < 2e-4 and abs(said[1] - said[2]) > 1e-3
    named = [line.split()[1] for line in equations if line.strip().startswith("eq. ")]
    assert named == {"none": ["3", "4"], "self": ["2", "3", "4"], "cross": ["1", "2", "3", "4"]}[block.config.attention]
    assert number(equations, "eq. 4") > 0 and not any("identity" in line for line in equations) and "others" in gradients[-1]
    check_places(stages, {"ipo": "1 / (2 * beta)", "eq. 4": "# eq. 4", "loss ": "self.sft_weight"})


def test_checkpoint(world, base, tmp_path):
    """A trained checkpoint brings its data, its loss and the head that it started from."""
    trunk, head, tokenizer, _ = base
    heads = {}
    for n, name in enumerate(("stage1", "stage2")):
        start = {"stage1": "identity", "stage2": str(tmp_path / "stage1")}[name]
        heads[name] = objective_of(trunk, head, None, ("post_decoder",)).head
        shake(heads[name].post_interaction_block, n)
        flags = {"vg_path": world.vg, "desc_data_path": world.desc, "pope_data_path": world.pairs, "init": start, "loss": "dpo", "beta": 0.2,
                 "label_smoothing": 0.1, "sft_weight": 0.5, "tune": ["post_decoder"]}
        save_trained(str(tmp_path / name), dict(heads[name].state_dict()), {
            "base": world.base, "fingerprint": fingerprint(trunk, head), "block": asdict(heads[name].block), "arguments": flags}, tokenizer)
    objective, _, preprocess, examples = load(str(tmp_path / "stage2"))
    rows = preference_rows(world, trunk)
    rows.examples = examples
    twin = Objective(trunk, heads["stage1"], "dpo", 0.2, 0.5, 0.1)              # its reference is stage 1's head,
    twin.head = heads["stage2"].requires_grad_(True)                            # and what is trained has moved away from it
    expected, metrics = twin(rows[[2]])
    loss = explained(objective, rows, 2)[6]
    said = [number(loss, name) for name in ("loss ", "margin", "NLL")]
    assert largest_difference("loss, margin, NLL", said, [expected.item(), metrics["rewards/margin"], metrics["nll"]]) < 1e-4
    assert abs(said[1]) > 1e-3 and "10 % of the labels" in "".join(loss) and "eq. 3" in "".join(loss)


def test_long_answers_are_abridged():
    row = Row([1] + [IMAGE_ID] * 9 + [5] * 90, list(range(40)) + 2 * list(range(40, 70)), [0] * 40 + [1] * 30 + [2] * 30,
              [39] * 60, [5] * 60, [1] * 30 + [2] * 30, [69, 99])
    shown = shown_tokens(row)
    assert len(shown) == 3 + 4 + 2 * 14 and shown == sorted(shown) and {0, 1, 9, 39, 40, 69, 70, 99} <= set(shown)


def test_shades():
    assert shaded(torch.tensor([[0.0, 1.0], [2.0, 4.0]]), 2) == ["  ░░", "▒▒██"]
    assert shaded(torch.zeros(3, 3), 3) == [6 * " "] * 3


def test_command_line(world, tmp_path, monkeypatch):
    """In an empty folder it makes what it needs and leaves nothing; what is wrong is said with its cure."""
    said = succeeds("python", os.path.join(ROOT, "model.py"), "--explain", cwd=tmp_path)
    assert "a random model" in said.splitlines()[0] and "= ln 2" in said and os.listdir(tmp_path) == []
    (tmp_path / "adapter_config.json").write_text("{}")
    for flags, message in ((["nowhere"], "nowhere: no such folder"), ([world.base, "--pair", "99"], "--pair 99: the data hold .* pairs"),
                           ([str(tmp_path)], "neither a base nor a checkpoint of train.py")):
        monkeypatch.setattr("sys.argv", ["model.py", "--explain", *flags])
        with pytest.raises(InputError, match=message):
            main()
