"""What README and docs/ say of the repository is true of it, in both languages.

    python tests/docs/test_readme.py        # mends line counts and places

What compares a page with its translation is skipped while that is not written.
"""
import os
import re
import runpy
import sys

import pytest
from pages import (
    COUNT,
    ENGLISH,
    FOLDERS,
    METHOD,
    MODULES,
    PAGES,
    PLACE,
    ROOT,
    broken_links,
    commands,
    corrected,
    differences,
    exists,
    flags,
    headings,
    links,
    read,
    translation,
    under,
    unknown_messages,
    wrong_in,
)

FLAGS_TOLD = {"train.py": "docs/training.md", "eval_pope.py": "docs/tools.md",
              "tools/chat.py": "docs/tools.md"}
UNTOLD = {"--local_rank"}                   # the launcher's


# ---- Every page ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PAGES)
def test_counts_and_places(name):
    text = read(name)
    lines = zip(text.splitlines(), corrected(text).splitlines(), strict=True)
    wrong = [f"{said}\n  should be  {true}" for said, true in lines if said != true]
    assert not wrong, f"{name}: python tests/docs/test_readme.py mends this\n" + "\n".join(wrong)


@pytest.mark.parametrize("name", PAGES)
def test_links_lead_somewhere(name):
    assert broken_links(name, read(name)) == []


@pytest.mark.parametrize("name", PAGES)
def test_commands_can_be_typed(name):
    in_blocks, in_prose = commands(read(name))
    assert [wrong for one in [*in_blocks, *sorted(in_prose)] for wrong in wrong_in(one)] == []


@pytest.mark.parametrize("name", [name for name in PAGES if not name.endswith("history.md")])
def test_modules_that_a_page_names_exist(name):
    assert [file for file in re.findall(r"`([\w/]+\.py)`", read(name)) if not exists(file)] == []


@pytest.mark.parametrize("page", ENGLISH)
def test_both_languages_say_the_same(page):
    if not exists(translation(page)):
        pytest.skip(f"{translation(page)} is not written yet")
    assert differences(page, read(page), read(translation(page))) == {}


# ---- Pages with duties of their own --------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in PAGES if "README" in name])
def test_the_first_page(name):
    text = read(name)
    assert len(text.splitlines()) <= 150
    assert [file for file, _ in COUNT.findall(text)] == [*METHOD, "ds_zero3.json"]
    assert set(METHOD) == set(under("*.py"))
    for paper in "2310.03744", "2311.16839", "2305.18290", "2305.10355":
        assert f"https://arxiv.org/abs/{paper}" in text
    in_blocks, in_prose = commands(text)
    assert {"pip install -r requirements.txt", "deepspeed train.py --stage 2",
            "python eval_pope.py out/stage2"} <= set(in_blocks)
    tests = "pip install -r requirements-dev.txt && python -m pytest -n auto --dist loadfile"
    assert tests in text
    for part in tests.split(" && "):
        assert part.removeprefix("pip install ") in read(".ci/run")
    for folder in FOLDERS:
        assert f"`{folder}/`" in text
    inside = {path for _, path, _ in links(name, text)}
    assert [page for page in ENGLISH[1:] if not {page, translation(page)} & inside] == []


@pytest.mark.parametrize("name", [name for name in PAGES if name.endswith("files.md")])
def test_every_module_is_in_the_map(name):
    listed = [file for file, _ in COUNT.findall(read(name))]
    missing = {*METHOD, *MODULES, "ds_zero3.json"} - set(listed)
    assert not missing, f"{name} needs a line for {', '.join(sorted(missing))}"
    assert len(listed) == len(set(listed))


@pytest.mark.parametrize("name", [name for name in PAGES if name.endswith("equations.md")])
def test_equations_have_their_places(name):
    named = [file for file, _ in PLACE.findall(read(name))]
    assert set(named) == {"dpo.py", "post_decoder.py", "llama.py", "training/lora.py"}
    assert len(named) > 20


@pytest.mark.parametrize("program", FLAGS_TOLD)
def test_every_flag_is_told(program):
    for name in FLAGS_TOLD[program], translation(FLAGS_TOLD[program]):
        if exists(name):
            told = set(re.findall(r"`(--\w+)`", read(name)))
            assert len(flags(program)) > 8 and flags(program) - told - UNTOLD == set(), name


