"""sampling.py: every flag against transformers' `generate` on the same random LLaVA, and a conversation against one plain forward.

Prompts of the first part are ids; the image stands in them once per patch, on both sides. Nobody can say an image: for
transformers it is the last token of the vocabulary, whose row of `lm_head` is cut off here.
"""
import random

import pytest
import torch
from conftest import largest_difference, small_llava
from PIL import Image
from test_packed import alone, pixels
from test_peers import IMAGE_TOKEN, VOCAB, llava_twins, transformers

from data import BOS, EOS, IMAGE, IMAGE_ID, Tokenizer, collate, encode_conversation, pack
from model import generate
from post_decoder import VARIANTS
from readers import InputError
from sampling import (Conversation, Sampling, ban_repeated_ngrams, distribution, keep_top_k, keep_top_p, next_token,
                      penalise_repetition)

PATCHES = 9
PENALTIES = ({}, {"repetition_penalty": 1.4}, {"no_repeat_ngram_size": 2}, {"repetition_penalty": 1.2, "no_repeat_ngram_size": 3})


@pytest.fixture(scope="module")
def image(tmp_path_factory):
    path = str(tmp_path_factory.mktemp("image") / "a.png")
    Image.new("RGB", (24, 24)).save(path)
    return path


def words(rng, n):
    return [rng.randrange(3, VOCAB - 1) for _ in range(n)]


def talk(conversation, turns, sampling, generator=None):
    """Ask turns of ids instead of text. Returns each answer's ids, `</s>` included where it was said."""
    answers = []
    for ids in turns:
        conversation.turn = lambda _: ids
        start = len(conversation.ids) + len(ids)
        said = list(conversation.answer(None, sampling, generator))
        answers.append(conversation.ids[start:])
        assert said == [token for token in answers[-1] if token != EOS]
    return answers


class Twins:
    """transformers' LLaVA and ours; `ask` gives both answers to prompts that grow with them."""

    def __init__(self, image, stops):
        self.theirs, self.trunk, self.head = llava_twins(4, 2)
        self.theirs.generation_config.pad_token_id = 0
        weight = self.head.lm_head.weight[:IMAGE_TOKEN].clone()
        weight[EOS] *= 8 if stops else 1
        self.head.lm_head.weight.data = self.theirs.lm_head.weight.data = weight
        self.image, self.stops = image, stops

    def conversation(self):
        return Conversation(self.trunk, self.head, None, pixels, self.image)

    def generate(self, ids, **options):
        ids = torch.tensor([ids])
        ids[ids == IMAGE_ID] = IMAGE_TOKEN
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels(self.image)[None]}
        return self.theirs.generate(**inputs, **options)

    def compare(self, seed, **options):
        """Two turns; returns how long the answers were."""
        rng = random.Random(seed)
        conversation, lengths = self.conversation(), []
        for turn in ([BOS, *words(rng, 3), *[IMAGE_ID] * PATCHES, *words(rng, 6)], words(rng, 5)):
            prompt = conversation.ids + turn
            (ours,) = talk(conversation, [turn], Sampling(max_new_tokens=20, **options))
            theirs = self.generate(prompt, max_new_tokens=20, do_sample=False, **options)[0, len(prompt):].tolist()
            assert ours == theirs
            lengths.append(len(ours))
        return lengths


@pytest.fixture(scope="module", params=(False, True), ids=("seldom stops", "often stops"))
def twins(request, image):
    return Twins(image, request.param)


# ---------------------------------------------------------------------------------------------------------------------
# Against transformers


