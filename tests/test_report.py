"""The page of an evaluation: its numbers, its selection, its attention, its size, and how it behaves in a real browser.

The browser is a headless Chromium, driven with selenium; without one of them those tests are skipped and say so.
"""
import base64
import io
import json
import os
import random
import re
import shutil
import time
from argparse import Namespace
from html import escape
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from conftest import ROOT, largest_difference, load_json, shake, shell, succeeds
from PIL import Image

import report
from checkpoint import fingerprint, load_base, save_trained
from data import SYSTEM_HADPO_EVAL, PackedDataset
from eval_pope import SPLITS, labels_yes, measure, says_yes
from model import Head, answer_states
from post_decoder import VARIANTS
from readers import IMAGE, Example, read_pope
from report import choose, gather, hallucinated_words, look, object_word, page, picture, reliability, tiles, write_report

EVIL = "</script><img src=x onerror=\"document.title='owned'\"> {{data}} & no dog"      # what a model or a folder's name might say


@pytest.fixture(scope="module")
def made(world, tmp_path_factory):
    """A page about a base and three random heads, one of them named and speaking as badly as can be."""
    trunk, base, tokenizer, preprocess = load_base(world.base)
    heads, rng = {"base": base}, random.Random(0)
    for seed, (name, variant) in enumerate(((EVIL, "full"), ("plain", "no_cross_attn"), ("after", "align_after_align"))):
        torch.manual_seed(seed)
        heads[name] = shake(Head(trunk.config, trunk.config.block(**VARIANTS[variant], zero_init=False)), seed)
        if heads[name].block.attention == "cross":
            heads[name].post_interaction_block.blocks[0].cross_attn.q_proj.weight.mul_(10)                 # it prefers some patches
    questions = {split: read_pope(world.pope, split) for split in SPLITS.values()}
    distinct = {(q["image"], q["text"]): q["label"] for rows in questions.values() for q in rows}
    answers = "Yes, there is.", "No, there is not.", f"Yes {EVIL}"
    said = {name: {key: (rng.choice(answers), rng.gauss(3 if label == "yes" else -1, 3)) for key, label in distinct.items()}
            for name in heads}
    metrics = {split: {name: measure(rows, said[name], split) for name in heads} for split, rows in questions.items()}
    path, images = str(tmp_path_factory.mktemp("report") / "report.html"), os.path.join(world.coco, "val2014")
    write_report(path, trunk, heads, tokenizer, preprocess, questions, said, metrics, images, "hadpo")
    with open(path, encoding="utf-8") as file:
        text = file.read()
    gallery = json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.S)[1])
    return Namespace(path=path, text=text, gallery=gallery, trunk=trunk, heads=heads, tokenizer=tokenizer, preprocess=preprocess,
                     images=images, questions=questions, said=said, metrics=metrics, distinct=distinct)


def pixels(url):
    kind, content = re.fullmatch(r"data:image/(png|jpeg);base64,(.*)", url).groups()
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(content))))


# ---------------------------------------------------------------------------------------------------------------------
# Numbers


def test_object_words():
    assert object_word("Is there a wine glass in the image?") == "wine glass"
    assert object_word("Is there an oven in the imange?") == "oven"
    assert object_word("Can you see it?") == "Can you see it?"


def test_every_answer_is_in_the_gallery(made):
    """Few questions are all shown, each once, with every model's answer, its probability and the splits that ask it."""
    shown = {(q["image"], q["question"]): q for q in made.gallery["questions"]}
    assert shown.keys() == made.distinct.keys() and len(made.gallery["questions"]) == len(shown)
    assert made.gallery["models"] == list(made.heads) and made.gallery["splits"] == list(SPLITS.values())
    for key, q in shown.items():
        assert q["yes"] == (made.distinct[key] == "yes")
        assert q["splits"] == [s for s, rows in made.questions.items() if key in {(r["image"], r["text"]) for r in rows}]
        for answer, said in zip(q["answers"], made.said.values(), strict=True):
            text, score = said[key]
            assert answer["text"] == text and answer["yes"] == says_yes(text)
            assert abs(answer["probability"] - 1 / (1 + np.exp(-score))) < 1e-9


