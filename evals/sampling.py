"""A conversation with the model: how the next token is chosen, and the row that grows with it.

    conversation = Conversation(model, model.head, image="photo.jpg")
    for token in conversation.answer("Is there a dog?", Sampling(temperature=0.7, top_p=0.9)):
        ...                                           # ids, each as soon as it is chosen
    for token in conversation.answer("What is beside it?", Sampling(num_beams=4)):
        ...                                           # the second turn: only what is new is read

A conversation is one packed row with everything in its prefix (branch 0), and a cache that is kept
from turn to turn. In a beam search each beam is a branch of that row. So the beams share what was
said before, and one cut forgets them.

The flags, their meaning and the order in which they act are those of `generate` in
huggingface/transformers: repetition penalty (CTRL, arXiv 1909.05858, sec. 4.1), no repeated n-grams
(arXiv 1705.04304, sec. 2.5), then, only where a token is drawn, temperature, top-k (arXiv
1805.04833) and top-p (nucleus, arXiv 1904.09751, sec. 3.1). Beams are ranked by their mean
log-probability. Deliberately different: temperature 0 means greedy, as in LLaVA's programs, and
then top-k and top-p have no effect; a beam search never draws.
"""
from dataclasses import dataclass

import torch

from data import (
    EOS,
    IMAGE,
    IMAGE_ID,
    Batch,
    Row,
    collate,
    encode_compressed,
    encode_conversation,
    expand,
    prefix_branches,
)
from llama import KVCache
from model import answer_states
from support.common import InputError
from support.images import check_images
from support.templates import SYSTEM


@dataclass
class Sampling:
    """How an answer is chosen. The defaults are greedy decoding.

    InputError where a setting is out of range.
    """
    temperature: float = 0.0          # 0: the likeliest token; else draw one from logits / this
    top_p: float = 1.0                # draw among the likeliest, as many as have this probability
    top_k: int = 0                    # draw among this many; 0: all
    repetition_penalty: float = 1.0   # above 1 it makes what was said already less likely
    no_repeat_ngram_size: int = 0     # so many tokens in a row never come twice; 0: off
    num_beams: int = 1
    max_new_tokens: int = 512

    def __post_init__(self):
        draws = self.temperature != 0
        infinity = float("inf")
        for name, fits, rule in (
                ("temperature", 0 <= self.temperature < infinity, "0 (greedy) or more"),
                ("top_p", not draws or 0 < self.top_p <= 1, "above 0 and at most 1 (off)"),
                ("top_k", not draws or self.top_k >= 0, "0 (off) or more"),
                ("repetition_penalty", 0 < self.repetition_penalty < infinity, "above 0; 1 is off"),
                ("no_repeat_ngram_size", self.no_repeat_ngram_size >= 0, "0 (off) or more"),
                ("num_beams", self.num_beams >= 1, "1 (off) or more"),
                ("num_beams", self.num_beams == 1 or not draws,
                 "1 with --temperature: a beam search draws nothing"),
                ("max_new_tokens", self.max_new_tokens >= 1, "1 or more")):
            if not fits:
                raise InputError(f"--{name} {getattr(self, name)}: must be {rule}")


# ---- The next token ------------------------------------------------------------------------------
# Pure functions. `scores` (N, vocab) are logits or log-probabilities, `ids` (N, T) was said so far.


def occurring(ids, vocab_size):
    """(N, T) ids → (N, vocab) bool, which tokens are among them.

    An id outside of the vocabulary (an image's) counts for none.
    """
    ids = torch.where((ids >= 0) & (ids < vocab_size), ids, vocab_size)
    found = torch.zeros(len(ids), vocab_size + 1, dtype=torch.bool, device=ids.device)
    return found.scatter_(1, ids, True)[:, :-1]


def penalise_repetition(scores, ids, penalty):
    """Divide the score of every token among `ids` by `penalty` (CTRL, sec. 4.1).

    CTRL divides negative scores too, which makes them likelier. As in transformers, these are
    multiplied by it.
    """
    lower = torch.where(scores < 0, scores * penalty, scores / penalty)
    return torch.where(occurring(ids, scores.shape[-1]), lower, scores)


def ban_repeated_ngrams(scores, ids, size):
    """-inf for every token that would repeat `size` tokens in a row that stand in `ids` already."""
    if ids.shape[1] < size:
        return scores
    ngrams = ids.unfold(1, size, 1)                                     # (N, T - size + 1, size)
    last = ids[:, ids.shape[1] - size + 1:]                             # (N, size - 1)
    begun = (ngrams[..., :-1] == last[:, None]).all(-1)                 # (N, T - size + 1)
    banned = torch.where(begun, ngrams[..., -1], -1)
    return scores.masked_fill(occurring(banned, scores.shape[-1]), float("-inf"))


def keep_top_k(scores, k):
    """-inf below the k-th best score; scores equal to it are kept."""
    kth = scores.topk(min(k, scores.shape[-1])).values[:, -1:]                              # (N, 1)
    return scores.masked_fill(scores < kth, float("-inf"))


