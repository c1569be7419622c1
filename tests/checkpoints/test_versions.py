"""LLaVA's other versions, written key by key as their authors' programs write them: the numbers of
transformers, from files through the programs; and files that mix versions.
"""
import json
import os
import re

import pytest
import torch
from conftest import as_llava, largest_difference, load_json, shake, small_llava
from programs import shell, succeeds
from public_checkpoints import (
    PublicCheckpoints,
    agrees,
    edit,
    expected_of,
    llava_of_transformers,
    randomised,
    variant_of,
)
from safetensors.torch import load_file, save_file
from torch import nn

from checkpoints.load import load_base
from checkpoints.save import save_base
from data import BOS, IGNORE, IMAGE, IMAGE_ID, Example, PackedDataset, Tokenizer
from support.common import InputError
from support.templates import SYSTEM

MERGE = "python", "-m", "tools.merge"


@pytest.fixture(scope="module")
def public(world, tmp_path_factory):
    return PublicCheckpoints(world, tmp_path_factory)


# ---- LLaVA v1 ------------------------------------------------------------------------------------


def mlp(depth):
    """LLaVA's mlpNx_gelu, as its builder makes it."""
    modules = [nn.Linear(24, 32)]
    for _ in range(1, depth):
        modules += [nn.GELU(), nn.Linear(32, 32)]
    return nn.Sequential(*modules)


def with_projector(public, projector, folder, **settings):
    """transformers' model with another projector, and its files in LLaVA's layout."""
    torch.manual_seed(5)
    model = llava_of_transformers(public.pieces)
    model.model.multi_modal_projector = randomised(projector)

    def exchange(tensors):
        for key in [key for key in tensors if "mm_projector" in key]:
            del tensors[key]
        tensors.update({f"model.mm_projector.{key}": tensor.clone()
                        for key, tensor in projector.state_dict().items()})

    variant_of(public.llava, folder, mm_vision_tower=str(public.clip), **settings)
    edit(folder / "model.safetensors", exchange)
    return model, folder


def llava_v1(public, folder, **settings):
    """LLaVA v1: <im_patch>, <im_start> and <im_end> behind the pieces, a linear projector, and a
    config.json of that time, which says nothing of projector and aspect ratio.
    """
    rows = public.pieces + 3
    v1 = {"vocab_size": rows, "mm_projector_type": None, "image_aspect_ratio": None,
          "mm_use_im_start_end": True, "mm_use_im_patch_token": True, "model_type": "llava",
          "pad_token_id": -1}
    model, folder = with_projector(public, nn.Linear(24, 32), folder, **v1 | settings)

    def cut(tensors):
        for key in "model.embed_tokens.weight", "lm_head.weight":
            tensors[key] = tensors[key][:rows].clone()

    edit(folder / "model.safetensors", cut)
    added = {"<im_patch>": rows - 3, "<im_start>": rows - 2, "<im_end>": rows - 1}
    (folder / "added_tokens.json").write_text(json.dumps(added))
    return model, folder


@pytest.mark.parametrize("depth", (1, 2, 3))
def test_every_depth_of_the_projector(public, tmp_path, depth):
    model, folder = with_projector(public, mlp(depth), tmp_path / "deep",
                                   mm_projector_type=f"mlp{depth}x_gelu")
    expected = expected_of(model, public.pieces)
    loaded = agrees(f"mlp{depth}x_gelu", expected, folder)
    save_base(str(tmp_path / "again"), loaded)
    agrees("written again", expected, tmp_path / "again")


