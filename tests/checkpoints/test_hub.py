"""Names of the Hugging Face hub: from its cache, from a stand-in endpoint, without a network."""
import json
import os
import re
import shutil

import pytest
from conftest import dpo_flags, load_json
from hub_stand_in import StandIn, commit_of, files_in, fill_cache
from programs import ROOT, shell, succeeds

from checkpoints import hub
from checkpoints.hub import files_read, is_name, is_whole
from checkpoints.save import preprocessor_config
from data import ImageProcessor
from support.common import InputError

BASE, TOWER = "liuhaotian/llava-v1.5-7b", "openai/clip-vit-large-patch14-336"


@pytest.fixture(scope="module")
def repositories(world, tmp_path_factory):
    """The session's base as LLaVA's repository, which names its tower, and the tower's own; both
    with files beside them that nothing here reads.
    """
    folder = tmp_path_factory.mktemp("repositories")
    base, tower = folder / "base", folder / "tower"
    shutil.copytree(world.base, base)
    shutil.move(base / "vision_tower", tower)
    values = load_json(base / "config.json") | {"mm_vision_tower": TOWER}
    (base / "config.json").write_text(json.dumps(values))
    (tower / "preprocessor_config.json").write_text(json.dumps(
        preprocessor_config(ImageProcessor(24))))
    for place, names in ((base, ("README.md", "generation_config.json", "pytorch_model.bin")),
                         (tower, ("tf_model.h5", "vocab.json", "flax_model.msgpack"))):
        for name in names:
            (place / name).write_bytes(b"not read")
    return {BASE: str(base), TOWER: str(tower)}


def ask(world, checkpoint, *more):
    return [os.path.join(ROOT, "eval_pope.py"), checkpoint, "--coco_path", world.coco,
            "--pope_path", world.pope, "--set", "random", "--max_new_tokens", 2, *more]


