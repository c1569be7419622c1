"""How tools/explain.py prints: lines with a place in the source, columns, pictures of letters."""
import inspect
import itertools
import os
import shutil
import textwrap

import torch.nn.functional as F

from data import IMAGE_ID
from dpo import CHOSEN, REJECTED

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

# Characters of a printed line: as many as a terminal has, and in a file the most.
NARROWEST, WIDEST = 80, 110
WIDTH = min(WIDEST, max(NARROWEST, shutil.get_terminal_size((WIDEST, 24)).columns))
NARROW = WIDTH < WIDEST
COLUMN = WIDTH // 2 - 1         # of two columns side by side
SHADES = " ░▒▓█"
KEPT = 11, 3            # first and last tokens of a long answer that are printed


# ---- Lines ---------------------------------------------------------------------------------------


def place_of(thing, code=None):
    """`file.py:line`, from the root, of a function or class, or of the first line in it that holds
    `code`.
    """
    lines, first = inspect.getsourcelines(thing)
    offset = next(n for n, line in enumerate(lines) if code in line) if code else 0
    return f"{os.path.relpath(inspect.getsourcefile(thing), ROOT)}:{first + offset}"


def line_with_place(text, place=""):
    """A line of text, and at the right margin the place in the source that it is about.

    Where both do not fit, the place stands in the next line.
    """
    if len(text) + 1 + len(place) <= WIDTH:
        return f"{text.ljust(WIDTH - 1 - len(place))} {place}".rstrip()
    return "\n".join([*paragraph(text), place.rjust(WIDTH)])


def paragraph(text):
    """The lines of a text that may be too long for one; its indentation stays."""
    indent = " " * (len(text) - len(text.lstrip()))
    if len(text) <= WIDTH:
        return [text]
    return textwrap.wrap(text.strip(), WIDTH, initial_indent=indent, subsequent_indent=indent)


def tensor_line(name, x, text, place=""):
    """A line about the tensor `x`: its name, its shape, what it is, the place in the source."""
    shape = str(tuple(x.shape)).ljust(12 if NARROW else 15)
    return line_with_place(f"   {name:<{18 if NARROW else 19}}{shape} {text}", place)


def four_digits(x):
    """A number with four digits behind the point; -0.0000 is printed as 0.0000."""
    return f"{round(float(x), 4) + 0.0:.4f}"


def side_by_side(left, right):
    """Two columns of lines of any lengths, the middle of long ones left out."""
    pairs = list(itertools.zip_longest(left, right, fillvalue=""))
    kept = abridged(range(len(pairs)), *KEPT)
    for n in kept:
        if n and n - 1 not in kept:
            yield f"   {'…':<{COLUMN}}…"
        yield f"   {pairs[n][0]:<{COLUMN}}{pairs[n][1]}".rstrip()


# ---- Tokens of a row -----------------------------------------------------------------------------


def abridged(indices, first, last):
    """A list of indices, the middle of a long one left out."""
    indices = list(indices)
    if len(indices) <= first + last:
        return indices
    return indices[:first] + indices[-last:]


def shown_tokens(row):
    """Which tokens the picture of a row's mask shows: some of the prefix, most of each branch."""
    image = [t for t, i in enumerate(row.input_ids) if i == IMAGE_ID]
    text = [t for t, branch in enumerate(row.branch) if branch <= 0 and t not in image]
    shown = sorted(abridged(image, 2, 1) + abridged(text, 1, 3))
    for number in (CHOSEN, REJECTED):
        shown += abridged([t for t, b in enumerate(row.branch) if b == number], *KEPT)
    return shown


def answer_tokens(row, number):
    """[(token of the row, its index among the row's answer tokens), ...] of a branch."""
    tokens = [t for t, branch in enumerate(row.branch) if branch == number]
    indices = [k for k, branch in enumerate(row.target_branch) if branch == number]
    return list(zip(tokens, indices, strict=True))


# ---- Pictures ------------------------------------------------------------------------------------


def mask_picture(mask, groups):
    """A mask (n, n) as n lines of text, ■ = may attend.

    `groups` (n) are the branches of the columns; a gap stands between two of them.
    """
    space = "" if NARROW else " "
    gaps = ["  " if j and groups[j] != groups[j - 1] else "" for j in range(len(groups))]
    lines = []
    for row in mask.tolist():
        cells = [gap + ("■" if seen else "·") + space
                 for gap, seen in zip(gaps, row, strict=True)]
        lines.append("".join(cells).rstrip())
    return lines


def shaded(x, side):
    """Numbers (n, n) as `side` lines of 2 · side characters: smallest blank, largest black."""
    x = F.interpolate(x[None, None].float(), (side, side), mode="area")[0, 0]
    relative = (x - x.min()) / (x.max() - x.min()).clamp(min=1e-12)
    levels = (len(SHADES) * relative).long().clamp(max=len(SHADES) - 1)
    return ["".join(2 * SHADES[level] for level in row) for row in levels.tolist()]
