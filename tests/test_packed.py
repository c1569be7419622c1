"""What everything rests on: a branch of a packed row gives the numbers of running it alone.

`alone` below is the plain case, written without any of the packing code: one sequence, one causal
forward, no cache, no padding, no branches. Against it stand packed rows (a prefix and 1 to 8
branches, rows of different lengths padded together, images shared or absent) in training's form
(logits and log-probabilities of given answers) and in evaluation's (greedy answers with the cache).
"""
import random
from glob import glob

import pytest
import torch
from conftest import largest_difference, small_llava

import model
from checkpoints.load import load_base
from data import (
    BOS,
    EOS,
    IGNORE,
    IMAGE,
    IMAGE_ID,
    Batch,
    Example,
    PackedDataset,
    collate,
    pack,
)
from dpo import sequence_logps, token_logps
from llama import KVCache
from model import answer_states, generate
from support.common import InputError

VARIANTS = (None, "full", "self_attn", "no_cross_attn")
PATCHES, VOCAB = 9, 48
# Length of the prompt, number of branches, image.
ROWS = ((5, 1, "a.jpg"), (11, 3, "b.jpg"), (3, 8, "a.jpg"), (7, 2, None))


def pixels(image):
    """What stands in for opening an image: noise of its own for each name."""
    return torch.randn(3, 24, 24, generator=torch.Generator().manual_seed(ord(image[0])))


def make_sequences(open_ended, seed=0):
    """[(image, [(ids, labels), ...]), ...], one entry a row.

    Branches differ in question, in answer and in length.
    """
    rng, rows = random.Random(seed), []

    def words(n):
        return [rng.randrange(3, VOCAB) for _ in range(n)]

    for length, branches, image in ROWS:
        prompt = [BOS, *words(2), *([IMAGE_ID] if image else []), *words(length)]
        row = []
        for number in range(branches):
            question = words(number % 4) + [3 + number]      # of several lengths, no two alike
            answer = [] if open_ended else words(1 + rng.randrange(6)) + [EOS]
            unsupervised = [IGNORE] * len(prompt + question)
            row.append((prompt + question + answer, unsupervised + answer))
        rows.append((image, row))
    return rows


def packed(rows):
    """Rows of `make_sequences` as one Batch."""
    return collate([pack(sequences, PATCHES, 256, image) for image, sequences in rows], pixels)


def alone(trunk, head, ids, image):
    """Logits behind every token of one sequence, (T, vocab)."""
    ids = expanded(ids)
    T = len(ids)
    batch = Batch(input_ids=torch.tensor([ids]), position=torch.arange(T)[None],
                  branch=torch.zeros(1, T, dtype=torch.long),
                  image_index=torch.tensor([0 if image else -1]),
                  pixel_values=pixels(image)[None] if image else None)
    h, features = trunk(batch)
    if features is None:                                     # a row without an image sees zeros
        features = torch.zeros(1, PATCHES, trunk.config.vision.hidden_size)
    if head.block_config is not None and head.block_config.attention == "self":
        return head(h, h, torch.ones(T, T).tril().bool()[None, None])[0]
    return head(h, features)[0]


def expanded(ids):
    """Ids with the image's mark repeated once per patch."""
    return [j for i in ids for j in ([i] * PATCHES if i == IMAGE_ID else [i])]


def alone_greedy(trunk, head, ids, image, max_new_tokens):
    answer = []
    while len(answer) < max_new_tokens:
        token = int(alone(trunk, head, ids + answer, image)[-1].argmax())
        if token == EOS:
            break
        answer.append(token)
    return answer