def keep_top_p(scores, p):
    """-inf outside the nucleus: the fewest tokens, likeliest first, with probability p together."""
    likeliest, order = scores.sort(descending=True)
    probability = likeliest.softmax(-1)
    before = probability.cumsum(-1) - probability               # of all tokens that are likelier
    outside = before >= p
    outside[:, 0] = False                                       # where p is below rounding
    return scores.masked_fill(outside.scatter(1, order, outside), float("-inf"))


def penalised(scores, ids, sampling):
    """What greedy decoding, beam search and drawing share.

    The prompt counts as said, as in transformers.
    """
    if sampling.repetition_penalty != 1:
        scores = penalise_repetition(scores, ids, sampling.repetition_penalty)
    if sampling.no_repeat_ngram_size:
        scores = ban_repeated_ngrams(scores, ids, sampling.no_repeat_ngram_size)
    return scores


def distribution(logits, ids, sampling):
    """Probabilities (N, vocab) that the next token is drawn from."""
    scores = penalised(logits, ids, sampling) / sampling.temperature
    if sampling.top_k:
        scores = keep_top_k(scores, sampling.top_k)
    if sampling.top_p < 1:
        scores = keep_top_p(scores, sampling.top_p)
    return scores.softmax(-1)


def next_token(logits, ids, sampling, generator=None):
    """Logits (N, vocab) → the next token of each row, (N,)."""
    if sampling.temperature == 0:
        return penalised(logits, ids, sampling).argmax(-1)
    probabilities = distribution(logits, ids, sampling)
    return torch.multinomial(probabilities, 1, generator=generator)[:, 0]


# ---- The row -------------------------------------------------------------------------------------


class Conversation:
    """What was said to one trunk and head about one image (or none), in LLaVA's `v1` template.

    `ids` are all tokens said so far, the image as IMAGE_ID once per patch. `seen` holds positions,
    branches and hidden states of those that the model has read; the cache holds their keys and
    values. The model reads a token when the next one is wanted, so `seen` is shorter than `ids` by
    a token or so. `seen` is replaced as a whole and the cache follows it, so that Ctrl-C can
    interrupt anywhere.
    """

    def __init__(self, model, head, image=None, system=SYSTEM):
        self.trunk, self.head, self.tokenizer = model.trunk, head, model.tokenizer
        self.row_format = model.row_format(system)
        self.image, self.ids, self.image_features = image, [], None
        parameter = next(self.trunk.parameters())
        device, config = parameter.device, self.trunk.config.text
        if image:
            check_images([image])
        self.image_tokens, tiles, patches = self.row_format.layout(image)
        row = Row([], [], [], [], [], [], [], image, 0, tiles, patches)
        self.pixels = collate([row], model.preprocess).to(device, parameter.dtype)
        self.cache = KVCache(config, 1, 64, device, parameter.dtype)                # it grows
        nothing = torch.zeros(1, 0, dtype=torch.long, device=device)
        self.seen = Batch(position=nothing, branch=nothing,
                          image_index=self.pixels.image_index, tiles=self.pixels.tiles,
                          hidden_states=parameter.new_zeros(1, 0, config.hidden_size))

    def see(self, position, branch, hidden_states):
        """Replace what was seen: (1, T), (1, T), (1, T, hidden)."""
        self.seen = Batch(position=position, branch=branch, image_index=self.seen.image_index,
                          tiles=self.seen.tiles, hidden_states=hidden_states)

    def forget(self, length):
        """Go back to the first `length` tokens."""
        del self.ids[length:]
        seen = self.seen
        self.see(seen.position[:, :length], seen.branch[:, :length], seen.hidden_states[:, :length])

    @torch.inference_mode()
    def read(self, input_ids, position, branch, wanted=1):
        """Read T more tokens (three lists) → logits (wanted, vocab) in fp32.

        They say what may follow each of the last `wanted` tokens.
        """
        seen = self.seen
        row = torch.tensor([[input_ids], [position], [branch]], device=seen.position.device)
        input_ids, position, branch = row                                                   # (1, T)
        pixels = self.pixels if (input_ids == IMAGE_ID).any() else Batch()
        new = Batch(input_ids=input_ids, position=position, branch=branch,
                    pixel_values=pixels.pixel_values, image_index=seen.image_index,
                    tiles=seen.tiles, patches=pixels.patches)
        self.cache.length = seen.hidden_states.shape[1]
        hidden_states, image_features = self.trunk(new, self.cache)
        if image_features is not None:
            block_config = self.head.block_config
            self.image_features = self.trunk.image_context(block_config, image_features)
        self.see(torch.cat((seen.position, position), 1), torch.cat((seen.branch, branch), 1),
                 torch.cat((seen.hidden_states, hidden_states), 1))
        seen = self.seen
        end = seen.hidden_states.shape[1]
        at = torch.arange(end - wanted, end, device=position.device)[None]             # (1, wanted)
        states = answer_states(self.head, seen.hidden_states, self.image_features, seen, at)
        return self.head(*states)[0].float()

    def read_on(self):
        """Read what was said and not yet read → logits (1, vocab)."""
        start, end = self.seen.hidden_states.shape[1], len(self.ids)
        branches = prefix_branches(self.ids)[start:]
        return self.read(self.ids[start:], list(range(start, end)), branches)

    def turn(self, question):
        """The ids that ask `question` now. InputError when it does not fit."""
        config, begins = self.trunk.config, not self.ids
        if begins:
            text = f"{IMAGE}\n{question}" if self.image else question
            turns = [(text, None)]
        else:
            # What stands behind an answer is the same for every answer, so "-" stands for it. An
            # answer that was cut short gets its `</s>` now.
            turns = [("-", "-"), (question, None)]
        if begins and self.image and self.row_format.num_voco:
            ids, _ = encode_compressed(self.row_format, turns)
        else:
            ids, _ = encode_conversation(self.tokenizer, turns, self.row_format.template,
                                         has_image=self.image is not None)
        if not begins:
            end = ids.index(EOS)
            ids = ids[end + 1:] if self.ids[-1] == EOS else ids[end:]
        ids, _ = expand(ids, ids, self.image_tokens, self.image if begins else None)
        if len(self.ids) + len(ids) >= config.max_length:
            raise InputError(f"{len(self.ids)} tokens were said, this question has {len(ids)}, and "
                             f"the model reads fewer than {config.max_length}; begin a new "
                             "conversation")
        return ids

    def answer(self, question, sampling, generator=None):
        """Ask; yields the answer's ids without `</s>`, each as soon as it is chosen.

        A beam search yields them at its end. What an interrupted answer had said stays said; a
        question whose answer had not begun was never asked. An answer ends without `</s>` in `ids`
        only where the model's context or `max_new_tokens` cuts it. InputError as `turn`.
        """
        before = len(self.ids)
        self.ids += self.turn(question)
        start = len(self.ids)
        limit = min(sampling.max_new_tokens, self.trunk.config.max_length - start)
        try:
            if sampling.num_beams > 1:
                self.ids += beam_search(self, sampling, limit)
                yield from (token for token in self.ids[start:] if token != EOS)
                return
            for _ in range(limit):
                logits = self.read_on()
                said = torch.tensor([self.ids], device=logits.device)                       # (1, T)
                token = int(next_token(logits, said, sampling, generator))
                self.ids.append(token)
                if token == EOS:
                    return
                yield token
        finally:
            if len(self.ids) == start:
                self.forget(before)


