"""The numbers of tools/report.py, and its tables and charts as HTML.

    records = gather(questions, answers)           # a record per distinct question
    html = move_tables(records, models, splits)    # models and splits are lists of names

In a record, and wherever a number stands for a model, it counts the models from 0, the base. What a
model or a file said is escaped here, so that it is text in the page and never markup.
"""
import math
import re
from collections import Counter, defaultdict
from html import escape

import numpy as np

from eval_pope import COLUMNS, leans, says_yes
from support.charts import Axis, Line, panel

WORDS = 12                          # rows of a table of object words
MOVES = {(False, True): "wrong → right", (True, False): "right → wrong",
         (True, True): "right in both", (False, False): "wrong in both"}
PARTS = {"tp": "yes, right", "fp": "yes, wrong", "tn": "no, right", "fn": "no, wrong"}


# ---- What was said -------------------------------------------------------------------------------


def object_word(question):
    """"Is there a wine glass in the image?" → "wine glass"; a question of another form: itself."""
    found = re.search(r"\ban? (.+?) in the ", question)
    return found[1] if found else question


def gather(questions, answers):
    """POPE's rows and what the models answered → a record per distinct question.

    questions: {split: rows}; answers: {model: {(image, question): (answer, yes-score)}}. A record's
    `answers` are in the order of the models: the text, whether POPE's rule reads it as yes, and the
    yes-probability, which is the logistic function of the yes-score.
    """
    records = {}
    for split, rows in questions.items():
        for q in rows:
            key = q["image"], q["text"]
            if key not in records:
                said = [{"text": text, "yes": says_yes(text),
                         "probability": (1 + math.tanh(score / 2)) / 2}
                        for text, score in (model[key] for model in answers.values())]
                records[key] = {"image": q["image"], "question": q["text"],
                                "word": object_word(q["text"]), "yes": q["label"] == "yes",
                                "splits": [], "answers": said}
            if split not in records[key]["splits"]:
                records[key]["splits"].append(split)
    return list(records.values())


def right(record, model):
    return record["answers"][model]["yes"] == record["yes"]


def false_yes(record, model):
    return record["answers"][model]["yes"] and not record["yes"]


def reliability(records, model):
    """Ten bins of yes-probability → [(mean, share labelled yes, number of records), ...], error.

    Empty bins are left out. The error is the expected calibration error, between 0 and 1.
    """
    bins = defaultdict(list)
    for r in records:
        probability = r["answers"][model]["probability"]
        bins[min(9, int(10 * probability))].append((probability, r["yes"]))
    points = [(*np.mean(pairs, axis=0), len(pairs)) for _, pairs in sorted(bins.items())]
    return points, sum(n * abs(said - true) for said, true, n in points) / len(records)


def hallucinated_words(records, model):
    """Which absent objects a model says yes to, most frequent first.

    Returns [(word, false yeses, times asked though absent, [(companion, n, expected), ...]), ...].
    A companion is another object of the image, known from the image's questions with the label yes.
    It stands beside n of the false yeses. `expected` is how many that would be if the false yeses
    were drawn from all questions about the absent word. At most three companions are listed, all
    of them clearly more frequent than expected.
    """
    present = defaultdict(set)
    for r in records:
        if r["yes"]:
            present[r["image"]].add(r["word"])
    asked, wrong = defaultdict(list), defaultdict(list)
    for r in records:
        if not r["yes"]:
            asked[r["word"]].append(r["image"])
            if false_yes(r, model):
                wrong[r["word"]].append(r["image"])
    rows = []
    for word, images in wrong.items():
        beside = Counter(other for image in images for other in present[image])
        anywhere = Counter(other for image in asked[word] for other in present[image])
        companions = []
        for other, n in beside.items():
            expected = len(images) * anywhere[other] / len(asked[word])
            if n > expected + 0.5:
                companions.append((other, n, expected))
        companions.sort(key=lambda c: (c[2] - c[1], c[0]))
        rows.append((word, len(images), len(asked[word]), companions[:3]))
    return sorted(rows, key=lambda row: (-row[1], row[0]))


# ---- Tables --------------------------------------------------------------------------------------


def html_table(header, rows, caption):
    """A table of cells that are HTML already; the first cell of a row is its heading."""
    lines = ["".join(f'<th scope="col">{cell}</th>' for cell in header)]
    for first, *rest in rows:
        cells = "".join(f"<td>{cell}</td>" for cell in rest)
        lines.append(f'<th scope="row">{first}</th>{cells}')
    body = "".join(f"<tr>{line}</tr>" for line in lines)
    return (f'<div class="wide" tabindex="0" role="region" aria-label="{caption}"><table>'
            f"<caption>{caption}</caption>{body}</table></div>")


def signed(value, digits=2):
    """A difference with its sign, and with a true minus; of 0 only the place remains."""
    text = f"{value:+.{digits}f}".replace("-", "−") if value else ""
    return f"<small>{text}</small>"


