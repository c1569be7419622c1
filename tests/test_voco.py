"""VoCo-LLaMA's rows: <voco> tokens compress the image, and the text behind them sees only them.

`dense` below is the plain case: one sequence, a mask written out token by token as the paper says
it, and LLaMA's layers one after the other, without any packing code, cache or padding.
"""
import pytest
import torch
from conftest import as_llava, largest_difference, load_json, row_format, small_llava

from data import (
    BOS,
    EOS,
    IGNORE,
    IMAGE,
    IMAGE_ID,
    VOCO_ID,
    Batch,
    Example,
    PackedDataset,
    Row,
    Tokenizer,
    collate,
    encode_compressed,
    encode_conversation,
    pack,
    prefix_branches,
)
from evals.sampling import Conversation, Sampling
from llama import KVCache, branch_mask, rotary_embedding
from model import answer_states, generate

PATCHES, VOCAB = 9, 48
COUNTS = (1, 2, 4)


def pixels(image):
    return torch.randn(3, 24, 24, generator=torch.Generator().manual_seed(ord(image[0])))


def dense_mask(ids):
    """(T, T) of one expanded sequence, True = may attend (arXiv 2406.12275)."""
    T, voco = len(ids), [t for t, i in enumerate(ids) if i == VOCO_ID]
    mask = torch.zeros(T, T, dtype=torch.bool)
    for i in range(T):
        for j in range(i + 1):
            mask[i, j] = not voco or i <= voco[-1] or j >= voco[0]
    return mask


def expanded(ids):
    return [j for i in ids for j in ([i] * PATCHES if i == IMAGE_ID else [i])]


def dense(trunk, head, ids, image):
    """Logits behind every token of one sequence, (T, vocab)."""
    ids = expanded(ids)
    llama, T = trunk.model, len(ids)
    vectors, patches = llama.embed_tokens.weight, iter(())
    if image:
        patches = iter(llama.mm_projector(trunk.vision_tower(pixels(image)[None]))[0])
    x = torch.stack([next(patches) if i == IMAGE_ID else vectors[-1 if i == VOCO_ID else i]
                     for i in ids])[None]
    bias = torch.zeros(1, 1, T, T).masked_fill(~dense_mask(ids), float("-inf"))
    rotary = rotary_embedding(torch.arange(T)[None], llama.config.head_dim, llama.config.rope_theta,
                              torch.float32)
    for layer in llama.layers:
        x = layer(x, rotary, bias, 0, None, 0)
    return head(llama.norm(x))[0]


def greedy(trunk, head, ids, image, max_new_tokens):
    answer = []
    while len(answer) < max_new_tokens:
        token = int(dense(trunk, head, ids + answer, image)[-1].argmax())
        if token == EOS:
            break
        answer.append(token)
    return answer


def sequences(count, open_ended):
    """[(image, [(ids, labels), ...]), ...]: rows of several lengths and numbers of branches, one
    of them without an image.
    """
    generator, rows = torch.Generator().manual_seed(count), []

    def words(n):
        return torch.randint(3, VOCAB - 1, (n,), generator=generator).tolist()

    for length, branches, image in ((6, 1, "a"), (2, 4, "b"), (9, 2, None), (4, 3, "a")):
        prefix = [BOS, *([IMAGE_ID, 5, *[VOCO_ID] * count] if image else []), *words(length)]
        row = []
        for number in range(branches):
            question, answer = [3 + number, *words(number)], words(2 + number) + [EOS]
            answer = [] if open_ended else answer
            unsupervised = [IGNORE] * len(prefix + question)
            row.append((prefix + question + answer, unsupervised + answer))
        rows.append((image, row))
    return rows


def packed(rows):
    return collate([pack(row, PATCHES, 256, image) for image, row in rows], pixels)


@pytest.mark.parametrize("count", COUNTS)
def test_the_mask_is_the_papers(count):
    (_, (sequence,)), *_ = sequences(count, True)
    row = pack([sequence], PATCHES, 256, "a")
    position, branch = torch.tensor([row.position]), torch.tensor([row.branch])
    mask = branch_mask(position, branch, position, branch)[0, 0]
    assert torch.equal(mask, dense_mask(row.input_ids))
    first = row.input_ids.index(VOCO_ID)
    assert mask[-1, :first].sum() == 0 and mask[-1, first:].all()       # text
    assert mask[first + count - 1, :first + count].all()                # <voco>
    # Without <voco> tokens the same row is plainly causal.
    plain = torch.zeros_like(branch)
    causal = branch_mask(position, plain, position, plain)[0, 0]
    assert torch.equal(causal, torch.ones_like(mask).tril())


