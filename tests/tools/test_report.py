"""tools/report.py: the page of an evaluation, its numbers, its selection, its attention, its size.
test_report_browser.py opens it.
"""
import base64
import io
import json
import os
import random
import re
from argparse import Namespace
from html import escape
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from conftest import largest_difference, load_json, shake
from PIL import Image
from programs import ROOT, shell, succeeds

from checkpoints.load import load_base
from checkpoints.save import save_trained
from data import IMAGE, Example, ImageProcessor, PackedDataset
from eval_pope import Evaluation, measure, read_pope, says_yes
from model import Head, LlavaConfig, answer_states
from post_decoder import VARIANTS
from support.questions import SPLITS
from support.templates import SYSTEM_HADPO_EVAL
from tools import report
from tools.report import choose, page, picture, tiles, write_report
from tools.report_tables import gather, hallucinated_words, object_word, reliability

# What a model or a folder's name might say.
EVIL = "</script><img src=x onerror=\"document.title='owned'\"> {{data}} & no dog"
HEADS = {EVIL: "full", "plain": "no_cross_attn", "after": "align_after_align"}


def random_heads(base):
    """Three heads; those with cross-attention prefer some patches."""
    heads = {}
    for seed, (name, variant) in enumerate(HEADS.items()):
        torch.manual_seed(seed)
        block_config = base.config.block_config(**VARIANTS[variant], zero_init=False)
        heads[name] = shake(Head(base.config, block_config), seed)
        if block_config.attention == "cross":
            block = heads[name].post_interaction_block.blocks[0]
            block.cross_attn.q_proj.weight.mul_(10)
    return heads


def make_page(world, folder, described=None):
    """A page about a base and three random heads, one of them named and speaking as badly as can
    be. `described`: descriptions for it.
    """
    model, rng = load_base(world.base), random.Random(0)
    model.heads |= random_heads(model)
    questions = {split: read_pope(world.pope, split) for split in SPLITS.values()}
    distinct = {(q["image"], q["text"]): q["label"] for rows in questions.values() for q in rows}
    texts = "Yes, there is.", "No, there is not.", f"Yes {EVIL}"
    answers = {name: {key: (rng.choice(texts), rng.gauss(3 if label == "yes" else -1, 3))
                      for key, label in distinct.items()} for name in model.heads}
    metrics = {split: {name: measure(rows, answers[name], split) for name in model.heads}
               for split, rows in questions.items()}
    images = os.path.join(world.coco, "val2014")
    evaluation = Evaluation(model, "hadpo", images, questions, answers, metrics)
    path = str(folder / "report.html")
    write_report(path, evaluation, described)
    with open(path, encoding="utf-8") as file:
        text = file.read()
    data = r'<script type="application/json" id="data">(.*?)</script>'
    gallery = json.loads(re.search(data, text, re.S)[1])
    return Namespace(path=path, text=text, gallery=gallery, distinct=distinct, **vars(evaluation))


@pytest.fixture(scope="module")
def made(world, tmp_path_factory):
    return make_page(world, tmp_path_factory.mktemp("report"))


def pixels(url):
    kind, content = re.fullmatch(r"data:image/(png|jpeg);base64,(.*)", url).groups()
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(content))))


# ---- Numbers -------------------------------------------------------------------------------------


def test_object_words():
    assert object_word("Is there a wine glass in the image?") == "wine glass"
    assert object_word("Is there an oven in the imange?") == "oven"
    assert object_word("Can you see it?") == "Can you see it?"


def test_every_answer_is_in_the_gallery(made):
    """Few questions are all shown, each once, with every model's answer, its probability and the
    splits that ask it.
    """
    shown = {(q["image"], q["question"]): q for q in made.gallery["questions"]}
    assert shown.keys() == made.distinct.keys() and len(made.gallery["questions"]) == len(shown)
    assert made.gallery["models"] == list(made.model.heads)
    assert made.gallery["splits"] == list(SPLITS.values())
    for key, q in shown.items():
        assert q["yes"] == (made.distinct[key] == "yes")
        assert q["splits"] == [split for split, rows in made.questions.items()
                               if key in {(r["image"], r["text"]) for r in rows}]
        for answer, said in zip(q["answers"], made.answers.values(), strict=True):
            text, score = said[key]
            assert answer["text"] == text and answer["yes"] == says_yes(text)
            assert abs(answer["probability"] - 1 / (1 + np.exp(-score))) < 1e-9


