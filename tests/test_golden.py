"""Number for number what the original code gave: a run of HA-DPO's and the notes' own programs.

The folder holds inputs and results: a tiny random LLaVA with the real LLaMA tokenizer, HA-DPO's
files and `golden.pt`. It is ../shared/golden or what the environment variable GOLDEN names. Sizes,
layers and seeds are read from it. Without it these tests are skipped.
"""
import os
import random

import pytest
import torch
from conftest import largest_difference
from programs import ROOT

from checkpoints.layouts import read_seed_file
from checkpoints.load import attach_weights, load_base, load_trained, load_weights
from checkpoints.quantised import in_bits
from data import (
    BOS,
    EOS,
    IMAGE,
    IMAGE_ID,
    PackedDataset,
    collate,
    encode_conversation,
    pack,
    read_hadpo,
)
from dpo import Loss, answer_lengths, preference_loss, sequence_logps, token_logps
from llama import branch_mask
from model import answer_states, generate
from post_decoder import VARIANTS, PostInteractionBlock
from support.templates import SYSTEM_HADPO_EVAL, Template

GOLDEN = os.environ.get("GOLDEN", os.path.join(ROOT, "..", "shared", "golden"))
GOLDEN = os.path.abspath(GOLDEN)
pytestmark = pytest.mark.skipif(
    not os.path.isfile(os.path.join(GOLDEN, "golden.pt")),
    reason=f"no golden.pt in {GOLDEN}; the environment variable GOLDEN names its folder")
# The other variants are called alike.
OUR_NAME = {"align_after_align_no_ca": "no_cross_attn_v2", "self_attn_causal": "self_attn"}
BETA = 0.1


@pytest.fixture(scope="module")
def golden():
    # Our own file: lists and dicts of tensors.
    return torch.load(os.path.join(GOLDEN, "golden.pt"), weights_only=False)


@pytest.fixture(scope="module")
def llava():
    tower = os.path.join(GOLDEN, "clip-vit-tiny")
    return load_base(os.path.join(GOLDEN, "llava-tiny"), vision_tower=tower)


@pytest.fixture(scope="module")
def examples():
    names = ("desc_data.json", "pope_data.json", "VG")
    return read_hadpo(*(os.path.join(GOLDEN, name) for name in names))


def trained_head(llava, name):
    """A head from the notes' files, in the original's form: with the outer residual."""
    head = load_trained(os.path.join(GOLDEN, name), llava)
    assert head.block_config == llava.config.block_config(outer_residual=True, zero_init=False)
    return head


@pytest.fixture(scope="module")
def pairs(llava, examples):
    """One pass over all pairs: policy head, log-probs (pairs, 2) of policy and of reference."""
    dataset = PackedDataset(examples, llava.row_format())
    batch = dataset[range(len(dataset))]
    hidden_states, features = llava.trunk(batch)
    policy = trained_head(llava, "non_lora_trainables.bin").requires_grad_(True)
    reference = trained_head(llava, "reference_trainables.bin")
    logps = []
    for head in (policy, reference):
        logits = head(*answer_states(head, hidden_states, features, batch))
        of_tokens = token_logps(logits, batch.target.clamp(min=0))
        logps.append(sequence_logps(of_tokens, batch.target_branch))
    return policy, *logps


def test_tokenizer(golden, llava):
    """The original's tokenizer turns `</s>` and `<s>` in a text into control tokens. Ours does not:
    whoever can write into an answer could end it there, or a question about HTML would begin a new
    sequence. All other texts are equal.
    """
    tokenizer = llava.tokenizer
    for text, expected in golden["tok"]:
        ids = [BOS]
        for n, chunk in enumerate(text.split(IMAGE)):
            ids += ([IMAGE_ID] if n else []) + tokenizer.encode(chunk)
        if any(mark in text for mark in ("<s>", "</s>", "<unk>")):
            assert not {BOS, EOS} & set(ids[1:])
            assert tokenizer.decode([i for i in ids if i != IMAGE_ID]) == text.replace(IMAGE, "")
        else:
            assert ids == list(expected), text


