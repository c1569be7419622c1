"""The property that everything rests on: a branch of a packed row gives the numbers of running it alone.

`alone` below is the plain case, written without any of the packing code: one sequence, one causal forward, no cache, no
padding, no branches. Against it stand packed rows (a prefix and 1 to 8 branches, rows of different lengths padded
together, images shared or absent) in training's form (logits and log-probabilities of given answers) and in
evaluation's (greedy answers with the cache).
"""
import random
from glob import glob

import pytest
import torch
from conftest import largest_difference, small_llava

import model
from checkpoint import load_base
from data import BOS, EOS, IGNORE, IMAGE_ID, Batch, InputError, PackedDataset, collate, pack
from dpo import sequence_logps, token_logps
from llama import KVCache
from model import answer_states, generate
from readers import IMAGE, Example

VARIANTS = (None, "full", "self_attn", "no_cross_attn")
PATCHES, VOCAB = 9, 48
ROWS = ((5, 1, "a.jpg"), (11, 3, "b.jpg"), (3, 8, "a.jpg"), (7, 2, None))        # length of the prompt, branches, image


def pixels(image):
    """What stands in for opening an image: noise of its own for each name."""
    return torch.randn(3, 24, 24, generator=torch.Generator().manual_seed(ord(image[0])))


def make_sequences(open_ended, seed=0):
    """[(image, [(ids, labels), ...]), ...], one entry a row; branches differ in question, in answer and in length."""
    rng = random.Random(seed)
    words = lambda n: [rng.randrange(3, VOCAB) for _ in range(n)]
    rows = []
    for length, branches, image in ROWS:
        prompt = [BOS, *words(2), *([IMAGE_ID] if image else []), *words(length)]
        row = []
        for number in range(branches):
            question = words(number % 4) + [3 + number]          # of several lengths, and no two alike
            answer = [] if open_ended else words(1 + rng.randrange(6)) + [EOS]
            row.append((prompt + question + answer, [IGNORE] * len(prompt + question) + answer))
        rows.append((image, row))
    return rows


def alone(trunk, head, ids, image):
    """Logits behind every token of one sequence, (T, vocab)."""
    ids = [j for i in ids for j in ([i] * PATCHES if i == IMAGE_ID else [i])]
    T = len(ids)
    batch = Batch(input_ids=torch.tensor([ids]), position=torch.arange(T)[None], branch=torch.zeros(1, T, dtype=torch.long),
                  image_index=torch.tensor([0 if image else -1]), pixel_values=pixels(image)[None] if image else None)
    h, features = trunk(batch)
    if features is None:
        features = torch.zeros(1, PATCHES, trunk.config.vision.hidden_size)      # DESIGN: a row without image sees zeros
    by_self = head.block is not None and head.block.attention == "self"
    return head(h, h if by_self else features, torch.ones(T, T).tril().bool()[None, None] if by_self else None)[0]


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
    batch = collate([pack(sequences, PATCHES, 256, image) for image, sequences in rows], pixels)
    assert (batch.branch == -1).any() and batch.ends.shape == (4, 8)            # there is padding, of tokens and branches
    hidden, features = trunk(batch)
    logits = head(*answer_states(head, hidden, features, batch))                                    # (B, A, vocab)
    logps = token_logps(logits, batch.target.clamp(min=0))
    sums = sequence_logps(logps, batch.target_branch, 8)                                            # (B, 8)
    worst_logit = worst_logp = 0
    for b, (image, sequences) in enumerate(rows):
        for n, (ids, labels) in enumerate(sequences):
            answer = [label for label in labels if label != IGNORE]
            expected = alone(trunk, head, ids, image)[-len(answer) - 1:-1]                          # (answer, vocab)
            mine = logits[b, batch.target_branch[b] == n + 1]
            assert batch.target[b, batch.target_branch[b] == n + 1].tolist() == answer
            assert mine.shape == expected.shape
            worst_logit = max(worst_logit, (mine - expected).abs().max().item())
            expected_sum = expected.log_softmax(-1)[range(len(answer)), answer].sum()
            worst_logp = max(worst_logp, (sums[b, n] - expected_sum).abs().item())
    print(f"block {variant}, {kv_heads} of 4 key heads: logits {worst_logit:.2e}, log-probs {worst_logp:.2e}")
    assert worst_logit < 1e-4 and worst_logp < 1e-4