@pytest.mark.parametrize("name", [name for name in PAGES if name.endswith("troubleshooting.md")])
def test_messages_are_those_of_the_code(name):
    text = read(name)
    assert len(re.findall(r"^\| .*`.+` \|", text, re.M)) > 10 and unknown_messages(text) == []


def test_the_figure_is_what_its_script_draws():
    drawn = runpy.run_path(os.path.join(ROOT, "docs", "architecture.py"))["draw"]()
    assert read("docs/architecture.svg") == drawn


# ---- What is wrong is found ----------------------------------------------------------------------


def test_wrong_counts_and_places_are_found():
    n = 1 + read("dpo.py").splitlines().index("    margin = rewards[:, 0] - rewards[:, 1]")
    right = (f"| margin | `dpo.py:{n}` | `margin = rewards[:, 0]` |\n"
             f"| `training/lora.py` | {len(read('training/lora.py').splitlines())} | LoRA |\n")
    assert corrected(right) == right
    assert corrected(right.replace(f":{n}`", f":{n + 5}`")) == right
    assert corrected(re.sub(r"\| \d+ \|", "| 7 |", right)) == right
    for text in ("| `dpo.py:3` | `nowhere` |", "see `dpo.py:3`\n`margin`",
                 "`dpo.py:3`, `dpo.py:4` and `margin`", "| `loop.py` | 3 |", "`loop.py:3`: `x`"):
        with pytest.raises(AssertionError):
            corrected(text)


def test_broken_links_are_found():
    text = "# Two words, `code`\n[a](#two-words-code)\n```\n# no heading\n[b](no)\n```\n`[c](no)`\n"
    assert headings(text) == ["two-words-code"] and broken_links("docs/page.md", text) == []
    assert headings("# 一 次，运行\n# A\n# A\n") == ["一-次运行", "a", "a-1"]
    for link in "[d](nowhere.md)", "[d](#three)", "[d](../README.md#three)", "![d](no.png)":
        assert len(broken_links("docs/page.md", text + link)) == 1
    for link in "[e](https://example.org/x)", "[e](../README.md)", "![e](report.png)":
        assert broken_links("docs/page.md", text + link) == []


def test_wrong_commands_are_found():
    text = ("```\npip install -r x.txt && python a.py --b \\\n    --c   # d\nsaid: python\n```\n"
            "`python -m e` and `CUDA_VISIBLE_DEVICES= python …`\n")
    assert commands(text) == (["pip install -r x.txt", "python a.py --b --c"],
                              {"python -m e", "python …"})
    for right in ("deepspeed --no_ssh train.py --stage 2 …", "python -m pytest -n auto --dist x",
                  "torchrun --nproc_per_node 4 eval_pope.py … --no-bf16", "python …", "ruff check",
                  "python -m tools.report CKPT --coco_path x --output y"):
        assert wrong_in(right) == []
    for wrong in ("python model.py --explain", "python loop.py", "python -m tools.talk",
                  "python eval_pope.py CKPT --report x", "deepspeed train.py --coco_path x",
                  "deepspeed train"):
        assert len(wrong_in(wrong)) == 1, wrong


def test_unknown_messages_are_found():
    row = "| `{}`, *theirs* | then `--flag` |\n"
    assert unknown_messages(row.format("global batch … ≠ …")) == []
    for message in "global batch … = …", "the loss is wrong":
        assert unknown_messages(row.format(message)) == [message]


def test_differing_translations_are_found():
    page = ("[中文](zh/speed.md) [a](memory.md#x) ![b](report.png)\n| `dpo.py` | 3 | c |\n"
            "`dpo.py:3` d `margin`\n```\npython train.py   # e\n```\n`python eval_pope.py`\n")
    other = page.replace("zh/speed", "../speed").replace("# e", "# 戊").replace("#x", "#二")
    other = other.replace("report.png", "../report.png")
    assert differences("docs/speed.md", page, other) == {}
    for ours, kind in (("memory.md", "links"), ("../report.png", "pictures"),
                       ("| `dpo.py` |", "line counts"), ("`margin`", "places"),
                       ("train.py", "commands"), ("`python eval_pope.py`", "commands in prose")):
        assert kind in differences("docs/speed.md", page, other.replace(ours, "`tables.py`"))


if __name__ == "__main__":
    for page in PAGES:
        try:
            mended = corrected(read(page))
        except AssertionError as wrong:
            print(f"{page}: {wrong}", file=sys.stderr)
            continue
        with open(os.path.join(ROOT, page), "w", encoding="utf-8") as file:
            file.write(mended)