def metric_tables(metrics, yes_ratios):
    """A table per split: every model's numbers, each with its difference from the first model's.

    `metrics` {split: {model: numbers}}, `yes_ratios` {split: percent of the labels}.
    """
    tables = []
    for split, models in metrics.items():
        columns = [c for c in COLUMNS if all(c in row for row in models.values())]
        first, rows = next(iter(models.values())), []
        for name, row in models.items():
            cells = []
            for c in columns:
                digits = 0 if isinstance(row[c], int) else 2
                mark = "(!) " if c == "yes_ratio" and leans(row) else ""
                cells.append(f"{mark}{row[c]:.{digits}f} {signed(row[c] - first[c], digits)}")
            rows.append([escape(name), *cells])
        caption = f"{escape(split)}, labels {yes_ratios[split]:.1f} % yes"
        tables.append(html_table(["model", *(COLUMNS[c] for c in columns)], rows, caption))
    return "".join(tables)


def move_tables(records, models, splits):
    """For every checkpoint: how its answers differ from the first model's, per split."""
    tables = []
    for n, name in enumerate(models[1:], start=1):
        rows = []
        for split in splits:
            moved = Counter((right(r, 0), right(r, n)) for r in records if split in r["splits"])
            total = moved.total()
            cells = [f"{moved[move]:,} <small>{100 * moved[move] / total:.1f} %</small>"
                     for move in MOVES]
            gain = f"{moved[False, True] - moved[True, False]:+d}".replace("-", "−")
            rows.append([escape(split), *cells, gain])
        caption = f"from {escape(models[0])} to {escape(name)}"
        tables.append(html_table(["split", *MOVES.values(), "net gain"], rows, caption))
    return "".join(tables) or "<p>One model alone: nothing could move.</p>"


def word_tables(records, models):
    """For every model: the objects that it most often sees though they are absent."""
    header = ["object", "false yes, of the questions where it is absent",
              "more often beside it than expected"]
    tables = []
    for n, name in enumerate(models):
        rows = []
        for word, wrong, asked, companions in hallucinated_words(records, n)[:WORDS]:
            beside = ", ".join(f"{escape(other)} <small>{k} (expected {chance:.1f})</small>"
                               for other, k, chance in companions)
            bar = f'<span class="share" style="--share:{wrong / asked:.3f}"></span>'
            rows.append([escape(word), f"{wrong} of {asked}{bar}", beside or "–"])
        tables.append(html_table(header, rows, escape(name)) if rows else
                      f"<p>{escape(name)}: no false yes at all.</p>")
    return f'<div class="words">{"".join(tables)}</div>'


# ---- Charts --------------------------------------------------------------------------------------


def answer_bars(metrics, yes_ratios):
    """A bar per split and model: said yes (right, wrong), then said no (right, wrong).

    Where yes ends is the model's yes-ratio; a mark shows the labels'.
    """
    blocks = []
    for split, models in metrics.items():
        rows = []
        for name, row in models.items():
            total = sum(row[part] for part in PARTS)
            bar = "".join(f'<i class="{part}" style="width:{100 * row[part] / total:.3f}%" '
                          f'title="{said}: {row[part]:,}"><span>{row[part]:,}</span></i>'
                          for part, said in PARTS.items())
            words = ", ".join(f"{said} {row[part]:,}" for part, said in PARTS.items())
            rows.append(f'<span>{escape(name)}</span>'
                        f'<div class="bar" role="img" aria-label="{escape(name)}: {words}">{bar}'
                        f'<b style="left:{yes_ratios[split]:.3f}%"></b></div>'
                        f'<span>{row["yes_ratio"]:.1f} % yes</span>'
                        f'<small class="counts">yes: {row["tp"]:,} right, {row["fp"]:,} wrong; '
                        f'no: {row["tn"]:,} right, {row["fn"]:,} wrong</small>')
        blocks.append(f'<h3>{escape(split)}</h3><div class="bars">{"".join(rows)}</div>')
    key = "".join(f'<span><i class="{part}"></i> {said}</span>' for part, said in PARTS.items())
    return (f'{"".join(blocks)}<p class="key">{key}'
            '<span><b></b> where yes would end by the labels</span></p>')


def reliability_charts(records, models, splits):
    """A reliability diagram per split, and the calibration errors.

    Dots are as large as their bins are full.
    """
    charts, errors = [], []
    for split in splits:
        asked, lines, row = [r for r in records if split in r["splits"]], [], []
        for n in range(len(models)):
            points, error = reliability(asked, n)
            x, y, counts = (list(values) for values in zip(*points, strict=True))
            radius = [2 + 6 * math.sqrt(count / len(asked)) for count in counts]
            lines.append(Line(x, y, colour_of(n), radius=radius))
            row.append(f"{100 * error:.1f}")
        charts.append(panel(split, lines, Axis("yes-probability", (-0.04, 1.04)),
                            Axis("share labelled yes", (-0.04, 1.04)), diagonal=True))
        errors.append([escape(split), *row])
    key = "".join(f'<span><i style="background:var(--c{colour_of(n)})"></i> {escape(name)}</span>'
                  for n, name in enumerate(models))
    table = html_table(["split", *map(escape, models)], errors,
                       "expected calibration error, percent")
    return f'<div class="charts">{"".join(charts)}</div><p class="key">{key}</p>{table}'


def colour_of(model):
    """The base is grey; more checkpoints than there are colours share them."""
    return 0 if model == 0 else 1 + (model - 1) % 6
