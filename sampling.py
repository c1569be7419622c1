"""A conversation with the model: how the next token is chosen, and the row that grows with what is said.

    conversation = Conversation(trunk, head, tokenizer, preprocess, image="photo.jpg")
    for token in conversation.answer("Is there a dog in the image?", Sampling(temperature=0.7, top_p=0.9)):
        ...                                                               # ids, each as soon as it is chosen
    for token in conversation.answer("What is beside it?", Sampling(num_beams=4)):
        ...                                                               # the second turn: only what is new is read

A conversation is one packed row with everything in its prefix (branch 0) and a cache that is kept from turn to turn. A
beam of the search is a branch of that row, so beams share what was said so far and forgetting them is one cut.

Flags, their meaning and the order in which they act are those of `generate` in huggingface/transformers: repetition
penalty (CTRL, arXiv 1909.05858, sec. 4.1), no repeated n-grams (arXiv 1705.04304, sec. 2.5), then, only where something
is drawn, temperature, top-k (arXiv 1805.04833), top-p (nucleus, arXiv 1904.09751, sec. 3.1). Beams are ranked by their
mean log-probability. Deliberately different: temperature 0 means greedy, as in LLaVA's programs, and then top-k and
top-p are not looked at; beam search and drawing are not mixed.
"""
from dataclasses import dataclass

import torch

from data import EOS, IMAGE, IMAGE_ID, Batch, check_images, encode_conversation, expand
from llama import KVCache
from model import answer_states
from readers import InputError


@dataclass
class Sampling:
    """How an answer is chosen. The defaults are greedy decoding."""
    temperature: float = 0.0            # 0 = the likeliest token; else logits are divided by it and one is drawn
    top_p: float = 1.0                  # draw among the likeliest tokens that together have this probability
    top_k: int = 0                      # draw among this many; 0 = all
    repetition_penalty: float = 1.0     # > 1 makes what was said already less likely
    no_repeat_ngram_size: int = 0       # no n tokens in a row twice; 0 = off
    num_beams: int = 1
    max_new_tokens: int = 512

    def __post_init__(self):
        draws = self.temperature != 0
        for name, fits, rule in (
                ("temperature", 0 <= self.temperature < float("inf"), "0 (greedy) or more"),
                ("top_p", not draws or 0 < self.top_p <= 1, "above 0 and at most 1 (off)"),
                ("top_k", not draws or self.top_k >= 0, "0 (off) or more"),
                ("repetition_penalty", 0 < self.repetition_penalty < float("inf"), "above 0; 1 is off"),
                ("no_repeat_ngram_size", self.no_repeat_ngram_size >= 0, "0 (off) or more"),
                ("num_beams", self.num_beams >= 1, "1 (off) or more"),
                ("num_beams", self.num_beams == 1 or not draws, "1 with --temperature: a beam search draws nothing"),
                ("max_new_tokens", self.max_new_tokens >= 1, "1 or more")):
            if not fits:
                raise InputError(f"--{name} {getattr(self, name)}: must be {rule}")


# ---------------------------------------------------------------------------------------------------------------------
# The next token: pure functions. `scores` (N, vocab) are logits or log-probabilities, `ids` (N, T) what was said so far


def occurring(ids, vocab_size):
    """(N, T) ids → (N, vocab) bool, which tokens are among them. An id that nobody can say (an image's) counts for none."""
    ids = torch.where((ids >= 0) & (ids < vocab_size), ids, vocab_size)
    return torch.zeros(len(ids), vocab_size + 1, dtype=torch.bool, device=ids.device).scatter_(1, ids, True)[:, :-1]


def penalise_repetition(scores, ids, penalty):
    """Divide the score of every token among `ids` by `penalty` (CTRL, sec. 4.1).

    CTRL divides negative scores too, which makes them likelier; as in transformers these are multiplied by it.
    """
    return torch.where(occurring(ids, scores.shape[-1]), torch.where(scores < 0, scores * penalty, scores / penalty), scores)


def ban_repeated_ngrams(scores, ids, size):
    """-inf for every token that would complete `size` tokens in a row that stand in `ids` already."""
    if ids.shape[1] < size:
        return scores
    ngrams = ids.unfold(1, size, 1)                                                         # (N, T - size + 1, size)
    last = ids[:, ids.shape[1] - size + 1:]                                                 # (N, size - 1)
    begun = (ngrams[..., :-1] == last[:, None]).all(-1)                                     # (N, T - size + 1)
    return scores.masked_fill(occurring(torch.where(begun, ngrams[..., -1], -1), scores.shape[-1]), float("-inf"))


