"""tools.export: transformers and peft load what it writes, and say the very same tokens.

The oracle is transformers alone: its processor, its chat template, its greedy decoding.
"""
import os
import shutil
import sys

import numpy as np
import pytest
import torch
from conftest import dpo_flags, load_json, run_train, shake, small_config
from hub_stand_in import StandIn
from PIL import Image
from programs import ROOT

import eval_pope
import tools.export
from checkpoints.card import BEGINS, add_pope, card, is_card
from checkpoints.load import load_base, load_trained
from checkpoints.save import save_base
from data import EOS, IMAGE, Example, ImageProcessor, PackedDataset, Tokenizer
from model import Head, Llava, Trunk, generate
from support.common import InputError
from tools.export import padded_vocabulary

QUESTIONS = "is there a dog in the image?", "describe this image in detail."
BASE = os.path.join(ROOT, "tiny", "base")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """A square picture, and one that has to be padded."""
    folder, rng, paths = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0), []
    for n, (height, width) in enumerate(((48, 48), (40, 72))):
        small = Image.fromarray(rng.integers(0, 255, (6, 8, 3), dtype=np.uint8))
        small.resize((width, height), Image.Resampling.BICUBIC).save(folder / f"{n}.png")
        paths.append(str(folder / f"{n}.png"))
    return paths


@pytest.fixture(scope="module")
def lora(world, tmp_path_factory, in_this_process):
    """A LoRA checkpoint on the session's base, whose matrices matter."""
    folder = tmp_path_factory.mktemp("lora") / "lora"
    run_train("--lora_r", 4, "--max_steps", 3, "--learning_rate", "3e-2", "--keep_correct",
              "--per_device_train_batch_size", 8, "--gradient_accumulation_steps", 1,
              "--output_dir", folder, *dpo_flags(world))
    return str(folder)


def run(monkeypatch, *typed):
    monkeypatch.setattr(sys, "argv", ["tools.export", *map(str, typed)])
    tools.export.main()


def ours(model, pictures, limit=24):
    """[(prompt's ids without the image's patches, greedy ids)] of the last head."""
    head, rows = list(model.heads.values())[-1], []
    for path in pictures:
        for question in QUESTIONS:
            example = Example(path, [[(f"{IMAGE}\n{question}", None)]])
            dataset = PackedDataset([example], model.row_format())
            (answers, _), = generate(model.trunk, [head], dataset[[0]], limit)
            rows.append((dataset.row(0).input_ids, answers[0][0]))
    return rows


def theirs(folder, pictures, limit=24, adapter=None):
    """The same by transformers, from the exported folder alone."""
    from transformers import AutoProcessor, LlavaForConditionalGeneration
    model = LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
    if adapter:
        from peft import PeftModel
        model = PeftModel.from_pretrained(model, adapter)
    processor, rows = AutoProcessor.from_pretrained(folder), []
    for path in pictures:
        for question in QUESTIONS:
            asked = [{"role": "user", "content": [{"type": "image"},
                                                  {"type": "text", "text": question}]}]
            text = processor.apply_chat_template(asked, add_generation_prompt=True)
            with Image.open(path) as image:
                inputs = processor(images=image.convert("RGB"), text=text, return_tensors="pt")
            said = model.generate(**inputs, max_new_tokens=limit, do_sample=False)[0].tolist()
            prompt, said = inputs.input_ids[0].tolist(), said[inputs.input_ids.shape[1]:]
            rows.append((prompt, said[:said.index(EOS)] if EOS in said else said))
    return rows


def same(model, one, other):
    """Prompts token by token, then answers; some of them must be worth comparing."""
    image = len(model.tokenizer)
    for (prompt, said), (their_prompt, their_said) in zip(one, other, strict=True):
        assert [image if t < 0 else t for t in prompt] == their_prompt
        assert said == their_said
    assert max(len(said) for _, said in one) > 3


def test_transformers_says_the_same(tmp_path, pictures, monkeypatch):
    """The shipped base as llava-hf: prompt ids, and greedy tokens, of square and other pictures."""
    run(monkeypatch, BASE, tmp_path / "hf")
    model = load_base(BASE, dtype=torch.float32)
    same(model, ours(model, pictures), theirs(str(tmp_path / "hf"), pictures))
    config = load_json(tmp_path / "hf" / "config.json")
    rows = padded_vocabulary(model)
    assert rows % 64 == 0 and config["text_config"]["vocab_size"] == rows > len(model.tokenizer) + 1
    assert config["image_token_index"] == len(model.tokenizer)
    # And it is a base for the programs here again.
    again = load_base(str(tmp_path / "hf"), dtype=torch.float32)
    assert [said for _, said in ours(again, pictures)] == [s for _, s in ours(model, pictures)]

@pytest.fixture(scope="module")
def wide(world, tmp_path_factory):
    """A random base whose rows are whole blocks of 64: bitsandbytes' kernel for the CPU gives wrong
    numbers for others.
    """
    torch.manual_seed(0)
    tokenizer = Tokenizer(world.tokenizer)
    config = small_config(8, 8, len(tokenizer))
    config.text.intermediate_size, config.projector_hidden_size = 128, 64
    trunk, head = shake(Trunk(config)), shake(Head(config))
    folder = tmp_path_factory.mktemp("wide") / "base"
    save_base(str(folder), Llava(trunk, {"base": head}, tokenizer,
                                 ImageProcessor(config.vision.image_size), ""))
    return folder