def test_tokenizer_against_transformers(golden, llava):
    """Four hundred texts. Where spaces stand in a run, transformers 5 splits them otherwise than
    LLaMA's own SentencePiece model, which the original used (golden's "and  spaces" shows it): such
    texts must at least come back as they were.
    """
    from transformers import LlamaTokenizer
    theirs = LlamaTokenizer.from_pretrained(os.path.join(GOLDEN, "llava-tiny"))
    ours, rng = llava.tokenizer, random.Random(0)
    parts = ["Hello", "world", " ", "  ", "\n", "\n\n", "\t", "漢字", "中文。", "🙂", "👩‍👩‍👧", "é",
             "Ünïcödé", "3.14", "1234567", ",", "...", "don't", "`code`", "<b>", "$x^2$",
             "ASSISTANT:", "Ω", "हिन्दी", "עברית", "ﬁ", "\u00a0", "A" * 50, "The quick brown fox"]
    compared = 0
    for text in ("".join(rng.choices(parts, k=rng.randint(1, 12))) for _ in range(400)):
        ids = ours.encode(text)
        assert ours.decode(ids) == text
        if "  " not in f" {text} ":
            assert ids == theirs(text, add_special_tokens=False)["input_ids"], text
            compared += 1
    print(f"{compared} of 400 texts compared, the others have runs of spaces")
    assert compared > 150
    runs = [(text, list(ids)) for text, ids in golden["tok"] if "  " in text]
    assert all([BOS] + ours.encode(text) == ids for text, ids in runs)


def test_multi_turn_labels(golden, llava):
    for row in golden["convs"]:
        texts = [turn["value"] for turn in row["conv"]]
        texts = [f"{IMAGE}\n{text.replace(IMAGE, '').strip()}" if IMAGE in text else text
                 for text in texts]
        turns = list(zip(texts[::2], texts[1::2], strict=True))
        ids, labels = encode_conversation(llava.tokenizer, turns)
        assert ids == row["input_ids"].tolist() and labels == row["labels"].tolist()


def test_order_tokens_labels_pixels(golden, llava, examples):
    worst = 0
    for example, said, item in zip(examples, golden["list"], golden["items"], strict=True):
        assert os.path.relpath(example.image, GOLDEN) == os.path.normpath(said["image"])
        for kind, turns in zip(("chosen", "reject"), example.conversations, strict=True):
            assert turns == [tuple(turn["value"] for turn in said[f"{kind}_conversations"])]
            ids, labels = encode_conversation(llava.tokenizer, turns)
            assert ids == item[f"{kind}_input_ids"].tolist()
            assert labels == item[f"{kind}_labels"].tolist()
        pixels = llava.preprocess(example.image).half()                   # they were kept in fp16
        name = os.path.basename(example.image)
        worst = max(worst, largest_difference(name, pixels, item["images"]))
    assert worst == 0


def test_logps(golden, pairs):
    for name, logps in zip(("policy", "ref"), pairs[1:], strict=True):
        for n, kind in enumerate(("chosen", "rejected")):
            expected = golden[f"{name}_{kind}"]
            assert largest_difference(f"{name} {kind}", logps[:, n], expected) < 1e-4


@pytest.mark.parametrize("bits, usual, most", [(8, 0.01, 0.03), (4, 0.25, 0.7)])
def test_logps_in_few_bits(golden, examples, bits, usual, most):
    """Nats per answer token from the original's: root mean square over the pairs, and the worst."""
    tower = os.path.join(GOLDEN, "clip-vit-tiny")
    llava = load_base(os.path.join(GOLDEN, "llava-tiny"), vision_tower=tower, read_trunk=False)
    load_weights(in_bits(llava, bits).trunk)
    dataset = PackedDataset(examples, llava.row_format())
    batch = dataset[range(len(dataset))]
    head = trained_head(llava, "non_lora_trainables.bin")
    logits = head(*answer_states(head, *llava.trunk(batch), batch))
    of_tokens = token_logps(logits, batch.target.clamp(min=0))
    tokens = answer_lengths(batch.target_branch)
    expected = torch.stack([golden[f"policy_{kind}"] for kind in ("chosen", "rejected")], 1)
    apart = (sequence_logps(of_tokens, batch.target_branch) - expected) / tokens
    print(f"{bits} bits: {apart.square().mean().sqrt():.4f}, at most {apart.abs().max():.4f}")
    assert usual / 10 < apart.square().mean().sqrt() < usual and apart.abs().max() < most


