"""evals/sampling.py: every flag against transformers' `generate` on the same random LLaVA.

Prompts are ids; the image stands in them once per patch, on both sides. Nobody can say an image:
for transformers it is the last token of the vocabulary, whose row of `lm_head` is cut off here.
"""
import random

import pytest
import torch
from conftest import as_llava, largest_difference, small_llava
from PIL import Image
from test_packed import PATCHES, pixels
from test_peers import IMAGE_TOKEN, VOCAB, llava_twins, transformers

from data import BOS, EOS, IMAGE_ID
from evals.sampling import (
    Conversation,
    Sampling,
    ban_repeated_ngrams,
    distribution,
    keep_top_k,
    keep_top_p,
    next_token,
    penalise_repetition,
)
from support.common import InputError

PENALTIES = ({}, {"repetition_penalty": 1.4}, {"no_repeat_ngram_size": 2},
             {"repetition_penalty": 1.2, "no_repeat_ngram_size": 3})


def conversation_of(trunk, head, image=None, tokenizer=None):
    model = as_llava(trunk, head, tokenizer=tokenizer, preprocess=pixels)
    return Conversation(model, head, image)


def talk(conversation, turns, sampling):
    """Ask turns of ids instead of text. Returns each answer's ids, `</s>` included where it was
    said.
    """
    answers = []
    for ids in turns:
        conversation.turn = lambda _, ids=ids: ids
        start = len(conversation.ids) + len(ids)
        said = list(conversation.answer(None, sampling))
        answers.append(conversation.ids[start:])
        assert said == [token for token in answers[-1] if token != EOS]
    return answers


@pytest.fixture(scope="module")
def image(tmp_path_factory):
    path = str(tmp_path_factory.mktemp("image") / "a.png")
    Image.new("RGB", (24, 24)).save(path)
    return path


# ---- Against transformers ------------------------------------------------------------------------


def words(rng, n):
    return [rng.randrange(3, VOCAB - 1) for _ in range(n)]


def first_turn(rng):
    return [BOS, *words(rng, 3), *[IMAGE_ID] * PATCHES, *words(rng, 6)]


class Twins:
    """transformers' LLaVA and ours, with the same weights. With `stops` they often say `</s>`."""

    def __init__(self, image, stops):
        self.theirs, self.trunk, self.head = llava_twins(4, 2)
        self.theirs.generation_config.pad_token_id = 0
        weight = self.head.lm_head.weight[:IMAGE_TOKEN].clone()
        weight[EOS] *= 8 if stops else 1
        self.head.lm_head.weight.data = self.theirs.lm_head.weight.data = weight
        self.image, self.stops = image, stops

    def conversation(self):
        return conversation_of(self.trunk, self.head, self.image)

    def generate(self, ids, **options):
        ids = torch.tensor([ids])
        ids[ids == IMAGE_ID] = IMAGE_TOKEN
        return self.theirs.generate(input_ids=ids, attention_mask=torch.ones_like(ids),
                                    pixel_values=pixels(self.image)[None], max_new_tokens=20,
                                    **options)

    def compare(self, seed, **options):
        """Two turns, in each the same answer; returns how long the answers were."""
        rng = random.Random(seed)
        conversation, lengths = self.conversation(), []
        for turn in (first_turn(rng), words(rng, 5)):
            prompt = conversation.ids + turn
            ours, = talk(conversation, [turn], Sampling(max_new_tokens=20, **options))
            theirs = self.generate(prompt, do_sample=False, **options)[0, len(prompt):].tolist()
            assert ours == theirs
            lengths.append(len(ours))
        return lengths

    def check(self, **options):
        lengths = [n for seed in range(3) for n in self.compare(seed, **options)]
        print(f"{options}: answers of {lengths} tokens")
        assert min(lengths) < 20 if self.stops else max(lengths) == 20


@pytest.fixture(scope="module", params=(False, True), ids=("seldom stops", "often stops"))
def twins(request, image):
    return Twins(image, request.param)


def top_k(scores, ids, k):
    return keep_top_k(scores, k)


def top_p(scores, ids, p):
    return keep_top_p(scores, p)


