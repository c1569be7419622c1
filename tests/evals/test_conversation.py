"""evals/sampling.py: a conversation of several turns against one plain forward over all of it, and
what interruptions and limits leave behind.
"""
import pytest
from conftest import largest_difference, small_llava
from PIL import Image
from test_packed import PATCHES, alone, expanded, pixels
from test_sampling import conversation_of, talk

from data import BOS, EOS, IGNORE, IMAGE, IMAGE_ID, Tokenizer, collate, encode_conversation, pack
from evals.sampling import Sampling
from model import generate
from post_decoder import VARIANTS
from support.common import InputError


@pytest.fixture(scope="module")
def image(tmp_path_factory):
    path = str(tmp_path_factory.mktemp("image") / "a.png")
    Image.new("RGB", (24, 24)).save(path)
    return path


# ---- The row -------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", (None, "full", "self_attn", "no_cross_attn"))
def test_two_turns_are_one_conversation(world, image, monkeypatch, variant):
    """What the cache holds is LLaVA's template of the whole conversation, and every token in it was
    read as one forward reads it.

    A random model cannot speak, so words are put into its mouth: the ids of a text, as the
    tokenizer would write them.
    """
    tokenizer = Tokenizer(world.tokenizer)
    turns = [(f"{IMAGE}\nIs there a dog in the image?", "Yes, there is a dog in the image."),
             ("Is there a car?", "No."), ("Why?", None)]
    trunk, head = small_llava(variant=variant, vocab_size=len(tokenizer))
    looks = []
    trunk.vision_tower.register_forward_hook(lambda *_: looks.append(1))
    conversation = conversation_of(trunk, head, image, tokenizer)
    for question, answer in turns[:2]:
        script = iter(tokenizer.encode(answer) + [EOS])
        monkeypatch.setattr("evals.sampling.next_token", lambda *_, script=script: next(script))
        said = list(conversation.answer(question.removeprefix(f"{IMAGE}\n"), Sampling()))
        assert tokenizer.decode(said) == tokenizer.decode(tokenizer.encode(answer))
    read = conversation.seen.hidden_states.shape[1]                      # all but the last `</s>`
    assert read == len(conversation.ids) - 1 == conversation.cache.length
    conversation.ids += conversation.turn(turns[2][0])
    expected, _ = encode_conversation(tokenizer, turns)
    assert conversation.ids == expanded(expected)
    logits = conversation.read_on()
    assert len(looks) == 1
    whole = alone(trunk, head, expected, image)[-1]
    assert largest_difference(f"block {variant}", logits[0], whole) < 1e-4


@pytest.mark.parametrize("variant", (None, *VARIANTS))
@pytest.mark.parametrize("with_image", (True, False))
def test_greedy_is_generate(image, variant, with_image):
    trunk, head = small_llava(4, 2, variant)
    path = image if with_image else None
    ids = [BOS, 5, *[IMAGE_ID] * with_image, 11, 12, 7]
    batch = collate([pack([(ids, [IGNORE] * len(ids))], PATCHES, 256, path)], pixels)
    (expected, _), = generate(trunk, [head], batch, 16)
    conversation = conversation_of(trunk, head, path)
    ours, = talk(conversation, [expanded(ids)], Sampling(max_new_tokens=16))
    assert [token for token in ours if token != EOS] == expected[0][0] and len(set(ours)) > 2


def plain_beam_search(log_probs, beams, limit):
    """Beam search over `log_probs(answer)` (vocab), nothing kept from step to step. Mean
    log-probability decides.
    """
    going, finished = [([], 0.0)], []
    for length in range(1, limit + 1):
        nexts = [(answer + [token], total + score) for answer, total in going
                 for token, score in enumerate(log_probs(answer))]
        nexts = sorted(nexts, key=lambda pair: -pair[1])[:2 * beams]
        ended = [answer[-1] == EOS or length == limit for answer, _ in nexts]
        finished += [(total / length, answer) for (answer, total), end
                     in zip(nexts[:beams], ended[:beams], strict=True) if end]
        finished = sorted(finished, reverse=True)[:beams]
        going = [pair for pair, end in zip(nexts, ended, strict=True) if not end][:beams]
        if not going or len(finished) == beams and going[0][1] / length <= finished[-1][0]:
            break
    return finished[0][1]