def test_moves_and_differences(made):
    for name in HEADS:
        caption = f"<caption>from base to {escape(name)}</caption>"
        table = made.text.split(caption)[1].split("</table>")[0]
        for split, rows in made.questions.items():
            moves = (False, True), (True, False), (True, True), (False, False)
            counts = dict.fromkeys(moves, 0)
            for q in rows:
                key, yes = (q["image"], q["text"]), q["label"] == "yes"
                counts[tuple(says_yes(made.answers[model][key][0]) == yes
                             for model in ("base", name))] += 1
            cells = "".join(f"<td>{n} <small>{100 * n / len(rows):.1f} %</small></td>"
                            for n in counts.values())
            gain = counts[False, True] - counts[True, False]
            row = f'<th scope="row">{split}</th>{cells}<td>{gain:+d}</td>'
            assert row.replace("<td>-", "<td>−") in table
    ours, base = made.metrics["popular"]["plain"], made.metrics["popular"]["base"]
    difference = f"{ours['accuracy'] - base['accuracy']:+.2f}".replace("-", "−")
    assert f"{ours['accuracy']:.2f} <small>{difference}</small>" in made.text
    width = f"{100 * ours['fp'] / 72:.3f}%"
    assert f'style="width:{width}" title="yes, wrong: {ours["fp"]}"' in made.text


def record(image, word, yes, *probabilities):
    answers = [{"text": "Yes" if p > .5 else "No", "yes": p > .5, "probability": p}
               for p in probabilities]
    return {"image": image, "question": f"Is there a {word} in the image?", "word": word,
            "yes": yes, "splits": ["random"], "answers": answers}


def test_hallucinated_words():
    """Dogs are seen wherever a leash is: its count, its share and its companion, against what
    chance would give.
    """
    records = [record(f"{i}", "leash" if i < 4 else "tree", True, .9) for i in range(8)]
    records += [record(f"{i}", "grass", True, .1) for i in range(8)]
    records += [record(f"{i}", "dog", False, .9 if i < 3 else .1) for i in range(8)]
    records += [record("7", "cat", False, .8), record("0", "car", False, .2)]
    expected = [("dog", 3, 8, [("leash", 3, 1.5)]), ("cat", 1, 1, [])]
    assert hallucinated_words(records, 0) == expected


def test_reliability():
    rng = np.random.default_rng(0)
    probabilities, yes = rng.random(500), rng.random(500) < .3
    records = [record("a", "b", bool(y), p) for p, y in zip(probabilities, yes, strict=True)]
    points, error = reliability(records, 0)
    expected, total = [], 0
    for low in range(10):
        inside = (probabilities >= low / 10) & (probabilities < (low + 1) / 10)
        mean, share = probabilities[inside].mean(), yes[inside].mean()
        expected.append((mean, share, inside.sum()))
        total += inside.sum() / 500 * abs(mean - share)
    assert largest_difference("bins", points, np.array(expected)) < 1e-9
    assert abs(error - total) < 1e-9
    assert reliability([record("a", "b", True, 1.)], 0) == ([(1., 1., 1)], 0.)


# ---- Attention -----------------------------------------------------------------------------------


def attention_alone(made, head, question):
    """A question asked alone, unpacked → attention of its last prompt token, (1 + heads, P): the
    mean first.
    """
    path = os.path.join(made.image_folder, question["image"])
    alone = Example(path, [[(f"{IMAGE}\n{question['question']}", None)]])
    batch = PackedDataset([alone], made.model.row_format(SYSTEM_HADPO_EVAL))[[0]]
    hidden_states, features = made.model.trunk(batch)
    last = int(batch.ends[0, 0])
    context = made.model.trunk.image_context(head.block_config, features)
    h, context, _ = answer_states(head, hidden_states, context, batch, torch.tensor([[last]]))
    weights = head.post_interaction_block.attention_weights(h, context)[0, :, 0].numpy()
    return np.concatenate((weights.mean(0, keepdims=True), weights))


