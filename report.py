"""One page about an evaluation, to look at instead of into: tables, charts, and a gallery with the block's attention.

    python eval_pope.py CKPT… --report report.html        # then open report.html, from disk, without a network

What it shows: all numbers with their differences from the base; how often each model says yes, rightly and wrongly; whether
its yes-probability (the logistic function of log p(Yes) − log p(No) at the first answer token) can be believed; which objects
it sees that are not there, and what stood beside them; how answers moved; and the questions themselves with every answer. The
gallery is a selection, and says so: questions that moved or got a false yes first, every fourth one drawn from the others,
until MOST questions or LIMIT bytes are reached. Over a picture lies the cross-attention (post_decoder.py, eq. 2) of the token
that predicts the answer's first word, computed in a second pass over the shown questions only.

Attention says where the block reads, not why it answers as it does (arXiv 1902.10186). POPE's questions and splits are those
of arXiv 2305.10355, the reliability diagram and its error that of arXiv 1706.04599, with ten bins of equal width.

The page itself, `report_template.html`, is a file of its own so that it can be read as what it is: HTML, CSS and JavaScript,
with `{{marks}}` that `write_report` fills in. Whatever a model or a file said is text there and never markup.
"""
import base64
import io
import json
import math
import os
import random
import re
from collections import Counter, defaultdict
from html import escape

import numpy as np
import torch
from PIL import Image

from eval_pope import COLUMNS, labels_yes, open_prompts, says_yes
from model import answer_states
from plots import STYLE, Line, leans, panel
from readers import progress

MOST, LIMIT = 600, 9_000_000        # questions and bytes of the gallery
THUMBNAIL = 224                     # pixels a side at most
ROWS = 8                            # images of the attention pass at once; it keeps no cache and needs less than answering did
WORDS = 12                          # rows of the tables of object words
MOVES = {(False, True): "wrong → right", (True, False): "right → wrong", (True, True): "right in both",
         (False, False): "wrong in both"}


# ---------------------------------------------------------------------------------------------------------------------
# What was said


def object_word(question):
    """"Is there a wine glass in the image?" → "wine glass"; a question of another form stands for itself."""
    found = re.search(r"\ban? (.+?) in the ", question)
    return found[1] if found else question


def gather(questions, said):
    """{split: POPE's rows} and {model: {(image, question): (answer, yes-score)}} → a record per distinct question.

    `answers` are in the order of the models: text, whether POPE's rule reads it as yes, yes-probability.
    """
    records = {}
    for split, rows in questions.items():
        for q in rows:
            key = q["image"], q["text"]
            if key not in records:
                answers = [{"text": text, "yes": says_yes(text), "probability": (1 + math.tanh(score / 2)) / 2}
                           for text, score in (model[key] for model in said.values())]
                records[key] = {"image": q["image"], "question": q["text"], "word": object_word(q["text"]),
                                "yes": q["label"] == "yes", "splits": [], "answers": answers}
            if split not in records[key]["splits"]:
                records[key]["splits"].append(split)
    return list(records.values())


def right(record, model):
    return record["answers"][model]["yes"] == record["yes"]


def false_yes(record, model):
    return record["answers"][model]["yes"] and not record["yes"]


def reliability(records, model):
    """[(mean yes-probability, share of questions labelled yes, number)] of ten bins, and the expected calibration error."""
    bins = defaultdict(list)
    for r in records:
        probability = r["answers"][model]["probability"]
        bins[min(9, int(10 * probability))].append((probability, r["yes"]))
    points = [(*np.mean(pairs, axis=0), len(pairs)) for _, pairs in sorted(bins.items())]
    return points, sum(n * abs(said - true) for said, true, n in points) / len(records)