def test_moves_and_differences(made):
    for name in list(made.heads)[1:]:
        for split, rows in made.questions.items():
            counts = dict.fromkeys(((False, True), (True, False), (True, True), (False, False)), 0)
            for q in rows:
                key, yes = (q["image"], q["text"]), q["label"] == "yes"
                counts[tuple(says_yes(made.said[model][key][0]) == yes for model in ("base", name))] += 1
            cells = "".join(f"<td>{n} <small>{100 * n / len(rows):.1f} %</small></td>" for n in counts.values())
            gain = counts[False, True] - counts[True, False]
            table = made.text.split(f"<caption>from base to {escape(name)}</caption>")[1].split("</table>")[0]
            assert f'<th scope="row">{split}</th>{cells}<td>{gain:+d}</td>'.replace("<td>-", "<td>−") in table
    ours, base = made.metrics["popular"]["plain"], made.metrics["popular"]["base"]
    assert f"{ours['accuracy']:.2f} <small>{ours['accuracy'] - base['accuracy']:+.2f}</small>".replace("-", "−") in made.text
    assert f'style="width:{100 * ours["fp"] / 72:.3f}%" title="yes, wrong: {ours["fp"]}"' in made.text


def record(image, word, yes, *answers):
    return {"image": image, "question": f"Is there a {word} in the image?", "word": word, "yes": yes, "splits": ["random"],
            "answers": [{"text": "Yes" if a > .5 else "No", "yes": a > .5, "probability": a} for a in answers]}


def test_hallucinated_words():
    """Dogs are seen wherever a leash is: its count, its share and its companion, against what chance would give."""
    records = [record(f"{i}", "leash" if i < 4 else "tree", True, .9) for i in range(8)]
    records += [record(f"{i}", "grass", True, .1) for i in range(8)]
    records += [record(f"{i}", "dog", False, .9 if i < 3 else .1) for i in range(8)]
    records += [record("7", "cat", False, .8), record("0", "car", False, .2)]
    assert hallucinated_words(records, 0) == [("dog", 3, 8, [("leash", 3, 1.5)]), ("cat", 1, 1, [])]


def test_reliability():
    rng = np.random.default_rng(0)
    probabilities, yes = rng.random(500), rng.random(500) < .3
    points, error = reliability([record("a", "b", bool(y), p) for p, y in zip(probabilities, yes)], 0)
    expected, total = [], 0
    for low in range(10):
        inside = (probabilities >= low / 10) & (probabilities < (low + 1) / 10)
        expected.append((probabilities[inside].mean(), yes[inside].mean(), inside.sum()))
        total += inside.sum() / 500 * abs(expected[-1][0] - expected[-1][1])
    assert largest_difference("bins", points, np.array(expected)) < 1e-9 and abs(error - total) < 1e-9
    assert reliability([record("a", "b", True, 1.)], 0) == ([(1., 1., 1)], 0.)


# ---------------------------------------------------------------------------------------------------------------------
# Attention


def test_maps_are_those_of_the_question_alone(made):
    """Every map in the page against that of its question asked alone, unpacked, for its last prompt token."""
    worst, config, peaks = 0, made.trunk.config, []
    for q in random.Random(0).sample(made.gallery["questions"], 8):
        assert set(q["attention"]) == {"1", "3"}                                 # base and plain have no cross-attention
        alone = Example(os.path.join(made.images, q["image"]), [[(f"{IMAGE}\n{q['question']}", None)]])
        batch = PackedDataset([alone], made.tokenizer, made.preprocess, config.vision.num_patches, config.max_length,
                              SYSTEM_HADPO_EVAL)[[0]]
        hidden, features = made.trunk(batch)
        for n, head in enumerate(made.heads.values()):
            if str(n) not in q["attention"]:
                continue
            context = made.trunk.image_context(head.block, features)
            h, context, _ = answer_states(head, hidden[:, -1:], context, batch, torch.tensor([[0]]))
            weights = head.post_interaction_block.attention_weights(h, context)[0, :, 0].numpy()           # (H, P)
            weights = np.concatenate((weights.mean(0, keepdims=True), weights))
            attention = q["attention"][str(n)]
            strip = pixels(attention["map"]).astype(float) / 255                 # (3, 5 · 3): mean and four heads of 9 patches
            assert strip.shape == (3, 15) and strip.max() == 1
            ours = strip.reshape(3, 5, 3).transpose(1, 0, 2).reshape(5, 9) * np.array(attention["top"])[:, None]
            most = weights.max(1, keepdims=True)
            worst = max(worst, largest_difference(q["question"], ours / most, weights / most))
            peaks.append(weights.max())
    assert worst < 0.5 / 255 + 1e-3 and np.mean(peaks) > 0.3                     # half a step of grey, four digits of the maximum