def test_v1_gives_the_numbers_of_transformers(public, tmp_path):
    """Tokens by hand, logits of the row that a dataset makes, and the same when written again."""
    theirs, folder = llava_v1(public, tmp_path / "v1")
    model, pieces = load_base(str(folder)), public.pieces
    assert not model.preprocess.pad and model.config.projector_depth == 0
    path = os.path.join(public_images(public), sorted(os.listdir(public_images(public)))[0])
    dataset = PackedDataset([Example(path, [[(f"{IMAGE}\nIs there a ball?", None)]])],
                            model.row_format())
    batch = dataset[[0]]
    encode = model.tokenizer.encode
    by_hand = [BOS, *encode(f"{SYSTEM} USER: "), pieces + 1, *9 * [IMAGE_ID], pieces + 2,
               *encode("\nIs there a ball? ASSISTANT:")]
    length = len(by_hand)
    assert batch.input_ids[0, :length].tolist() == by_hand
    assert batch.target.numel() == 0 or batch.target.eq(IGNORE).all()

    # Id `pieces` is LLaVA's <im_patch> and transformers' image token.
    ids = batch.input_ids[:, :length].masked_fill(batch.input_ids[:, :length] == IMAGE_ID, pieces)
    expected = theirs(input_ids=ids, pixel_values=batch.pixel_values).logits[..., :pieces + 3]
    save_base(str(tmp_path / "again"), model)
    for what in folder, tmp_path / "again":
        again = load_base(str(what))
        assert again.row_format().template == model.row_format().template
        logits = again.head(again.trunk(batch)[0][:, :length])
        assert largest_difference("v1", logits, expected) < 1e-4


def public_images(public):
    return os.path.join(os.path.dirname(public.tokenizer), "coco", "val2014")


def test_a_delta_from_files_through_the_programs(world, public, tmp_path):
    """Delta and LLaMA in fp16 → a base that is trained and asked."""
    _, whole = llava_v1(public, tmp_path / "whole")
    llama, delta = tmp_path / "llama", tmp_path / "delta"
    variant_of(whole, llama)
    variant_of(whole, delta)
    torch.manual_seed(6)
    of_llama, of_delta, expected = {}, {}, {}
    for key, tensor in load_file(whole / "model.safetensors").items():
        if "inv_freq" in key:
            continue
        of_delta[key] = tensor.half()
        if "mm_projector" not in key:
            rows = public.pieces if key in ("model.embed_tokens.weight", "lm_head.weight") else None
            of_llama[key] = (0.1 * torch.randn(tensor.shape)).half()[:rows].contiguous()
        # As in llava/model/apply_delta.py.
        expected[key] = of_delta[key].clone()
        if key in of_llama:
            base = of_llama[key]
            expected[key].data[:base.shape[0]] += base
    save_file(of_llama, llama / "model.safetensors", {"format": "pt"})
    save_file(of_delta, delta / "model.safetensors", {"format": "pt"})

    base = tmp_path / "base"
    succeeds(*MERGE, delta, base, "--delta", llama, fresh=True)
    written = load_file(base / "model.safetensors")
    assert written.keys() == expected.keys()
    assert all(torch.equal(written[key], tensor) for key, tensor in expected.items())

    # The LLaMA may not be another one, and --delta goes with deltas alone.
    edit(llama / "model.safetensors", lambda tensors: tensors.pop("model.norm.weight"))
    done = shell(*MERGE, delta, tmp_path / "no", "--delta", llama)
    assert done.returncode == 1 and "model.norm.weight (1 such keys)" in done.stderr
    assert "Traceback" not in done.stderr and not os.path.exists(tmp_path / "no")

    common = "--model_name_or_path", base, "--max_steps", 1, "--no-bf16"
    data = ("--vg_path", world.vg, "--desc_data_path", world.desc, "--pope_data_path", world.pairs,
            "--per_device_train_batch_size", 2, "--gradient_accumulation_steps", 1)
    succeeds("python", "train.py", "--stage", 1, *common, *data, "--output_dir", tmp_path / "out",
             "--cache_features", tmp_path / "kept")
    printed = succeeds("python", "eval_pope.py", tmp_path / "out", "--coco_path", world.coco,
                       "--pope_path", world.pope, "--max_new_tokens", 2, "--no-bf16")
    assert "adversarial" in printed


# ---- LLaVA-1.5-13B -------------------------------------------------------------------------------


