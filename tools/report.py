"""One page about an evaluation: tables, charts, and a gallery with the attention of the block.

    python -m tools.report tiny/base --output report.html     # then open it; it needs no network
    python -m tools.report out/stage2 --output report.html    # what train.py has made
    python -m tools.report CKPT… --descriptions CKPT/chair --output report.html

It asks what eval_pope.py asks and takes the same flags. The page shows

- all numbers, with their differences from the base;
- how often each model says yes, rightly and wrongly;
- whether its yes-probability can be believed (the logistic function of log p(Yes) - log p(No) at
  the first answer token);
- how answers moved from the base to each checkpoint;
- which objects a model sees that are not there, and what stood beside them;
- descriptions, where evals/chair.py has asked for them (report_descriptions.py);
- questions with every answer. This gallery is a selection, and says so: questions that moved or got
  a false yes come first, every fourth one is drawn from the others, until MOST questions or LIMIT
  bytes are reached. Over a picture lies the cross-attention (post_decoder.py, eq. 2) of the token
  that predicts the answer's first word, computed in a second pass over the shown questions only.

Attention says where the block reads, not why it answers as it does (arXiv 1902.10186). POPE's
questions and splits are those of arXiv 2305.10355, the reliability diagram and its error that of
arXiv 1706.04599, with ten bins of equal width.

`report_template.html` holds the page's HTML, CSS and JavaScript, with `{{marks}}` that `page` fills
in. What a model or a file said is text there and never markup.
"""
import base64
import io
import json
import math
import os
import random
import re
from html import escape

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # spinning threads stall where cores are shared
import numpy as np
import torch
from PIL import Image

from eval_pope import evaluate, flags, labelled_yes, open_prompts
from model import answer_states
from support.charts import STYLE
from support.common import InputError, progress, run_program
from support.outputs import check_output_file, write_text
from support.processes import end_processes
from tools.report_descriptions import read_descriptions, section
from tools.report_tables import (
    answer_bars,
    false_yes,
    gather,
    metric_tables,
    move_tables,
    reliability_charts,
    right,
    word_tables,
)

MOST, LIMIT = 600, 9_000_000        # questions and bytes of the gallery
THUMBNAIL = 224                     # pixels a side at most
ROWS = 8                            # images at once in the attention pass, which keeps no cache
TEMPLATE = os.path.join(os.path.dirname(os.path.abspath(__file__)), "report_template.html")


# ---- Pictures ------------------------------------------------------------------------------------


def data_url(image, kind, **options):
    """A PIL image → a `data:` URL. `kind` is PNG or JPEG, `options` are PIL's."""
    out = io.BytesIO()
    image.save(out, kind, optimize=True, **options)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(out.getvalue()).decode()}"


def picture(preprocess, path):
    """The picture as the model sees it, padded and cut: the patches' grid covers it exactly.

    Of several tiles the first one, which shows all of it.
    """
    pixels = preprocess(path)
    pixels = pixels[0] if pixels.dim() == 4 else pixels
    pixels = pixels.permute(1, 2, 0).numpy()                                             # (S, S, 3)
    pixels = pixels * np.float32(preprocess.std) + np.float32(preprocess.mean)
    image = Image.fromarray((255 * pixels).round().clip(0, 255).astype(np.uint8))
    if image.width <= THUMBNAIL:
        return data_url(image, "JPEG", quality=90, subsampling=0)
    small = image.resize((THUMBNAIL, THUMBNAIL), Image.Resampling.LANCZOS)
    return data_url(small, "JPEG", quality=70)


def tiles(maps):
    """Attention (H, P) → {"map": data URL, "top": maxima}.

    The map is a PNG of 1 + H squares side by side, the heads' mean first. Each square is scaled to
    its maximum: `top` holds the share of attention that white stands for in each.
    """
    maps = np.concatenate((maps.mean(0, keepdims=True), maps))                          # (1 + H, P)
    top, side = maps.max(1), math.isqrt(maps.shape[1])
    grey = (255 * maps / top[:, None]).round().astype(np.uint8)
    strip = np.concatenate(grey.reshape(-1, side, side), axis=1)            # (side, (1 + H) · side)
    return {"map": data_url(Image.fromarray(strip), "PNG"),
            "top": [round(float(t), 4) for t in top]}


# ---- The gallery ---------------------------------------------------------------------------------


def bytes_of_maps(count, patches):
    """The most that `count` maps take in the page: PNG of noise, base64, and their maxima."""
    return count * (1.4 * patches + 40)


def choose(records, see, map_bytes):
    """Which records are shown → records, {image: data URL}.

    `see(image)` gives the URL of a picture; `map_bytes` is what a record's maps take in the page.
    """
    order = random.Random(0).sample(records, len(records))
    models = range(len(records[0]["answers"]))
    telling, others = [], []
    for r in order:
        moved = len({right(r, n) for n in models}) > 1
        if moved or any(false_yes(r, n) for n in models):
            telling.append(r)
        else:
            others.append(r)
    shown, pictures, used = [], {}, 0
    while len(shown) < MOST and (telling or others):
        from_others = others and (len(shown) % 4 == 3 or not telling)
        record = (others if from_others else telling).pop(0)
        new = {} if record["image"] in pictures else {record["image"]: see(record["image"])}
        used += len(json.dumps(record)) + map_bytes + sum(map(len, new.values()))
        if used > LIMIT:
            break
        shown.append(record)
        pictures |= new
    return shown, pictures


