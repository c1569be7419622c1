"""Every program's --help, as a newcomer reads it; and typing errors, which name what was meant."""
import argparse
import glob
import importlib
import os
import re
import shlex
import sys

import pytest
from programs import ROOT

import eval_pope
from support.command_line import COLUMNS, Parser, head, meant, near_flag, told
from support.common import InputError, Number, check_file
from support.images import check_images


def programs():
    """The modules that are started: python FILE, or python -m MODULE."""
    paths = glob.glob("*.py", root_dir=ROOT)
    for folder in ("tools", "evals", "tiny"):
        paths += glob.glob(f"{folder}/*.py", root_dir=ROOT)
    found = []
    for path in paths:
        with open(os.path.join(ROOT, path), encoding="utf-8") as file:
            if '__name__ == "__main__"' in file.read():
                found.append(path.removesuffix(".py").replace("/", "."))
    return sorted(found)


PROGRAMS = programs()


@pytest.fixture
def parser_of(monkeypatch, capsys):
    """A program's name → its Parser, which has printed its help."""
    def parser_of(program):
        parsers, prints = [], Parser.print_help

        def noted(self, file=None):
            parsers.append(self)
            prints(self, file)

        monkeypatch.setattr(Parser, "print_help", noted)
        monkeypatch.setattr(sys, "argv", [program, "--help"])
        with pytest.raises(SystemExit) as end:
            importlib.import_module(program).main()
        assert end.value.code == 0 and len(parsers) == 1
        assert capsys.readouterr().out == parsers[0].format_help()
        return parsers[0]
    return parser_of


def test_all_programs_are_looked_at():
    assert {"train", "eval_pope", "tools.chat", "tools.doctor", "tools.explain", "tools.export",
            "tools.merge", "tools.mine", "tools.plots", "tools.report", "evals.chair",
            "evals.score", "evals.shr", "tiny.prepare", "tiny.world"} <= set(PROGRAMS)


@pytest.mark.parametrize("program", PROGRAMS)
def test_help(parser_of, program):
    """At 80 columns; two commands that can be typed; every flag has a text, with one default."""
    parser = parser_of(program)
    text = parser.format_help()
    assert max(map(len, text.splitlines())) <= COLUMNS
    assert len(parser.format_usage()) <= COLUMNS and "None" not in text
    for _, actions in parser.shown():
        for action in actions:
            said = " ".join(told(action))
            assert action.help and said.count("default") <= 1, said
            assert "test" not in action.help.split()


@pytest.mark.parametrize("program", PROGRAMS)
def test_the_commands_work_as_typed(parser_of, program, monkeypatch):
    """They start this program, with flags that it has, on what is there: the base that comes with
    the code, or what `deepspeed train.py --stage 2` and `eval_pope.py` leave in out/.
    """
    parser = parser_of(program)
    monkeypatch.chdir(ROOT)
    assert len(parser.commands) == 2
    for _, command in parser.commands:
        assert command.startswith(parser.prog) and "…" not in command
        assert parser.prog.split()[-1] in (f"{program}.py", program)
        words = shlex.split(command.removeprefix(parser.prog).replace("\\\n", " "))
        parser.parse_args(words)
        for word in words:
            if word.startswith("tiny/"):
                assert os.path.exists(word), word
            elif "/" in word:
                assert re.match(r"out/(stage2|\*|pope|world|base)\b", word) or "out/*" in word


def test_hidden_flags_are_hidden(parser_of):
    parser = parser_of("train")
    assert {"--tiny_sizes", "--tiny_base_steps", "--local_rank"} <= set(parser.names())
    assert "tiny_sizes" not in parser.format_help()
    assert not {"--tiny_sizes", "--tiny_tower"} & set(parser.names(hidden=False))


DOC = """What it does.

    python -m tools.one OUT/first   # a comment
    python -m tools.one \\
        OUT/second
    python -m tools.one third

More.
"""


@pytest.fixture
def one():
    parser = Parser(DOC)
    parser.add_argument("checkpoints", nargs="+", metavar="CKPT", help="what is asked")
    parser.add_argument("--output", required=True, metavar="SVG", help="the file to write")
    parser.add_argument("--learning_rate", type=Number("--learning_rate", float), help="of steps")
    parser.add_argument("--num_train_epochs", type=Number("--num_train_epochs", int), default=0,
                        help="how often")
    parser.add_argument("--set", nargs="+", choices=("random", "adv"), help="which")
    parser.add_argument("--secret", help=argparse.SUPPRESS)
    return parser


