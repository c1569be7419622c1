"""tools/chat.py: what appears on the screen and on stdout, letter by letter, and what Ctrl-C and
mistakes leave behind.
"""
import copy
import itertools
import os
import pty
import re
import select
import signal
import sys
from dataclasses import replace

import pytest
import sentencepiece
import torch
from programs import ROOT, shell, succeeds

from checkpoints.load import load_base
from checkpoints.save import save_trained
from data import EOS, IMAGE_ID, Tokenizer
from evals.sampling import Conversation, Sampling
from tiny.words import CONTAINS, unknown_words
from tools.chat import Chat, main, tails

QUESTION = "Is there a dog in the image?"
CHAT = "python", "-m", "tools.chat"


@pytest.fixture(scope="module")
def base(world):
    return load_base(world.base)


@pytest.fixture(scope="module")
def lively(world):
    """The same base with such weights that picture, question and what was said before change what
    it says.
    """
    model = load_base(world.base)
    for parameter in model.trunk.parameters():
        parameter *= 3 if parameter.dim() > 1 else 1
    return model


@pytest.fixture(scope="module")
def images(world):
    folder = os.path.join(world.coco, "val2014")
    return [os.path.join(folder, name) for name in sorted(os.listdir(folder))[:2]]


@pytest.fixture(scope="module")
def checkpoint(world, base, tmp_path_factory):
    """A trained checkpoint over the world's base: another `lm_head`, which says other things."""
    folder = str(tmp_path_factory.mktemp("checkpoints") / "other")
    weight = base.head.lm_head.weight.roll(1, 0)
    info = {"base": world.base, "fingerprint": base.fingerprint}
    save_trained(folder, {"lm_head.weight": weight}, info, base.tokenizer)
    return folder


def answers(model, image, questions, **options):
    """What a conversation with the model's own head says, as texts."""
    conversation, sampling = Conversation(model, model.head, image), Sampling(**options)
    return [model.tokenizer.decode(list(conversation.answer(question, sampling)))
            for question in questions]


@pytest.fixture
def play(monkeypatch, capsys):
    """play(model, image, lines, ...): type lines into a chat → Chat, what was printed.

    A line that is callable is called when it is its turn. Every head of the model answers.
    """
    def play(model, image, lines, **options):
        script = iter(lines)

        def typed(prompt):
            line = next(script, None)
            if line is None:
                raise EOFError
            return line() if callable(line) else line

        monkeypatch.setattr("builtins.input", typed)
        chat = Chat(model, model.heads, Sampling(**options))
        chat.begin(image)
        chat.loop()
        said = capsys.readouterr()
        assert not re.search("^(error|/image|note)", said.out, re.M)    # only answers
        return chat, said.out + said.err
    return play


def answered(said, name="base"):
    """A head's answers among what a chat printed."""
    return [line.removeprefix(f"{name}: ").removesuffix(" […]")
            for line in said.splitlines() if line.startswith(f"{name}: ")]


# ---- Streaming -----------------------------------------------------------------------------------


@pytest.mark.parametrize("model_type", ("char", "bpe"))
def test_tails_are_the_text(tmp_path, model_type):
    """Put together they are the whole text, with every space. No half character is shown, and
    nothing waits that is whole.
    """
    path, text = tmp_path / "tokenizer.model", "Yes,  a dog naïve — 狗 🐕‍🦺 ok"
    with open(path, "wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(["yes a dog and a cat ok naive"] * 9), model_writer=file,
            model_type=model_type, byte_fallback=True, vocab_size=290, hard_vocab_limit=False,
            remove_extra_whitespaces=False, minloglevel=2)
    tokenizer = Tokenizer(str(path))
    ids = tokenizer.encode(text)
    assert sum(tokenizer.model.is_byte(i) for i in ids) > 10 and tokenizer.decode(ids) == text
    shown = list(tails(iter(ids), tokenizer.decode))
    assert "".join(shown) == text and len(shown) > 10 and "\ufffd" not in "".join(shown)
    for n in range(len(ids)):
        # An answer that ends there, whatever it ends with.
        parts = list(tails(iter(ids[:n]), tokenizer.decode))
        assert "".join(parts) == tokenizer.decode(ids[:n])
        assert text.startswith("".join(parts[:-1]))
    assert list(tails(iter([]), tokenizer.decode)) == []


# ---- The chat ------------------------------------------------------------------------------------


