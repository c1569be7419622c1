"""One identity of a run, which everything compares: another base, another setting of it, another
first head or other data are never taken for the run's own, and the error names what is another.
"""
import json
import os
import shutil
import signal
import tempfile

import pytest
import torch
from conftest import as_llava, load_json, preference_rows, run_train
from programs import succeeds
from short_runs import base_and_head, flags_of, llava_flags, losses_of, steps_logged

import train
from checkpoints.identity import base_of_model, differences, settings_of
from checkpoints.load import Source, fingerprint, load_all, load_base, load_trained
from checkpoints.save import save_trained
from data import ImageProcessor, Tokenizer
from llama import LlamaConfig
from support.common import InputError
from support.folders import names_of
from support.tensors import write_tensors
from training.features import keep_features
from training.guards import Guards

CHECK = Guards.check                # called in the middle of every step

# ---- A base --------------------------------------------------------------------------------------


def edit_json(path, **changes):
    values = load_json(path) | changes
    with open(path, "w") as file:
        json.dump({name: value for name, value in values.items() if value is not None}, file)


def copy_of(base, target):
    shutil.copytree(base, target)
    return str(target)


def in_config(**changes):
    return lambda base: edit_json(f"{base}/config.json", **changes)


def in_tower(**changes):
    return lambda base: edit_json(f"{base}/vision_tower/config.json", **changes)


def in_preprocessor(**changes):
    def edit(base):
        with open(f"{base}/vision_tower/preprocessor_config.json", "w") as file:
            json.dump(changes, file)
    return edit


EDITS = {  # the setting that is named → an edit that keeps every tensor as it is
    "rope_theta": in_config(rope_theta=500000.0),
    "rms_norm_eps": in_config(rms_norm_eps=1e-3),
    "num_attention_heads": in_config(num_attention_heads=8, num_key_value_heads=8),
    "pad_images": in_config(image_aspect_ratio="square"),
    "vision.num_attention_heads": in_tower(num_attention_heads=2),
    "vision.hidden_act": in_tower(hidden_act="gelu"),
    "vision.layer_norm_eps": in_tower(layer_norm_eps=1e-3),
    "preprocess.mean": in_preprocessor(image_mean=[0.5, 0.5, 0.5]),
    "preprocess.std": in_preprocessor(image_std=[0.5, 0.5, 0.5]),
}


def trained_on(world, folder):
    """A checkpoint with a block, trained on the session's base."""
    base, head = base_and_head(world, zero_init=False)
    tensors = {key: t for key, t in head.state_dict().items() if key != "lm_head.weight"}
    info = {"base": world.base, "fingerprint": base.fingerprint, "identity": base_of_model(base),
            "block": vars(head.block_config)}
    save_trained(str(folder), tensors, info, base.tokenizer)
    return str(folder)


def adapter_on(world, folder):
    """A LoRA adapter of ours, as train.py writes it."""
    base = load_base(world.base)
    name = "model.layers.0.self_attn.q_proj.lora_{}.weight"
    tensors = {name.format("A"): torch.randn(2, 32), name.format("B"): torch.randn(32, 2)}
    info = {"base": world.base, "fingerprint": base.fingerprint, "identity": base_of_model(base),
            "block": None, "arguments": {"lora_r": 2, "lora_alpha": 4, "lora_dropout": 0.0}}
    save_trained(str(folder), tensors, info, base.tokenizer)
    return str(folder)


@pytest.mark.parametrize("setting", EDITS)
def test_an_edited_base_is_another_base(world, tmp_path, setting):
    """The same tensors, other numbers: for a checkpoint, for an adapter of ours."""
    base = copy_of(world.base, tmp_path / "base")
    trained, adapter = trained_on(world, tmp_path / "one"), adapter_on(world, tmp_path / "two")
    load_trained(trained, load_base(base))
    load_base(base, adapter=adapter)
    EDITS[setting](base)
    edited = load_base(base)
    assert edited.fingerprint != load_base(world.base).fingerprint
    for load in (lambda: load_trained(trained, edited), lambda: load_base(base, adapter=adapter)):
        with pytest.raises(InputError) as error:
            load()
        print(error.value)
        assert f" {setting} of the base was " in str(error.value)
        assert "weights" not in str(error.value) and "--model_name_or_path" in str(error.value)