@pytest.mark.parametrize("kv_heads", (4, 1))
@pytest.mark.parametrize("variant", VARIANTS)
def test_greedy_answers(variant, kv_heads):
    """24 tokens are more than `generate` makes room for at first, so the cache also grows here."""
    trunk, head = small_llava(4, kv_heads, variant)
    rows = make_sequences(open_ended=True)
    batch = collate([pack(sequences, PATCHES, 256, image) for image, sequences in rows], pixels)
    for _ in range(6):      # random weights seldom stop: make `</s>` likelier until some answers do, and others do not
        expected = [[alone_greedy(trunk, head, ids, image, 24) for ids, _ in sequences] for image, sequences in rows]
        lengths = {len(answer) for row in expected for answer in row}
        if min(lengths) < 24:
            break
        head.lm_head.weight[EOS] *= 1.3
    print(f"block {variant}: answers of {sorted(lengths)} tokens")
    assert 24 in lengths and min(lengths) < 24          # or this test would not see what an early stop does to others
    (answers, first), = generate(trunk, [head], batch, 24)
    assert answers == expected
    theirs = torch.stack([alone(trunk, head, ids, image)[-1] for image, sequences in rows for ids, _ in sequences])
    ours = torch.cat([first[b, :len(sequences)] for b, (_, sequences) in enumerate(rows)])
    assert largest_difference("logits of the first answer token", ours, theirs) < 1e-4


def test_several_heads_share_one_pass():
    """Each head decodes from the same prompt pass, and none sees what another has written into the cache."""
    trunk, plain = small_llava()
    heads = [small_llava(variant=variant)[1] for variant in ("full", "self_attn", "no_cross_attn")] + [plain]
    batch = collate([pack(sequences, PATCHES, 256, image) for image, sequences in make_sequences(True)], pixels)
    together = generate(trunk, heads, batch, 20)
    separate = [generate(trunk, [head], batch, 20)[0] for head in heads]
    assert [answers for answers, _ in together] == [answers for answers, _ in separate]
    assert len({str(answers) for answers, _ in together}) == len(heads)          # they do say different things


@pytest.mark.parametrize("kv_heads", (4, 2, 1))
def test_token_by_token(kv_heads):
    """The single-token case: every token in a forward of its own against one forward of the row, padding included.

    The cache starts with room for three tokens and must grow; then its last third is forgotten by setting `length` back
    and read again, which must change nothing.
    """
    trunk, _ = small_llava(4, kv_heads)
    batch = collate([pack(sequences, PATCHES, 256, image) for image, sequences in make_sequences(False)], pixels)
    embeds, _ = trunk.embed(batch)
    (B, T), model = batch.input_ids.shape, trunk.model
    real = batch.branch >= 0
    expected = model(embeds, batch.position, batch.branch)
    cache = KVCache(trunk.config.text, B, 3, "cpu", torch.float32)
    step = lambda t: model(embeds[:, t:t + 1], batch.position[:, t:t + 1], batch.branch[:, t:t + 1], cache)
    ours = torch.cat([step(t) for t in range(T)], 1)
    assert cache.length == T
    assert largest_difference(f"token by token, {kv_heads} of 4 key heads", ours[real], expected[real]) < 1e-4

    cache.length = start = 2 * T // 3
    model(torch.randn_like(embeds[:, start:]), batch.position[:, start:], batch.branch[:, start:], cache)   # something else
    cache.length = start
    again = torch.cat([step(t) for t in range(start, T)], 1)
    assert largest_difference("after setting length back", again[real[:, start:]], ours[:, start:][real[:, start:]]) < 1e-6