def hallucinated_words(records, model):
    """[(word, false yeses, times asked though absent, [(companion, present at how many of them, expected), ...])], most first.

    A companion is another object of the image, by its questions with the label yes; expected is how many of the false yeses
    would have it beside them if they were drawn from all questions about the absent word. Those above it are listed.
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
        companions = [(other, n, len(images) * anywhere[other] / len(asked[word])) for other, n in beside.items()]
        companions = sorted((c for c in companions if c[1] > c[2] + 0.5), key=lambda c: (c[2] - c[1], c[0]))
        rows.append((word, len(images), len(asked[word]), companions[:3]))
    return sorted(rows, key=lambda row: (-row[1], row[0]))


# ---------------------------------------------------------------------------------------------------------------------
# Tables and charts, as HTML


def html_table(header, rows, caption):
    """Cells are HTML already; the first of a row is its heading."""
    lines = ["".join(f'<th scope="col">{cell}</th>' for cell in header)]
    lines += [f'<th scope="row">{first}</th>' + "".join(f"<td>{cell}</td>" for cell in rest) for first, *rest in rows]
    return (f'<div class="wide" tabindex="0" role="region" aria-label="{caption}"><table><caption>{caption}</caption>'
            + "".join(f"<tr>{line}</tr>" for line in lines) + "</table></div>")


def signed(value, digits=2):
    """A difference with its sign, a true minus; the place stays where there is none."""
    text = f"{value:+.{digits}f}".replace("-", "−") if value else ""
    return f"<small>{text}</small>"


def metric_tables(metrics, yes_ratios):
    """A table per split: every model's numbers, and behind each the difference from the first model's."""
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


def answer_bars(metrics, yes_ratios):
    """A bar per split and model: said yes (right, wrong), then said no (right, wrong); where yes ends is the yes-ratio."""
    parts, blocks = {"tp": "yes, right", "fp": "yes, wrong", "tn": "no, right", "fn": "no, wrong"}, []
    for split, models in metrics.items():
        rows = []
        for name, row in models.items():
            total = sum(row[part] for part in parts)
            bar = "".join(f'<i class="{part}" style="width:{100 * row[part] / total:.3f}%" title="{said}: {row[part]:,}">'
                          f"<span>{row[part]:,}</span></i>" for part, said in parts.items())
            words = ", ".join(f"{said} {row[part]:,}" for part, said in parts.items())
            rows.append(f'<span>{escape(name)}</span><div class="bar" role="img" aria-label="{escape(name)}: {words}">{bar}'
                        f'<b style="left:{yes_ratios[split]:.3f}%"></b></div><span>{row["yes_ratio"]:.1f} % yes</span>')
        blocks.append(f'<h3>{escape(split)}</h3><div class="bars">{"".join(rows)}</div>')
    key = "".join(f'<span><i class="{part}"></i> {said}</span>' for part, said in parts.items())
    return f'{"".join(blocks)}<p class="key">{key}<span><b></b> where yes would end by the labels</span></p>'


def reliability_charts(records, models, splits):
    """A reliability diagram per split, dots as large as their bins are full, and the calibration errors."""
    charts, errors = [], []
    for split in splits:
        asked, lines, row = [r for r in records if split in r["splits"]], [], []
        for n in range(len(models)):
            points, error = reliability(asked, n)
            x, y, counts = (list(values) for values in zip(*points))
            lines.append(Line(x, y, colour_of(n), radius=[2 + 6 * math.sqrt(c / len(asked)) for c in counts]))
            row.append(f"{100 * error:.1f}")
        charts.append(panel(split, lines, "yes-probability", "share labelled yes", (-0.04, 1.04), (-0.04, 1.04), diagonal=True))
        errors.append([escape(split), *row])
    key = "".join(f'<span><i style="background:var(--c{colour_of(n)})"></i> {escape(name)}</span>' for n, name in enumerate(models))
    return (f'<div class="charts">{"".join(charts)}</div><p class="key">{key}</p>'
            + html_table(["split", *map(escape, models)], errors, "expected calibration error, percent"))


def colour_of(model):
    """The base is grey; more checkpoints than there are colours share them."""
    return 0 if model == 0 else 1 + (model - 1) % 6


def move_tables(records, models, splits):
    """For every checkpoint: how its answers differ from the first model's, per split."""
    tables = []
    for n, name in list(enumerate(models))[1:]:
        rows = []
        for split in splits:
            moved = Counter((right(r, 0), right(r, n)) for r in records if split in r["splits"])
            total = moved.total()
            rows.append([escape(split), *(f"{moved[move]:,} <small>{100 * moved[move] / total:.1f} %</small>" for move in MOVES),
                         f"{moved[False, True] - moved[True, False]:+d}".replace("-", "−")])
        tables.append(html_table(["split", *MOVES.values(), "net gain"], rows, f"from {escape(models[0])} to {escape(name)}"))
    return "".join(tables) or "<p>One model alone: nothing could move.</p>"