def test_a_row_may_be_longer(world, tmp_path):
    """What only limits the length of rows makes no other base."""
    base = copy_of(world.base, tmp_path / "base")
    edit_json(f"{base}/config.json", tokenizer_model_max_length=512, max_position_embeddings=1024)
    load_trained(trained_on(world, tmp_path / "one"), load_base(base))


def test_an_adapter_of_ours_on_other_weights(world, tmp_path):
    base = load_base(world.base)
    other = copy_of(world.base, tmp_path / "other")
    with torch.no_grad():
        base.trunk.model.norm.weight += 0.1
    tensors = {key: t for key, t in base.trunk.state_dict().items() if "vision_tower" not in key}
    write_tensors(f"{other}/model.safetensors", tensors | dict(base.head.state_dict()))
    with pytest.raises(InputError, match="two: was trained on base .*weights are others"):
        load_base(other, adapter=adapter_on(world, tmp_path / "two"))


def test_an_old_fingerprint_tells_of_the_weights(world, tmp_path):
    """Checkpoints of earlier versions still load on their base, and on no other."""
    folder = trained_on(world, tmp_path / "one")
    base = load_base(world.base)
    edit_json(f"{folder}/config.json", identity=None,
              fingerprint=base.fingerprint.partition("-")[0])
    load_trained(folder, base)
    edit_json(f"{folder}/config.json", fingerprint="0123456789abcdef")
    with pytest.raises(InputError, match="weights are others"):
        load_trained(folder, base)


def test_another_tokenizer_of_the_same_size(world, tmp_path):
    base = copy_of(world.base, tmp_path / "base")
    with open(f"{base}/tokenizer.model", "ab") as file:
        file.write(b"\xc0\x3e\x01")                         # a field that SentencePiece skips
    with pytest.raises(InputError, match="tokenizer.model is another"):
        load_trained(trained_on(world, tmp_path / "one"), load_base(base))


def test_settings_come_back_from_a_file(world):
    """And every size of LLaMA, CLIP, block and preprocessing is among them."""
    base, head = base_and_head(world)
    settings = settings_of(base.config, head.block_config, ImageProcessor(24))
    assert json.loads(json.dumps(settings)) == settings
    expected = {*vars(LlamaConfig()), *(f"vision.{name}" for name in vars(base.config.vision)),
                *(f"block.{name}" for name in vars(head.block_config)), "preprocess.mean",
                "preprocess.std", "preprocess.size", "select_layer", "projector_hidden_size"}
    assert expected - settings.keys() == {"max_position_embeddings"}
    assert differences({"base": "a-b", "settings": settings},
                       {"base": "a-b", "settings": settings}) == []


def test_the_base_of_a_llava_without_preprocessor_is_clips(world):
    base = load_base(world.base)
    assert fingerprint(base.trunk, base.head) == base.fingerprint
    trunk, head = base.trunk, base.head
    plain = as_llava(trunk, head, tokenizer=base.tokenizer)
    assert base_of_model(plain) == base_of_model(base)


# ---- Runs that go on -----------------------------------------------------------------------------


def interrupted(monkeypatch, step, flags):
    """Run until Ctrl-C comes in the middle of a step."""
    def noted(self, now, values, seen):
        if now == step:
            os.kill(os.getpid(), signal.SIGINT)
        CHECK(self, now, values, seen)

    monkeypatch.setattr(Guards, "check", noted)
    with pytest.raises(SystemExit):
        run_train(*flags)
    monkeypatch.setattr(Guards, "check", CHECK)


def swap_answers(files):
    """Chosen and rejected change places in both files of the preference data."""
    path = files["--pope_data_path"]
    rows = load_json(path)
    for row in rows:
        row["chosen"], row["reject"] = row["reject"], row["chosen"]
    with open(path, "w") as file:
        json.dump(rows, file)
    path = files["--desc_data_path"]
    rows = load_json(path)
    for row in rows.values():
        row["chosen"], row["rejected"] = row["rejected"], row["chosen"]
    with open(path, "w") as file:
        json.dump(rows, file)


