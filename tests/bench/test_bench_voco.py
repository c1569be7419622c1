"""bench/bench_voco.py: what is run, what the table makes of it, and how it goes on."""
import json
import os

import pytest
from conftest import load_json

from bench import bench_voco
from bench.bench_voco import IMAGE, SEEDS, STEPS, TOKENS, flags_of, main, table
from support.common import InputError
from training.flags import parse_flags

SETS = "random", "popular", "adversarial"


def line(tokens, seed, accuracy):
    numbers = {name: 10.0 * tokens + seed for name in bench_voco.COLUMNS}
    numbers |= {f"{name}/accuracy": accuracy for name in SETS}
    return {"tokens": tokens, "seed": seed, "steps": STEPS, "numbers": numbers, "right": {}}


def test_models_differ_in_their_tokens_alone(tmp_path):
    assert (IMAGE, set(TOKENS), SEEDS) == (36, {1, 2, 4, 8, 36}, (46, 47, 48, 49))
    root = str(tmp_path)
    for name in "base", "world/llava/images":
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "base" / "config.json").write_text("{}")
    (tmp_path / "world" / "llava" / "train.json").write_text("[]")
    whole, two = (vars(parse_flags(flags_of(root, 46, n, 1000))) for n in (IMAGE, 2))
    differ = {name for name in whole if whole[name] != two[name]}
    # Epochs are not counted where steps are named.
    assert differ == {"voco", "output_dir", "num_train_epochs"}
    assert two["voco"] == 2 and whole["voco"] is None and two["max_steps"] == 1000
    assert whole["stage"] == 0 and whole["seed"] == 46


def test_the_table():
    """Means over seeds; what is kept is paired, seed by seed, above chance."""
    lines = [line(IMAGE, 46, 90.0), line(IMAGE, 47, 70.0), line(2, 46, 80.0), line(2, 47, 65.0),
             line(1, 46, 60.0),
             {"tokens": 2, "seed": 46, "on": "a core",
              "seconds": {"one_pass": 3.0, "first_pass": 1.25, "second_pass": 1.5}}]
    head, rule, *rows = table(lines).splitlines()
    cells = [[cell.strip() for cell in row.split("|")[1:-1]] for row in rows[:3]]
    titles = [cell.strip() for cell in head.split("|")[1:-1]]
    assert all(len(row) == len(titles) == rule.count("---") for row in cells)
    of = {int(row[0]): dict(zip(titles, row, strict=True)) for row in cells}
    assert list(of) == [36, 2, 1]
    assert of[36]["adversarial"] == "80.0 ± 14.1" and of[36]["kept"] == "100 ± 0 %"
    assert of[2]["kept"] == "75 ± 0 %" and of[1]["kept"] == "25 %"      # 30/40 and 15/20; 10/40
    assert of[2]["cache an image"] == "4.5 KiB"                         # 2 · 3 layers · 96 · 4 · 2
    assert (of[2]["compressing"], of[2]["POPE without images"]) == ("1.25 s", "1.50 s")
    assert of[1]["compressing"] == "" and rows[-1].endswith("on a core.")


def test_what_is_there_is_not_made_again(tmp_path, capsys):
    """Nothing is missing, so nothing is trained, asked or timed."""
    seconds = {"tokens": 1, "seed": 46, "seconds": {"one_pass": 1.0}, "on": "a core"}
    lines = [line(IMAGE, 46, 90.0), line(1, 46, 70.0), seconds, seconds | {"tokens": IMAGE}]
    text = "".join(json.dumps(row) + "\n" for row in lines)
    (tmp_path / "results.jsonl").write_text(text)
    main(["--output_dir", str(tmp_path), "--tokens", "1", str(IMAGE), "--seeds", "46"])
    said = capsys.readouterr().out
    assert "0 models in" in said and "| 50 % |" in said
    assert (tmp_path / "results.jsonl").read_text() == text
    with pytest.raises(InputError, match=f"--steps 5: .*holds models of {STEPS} steps"):
        main(["--output_dir", str(tmp_path), "--steps", "5"])


def test_a_small_run(tmp_path, in_this_process, monkeypatch):
    """Two models, from their world to their lines, in this process."""
    args = bench_voco.argparse.Namespace(output_dir=str(tmp_path), small=True,
                                         steps=STEPS)
    monkeypatch.setattr("tiny.tower.TEST_IMAGES", 200)
    bench_voco.make_base(str(tmp_path / "seed46"), 46, True)
    assert sorted(os.listdir(tmp_path / "seed46")) == ["base", "untrained", "world"]
    assert not (tmp_path / "seed46" / "world" / "hadpo").exists()       # the base is not asked
    whole, made = (bench_voco.make(args, 46, tokens) for tokens in (IMAGE, 2))
    timed = bench_voco.time_model(args, 46, 2)
    with open(tmp_path / "results.jsonl") as file:
        assert [json.loads(row) for row in file] == [whole, made, timed]
    for tokens, voco in (IMAGE, None), (2, 2):
        told = load_json(tmp_path / "seed46" / f"tokens{tokens}" / "config.json")
        assert told.get("num_voco") == voco
        assert told["arguments"]["model_name_or_path"] == str(tmp_path / "seed46" / "base")
    assert set(bench_voco.COLUMNS) < set(made["numbers"])
    assert set(timed["seconds"]) == set(bench_voco.TIMES)
    kept = list((tmp_path / "seed46" / "tokens2-compressed").glob("*/*.safetensors"))
    assert len(kept) == 8                                       # the images that are asked about
