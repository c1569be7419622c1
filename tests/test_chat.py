"""chat.py: what appears on the screen and on stdout, letter by letter, and what Ctrl-C and mistakes leave behind."""
import copy
import itertools
import os
import pty
import select
import signal
import sys

import pytest
import sentencepiece
import torch
from conftest import ROOT, shell, succeeds

from chat import Chat, main, tails
from checkpoint import fingerprint, load_base, save_trained
from data import EOS, IMAGE_ID, Tokenizer
from sampling import Conversation, Sampling

QUESTION = "Is there a dog in the image?"


@pytest.fixture(scope="module")
def base(world):
    return load_base(world.base)


@pytest.fixture(scope="module")
def lively(world):
    """The same base with such weights that picture, question and what was said before change what it says."""
    trunk, head, tokenizer, preprocess = load_base(world.base)
    for parameter in trunk.parameters():
        parameter *= 3 if parameter.dim() > 1 else 1
    return trunk, head, tokenizer, preprocess


@pytest.fixture(scope="module")
def images(world):
    folder = os.path.join(world.coco, "val2014")
    return [os.path.join(folder, name) for name in sorted(os.listdir(folder))[:2]]


@pytest.fixture(scope="module")
def checkpoint(world, base, tmp_path_factory):
    """A trained checkpoint over the world's base: another `lm_head`, which says other things."""
    trunk, head, tokenizer, _ = base
    folder = str(tmp_path_factory.mktemp("checkpoints") / "other")
    weight = head.lm_head.weight.roll(1, 0)
    save_trained(folder, {"lm_head.weight": weight}, {"base": world.base, "fingerprint": fingerprint(trunk, head)}, tokenizer)
    return folder


def answers(base, image, questions, **options):
    """What a conversation says, as texts."""
    trunk, head, tokenizer, preprocess = base
    conversation = Conversation(trunk, head, tokenizer, preprocess, image)
    return [tokenizer.decode(list(conversation.answer(question, Sampling(**options)))) for question in questions]


def play(base, image, lines, monkeypatch, capsys, others={}, **options):
    """Type lines into a chat (a callable is called when it is its turn) → Chat, what was printed. `others`: more heads."""
    trunk, head, tokenizer, preprocess = base
    script = iter(lines)

    def typed(prompt):
        line = next(script, None)
        if line is None:
            raise EOFError
        return line() if callable(line) else line

    monkeypatch.setattr("builtins.input", typed)
    chat = Chat(trunk, {"base": head} | others, tokenizer, preprocess, Sampling(**options))
    chat.begin(image)
    chat.loop()
    return chat, capsys.readouterr().out


def answered(said, name="base"):
    """A head's answers among what a chat printed."""
    return [line.removeprefix(f"{name}: ").removesuffix(" […]") for line in said.splitlines() if line.startswith(f"{name}: ")]


# ---------------------------------------------------------------------------------------------------------------------
# Streaming


@pytest.mark.parametrize("model_type", ("char", "bpe"))
def test_tails_are_the_text(tmp_path, model_type):
    """Put together they are the whole text, with every space; no half character is shown, and nothing waits that is whole."""
    path, text = tmp_path / "tokenizer.model", "Yes,  a dog naïve — 狗 🐕‍🦺 ok"
    with open(path, "wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(["yes a dog and a cat ok naive"] * 9), model_writer=file, model_type=model_type,
            byte_fallback=True, vocab_size=290, hard_vocab_limit=False, remove_extra_whitespaces=False, minloglevel=2)
    tokenizer = Tokenizer(str(path))
    ids = tokenizer.encode(text)
    assert sum(tokenizer.model.is_byte(i) for i in ids) > 10 and tokenizer.decode(ids) == text
    shown = list(tails(iter(ids), tokenizer.decode))
    assert "".join(shown) == text and len(shown) > 10 and "\ufffd" not in "".join(shown)
    for n in range(len(ids)):
        seen, whole = "".join(tails(iter(ids[:n]), tokenizer.decode)), tokenizer.decode(ids[:n])
        assert seen == whole                                                     # an answer that ends there, whatever it ends with
        assert text.startswith("".join(list(tails(iter(ids[:n]), tokenizer.decode))[:-1]))
    assert list(tails(iter([]), tokenizer.decode)) == []


# ---------------------------------------------------------------------------------------------------------------------
# The chat