def test_commands(lively, images, play):
    first, second = images
    lines = [QUESTION, "Why?", "/reset", QUESTION, f"/image {second}", QUESTION, "/image",
             "/reste", "", "  "]
    _, said = play(lively, first, lines, max_new_tokens=12)
    about_first = answers(lively, first, [QUESTION, "Why?"], max_new_tokens=12)
    about_second = answers(lively, second, [QUESTION], max_new_tokens=12)
    spoken = answered(said)
    assert spoken == about_first + about_first[:1] + about_second and len(set(spoken)) == 3
    assert said.count("/image PATH") == 3
    assert f"about {second}" in said and f"about {first}" in said


def test_a_bad_picture_changes_nothing(lively, images, tmp_path, play):
    text = tmp_path / "text.jpg"
    text.write_text("no picture")
    lines = [QUESTION, f"/image {tmp_path}/nowhere.jpg", f"/image '{text}'", "What is <image>?",
             "Why?", "/exit", "never read"]
    _, said = play(lively, images[0], lines, max_new_tokens=12)
    errors = [line for line in said.splitlines() if line.startswith("error: ")]
    assert len(errors) == 3
    assert "nowhere.jpg" in errors[0] and "text.jpg" in errors[1] and "<image>" in errors[2]
    spoken = answered(said)
    assert spoken == answers(lively, images[0], [QUESTION, "Why?"], max_new_tokens=12)
    # It knows what was said before.
    assert spoken[1] != answers(lively, images[0], ["Why?"], max_new_tokens=12)[0]


def test_words_that_the_tiny_world_does_not_know(base, images, play, byte_tokenizer):
    """They are named; to another model nothing is strange."""
    lines = [QUESTION, "Is there an elephant in the image?", "图中有狗吗？", "quit", "never read"]
    _, said = play(base, images[0], lines, max_new_tokens=3)
    notes = [line.partition("has no word ")[2] for line in said.splitlines() if "note:" in line]
    assert notes == ["an, elephant", "图中有狗吗"] and len(answered(said)) == 3
    assert CONTAINS in " ".join(said.split()) and "a dog" in CONTAINS and "kitchen" in CONTAINS
    assert max(map(len, said.partition("/image")[2].splitlines())) < 80
    assert unknown_words(byte_tokenizer, "an elephant") == []


# ---- Lines that are odd --------------------------------------------------------------------------


def bad_bytes():
    """What `input` does with a line that is not UTF-8, at a terminal that is strict."""
    return b"caf\xe9".decode()


@pytest.mark.parametrize("line", (bad_bytes, "caf\udce9", "/image caf\udce9.jpg", "half \ud83d"))
def test_a_line_that_is_not_utf_8_is_not_asked(lively, images, play, line):
    _, said = play(lively, images[0], [QUESTION, line, "Why?"], max_new_tokens=12)
    errors = [text for text in said.splitlines() if text.startswith("error: ")]
    assert len(errors) == 1 and "is not UTF-8 text" in errors[0]
    assert answered(said) == answers(lively, images[0], [QUESTION, "Why?"], max_new_tokens=12)


def test_bytes_that_are_not_utf_8(world):
    """Through a pipe the lines behind a bad one are asked, and as --prompt nothing is loaded."""
    typed = b"Is there a caf\xe9?\nIs there a dog?\n/image \xff.jpg\n/exit\n"
    command = [*CHAT, world.base, "--max_new_tokens", "4"]
    done = shell(*command, typed=typed)
    assert done.returncode == 0 and "Traceback" not in done.stderr
    assert done.stderr.count("error: this line is not UTF-8 text") == 2
    assert done.stdout.count("base: ") == 1 and "error" not in done.stdout
    done = shell(*command, "--prompt", os.fsdecode(b"caf\xe9?"))
    assert done.returncode == 1 and not done.stdout and "loading" not in done.stderr
    assert done.stderr.startswith("error: --prompt 'caf\\udce9?': is not UTF-8 text")


def test_letters_that_the_terminal_does_not_have(world):
    """An answer that was cut ends with an ellipsis, which Latin-1 does not have."""
    done = shell(*CHAT, world.base, "--max_new_tokens", "4", typed=b"Is there a dog?\n", fresh=True,
                 PYTHONIOENCODING="latin-1:strict")
    assert done.returncode == 0 and "Traceback" not in done.stderr and "[\\u2026]" in done.stdout