def test_transformers_reads_four_bits(wide, tmp_path, pictures, monkeypatch):
    """Written by us and read with bitsandbytes; written with bitsandbytes and read by us."""
    pytest.importorskip("bitsandbytes")
    run(monkeypatch, wide, tmp_path / "hf", "--bits", 4)
    model = load_base(str(tmp_path / "hf"), dtype=torch.float32)
    assert model.config.bits == 4
    expected = ours(model, pictures)
    same(model, expected, theirs(str(tmp_path / "hf"), pictures))
    assert [s for _, s in expected] != [s for _, s in ours(load_base(str(wide)), pictures)]

    # A folder of the hub's: transformers quantises the 16-bit export itself, tower and all.
    from transformers import AutoProcessor, BitsAndBytesConfig, LlavaForConditionalGeneration
    run(monkeypatch, wide, tmp_path / "whole")
    settings = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4",
                                  bnb_4bit_use_double_quant=True,
                                  bnb_4bit_compute_dtype=torch.float32)
    written = LlavaForConditionalGeneration.from_pretrained(
        tmp_path / "whole", dtype=torch.float32, quantization_config=settings)
    written.save_pretrained(tmp_path / "hub")
    AutoProcessor.from_pretrained(tmp_path / "whole").save_pretrained(tmp_path / "hub")
    shutil.copy(tmp_path / "whole" / "tokenizer.model", tmp_path / "hub")
    read = load_base(str(tmp_path / "hub"), dtype=torch.float32)
    assert read.config.bits == 4
    for name, theirs_linear in written.model.language_model.named_modules():
        if name.endswith("_proj"):
            mine = read.trunk.model.get_submodule(name).packed
            state = theirs_linear.weight.quant_state
            assert torch.equal(mine.codes, theirs_linear.weight.data)
            assert torch.equal(mine.absmax, state.absmax) and mine.offset == state.offset.item()
            assert torch.equal(mine.dequantised(torch.float32), state_of(theirs_linear))


def state_of(linear):
    """The whole weight of bitsandbytes' linear."""
    from bitsandbytes.functional import dequantize_4bit
    return dequantize_4bit(linear.weight.data, linear.weight.quant_state)


def test_lora_in_every_format(world, lora, tmp_path, pictures, monkeypatch):
    """Whole as llava-hf, whole as llava, and alone as peft on the exported base: one answer."""
    model = load_base(world.base, adapter=lora)
    expected = ours(model, pictures)
    plain = ours(load_base(world.base), pictures)
    assert [said for _, said in expected] != [said for _, said in plain]
    run(monkeypatch, lora, tmp_path / "hf", "--format", "llava-hf")
    same(model, expected, theirs(str(tmp_path / "hf"), pictures))
    run(monkeypatch, lora, tmp_path / "llava", "--format", "llava")
    assert ours(load_base(str(tmp_path / "llava")), pictures) == expected
    run(monkeypatch, world.base, tmp_path / "base")
    run(monkeypatch, lora, tmp_path / "peft", "--format", "peft")
    adapted = theirs(str(tmp_path / "base"), pictures, adapter=str(tmp_path / "peft"))
    same(model, expected, adapted)
    for name in ("hf", "llava", "base", "peft"):
        assert is_card(tmp_path / name / "README.md")
    assert not [name for name in os.listdir(tmp_path) if "partial" in name]


def test_a_trained_lm_head(world, tmp_path, pictures, monkeypatch, in_this_process):
    run_train("--tune", "lm_head", "--max_steps", 2, "--learning_rate", "1e-1", "--keep_correct",
              "--output_dir", tmp_path / "head", *dpo_flags(world))
    base = load_base(world.base)
    base.heads["trained"] = load_trained(str(tmp_path / "head"), base)
    run(monkeypatch, tmp_path / "head", tmp_path / "hf")
    same(base, ours(base, pictures), theirs(str(tmp_path / "hf"), pictures))


def test_a_block_is_refused(world, tmp_path, monkeypatch, in_this_process):
    run_train("--stage", 1, "--max_steps", 1, "--keep_correct", "--output_dir", tmp_path / "one",
              *dpo_flags(world))
    for form in "llava", "llava-hf", "peft":
        with pytest.raises(InputError, match="post-interaction block.*no public server can run"):
            run(monkeypatch, tmp_path / "one", tmp_path / "out", "--format", form)
    assert not os.path.exists(tmp_path / "out")


