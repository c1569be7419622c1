"""The part of tools/report.py that shows descriptions: numbers, wrong objects, texts with marks.

    told = read_descriptions("out/stage2/chair")            # what evals/chair.py has written
    html = section(told, see)                               # see(image): the URL of its picture

What a model or a file said is escaped here, so that it is text in the page and never markup. The
texts are a selection, and the page says so: images with a wrong object in any text come first, and
every fourth is drawn from the others.
"""
import os
import random
from collections import Counter
from dataclasses import dataclass
from html import escape

from evals.chair import COLUMNS
from support.common import InputError, field, read_json
from support.images import below
from support.questions import read_list
from tools.report_tables import html_table, signed

MOST, LIMIT = 200, 4_000_000        # images and bytes
WORDS = 12                          # rows of a table of wrong objects


@dataclass
class Told:
    """An evaluation of descriptions, read from its folder."""
    asked: str               # how they were asked for
    metrics: dict            # {model: numbers}
    rows: dict               # {image: [for every model its row]}


def read_descriptions(folder):
    """The files of evals/chair.py → Told. InputError where they are damaged or do not fit."""
    path = os.path.join(folder, "metrics.json")
    values = read_json(path, dict)
    asked, metrics = (field(values, name, kind, path, "all")
                      for name, kind in (("asked", str), ("metrics", dict)))
    if not metrics:
        raise InputError(f"{path}: names no model; run evals/chair.py again")
    for name, numbers in metrics.items():
        for column in COLUMNS:
            field(numbers, column, (int, float), path, name)
    rows = {}
    for count, name in enumerate(metrics):
        file = os.path.join(folder, f"{name}.jsonl")
        for n, row in enumerate(read_list(file, "image", "answer")):
            check_row(row, file, n)
            rows.setdefault(row["image"], []).append(row)
        short = next((image for image, said in rows.items() if len(said) != count + 1), None)
        if short:
            raise InputError(f"{file}: image {short} is not described once by every model; run "
                             "evals/chair.py again")
    return Told(asked, metrics, rows)


def check_row(row, file, n):
    """InputError unless a description's objects stand one behind the other inside its text."""
    below(None, row["image"], f"{file}, row {n}")
    end = 0
    for mention in field(row, "objects", list, file, n):
        place = [field(mention, key, int, file, n) for key in ("start", "end")]
        field(mention, "name", str, file, n)
        field(mention, "there", bool, file, n)
        if not end <= place[0] < place[1] <= len(row["answer"]):
            raise InputError(f"{file}, row {n}: an object at {place} of a text of "
                             f"{len(row['answer'])} letters; run evals/chair.py again")
        end = place[1]


def wrong(row):
    return [mention for mention in row["objects"] if not mention["there"]]


def choose(told, see):
    """The images that are shown → {image: URL of its picture or None}."""
    order = random.Random(0).sample(list(told.rows), len(told.rows))
    telling = [image for image in order if any(wrong(row) for row in told.rows[image])]
    others = [image for image in order if not any(wrong(row) for row in told.rows[image])]
    shown, used = {}, 0
    while len(shown) < MOST and (telling or others):
        from_others = others and (len(shown) % 4 == 3 or not telling)
        image = (others if from_others else telling).pop(0)
        url = see(image)
        used += len(url or "") + 2 * sum(len(row["answer"]) + 300 for row in told.rows[image])
        if used > LIMIT:
            break
        shown[image] = url
    return shown


# ---- HTML ----------------------------------------------------------------------------------------


def marked(row):
    """A description as HTML: wrong objects in <mark>, the others that it names in <b>."""
    parts, end, text = [], 0, row["answer"]
    for mention in row["objects"]:
        word = escape(text[mention["start"]:mention["end"]])
        title = escape(mention["name"], quote=True)
        parts.append(escape(text[end:mention["start"]]))
        parts.append(f"<b>{word}</b>" if mention["there"] else
                     f'<mark title="{title} is not there">{word}</mark>')
        end = mention["end"]
    return "".join(parts) + escape(text[end:]) or "(nothing)"


def numbers_table(told):
    """CHAIR's numbers of every model, each with its difference from the first model's."""
    first, rows = next(iter(told.metrics.values())), []
    for name, row in told.metrics.items():
        cells = []
        for column in COLUMNS:
            digits = 0 if isinstance(row[column], int) else 2
            difference = signed(row[column] - first[column], digits)
            cells.append(f"{row[column]:.{digits}f} {difference}")
        rows.append([escape(name), *cells])
    return html_table(["model", *COLUMNS.values()], rows, "named objects, percent and counts")


def wrong_tables(told):
    """For every model: which objects it names most often though they are not there."""
    tables = []
    for n, name in enumerate(told.metrics):
        named, false = Counter(), Counter()
        for said in told.rows.values():
            named.update(mention["name"] for mention in said[n]["objects"])
            false.update(mention["name"] for mention in wrong(said[n]))
        rows = []
        for word, count in sorted(false.items(), key=lambda pair: (-pair[1], pair[0]))[:WORDS]:
            bar = f'<span class="share" style="--share:{count / named[word]:.3f}"></span>'
            rows.append([escape(word), f"{count} of {named[word]}{bar}"])
        header = ["object", "not there, of the times it is named"]
        tables.append(html_table(header, rows, escape(name)) if rows else
                      f"<p>{escape(name)}: no wrong object at all.</p>")
    return f'<div class="words">{"".join(tables)}</div>'


def article(image, url, rows, models):
    """One image, with the text of every model."""
    there = escape(", ".join(sorted({name for row in rows for name in row.get("shown", [])})))
    picture = f'<img src="{url}" alt="" loading="lazy">' if url else '<p class="soft">(no file)</p>'
    texts = "".join(
        f'<div class="text{" bad" if wrong(row) else ""}"><div class="who"><span>{escape(name)}'
        f'</span><span class="verdict">{len(wrong(row))} of {len(row["objects"])} not there</span>'
        f'</div><div class="said">{marked(row)}</div></div>'
        for name, row in zip(models, rows, strict=True))
    return (f'<article class="described">{picture}<div><p class="soft">{escape(image)}<br>there: '
            f"{there or 'nothing of these classes'}</p>{texts}</div></article>")


def section(told, see):
    """The whole part of the page. `see(image)`: the URL of a picture, or None without a file."""
    models, shown = list(told.metrics), choose(told, see)
    articles = [article(image, url, told.rows[image], models) for image, url in shown.items()]
    options = "".join(f'<option value="{n}">by {escape(name)}</option>'
                      for n, name in enumerate(models))
    return (
        f'<section id="descriptions"><h2>Descriptions</h2><p class="soft">CHAIR: '
        f"{escape(told.asked)}. The small figure is the difference from the first row. CHAIR_i: "
        "objects named that are not there, of all named; CHAIR_s: texts with such an object; "
        "recall: objects that are there and are named. These numbers move with prompt, length and "
        f"decoding.</p>{numbers_table(told)}{wrong_tables(told)}"
        f'<p class="soft">{len(shown):,} of {len(told.rows):,} images: those with a wrong object '
        "in any text first, and every fourth one drawn from the others. <mark>Marked</mark>: named "
        'and not there; <b>bold</b>: named and there.</p><form class="filters"><label>word in the '
        'text <input type="search" autocomplete="off" spellcheck="false" size="14"></label>'
        '<label>wrong object <select><option value="">all</option><option value="any">by any '
        f'model</option>{options}</select></label><button type="reset">Clear</button></form>'
        f'<p><output></output></p>{"".join(articles)}</section>')