def test_a_long_line_in_another_script(lively, images, byte_tokenizer, play):
    model = replace(lively, tokenizer=byte_tokenizer)
    _, said = play(model, images[0], ["มีสุนัขอยู่ในภาพหรือไม่" * 10, "/exit"], max_new_tokens=4)
    assert "error: " in said and "begin a new conversation" in said and not answered(said)


def test_without_a_picture_the_mark_is_text(lively, byte_tokenizer):
    """As in a row of text; about a picture it is refused (test_a_bad_picture_changes_nothing)."""
    conversation = Conversation(replace(lively, tokenizer=byte_tokenizer), lively.head)
    ids = conversation.turn("What is <image>?")
    assert IMAGE_ID not in ids and "USER: What is <image>?" in byte_tokenizer.decode(ids)
    conversation.ids = [*ids, EOS]
    ids = conversation.turn("And <image>?")
    assert IMAGE_ID not in ids and byte_tokenizer.decode(ids).startswith("USER: And <image>?")


def press_ctrl_c(trunk, forward):
    """Ctrl-C in the middle of the model's so-many-th forward. Returns the hook, to be removed."""
    forwards = itertools.count(1)

    def press(*_):
        if next(forwards) == forward:
            signal.raise_signal(signal.SIGINT)

    return trunk.model.layers[0].register_forward_hook(press)


def test_ctrl_c(base, images, play):
    """At the prompt: a new prompt. In an answer: the answer ends, what it said is kept, and the
    next question is answered.
    """
    hook = press_ctrl_c(base.trunk, 4)
    lines = [lambda: signal.raise_signal(signal.SIGINT), QUESTION, "Why?"]
    chat, said = play(base, images[0], lines, max_new_tokens=9)
    hook.remove()
    ids = chat.conversations["base"].ids
    first, second = answered(said)
    cut = ids.index(EOS)
    assert first == base.tokenizer.decode(ids[cut - 3:cut])              # three of nine tokens
    assert second == base.tokenizer.decode(ids[-9:]) and said.count("[…]") == 2


@pytest.mark.parametrize("forward", (1, 4))
def test_ctrl_c_beside_another(lively, images, play, forward):
    """It stops the base's answer, the other's follows. Both remember the same: before the first
    word, that nothing was asked.
    """
    other = copy.deepcopy(lively.head)
    other.lm_head.weight.data = lively.head.lm_head.weight.roll(1, 0)
    hook = press_ctrl_c(lively.trunk, forward)
    both = replace(lively, heads=lively.heads | {"other": other})
    chat, said = play(both, images[0], [QUESTION, "Why?"], max_new_tokens=9)
    hook.remove()
    remembered = [QUESTION, "Why?"] if forward == 4 else ["Why?"]
    alone = replace(lively, heads={"other": other})
    whole = answers(alone, images[0], [QUESTION], max_new_tokens=9)
    later = answers(alone, images[0], remembered, max_new_tokens=9)
    assert answered(said, "other") == whole + later[-1:]
    ids = [i for i in chat.conversations["base"].ids if i != IMAGE_ID]
    assert lively.tokenizer.decode(ids).count("USER:") == len(remembered)
    assert bool(answered(said)[0]) == (forward == 4)


def test_text_only_and_drawing(base, capsys):
    said = set()
    for seed in (1, 1, 2):
        chat = Chat(base, base.heads, Sampling(temperature=1.5, max_new_tokens=12), seed)
        chat.begin(None)
        chat.ask("Hello?", names=False)
        said.add(capsys.readouterr().out)
    assert len(said) == 2 and all(text.count("\n") == 1 and len(text) > 9 for text in said)


# ---- The program ---------------------------------------------------------------------------------


def test_prompt_prints_the_answer_only(base, images, checkpoint, monkeypatch):
    """Base and checkpoint, from another folder; --compare puts both behind their names."""
    monkeypatch.setenv("PYTHONPATH", ROOT)
    options = ["--image", images[0], "--prompt", QUESTION, "--max_new_tokens", 9]
    said = succeeds(*CHAT, checkpoint, *options, "--compare", cwd="/")
    by_base, = answers(base, images[0], [QUESTION], max_new_tokens=9)
    first, second = said.splitlines()
    assert first.removesuffix(" […]") == f"base: {by_base}" and second.startswith("other: ")
    alone = succeeds(*CHAT, checkpoint, *options, cwd="/")
    assert f"other: {alone}" == second.removesuffix(" […]") + "\n" and alone != by_base + "\n"