@pytest.mark.parametrize("kv_heads", (4, 2))
@pytest.mark.parametrize("variant", VARIANTS)
def test_packed_logits_and_logps(variant, kv_heads):
    trunk, head = small_llava(4, kv_heads, variant)
    rows = make_sequences(open_ended=False)
    batch = packed(rows)
    # There is padding, of tokens and branches.
    assert (batch.branch == -1).any() and batch.ends.shape == (4, 8)
    hidden_states, features = trunk(batch)
    logits = head(*answer_states(head, hidden_states, features, batch))            # (B, A, vocab)
    logps = token_logps(logits, batch.target.clamp(min=0))
    sums = sequence_logps(logps, batch.target_branch, 8)                           # (B, 8)
    worst_logit = worst_logp = 0
    for b, (image, sequences) in enumerate(rows):
        for n, (ids, labels) in enumerate(sequences):
            answer = [label for label in labels if label != IGNORE]
            expected = alone(trunk, head, ids, image)[-len(answer) - 1:-1]         # (answer, vocab)
            mine = logits[b, batch.target_branch[b] == n + 1]
            assert batch.target[b, batch.target_branch[b] == n + 1].tolist() == answer
            assert mine.shape == expected.shape
            worst_logit = max(worst_logit, (mine - expected).abs().max().item())
            expected_sum = expected.log_softmax(-1)[range(len(answer)), answer].sum()
            worst_logp = max(worst_logp, (sums[b, n] - expected_sum).abs().item())
    print(f"block {variant}, {kv_heads} of 4 key heads: logits {worst_logit:.2e}, "
          f"log-probs {worst_logp:.2e}")
    assert worst_logit < 1e-4 and worst_logp < 1e-4


@pytest.mark.parametrize("kv_heads", (4, 1))
@pytest.mark.parametrize("variant", VARIANTS)
def test_greedy_answers(variant, kv_heads):
    """24 tokens are more than `generate` makes room for at first, so the cache also grows here."""
    trunk, head = small_llava(4, kv_heads, variant)
    rows = make_sequences(open_ended=True)
    batch = packed(rows)
    # Random weights seldom stop: make `</s>` likelier until some answers do, and others do not.
    for _ in range(6):
        expected = [[alone_greedy(trunk, head, ids, image, 24) for ids, _ in sequences]
                    for image, sequences in rows]
        lengths = {len(answer) for row in expected for answer in row}
        if min(lengths) < 24:
            break
        head.lm_head.weight[EOS] *= 1.3
    print(f"block {variant}: answers of {sorted(lengths)} tokens")
    # Else this test would not see what an early stop does to others.
    assert 24 in lengths and min(lengths) < 24
    (answers, first), = generate(trunk, [head], batch, 24)
    assert answers == expected
    theirs = torch.stack([alone(trunk, head, ids, image)[-1]
                          for image, sequences in rows for ids, _ in sequences])
    ours = torch.cat([first[b, :len(sequences)] for b, (_, sequences) in enumerate(rows)])
    assert largest_difference("logits of the first answer token", ours, theirs) < 1e-4


def test_several_heads_share_one_pass():
    """All decode from the same prompt pass, and none sees what another has written into the cache.
    """
    trunk, plain = small_llava()
    heads = [small_llava(variant=variant)[1] for variant in VARIANTS[1:]] + [plain]
    batch = packed(make_sequences(True))
    together = generate(trunk, heads, batch, 20)
    separate = [generate(trunk, [head], batch, 20)[0] for head in heads]
    assert [answers for answers, _ in together] == [answers for answers, _ in separate]
    assert len({str(answers) for answers, _ in together}) == len(heads)  # they say different things


@pytest.mark.parametrize("kv_heads", (4, 2, 1))
def test_token_by_token(kv_heads):
    """The single-token case: every token in a forward of its own against one forward of the row.

    Padding is included. The cache starts with room for three tokens and must grow; then its last
    third is forgotten by setting `length` back and read again, which must change nothing.
    """
    trunk, _ = small_llava(4, kv_heads)
    batch = packed(make_sequences(False))
    embeds, _ = trunk.embed(batch)
    (B, T), llama = batch.input_ids.shape, trunk.model
    real = batch.branch >= 0
    expected = llama(embeds, batch.position, batch.branch)
    cache = KVCache(trunk.config.text, B, 3, "cpu", torch.float32)

    def step(t):
        at = slice(t, t + 1)
        return llama(embeds[:, at], batch.position[:, at], batch.branch[:, at], cache)

    ours = torch.cat([step(t) for t in range(T)], 1)
    assert cache.length == T
    what = f"token by token, {kv_heads} of 4 key heads"
    assert largest_difference(what, ours[real], expected[real]) < 1e-4

    cache.length = start = 2 * T // 3
    something_else = torch.randn_like(embeds[:, start:])
    llama(something_else, batch.position[:, start:], batch.branch[:, start:], cache)
    cache.length = start
    again = torch.cat([step(t) for t in range(start, T)], 1)
    again, before = again[real[:, start:]], ours[:, start:][real[:, start:]]
    assert largest_difference("after setting length back", again, before) < 1e-6