def test_maps_are_those_of_the_question_alone(made):
    """Every map in the page against that of its question asked alone, for its last prompt token."""
    worst, peaks = 0, []
    for q in random.Random(0).sample(made.gallery["questions"], 8):
        assert set(q["attention"]) == {"1", "3"}        # base and plain have no cross-attention
        for n, attention in q["attention"].items():
            head = list(made.model.heads.values())[int(n)]
            weights = attention_alone(made, head, q)
            # Mean and four heads of 9 patches.
            strip = pixels(attention["map"]).astype(float) / 255                       # (3, 5 · 3)
            assert strip.shape == (3, 15) and strip.max() == 1
            squares = strip.reshape(3, 5, 3).transpose(1, 0, 2).reshape(5, 9)
            ours = squares * np.array(attention["top"])[:, None]
            most = weights.max(1, keepdims=True)
            difference = largest_difference(q["question"], ours / most, weights / most)
            worst = max(worst, difference)
            peaks.append(weights.max())
    # Half a step of grey, four digits of the maximum.
    assert worst < 0.5 / 255 + 1e-3 and np.mean(peaks) > 0.3


def test_pictures_are_what_the_model_sees(made, tmp_path):
    """Padded to a square with CLIP's mean colour, the patches' grid upon it."""
    Image.new("RGB", (100, 50), (250, 0, 0)).save(tmp_path / "wide.png")
    seen = pixels(picture(made.model.preprocess, str(tmp_path / "wide.png"))).astype(float)
    assert seen.shape == (24, 24, 3)
    assert np.abs(seen[12, 12] - (250, 0, 0)).max() < 12
    assert np.abs(seen[1, 12] - (122, 116, 104)).max() < 12
    q = made.gallery["questions"][0]
    assert pixels(made.gallery["pictures"][q["picture"]]).shape == (24, 24, 3)


# ---- The file ------------------------------------------------------------------------------------


class Tags(HTMLParser):
    """[(tag, its attributes), ...] of a page."""

    def __init__(self, text):
        super().__init__()
        self.found = []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.found.append((tag, dict(attributes)))


def test_nothing_said_becomes_markup(made):
    """Scripts and elements are those of the template, whatever models are named and say."""
    tags = Tags(made.text).found
    assert sum(tag == "script" for tag, _ in tags) == 2
    assert not any(tag in ("img", "link", "iframe", "object") for tag, _ in tags)
    assert not any(name.startswith("on") for _, attributes in tags for name in attributes)
    assert f"cross-attention of {escape(EVIL)} and after." in made.text
    assert made.gallery["models"][1] == EVIL
    assert any(EVIL in a["text"] for q in made.gallery["questions"] for a in q["answers"])
    assert escape(EVIL) in made.text and not re.search(r"\{\{(?!data\}\} &)", made.text)