# ---- Beam search ---------------------------------------------------------------------------------


@torch.inference_mode()
def beam_search(conversation, sampling, limit):
    """The best answer of at most `limit` tokens: ids, with `</s>` at the end unless it was cut.

    Beam b is branch b + 1, and all beams read one token each per step. Token t of beam b stands at
    start + t * beams + b in the row. A beam that continues another one takes over its states.
    """
    said, start, beams = list(conversation.ids), len(conversation.ids), sampling.num_beams
    logits = conversation.read_on()                             # (1, vocab): one beam at first
    vocab_size = logits.shape[-1]
    if 2 * beams > vocab_size:
        raise InputError(f"--num_beams {beams}: must be at most half of the vocabulary of "
                         f"{vocab_size}")
    answers, total, finished = [[]], logits.new_zeros(1), []
    for length in range(1, limit + 1):
        ids = torch.tensor([said + answer for answer in answers], device=logits.device)
        scores = total[:, None] + penalised(logits.log_softmax(-1), ids, sampling)  # (beams, vocab)
        # Twice as many candidates as beams, because the `</s>` of every beam may be among them.
        best, index = scores.flatten().topk(2 * beams)
        going = []
        for rank, (score, i) in enumerate(zip(best.tolist(), index.tolist(), strict=True)):
            parent, token = divmod(i, vocab_size)
            answer = answers[parent] + [token]
            if token != EOS and length < limit:
                going.append((answer, score, parent))
            elif rank < beams:
                finished.append((score / length, answer))
        finished = sorted(finished, key=lambda pair: -pair[0])[:beams]
        going = going[:beams]
        # Means to come are taken to be no better than the best one now, as in transformers.
        if not going or len(finished) == beams and going[0][1] / length <= finished[-1][0]:
            break
        answers, total, parents = [list(x) for x in zip(*going, strict=True)]
        total = torch.tensor(total, device=logits.device)
        take_over(conversation, start, parents)
        newest = [answer[-1] for answer in answers]
        position, branch = [start + length - 1] * beams, list(range(1, beams + 1))
        logits = conversation.read(newest, position, branch, wanted=beams)          # (beams, vocab)
    conversation.forget(start)          # all beams; the best one is read with what is said next
    return finished[0][1]


def take_over(conversation, start, parents):
    """Beam b continues beam parents[b]: in the cache and among the hidden states.

    Positions and branches stay.
    """
    cache, seen = conversation.cache, conversation.seen
    end = seen.hidden_states.shape[1]
    own = torch.arange(start, end, device=seen.hidden_states.device)
    at = own.view(-1, len(parents))[:, parents].flatten()
    for x in (cache.keys, cache.values):
        x[:, :, :, start:end] = x[:, :, :, at]
    hidden_states = torch.cat((seen.hidden_states[:, :start], seen.hidden_states[:, at]), 1)
    conversation.see(seen.position, seen.branch, hidden_states)