def test_pure_functions():
    """Exactly transformers' scores, with ids that are no tokens and -inf among the scores; for top-k also equal scores."""
    torch.manual_seed(0)
    scores = torch.randn(4, VOCAB) * 3
    scores[:, 7] = float("-inf")
    equal = scores.round()
    assert len(equal[0].unique()) < VOCAB / 2
    ids = torch.randint(3, 8, (4, 30))
    ids[:, 4:9] = IMAGE_ID
    hf_ids = ids.masked_fill(ids < 0, VOCAB + 5)                                 # likewise outside of the vocabulary there
    idle = []
    for ours, theirs, cases in ((penalise_repetition, transformers.RepetitionPenaltyLogitsProcessor, (0.7, 1.3)),
                                (ban_repeated_ngrams, transformers.NoRepeatNGramLogitsProcessor, (1, 2, 3, 30, 31)),
                                (lambda x, _, k: keep_top_k(x, k), transformers.TopKLogitsWarper, (1, 5, VOCAB, 500)),
                                (lambda x, _, p: keep_top_p(x, p), transformers.TopPLogitsWarper, (1e-9, 0.1, 0.5, 0.9, 0.999))):
        for case in cases:
            given = equal if theirs is transformers.TopKLogitsWarper else scores
            expected = theirs(case)(hf_ids, given.clone())
            assert torch.equal(ours(given, ids, case), expected), (theirs, case)
            if torch.equal(expected, given):
                idle.append(case)
    assert idle == [30, 31, VOCAB, 500]                                          # all others did something


def check(twins, **options):
    lengths = [n for seed in range(3) for n in twins.compare(seed, **options)]
    print(f"{options}: answers of {lengths} tokens")
    assert min(lengths) < 20 if twins.stops else max(lengths) == 20


@pytest.mark.parametrize("options", PENALTIES, ids=str)
def test_greedy(twins, options):
    check(twins, **options)


@pytest.mark.parametrize("options", PENALTIES, ids=str)
@pytest.mark.parametrize("num_beams", (2, 3, 5))
def test_beams(twins, num_beams, options):
    check(twins, num_beams=num_beams, **options)


@pytest.mark.parametrize("options", ({}, {"temperature": 0.4}, {"temperature": 1.7, "top_k": 7}, {"top_p": 0.6},
                                     {"temperature": 0.8, "top_k": 20, "top_p": 0.9, **PENALTIES[3]}), ids=str)
def test_drawn(twins, options):
    """Along an answer that transformers has drawn: at every token the distribution that it was drawn from."""
    rng, conversation = random.Random(1), twins.conversation()
    prompt = [BOS, *words(rng, 3), *[IMAGE_ID] * PATCHES, *words(rng, 6)]
    torch.manual_seed(5)
    drawn = twins.generate(prompt, **{"temperature": 1.0, "top_k": 0, "top_p": 1.0} | options, max_new_tokens=20, do_sample=True,
                           output_scores=True, return_dict_in_generate=True)
    sampling, worst = Sampling(**{"temperature": 1.0} | options), 0
    conversation.ids += prompt
    for token, scores in zip(drawn.sequences[0, len(prompt):].tolist(), drawn.scores):
        ours, theirs = distribution(conversation.read_on(), torch.tensor([conversation.ids]), sampling), scores.softmax(-1)
        assert ((ours == 0) == (theirs == 0)).all()
        worst = max(worst, (ours - theirs).abs().max().item())
        conversation.ids.append(token)
    print(f"{options}: {len(drawn.scores)} tokens, largest difference of a probability {worst:.2e}")
    assert worst < 1e-5


def test_draws_follow_the_distribution():
    torch.manual_seed(0)
    logits, ids = torch.randn(1, 12).expand(20000, -1), torch.zeros(20000, 1, dtype=torch.long)
    sampling = Sampling(temperature=0.9, top_p=0.8)
    token = next_token(logits, ids, sampling, torch.Generator().manual_seed(1))
    expected = distribution(logits[:1], ids[:1], sampling)[0]
    assert 2 < (expected > 0).sum() < 12
    assert largest_difference("frequency of 20,000 draws", token.bincount(minlength=12) / 20000, expected) < 0.015
    again = next_token(logits, ids, sampling, torch.Generator().manual_seed(1))
    assert torch.equal(token, again)


# ---------------------------------------------------------------------------------------------------------------------
# The row