def test_losses_rewards_gradients(golden, pairs):
    head, policy, reference = pairs
    losses, rewards = preference_loss(policy, reference, Loss("dpo", BETA))
    chosen, rejected = rewards.unbind(1)
    assert largest_difference("losses", losses, golden["losses"]) < 1e-4
    assert largest_difference("chosen rewards", chosen, golden["chosen_rewards"]) < 1e-4
    assert largest_difference("rejected rewards", rejected, golden["rejected_rewards"]) < 1e-4

    losses.mean().backward(retain_graph=True)
    gradients = {name: p.grad for name, p in head.named_parameters()}
    lm_head = gradients.pop("lm_head.weight")
    assert gradients.keys() == golden["grads"].keys()
    relative = {name: ((gradients[name] - g).norm() / g.norm()).item()
                for name, g in golden["grads"].items()}
    rows, expected = golden["lm_head_grad_rows"]
    relative["lm_head rows"] = ((lm_head[rows] - expected).norm() / expected.norm()).item()
    relative["lm_head norm"] = (lm_head.norm() / golden["lm_head_grad_norm"] - 1).abs().item()
    worst = max(relative, key=relative.get)
    print(f"gradients of {len(relative)} tensors: largest relative difference "
          f"{relative[worst]:.2e} ({worst})")
    assert relative[worst] < 1e-4
    assert all(g.norm() > 0 for g in golden["grads"].values())


def test_prompts_and_answers(golden, llava):
    """Logits of the whole prompt, then greedy tokens and their text, decoded with the cache."""
    trunk, f = llava.trunk, llava.row_format()
    head = trained_head(llava, "non_lora_trainables.bin")
    for case in golden["gen"]:
        turns = [(f"{IMAGE}\n{case['question']}", None)]
        ids, labels = encode_conversation(llava.tokenizer, turns, Template(SYSTEM_HADPO_EVAL))
        assert ids == case["input_ids"].tolist()
        image = os.path.join(GOLDEN, case["image"])
        row = pack([(ids, labels)], f.num_patches, f.max_length, image)
        batch = collate([row], llava.preprocess)
        hidden_states, features = trunk(batch)
        every = torch.arange(batch.ends.max() + 1)[None]
        logits = head(*answer_states(head, hidden_states, features, batch, every))[0]
        last = case["last_logits"]
        assert largest_difference("last logits", logits[-len(last):], last) < 1e-4
        # Sums over a whole vocabulary gather the rounding of all its logits: 1e-4 of their size,
        # not of 1.
        sums, size = case["logit_sums"], case["logit_sums"].abs().max()
        relative = logits.double().sum(-1) / size
        assert largest_difference("logit sums, relative", relative, sums / size) < 1e-4
        (answers, _), = generate(trunk, [head], batch, len(case["generated"]))
        expected = case["generated"].tolist()
        assert answers[0][0] == (expected[:expected.index(EOS)] if EOS in expected else expected)
        assert llava.tokenizer.decode(answers[0][0]) == case["text"]


def test_variants(golden, llava, tmp_path):
    """Every ablation of the notes, found out from keys and shapes alone, as `load_trained` does."""
    prefix = "post_interaction_block."
    for name, case in golden["variants"].items():
        h, F, path = case["hidden_states"], case["image_features"], str(tmp_path / f"{name}.bin")
        torch.save({prefix + key: tensor for key, tensor in case["state_dict"].items()}, path)
        config, tensors = read_seed_file(path, llava.config)
        variant = VARIANTS[OUR_NAME.get(name, name)]
        assert config == llava.config.block_config(**variant, outer_residual=True, zero_init=False)
        with torch.device("meta"):
            block = PostInteractionBlock(config)
        tensors = {key.removeprefix(prefix): lazy for key, lazy in tensors.items()}
        attach_weights(block, tensors, path)
        load_weights(block)
        position = torch.arange(h.shape[1]).expand(len(h), -1)
        mask = branch_mask(position, 0 * position, position, 0 * position)
        out = block(h, *((h, mask) if config.attention == "self" else (F,)))
        assert largest_difference(name, out, case["output"]) < 1e-5