@pytest.mark.parametrize("kv_heads", (4, 2))
@pytest.mark.parametrize("count", COUNTS)
def test_packed_and_padded_rows_are_the_dense_case(count, kv_heads):
    trunk, head = small_llava(4, kv_heads, num_voco=count)
    rows = sequences(count, False)
    batch = packed(rows)
    assert (batch.branch == -1).any()
    hidden_states, features = trunk(batch)
    logits = head(*answer_states(head, hidden_states, features, batch))             # (B, A, vocab)
    worst = 0
    for b, (image, row) in enumerate(rows):
        for n, (ids, labels) in enumerate(row, 1):
            answer = [label for label in labels if label != IGNORE]
            assert batch.target[b, batch.target_branch[b] == n].tolist() == answer
            expected = dense(trunk, head, ids, image)[-len(answer) - 1:-1]
            worst = max(worst, (logits[b, batch.target_branch[b] == n] - expected).abs().max())
    print(f"{count} tokens, {kv_heads} of 4 key heads: {worst:.1e}")
    assert worst < 1e-4


def test_the_image_counts_only_through_the_tokens():
    """Text sees another image only where <voco> tokens have looked at it."""
    trunk, head = small_llava(num_voco=2)
    (_, row), *_ = sequences(2, False)
    ids, _ = row[0]
    said = [dense(trunk, head, ids, image) for image in "ab"]
    assert (said[0][-1] - said[1][-1]).abs().max() > 1e-3
    batches = [packed([(image, [(ids, [IGNORE] * len(ids))])]) for image in "ab"]
    for batch in batches:                       # the tokens look away
        batch.branch[batch.input_ids == VOCO_ID] = 0
    states = [trunk(batch)[0][0, len(expanded(ids)) - 1] for batch in batches]
    assert torch.equal(*states)


@pytest.mark.parametrize("kv_heads", (4, 1))
@pytest.mark.parametrize("count", COUNTS)
def test_cached_decoding_is_decoding_without_a_cache(count, kv_heads):
    """24 new tokens: the cache grows on the way. The original's mask broke on single tokens."""
    trunk, head = small_llava(4, kv_heads, num_voco=count)
    rows = sequences(count, True)
    (tokens, _), = generate(trunk, [head], packed(rows), 24)
    expected = [[greedy(trunk, head, ids, image, 24) for ids, _ in row] for image, row in rows]
    assert tokens == expected and max(len(a) for row in expected for a in row) > 5


def test_token_by_token():
    trunk, _ = small_llava(4, 2, num_voco=2)
    batch = packed(sequences(2, False))
    embeds, _ = trunk.embed(batch)
    expected = trunk.model(embeds, batch.position, batch.branch)
    cache = KVCache(trunk.config.text, len(embeds), 3, "cpu", torch.float32)
    steps = [trunk.model(embeds[:, [t]], batch.position[:, [t]], batch.branch[:, [t]], cache)
             for t in range(embeds.shape[1])]
    real = batch.branch != -1
    assert largest_difference("token by token", torch.cat(steps, 1)[real], expected[real]) < 1e-4


@pytest.mark.parametrize("count", COUNTS)
def test_kept_tokens_stand_for_the_image(count):
    """One pass over image and questions, and two: the keys and values of the <voco> tokens are
    enough, and a question never needs the image again.
    """
    trunk, head = small_llava(4, 2, num_voco=count)
    rows = [row for row in sequences(count, True) if row[0]]
    whole = packed(rows)
    (expected, expected_logits), = generate(trunk, [head], whole, 12)
    cache = KVCache(trunk.config.text, *whole.input_ids.shape, "cpu", torch.float32)
    trunk(whole, cache)
    begin, = set((whole.input_ids == VOCO_ID).int().argmax(1).tolist())
    voco, behind = slice(begin, begin + count), slice(begin + count, None)
    kept = torch.stack((cache.keys[:, :, :, voco], cache.values[:, :, :, voco])).movedim(2, 0)
    ends = torch.where(whole.ends < 0, -1, whole.ends - behind.start)
    text = Batch(input_ids=whole.input_ids[:, behind], position=whole.position[:, behind],
                 branch=whole.branch[:, behind], ends=ends, compressed=kept,
                 image_index=torch.full_like(whole.image_index, -1))
    for tokens, logits in generate(trunk, [head, head], text, 12):
        assert tokens == expected
        real = whole.ends >= 0
        assert largest_difference("two passes", logits[real], expected_logits[real]) < 1e-5
    text.compressed = kept.roll(1, 0)                           # another image's
    (_, other), = generate(trunk, [head], text, 12)
    assert (other[real] - expected_logits[real]).abs().max() > 1e-3


# ---- Rows of a data set --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizer(world):
    return Tokenizer(world.tokenizer)


def rows_of(tokenizer, count, *conversations, image="a.jpg", **changes):
    config = small_llava(vocab_size=len(tokenizer) + 1, num_voco=count)[0].config
    example = Example(image, list(conversations), **changes)
    return PackedDataset([example], row_format(config, tokenizer, num_voco=count)).row(0)