def test_two_turns_are_one_conversation(world, image, monkeypatch):
    """What the cache holds is LLaVA's template of the whole conversation, and every token in it was read as one forward reads it.

    A random model cannot speak, so words are put into its mouth: the ids of a text, as the tokenizer would write them.
    """
    tokenizer = Tokenizer(world.tokenizer)
    turns = [(f"{IMAGE}\nIs there a dog in the image?", "Yes, there is a dog in the image."), ("Is there a car?", "No."),
             ("Why?", None)]
    for variant in (None, "full", "self_attn", "no_cross_attn"):
        trunk, head = small_llava(variant=variant, vocab_size=len(tokenizer))
        looks = []
        trunk.vision_tower.register_forward_hook(lambda *_: looks.append(1))
        conversation = Conversation(trunk, head, tokenizer, pixels, image)
        for question, answer in turns[:2]:
            script = iter(tokenizer.encode(answer) + [EOS])
            monkeypatch.setattr("sampling.next_token", lambda *_: next(script))
            said = list(conversation.answer(question.removeprefix(f"{IMAGE}\n"), Sampling()))
            assert tokenizer.decode(said) == tokenizer.decode(tokenizer.encode(answer))
        read = conversation.seen.hidden.shape[1]
        assert read == len(conversation.ids) - 1 == conversation.cache.length    # all but the last `</s>`
        conversation.ids += conversation.turn(turns[2][0])
        expected, _ = encode_conversation(tokenizer, turns)
        at = expected.index(IMAGE_ID)
        assert conversation.ids == expected[:at] + [IMAGE_ID] * PATCHES + expected[at + 1:]
        logits = conversation.read_on()
        assert len(looks) == 1
        assert largest_difference(f"block {variant}", logits[0], alone(trunk, head, expected, image)[-1]) < 1e-4


@pytest.mark.parametrize("variant", (None, *VARIANTS))
@pytest.mark.parametrize("with_image", (True, False))
def test_greedy_is_generate(image, variant, with_image):
    trunk, head = small_llava(4, 2, variant)
    path = image if with_image else None
    ids = [BOS, 5, *[IMAGE_ID] * with_image, 11, 12, 7]
    (expected, _), = generate(trunk, [head], collate([pack([(ids, [-100] * len(ids))], PATCHES, 256, path)], pixels), 16)
    turn = [j for i in ids for j in ([i] * PATCHES if i == IMAGE_ID else [i])]
    (ours,) = talk(Conversation(trunk, head, None, pixels, path), [turn], Sampling(max_new_tokens=16))
    assert [token for token in ours if token != EOS] == expected[0][0] and len(set(ours)) > 2


def plain_beam_search(log_probs, beams, limit):
    """Beam search over `log_probs(answer)` (vocab), nothing kept from step to step. Mean log-probability decides."""
    going, finished = [([], 0.0)], []
    for length in range(1, limit + 1):
        nexts = [(answer + [token], total + score) for answer, total in going for token, score in enumerate(log_probs(answer))]
        nexts = sorted(nexts, key=lambda pair: -pair[1])[:2 * beams]
        done = lambda pair: pair[0][-1] == EOS or length == limit
        finished += [(total / length, answer) for answer, total in filter(done, nexts[:beams])]
        finished = sorted(finished, reverse=True)[:beams]
        going = [pair for pair in nexts if not done(pair)][:beams]
        if not going or len(finished) == beams and going[0][1] / length <= finished[-1][0]:
            break
    return finished[0][1]


@pytest.mark.parametrize("variant", (None, "full", "self_attn", "no_cross_attn"))
def test_beams_with_a_block(image, variant):
    """Beams that change places in the cache, and the hidden states that a self-attending block looks at with them."""
    trunk, head = small_llava(4, 2, variant)
    head.lm_head.weight[EOS] *= 2
    first, second = [BOS, 5, IMAGE_ID, 11, 12, 7], [9, 8]
    conversation = Conversation(trunk, head, None, pixels, image)
    expanded = [j for i in first for j in ([i] * PATCHES if i == IMAGE_ID else [i])]
    ours = talk(conversation, [expanded, second], Sampling(num_beams=3, max_new_tokens=8))
    for prompt, answer in ((first, ours[0]), (first + ours[0] + second, ours[1])):
        log_probs = lambda said: alone(trunk, head, prompt + said, image)[-1].log_softmax(-1).tolist()
        assert answer == plain_beam_search(log_probs, 3, 8)
    print(f"block {variant}: {ours}")


# ---------------------------------------------------------------------------------------------------------------------
# Interruptions and limits


