"""The figure of the README: the path of one preference pair to its loss, as SVG.

    python docs/architecture.py            # writes docs/architecture.svg

Its colours are those of support/charts.py, light and dark. The small mask is drawn by the function
that makes the real one (llama.py). All numbers below are pixels.
"""
import os
import sys
from html import escape

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
import torch

from llama import branch_mask
from support.charts import whole_file

OUTPUT = os.path.join(os.path.dirname(os.path.abspath(__file__)), "architecture.svg")
WIDTH, HEIGHT = 1000, 568
IMAGE, CHOSEN, REJECTED, FROZEN, TRAINED = "c3", "c1", "c2", "c0", "c4"      # colours of charts.py
CLASSES = """
svg.chart { font-size: 12.5px; }
svg.chart .name { font-weight: 600; font-size: 14px; }
svg.chart .small { fill: var(--soft); font-size: 11px; }
svg.chart .mono { font-family: ui-monospace, monospace; font-size: 11.5px; }
svg.chart .wire { fill: none; stroke: var(--ink); stroke-width: 1.3; marker-end: url(#tip); }
"""
TIP = ('<marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" '
       'orient="auto"><path d="M0 0L8 4L0 8Z" fill="var(--ink)"/></marker>')


# ---- Shapes --------------------------------------------------------------------------------------


def text(x, y, said, kind="", anchor="middle", colour=None):
    """Text at a point. `kind` is one of the CLASSES, `anchor` SVG's start, middle or end."""
    fill = f' style="fill: var(--{colour})"' if colour else ""
    return (f'<text class="{kind}" x="{x}" y="{y}" text-anchor="{anchor}"{fill}>'
            f'{escape(said)}</text>')


def lines(x, y, step, kind, said):
    """Lines of text below each other."""
    return [text(x, y + step * n, line, kind, "start") for n, line in enumerate(said)]


def rectangle(place, colour, strength=0.14, dashed=False, round=6, border=1.3):
    """A rectangle at `place` (x, y, width, height). `strength` is its opacity inside."""
    x, y, width, height = place
    dashes = ' stroke-dasharray="5 3"' if dashed else ""
    return (f'<rect x="{x}" y="{y}" width="{width}" height="{height}" rx="{round}" '
            f'fill="var(--{colour})" fill-opacity="{strength}" '
            f'stroke="var(--{colour})" stroke-width="{border}"{dashes}/>')


def box(place, name, file, colour):
    """A part of the model, with the file that holds it."""
    x, y, width, height = place
    middle = x + width / 2
    return (rectangle(place, colour) + text(middle, y + height / 2 - 2, name, "name")
            + text(middle, y + height / 2 + 15, file, "small"))


def wire(path):
    return f'<path class="wire" d="{path}"/>'


def cells(x, y, count, colour):
    """Tokens of a row, one every 14 pixels."""
    return "".join(rectangle((x + 14 * n, y, 12, 20), colour, 0.35, round=2) for n in range(count))


# ---- Parts of the figure -------------------------------------------------------------------------


