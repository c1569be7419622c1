"""Talk to a checkpoint in the terminal, or ask it one question from a script.

    python -m tools.chat tiny/base --image tiny/park.jpg           # words appear one by one
    python -m tools.chat out/stage2 --image tiny/park.jpg --compare    # the base's answer above it
    python -m tools.chat out/stage2 --image photo.jpg --log chat.jsonl    # and keep what was said
    python -m tools.chat out/stage2 --image photo.jpg --prompt "Is there a dog?" > answer.txt
    python -m tools.chat CKPT --model_name_or_path llava-v1.5-7b --temperature 0.2 --top_p 0.9

With `--prompt` only the answer goes to stdout, and where lines come from a pipe only answers do. In
a chat `/image PATH` begins a new conversation about another picture, `/reset` one about the same
picture, and Ctrl-C stops an answer but not the program (with `--compare` the other answer
follows). CKPT is what eval_pope.py takes; without an
image the conversation is in text only. evals/sampling.py tells how tokens are chosen. `--log FILE`
appends every question and answer to a file as JSON lines, so that a closed terminal loses none of
them. The conversation itself (its cache) is not kept: a chat cannot be taken up again.

Follows `llava.serve.cli` of haotian-liu/LLaVA (one image at the head of the conversation, template
`v1`). Deliberately different: greedy unless a temperature is named.
"""
import argparse
import contextlib
import io
import os
import re
import signal
import sys
import textwrap
import time
from dataclasses import fields

try:
    import readline  # noqa: F401    (gives `input` arrow keys and a history; some Pythons lack it)
    import termios
except ImportError:
    termios = None

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # spinning threads stall where cores are shared
import torch

from checkpoints.load import Source, load_all
from checkpoints.quantised import BITS, BITS_HELP
from data import EOS
from evals.sampling import Conversation, Sampling
from support.command_line import Parser
from support.common import InputError, Number, device_and_dtype, run_program
from support.images import check_images
from support.outputs import Lines, check_output_file
from tiny.words import CONTAINS, is_tiny, unknown_words

COMMANDS = """/image PATH: another picture; /reset: from the beginning
Ctrl-C: stop an answer; exit or Ctrl-D: end"""


def tails(tokens, decode):
    """Ids, one by one → the text that each adds, for printing.

    SentencePiece's spaces and bytes have their final form only together, so the whole answer is
    decoded again for every token. A character that is not yet whole is held back.
    """
    ids, shown, text = [], 0, ""
    for token in tokens:
        ids.append(token)
        text = decode(ids)
        whole = len(text.rstrip("\ufffd"))
        if whole > shown:
            yield text[shown:whole]
            shown = whole
    if len(text) > shown:
        yield text[shown:]


@contextlib.contextmanager
def silent_keys():
    """What is typed inside appears at the next prompt, and not between the words of an answer."""
    if termios is None or not sys.stdin.isatty():
        yield
        return
    keys = sys.stdin.fileno()
    before, silent = termios.tcgetattr(keys), termios.tcgetattr(keys)
    silent[3] &= ~termios.ECHO                          # of the local modes
    termios.tcsetattr(keys, termios.TCSANOW, silent)
    try:
        yield
    finally:
        termios.tcsetattr(keys, termios.TCSANOW, before)


def for_people(text):
    """Print what is no answer: to stderr, unless a person reads both."""
    at_terminal = sys.stdin.isatty() and sys.stdout.isatty()
    print(text, file=sys.stdout if at_terminal else sys.stderr, flush=True)


class Chat:
    """Conversations of one or two heads about the same picture, printed as they go.

    `heads` {name: Head} are those of a Llava that answer. `log` (Lines) keeps what is said.
    """

    def __init__(self, model, heads, sampling, seed=None, log=None):
        self.model, self.heads, self.sampling, self.log = model, heads, sampling, log
        self.generator = torch.Generator(next(model.trunk.parameters()).device)
        if seed is None:
            self.generator.seed()
        else:
            self.generator.manual_seed(seed)

    def begin(self, image):
        """A new conversation about `image`, a path or None.

        After an InputError the old one goes on.
        """
        self.conversations = {name: Conversation(self.model, head, image)
                              for name, head in self.heads.items()}
        self.image = image

    def ask(self, question, names):
        """Print every head's answer, behind its name if `names`.

        Ctrl-C stops one answer, and the next head's follows. A head that was stopped before it said
        anything was not asked (sampling.py). Then no head was asked: their later answers are to be
        compared, so they must remember the same. InputError when the question does not fit.
        """
        conversations = self.conversations
        lengths = {name: len(conversation.ids) for name, conversation in conversations.items()}
        for conversation in conversations.values():
            conversation.turn(question)             # raises InputError before anything is printed
        strange = unknown_words(self.model.tokenizer, question)
        if strange:
            for_people(f"note: the tiny world has no word {', '.join(strange)}")
        self.keep(role="user", text=question, image=self.image)
        for name, conversation in conversations.items():
            answer, said = conversation.answer(question, self.sampling, self.generator), ""
            try:
                with silent_keys():
                    if names:
                        print(f"{name}: ", end="", flush=True)
                    for text in tails(answer, self.model.tokenizer.decode):
                        said += text
                        print(text, end="", flush=True)
            except KeyboardInterrupt:
                pass
            finally:                                # also where the terminal is closed
                unfinished = conversation.ids[-1:] != [EOS]
                self.keep(role=name, text=said, finished=not unfinished)
            print(" […]" if names and unfinished else "", flush=True)
        if any(len(conversations[name].ids) == length for name, length in lengths.items()):
            for name, length in lengths.items():
                conversations[name].forget(length)

    def keep(self, **row):
        """Append a row to the log, if there is one. The chat goes on where that fails."""
        now = time.strftime("%Y-%m-%dT%H:%M:%S%z")
        try:
            if self.log:
                self.log.add({"time": now, **row})
        except InputError as e:
            print(f"error: {e}", file=sys.stderr)

    def obey(self, line):
        """Carry out a line that begins with a slash; `loop` sees to exit."""
        command, _, rest = line.partition(" ")
        path = os.path.expanduser(rest.strip().strip("'\""))
        if line == "/reset" or command == "/image" and path:
            self.begin(path or self.image)
            for_people(f"a new conversation about {self.image or 'nothing'}")
        else:
            for_people(COMMANDS)

    def loop(self):
        """Read lines until there are no more."""
        for_people(COMMANDS)
        if is_tiny(self.model.tokenizer):
            for_people(textwrap.fill(CONTAINS, 79))
        prompt = "\nUSER: " if sys.stdin.isatty() and sys.stdout.isatty() else ""
        while True:
            try:
                line = input(prompt).strip()
                line.encode()                       # raises UnicodeError, as input() itself may
                if line.lower() in ("exit", "quit", "/exit", "/quit"):
                    return
                if line.startswith("/"):
                    self.obey(line)
                elif line:
                    self.ask(line, names=True)
            except InputError as e:
                for_people(f"error: {e}")
            except UnicodeError:
                for_people("error: this line is not UTF-8 text, so it was not asked; type it "
                           "again, or set the terminal to UTF-8")
            except KeyboardInterrupt:
                for_people("")
            except EOFError:
                for_people("")
                return


