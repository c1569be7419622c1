"""What the README says of the files is true of the files."""
import os
import re

from conftest import ROOT


def test_line_counts():
    with open(os.path.join(ROOT, "README.md"), encoding="utf-8") as file:
        said = dict(re.findall(r"^\| `([\w/.]+)` \| (\d+) \|", file.read(), re.M))
    assert {"llama.py", "train.py", "data.py", "model.py"} <= said.keys()
    counted = {}
    for name in said:
        with open(os.path.join(ROOT, name), encoding="utf-8") as file:
            counted[name] = str(len(file.readlines()))
    assert said == counted


def test_every_module_is_in_the_map():
    with open(os.path.join(ROOT, "README.md"), encoding="utf-8") as file:
        text = file.read()
    missing = [name for name in os.listdir(ROOT) if name.endswith(".py") and f"| `{name}` |" not in text]
    assert missing == []