def draw_image():
    """The picture, the tower, and the two ways of its features."""
    out = []
    for n in range(36):
        place = 24 + 14 * (n % 6), 52 + 14 * (n // 6), 12, 12
        out.append(rectangle(place, IMAGE, 0.6 if n in (13, 14, 19, 20, 28) else 0.12, round=1))
    return [*out, text(24, 40, "image, in patches", anchor="start"), wire("M114 93H144"),
            box((148, 62, 122, 62), "CLIP tower", "clip_vit.py", FROZEN), wire("M272 93H635V162"),
            text(282, 84, "F: patch features (N, P, 1024)", anchor="start"),
            text(647, 114, "a second look at the image", anchor="start", colour=TRAINED),
            wire("M209 124V150"), box((148, 152, 122, 50), "projector", "model.py", FROZEN),
            wire("M209 202V222H122V252")]


def draw_row():
    """The packed row: a prefix and two branches."""
    return [cells(24, 272, 2, FROZEN), cells(52, 272, 8, IMAGE), cells(164, 272, 3, FROZEN),
            cells(224, 256, 6, CHOSEN), cells(224, 288, 6, REJECTED),
            text(24, 312, "prefix: system, image, question", "small", "start"),
            text(266, 250, "chosen", colour=CHOSEN), text(266, 326, "rejected", colour=REJECTED),
            '<path d="M206 282C214 282 214 266 222 266M206 282C214 282 214 298 222 298" '
            'fill="none" stroke="var(--ink)"/>',
            text(24, 242, "packed row", "name", "start"), wire("M310 282H338")]


def draw_mask():
    """Who sees whom in a row with a prefix of 7 tokens and two answers of 5."""
    prefix, answer, side, out = 7, 5, 7, []
    along = [*range(prefix, prefix + answer)]
    position = torch.tensor([[*range(prefix), *along, *along]])
    branch = torch.tensor([[0] * prefix + [1] * answer + [2] * answer])
    colours = (FROZEN, CHOSEN, REJECTED)
    for i, row in enumerate(branch_mask(position, branch, position, branch)[0, 0].tolist()):
        for j, seen in enumerate(row):
            place = 24 + side * j, 372 + side * i, side - 2, side - 2
            colour, strength = (colours[branch[0, j]], 0.75) if seen else ("faint", 0.15)
            out.append(rectangle(place, colour, strength, round=0, border=0))
    return [*out, *lines(160, 384, 16, "small", (
                "who sees whom (rows: from, columns: to):", "a token sees what is not later,",
                "in the prefix or in its own branch.")),
            *lines(160, 436, 16, "small", ("So prompt and image are read once",
                                           "for both answers.")),
            text(160, 474, "llama.py: branch_mask", "small", "start")]


def draw_heads():
    """The end of the trunk, and the two heads behind it."""
    trunk = [box((342, 226, 96, 112), "LLaMA", "llama.py", FROZEN), wire("M438 282H526"),
             text(475, 242, "h", "name"), text(475, 258, "at answer", "small"),
             text(475, 272, "tokens only", "small")]
    policy = [rectangle((512, 126, 348, 236), TRAINED, 0.05),
              text(846, 148, "head: policy", "name", "end", TRAINED),
              rectangle((530, 166, 210, 178), TRAINED),
              text(635, 186, "post-interaction block", "name"),
              text(635, 202, "post_decoder.py", "small"),
              text(635, 232, "f = LayerNorm(align(F))", "mono"),
              text(635, 266, "a = h + Attention(LN1(h), f)", "mono"),
              text(635, 300, "b = a + W2 SiLU(W1 LN2(a))", "mono"),
              text(635, 332, "starts as the identity: b = h", "small"), wire("M740 282H764"),
              box((768, 252, 78, 60), "lm_head", "model.py", TRAINED)]
    reference = [rectangle((512, 384, 348, 92), FROZEN, 0.05, dashed=True),
                 text(846, 406, "head: reference", "name", "end", FROZEN),
                 *lines(526, 428, 18, "", ("the head as it was before",
                                           "the first step, a frozen copy:",
                                           "no second model, no second pass")),
                 wire("M475 282V430H510"), box((768, 416, 78, 48), "copy", "dpo.py", FROZEN)]
    return trunk + policy + reference


def draw_loss():
    """Four log-probabilities and the loss."""
    out = [wire("M846 282H884"), wire("M846 440H884")]
    for y, name in ((250, "log π"), (408, "log π_ref")):
        out += [rectangle((888, y, 94, 64), FROZEN, 0.05), text(935, y + 18, name, "name"),
                text(935, y + 37, "of chosen", "", colour=CHOSEN),
                text(935, y + 55, "of rejected", "", colour=REJECTED)]
    equation = "loss = −log σ(β (log π/π_ref chosen − log π/π_ref rejected))"
    return [*out, wire("M935 472V496"), wire("M982 282H991V526H984"),
            rectangle((512, 500, 468, 52), CHOSEN, 0.1), text(526, 520, "DPO", "name", "start"),
            text(966, 520, "dpo.py", "small", "end"), text(526, 541, equation, "mono", "start")]


def draw_key():
    """What the colours say."""
    return [rectangle((24, 512, 14, 12), FROZEN, round=2),
            text(46, 523, "frozen: one pass for policy and reference", "", "start"),
            rectangle((24, 534, 14, 12), TRAINED, round=2),
            text(46, 545, "trained: the block (stage 1), and lm_head (stage 2)", "", "start")]


def draw():
    parts = [*draw_image(), *draw_row(), *draw_mask(), *draw_heads(), *draw_loss(), *draw_key()]
    attributes = ' role="img" aria-label="the path of a preference pair to its loss"'
    content = "\n".join([f"<defs>{TIP}</defs>", *parts])
    return whole_file(WIDTH, HEIGHT, content, CLASSES, attributes)


if __name__ == "__main__":
    with open(OUTPUT, "w", encoding="utf-8") as file:
        file.write(draw())