def test_many_tokens_after_the_cache():
    """A forward of several tokens behind a filled cache is the same case again."""
    trunk, _ = small_llava(4, 2)
    batch = packed(make_sequences(False))
    embeds, _ = trunk.embed(batch)
    expected = trunk.model(embeds, batch.position, batch.branch)
    cache = KVCache(trunk.config.text, *batch.input_ids.shape, "cpu", torch.float32)
    parts = [trunk.model(embeds[:, part], batch.position[:, part], batch.branch[:, part], cache)
             for part in (slice(0, 13), slice(13, 14), slice(14, None))]
    ours, real = torch.cat(parts, 1), batch.branch >= 0
    assert largest_difference("in three parts", ours[real], expected[real]) < 1e-4


# ---- pack() --------------------------------------------------------------------------------------


def unpacked(row, number):
    """A branch with its prefix, read back out of a row: ids, positions."""
    at = [t for t, branch in enumerate(row.branch) if branch in (0, number)]
    return [row.input_ids[t] for t in at], [row.position[t] for t in at]


@pytest.mark.parametrize("seed", range(20))
def test_pack_loses_nothing(seed):
    """Any sequences with a common beginning, some with an answer in the middle: every one is found
    again, whole.
    """
    rng = random.Random(seed)

    def words(low, high):
        return [rng.randrange(3, 6) for _ in range(rng.randint(low, high))]    # few: much in common

    prompt, sequences = [BOS, IMAGE_ID, *words(0, 4)], []
    for _ in range(rng.randint(1, 5)):
        question, answer = words(0, 3), words(1, 4) + [EOS]
        second, third = words(1, 3), words(1, 2) + [EOS]
        labels = [IGNORE] * len(prompt + question) + answer + [IGNORE] * len(second) + third
        sequences.append((prompt + question + answer + second + third, labels))
    row = pack(sequences, PATCHES, 256, "a.jpg")
    prefix = row.branch.count(0)
    assert row.input_ids.count(IMAGE_ID) == PATCHES and row.cut == 0
    for number, (ids, labels) in enumerate(sequences, 1):
        whole, end = expanded(ids), row.ends[number - 1]
        labels = [IGNORE] * (len(whole) - len(labels)) + labels
        assert unpacked(row, number) == (whole, list(range(len(whole))))
        assert row.branch[end] == number and row.position[end] == len(whole) - 1
        supervised = [(t, label) for t, label in enumerate(labels) if label != IGNORE]
        assert prefix <= supervised[0][0]                       # an answer is nobody else's prefix
        # The targets are the labels, each predicted from the token in front of it, in the prefix or
        # in the own branch.
        targets = zip(row.source, row.target, row.target_branch, strict=True)
        mine = [(s, t) for s, t, branch in targets if branch == number]
        assert [(row.position[s] + 1, t) for s, t in mine] == supervised
        assert all(row.branch[s] in (0, number) for s, _ in mine)


def test_shared_prefix_is_as_long_as_possible():
    """Chosen and rejected begin alike: the prompt stands once, the words of the answers stand in
    their branches.
    """
    prompt, no = [BOS, IMAGE_ID, 7, 8, 9], [IGNORE] * 5
    sequences = [(prompt + answer, no + answer) for answer in ([11, 12, EOS], [11, 13, EOS])]
    row = pack(sequences, PATCHES, 256, "x.jpg")
    assert row.branch == [0] * (PATCHES + 4) + [1] * 3 + [2] * 3
    assert row.target == [11, 12, EOS, 11, 13, EOS]
    last = PATCHES + 3                                     # the prompt's last token predicts both
    assert row.source == [last, last + 1, last + 2, last, last + 4, last + 5]