@pytest.mark.parametrize("variant", (None, "full", "self_attn", "no_cross_attn"))
def test_beams_with_a_block(image, variant):
    """Beams that change places in the cache, and with them the hidden states that a self-attending
    block looks at.
    """
    trunk, head = small_llava(4, 2, variant)
    head.lm_head.weight[EOS] *= 2
    first, second = [BOS, 5, IMAGE_ID, 11, 12, 7], [9, 8]
    conversation = conversation_of(trunk, head, image)
    sampling = Sampling(num_beams=3, max_new_tokens=8)
    ours = talk(conversation, [expanded(first), second], sampling)
    for prompt, answer in ((first, ours[0]), (first + ours[0] + second, ours[1])):
        def log_probs(said, prompt=prompt):
            return alone(trunk, head, prompt + said, image)[-1].log_softmax(-1).tolist()

        assert answer == plain_beam_search(log_probs, 3, 8)
    print(f"block {variant}: {ours}")


# ---- Interruptions and limits --------------------------------------------------------------------


@pytest.mark.parametrize("num_beams", (1, 3))
@pytest.mark.parametrize("forward", (1, 2, 5))
def test_interrupted(image, forward, num_beams):
    """Ctrl-C in the middle of the first, second and fifth forward of a second answer. Then the
    conversation goes on.
    """
    trunk, head = small_llava(4, 2, "self_attn")
    conversation = conversation_of(trunk, head, image)
    first = [BOS, 5, *[IMAGE_ID] * PATCHES, 11, 12, 7]
    talk(conversation, [first], Sampling(max_new_tokens=4))
    before, calls = list(conversation.ids), 0

    def interrupt(*_):
        nonlocal calls
        calls += 1
        if calls == forward:
            raise KeyboardInterrupt

    # The first layer has written into the cache already.
    hook = trunk.model.layers[1].register_forward_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        talk(conversation, [[9, 8]], Sampling(max_new_tokens=20, num_beams=num_beams))
    hook.remove()
    said = forward - 1 if num_beams == 1 else 0     # a beam search says nothing before its end
    assert len(conversation.ids) == len(before) + (2 + said if said else 0)
    answer, = talk(conversation, [[20, 21]], Sampling(max_new_tokens=6))
    # The image once, as `alone` has it.
    ids = [i for n, i in enumerate(conversation.ids) if i != IMAGE_ID or n < 3]
    greedy = alone(trunk, head, ids, image).argmax(-1)[-len(answer) - 1:-1].tolist()
    assert answer == greedy


def test_a_cut_answer_is_closed(world, image):
    """An answer that `max_new_tokens` has cut gets its `</s>` with the next question."""
    tokenizer = Tokenizer(world.tokenizer)
    trunk, head = small_llava(vocab_size=len(tokenizer))
    head.lm_head.weight[EOS] = 0
    conversation = conversation_of(trunk, head, image, tokenizer)
    said = list(conversation.answer("Is there a dog?", Sampling(max_new_tokens=3)))
    cut = len(conversation.ids)
    list(conversation.answer("Why?", Sampling(max_new_tokens=1)))
    ids = conversation.ids
    assert len(said) == 3 and ids[cut] == EOS and ids[cut + 1] != EOS and ids.count(EOS) == 1


def test_context_is_full(world):
    """An answer ends where the model's context does. A question that leaves no room is refused and
    changes nothing.
    """
    tokenizer = Tokenizer(world.tokenizer)
    trunk, head = small_llava(vocab_size=len(tokenizer), max_length=100)
    head.lm_head.weight[EOS] = 0
    conversation = conversation_of(trunk, head, tokenizer=tokenizer)
    list(conversation.answer("Is there a dog?", Sampling()))
    assert len(conversation.ids) == 100
    before = list(conversation.ids)
    with pytest.raises(InputError, match="100 tokens were said.*fewer than 100"):
        list(conversation.answer("Why?", Sampling()))
    assert conversation.ids == before