def keep_top_k(scores, k):
    """-inf below the k-th best score; its equals are kept."""
    return scores.masked_fill(scores < scores.topk(min(k, scores.shape[-1])).values[:, -1:], float("-inf"))


def keep_top_p(scores, p):
    """-inf outside the nucleus: the fewest tokens, likeliest first, that have probability p together."""
    likeliest, order = scores.sort(descending=True)
    probability = likeliest.softmax(-1)
    before = probability.cumsum(-1) - probability                                           # of all that are likelier
    outside = before >= p
    outside[:, 0] = False                                                                   # where p is below rounding
    return scores.masked_fill(outside.scatter(1, order, outside), float("-inf"))


def penalised(scores, ids, sampling):
    """What greedy decoding, beam search and drawing have in common. The prompt counts as said, as in transformers."""
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
    return torch.multinomial(distribution(logits, ids, sampling), 1, generator=generator)[:, 0]


# ---------------------------------------------------------------------------------------------------------------------
# The row


class Conversation:
    """What was said to one trunk and head about one image (or none), in LLaVA's `v1` template.

    `ids` are all tokens said so far, the image as IMAGE_ID once per patch. `seen` are those that the model has read: their
    positions, branches and hidden states; the cache holds their keys and values. Reading lags behind saying by a token
    or so. Whatever Ctrl-C interrupts, `seen` is replaced as one whole thing, and the cache follows it.
    """

    def __init__(self, trunk, head, tokenizer, preprocess, image=None):
        self.trunk, self.head, self.tokenizer, self.image, self.ids, self.features = trunk, head, tokenizer, image, [], None
        parameter = next(trunk.parameters())
        if image:
            check_images([image])
        self.pixel_values = preprocess(image)[None].to(parameter) if image else None        # (1, 3, S, S)
        self.cache = KVCache(trunk.config.text, 1, 64, parameter.device, parameter.dtype)   # grows
        nothing = torch.zeros(1, 0, dtype=torch.long, device=parameter.device)
        self.seen = Batch(position=nothing, branch=nothing, image_index=torch.tensor([0 if image else -1], device=parameter.device),
                          hidden=parameter.new_zeros(1, 0, trunk.config.text.hidden_size))

    def see(self, position, branch, hidden):
        self.seen = Batch(position=position, branch=branch, image_index=self.seen.image_index, hidden=hidden)

    def forget(self, length):
        """Back to the first `length` tokens."""
        del self.ids[length:]
        self.see(*(x[:, :length] for x in (self.seen.position, self.seen.branch, self.seen.hidden)))

    @torch.inference_mode()
    def read(self, input_ids, position, branch, wanted=1):
        """Read T more tokens (lists) → logits (wanted, vocab), fp32, of what may follow each of the last ones."""
        input_ids, position, branch = torch.tensor([[input_ids], [position], [branch]], device=self.seen.position.device)  # (1, T)
        pixel_values = self.pixel_values if (input_ids == IMAGE_ID).any() else None
        self.cache.length = self.seen.hidden.shape[1]
        hidden, features = self.trunk(Batch(input_ids=input_ids, position=position, branch=branch, pixel_values=pixel_values,
                                            image_index=self.seen.image_index), self.cache)
        if features is not None:
            self.features = self.trunk.image_context(self.head.block, features)
        new, old = (position, branch, hidden), (self.seen.position, self.seen.branch, self.seen.hidden)
        self.see(*(torch.cat(pair, 1) for pair in zip(old, new)))
        end = self.seen.hidden.shape[1]                                                     # of all that was read
        at = torch.arange(end - wanted, end, device=hidden.device)[None]
        return self.head(*answer_states(self.head, self.seen.hidden, self.features, self.seen, at))[0].float()

    def read_on(self):
        """Read what was said and not yet read → logits (1, vocab)."""
        start, end = self.seen.hidden.shape[1], len(self.ids)
        return self.read(self.ids[start:], list(range(start, end)), [0] * (end - start))

    def turn(self, question):
        """The ids that ask `question` now. InputError when it does not fit."""
        config, begins = self.trunk.config, not self.ids
        if begins:
            ids, _ = encode_conversation(self.tokenizer, [(f"{IMAGE}\n{question}" if self.image else question, None)])
        else:       # behind an answer's `</s>`, whatever the answer; one that was cut short gets its `</s>` now
            ids, _ = encode_conversation(self.tokenizer, [("-", "-"), (question, None)])
            ids = ids[ids.index(EOS) + (self.ids[-1] == EOS):]
        ids, _ = expand(ids, ids, config.vision.num_patches, self.image if begins else None)
        if len(self.ids) + len(ids) >= config.max_length:
            raise InputError(f"{len(self.ids)} tokens were said, this question has {len(ids)}, and the model reads fewer than "
                             f"{config.max_length}; begin a new conversation")
        return ids

    def answer(self, question, sampling, generator=None):
        """Ask; yields the answer's ids, each as soon as it is chosen (a beam search: at its end), without `</s>`.

        What an interrupted answer had said stays said; a question whose answer had not begun was never asked. Only this
        model's context and `max_new_tokens` cut an answer: then it has no `</s>` in `ids`.
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
                token = int(next_token(logits, torch.tensor([self.ids], device=logits.device), sampling, generator))
                self.ids.append(token)
                if token == EOS:
                    return
                yield token
        finally:
            if len(self.ids) == start:
                self.forget(before)


@torch.inference_mode()
def beam_search(conversation, sampling, limit):
    """The best answer of at most `limit` tokens to what was said: a list of ids, `</s>` at its end unless it was cut.

    Beam b is branch b + 1, and all beams read a token each per step: token t of beam b is the row's token
    start + t * beams + b. A beam that goes on from another one's tokens takes over what the model made of them.
    """
    said, start, beams = list(conversation.ids), len(conversation.ids), sampling.num_beams
    logits = conversation.read_on()                                                         # (1, vocab): one beam at first
    vocab_size = logits.shape[-1]
    if 2 * beams > vocab_size:
        raise InputError(f"--num_beams {beams}: must be at most half of the vocabulary of {vocab_size}")
    answers, total, finished = [[]], logits.new_zeros(1), []
    for length in range(1, limit + 1):
        ids = torch.tensor([said + answer for answer in answers], device=logits.device)     # (beams, T)
        scores = total[:, None] + penalised(logits.log_softmax(-1), ids, sampling)          # (beams, vocab)
        # Twice as many as there are beams, for each beam's `</s>` may be among them, and that one does not go on.
        best, index = scores.flatten().topk(2 * beams)
        candidates = [(answers[i // vocab_size] + [i % vocab_size], score, i // vocab_size)
                      for score, i in zip(best.tolist(), index.tolist())]
        done = [answer[-1] == EOS or length == limit for answer, _, _ in candidates]
        finished += [(score / length, answer) for (answer, score, _), ends in zip(candidates[:beams], done) if ends]
        finished = sorted(finished, key=lambda pair: -pair[0])[:beams]
        going = [candidate for candidate, ends in zip(candidates, done) if not ends][:beams]
        # The best mean that can still come is guessed to be the best one now.
        if not going or len(finished) == beams and going[0][1] / length <= finished[-1][0]:
            break
        answers, total, parents = [list(x) for x in zip(*going)]
        total = torch.tensor(total, device=logits.device)
        take_over(conversation, start, parents)
        newest = [answer[-1] for answer in answers]
        logits = conversation.read(newest, [start + length - 1] * beams, list(range(1, beams + 1)), wanted=beams)
    conversation.forget(start)          # all beams; the best one is read with what is said next
    return finished[0][1]


def take_over(conversation, start, parents):
    """Beam b goes on from beam parents[b]: in the cache and among the hidden states. Positions and branches stay."""
    cache, seen = conversation.cache, conversation.seen
    end = seen.hidden.shape[1]
    at = torch.arange(start, end, device=seen.hidden.device).view(-1, len(parents))[:, parents].flatten()
    for x in (cache.keys, cache.values):
        x[:, :, :, start:end] = x[:, :, :, at]
    conversation.see(seen.position, seen.branch, torch.cat((seen.hidden[:, :start], seen.hidden[:, at]), 1))