# ---- Command line --------------------------------------------------------------------------------


def flags():
    parser = Parser(__doc__)
    add = parser.add_argument

    def add_number(flag, kind, help):               # the ranges are those of Sampling
        add(flag, type=Number(flag, kind), help=help)

    add("checkpoint", metavar="CKPT", help="trained checkpoint, LoRA adapter, or a base")
    add("--image", help="a picture; without one the conversation is about nothing")
    add("--prompt", metavar="TEXT", help="ask this, print the answer and end")
    add("--compare", action="store_true", help="the base's answer too, above the checkpoint's")
    add("--log", metavar="FILE", help="append what is said to this file, a JSON line per turn (the "
        "conversation itself is not kept)")
    add("--model_name_or_path", help="the base, where it is not the one that the checkpoint names")
    add("--vision_tower", help="CLIP's folder, where base or checkpoint name another")
    add_number("--temperature", float, "0: the likeliest token; else draw one")
    add_number("--top_p", float,
               "with --temperature: draw among the likeliest tokens of this probability together")
    add_number("--top_k", int, "with --temperature: draw among this many; 0: all")
    add_number("--repetition_penalty", float, "above 1: what was said already is less likely")
    add_number("--no_repeat_ngram_size", int,
               "so many tokens in a row never come twice; 0: off")
    add_number("--num_beams", int, "beam search; the answer appears when it is finished")
    add_number("--max_new_tokens", int, "an answer's length at most")
    add("--seed", type=Number("--seed", int, low=0, high=2 ** 63 - 1),
        help="with --temperature: the same answers again")
    add("--bits", type=int, choices=BITS, help=BITS_HELP)
    add("--bf16", action=argparse.BooleanOptionalAction,
        help="bf16, or fp32; default: bf16 on a GPU, fp32 on a CPU")
    parser.set_defaults(**vars(Sampling()))
    return parser


def main():
    parser = flags()
    args = parser.parse_args()
    sampling = Sampling(**{f.name: getattr(args, f.name) for f in fields(Sampling)})
    for name in ("top_p", "top_k"):
        if not sampling.temperature and getattr(sampling, name) != getattr(Sampling(), name):
            raise InputError(f"--{name} {getattr(sampling, name)}: has no effect without "
                             "--temperature, which draws; name both, e.g. --temperature 0.7")
    if args.prompt is not None and not args.prompt.strip():
        parser.error("--prompt is empty")
    if args.prompt and re.search("[\ud800-\udfff]", args.prompt):    # of bytes that are no UTF-8
        raise InputError(f"--prompt {ascii(args.prompt)}: is not UTF-8 text; type it again, or set "
                         "the terminal to UTF-8")
    if args.image:
        check_images([args.image])
    if args.log:
        check_output_file(args.log, "--log")
        if hasattr(signal, "SIGHUP"):               # a closed terminal ends us, behind the log
            signal.signal(signal.SIGHUP, lambda *_: sys.exit(129))
    log = Lines(args.log) if args.log else None
    if args.prompt:
        # A script's Ctrl-C and `| head -c 9` end us as they end any tool.
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        if hasattr(signal, "SIGPIPE"):
            signal.signal(signal.SIGPIPE, signal.SIG_DFL)

    device, dtype = device_and_dtype(args.bf16)
    print(f"loading {args.checkpoint}", file=sys.stderr)
    source = Source([args.checkpoint], args.model_name_or_path, args.vision_tower, args.bits)
    model = load_all(source, device, dtype)
    if args.compare and len(model.heads) < 2:
        raise InputError(f"{args.checkpoint}: is a base itself, so --compare has nothing to set it "
                         "against; leave it out")
    last = list(model.heads)[-1]
    heads = model.heads if args.compare else {last: model.heads[last]}
    chat = Chat(model, heads, sampling, args.seed, log)
    chat.begin(args.image)
    if args.prompt:
        chat.ask(args.prompt, names=args.compare)
    else:
        if isinstance(sys.stdin, io.TextIOWrapper):     # else the lines behind a bad one go, too
            sys.stdin.reconfigure(errors="surrogateescape")
        chat.loop()


if __name__ == "__main__":
    run_program(main)
