"""tools/explain.py: what it prints are the repository's own numbers, and the lines that it names
hold what it says.
"""
import math
import os
import re
from dataclasses import asdict

import pytest
import torch
from conftest import largest_difference, preference_rows, shake
from programs import ROOT, succeeds

from checkpoints.load import load_base
from checkpoints.save import save_trained
from data import IMAGE_ID, Row
from dpo import Loss, Objective, preference_loss
from post_decoder import VARIANTS, PostInteractionBlock
from support.common import InputError
from tools.explain import explain, main
from tools.explain_load import load, objective_of
from tools.explain_text import answer_tokens, shaded, shown_tokens

PLACE = re.compile(r"(?<!\S)([\w/]+\.py):(\d+)\b")


@pytest.fixture(scope="module")
def base(world):
    return load_base(world.base)


def explained(objective, rows, i):
    """The lines of each numbered stage, without empty ones."""
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


def numbers(lines, *starts):
    return [number(lines, start) for start in starts]


def sums_of(logps):
    """The last line of stage 6: chosen, its reference, rejected, its reference."""
    return [float(x) for x in re.findall(r"-\d+\.\d{4}", logps[-1])]


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


# ---- Before training -----------------------------------------------------------------------------


def check_tokens(tokens, row, tokenizer):
    """Stage 2: the prefix, and the table of answer tokens, a branch beside the other."""
    prefix, said = row.branch.count(0), "".join(tokens)
    assert f"tokens 0 to {prefix - 1}," in tokens[1]
    assert f"<image> × {row.input_ids.count(IMAGE_ID)} " in said
    table = [line[3:].split() for line in tokens if re.match(r"   +\d+ +\d+ ", line)]
    for branch, columns in (1, [line[:5] for line in table]), (2, [line[5:] for line in table]):
        pairs = zip(answer_tokens(row, branch), columns, strict=True)
        for n, ((t, k), (token, position, piece, label, source)) in enumerate(pairs):
            expected = t, row.position[t], row.target[k], row.source[k]
            assert expected == (int(token), int(position), int(label), int(source))
            assert int(position) == prefix + n and row.input_ids[t] == row.target[k]
            assert piece == tokenizer.model.id_to_piece(row.input_ids[t])


def check_mask(mask, row):
    """Stage 3: who may attend to whom, by the rule written out."""
    shown = shown_tokens(row)
    assert [int(line.split()[0]) for line in mask[1:-1]] == shown
    assert shown[-1] == len(row.input_ids) - 1
    for i, line in zip(shown, mask[1:-1], strict=True):
        seen = [row.position[j] <= row.position[i] and row.branch[j] in (0, row.branch[i])
                for j in shown]
        assert re.findall("[■·]", line) == ["■" if sees else "·" for sees in seen]


def check_shapes(frozen, row, batch, config):
    """Stage 4: what the trunk makes of the row."""
    A, T = len(row.source), batch.input_ids.shape[1]
    P, C, H = config.vision.num_patches, config.vision.hidden_size, config.text.hidden_size
    shapes = {"pixel values": tuple(batch.pixel_values.shape), "CLIP's features F": (1, P, C),
              "projected": (1, P, H), "embeddings": (1, T, H), "hidden states": (1, T, H),
              "h  ": (1, A, H)}
    for name, shape in shapes.items():
        lines = [line for line in frozen if line.strip().startswith(name)]
        assert any(str(shape) in line for line in lines), name


def test_step_0(world, base):
    """The first pair before training: tokens, mask, an identity, ln 2, and the two tensors that a
    gradient reaches.
    """
    rows = preference_rows(world, base.trunk)
    objective = objective_of(base, base.head, None, ("post_decoder",), Loss())
    row, batch = rows.row(0), rows[[0]]
    stages = explained(objective, rows, 0)
    _, tokens, mask, frozen, block, logps, loss, gradients = stages
    check_tokens(tokens, row, rows.format.tokenizer)
    check_mask(mask, row)
    check_shapes(frozen, row, batch, base.config)

    assert numbers(block, "eq. 2", "eq. 3", "eq. 4") == [0, 0, 0] and number(block, "eq. 1") > 0
    assert any("identity" in line for line in block)

    policy = objective.policy_logps(batch)[0].detach()
    expected = policy.repeat_interleave(2)                 # policy, reference; chosen, rejected
    assert largest_difference("sums", sums_of(logps), expected) < 1e-4
    assert abs(number(loss, "loss ") - math.log(2)) < 1e-4 and "= ln 2" in "".join(loss)
    assert numbers(loss, "reward, chosen", "reward, rejected", "margin") == [0, 0, 0]
    nll = -policy[0] / len(answer_tokens(row, 1))
    assert abs(number(loss, "NLL") - nll) < 1e-4
    moved = sorted(line.split()[0].split(".")[-2] for line in gradients[1:3])
    assert moved == ["fc2", "out_proj"] and "14 others" in gradients[3]
    check_places(stages, {
        "1 ": "def read_hadpo", "3 ": "def branch_mask", "eq. 1": "# eq. 1", "eq. 2": "# eq. 2",
        "eq. 3": "# eq. 3", "eq. 4": "# eq. 4", "margin": "margin =",
        "dpo": "F.logsigmoid(margin)", "h  ": "def answer_states", "NLL": "def mean_nll",
        "sum": "def sequence_logps", "8 ": "def set_trained"})