def test_pure_functions():
    """Exactly transformers' scores, with ids that are no tokens and -inf among the scores; for
    top-k also equal scores.
    """
    torch.manual_seed(0)
    scores = torch.randn(4, VOCAB) * 3
    scores[:, 7] = float("-inf")
    equal = scores.round()
    assert len(equal[0].unique()) < VOCAB / 2
    ids = torch.randint(3, 8, (4, 30))
    ids[:, 4:9] = IMAGE_ID
    hf_ids = ids.masked_fill(ids < 0, VOCAB + 5)         # likewise outside of the vocabulary there
    pairs = ((penalise_repetition, transformers.RepetitionPenaltyLogitsProcessor, (0.7, 1.3)),
             (ban_repeated_ngrams, transformers.NoRepeatNGramLogitsProcessor, (1, 2, 3, 30, 31)),
             (top_k, transformers.TopKLogitsWarper, (1, 5, VOCAB, 500)),
             (top_p, transformers.TopPLogitsWarper, (1e-9, 0.1, 0.5, 0.9, 0.999)))
    idle = []
    for ours, theirs, cases in pairs:
        for case in cases:
            given = equal if ours is top_k else scores
            expected = theirs(case)(hf_ids, given.clone())
            assert torch.equal(ours(given, ids, case), expected), (theirs, case)
            if torch.equal(expected, given):
                idle.append(case)
    assert idle == [30, 31, VOCAB, 500]                                  # all others did something


@pytest.mark.parametrize("options", PENALTIES, ids=str)
def test_greedy(twins, options):
    twins.check(**options)


@pytest.mark.parametrize("options", PENALTIES, ids=str)
@pytest.mark.parametrize("num_beams", (2, 3, 5))
def test_beams(twins, num_beams, options):
    twins.check(num_beams=num_beams, **options)


@pytest.mark.parametrize("options", ({}, {"temperature": 0.4}, {"temperature": 1.7, "top_k": 7},
                                     {"top_p": 0.6},
                                     {"temperature": 0.8, "top_k": 20, "top_p": 0.9,
                                      **PENALTIES[3]}), ids=str)
def test_drawn(twins, options):
    """Along an answer that transformers has drawn: at every token the distribution that it was
    drawn from.
    """
    prompt, conversation = first_turn(random.Random(1)), twins.conversation()
    torch.manual_seed(5)
    everything = {"temperature": 1.0, "top_k": 0, "top_p": 1.0}
    drawn = twins.generate(prompt, **everything | options, do_sample=True, output_scores=True,
                           return_dict_in_generate=True)
    sampling, worst = Sampling(**{"temperature": 1.0} | options), 0
    conversation.ids += prompt
    tokens = drawn.sequences[0, len(prompt):].tolist()
    for token, scores in zip(tokens, drawn.scores, strict=True):
        ids = torch.tensor([conversation.ids])
        ours, theirs = distribution(conversation.read_on(), ids, sampling), scores.softmax(-1)
        assert ((ours == 0) == (theirs == 0)).all()
        worst = max(worst, (ours - theirs).abs().max().item())
        conversation.ids.append(token)
    print(f"{options}: {len(tokens)} tokens, largest difference of a probability {worst:.2e}")
    assert worst < 1e-5


def test_draws_follow_the_distribution():
    torch.manual_seed(0)
    logits = torch.randn(1, 12).expand(20000, -1)
    ids = torch.zeros(20000, 1, dtype=torch.long)
    sampling = Sampling(temperature=0.9, top_p=0.8)
    token = next_token(logits, ids, sampling, torch.Generator().manual_seed(1))
    expected = distribution(logits[:1], ids[:1], sampling)[0]
    assert 2 < (expected > 0).sum() < 12
    frequency = token.bincount(minlength=12) / 20000
    assert largest_difference("frequency of 20,000 draws", frequency, expected) < 0.015
    again = next_token(logits, ids, sampling, torch.Generator().manual_seed(1))
    assert torch.equal(token, again)


# ---- Wrong values --------------------------------------------------------------------------------


@pytest.mark.parametrize("name, value", (("temperature", -1), ("temperature", float("nan")),
                                         ("repetition_penalty", 0), ("num_beams", 0),
                                         ("no_repeat_ngram_size", -1), ("max_new_tokens", 0)))
def test_wrong_values(name, value):
    with pytest.raises(InputError, match=f"--{name} {value}: must be"):
        Sampling(**{name: value})


def test_drawing_fields_are_ignored_when_greedy():
    """A script's top_p says nothing about greedy decoding, whatever it is. With a temperature it
    must make sense.
    """
    logits, ids = torch.tensor([[0.0, 3.0, 1.0]]), torch.tensor([[BOS]])
    assert next_token(logits, ids, Sampling(top_p=0, top_k=-1)).tolist() == [1]
    for wrong in ({"top_p": 0}, {"top_p": 1.5}, {"top_k": -1}, {"num_beams": 2}):
        with pytest.raises(InputError, match=f"--{next(iter(wrong))}"):
            Sampling(temperature=0.5, **wrong)


def test_too_many_beams():
    trunk, head = small_llava()
    with pytest.raises(InputError, match="--num_beams 25.*vocabulary of 48"):
        talk(conversation_of(trunk, head), [[BOS, 5]], Sampling(num_beams=25))
