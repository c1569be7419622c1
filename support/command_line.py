"""The command line of every program: its help, its errors, and what a typing error meant.

    parser = Parser(__doc__)            # a summary, and below it commands, as in this very text
    parser.add_argument("--output_dir", metavar="FOLDER", help="default: out/stageN")
    args = parser.parse_args()          # "--output: no such flag; is --output_dir meant?"
    meant("out/stag2")                  # "is out/stage2 meant?"

Help begins with the summary and the first two commands of a program's docstring, which work as
typed. It fits into 80 columns. A default that argparse knows is added behind a flag's text;
others are told in the text itself. Nothing here imports torch, so that tools/doctor.py can start
without it.
"""
import argparse
import difflib
import os
import re
import sys
import textwrap

COLUMNS, FLAG_COLUMNS = 80, 26
LISTED = 1000           # in a folder with more entries than this, a near name is no hint


class Parser(argparse.ArgumentParser):
    """argparse's, with a help that is made to be read. `doc` is the program's docstring."""

    def __init__(self, doc):
        summary, block = doc.split("\n\n")[:2]
        self.commands = commands_in(block)[:2]
        super().__init__(prog=program_of(self.commands[0][1]), description=summary,
                         allow_abbrev=False, add_help=False)
        self.add_argument("-h", "--help", action="help", help="print this text")

    def parse_args(self, args=None, namespace=None):
        words = sys.argv[1:] if args is None else list(args)
        for word in words[:words.index("--")] if "--" in words else words:
            flag = word.partition("=")[0]
            if re.fullmatch(r"--?[A-Za-z][\w-]*", flag) and flag not in self.names():
                self.error(f"{flag}: no such flag{near_flag(flag, self.names(hidden=False))}")
        parsed, rest = self.parse_known_args(words, namespace)
        if rest:
            self.error(f"{rest[0]}: belongs to no flag")
        return parsed

    def shown(self):
        """[(title, [flag, …]), …] as the help shows them."""
        groups = [(group.title, [action for action in group._group_actions
                                 if action.help is not argparse.SUPPRESS])
                  for group in self._action_groups]
        return [(title, actions) for title, actions in groups if actions]

    def names(self, hidden=True):
        """The flags' names, also those that the help does not show."""
        actions = self._actions if hidden else [a for _, group in self.shown() for a in group]
        return [name for action in actions for name in action.option_strings]

    # ---- What is printed -------------------------------------------------------------------------

    def format_usage(self):
        needed = [action for _, actions in self.shown() for action in actions
                  if action.required or not action.option_strings]
        needed.sort(key=lambda action: bool(action.option_strings))
        words = [f"[{head(action)}]" if not action.required else head(action) for action in needed]
        return f"usage: {' '.join([self.prog, *words, '[flags]'])}\n"

    def format_help(self):
        lines = [*wrapped(self.description), ""]
        for comment, command in self.commands:
            lines += [f"  # {comment}"] * bool(comment)
            lines += [f"  {line}" for line in command.splitlines()]
        lines += ["", self.format_usage().strip()]
        for title, actions in self.shown():
            title = {"positional arguments": "what it works on", "options": "flags"}.get(title,
                                                                                         title)
            lines += ["", f"{title}:"]
            for action in actions:
                lines += told(action)
        return "\n".join(lines) + "\n"

    def print_help(self, file=None):
        """As argparse's, but of several processes only the first prints."""
        if first_process():
            super().print_help(file)

    def error(self, message):
        if first_process():
            message = message.removeprefix("argument ")
            sys.stderr.write(f"{self.format_usage()}error: {message}\n"
                             f"all flags: {self.prog} --help\n")
        sys.exit(2)


# ---- Help ----------------------------------------------------------------------------------------


def commands_in(block):
    """[(comment, command), …] of the indented part of a docstring. A command may have lines."""
    found, lines = [], textwrap.dedent(block).splitlines()
    while lines:
        command = [lines.pop(0)]
        while command[-1].endswith("\\"):
            command.append(lines.pop(0))
        last, _, comment = command[-1].partition("  # ")
        found.append((comment.strip(), "\n".join([*command[:-1], last.rstrip()])))
    return found


def program_of(command):
    """What a command types before its arguments: `python -m tools.chat`, `deepspeed train.py`."""
    return re.match(r"(?:\w+ )*?(?:-m \S+|\S+\.py)", command)[0]


def head(action):
    """A flag with what stands behind it."""
    if action.nargs == 0 or isinstance(action, argparse.BooleanOptionalAction):
        return ", ".join(action.option_strings)
    if action.metavar:
        value = action.metavar
    elif action.choices:
        value = f"{{{','.join(map(str, action.choices))}}}"
    else:
        value = getattr(action.type, "metavar", "PATH")
    value += " …" * (action.nargs in ("+", "*"))
    return " ".join([*action.option_strings[-1:], value])


def told(action):
    """The lines of a flag in the help: two columns, or its text below it where it is long."""
    text, default = action.help, action.default
    if isinstance(default, (int, float)) and not isinstance(default, bool):
        text += f"; default: {default:g}"
    elif isinstance(default, str) and default not in ("", argparse.SUPPRESS):    # -h has no value
        text += f"; default: {default}"
    flag, lines = f"  {head(action)}", wrapped(text, FLAG_COLUMNS)
    if len(flag) < FLAG_COLUMNS - 1:
        return [flag.ljust(FLAG_COLUMNS) + lines[0].strip(), *lines[1:]]
    return [*wrapped(flag, 2), *lines]


def wrapped(text, indent=0):
    """Lines of at most 80 columns."""
    return textwrap.wrap(" ".join(text.split()), COLUMNS, initial_indent=" " * indent,
                         subsequent_indent=" " * indent, break_on_hyphens=False)


def first_process():
    """Whether this is the process that prints, where a launcher has started several."""
    return int(os.environ.get("RANK", 0)) == 0


# ---- Typing errors -------------------------------------------------------------------------------


def near_flag(flag, names):
    """"; is --learning_rate meant?" for --lr, or nothing."""
    plain = {name.lstrip("-"): name for name in names}
    typed = flag.strip("-").replace("-", "_").lower()
    initials = [name for name in plain if "".join(word[0] for word in name.split("_")) == typed]
    inside = [name for name in plain if len(typed) > 2 and typed in name]
    alike = difflib.get_close_matches(typed, plain, 2, 0.6)
    best = [name for name in alike if name == typed] or initials or inside[:2] or alike
    return f"; is {' or '.join(plain[name] for name in best)} meant?" if best else ""


def meant(path):
    """The cure for a path that is not there: the path that it may have meant, if one is near."""
    near = near_path(path)
    return f"is {near} meant?" if near else "check the path"


def near_path(path):
    """The path that is there and most like `path`, or None."""
    parts = os.path.normpath(path).split(os.sep)
    found = "/" if os.path.isabs(path) else ""
    for part in filter(None, parts):
        if not os.path.lexists(os.path.join(found, part)):
            part = near_entry(found or ".", part)
        if part is None:
            return None
        found = os.path.join(found, part)
    return found


def near_entry(folder, name):
    """The entry of a folder whose name is most like `name`, or None."""
    try:
        entries = os.listdir(folder)
    except OSError:
        return None
    by_name = {entry.lower(): entry for entry in sorted(entries)} if len(entries) < LISTED else {}
    near = difflib.get_close_matches(name.lower(), by_name, 1, 0.6)
    return by_name[near[0]] if near else None