def test_equal_open_prompts_keep_a_token_each():
    """The same question twice: each branch still needs a token of its own, to decode from."""
    row = pack([([BOS, 5, 6], [IGNORE] * 3)] * 2, PATCHES, 256)
    assert row.branch == [0, 0, 1, 2] and row.ends == [2, 3] and row.target == []


def test_prompts_are_never_cut():
    prompt = [BOS, IMAGE_ID, *range(3, 10)]                                            # 17 tokens
    sequences = [(prompt + answer, [IGNORE] * 9 + answer) for answer in ([11, 12, EOS], [20, EOS])]
    with pytest.raises(InputError, match="17 tokens does not fit into 17.*x.jpg"):
        pack(sequences, PATCHES, 17, "x.jpg")         # it would fit, but no word of an answer would
    row = pack(sequences, PATCHES, 18, "x.jpg")
    assert row.cut == 2 + 1 and row.target == [11, 20] and row.ends == [17, 18]
    assert pack(sequences, PATCHES, 19, "x.jpg").cut == 1
    whole = pack(sequences, PATCHES, 20, "x.jpg")
    assert whole.cut == 0 and whole.target == [11, 12, EOS, 20, EOS]
    with pytest.raises(InputError, match="never cut"):
        pack([(prompt, [IGNORE] * 9)], PATCHES, 16, "x.jpg")                        # an open prompt


def test_an_image_is_never_cut():
    """An image that comes in a later turn, behind an answer, and does not fit: half an image would
    move all others.
    """
    ids = [BOS, 5, 6, 11, EOS, IMAGE_ID, 7, 12, EOS]
    labels = [IGNORE] * 3 + [11, EOS] + [IGNORE] * 2 + [12, EOS]
    assert pack([(ids, labels)], PATCHES, 17, "x.jpg").input_ids.count(IMAGE_ID) == PATCHES
    try:
        row = pack([(ids, labels)], PATCHES, 10, "x.jpg")
    except InputError:
        return
    assert row.input_ids.count(IMAGE_ID) == PATCHES


def test_answers_do_not_depend_on_the_batches(world, monkeypatch):
    """44 rows at once, 5 by 5, and 20 by 20, of which the first batch is a short one: same answers
    and logits of two words.
    """
    llava = load_base(world.base)
    images, words = sorted(glob(f"{world.coco}/val2014/*.jpg")), ("dog", "cat", "kite")
    examples = []
    for n in range(44):
        asked = [[(f"{IMAGE}\nIs there a {word} here?", None)] for word in words[:1 + n % 3]]
        examples.append(Example(images[n % len(images)], asked))
    dataset = PackedDataset(examples, llava.row_format())
    sizes = []

    def noted(trunk, heads, batch, max_new_tokens):
        sizes.append(len(batch.ends))
        return generate(trunk, heads, batch, max_new_tokens)

    monkeypatch.setattr(model, "generate", noted)
    said, batches = {}, {5: [5] * 8 + [4], 20: [16, 20, 8], 64: [16, 28]}
    for size in (5, 20, 64):
        sizes.clear()
        answered = model.answer(llava, dataset, 6, size, words=[7, 9])
        said[size] = {i: result for i, (result,) in answered}
        assert sizes == batches[size]
    for i in range(44):
        assert said[5][i][0] == said[20][i][0] == said[64][i][0]
        assert said[5][i][1].shape == (1 + i % 3, 2)
        assert largest_difference(f"row {i}", said[5][i][1], said[64][i][1]) < 1e-4
    words = range(len(llava.tokenizer))
    whole = dict(model.answer(llava, dataset, 1, 20, indices=[3, 40], words=words))
    assert whole.keys() == {3, 40}
    assert largest_difference("row 3", whole[3][0][1][:, [7, 9]], said[5][3][1]) < 1e-4
    assert list(model.answer(llava, dataset, 1, indices=[])) == []