def test_many_tokens_after_the_cache():
    """A forward of several tokens behind a filled cache is the same case again."""
    trunk, _ = small_llava(4, 2)
    batch = collate([pack(sequences, PATCHES, 256, image) for image, sequences in make_sequences(False)], pixels)
    embeds, _ = trunk.embed(batch)
    expected = trunk.model(embeds, batch.position, batch.branch)
    cache = KVCache(trunk.config.text, *batch.input_ids.shape, "cpu", torch.float32)
    parts = [trunk.model(embeds[:, part], batch.position[:, part], batch.branch[:, part], cache)
             for part in (slice(0, 13), slice(13, 14), slice(14, None))]
    real = batch.branch >= 0
    assert largest_difference("in three parts", torch.cat(parts, 1)[real], expected[real]) < 1e-4


# ---------------------------------------------------------------------------------------------------------------------
# pack()


def unpacked(row, number):
    """A branch with its prefix, read back out of a row: ids, positions."""
    at = [t for t, branch in enumerate(row.branch) if branch in (0, number)]
    return [row.input_ids[t] for t in at], [row.position[t] for t in at]


@pytest.mark.parametrize("seed", range(20))
def test_pack_loses_nothing(seed):
    """Any sequences with a common beginning, some with an answer in the middle: every one is found again, whole."""
    rng = random.Random(seed)
    words = lambda low, high: [rng.randrange(3, 6) for _ in range(rng.randint(low, high))]       # few words: much in common
    prompt, sequences = [BOS, IMAGE_ID, *words(0, 4)], []
    for _ in range(rng.randint(1, 5)):
        question, answer = words(0, 3), words(1, 4) + [EOS]
        second, third = words(1, 3), words(1, 2) + [EOS]
        sequences.append((prompt + question + answer + second + third,
                          [IGNORE] * len(prompt + question) + answer + [IGNORE] * len(second) + third))
    row = pack(sequences, PATCHES, 256, "a.jpg")
    prefix = row.branch.count(0)
    assert row.input_ids.count(IMAGE_ID) == PATCHES and row.cut == 0
    for number, (ids, labels) in enumerate(sequences, 1):
        expanded = [j for i in ids for j in ([i] * PATCHES if i == IMAGE_ID else [i])]
        labels = [IGNORE] * (len(expanded) - len(labels)) + labels
        assert unpacked(row, number) == (expanded, list(range(len(expanded))))
        assert row.branch[row.ends[number - 1]] == number and row.position[row.ends[number - 1]] == len(expanded) - 1
        first_answer = next(t for t, label in enumerate(labels) if label != IGNORE)
        assert prefix <= first_answer                                            # an answer is nobody else's prefix
        # The targets are the labels, each predicted from the token in front of it, in the prefix or in the own branch.
        mine = [(s, t) for s, t, branch in zip(row.source, row.target, row.target_branch) if branch == number]
        assert [(row.position[s] + 1, t) for s, t in mine] == [(t, label) for t, label in enumerate(labels) if label != IGNORE]
        assert all(row.branch[s] in (0, number) for s, _ in mine)


def test_shared_prefix_is_as_long_as_possible():
    """Chosen and rejected begin alike: the prompt stands once, the words of the answers stand in their branches."""
    prompt, no = [BOS, IMAGE_ID, 7, 8, 9], [IGNORE] * 5
    row = pack([(prompt + [11, 12, EOS], no + [11, 12, EOS]), (prompt + [11, 13, EOS], no + [11, 13, EOS])], PATCHES, 256, "x.jpg")
    assert row.branch == [0] * (PATCHES + 4) + [1] * 3 + [2] * 3
    assert row.target == [11, 12, EOS, 11, 13, EOS]
    last = PATCHES + 3                                                           # the prompt's last token predicts both
    assert row.source == [last, last + 1, last + 2, last, last + 4, last + 5]