def test_usage_and_commands(one):
    assert one.format_usage() == "usage: python -m tools.one CKPT … --output SVG [flags]\n"
    assert one.commands == [("a comment", "python -m tools.one OUT/first"),
                            ("", "python -m tools.one \\\n    OUT/second")]
    text = one.format_help()
    assert "  # a comment\n  python -m tools.one OUT/first\n" in text and "third" not in text
    assert "  --set {random,adv} …    which\n" in text and "--learning_rate X       of st" in text
    assert "how often; default: 0\n" in text and "print this text\n" in text
    assert Parser("Do.\n\n    deepspeed train.py --stage 2\n").prog == "deepspeed train.py"
    assert head(Parser(DOC).add_argument("--bf16", action=argparse.BooleanOptionalAction)) == \
        "--bf16, --no-bf16"


@pytest.mark.parametrize("typed, said", (
    ("a --output x --epochs 1", "--epochs: no such flag; is --num_train_epochs meant?"),
    ("a --output x --lr 1", "--lr: no such flag; is --learning_rate meant?"),
    ("a --outptu x", "--outptu: no such flag; is --output meant?"),
    ("a --output x --learning-rate=1", "--learning-rate: no such flag; is --learning_rate meant?"),
    ("a --output x --learn 1", "--learn: no such flag; is --learning_rate meant?"),
    ("a --output x --secre 1", "--secre: no such flag"),
    ("a --output x --qqqq", "--qqqq: no such flag"),
    ("a --output x -v", "-v: no such flag"),
    ("a --output x --learning_rate 1 b", "b: belongs to no flag"),
    ("a", "the following arguments are required: --output"),
    ("a --output x --set adverse", "--set: invalid choice: 'adverse' (choose from "),
))
def test_typing_errors(one, capsys, typed, said):
    with pytest.raises(SystemExit) as end:
        one.parse_args(typed.split())
    usage, error, more = capsys.readouterr().err.splitlines()
    assert end.value.code == 2 and error.startswith(f"error: {said}")
    assert usage + "\n" == one.format_usage() and more == "all flags: python -m tools.one --help"
    assert "meant" in said or "meant" not in error


def test_both_names_of_a_split():
    typed = "CKPT --set adversarial adv random".split()
    args = eval_pope.flags(eval_pope.__doc__).parse_args(typed)
    assert args.set == ["adv", "adv", "random"]


def test_values_that_look_like_flags(one):
    assert one.parse_args(["--output", "x", "--", "--odd"]).checkpoints == ["--odd"]
    args = one.parse_args(["a", "--output", "x", "--learning_rate", "-1"])
    assert args.learning_rate == -1
    assert one.parse_args(["a", "--output=--x y"]).output == "--x y"


def test_one_process_speaks(one, capsys, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(SystemExit):
        one.parse_args(["--wrong"])
    one.print_help()
    said = capsys.readouterr()
    assert said.out == said.err == ""


def test_near_flags():
    assert near_flag("--model", ["--model_name_or_path", "--tune"]).endswith(
        "is --model_name_or_path meant?")
    assert near_flag("--image", ["--images", "--image_folder"]).endswith(
        "is --images or --image_folder meant?")
    assert near_flag("--x", ["--max_steps"]) == ""


def test_near_paths(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    os.makedirs("out/stage2/pope")
    (tmp_path / "photo.jpg").write_bytes(b"")
    for typed, near in (("out/stag2", "out/stage2"), ("uot/stage2/pope", "out/stage2/pope"),
                        ("out/stage2/Pope/", "out/stage2/pope"), ("phtoo.jpg", "photo.jpg"),
                        (f"{tmp_path}/photo.jpeg", f"{tmp_path}/photo.jpg")):
        assert meant(typed) == f"is {near} meant?"
    for typed in ("nowhere.jpg", "out/llava-v1.5-7b", "photo.jpg/one", "out/stage2/../xyz"):
        assert meant(typed) == "check the path"
    with pytest.raises(InputError, match="^phtoo.jpg: no such file; is photo.jpg meant.$"):
        check_file("phtoo.jpg")
    with pytest.raises(InputError, match="^nowhere.jpg: no such file; check the path$"):
        check_images(["nowhere.jpg"])
    monkeypatch.setattr("support.command_line.LISTED", 2)       # a name among many is no hint
    assert meant("phtoo.jpg") == "check the path"