def train_init_again(files):
    tensors = load_trained(files["--init"], load_base(files["--model_name_or_path"])).state_dict()
    info = load_json(files["--init"] + "/config.json")
    shutil.rmtree(files["--init"])
    block = {key: tensor + 0.01 for key, tensor in tensors.items() if key != "lm_head.weight"}
    tokenizer = load_base(files["--model_name_or_path"]).tokenizer
    save_trained(files["--init"], block, info, tokenizer)


def overwrite_weights(base):
    """A few numbers at the end of the base's file become 1."""
    path = f"{base}/model.safetensors"
    with open(path, "r+b") as file:
        file.seek(os.path.getsize(path) - 400)
        file.write(b"\x00\x00\x80\x3f" * 100)


def lengthen(files):
    edit_json(files["--model_name_or_path"] + "/config.json", tokenizer_model_max_length=200)


CHANGES = {  # what is done between the interruption and --resume → (how, what is said)
    "chosen and rejected are swapped": (swap_answers, "the data are others"),
    "--init is trained again": (train_init_again, "the head that it starts from is another"),
    "rows may be shorter": (lengthen, "max_length was 256 and is 200"),
}


def named_files(world, tmp_path):
    """Copies of what a run reads → {flag: path}."""
    files = {"--model_name_or_path": copy_of(world.base, tmp_path / "base"),
             "--desc_data_path": shutil.copy(world.desc, tmp_path / "desc.json"),
             "--pope_data_path": shutil.copy(world.pairs, tmp_path / "pope.json")}
    return files | {"--init": trained_on(world, tmp_path / "start")}


def flags_with(world, kind, output_dir, files):
    flags = flags_of(world, kind, output_dir)
    for name, path in files.items():
        if name in flags:
            flags[flags.index(name) + 1] = str(path)
    return flags


@pytest.mark.parametrize("what", CHANGES)
def test_resume_refuses_another_run(world, tmp_path, monkeypatch, in_this_process, what):
    """Before the frozen pass, with the arguments as they were."""
    change, said = CHANGES[what]
    files = named_files(world, tmp_path)
    flags = flags_with(world, "kept features", tmp_path / "cut", files)
    interrupted(monkeypatch, 3, flags)
    change(files)
    monkeypatch.setattr(train, "keep_features", lambda *args: pytest.fail("a pass was begun"))
    with pytest.raises(InputError) as error:
        run_train(*flags, "--resume")
    print(error.value)
    assert said in str(error.value) and "leave --resume out" in str(error.value)
    assert (tmp_path / "cut.run" / "latest").read_text() == "step-3"


@pytest.mark.parametrize("change, said", (
    (EDITS["rope_theta"], "rope_theta of the base was 10000.0 and is 500000.0"),
    (overwrite_weights, "the base's weights are others")), ids=("config.json", "weights"))
def test_resume_refuses_another_base(world, tmp_path, monkeypatch, in_this_process, change, said):
    """LoRA, whose reference was kept: it would go on against the reference of another model."""
    base = copy_of(world.base, tmp_path / "base")
    flags = flags_with(world, "LoRA with dropout", tmp_path / "cut", {"--model_name_or_path": base})
    interrupted(monkeypatch, 3, flags)
    change(base)
    with pytest.raises(InputError) as error:
        run_train(*flags, "--resume")
    print(error.value)
    assert said in str(error.value)


def test_resume_refuses_other_conversations(world, tmp_path, monkeypatch, in_this_process):
    """A file that stays on disk: an answer is another, all lengths are the same."""
    data = shutil.copy(world.llava, tmp_path / "data.json")
    flags = [*llava_flags(world), "--data_path", data, "--tune", "post_decoder", "--max_steps", 5,
             "--learning_rate", 1e-3, "--per_device_train_batch_size", 4,
             "--gradient_accumulation_steps", 1, "--output_dir", tmp_path / "cut"]
    interrupted(monkeypatch, 2, flags)
    with open(data) as file:
        text = file.read()
    assert text.count("Yes,") > 3
    with open(data, "w") as file:
        file.write(text.replace("Yes,", "Nay,"))
    with pytest.raises(InputError, match="the data are others"):
        run_train(*flags, "--resume")


