"""Talk to a checkpoint in the terminal, or ask it one question from a script.

    python model.py out/stage2 --image photo.jpg                                    # a chat; words appear as they are chosen
    python model.py out/stage2 --image photo.jpg --compare                          # the base's answer above the checkpoint's
    python model.py out/stage2 --image photo.jpg --prompt "Is there a dog in the image?" > answer.txt
    python model.py CKPT --model_name_or_path llava-v1.5-7b --temperature 0.2 --top_p 0.9

With `--prompt` only the answer goes to stdout. In a chat `/image PATH` begins anew with another picture, `/reset` with the
same one, and Ctrl-C stops an answer and not the program (with `--compare` the other answer follows). CKPT is what
eval_pope.py takes; without an image it is a conversation in text. How tokens are chosen: sampling.py. Follows
`llava.serve.cli` of haotian-liu/LLaVA (one image at the head of the conversation, template `v1`). Deliberately different:
greedy unless a temperature is named.
"""
import argparse
import os
import signal
import sys
from dataclasses import fields

try:
    import readline         # gives `input` arrow keys and a history; some Pythons lack it
except ImportError:
    pass

import torch

from data import EOS, check_images
from eval_pope import load_all
from model import device_and_dtype
from readers import InputError, run_program
from sampling import Conversation, Sampling

COMMANDS = "/image PATH: another picture; /reset: from the beginning; /exit or Ctrl-D: end; Ctrl-C stops an answer"


def tails(tokens, decode):
    """Ids, one by one → the text that each adds, for printing.

    SentencePiece's spaces and bytes have their final form only together, so the whole answer is decoded again for every
    token. A character of which only the first bytes were said is held back.
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


class Chat:
    """Conversations of one or two heads about the same picture, printed as they go."""

    def __init__(self, trunk, heads, tokenizer, preprocess, sampling, seed=None):
        self.trunk, self.heads, self.tokenizer, self.preprocess, self.sampling = trunk, heads, tokenizer, preprocess, sampling
        self.generator = torch.Generator(next(trunk.parameters()).device)
        self.generator.seed() if seed is None else self.generator.manual_seed(seed)

    def begin(self, image):
        """A new conversation about `image`, a path or None. InputError leaves the old one as it was."""
        self.conversations = {name: Conversation(self.trunk, head, self.tokenizer, self.preprocess, image)
                              for name, head in self.heads.items()}
        self.image = image

    def ask(self, question, names):
        """Print every head's answer, behind its name if `names`. Ctrl-C stops one, and the next head's follows.

        A head that was stopped before it said anything was not asked (sampling.py). Then no head was, for what they say
        later is to be compared.
        """
        lengths = {name: len(conversation.ids) for name, conversation in self.conversations.items()}
        for conversation in self.conversations.values():
            conversation.turn(question)                         # what does not fit is said before a name is
        for name, conversation in self.conversations.items():
            print(f"{name}: " if names else "", end="", flush=True)
            try:
                for text in tails(conversation.answer(question, self.sampling, self.generator), self.tokenizer.decode):
                    print(text, end="", flush=True)
            except KeyboardInterrupt:
                pass
            print(" […]" if names and conversation.ids[-1:] != [EOS] else "", flush=True)       # it was stopped or cut
        if any(len(conversation.ids) == lengths[name] for name, conversation in self.conversations.items()):
            for name, conversation in self.conversations.items():
                conversation.forget(lengths[name])

    def obey(self, line):
        """A line that begins with a slash, /exit aside."""
        command, _, rest = line.partition(" ")
        path = os.path.expanduser(rest.strip().strip("'\""))
        if not (command == "/image" and path or line == "/reset"):
            print(COMMANDS)
            return
        self.begin(path or self.image)
        print(f"a new conversation about {self.image or 'nothing'}")

    def loop(self):
        """Read lines until there are no more."""
        print(COMMANDS)
        while True:
            try:
                line = input("\nUSER: ").strip()
                if line == "/exit":
                    return
                if line.startswith("/"):
                    self.obey(line)
                elif line:
                    self.ask(line, names=True)
            except InputError as e:
                print(f"error: {e}")
            except KeyboardInterrupt:
                print()
            except EOFError:
                print()
                return


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], prog="model.py",
                                     epilog="python model.py --explain [CKPT]: instead, one preference pair step by step")
    parser.add_argument("checkpoints", nargs=1, metavar="CKPT", help="trained checkpoint, LoRA adapter, or a base")
    parser.add_argument("--image", help="a picture; without one the conversation is about nothing")
    parser.add_argument("--prompt", help="ask this, print the answer and end")
    parser.add_argument("--compare", action="store_true", help="the base's answer too, above the checkpoint's")
    parser.add_argument("--model_name_or_path", help="the base, where it is not the one that the checkpoint names")
    parser.add_argument("--vision_tower", help="CLIP's folder, where it is not the one that base or checkpoint names")
    parser.add_argument("--temperature", type=float, help="0 (default): the likeliest token; else draw one")
    parser.add_argument("--top_p", type=float, help="draw among the likeliest tokens of this probability together")
    parser.add_argument("--top_k", type=int, help="draw among this many; 0 (default): all")
    parser.add_argument("--repetition_penalty", type=float, help="above 1: what was said already becomes less likely")
    parser.add_argument("--no_repeat_ngram_size", type=int, help="no so many tokens in a row twice; 0 (default): off")
    parser.add_argument("--num_beams", type=int, help="beam search; the answer appears when it is finished")
    parser.add_argument("--max_new_tokens", type=int, help="an answer's length at most; default 512")
    parser.add_argument("--seed", type=int, help="with --temperature: the same answers again")
    parser.add_argument("--bf16", action=argparse.BooleanOptionalAction, help="else fp32; default: bf16 on a GPU, fp32 on a CPU")
    parser.set_defaults(**vars(Sampling()))
    args = parser.parse_args()
    sampling = Sampling(**{f.name: getattr(args, f.name) for f in fields(Sampling)})
    if args.prompt is not None and not args.prompt.strip():
        parser.error("--prompt is empty")
    if args.image:
        check_images([args.image])
    if args.prompt:                                             # Ctrl-C and `| head -c 9` end us as they end any tool
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        if hasattr(signal, "SIGPIPE"):
            signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    device, dtype = device_and_dtype(args.bf16)
    print(f"loading {args.checkpoints[0]}", file=sys.stderr)
    trunk, heads, tokenizer, preprocess = load_all(args, device, dtype)
    if args.compare and len(heads) < 2:
        raise InputError(f"{args.checkpoints[0]}: is a base itself, so --compare has nothing to set it against; leave it out")
    last = list(heads)[-1]
    heads = heads if args.compare else {last: heads[last]}
    chat = Chat(trunk, heads, tokenizer, preprocess, sampling, args.seed)
    chat.begin(args.image)
    if args.prompt:
        chat.ask(args.prompt, names=args.compare)
    else:
        chat.loop()