def test_names_and_paths(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    os.makedirs("out/stage2")
    for name in BASE, TOWER, f"{BASE}@main", "juliozhao/hadpo-llava-1.5", "out/stage2@main":
        assert is_name(name), name
    for path in ("out/stage2", "out/stage3", "llava-v1.5-7b", "a/b/c", "/a/b", "./a/b", "../b",
                 "a/", "open_clip:ViT-L-14-336/openai", "~/b", ""):
        assert not is_name(path), path


def test_what_is_read_of_a_repository():
    """The shards of one kind of weights, and nothing that another library reads."""
    shards = [f"pytorch_model-0000{n}-of-00002.bin" for n in (1, 2)]
    llava = ["README.md", "config.json", "generation_config.json", "mm_projector.bin", *shards,
             "pytorch_model.bin.index.json", "tokenizer.model", "tokenizer_config.json"]
    assert sorted(files_read(llava)) == ["README.md", "config.json", "mm_projector.bin", *shards,
                                         "pytorch_model.bin.index.json", "tokenizer.model"]
    both = [*llava, "model.safetensors.index.json", "model-00001-of-00001.safetensors"]
    assert not any("pytorch_model" in name for name in files_read(both))
    adapter = ["adapter_config.json", "adapter_model.bin", "config.json", "README.md",
               "non_lora_trainables.bin"]
    assert sorted(files_read(adapter)) == sorted(adapter)
    assert files_read(["README.md", "data.json"]) == []
    assert files_read(llava)[-1] == "config.json"


def test_the_cache_comes_first(world, repositories, tmp_path):
    """With everything in the cache nobody is asked, although the server is there."""
    for name, folder in repositories.items():
        fill_cache(tmp_path / "cache", name, folder)
    with StandIn({}, tmp_path / "cache") as server:
        done = server.run(*ask(world, BASE), cwd=tmp_path)
        assert done.returncode == 0, done.stderr[-2000:]
        assert server.asked == []
    assert sorted(os.listdir(tmp_path)) == ["cache", "out"]
    assert "base_random.jsonl" in os.listdir(tmp_path / "out" / "llava-v1.5-7b" / "pope")


def test_only_what_is_read_is_downloaded(world, repositories, tmp_path):
    """From the endpoint the first time, the base's own tower too; from the cache the next time.
    The checkpoint keeps the revision, and is evaluated without a network.
    """
    train = [os.path.join(ROOT, "train.py"), "--stage", 1, "--max_steps", 1, "--keep_correct",
             *dpo_flags(world)[2:], "--model_name_or_path", BASE]
    with StandIn(repositories, tmp_path / "cache") as server:
        done = server.run(*train, "--output_dir", "out/one", cwd=tmp_path)
        assert done.returncode == 0, done.stderr[-2000:]
        got = {line.split("/resolve/")[1].partition("/")[2] for line in server.asked
               if line.startswith("GET") and "/resolve/" in line}
        assert got == {"README.md", "config.json", "model.safetensors", "tokenizer.model",
                       "preprocessor_config.json"}
        assert re.search(rf"{BASE}: 4 files, 0.00 GB, from {server.address}", done.stdout)
        server.asked.clear()
        done = server.run(*ask(world, "out/one"), cwd=tmp_path, HF_HUB_OFFLINE="1")
        assert done.returncode == 0, done.stderr[-2000:]
        assert server.asked == []
    named = load_json(tmp_path / "out" / "one" / "config.json")
    assert named["base"] == named["arguments"]["model_name_or_path"] == f"{BASE}@{commit_of(BASE)}"


def test_a_cut_download_is_ended(repositories, tmp_path):
    """Weights without their settings, or without a tokenizer, are not taken for a model."""
    with StandIn(repositories, tmp_path / "cache") as server:
        snapshot = fill_cache(tmp_path / "cache", BASE, repositories[BASE])
        assert is_whole(snapshot)
        for name in "tokenizer.model", "config.json", "model.safetensors":
            os.remove(os.path.join(snapshot, name))
            os.remove(os.path.join(snapshot, "pytorch_model.bin")) if "safe" in name else None
            assert not is_whole(snapshot)
        (tmp_path / "code.py").write_text("from checkpoints.hub import *\n"
                                          f"print(pinned({BASE!r}))\nprint(folder_of({BASE!r}))")
        done = server.run(tmp_path / "code.py", cwd=tmp_path)
    assert done.stdout.splitlines()[1:] == [f"{BASE}@{commit_of(BASE)}", snapshot], done.stderr
    assert {"config.json", "model.safetensors", "tokenizer.model"} <= set(files_in(snapshot))


MISTAKES = {        # what is named: what is said of it
    "nobody/nothing": "nobody/nothing: no such folder, and http.* has no model of this name",
    f"{BASE}@1": rf"{BASE}@1: http.* has no revision 1; check what stands behind @",
    "me/pictures": "me/pictures: the repository holds no model that is read here",
}


@pytest.mark.parametrize("name", MISTAKES)
def test_names_that_are_none(repositories, tmp_path, name):
    os.makedirs(tmp_path / "pictures")
    (tmp_path / "pictures" / "1.jpg").write_bytes(b"x")
    with StandIn(repositories | {"me/pictures": str(tmp_path / "pictures")},
                 tmp_path / "cache") as server:
        done = server.run("-m", "tools.merge", name, "whole", cwd=tmp_path)
    assert done.returncode == 1 and len(done.stderr.splitlines()) == 1, done.stderr[-2000:]
    assert re.search(MISTAKES[name], done.stderr)


def test_without_a_network(world, tmp_path):
    """One line says what to fetch and where to put it: offline, and with nobody at the address."""
    cure = f"hf download {BASE} --local-dir FOLDER; copy FOLDER here and name it instead"
    done = shell("python", os.path.join(ROOT, "train.py"), "--stage", 1, *dpo_flags(world)[2:],
                 "--model_name_or_path", BASE, cwd=tmp_path)
    assert done.returncode == 1 and len(done.stderr.splitlines()) == 1, done.stderr[-2000:]
    assert f"error: {BASE}: no such folder" in done.stderr and cure in done.stderr
    with StandIn({}, tmp_path / "cache") as server:
        pass                                                        # nobody is there any more
    done = server.run("-m", "tools.merge", BASE, "whole", cwd=tmp_path)
    assert done.returncode == 1 and len(done.stderr.splitlines()) == 1, done.stderr[-2000:]
    assert cure in done.stderr and server.address in done.stderr


def test_a_missing_library_is_one_line(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "huggingface_hub", None)
    with pytest.raises(InputError, match="huggingface_hub cannot be imported"):
        hub.fetched.__wrapped__(BASE)


def test_an_adapter_names_its_base(world, repositories, tmp_path):
    """Ours says OWNER/NAME and the revision apart, as peft does, and finds its base again."""
    train = [os.path.join(ROOT, "train.py"), "--lora_r", 2, "--max_steps", 1, "--keep_correct",
             "--per_device_train_batch_size", 2, "--gradient_accumulation_steps", 1,
             *dpo_flags(world)[2:], "--model_name_or_path", BASE, "--output_dir", "out/lora"]
    with StandIn(repositories, tmp_path / "cache") as server:
        done = server.run(*train, cwd=tmp_path)
        assert done.returncode == 0, done.stderr[-2000:]
        values = load_json(tmp_path / "out" / "lora" / "adapter_config.json")
        assert (values["base_model_name_or_path"], values["revision"]) == (BASE, commit_of(BASE))
        done = server.run("-m", "tools.merge", "out/lora", "whole", cwd=tmp_path)
        assert done.returncode == 0, done.stderr[-2000:]
    assert "revision" not in load_json_of_a_local_adapter(world, tmp_path)


def load_json_of_a_local_adapter(world, tmp_path):
    succeeds("python", os.path.join(ROOT, "train.py"), "--lora_r", 2, "--max_steps", 1,
             "--keep_correct", "--per_device_train_batch_size", 2, "--gradient_accumulation_steps",
             1, *dpo_flags(world), "--output_dir", tmp_path / "local")
    return load_json(tmp_path / "local" / "adapter_config.json")