@pytest.mark.parametrize("kind", ("kept features", "the trunk by DPO"))
def test_a_finished_run_of_other_data_is_not_finished(world, tmp_path, capsys, in_this_process,
                                                      kind):
    """Neither a trained checkpoint nor a whole model; what is another is said."""
    files = named_files(world, tmp_path)
    flags = flags_with(world, kind, tmp_path / "run", files)
    run_train(*flags)
    before = losses_of(tmp_path / "run")
    run_train(*flags, "--resume")
    assert "run: finished already" in capsys.readouterr().out
    swap_answers(files)
    run_train(*flags, "--resume")
    said = capsys.readouterr().out
    assert "run: is finished, but the data are others: it is trained anew" in said
    assert losses_of(tmp_path / "run") != before and len(steps_logged(tmp_path / "run")) == 8


# ---- Kept features -------------------------------------------------------------------------------


def test_features_of_a_base_with_other_settings(world, tmp_path, capsys):
    base, head = base_and_head(world)
    dataset = preference_rows(world, base.trunk)
    dataset.examples = dataset.examples[:8]
    keep_features(str(tmp_path / "kept"), dataset, base, head.block_config, 16)
    folder = copy_of(world.base, tmp_path / "base")
    EDITS["rope_theta"](folder)
    edited = load_base(folder)
    keep_features(str(tmp_path / "kept"), dataset, edited, head.block_config, 16)
    assert "what is kept there is for a base with other settings;" in capsys.readouterr().out
    assert len(os.listdir(tmp_path / "kept")) == 2


def test_features_that_are_there_are_only_read(world):
    """By a user who may write nothing there: no file is touched, and the numbers are the same."""
    base, head = base_and_head(world)
    dataset = preference_rows(world, base.trunk)
    dataset.examples = dataset.examples[:8]
    root = tempfile.mkdtemp()                       # tmp_path is closed to other users
    dataset.format.tokenizer = Tokenizer(shutil.copy(world.tokenizer, root))
    try:
        kept = keep_features(f"{root}/kept", dataset, base, head.block_config, 16)
        expected = kept[[3, 5]].hidden_states
        for folder, _, names in os.walk(root):
            os.chmod(folder, 0o555)
            for name in names:
                os.chmod(os.path.join(folder, name), 0o444)
        result = in_child(lambda: keep_features(f"{root}/kept", dataset, base, head.block_config,
                                                16)[[3, 5]].hidden_states.sum().item())
        assert result == repr(expected.sum().item())
    finally:
        for folder, *_ in os.walk(root):
            os.chmod(folder, 0o755)
        shutil.rmtree(root)


def in_child(function):
    """What function() returns in a child without root's rights, or its error; as text."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        if os.getuid() == 0:
            os.setuid(65534)
        try:
            said = repr(function())
        except BaseException as e:
            said = f"{type(e).__name__}: {e}"
        os.write(writing, said.encode())
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as file:
        said = file.read()
    os.waitpid(child, 0)
    return said


# ---- Names in a table ----------------------------------------------------------------------------


def test_a_checkpoint_called_base_is_no_base(world, tmp_path):
    trained, other = trained_on(world, tmp_path / "base"), trained_on(world, tmp_path / "full")
    model = load_all(Source([trained, other]), "cpu", torch.float32)
    names = list(model.heads)
    assert names[0] == "base" and len(set(names)) == 3 and names[2] == "full"
    assert model.heads["base"].block_config is None and names[1].endswith("-base")
    assert all(model.heads[name].block_config for name in names[1:])


def test_every_name_is_another():
    assert names_of(["out/a", "out/b"], ["base"]) == ["a", "b"]
    assert names_of(["one/a", "two/a"], ["base"]) == ["one-a", "two-a"]
    assert names_of(["one/two/a", "one-two/a"], ["base"])[0] == "one-two-a"
    for paths in (["one/two/a", "one-two/a"], ["base"], ["x/base", "base"], ["/base", "/x/base"],
                  ["../base", "base"]):
        names = names_of(paths, ["base"])
        assert len({*names, "base"}) == len(paths) + 1, names


def test_eval_shows_the_base_and_a_checkpoint_called_base(world, tmp_path):
    said = succeeds("python", "eval_pope.py", trained_on(world, tmp_path / "base"),
                    "--coco_path", world.coco, "--pope_path", world.pope, "--set", "random",
                    "--max_new_tokens", 4)
    rows = [line.split("|")[1].strip() for line in said.splitlines() if line.startswith("|")]
    assert "base" in rows and sum(row.endswith("-base") for row in rows) == 1, said