FLAGS = {"drawing": {"temperature": 1.5, "top_p": 0.9, "top_k": 7, "repetition_penalty": 1.3,
                     "no_repeat_ngram_size": 3, "max_new_tokens": 11},
         "beams": {"num_beams": 3, "no_repeat_ngram_size": 2, "max_new_tokens": 6}}


@pytest.mark.parametrize("how", FLAGS)
def test_flags_arrive(world, base, images, monkeypatch, capsys, how):
    """What is typed is what samples; nothing else is on stdout."""
    flags = FLAGS[how]
    # The rest of the suite wants its Ctrl-C.
    monkeypatch.setattr("signal.signal", lambda *_: None)
    typed = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
    monkeypatch.setattr("sys.argv", ["chat", world.base, "--image", images[0], "--prompt", QUESTION,
                                     "--seed", "3", *typed])
    main()
    greedy = Conversation(base, base.head, images[0])
    greedy = list(greedy.answer(QUESTION, Sampling(max_new_tokens=11)))
    generator = torch.Generator().manual_seed(3)
    conversation = Conversation(base, base.head, images[0])
    said = list(conversation.answer(QUESTION, Sampling(**flags), generator))
    assert capsys.readouterr().out == base.tokenizer.decode(said) + "\n"
    assert 1 < len(said) <= flags["max_new_tokens"] and said != greedy[:len(said)]


MISTAKES = {
    "no such checkpoint": (["nowhere"], "nowhere: no such folder"),
    "no such image": (["CKPT", "--image", "nowhere.jpg"], "nowhere.jpg"),
    "top_p": (["CKPT", "--temperature", "1", "--top_p", "1.5"], "--top_p 1.5: must be"),
    "top_p, nothing is drawn": (["CKPT", "--top_p", "0.9"], "--top_p 0.9: has no effect without"),
    "top_k, nothing is drawn": (["CKPT", "--top_k", "9"], "--top_k 9: has no effect without"),
    "nothing to compare": (["BASE", "--compare"], "--compare"),
}


@pytest.mark.parametrize("what", MISTAKES)
def test_mistakes(world, checkpoint, what):
    words, message = MISTAKES[what]
    words = [{"CKPT": checkpoint, "BASE": world.base}.get(word, word) for word in words]
    done = shell(*CHAT, *words, "--prompt", "Hello?")
    lines = done.stderr.splitlines()
    assert done.returncode == 1 and done.stdout == "" and "Traceback" not in done.stderr
    assert lines[-1].startswith("error: ") and message in lines[-1]


def test_at_a_terminal(world, images):
    """A real terminal: type a question, press Ctrl-C while it answers, ask again, end with Ctrl-D.
    """
    process, terminal = pty.fork()
    if process == 0:
        os.chdir(ROOT)
        os.environ |= {"OMP_NUM_THREADS": "1", "TERM": "dumb"}
        command = [sys.executable, "-m", "tools.chat", world.base, "--image", images[0],
                   "--max_new_tokens", "60"]
        os.execv(sys.executable, command)
    screen = ""

    def wait_for(text):
        """Read the screen on until `text` has appeared, and go past it."""
        nonlocal screen
        while text not in screen:
            ready, _, _ = select.select([terminal], [], [], 60)
            assert ready, f"no {text!r} in a minute"
            screen += os.read(terminal, 4096).decode(errors="replace")
        before, screen = screen.split(text, 1)
        assert "Traceback" not in before
        return before

    wait_for("USER: ")
    for question, ends in ((QUESTION, "\x03"), ("Why?", "")):
        os.write(terminal, f"{question}\n".encode())
        wait_for("base: ")
        os.write(terminal, ends.encode())
        wait_for("USER: ")
    # What is typed while it answers appears once, at the next prompt; the arrow brings it back.
    os.write(terminal, b"/reset\n")
    wait_for("USER: ")
    os.write(terminal, b"Why?\n")
    wait_for("base: ")
    os.write(terminal, b"An elephant?\n")
    assert "elephant" not in wait_for("USER: ")
    assert wait_for("note: the tiny world has no word An, elephant").count("elephant") == 1
    wait_for("USER: ")
    os.write(terminal, b"\x1b[A\n")
    wait_for("An elephant?")
    wait_for("USER: ")
    os.write(terminal, b"caf\xff\n")
    wait_for("error: this line is not UTF-8 text")
    wait_for("USER: ")
    os.write(terminal, b"\x04")
    assert os.waitpid(process, 0)[1] == 0
    os.close(terminal)