def test_what_cannot_be_exported(world, lora, tmp_path, monkeypatch):
    (tmp_path / "there").mkdir()
    (tmp_path / "voco").mkdir()
    (tmp_path / "voco" / "config.json").write_text('{"num_voco": 2}')
    for typed, said in (((tmp_path / "voco", tmp_path / "x"), "compresses images into <voco>"),
                        ((world.base, tmp_path / "there"), "exists already"),
                        ((world.base, tmp_path / "x", "--format", "peft"), "takes a LoRA"),
                        ((world.base, tmp_path / "x", "--push", "one"), "is no name of the hub's"),
                        ((world.base, tmp_path / "x", "--push", "me/it"), "--push me/it: http")):
        with pytest.raises(InputError, match=said):
            run(monkeypatch, *typed)
    assert sorted(os.listdir(tmp_path)) == ["there", "voco"]


def test_push(world, lora, tmp_path):
    """The stand-in gets every file of the folder as it is; without a login nothing is written."""
    with StandIn({}, tmp_path / "cache") as hub:
        done = hub.run("-m", "tools.export", lora, "whole", "--push", "me/new", cwd=tmp_path,
                       HF_TOKEN="hf_stand_in")
        assert done.returncode == 0, done.stderr[-2000:]
        got, written = hub.uploaded["me/new"], sorted(os.listdir(tmp_path / "whole"))
        assert sorted(name for name in got if name != ".gitattributes") == written
        assert {"config.json", "model.safetensors", "README.md", "tokenizer.model"} < set(got)
        for name in written:
            assert got[name] == (tmp_path / "whole" / name).read_bytes()
        hub.refuses = True
        done = hub.run("-m", "tools.export", lora, "again", "--push", "me/new", cwd=tmp_path)
        assert done.returncode == 1 and len(done.stderr.splitlines()) == 1, done.stderr[-2000:]
        assert "--push me/new" in done.stderr and "hf auth login" in done.stderr
    assert not os.path.exists(tmp_path / "again")


# ---- Cards ---------------------------------------------------------------------------------------


def test_the_card_says_what_it_is(world, lora, tmp_path):
    """Base, data, flags, commit and licence; an evaluation goes into it, and in place of an older.
    """
    folder = tmp_path / "lora"
    shutil.copytree(lora, folder)
    text = (folder / "README.md").read_text()
    assert text.startswith(BEGINS)
    for part in (f"| base | `{world.base}` |", "| trained | lora |", "--lora_r 4", "| steps | 3 |",
                 "| data | `VG`, `desc_data.json`, `pope_data.json` |", "--learning_rate 0.03",
                 "LLAMA 2 Community", "Not evaluated yet"):
        assert part in text, part
    commit = text.partition("nanoHADPO, commit ")[2].partition(" ")[0]
    assert commit == "unknown" or 7 <= len(commit) <= 12
    for table in "first table\n", "second table\n":
        add_pope(str(folder), table)
    text = (folder / "README.md").read_text()
    assert "second table" in text and "first table" not in text and "Not evaluated" not in text


def test_the_cards_flags_can_be_typed():
    """A stage in place of its groups, groups with commas, and LoRA's flags only of LoRA."""
    arguments = {"stage": 2, "tune": ["post_decoder", "lm_head"], "lora_alpha": 256, "seed": 42}
    flags = card({"arguments": arguments}, "stage2", "").partition("## Flags")[2]
    assert flags.split("```")[1].split("\n") == ["", "--seed 42", "--stage 2", ""]
    arguments |= {"stage": None, "tune": ["lora", "lm_head"], "lora_r": 4, "keep_correct": True}
    flags = card({"arguments": arguments}, "lora", "").partition("## Flags")[2]
    assert flags.split("```")[1].strip().split("\n") == [
        "--keep_correct", "--lora_alpha 256", "--lora_r 4", "--seed 42", "--tune lora,lm_head"]


def test_the_licence_is_the_bases(world, tmp_path, in_this_process):
    base = tmp_path / "base"
    shutil.copytree(world.base, base)
    (base / "README.md").write_text("---\nlicense: cc-by-4.0\ninference: false\n---\nA model\n")
    run_train("--tune", "lm_head", "--max_steps", 1, "--keep_correct", "--output_dir",
              tmp_path / "run", *dpo_flags(world)[2:], "--model_name_or_path", base)
    assert "\nlicense: cc-by-4.0\n" in (tmp_path / "run" / "README.md").read_text()


def test_a_readme_of_somebody_else_stays(world, lora, tmp_path, in_this_process):
    folder = tmp_path / "run"
    shutil.copytree(lora, folder)
    (folder / "README.md").write_text("my notes")
    with pytest.raises(InputError, match="holds a README.md that is not ours"):
        run_train("--lora_r", 4, "--max_steps", 1, "--output_dir", folder, *dpo_flags(world))
    add_pope(str(folder), "table")
    assert (folder / "README.md").read_text() == "my notes"


def test_an_evaluation_is_in_the_card(world, lora, tmp_path, monkeypatch):
    folder = tmp_path / "lora"
    shutil.copytree(lora, folder)
    monkeypatch.setattr(sys, "argv", ["eval_pope.py", str(folder), "--coco_path", world.coco,
                                      "--pope_path", world.pope, "--set", "adv",
                                      "--max_new_tokens", "2"])
    eval_pope.main()
    text = (folder / "README.md").read_text()
    assert "Protocol `hadpo`." in text and "adversarial (labels" in text and "| adapter |" in text