def test_a_row_is_bos_image_tokens_conversation(tokenizer):
    turns = [(f"{IMAGE}\nIs there a dog in the image?", "Yes."), ("And a cat?", "No.")]
    row, newline = rows_of(tokenizer, 2, turns), tokenizer.encode("\n")
    plain = [(turns[0][0].removeprefix(f"{IMAGE}\n"), "Yes."), turns[1]]
    ids, labels = encode_conversation(tokenizer, plain, has_image=False)
    front = [BOS, *[IMAGE_ID] * PATCHES, *newline, VOCO_ID, VOCO_ID, *newline]
    assert row.input_ids == front + ids[1:]
    assert row.target == [label for label in labels if label != IGNORE]
    assert row.position == list(range(len(row.input_ids)))
    hidden = 1 + PATCHES + len(newline)
    assert row.branch[:hidden + 3] == [-2] * hidden + [-3, -3, 0]
    assert set(row.branch) == {-2, -3, 0, 1}


def test_a_pair_shares_the_tokens(tokenizer):
    """DPO's rows, and a conversation of which some is given."""
    pair = [[(f"{IMAGE}\nWhat is there?", answer)] for answer in ("A dog.", "A cat and a kite.")]
    row = rows_of(tokenizer, 4, *pair)
    assert row.input_ids.count(VOCO_ID) == 4 and set(row.branch) == {-2, -3, 0, 1, 2}
    given = rows_of(tokenizer, 4, [pair[0][0], ("And?", "A kite.")], given=1)
    assert given.target == tokenizer.encode("A kite.") + [EOS]


def test_a_row_without_an_image_is_a_plain_row(tokenizer):
    turns = [("Who are you?", "A dog.")]
    rows = [rows_of(tokenizer, count, turns, image=None) for count in (0, 3)]
    assert vars(rows[0]) == vars(rows[1]) and VOCO_ID not in rows[0].input_ids


def test_text_never_turns_into_the_token(tokenizer):
    row = rows_of(tokenizer, 1, [(f"{IMAGE}\nIs there a <voco>?", "No <voco>.")])
    assert row.input_ids.count(VOCO_ID) == 1


def test_a_chat_is_the_same_row(world, tokenizer):
    """A conversation of two turns, decoded token by token with its cache, says what whole rows
    say.
    """
    trunk, head = small_llava(4, 2, vocab_size=len(tokenizer) + 1, num_voco=2)
    model = as_llava(trunk, head, tokenizer=tokenizer,
                     preprocess=row_format(trunk.config, tokenizer).preprocess)
    image = f"{world.images}/{load_json(world.llava)[0]['image']}"
    conversation, first = Conversation(model, head, image), "Is there a dog in the image?"
    said = list(conversation.answer(first, Sampling(max_new_tokens=6)))
    dataset = PackedDataset([Example(image, [[(f"{IMAGE}\n{first}", None)]])], model.row_format())
    (tokens, _), = generate(trunk, [head], dataset[[0]], 6)
    assert tokens == [[said]]

    # The second turn, greedy without a cache: each token from a whole row.
    ids = [*conversation.ids, *conversation.turn("And a cat?")]
    said = list(conversation.answer("And a cat?", Sampling(max_new_tokens=6)))
    expected = []
    while len(expected) < 6:
        row = Row(ids + expected, list(range(len(ids + expected))), prefix_branches(ids + expected),
                  [], [], [], [len(ids + expected) - 1], image)
        batch = collate([row], model.preprocess)
        token = int(head(trunk(batch)[0][:, batch.ends[0, 0]]).argmax())
        if token == EOS:
            break
        expected.append(token)
    assert said == expected and len(said) > 1 and conversation.ids.count(VOCO_ID) == 2


def test_beams_search_behind_the_tokens(world, tokenizer):
    """One beam is greedy decoding; two find an answer that is at least as likely."""
    trunk, head = small_llava(4, 2, vocab_size=len(tokenizer) + 1, num_voco=2)
    model = as_llava(trunk, head, tokenizer=tokenizer,
                     preprocess=row_format(trunk.config, tokenizer).preprocess)
    image = f"{world.images}/{load_json(world.llava)[0]['image']}"
    question = [(f"{IMAGE}\nIs there a dog in the image?", None)]
    ids, _ = encode_compressed(model.row_format(), question)
    likely = {}
    for beams in 1, 4:
        conversation = Conversation(model, head, image)
        said = list(conversation.answer("Is there a dog in the image?",
                                        Sampling(num_beams=beams, max_new_tokens=3)))
        assert len(said) == 3
        sequence = (ids + said, [IGNORE] * len(ids) + said)
        batch = collate([pack([sequence], PATCHES, 256, image)], model.preprocess)
        logits = head(*answer_states(head, *trunk(batch), batch))[0]
        likely[beams] = float(logits.log_softmax(-1)[range(3), said].sum())
    assert likely[4] >= likely[1] - 1e-5