def test_opens_without_a_network(made):
    # The one address is SVG's name, which nobody fetches.
    assert set(re.findall(r"\w+://[^\"' <]+", made.text)) == {"http://www.w3.org/2000/svg"}
    policy, = (attributes["content"] for _, attributes in Tags(made.text).found
               if attributes.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none'")


def test_selection(monkeypatch):
    """Telling questions first, every fourth one drawn from the others; no more than MOST, and none
    that LIMIT has no room for.
    """
    records = [record(f"{i}", "dog", False, .1, .9 if i % 3 == 0 else .1) for i in range(90)]
    see = "data:,{}".format
    shown, pictures = choose(records, see, 0)
    assert len(shown) == 90 and pictures == {r["image"]: f"data:,{r['image']}" for r in shown}
    telling = [r["answers"][1]["yes"] for r in shown]
    assert telling[:40] == [True, True, True, False] * 10 and not any(telling[40:])
    monkeypatch.setattr(report, "MOST", 20)
    assert choose(records, see, 0)[0] == shown[:20]
    monkeypatch.setattr(report, "LIMIT", 10_500)
    assert choose(records, see, 1000 - len(json.dumps(shown[0])))[0] == shown[:10]


def full_size_questions(rng):
    """500 images × 18 questions; a question has the same label in all splits."""
    words, labels, questions = [f"thing {n}" for n in range(60)], {}, {}
    for split in SPLITS.values():
        questions[split] = []
        for i in range(500):
            for n, word in enumerate(rng.sample(words, 6)):
                image, text = f"{i:012}.jpg", f"Is there a {word} in the image?"
                labels[image, text] = "no" if n % 2 else "yes"
                questions[split].append({"image": image, "text": text})
    for rows in questions.values():
        for q in rows:
            q["label"] = labels[q["image"], q["text"]]
    return questions, labels


def test_full_size_stays_below_ten_megabytes(tmp_path, made):
    """Three models, 32 heads × 576 patches of noise, photographs that compress badly."""
    rng, random_ = np.random.default_rng(0), random.Random(0)
    noise = 40 * rng.standard_normal((4, 480, 640, 3)) + np.linspace(60, 190, 640)[:, None]
    for i, array in enumerate(noise.clip(0, 255).astype(np.uint8)):
        photo = Image.fromarray(array).resize((320, 240)).resize((640, 480))
        photo.save(tmp_path / f"{i}.jpg", quality=90)
    assert 60_000 < os.path.getsize(tmp_path / "0.jpg") < 400_000       # COCO's have 160 kB

    questions, labels = full_size_questions(random_)
    rest = "there may be something of that kind in it."
    answers = {model: {key: (random_.choice(["Yes, ", "No, "]) + rest, random_.gauss(0, 3))
                       for key in labels} for model in ("base", "one", "two")}
    metrics = {split: {model: measure(rows, said, split) for model, said in answers.items()}
               for split, rows in questions.items()}
    records = gather(questions, answers)
    assert len(records) > 7500
    preprocess = made.model.preprocess
    preprocess = ImageProcessor(336, preprocess.mean, preprocess.std)

    def see(image):
        return picture(preprocess, str(tmp_path / f"{int(image[:-4]) % 4}.jpg"))

    shown, pictures = choose(records, see, report.bytes_of_maps(2 * 33, 576))
    maps = [tiles(rng.random((32, 576), dtype=np.float32)) for _ in range(3)]
    attention = {(r["image"], r["question"]): {1: maps[n % 3], 2: maps[(n + 1) % 3]}
                 for n, r in enumerate(shown)}
    model = Namespace(config=LlavaConfig())
    evaluation = Evaluation(model, "hadpo", str(tmp_path), questions, answers, metrics)
    text = page(records, (shown, pictures), attention, evaluation)
    print(f"{len(shown)} questions about {len(pictures)} images, {len(text) / 1e6:.2f} MB; a map "
          f"{len(maps[0]['map'])}, a picture {np.mean([len(p) for p in pictures.values()]):.0f} "
          "characters")
    assert len(text.encode()) < 10_000_000 and len(shown) > 80


def test_typed_by_a_user(made, world, tmp_path, monkeypatch):
    """The page beside the usual output. metrics.json names the checkpoints, so that tools/plots.py
    finds variant and learning rate.
    """
    monkeypatch.setenv("PYTHONPATH", ROOT)
    head = made.model.heads["after"]
    info = {"base": world.base, "fingerprint": made.model.fingerprint,
            "block": vars(head.block_config), "arguments": {"learning_rate": 1e-3}}
    save_trained(str(tmp_path / "after"), head.state_dict(), info, made.model.tokenizer)
    command = ["python", "-m", "tools.report", "after", "--coco_path", world.coco,
               "--pope_path", world.pope, "--max_new_tokens", 3, "--output"]
    said = succeeds(*command, "page.html", cwd=tmp_path, fresh=True)
    assert re.search(r"page.html: (\d+) of \1 questions to look at, 0.\d MB", said)
    metrics = load_json(tmp_path / "after" / "pope" / "metrics.json")
    assert metrics["checkpoints"] == {"after": "after"}
    text = (tmp_path / "page.html").read_text()
    gallery = json.loads(re.search(r'id="data">(.*?)</script>', text, re.S)[1])
    assert all(set(q["attention"]) == {"1"} for q in gallery["questions"])
    succeeds("python", "-m", "tools.plots", "after/pope/metrics.json", "--output", "sweep.svg",
             cwd=tmp_path)
    done = shell(*command, "nowhere/page.html", cwd=tmp_path)
    assert done.returncode == 1 and "distinct questions" not in done.stdout
    assert done.stderr.startswith("error: --output nowhere/page.html")
    assert done.stderr.count("\n") == 1