@torch.inference_mode()
def look(model, heads, dataset):
    """Where each head's block looks when the answer begins; of several tiles in the first one.

    → for each head a list, one (branches, attention heads, patches) for each row of `dataset`.
    """
    trunk, maps = model.trunk, [[] for _ in heads]
    parameter, rows = next(trunk.parameters()), len(dataset) if heads else 0
    for start in progress(range(0, rows, ROWS), "attention", unit="batch"):
        batch = dataset[range(start, min(start + ROWS, rows))]
        batch = batch.to(parameter.device, parameter.dtype)
        hidden_states, image_features = trunk(batch)
        at, branches = batch.ends.clamp(min=0), (batch.ends >= 0).sum(1)                    # (B, N)
        for found, head in zip(maps, heads, strict=True):
            context = trunk.image_context(head.block_config, image_features)
            h, context, mask = answer_states(head, hidden_states, context, batch, at)
            weights = head.post_interaction_block.attention_weights(h, context, mask)
            weights = weights[..., :trunk.config.vision.num_patches]                  # (B, H, N, P)
            weights = weights.transpose(1, 2).cpu().numpy()                           # (B, N, H, P)
            found += [row[:int(n)] for row, n in zip(weights, branches, strict=True)]
    return maps


# ---- The page ------------------------------------------------------------------------------------


def write_report(path, evaluation, described=None):
    """Write the page about an Evaluation (eval_pope.py) in which every answer has a yes-score.

    `described`: descriptions to show as well, as `read_descriptions` returns them.
    """
    model, protocol, folder = evaluation.model, evaluation.protocol, evaluation.image_folder
    records = gather(evaluation.questions, evaluation.answers)
    looking = {n: head for n, head in enumerate(model.heads.values())
               if head.block_config and head.block_config.attention == "cross"}
    blocks = [head.block_config for head in looking.values()]
    squares = sum(1 + block.depth * block.num_attention_heads for block in blocks)

    def see(image):
        return picture(model.preprocess, os.path.join(folder, image))

    def see_if_there(image):
        return see(image) if os.path.isfile(os.path.join(folder, image)) else None

    shown, pictures = choose(records, see,
                             bytes_of_maps(squares, model.config.vision.num_patches))
    asked = [(r["image"], r["question"]) for r in shown]
    by_image, dataset = open_prompts(model, asked, folder, protocol)
    maps, attention = look(model, list(looking.values()), dataset), {}
    for i, (image, texts) in enumerate(by_image.items()):
        for b, text in enumerate(texts):
            attention[image, text] = {n: tiles(found[i][b])
                                      for n, found in zip(looking, maps, strict=True)}
    texts = section(described, see_if_there) if described else ""
    write_text(path, page(records, (shown, pictures), attention, evaluation, texts))
    print(f"{path}: {len(shown):,} of {len(records):,} questions to look at, "
          f"{os.path.getsize(path) / 1e6:.1f} MB")


def page(records, chosen, attention, evaluation, descriptions=""):
    """The page's text.

    `chosen` are the records of the gallery and {image: data URL}, and `attention`
    {(image, question): {number of the model: tiles}}, which may lack any question. `descriptions`
    is HTML.
    """
    shown, pictures = chosen
    metrics, splits = evaluation.metrics, list(evaluation.questions)
    models = list(next(iter(metrics.values())))
    yes_ratios = {split: labelled_yes(rows[models[0]]) for split, rows in metrics.items()}
    place = {image: n for n, image in enumerate(pictures)}
    questions = [r | {"picture": place[r["image"]],
                      "attention": attention.get((r["image"], r["question"]), {})} for r in shown]
    gallery = {"models": models, "splits": splits,
               "patches": evaluation.model.config.vision.num_patches,
               "pictures": list(pictures.values()), "questions": questions}
    data = json.dumps(gallery, ensure_ascii=False)
    parts = {
        "title": escape(" and ".join(models[1:] or models)),
        "summary": summary(records, models, attention, evaluation.protocol),
        "style": STYLE, "tables": metric_tables(metrics, yes_ratios),
        "bars": answer_bars(metrics, yes_ratios),
        "reliability": reliability_charts(records, models, splits),
        "moves": move_tables(records, models, splits), "words": word_tables(records, models),
        "descriptions": descriptions,
        "shown": (f"{len(shown):,} of {len(records):,} questions"
                  if len(shown) < len(records) else f"All {len(records):,} questions"),
        "data": data.replace("<", "\\u003c")}       # no </script> can end the script element
    with open(TEMPLATE, encoding="utf-8") as file:
        return re.sub(r"\{\{(\w+)\}\}", lambda mark: parts[mark[1]], file.read())


def summary(records, models, attention, protocol):
    """The sentence below the title: what was asked, of whom, and whose attention is shown."""
    looking = [models[n] for n in sorted({n for maps in attention.values() for n in maps})]
    shows = "no block with cross-attention among them."
    if looking:
        shows = f"cross-attention of {escape(' and '.join(looking))}."
    images = len({r["image"] for r in records})
    return (f"{len(records):,} distinct questions about {images:,} images; models "
            f"{escape(', '.join(models))}; protocol {escape(protocol)}; {shows}")


def main():
    parser = flags(__doc__)
    parser.add_argument("--output", required=True, metavar="HTML", help="the page to write")
    parser.add_argument("--descriptions", metavar="FOLDER",
                        help="a folder of evals/chair.py, to show its texts too")
    args = parser.parse_args()
    if not args.output.endswith((".html", ".htm")):
        raise InputError(f"--output {args.output}: a page of HTML is written; name a file that "
                         "ends with .html")
    check_output_file(args.output, "--output")
    described = read_descriptions(args.descriptions) if args.descriptions else None
    evaluation = evaluate(args)
    if evaluation:                      # it is on rank 0 only
        write_report(args.output, evaluation, described)
        evaluation.journal.remove()
    end_processes()


if __name__ == "__main__":
    run_program(main)
