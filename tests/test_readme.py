"""What the READMEs say of the files is true of the files: line counts, and the line of every equation.

    python tests/test_readme.py        # puts counts and lines right, after the files have changed

A place is `file.py:N`, and the next `code` behind it, in the same line of the README, stands in that line of the file.
"""
import os
import re
import runpy

import pytest
from conftest import ROOT

READMES = [name for name in ("README.md", "README.zh.md") if os.path.isfile(os.path.join(ROOT, name))]
COUNT = re.compile(r"^\| `([\w/.]+)` \| (\d+) \|", re.M)
PLACE = re.compile(r"`([\w/]+\.py):(\d+)`")
PLACE_AND_CODE = re.compile(PLACE.pattern + r"([^`\n]*)`([^`\n]+)`")


def read(name):
    with open(os.path.join(ROOT, name), encoding="utf-8") as file:
        return file.read()


def corrected(text):
    """A README with counts and places as the files are now. A place moves to the nearest line that holds its code."""
    def count(match):
        return f"| `{match[1]}` | {len(read(match[1]).splitlines())} |"

    def place(match):
        file, said, between, code = match[1], int(match[2]), match[3], match[4]
        lines = [n for n, line in enumerate(read(file).splitlines(), start=1) if code in line]
        assert lines, f"{file} holds no line with {code!r}: name what stands there now"
        return f"`{file}:{min(lines, key=lambda n: abs(n - said))}`{between}`{code}`"

    assert len(PLACE.findall(text)) == len(PLACE_AND_CODE.findall(text)), "a place without the code that stands there"
    return COUNT.sub(count, PLACE_AND_CODE.sub(place, text))


@pytest.mark.parametrize("name", READMES)
def test_counts_and_places(name):
    text = read(name)
    assert {"llama.py", "train.py", "data.py", "model.py"} <= {file for file, _ in COUNT.findall(text)}
    assert {"dpo.py", "post_decoder.py", "llama.py", "lora.py"} <= {file for file, _ in PLACE.findall(text)}
    wrong = [f"{said}\n  should be  {true}" for said, true in zip(text.splitlines(), corrected(text).splitlines()) if said != true]
    assert not wrong, f"{name}: python tests/test_readme.py mends this\n" + "\n".join(wrong)


def test_what_is_wrong_is_found():
    n = 1 + read("dpo.py").splitlines().index("    margin = chosen_rewards - rejected_rewards")
    right = f"| margin | `dpo.py:{n}` | `margin = chosen_rewards` |\n| `lora.py` | {len(read('lora.py').splitlines())} | LoRA |\n"
    assert corrected(right) == right
    assert corrected(right.replace(f":{n}`", f":{n + 5}`")) == right and corrected(re.sub(r"\| \d+ \|", "| 7 |", right)) == right
    for text in "| `dpo.py:3` | `nowhere` |", "see `dpo.py:3`\n`margin`", "`dpo.py:3`, `dpo.py:4` and `margin`":
        with pytest.raises(AssertionError):
            corrected(text)


@pytest.mark.parametrize("name", READMES)
def test_every_module_is_in_the_map(name):
    text = read(name)
    missing = [file for file in os.listdir(ROOT) if file.endswith(".py") and f"| `{file}` |" not in text]
    assert missing == []


@pytest.mark.skipif(len(READMES) < 2, reason="no README.zh.md")
def test_both_languages_have_the_same_files_places_and_pictures():
    ours, theirs = (read(name) for name in READMES)
    for what in COUNT, PLACE_AND_CODE, re.compile(r"!\[[^]]*\]\(([^)]+)\)"):
        pick = [[match if isinstance(match, str) else (match[0], match[-1]) for match in what.findall(text)] for text in (ours, theirs)]
        assert pick[0] == pick[1]


def test_the_figure_is_what_its_script_draws():
    assert read("docs/architecture.svg") == runpy.run_path(os.path.join(ROOT, "docs", "architecture.py"))["draw"]()


if __name__ == "__main__":
    for readme in READMES:
        with open(os.path.join(ROOT, readme), encoding="utf-8") as file:
            after = corrected(file.read())              # before it is opened for writing
        with open(os.path.join(ROOT, readme), "w", encoding="utf-8") as file:
            file.write(after)