def test_commands(lively, images, monkeypatch, capsys):
    first, second = images
    lines = [QUESTION, "Why?", "/reset", QUESTION, f"/image {second}", QUESTION, "/image", "/reste", "", "  "]
    _, said = play(lively, first, lines, monkeypatch, capsys, max_new_tokens=12)
    expected = answers(lively, first, [QUESTION, "Why?"], max_new_tokens=12) + 2 * [None]
    expected[2:] = expected[:1] + answers(lively, second, [QUESTION], max_new_tokens=12)
    spoken = answered(said)
    assert spoken == expected and len(set(spoken)) == 3
    assert said.count("/image PATH") == 3 and f"about {second}" in said and f"about {first}" in said


def test_a_bad_picture_changes_nothing(lively, images, tmp_path, monkeypatch, capsys):
    text = tmp_path / "text.jpg"
    text.write_text("no picture")
    lines = [QUESTION, f"/image {tmp_path}/nowhere.jpg", f"/image '{text}'", "What is <image>?", "Why?", "/exit", "never read"]
    _, said = play(lively, images[0], lines, monkeypatch, capsys, max_new_tokens=12)
    errors = [line for line in said.splitlines() if line.startswith("error: ")]
    assert len(errors) == 3 and "nowhere.jpg" in errors[0] and "text.jpg" in errors[1] and "<image>" in errors[2]
    spoken = answered(said)
    assert spoken == answers(lively, images[0], [QUESTION, "Why?"], max_new_tokens=12)
    assert spoken[1] != answers(lively, images[0], ["Why?"], max_new_tokens=12)[0]          # it knows what was said before


def press_ctrl_c(trunk, forward):
    """Ctrl-C in the middle of the model's so-many-th forward. Returns the hook, to be removed."""
    forwards = itertools.count(1)
    return trunk.model.layers[0].register_forward_hook(
        lambda *_: signal.raise_signal(signal.SIGINT) if next(forwards) == forward else None)


def test_ctrl_c(base, images, monkeypatch, capsys):
    """At the prompt: a new prompt. In an answer: the answer ends, what it said is kept, and the next question is answered."""
    hook = press_ctrl_c(base[0], 4)
    lines = [lambda: signal.raise_signal(signal.SIGINT), QUESTION, "Why?"]
    chat, said = play(base, images[0], lines, monkeypatch, capsys, max_new_tokens=9)
    hook.remove()
    conversation, tokenizer = chat.conversations["base"], base[2]
    first, second = answered(said)
    cut = conversation.ids.index(EOS)
    assert first == tokenizer.decode(conversation.ids[cut - 3:cut])              # three of nine tokens
    assert second == tokenizer.decode(conversation.ids[-9:]) and said.count("[…]") == 2


@pytest.mark.parametrize("forward", (1, 4))
def test_ctrl_c_beside_another(lively, images, monkeypatch, capsys, forward):
    """It stops the base's answer, the other's follows. Both remember the same: before the first word, that nothing was asked."""
    trunk, head, tokenizer, preprocess = lively
    other = copy.deepcopy(head)
    other.lm_head.weight.data = head.lm_head.weight.roll(1, 0)
    hook = press_ctrl_c(trunk, forward)
    chat, said = play(lively, images[0], [QUESTION, "Why?"], monkeypatch, capsys, {"other": other}, max_new_tokens=9)
    hook.remove()
    remembered = [QUESTION, "Why?"] if forward == 4 else ["Why?"]
    whole, later = (answers((trunk, other, tokenizer, preprocess), images[0], questions, max_new_tokens=9)
                    for questions in ([QUESTION], remembered))
    assert answered(said, "other") == whole + later[-1:]
    asked = tokenizer.decode([i for i in chat.conversations["base"].ids if i != IMAGE_ID]).count("USER:")
    assert asked == len(remembered) and bool(answered(said)[0]) == (forward == 4)


def test_text_only_and_drawing(base, monkeypatch, capsys):
    trunk, head, tokenizer, preprocess = base
    said = set()
    for seed in (1, 1, 2):
        chat = Chat(trunk, {"base": head}, tokenizer, preprocess, Sampling(temperature=1.5, max_new_tokens=12), seed)
        chat.begin(None)
        chat.ask("Hello?", names=False)
        said.add(capsys.readouterr().out)
    assert len(said) == 2 and all(text.count("\n") == 1 and len(text) > 9 for text in said)


