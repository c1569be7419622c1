"""VoCo-LLaMA's public files, written key by key, and ours: what loads, and what is refused."""
import json
import os

import pytest
import torch
from conftest import as_llava, largest_difference, shake, small_llava
from public_checkpoints import PublicCheckpoints, edit, variant_of

from checkpoints.load import load_base
from checkpoints.save import save_base
from data import BOS, IGNORE, IMAGE_ID, VOCO_ID, Tokenizer, collate, pack
from support.common import InputError


@pytest.fixture(scope="module")
def public(world, tmp_path_factory):
    return PublicCheckpoints(world, tmp_path_factory)


def public_voco(public, folder, added="added_tokens.json", **changes):
    """LLaVA's files with one embedding more than pieces, and the token in Hugging Face's files."""
    rows = public.pieces + 1
    variant_of(public.llava_inside, folder, vocab_size=rows, **changes)

    def cut(tensors):
        for key in "model.embed_tokens.weight", "lm_head.weight":
            tensors[key] = tensors[key][:rows].contiguous()

    edit(folder / "model.safetensors", cut)
    values = {"<voco>": rows - 1}
    if added == "tokenizer_config.json":
        decoder = {"1": {"content": "<s>"}, str(rows - 1): {"content": "<voco>", "special": True}}
        values = {"added_tokens_decoder": decoder}
    (folder / added).write_text(json.dumps(values))
    return folder


def test_public_files_give_the_numbers_of_transformers(public, tmp_path):
    """Which is given the paper's mask as a whole, (T, T)."""
    model = load_base(str(public_voco(public, tmp_path / "voco", num_voco=2)), str(public.clip))
    assert model.config.num_voco == 2 == model.row_format().num_voco
    ids = [BOS, IMAGE_ID, 9, VOCO_ID, VOCO_ID, 9, 10, 11, 12]
    pixels = torch.randn(3, 24, 24, generator=torch.Generator().manual_seed(1))
    batch = collate([pack([(ids, [IGNORE] * len(ids))], 9, 256, "a")], lambda _: pixels)
    length = len(ids) - 1 + 9
    logits = model.head(model.trunk(batch)[0][:, :length])

    theirs = public.model
    plain = torch.tensor([[public.pieces if i == VOCO_ID else i for i in ids if i != IMAGE_ID]])
    embeds = theirs.get_input_embeddings()(plain)
    features = theirs.model.get_image_features(pixel_values=pixels[None])
    features = getattr(features, "pooler_output", features)[0]
    embeds = torch.cat((embeds[:, :1], features[None], embeds[:, 1:]), 1)
    mask = torch.ones(length, length).tril()
    mask[13:, :11] = 0                                          # bos, 9 patches, a newline
    bias = torch.zeros(1, 1, length, length).masked_fill(mask == 0, float("-inf"))
    h = theirs.model.language_model(inputs_embeds=embeds, attention_mask=bias).last_hidden_state
    expected = theirs.lm_head(h)[..., :public.pieces + 1]
    assert largest_difference("public files", logits, expected) < 1e-4


@pytest.mark.parametrize("added", ("added_tokens.json", "tokenizer_config.json"))
@pytest.mark.parametrize("count", (None, 0, -1, 2.0, True, "2", 5000))
def test_the_number_of_tokens_must_be_said(public, tmp_path, added, count):
    """Nothing in the public files tells it."""
    folder = public_voco(public, tmp_path / "voco", added, num_voco=count)
    with pytest.raises(InputError) as error:
        load_base(str(folder))
    said = str(error.value)
    assert said.startswith(f"{folder}/config.json: num_voco is {count!r}") and "\n" not in said
    assert '"num_voco": 2' in said


def test_a_checkpoint_without_its_token_is_refused(public, tmp_path):
    """config.json counts tokens, and no embedding is one."""
    tokenizer = Tokenizer(public.tokenizer)
    trunk, head = small_llava(vocab_size=len(tokenizer), num_voco=2)
    save_base(str(tmp_path / "base"), as_llava(trunk, head, tokenizer=tokenizer))
    with pytest.raises(InputError, match=f"has {len(tokenizer)} pieces, <voco> beside them, the "
                                         f"model only {len(tokenizer)} embeddings"):
        load_base(str(tmp_path / "base"))


def test_a_token_in_the_middle_is_refused(public, tmp_path):
    folder = public_voco(public, tmp_path / "voco", num_voco=1)
    (folder / "added_tokens.json").write_text(json.dumps({"<voco>": public.pieces - 1}))
    with pytest.raises(InputError, match="<voco> has the id"):
        load_base(str(folder))


def test_saved_and_loaded_again(public, tmp_path):
    tokenizer = Tokenizer(public.tokenizer)
    trunk, head = small_llava(vocab_size=len(tokenizer) + 1, num_voco=4)
    saved = as_llava(shake(trunk), head, tokenizer=tokenizer)
    save_base(str(tmp_path / "base"), saved)
    again = load_base(str(tmp_path / "base"))
    assert again.config == trunk.config and again.fingerprint == saved.fingerprint
    with open(tmp_path / "base" / "config.json") as file:
        assert json.load(file)["num_voco"] == 4
    # Another number is another base; a base without the token is what it was before.
    trunk.config.num_voco = 2
    other = as_llava(trunk, head, tokenizer=tokenizer).fingerprint
    assert other != saved.fingerprint and other.partition("-")[0] == saved.fingerprint[:16]
    assert not os.path.exists(tmp_path / "base" / "added_tokens.json")
