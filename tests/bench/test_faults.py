"""bench/faults.py runs and finds nothing, and what it does to files is what it says."""
import json
import random
import re

import pytest
from programs import succeeds

from bench.damage import damages, outcome
from support.common import InputError


def test_a_short_campaign_finds_nothing():
    """Some kinds of files, and a save that is killed in front of four of its moments."""
    chosen = "^(the index of shards|conversations|kills: a save)"
    said = succeeds("python", "bench/faults.py", "--short", "--damages", 6, "--only", chosen)
    rows = {line.split(" | ")[0]: line.strip(" |").split(" | ")[1:]
            for line in said.splitlines() if line.startswith("| ")}
    assert len(rows) == 6 and all(cells[-1] == "0" for name, cells in rows.items()
                                  if name != "| what"), said
    assert rows["| conversations"][0] == "6" and rows["| a save: left alone"][0] == "1"


@pytest.mark.parametrize("name, content", (
    ("a.json", b'{"a": {"b": [1, 2, {"c": "d"}]}, "e": null}'), ("a.bin", bytes(range(256)) * 9),
    ("a.jsonl", b'{"a": 1}\n{"a": 2}\n')))
def test_damages(tmp_path, name, content):
    """The same for the same seed; nearly all of them change the file."""
    path, made = str(tmp_path / name), []
    for _ in range(2):
        (tmp_path / name).write_bytes(content)
        found = damages(path, random.Random(3), 60)
        states = []
        for what, damage in found:
            damage()
            states.append((what, (tmp_path / name).read_bytes() if re.fullmatch(
                "(?!a folder|is missing).*", what) else what))
        made.append(states)
    assert made[0] == made[1] and len(made[0]) == 60
    assert sum(state != content for _, state in made[0]) > 55
    assert len({what for what, _ in made[0]}) >= 10


def test_outcomes():
    def fails(error):
        def read():
            raise error
        return read

    assert outcome(fails(InputError("x: is bad")), 1, False) == ("refused", "x: is bad")
    assert outcome(fails(InputError("x:\nis bad")), 1, False)[0] == "faults"
    assert outcome(fails(json.JSONDecodeError("no", "", 0)), 1, False)[0] == "faults"
    assert outcome(lambda: 1, 1, True)[0] == "right"
    assert outcome(lambda: 2, 1, False)[0] == "another value"
    assert outcome(lambda: 2, 1, True) == ("faults", "silently another result")