def test_pictures_are_what_the_model_sees(made, tmp_path):
    """Padded to a square with CLIP's mean colour, the patches' grid upon it."""
    Image.new("RGB", (100, 50), (250, 0, 0)).save(tmp_path / "wide.png")
    seen = pixels(picture(made.preprocess, str(tmp_path / "wide.png"))).astype(float)
    assert seen.shape == (24, 24, 3)
    assert np.abs(seen[12, 12] - (250, 0, 0)).max() < 12 and np.abs(seen[1, 12] - (122, 116, 104)).max() < 12
    q = made.gallery["questions"][0]
    assert pixels(made.gallery["pictures"][q["picture"]]).shape == (24, 24, 3)


# ---------------------------------------------------------------------------------------------------------------------
# The file


class Tags(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.found = []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.found.append((tag, dict(attributes)))


def test_nothing_said_becomes_markup(made):
    """Scripts and elements are those of the template, whatever models are named and say."""
    tags = Tags(made.text).found
    assert sum(tag == "script" for tag, _ in tags) == 2 and not any(tag in ("img", "link", "iframe", "object") for tag, _ in tags)
    assert not any(name.startswith("on") for _, attributes in tags for name in attributes)
    assert f"cross-attention of {escape(EVIL)} and after." in made.text
    assert made.gallery["models"][1] == EVIL and any(EVIL in a["text"] for q in made.gallery["questions"] for a in q["answers"])
    assert escape(EVIL) in made.text and not re.search(r"\{\{(?!data\}\} &)", made.text)


def test_opens_without_a_network(made):
    addresses = set(re.findall(r"\w+://[^\"' <]+", made.text))
    assert addresses == {"http://www.w3.org/2000/svg"}                           # the name of SVG, which nobody fetches
    policy, = (a["content"] for tag, a in Tags(made.text).found if a.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none'")


def test_selection(monkeypatch):
    """Telling questions first, every fourth one drawn from the others; no more than MOST, and none that LIMIT has no room for."""
    records = [record(f"{i}", "dog", False, .1, .9 if i % 3 == 0 else .1) for i in range(90)]
    see = "data:,{}".format
    shown, pictures = choose(records, see, 0)
    assert len(shown) == 90 and pictures == {f"{i}": f"data:,{i}" for i in [int(r["image"]) for r in shown]}
    telling = [r["answers"][1]["yes"] for r in shown]
    assert telling[:40] == [True, True, True, False] * 10 and not any(telling[40:])
    monkeypatch.setattr(report, "MOST", 20)
    assert choose(records, see, 0)[0] == shown[:20]
    monkeypatch.setattr(report, "LIMIT", 10_500)
    assert choose(records, see, 1000 - len(json.dumps(shown[0])))[0] == shown[:10]


def test_full_size_stays_below_ten_megabytes(tmp_path, made):
    """500 images × 18 questions, three models, 32 heads × 576 patches of noise, photographs that compress badly."""
    rng, random_ = np.random.default_rng(0), random.Random(0)
    preprocess = type(made.preprocess)(336, made.preprocess.mean, made.preprocess.std)
    noise = (40 * rng.standard_normal((4, 480, 640, 3)) + np.linspace(60, 190, 640)[:, None]).clip(0, 255).astype(np.uint8)
    for i, array in enumerate(noise):
        Image.fromarray(array).resize((320, 240)).resize((640, 480)).save(tmp_path / f"{i}.jpg", quality=90)
    assert 60_000 < os.path.getsize(tmp_path / "0.jpg") < 400_000                # COCO's have 160 kB
    words = [f"thing {n}" for n in range(60)]
    questions = {split: [{"image": f"{i:012}.jpg", "text": f"Is there a {word} in the image?", "label": "no" if n % 2 else "yes"}
                         for i in range(500) for n, word in enumerate(random_.sample(words, 6))] for split in SPLITS.values()}
    labels = {(q["image"], q["text"]): q["label"] for rows in questions.values() for q in rows}
    for rows in questions.values():
        for q in rows:
            q["label"] = labels[q["image"], q["text"]]
    said = {model: {key: (random_.choice(["Yes, ", "No, "]) + "there may be something of that kind in it.", random_.gauss(0, 3))
                    for key in labels} for model in ("base", "one", "two")}
    metrics = {split: {model: measure(rows, said[model], split) for model in said} for split, rows in questions.items()}
    records = gather(questions, said)
    assert len(records) > 7500
    see = lambda image: picture(preprocess, str(tmp_path / f"{int(image[:-4]) % 4}.jpg"))
    shown, pictures = choose(records, see, report.bytes_of_maps(2 * 33, 576))
    maps = [tiles(rng.random((32, 576), dtype=np.float32)) for _ in range(3)]
    attention = {(r["image"], r["question"]): {1: maps[n % 3], 2: maps[(n + 1) % 3]} for n, r in enumerate(shown)}
    text = page(records, shown, pictures, attention, questions, metrics, "hadpo", 576)
    print(f"{len(shown)} questions about {len(pictures)} images, {len(text) / 1e6:.2f} MB; a map {len(maps[0]['map'])}, a picture "
          f"{np.mean([len(p) for p in pictures.values()]):.0f} characters")
    assert len(text.encode()) < 10_000_000 and len(shown) > 80


def test_typed_by_a_user(made, world, tmp_path):
    """--report beside the usual output; metrics.json names the checkpoints, so that plots.py finds variant and learning rate."""
    head = made.heads["after"]
    info = {"base": world.base, "fingerprint": fingerprint(made.trunk, made.heads["base"]), "block": vars(head.block),
            "arguments": {"learning_rate": 1e-3}}
    save_trained(str(tmp_path / "after"), head.state_dict(), info, made.tokenizer)
    command = ["python", os.path.join(ROOT, "eval_pope.py"), "after", "--coco_path", world.coco, "--pope_path", world.pope,
               "--max_new_tokens", 3, "--report"]
    said = succeeds(*command, "page.html", cwd=tmp_path)
    assert re.search(r"page.html: (\d+) of \1 questions to look at, 0.\d MB", said)
    assert load_json(tmp_path / "after" / "pope" / "metrics.json")["checkpoints"] == {"after": "after"}
    gallery = json.loads(re.search(r'id="data">(.*?)</script>', (tmp_path / "page.html").read_text(), re.S)[1])
    assert all(set(q["attention"]) == {"1"} for q in gallery["questions"])
    succeeds("python", os.path.join(ROOT, "plots.py"), "after/pope/metrics.json", "--output", "sweep.svg", cwd=tmp_path)
    done = shell(*command, "nowhere/page.html", cwd=tmp_path)
    assert done.returncode == 1 and "distinct questions" not in done.stdout
    assert done.stderr.startswith("error: --report nowhere/page.html") and done.stderr.count("\n") == 1


# ---------------------------------------------------------------------------------------------------------------------
# In a browser


@pytest.fixture(scope="module")
def chromium():
    selenium = pytest.importorskip("selenium", reason="selenium is not installed (requirements-dev.txt)")
    from selenium import webdriver
    program = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    driver = shutil.which("chromedriver")
    if not program or not driver:
        pytest.skip("no Chromium with chromedriver here: apt-get install chromium chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = program
    for flag in ("headless=new", "no-sandbox", "disable-dev-shm-usage", "window-size=1200,1000", "force-device-scale-factor=1"):
        options.add_argument(f"--{flag}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    browser = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    yield browser
    browser.quit()


@pytest.fixture
def browser(chromium, made):
    """The page, opened from disk in a wide window; at the end of a test its console must be empty."""
    chromium.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
    chromium.get("about:blank")
    chromium.get("file://" + made.path)
    yield chromium
    assert chromium.get_log("browser") == []
    assert chromium.title.startswith("POPE: ") and "owned" not in chromium.title.split("onerror")[0]


def until(condition, seconds=5):
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.02)
    assert condition()


def choose_option(browser, field, value):
    browser.execute_script("const e = document.getElementById(arguments[0]); e.value = arguments[1];"
                           "e.dispatchEvent(new Event('input', {bubbles: true}))", field, value)


def cards(browser):
    """(question, image) of all cards, every screenful of them."""
    return browser.execute_script("""while (!document.getElementById("more").hidden) document.getElementById("more").click();
        return [...document.querySelectorAll("#cards .picture")].map(p => [p.question.image, p.question.question])""")


def overlay(browser, selector):
    """Pixels (side, side, 4) of the attention drawn over a picture."""
    side, values = browser.execute_script("""const c = document.querySelector(arguments[0] + " canvas");
        return [c.width, [...c.getContext("2d").getImageData(0, 0, c.width, c.height).data]]""", selector)
    return np.array(values).reshape(side, side, 4)


def press(browser, *keys):
    from selenium.webdriver.common.action_chains import ActionChains
    ActionChains(browser).send_keys(*keys).perform()


def test_filters(browser, made):
    """Each filter alone and two together show exactly the questions that a loop over the answers finds."""
    everything = made.gallery["questions"]
    ok = lambda q, n: q["answers"][n]["yes"] == q["yes"]
    yes = lambda q, n: q["answers"][n]["yes"] and not q["yes"]
    word = everything[0]["word"]
    cases = [({"split": "popular"}, lambda q: "popular" in q["splits"]), ({"moved": "moved"}, lambda q: ok(q, 0) != ok(q, 1)),
             ({"moved": "01"}, lambda q: not ok(q, 0) and ok(q, 1)),
             ({"moved": "10", "checkpoint": "2"}, lambda q: ok(q, 0) and not ok(q, 2)),
             ({"falseyes": "any"}, lambda q: any(yes(q, n) for n in range(4))), ({"falseyes": "2"}, lambda q: yes(q, 2)),
             ({"word": word}, lambda q: q["word"] == word), ({"word": word.upper()}, lambda q: q["word"] == word),
             ({"word": "zebra"}, lambda q: False),
             ({"split": "adversarial", "falseyes": "0"}, lambda q: "adversarial" in q["splits"] and yes(q, 0))]
    assert len(browser.find_elements("css selector", "#cards .card")) == 24 and len(cards(browser)) == len(everything)
    for fields, passes in cases:
        for name, value in fields.items():
            choose_option(browser, name, value)
        expected = [[q["image"], q["question"]] for q in everything if passes(q)]
        assert cards(browser) == expected and (len(expected) < len(everything))
        assert browser.find_element("id", "count").text == f"{len(expected)} of the {len(everything)} questions shown here"
        browser.find_element("css selector", "button[type=reset]").click()
        until(lambda: browser.find_element("id", "count").text.startswith(f"{len(everything)} of"))


def test_answers_are_shown_as_text(browser, made):
    first, q = browser.find_element("css selector", ".card"), made.gallery["questions"][0]
    said = [e.text for e in first.find_elements("css selector", ".answers li > div:last-child")]
    assert said == [a["text"] for a in q["answers"]]
    assert browser.execute_script("return document.querySelectorAll('img').length === document.querySelectorAll('.picture').length")
    verdicts = [e.text for e in first.find_elements("css selector", ".verdict")]
    assert verdicts == ["right" if a["yes"] == q["yes"] else "false yes" if a["yes"] else "missed" for a in q["answers"]]


def test_overlay_on_hover(browser, made):
    from selenium.webdriver.common.action_chains import ActionChains
    picture, q = browser.find_element("css selector", "#cards .picture"), made.gallery["questions"][0]
    canvas = picture.find_element("css selector", "canvas")
    assert canvas.value_of_css_property("opacity") == "0"
    ActionChains(browser).move_to_element(picture).perform()
    until(lambda: canvas.value_of_css_property("opacity") == "1")
    assert canvas.size == picture.find_element("css selector", "img").size       # it covers the picture exactly
    drawn, strip = overlay(browser, "#cards .picture"), pixels(q["attention"]["1"]["map"]).astype(float)
    assert drawn.shape == (3, 3, 4)
    darkness = drawn[:, :, 3].flatten()
    assert (np.argsort(darkness, kind="stable")[0] == np.argmax(strip[:, :3])) and darkness.max() > darkness.min() + 20
    assert largest_difference("darkness", darkness, (195 - 140 * strip[:, :3].flatten() / 255)) <= 1
    assert "mean of 4 heads" in picture.text and made.gallery["models"][1] in picture.text
    press(browser, "hh")
    until(lambda: "head 2 of 4" in picture.text)
    until(lambda: abs(overlay(browser, "#cards .picture")[:, :, 3] - (195 - 140 * strip[:, 6:9] / 255)).max() <= 1)
    ActionChains(browser).move_to_element(browser.find_element("id", "count")).perform()
    until(lambda: canvas.value_of_css_property("opacity") == "0")


def test_keyboard(browser):
    """Tab reaches the pictures, arrows go among them, Enter opens, arrows leaf, h goes through heads, Escape closes."""
    from selenium.webdriver.common.keys import Keys
    where = "return [...document.querySelectorAll('#cards .picture')].indexOf(document.activeElement)"
    active = lambda: browser.execute_script(where)
    browser.find_element("css selector", "button[type=reset]").send_keys(Keys.TAB)
    assert active() == 0
    press(browser, Keys.ARROW_RIGHT, Keys.ARROW_RIGHT, Keys.ARROW_DOWN, Keys.ARROW_LEFT, Keys.ARROW_UP)
    assert active() == 1 and browser.find_elements("css selector", "#cards .picture.lit")
    press(browser, Keys.ENTER)
    detail = browser.find_element("id", "detail")
    until(detail.is_displayed)
    questions = browser.execute_script("return found.slice(0, 3).map(q => q.image)")
    assert questions[1] in detail.text
    press(browser, Keys.ARROW_RIGHT)
    until(lambda: questions[2] in detail.text)
    press(browser, Keys.ARROW_LEFT, Keys.ARROW_LEFT)
    until(lambda: questions[0] in detail.text)
    pressed = lambda: [b.text.split(" ")[0] for b in detail.find_elements("css selector", ".heads [aria-pressed=true]")]
    assert pressed() == ["mean"]
    press(browser, "h")
    assert pressed() == ["1"]
    press(browser, "HH")
    assert pressed() == ["4"]
    detail.find_elements("css selector", ".heads button")[-1].click()            # the other block's last head
    assert pressed() == ["4"] and "after, head 4 of 4" in detail.find_element("css selector", ".note").text
    last = browser.execute_script("return found.length - 1")
    press(browser, Keys.ARROW_LEFT)                                              # before the first comes the last, far down
    press(browser, Keys.ESCAPE)
    until(lambda: not detail.is_displayed())
    until(lambda: active() == last)


def test_narrow_and_dark(browser):
    phone = {"width": 340, "height": 700, "deviceScaleFactor": 1, "mobile": True}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", phone)
    assert browser.execute_script("return document.documentElement.scrollWidth") <= 340
    numbers = browser.execute_script("""return [...document.querySelectorAll(".bar i")].map(bar => {
        const text = bar.firstElementChild.getBoundingClientRect().width;
        return [text > 0, text <= bar.getBoundingClientRect().width]})""")
    assert all(whole for _, whole in numbers) and {seen for seen, _ in numbers} == {True, False}     # cut: none; left out: some
    columns = "return getComputedStyle(document.getElementById('cards')).gridTemplateColumns.split(' ').length"
    assert browser.execute_script(columns) == 1
    colours = []
    for scheme in ("light", "dark"):
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": scheme}]})
        colours.append(browser.execute_script(r"""const s = getComputedStyle(document.body);
            return [s.backgroundColor, s.color].map(c => c.match(/\d+/g).slice(0, 3).reduce((a, b) => a + Number(b), 0))"""))
    (paper, ink), (dark_paper, dark_ink) = colours
    assert paper - ink > 400 and dark_ink - dark_paper > 400