# ---------------------------------------------------------------------------------------------------------------------
# The program


def test_prompt_prints_the_answer_only(base, images, checkpoint):
    """Base and checkpoint, from another folder; --compare puts both behind their names."""
    trunk, head, tokenizer, preprocess = base
    program = os.path.join(ROOT, "model.py")
    options = ["--image", images[0], "--prompt", QUESTION, "--max_new_tokens", 9]
    said = succeeds("python", program, checkpoint, *options, "--compare", cwd="/")
    (by_base,) = answers(base, images[0], [QUESTION], max_new_tokens=9)
    first, second = said.splitlines()
    assert first.removesuffix(" […]") == f"base: {by_base}" and second.startswith("other: ")
    alone = succeeds("python", program, checkpoint, *options, cwd="/")
    assert f"other: {alone}" == second.removesuffix(" […]") + "\n" and alone != by_base + "\n"


@pytest.mark.parametrize("flags", (
    {"temperature": 1.5, "top_p": 0.9, "top_k": 7, "repetition_penalty": 1.3, "no_repeat_ngram_size": 3, "max_new_tokens": 11},
    {"num_beams": 3, "no_repeat_ngram_size": 2, "max_new_tokens": 6}), ids=("drawing", "beams"))
def test_flags_arrive(world, base, images, monkeypatch, capsys, flags):
    """What is typed is what samples; nothing else is on stdout."""
    monkeypatch.setattr("signal.signal", lambda *_: None)                        # the rest of the suite wants its Ctrl-C
    typed = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
    monkeypatch.setattr("sys.argv", ["model.py", world.base, "--image", images[0], "--prompt", QUESTION, "--seed", "3", *typed])
    main()
    trunk, head, tokenizer, preprocess = base
    conversation = Conversation(trunk, head, tokenizer, preprocess, images[0])
    greedy = Conversation(trunk, head, tokenizer, preprocess, images[0]).answer(QUESTION, Sampling(max_new_tokens=11))
    said = list(conversation.answer(QUESTION, Sampling(**flags), torch.Generator().manual_seed(3)))
    assert capsys.readouterr().out == tokenizer.decode(said) + "\n"
    assert 1 < len(said) <= flags["max_new_tokens"] and said != list(greedy)[:len(said)]


MISTAKES = {
    "no such checkpoint": (["nowhere"], "nowhere: no such folder"),
    "no such image": (["CKPT", "--image", "nowhere.jpg"], "nowhere.jpg"),
    "top_p": (["CKPT", "--temperature", "1", "--top_p", "1.5"], "--top_p 1.5: must be"),
    "nothing to compare": (["BASE", "--compare"], "--compare"),
}


@pytest.mark.parametrize("what", MISTAKES)
def test_mistakes(world, checkpoint, what):
    words, message = MISTAKES[what]
    words = [{"CKPT": checkpoint, "BASE": world.base}.get(word, word) for word in words]
    done = shell("python", "model.py", *words, "--prompt", "Hello?")
    lines = done.stderr.splitlines()
    assert done.returncode == 1 and done.stdout == "" and "Traceback" not in done.stderr
    assert lines[-1].startswith("error: ") and message in lines[-1]


def test_at_a_terminal(world, images):
    """A real terminal: type a question, press Ctrl-C while it answers, ask again, end with Ctrl-D."""
    process, terminal = pty.fork()
    if process == 0:
        os.chdir(ROOT)
        os.environ |= {"OMP_NUM_THREADS": "1", "TERM": "dumb"}
        os.execv(sys.executable, [sys.executable, "model.py", world.base, "--image", images[0]])
    screen = ""

    def wait_for(text):
        """Read the screen on until `text` has appeared, and go past it."""
        nonlocal screen
        while text not in screen:
            assert select.select([terminal], [], [], 60)[0], f"no {text!r} in a minute"
            screen += os.read(terminal, 4096).decode(errors="replace")
        before, screen = screen.split(text, 1)
        assert "Traceback" not in before

    wait_for("USER: ")
    for question, ends in ((QUESTION, "\x03"), ("Why?", "")):
        os.write(terminal, f"{question}\n".encode())
        wait_for("base: ")
        os.write(terminal, ends.encode())
        wait_for("USER: ")
    os.write(terminal, b"\x04")
    assert os.waitpid(process, 0)[1] == 0
    os.close(terminal)
