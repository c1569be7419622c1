"""Number for number what the original code gave: inputs and results of a run of HA-DPO's and the notes' own programs.

The folder (a tiny random LLaVA with the real LLaMA tokenizer, HA-DPO's files, `golden.pt`) is ../shared/golden or what the
environment variable GOLDEN names. Sizes, layers and seeds are read from it. Without it this chapter is skipped.
"""
import os
import random

import pytest
import torch
from conftest import ROOT, largest_difference

from checkpoint import fill, fit, load_base, load_trained
from data import BOS, EOS, IMAGE, IMAGE_ID, SYSTEM_HADPO_EVAL, PackedDataset, collate, encode_conversation, pack
from dpo import dpo_loss, sequence_logps, token_logps
from layouts import read_seed_file
from llama import branch_mask
from model import Head, answer_states, generate
from post_decoder import VARIANTS, PostInteractionBlock
from readers import read_hadpo

GOLDEN = os.path.abspath(os.environ.get("GOLDEN", os.path.join(ROOT, "..", "shared", "golden")))
pytestmark = pytest.mark.skipif(not os.path.isfile(os.path.join(GOLDEN, "golden.pt")),
                                reason=f"no golden.pt in {GOLDEN}; the environment variable GOLDEN names its folder")
OUR_NAME = {"align_after_align_no_ca": "no_cross_attn_v2", "self_attn_causal": "self_attn"}      # the others are called alike
BETA = 0.1


@pytest.fixture(scope="module")
def golden():
    return torch.load(os.path.join(GOLDEN, "golden.pt"), weights_only=False)         # our own file: lists and dicts of tensors


@pytest.fixture(scope="module")
def llava():
    """trunk, head, tokenizer, preprocess"""
    return load_base(os.path.join(GOLDEN, "llava-tiny"), vision_tower=os.path.join(GOLDEN, "clip-vit-tiny"))


@pytest.fixture(scope="module")
def examples():
    return read_hadpo(*(os.path.join(GOLDEN, name) for name in ("desc_data.json", "pope_data.json", "VG")))


def trained_head(trunk, name):
    """A head from the notes' files, in the original's form: with the outer residual."""
    head = load_trained(os.path.join(GOLDEN, name), trunk.config, Head(trunk.config), None)
    assert head.block == trunk.config.block(outer_residual=True, zero_init=False)
    return head


@pytest.fixture(scope="module")
def pairs(llava, examples):
    """One pass over all pairs: policy head, batch, and the log-probs (pairs, 2) of policy and reference."""
    trunk, _, tokenizer, preprocess = llava
    dataset = PackedDataset(examples, tokenizer, preprocess, trunk.config.vision.num_patches, trunk.config.max_length)
    batch = dataset[range(len(dataset))]
    hidden, features = trunk(batch)
    policy, reference = trained_head(trunk, "non_lora_trainables.bin").requires_grad_(True), trained_head(trunk, "reference_trainables.bin")
    logps = [sequence_logps(token_logps(head(*answer_states(head, hidden, features, batch)), batch.target.clamp(min=0)), batch.target_branch)
             for head in (policy, reference)]
    return policy, *logps


def test_tokenizer(golden, llava):
    """The original's tokenizer turns `</s>` and `<s>` in a text into control tokens. Ours does not: whoever can write into
    an answer could end it there, or a question about HTML would begin a new sequence. All other texts are equal."""
    tokenizer = llava[2]
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
    """Four hundred texts. Where spaces stand in a run, transformers 5 splits them otherwise than LLaMA's own SentencePiece
    model, which the original used (golden's "and  spaces" shows it): such texts must at least come back as they were."""
    from transformers import LlamaTokenizer
    ours, theirs, rng = llava[2], LlamaTokenizer.from_pretrained(os.path.join(GOLDEN, "llava-tiny")), random.Random(0)
    parts = ["Hello", "world", " ", "  ", "\n", "\n\n", "\t", "漢字", "中文。", "🙂", "👩‍👩‍👧", "é", "Ünïcödé", "3.14", "1234567", ",", "...",
             "don't", "`code`", "<b>", "$x^2$", "ASSISTANT:", "Ω", "हिन्दी", "עברית", "ﬁ", "\u00a0", "A" * 50, "The quick brown fox"]
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
        texts = [f"{IMAGE}\n{text.replace(IMAGE, '').strip()}" if IMAGE in text else text for text in texts]
        ids, labels = encode_conversation(llava[2], list(zip(texts[::2], texts[1::2])))
        assert ids == row["input_ids"].tolist() and labels == row["labels"].tolist()