def word_tables(records, models):
    tables = []
    for n, name in enumerate(models):
        rows = []
        for word, wrong, asked, companions in hallucinated_words(records, n)[:WORDS]:
            beside = ", ".join(f"{escape(other)} <small>{k} (expected {chance:.1f})</small>" for other, k, chance in companions)
            bar = f'<span class="share" style="--share:{wrong / asked:.3f}"></span>'
            rows.append([escape(word), f"{wrong} of {asked}{bar}", beside or "–"])
        header = ["object", "false yes, of the questions where it is absent", "more often beside it than expected"]
        tables.append(html_table(header, rows, escape(name)))
    return f'<div class="words">{"".join(tables)}</div>'


# ---------------------------------------------------------------------------------------------------------------------
# The gallery


def data_url(image, kind, **options):
    out = io.BytesIO()
    image.save(out, kind, optimize=True, **options)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(out.getvalue()).decode()}"


def picture(preprocess, path):
    """The picture as the model sees it, padded and cut, so that the patches' grid covers it exactly."""
    pixels = preprocess(path).permute(1, 2, 0).numpy() * np.float32(preprocess.std) + np.float32(preprocess.mean)      # (S, S, 3)
    image = Image.fromarray((255 * pixels).round().clip(0, 255).astype(np.uint8))
    if image.width <= THUMBNAIL:
        return data_url(image, "JPEG", quality=90, subsampling=0)
    return data_url(image.resize((THUMBNAIL, THUMBNAIL), Image.Resampling.LANCZOS), "JPEG", quality=70)


def bytes_of_maps(count, patches):
    """The most that maps of so many patches take in the page: PNG of noise, base64, and their maxima."""
    return count * (1.4 * patches + 40)


def choose(records, see, map_bytes):
    """Which records are shown → records, {image: data URL}. `see(image)` gives the URL; a record's maps take `map_bytes`."""
    order = random.Random(0).sample(records, len(records))
    models = range(len(records[0]["answers"]))
    telling, others = [], []
    for r in order:
        (telling if len({right(r, n) for n in models}) > 1 or any(false_yes(r, n) for n in models) else others).append(r)
    shown, pictures, used = [], {}, 0
    while len(shown) < MOST and (telling or others):
        record = (others if others and (len(shown) % 4 == 3 or not telling) else telling).pop(0)
        new = {} if record["image"] in pictures else {record["image"]: see(record["image"])}
        used += len(json.dumps(record)) + map_bytes + sum(map(len, new.values()))
        if used > LIMIT:
            break
        shown.append(record)
        pictures |= new
    return shown, pictures


@torch.inference_mode()
def look(trunk, heads, dataset):
    """Where each head's block looks when the answer begins → per head [(branches, attention heads, patches) of each row]."""
    parameter, maps = next(trunk.parameters()), [[] for _ in heads]
    for start in progress(range(0, len(dataset) if heads else 0, ROWS), "attention", unit="batch"):
        batch = dataset[range(start, min(start + ROWS, len(dataset)))].to(parameter.device, parameter.dtype)
        hidden, features = trunk(batch)
        for found, head in zip(maps, heads):
            h, context, _ = answer_states(head, hidden, trunk.image_context(head.block, features), batch, batch.ends.clamp(min=0))
            weights = head.post_interaction_block.attention_weights(h, context).transpose(1, 2).cpu().numpy()      # (B, N, H, P)
            found += [row[:int(n)] for row, n in zip(weights, (batch.ends >= 0).sum(1))]
    return maps


