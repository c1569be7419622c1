"""tools/report_descriptions.py: marks, numbers and choice by hand, damaged files, the whole page,
and its filter in a real browser where there is one.
"""
import json
import os
import re
from html import unescape

import pytest
from small_files import assert_names_the_fault
from test_report import EVIL, make_page
from test_report_browser import chromium  # noqa: F401 (a fixture)

from evals import chair
from evals.describe import Descriptions
from evals.objects import read_words
from tools import report_descriptions
from tools.report_descriptions import choose, marked, read_descriptions, section

SHOWN = {"a.jpg": {"dog"}, "b.jpg": {"hot dog", "cup"}, "c.jpg": set()}
SAID = {"base": {"a.jpg": "A dog & a <cat>.", "b.jpg": "A hot dog, a dog.", "c.jpg": "Nothing."},
        "stage <1>": {"a.jpg": "A dog.", "b.jpg": "A cup and a hot dog.",
                      "c.jpg": f"A kite {EVIL}"}}


def write(folder, said=SAID, shown=SHOWN):
    """What evals/chair.py writes about texts."""
    judged = {name: chair.judge(texts, shown, read_words()) for name, texts in said.items()}
    os.makedirs(folder, exist_ok=True)
    metrics = {name: chair.measure(rows) for name, rows in judged.items()}
    chair.write(str(folder), judged, Descriptions(said, "greedy <b>", {}), metrics)
    return str(folder)


def test_marks(tmp_path):
    rows = read_descriptions(write(tmp_path)).rows
    assert marked(rows["a.jpg"][0]) == (
        'A <b>dog</b> &amp; a &lt;<mark title="cat is not there">cat</mark>&gt;.')
    assert marked(rows["b.jpg"][0]) == (
        'A <b>hot dog</b>, a <mark title="dog is not there">dog</mark>.')
    assert marked({"answer": "", "objects": []}) == "(nothing)"


def test_the_part_of_the_page(tmp_path):
    html = section(read_descriptions(write(tmp_path)), lambda image: f"data:{image}")
    assert html.count("<article") == 3 and html.count("<mark title") == 4
    assert EVIL not in html and "greedy &lt;b&gt;" in html and "stage &lt;1&gt;" in html
    text = unescape(re.sub(r"<(?!cat|1>)[^>]*>", "|", html))
    assert re.search(r"base\|+50\.00 ", text)                   # 2 of 4 named are wrong, 2 of 5
    assert re.search(r"stage <1>\|+40\.00 \|−10\.00", text)
    assert re.search(r"cat\|+1 of 1\|", text) and re.search(r"dog\|+1 of 2\|", text)
    assert re.search(r"kite\|+1 of 1\|", text) and "1 of 2 not there" in text
    assert "there: cup, hot dog" in text and "there: nothing of these classes" in text
    assert html.count('src="data:a.jpg"') == 1
    assert "(no file)" in section(read_descriptions(str(tmp_path)), lambda image: None)


def test_the_choice(tmp_path, monkeypatch):
    """Of 12 images 4 are wrong: they come first, and every fourth place has one of the others."""
    shown = {f"{n}.jpg": {"dog"} for n in range(12)}
    said = {"base": {image: "A cat." if n < 4 else "A dog." for n, image in enumerate(shown)}}
    told = read_descriptions(write(tmp_path, said, shown))
    chosen = list(choose(told, lambda image: None))
    assert sorted(chosen) == sorted(shown)
    assert [int(image[:-4]) < 4 for image in chosen[:6]] == 3 * [True] + [False, True, False]
    monkeypatch.setattr(report_descriptions, "MOST", 5)
    assert list(choose(told, lambda image: None)) == chosen[:5]
    monkeypatch.setattr(report_descriptions, "LIMIT", 10_000)
    assert len(choose(told, lambda image: 4_000 * "x")) == 2


@pytest.mark.parametrize("change, file, fault", [
    (lambda row: row.update(image="../b.jpg"), "base.jsonl", "row 0: image '../b.jpg'"),
    (lambda row: row["objects"][0].update(end=99), "base.jsonl", "row 0: an object at"),
    (lambda row: row["objects"].reverse(), "base.jsonl", "row 0: an object at"),
    (lambda row: row["objects"][0].pop("there"), "base.jsonl", "row 0: 'there'"),
    (lambda row: row.pop("objects"), "base.jsonl", "row 0: 'objects'"),
    (lambda row: row.update(image="b.jpg"), "base.jsonl", "b.jpg is not described once")])
def test_damaged_files(tmp_path, change, file, fault):
    folder = write(tmp_path, {"base": SAID["base"]})
    rows = [json.loads(line) for line in open(tmp_path / "base.jsonl", encoding="utf-8")]
    change(rows[0])
    (tmp_path / "base.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert_names_the_fault(lambda: read_descriptions(folder), file, fault)


def test_no_such_folder(tmp_path):
    assert_names_the_fault(lambda: read_descriptions(str(tmp_path)), "metrics.json", "no such file")


@pytest.fixture(scope="module")
def page(world, tmp_path_factory):
    """A report about the session's world with descriptions of two of its images and one without."""
    folder, images = tmp_path_factory.mktemp("page"), sorted(os.listdir(f"{world.coco}/val2014"))
    names = dict(zip(SHOWN, [*images[:2], "no.jpg"], strict=True))
    said = {model: {names[image]: text for image, text in texts.items()}
            for model, texts in SAID.items()}
    shown = {names[image]: classes for image, classes in SHOWN.items()}
    return make_page(world, folder, read_descriptions(write(folder / "chair", said, shown)))


def test_the_whole_page(page):
    part = re.search(r'<section id="descriptions">.*?</section>', page.text, re.S)[0]
    assert part.count('<img src="data:image/jpeg') == 2 and part.count("(no file)") == 1
    assert "{{descriptions}}" not in page.text
    assert len(page.gallery["questions"]) == len(page.distinct)


def test_the_filter(page, chromium):  # noqa: F811
    chromium.get("file://" + page.path)

    def left(word="", by=""):
        chromium.execute_script("""
            const part = document.getElementById("descriptions");
            part.querySelector("input").value = arguments[0];
            part.querySelector("select").value = arguments[1];
            part.querySelector("form").dispatchEvent(new Event("input"))""", word, by)
        return chromium.execute_script("""
            return [...document.querySelectorAll("#descriptions article")].map(
                card => card.getBoundingClientRect().height > 0 ? 1 : 0)""")

    order = chromium.execute_script("""
        return [...document.querySelectorAll("#descriptions article .said")].map(
            said => said.textContent)""")[::2]
    place = {text: n for n, text in enumerate(order)}
    a, b, c = (place[text] for text in SAID["base"].values())

    def only(*places):
        return [int(n in places) for n in range(3)]

    assert left() == [1, 1, 1] and left("HOT dog") == only(b) and left("cup") == only(b)
    assert left("cat", "0") == only(a) and left("cat", "1") == only()
    assert left(by="any") == [1, 1, 1] and left(by="0") == only(a, b) and left(by="1") == only(c)
    said = chromium.execute_script(
        "return document.querySelector('#descriptions output').textContent")
    assert said == "1 of the 3 images shown here"
    assert chromium.get_log("browser") == [] and "owned" not in chromium.title.split("onerror")[0]