@pytest.mark.parametrize("num_beams", (1, 3))
@pytest.mark.parametrize("forward", (1, 2, 5))
def test_interrupted(image, forward, num_beams):
    """Ctrl-C in the middle of the first, second and fifth forward of a second answer; then the conversation goes on."""
    trunk, head = small_llava(4, 2, "self_attn")
    conversation = Conversation(trunk, head, None, pixels, image)
    first = [BOS, 5, *[IMAGE_ID] * PATCHES, 11, 12, 7]
    talk(conversation, [first], Sampling(max_new_tokens=4))
    before, calls = list(conversation.ids), 0

    def interrupt(*_):
        nonlocal calls
        calls += 1
        if calls == forward:
            raise KeyboardInterrupt

    hook = trunk.model.layers[1].register_forward_hook(interrupt)                # the first layer has written into the cache
    with pytest.raises(KeyboardInterrupt):
        talk(conversation, [[9, 8]], Sampling(max_new_tokens=20, num_beams=num_beams))
    hook.remove()
    said = forward - 1 if num_beams == 1 else 0                                  # a beam search has said nothing before its end
    assert len(conversation.ids) == len(before) + (2 + said if said else 0)
    (answer,) = talk(conversation, [[20, 21]], Sampling(max_new_tokens=6))
    ids = [i for n, i in enumerate(conversation.ids) if i != IMAGE_ID or n < 3]  # the image once, as `alone` has it
    greedy = alone(trunk, head, ids, image).argmax(-1)[-len(answer) - 1:-1].tolist()
    assert answer == greedy


def test_a_cut_answer_is_closed(world, image):
    """An answer that `max_new_tokens` has cut gets its `</s>` with the next question."""
    tokenizer = Tokenizer(world.tokenizer)
    trunk, head = small_llava(vocab_size=len(tokenizer))
    head.lm_head.weight[EOS] = 0
    conversation = Conversation(trunk, head, tokenizer, pixels, image)
    assert len(list(conversation.answer("Is there a dog?", Sampling(max_new_tokens=3)))) == 3
    cut = len(conversation.ids)
    list(conversation.answer("Why?", Sampling(max_new_tokens=1)))
    assert conversation.ids[cut] == EOS and conversation.ids[cut + 1] != EOS and conversation.ids.count(EOS) == 1


def test_context_is_full(world):
    """An answer ends where the model's context does; a question that leaves no room is refused and changes nothing."""
    tokenizer = Tokenizer(world.tokenizer)
    trunk, head = small_llava(vocab_size=len(tokenizer), max_length=100)
    head.lm_head.weight[EOS] = 0
    conversation = Conversation(trunk, head, tokenizer, pixels)
    list(conversation.answer("Is there a dog?", Sampling()))
    assert len(conversation.ids) == 100
    before = list(conversation.ids)
    with pytest.raises(InputError, match="100 tokens were said.*fewer than 100"):
        list(conversation.answer("Why?", Sampling()))
    assert conversation.ids == before
    with pytest.raises(InputError, match="<image> stands 1 times"):
        list(Conversation(trunk, head, tokenizer, pixels).answer("What is <image>?", Sampling()))


@pytest.mark.parametrize("name, value", (("temperature", -1), ("temperature", float("nan")), ("repetition_penalty", 0),
                                         ("num_beams", 0), ("no_repeat_ngram_size", -1), ("max_new_tokens", 0)))
def test_wrong_values(name, value):
    with pytest.raises(InputError, match=f"--{name} {value}: must be"):
        Sampling(**{name: value})


def test_drawing_fields_are_ignored_when_greedy():
    """A script's top_p says nothing about greedy decoding, whatever it is; with a temperature it must make sense."""
    logits, ids = torch.tensor([[0.0, 3.0, 1.0]]), torch.tensor([[BOS]])
    assert next_token(logits, ids, Sampling(top_p=0, top_k=-1)).tolist() == [1]
    for wrong in ({"top_p": 0}, {"top_p": 1.5}, {"top_k": -1}, {"num_beams": 2}):
        with pytest.raises(InputError, match=f"--{next(iter(wrong))}"):
            Sampling(temperature=0.5, **wrong)


def test_too_many_beams(image):
    trunk, head = small_llava()
    with pytest.raises(InputError, match="--num_beams 25.*vocabulary of 48"):
        talk(Conversation(trunk, head, None, pixels), [[BOS, 5]], Sampling(num_beams=25))