def tiles(maps):
    """Attention (H, P) → PNG of 1 + H squares side by side, the heads' mean first, each scaled to its maximum; the maxima."""
    maps = np.concatenate((maps.mean(0, keepdims=True), maps))
    top, side = maps.max(1), math.isqrt(maps.shape[1])
    grey = (255 * maps / top[:, None]).round().astype(np.uint8).reshape(-1, side, side)                 # (1 + H, side, side)
    return {"map": data_url(Image.fromarray(np.concatenate(grey, axis=1)), "PNG"), "top": [round(float(t), 4) for t in top]}


# ---------------------------------------------------------------------------------------------------------------------
# The page


def write_report(path, trunk, heads, tokenizer, preprocess, questions, said, metrics, image_folder, protocol):
    """Writes the page. `heads`, `said`, `metrics`, `questions`: as eval_pope.py has them; `said` has a yes-score everywhere."""
    records, config = gather(questions, said), trunk.config
    blocks = {n: head.block for n, head in enumerate(heads.values()) if head.block and head.block.attention == "cross"}
    map_bytes = bytes_of_maps(sum(1 + b.depth * b.num_attention_heads for b in blocks.values()), config.vision.num_patches)
    shown, pictures = choose(records, lambda image: picture(preprocess, os.path.join(image_folder, image)), map_bytes)
    asked = [(r["image"], r["question"]) for r in shown]
    by_image, dataset = open_prompts(config, tokenizer, preprocess, asked, image_folder, protocol)
    maps = look(trunk, [list(heads.values())[n] for n in blocks], dataset)
    attention = {(image, text): {n: tiles(found[i][b]) for n, found in zip(blocks, maps)}
                 for i, (image, texts) in enumerate(by_image.items()) for b, text in enumerate(texts)}
    with open(path, "w", encoding="utf-8") as file:
        file.write(page(records, shown, pictures, attention, questions, metrics, protocol, config.vision.num_patches))
    print(f"{path}: {len(shown):,} of {len(records):,} questions to look at, {os.path.getsize(path) / 1e6:.1f} MB")


def page(records, shown, pictures, attention, questions, metrics, protocol, patches):
    """The page's text. `attention`: {(image, question): {model's number: tiles}}, may lack any."""
    models, yes_ratios = list(next(iter(metrics.values()))), labels_yes(questions)
    looking = [models[n] for n in sorted({n for maps in attention.values() for n in maps})]
    place = {image: n for n, image in enumerate(pictures)}
    gallery = {"models": models, "splits": list(questions), "patches": patches, "pictures": list(pictures.values()),
               "questions": [r | {"picture": place[r["image"]], "attention": attention.get((r["image"], r["question"]), {})}
                             for r in shown]}
    parts = {
        "title": escape(" and ".join(models[1:] or models)),
        "summary": f"{len(records):,} distinct questions about {len({r['image'] for r in records}):,} images; models "
                   f"{escape(', '.join(models))}; protocol {escape(protocol)}; "
                   + (f"cross-attention of {escape(' and '.join(looking))}." if looking else "no block with cross-attention among them."),
        "style": STYLE, "tables": metric_tables(metrics, yes_ratios), "bars": answer_bars(metrics, yes_ratios),
        "reliability": reliability_charts(records, models, questions), "moves": move_tables(records, models, questions),
        "words": word_tables(records, models), "shown": f"{len(shown):,}", "all": f"{len(records):,}",
        "data": json.dumps(gallery, ensure_ascii=False).replace("<", "\\u003c")}       # no </script> can end the script element
    with open(os.path.join(os.path.dirname(os.path.abspath(__file__)), "report_template.html"), encoding="utf-8") as file:
        return re.sub(r"\{\{(\w+)\}\}", lambda mark: parts[mark[1]], file.read())