# ---- Behind training -----------------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_block(world, base, variant):
    """A block that is no identity: loss and rewards are those of the numbers that are printed, and
    equations are those of this block.
    """
    rows = preference_rows(world, base.trunk)
    block = shake(PostInteractionBlock(base.config.block_config(**VARIANTS[variant])), 3)
    other = objective_of(base, base.head, None, ("post_decoder",), Loss()).head
    other.post_interaction_block = block
    settings = Loss("ipo", beta=0.5, sft_weight=0.25)
    objective = objective_of(base, other, base.head, ("post_decoder", "lm_head"), settings)
    *_, equations, logps, loss, gradients = stages = explained(objective, rows, 1)

    policy, reference = torch.tensor(sums_of(logps)).view(2, 2).T[:, None]              # (1, 2)
    losses, rewards = preference_loss(policy, reference, settings)
    said = numbers(loss, "ipo", "reward, chosen", "reward, rejected")
    expected = torch.cat((losses, rewards[0]))
    assert largest_difference("loss and rewards", said, expected) < 2e-3    # of four printed digits
    whole = said[0] + 0.25 * number(loss, "NLL")
    assert abs(number(loss, "loss ") - whole) < 2e-4 and abs(said[1] - said[2]) > 1e-3

    named = [line.split()[1] for line in equations if line.strip().startswith("eq. ")]
    assert named == {"none": ["3", "4"], "self": ["2", "3", "4"],
                     "cross": ["1", "2", "3", "4"]}[block.config.attention]
    assert number(equations, "eq. 4") > 0 and "others" in gradients[-1]
    assert not any("identity" in line for line in equations)
    check_places(stages, {"ipo": "1 / (2 * beta)", "eq. 4": "# eq. 4",
                          "loss ": "self.loss.sft_weight"})


def test_checkpoint(world, base, tmp_path):
    """A trained checkpoint brings its data, its loss and the head that it started from."""
    heads, starts = {}, {"stage1": "identity", "stage2": str(tmp_path / "stage1")}
    for n, (name, start) in enumerate(starts.items()):
        heads[name] = objective_of(base, base.head, None, ("post_decoder",), Loss()).head
        shake(heads[name].post_interaction_block, n)
        flags = {"vg_path": world.vg, "desc_data_path": world.desc, "pope_data_path": world.pairs,
                 "init": start, "loss": "dpo", "beta": 0.2, "label_smoothing": 0.1,
                 "sft_weight": 0.5, "tune": ["post_decoder"]}
        info = {"base": world.base, "fingerprint": base.fingerprint,
                "block": asdict(heads[name].block_config), "arguments": flags}
        tensors = dict(heads[name].state_dict())
        save_trained(str(tmp_path / name), tensors, info, base.tokenizer)
    objective, _, examples = load(str(tmp_path / "stage2"))
    rows = preference_rows(world, base.trunk)
    rows.examples = examples
    # The reference is stage 1's head, and what is trained has moved away from it.
    twin = Objective(base.trunk, heads["stage1"], Loss("dpo", 0.2, 0.5, 0.1))
    twin.head = heads["stage2"].requires_grad_(True)
    expected, metrics = twin(rows[[2]])
    loss = explained(objective, rows, 2)[6]
    said = numbers(loss, "loss ", "margin", "NLL")
    expected = [expected.item(), metrics["rewards/margin"], metrics["nll"]]
    assert largest_difference("loss, margin, NLL", said, expected) < 1e-4
    assert abs(said[1]) > 1e-3
    assert "10 % of the labels" in "".join(loss) and "eq. 3" in "".join(loss)


# ---- How it is printed ---------------------------------------------------------------------------


def test_long_answers_are_abridged():
    row = Row([1] + [IMAGE_ID] * 9 + [5] * 90, list(range(40)) + 2 * list(range(40, 70)),
              [0] * 40 + [1] * 30 + [2] * 30, [39] * 60, [5] * 60, [1] * 30 + [2] * 30, [69, 99])
    shown = shown_tokens(row)
    assert len(shown) == 3 + 4 + 2 * 14 and shown == sorted(shown)
    assert {0, 1, 9, 39, 40, 69, 70, 99} <= set(shown)


def test_shades():
    assert shaded(torch.tensor([[0.0, 1.0], [2.0, 4.0]]), 2) == ["  ░░", "▒▒██"]
    assert shaded(torch.zeros(3, 3), 3) == [6 * " "] * 3


def test_command_line(world, tmp_path, monkeypatch):
    """In an empty folder it makes what it needs and leaves nothing. What is wrong is said with its
    cure.
    """
    monkeypatch.setenv("PYTHONPATH", ROOT)
    said = succeeds("python", "-m", "tools.explain", cwd=tmp_path, fresh=True)
    assert "a random model" in said.splitlines()[0] and "= ln 2" in said
    assert os.listdir(tmp_path) == []
    (tmp_path / "adapter_config.json").write_text("{}")
    mistakes = ((["nowhere"], "nowhere: no such folder"),
                ([world.base, "--pair", "999"], "--pair 999: the data hold .* pairs"),
                ([str(tmp_path)], "neither a base nor a checkpoint of train.py"))
    for flags, message in mistakes:
        monkeypatch.setattr("sys.argv", ["explain", *flags])
        with pytest.raises(InputError, match=message):
            main()


def test_at_a_terminal_of_80_columns(tmp_path):
    """Nothing is wider, no number of the wide form is missing, and no line breaks."""
    wide, narrow = (succeeds("python", "-m", "tools.explain", cwd=tmp_path, COLUMNS=columns,
                             PYTHONPATH=ROOT) for columns in ("200", "80"))
    assert 100 < max(map(len, wide.splitlines())) <= 110
    assert max(map(len, narrow.splitlines())) <= 80
    assert {n for n in re.findall(r"-?\d+\.\d{4}", wide)} == {
        n for n in re.findall(r"-?\d+\.\d{4}", narrow)}
    assert PLACE.findall(wide) == PLACE.findall(narrow)