def test_order_tokens_labels_pixels(golden, llava, examples):
    _, _, tokenizer, preprocess = llava
    worst = 0
    for example, said, item in zip(examples, golden["list"], golden["items"], strict=True):
        assert os.path.relpath(example.image, GOLDEN) == os.path.normpath(said["image"])
        for kind, conversation in zip(("chosen", "reject"), example.conversations, strict=True):
            assert conversation == [tuple(turn["value"] for turn in said[f"{kind}_conversations"])]
            ids, labels = encode_conversation(tokenizer, conversation)
            assert ids == item[f"{kind}_input_ids"].tolist() and labels == item[f"{kind}_labels"].tolist()
        worst = max(worst, largest_difference(os.path.basename(example.image), preprocess(example.image).half(), item["images"]))
    assert worst == 0                                                            # they were kept in fp16


def test_logps(golden, pairs):
    for name, logps in zip(("policy", "ref"), pairs[1:]):
        for n, kind in enumerate(("chosen", "rejected")):
            assert largest_difference(f"{name} {kind}", logps[:, n], golden[f"{name}_{kind}"]) < 1e-4


def test_losses_rewards_gradients(golden, pairs):
    head, policy, reference = pairs
    losses, chosen, rejected = dpo_loss(*policy.unbind(1), *reference.unbind(1), BETA)
    assert largest_difference("losses", losses, golden["losses"]) < 1e-4
    assert largest_difference("chosen rewards", chosen, golden["chosen_rewards"]) < 1e-4
    assert largest_difference("rejected rewards", rejected, golden["rejected_rewards"]) < 1e-4

    losses.mean().backward(retain_graph=True)
    gradients = {name: p.grad for name, p in head.named_parameters()}
    lm_head = gradients.pop("lm_head.weight")
    assert gradients.keys() == golden["grads"].keys()
    relative = {name: ((gradients[name] - g).norm() / g.norm()).item() for name, g in golden["grads"].items()}
    rows, expected = golden["lm_head_grad_rows"]
    relative["lm_head rows"] = ((lm_head[rows] - expected).norm() / expected.norm()).item()
    relative["lm_head norm"] = (lm_head.norm() / golden["lm_head_grad_norm"] - 1).abs().item()
    worst = max(relative, key=relative.get)
    print(f"gradients of {len(relative)} tensors: largest relative difference {relative[worst]:.2e} ({worst})")
    assert relative[worst] < 1e-4 and all(g.norm() > 0 for g in golden["grads"].values())


def test_prompts_and_answers(golden, llava):
    """Logits of the whole prompt, then greedy tokens and their text, decoded with the cache."""
    trunk, _, tokenizer, preprocess = llava
    head = trained_head(trunk, "non_lora_trainables.bin")
    for case in golden["gen"]:
        ids, labels = encode_conversation(tokenizer, [(f"{IMAGE}\n{case['question']}", None)], SYSTEM_HADPO_EVAL)
        assert ids == case["input_ids"].tolist()
        batch = collate([pack([(ids, labels)], trunk.config.vision.num_patches, trunk.config.max_length, os.path.join(GOLDEN, case["image"]))], preprocess)
        hidden, features = trunk(batch)
        logits = head(*answer_states(head, hidden, features, batch, torch.arange(batch.ends.max() + 1)[None]))[0]
        assert largest_difference("last logits", logits[-len(case["last_logits"]):], case["last_logits"]) < 1e-4
        # Sums over a whole vocabulary gather the rounding of all its logits: 1e-4 of their size, not of 1.
        sums = case["logit_sums"]
        assert largest_difference("logit sums, relative", logits.double().sum(-1) / sums.abs().max(), sums / sums.abs().max()) < 1e-4
        (answers, _), = generate(trunk, [head], batch, len(case["generated"]))
        expected = case["generated"].tolist()
        assert answers[0][0] == (expected[:expected.index(EOS)] if EOS in expected else expected)
        assert tokenizer.decode(answers[0][0]) == case["text"]


def test_variants(golden, llava, tmp_path):
    """Every ablation of the notes, found out from keys and shapes alone as a `non_lora_trainables.bin` would be."""
    for name, case in golden["variants"].items():
        h, F, path = case["hidden_states"], case["image_features"], str(tmp_path / f"{name}.bin")
        torch.save({f"post_interaction_block.{key}": t for key, t in case["state_dict"].items()}, path)
        config, tensors = read_seed_file(path, llava[0].config)
        expected = llava[0].config.block(**VARIANTS[OUR_NAME.get(name, name)], outer_residual=True, zero_init=False)
        with torch.device("meta"):
            block = PostInteractionBlock(config)
        fit(block, {key.removeprefix("post_interaction_block."): stored for key, stored in tensors.items()}, path)
        fill(block)
        position = torch.arange(h.shape[1]).expand(len(h), -1)
        mask = branch_mask(position, 0 * position, position, 0 * position)
        out = block(h, *((h, mask) if config.attention == "self" else (F,)))
        assert config == expected
        assert largest_difference(name, out, case["output"]) < 1e-5