def test_the_proportions_of_13b(public, tmp_path):
    """40 layers, 40 heads, the inner width 2.7 times as wide."""
    model = llava_of_transformers(public.pieces, 40, 40, num_hidden_layers=40,
                                  intermediate_size=864)
    expected = expected_of(model, public.pieces)
    loaded = agrees("13B, Hugging Face's", expected, public.save(model, tmp_path / "hf"))
    assert loaded.config.block_config().num_attention_heads == 40


# ---- Mixed versions ------------------------------------------------------------------------------

MIXED = {  # settings of a LLaVA-1.5 → what the message says
    "v1's projector": ({"mm_projector_type": "linear"}, 'mm_projector_type is "linear".*mlp2x'),
    "no projector": ({"mm_projector_type": None}, 'mm_projector_type is "linear".*absent'),
    "another depth": ({"mm_projector_type": "mlp3x_gelu"}, 'mm_projector_type is "mlp3x_gelu"'),
    "another kind": ({"mm_projector_type": "cabstractor"}, "mm_projector_type .*only linear and"),
    "depth 0": ({"mm_projector_type": "mlp0x_gelu"}, "mm_projector_type .*only linear and"),
    "marks without embeddings": ({"mm_use_im_start_end": True, "vocab_size": None},
                                 "tokenizer.model: has .*<im_start> and <im_end> beside them"),
    "marks of another type": ({"mm_use_im_start_end": "yes"}, "mm_use_im_start_end is .*true or"),
    "<voco> and marks": ({"mm_use_im_start_end": True, "num_voco": 2},
                         "mm_use_im_start_end is true, and num_voco 2"),
    "InstructBLIP": ({"model_type": "instructblip"}, 'model_type is "instructblip", which is not'),
    "MPT": ({"model_type": "llava_mpt"}, 'model_type is "llava_mpt", which is not'),
    "video": ({"model_type": "llava_next_video"}, 'model_type is "llava_next_video", which is not'),
    "another bos": ({"bos_token_id": 151643}, "bos_token_id is 151643 and only 1"),
    "another eos": ({"eos_token_id": 7}, "eos_token_id is 7 and only 2"),
}


@pytest.mark.parametrize("what", MIXED)
def test_mixed_versions_are_refused_by_the_settings_name(public, tmp_path, what):
    settings, said = MIXED[what]
    folder = variant_of(public.llava, tmp_path / "mixed", **settings)
    if settings.get("vocab_size", 1) is None:
        config = load_json(folder / "config.json") | {"vocab_size": public.pieces + 1}
        (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError) as error:
        load_base(str(folder), str(public.clip))
    assert re.search(said, str(error.value)) and "\n" not in str(error.value)


def test_early_ids_of_bos_and_eos(public, tmp_path):
    """transformers wrote them for every LLaMA, and LLaVA took tokenizer.model's all the same."""
    folder = variant_of(public.llava, tmp_path / "early", bos_token_id=0, eos_token_id=1,
                        pad_token_id=-1)
    agrees("early ids", public.expected, folder, public.clip)


def test_marks_that_are_not_the_last_embeddings(public, tmp_path):
    _, folder = llava_v1(public, tmp_path / "v1")
    added = {"<im_start>": public.pieces, "<im_end>": public.pieces + 1}
    (folder / "added_tokens.json").write_text(json.dumps(added))
    with pytest.raises(InputError, match="mm_use_im_start_end is true, and .*must be the last"):
        load_base(str(folder))


def test_v1s_settings_count_in_the_fingerprint(world, tmp_path):
    """Other words in the same weights are another base; what 1.5 has changes no fingerprint."""
    tokenizer = Tokenizer(world.tokenizer)
    trunk, head = small_llava(vocab_size=len(tokenizer) + 2)
    plain = as_llava(shake(trunk), head, tokenizer=tokenizer).fingerprint
    trunk.config.image_start_end = True
    assert as_llava(trunk, head, tokenizer=tokenizer).fingerprint != plain