def test_equal_open_prompts_keep_a_token_each():
    """The same question twice: each branch still needs a token of its own, to decode from."""
    row = pack([([BOS, 5, 6], [IGNORE] * 3)] * 2, PATCHES, 256)
    assert row.branch == [0, 0, 1, 2] and row.ends == [2, 3] and row.target == []


def test_prompts_are_never_cut():
    prompt = [BOS, IMAGE_ID, *range(3, 10)]                                      # 17 tokens
    sequences = [(prompt + [11, 12, EOS], [IGNORE] * 9 + [11, 12, EOS]), (prompt + [20, EOS], [IGNORE] * 9 + [20, EOS])]
    with pytest.raises(InputError, match="17 tokens does not fit into 17.*x.jpg"):
        pack(sequences, PATCHES, 17, "x.jpg")                                    # it would fit, and no word of an answer
    row = pack(sequences, PATCHES, 18, "x.jpg")
    assert row.cut == 2 + 1 and row.target == [11, 20] and row.ends == [17, 18]
    assert pack(sequences, PATCHES, 19, "x.jpg").cut == 1
    whole = pack(sequences, PATCHES, 20, "x.jpg")
    assert whole.cut == 0 and whole.target == [11, 12, EOS, 20, EOS]
    with pytest.raises(InputError, match="never cut"):
        pack([(prompt, [IGNORE] * 9)], PATCHES, 16, "x.jpg")                              # an open prompt


def test_an_image_is_never_cut():
    """An image that comes in a later turn, behind an answer, and does not fit: half an image would move all others."""
    ids = [BOS, 5, 6, 11, EOS, IMAGE_ID, 7, 12, EOS]
    labels = [IGNORE] * 3 + [11, EOS] + [IGNORE] * 2 + [12, EOS]
    assert pack([(ids, labels)], PATCHES, 17, "x.jpg").input_ids.count(IMAGE_ID) == PATCHES
    try:
        row = pack([(ids, labels)], PATCHES, 10, "x.jpg")
    except InputError:
        return
    assert row.input_ids.count(IMAGE_ID) == PATCHES


def test_answers_do_not_depend_on_the_batches(world, monkeypatch):
    """44 rows at once, 5 by 5, and 20 by 20, of which the first batch is a short one: same answers and logits of two words."""
    trunk, head, tokenizer, preprocess = load_base(world.base)
    images = sorted(glob(f"{world.coco}/val2014/*.jpg"))
    examples = [Example(images[n % len(images)], [[(f"{IMAGE}\nIs there a {word} here?", None)] for word in "dog cat kite".split()[:1 + n % 3]])
                for n in range(44)]
    dataset = PackedDataset(examples, tokenizer, preprocess, trunk.config.vision.num_patches, trunk.config.max_length)
    sizes = []
    monkeypatch.setattr(model, "generate", lambda trunk, heads, batch, n: sizes.append(len(batch.ends)) or generate(trunk, heads, batch, n))
    said = {}
    for size in (5, 20, 64):
        sizes.clear()
        said[size], = model.answer(trunk, [head], dataset, 6, size, words=[7, 9])
        assert sizes == {5: [5] * 8 + [4], 20: [16, 20, 8], 64: [16, 28]}[size]
    for i in range(44):
        assert said[5][i][0] == said[20][i][0] == said[64][i][0] and said[5][i][1].shape == (1 + i % 3, 2)
        assert largest_difference(f"row {i}", said[5][i][1], said[64][i][1]) < 1e-4
    whole, = model.answer(trunk, [head], dataset, 1, 20, indices=[3, 40], words=slice(None))
    assert whole.keys() == {3, 40} and largest_difference("row 3", whole[3][1][:, [7, 9]], said[5][3][1]) < 1e-4
    assert model.answer(trunk, [head], dataset, 1, indices=[])[0] == {}
