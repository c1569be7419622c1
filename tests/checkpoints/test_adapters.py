"""Adapters of other programs over their base: the right numbers, by peft's own merge and by LLaVA's
rules, or one line that says what the adapter is.
"""
import json
import os
import shutil

import pytest
import torch
from conftest import largest_difference, load_json
from public_checkpoints import (
    LLAVA_SETTINGS,
    PublicCheckpoints,
    agrees,
    expected_of,
    transformers,
    variant_of,
)
from safetensors.torch import load_file, save_file

from checkpoints.load import load_base
from support.common import InputError

peft = pytest.importorskip("peft")
NOTES_FILE = "non_lora_trainables.bin"
WEIGHTS = "adapter_model.safetensors"


@pytest.fixture(scope="module")
def public(world, tmp_path_factory):
    return PublicCheckpoints(world, tmp_path_factory)


def adapter_with(public, target, change=None, **settings):
    """A copy of the public adapter with other tensors (change(tensors)) or settings → its path."""
    shutil.copytree(public.adapted[0], target)
    values = load_json(target / "adapter_config.json") | settings
    (target / "adapter_config.json").write_text(json.dumps(values))
    if change:
        tensors = load_file(target / WEIGHTS)
        save_file(change(tensors) or tensors, target / WEIGHTS, {"format": "pt"})
    return str(target)


def refused(base, adapter, *said):
    """The InputError that the adapter gives, which says all of this in one line."""
    with pytest.raises(InputError) as error:
        load_base(str(base), adapter=str(adapter))
    print(error.value)
    assert all(words in str(error.value) for words in said)
    assert "\n" not in str(error.value) and str(adapter) in str(error.value)


# ---- LLaVA's own LoRA folder ---------------------------------------------------------------------


def vicuna_of(public, target):
    """The model's language half alone, as Vicuna comes; its config.json says nothing of images."""
    folder = variant_of(public.llava, target,
                        lambda key: None if "mm_projector" in key else key)
    config = {name: value for name, value in load_json(folder / "config.json").items()
              if not name.startswith(("mm_", "image_"))}
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "llama"}))
    return folder


def llava_lora_of(public, target, **settings):
    """As LLaVA's train.py leaves it: adapter, whole config.json, the projector beside."""
    adapter_with(public, target)
    config = load_json(public.llava / "config.json") | settings
    (target / "config.json").write_text(json.dumps(config))
    projector = {"base_model.model." + key: tensor
                 for key, tensor in load_file(public.llava / "model.safetensors").items()
                 if "mm_projector" in key}
    torch.save(projector, target / NOTES_FILE)
    return str(target)


def test_llavas_lora_on_vicuna(public, tmp_path):
    """Its config.json counts: pad, lengths, the projector, as in LLaVA's load_pretrained_model."""
    vicuna = vicuna_of(public, tmp_path / "vicuna")
    lora = llava_lora_of(public, tmp_path / "lora", tokenizer_model_max_length=200)
    model = agrees("LLaVA's LoRA on Vicuna", public.adapted[1], vicuna, public.clip, adapter=lora)
    assert model.config.pad_images and model.preprocess.pad and model.config.max_length == 200
    cropped = llava_lora_of(public, tmp_path / "cropped", image_aspect_ratio="square")
    assert not load_base(str(vicuna), str(public.clip), adapter=cropped).preprocess.pad


def test_settings_of_llavas_lora_are_checked_and_named(public, tmp_path):
    vicuna = vicuna_of(public, tmp_path / "vicuna")
    lora = llava_lora_of(public, tmp_path / "lora", mm_projector_type="linear")
    with pytest.raises(InputError, match="lora/config.json: mm_projector_type is \"linear\""):
        load_base(str(vicuna), str(public.clip), adapter=lora)


def test_llavas_lora_of_any_resolution_is_refused(public, tmp_path):
    vicuna = vicuna_of(public, tmp_path / "vicuna")
    lora = llava_lora_of(public, tmp_path / "lora", image_aspect_ratio="anyres_max_9")
    with pytest.raises(InputError, match='lora/config.json: image_aspect_ratio is "anyres_max_9"'):
        load_base(str(vicuna), str(public.clip), adapter=lora)


def test_llavas_lora_by_rope_theta(public, tmp_path):
    """Numbers follow the adapter's config.json where the base says another."""
    vicuna = vicuna_of(public, tmp_path / "vicuna")
    values = load_json(vicuna / "config.json") | {"rope_theta": 77.0}
    (vicuna / "config.json").write_text(json.dumps(values))
    lora = llava_lora_of(public, tmp_path / "lora", rope_theta=10000.0)
    agrees("the adapter's rope_theta", public.adapted[1], vicuna, public.clip, adapter=lora)


def test_qlora_of_llava(public, tmp_path):
    """QLoRA writes into config.json how it read its base; the base here is whole."""
    vicuna = vicuna_of(public, tmp_path / "vicuna")
    lora = llava_lora_of(public, tmp_path / "lora", quantization_config={"load_in_4bit": True})
    agrees("QLoRA", public.adapted[1], vicuna, public.clip, adapter=lora)


def test_llavas_lora_on_a_base_that_has_its_tower(public, tmp_path):
    """The tower that the adapter's config.json names on the hub is the one that the base names
    here; and Hugging Face's layout keeps its own tower and its settings.
    """
    expected = public.adapted[1]
    named = variant_of(public.llava, tmp_path / "named", mm_vision_tower=str(public.clip))
    lora = llava_lora_of(public, tmp_path / "lora")
    assert load_json(f"{lora}/config.json")["mm_vision_tower"].startswith("openai/")
    agrees("a tower by the base's name", expected, named, adapter=lora)
    agrees("Hugging Face's base", expected, public.hf, adapter=lora)
    assert LLAVA_SETTINGS["mm_vision_tower"].startswith("openai/")


def test_a_config_that_says_nothing_of_images_does_not_count(public, tmp_path):
    """Some tools copy the language model's config.json beside an adapter."""
    adapter = adapter_with(public, tmp_path / "lora")
    text = load_json(public.hf / "config.json")["text_config"] | {"rope_theta": 77.0}
    with open(f"{adapter}/config.json", "w") as file:
        json.dump(text, file)
    model = agrees("LLaMA's config.json beside", public.adapted[1], public.llava, public.clip,
                   adapter=adapter)
    assert model.preprocess.pad


# ---- Adapters that start elsewhere ---------------------------------------------------------------


def causal_of(public, **settings):
    """The model's language half as transformers has it, wrapped by peft → (LLaVA, peft's model)."""
    theirs = transformers.LlavaForConditionalGeneration.from_pretrained(public.hf)
    causal = transformers.LlamaForCausalLM(theirs.config.text_config)
    causal.model, causal.lm_head = theirs.model.language_model, theirs.lm_head
    torch.manual_seed(3)
    config = peft.LoraConfig(r=4, lora_alpha=8, **settings)
    return theirs, peft.get_peft_model(causal, config).eval()


def move(parameters, seed=5):
    """As training would: other values, for LoRA and what else is trained."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in parameters:
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)


@pytest.mark.parametrize("start", ("pissa", "pissa_niter_4", "olora"))
def test_starts_that_change_the_base(public, tmp_path, start):
    """peft writes them; converted to plain LoRA, as the error says, they give peft's own numbers.
    """
    theirs, wrapped = causal_of(public, target_modules=["q_proj", "v_proj"],
                                init_lora_weights=start)
    wrapped.peft_config["default"].init_lora_weights = True
    wrapped.save_pretrained(tmp_path / "start")
    wrapped.peft_config["default"].init_lora_weights = start
    move(p for name, p in wrapped.named_parameters() if "lora_" in name)
    expected = expected_of(theirs, public.pieces)
    wrapped.save_pretrained(tmp_path / "raw")
    refused(public.hf, tmp_path / "raw", f'init_lora_weights is "{start}"',
            "path_initial_model_for_weight_conversion", "plain LoRA")
    wrapped.save_pretrained(tmp_path / "converted",
                            path_initial_model_for_weight_conversion=str(tmp_path / "start"))
    agrees("converted", expected, public.hf, adapter=str(tmp_path / "converted"))


@pytest.mark.parametrize("start", ("PISSA", "corda", "lora_ga", "loftq", "of next year", 7))
def test_other_starts_are_refused(public, tmp_path, start):
    adapter = adapter_with(public, tmp_path / "lora", init_lora_weights=start)
    refused(public.hf, adapter, f"init_lora_weights is {json.dumps(start)}", "merge it with peft")


@pytest.mark.parametrize("start", (True, False, None, "gaussian", "eva", "orthogonal", "mica"))
def test_starts_that_leave_the_base_alone(public, tmp_path, start):
    adapter = adapter_with(public, tmp_path / "lora", init_lora_weights=start)
    agrees(f"init {start}", public.adapted[1], public.hf, adapter=adapter)


ACTING = {
    "rank_pattern": {"q_proj": 8}, "alpha_pattern": {"q_proj": 8}, "use_dora": True,
    "use_rslora": True, "fan_in_fan_out": True, "lora_bias": True, "bias": "all",
    "layer_replication": [[0, 2], [1, 3]], "target_parameters": ["experts.gate_up_proj"],
    "trainable_token_indices": [3], "alora_invocation_tokens": [4], "use_qalora": True,
    "kasa_config": {"beta": 1e-4}, "peft_type": "IA3"}


@pytest.mark.parametrize("name", ACTING)
def test_settings_beyond_lora(public, tmp_path, name):
    adapter = adapter_with(public, tmp_path / "lora", **{name: ACTING[name]})
    refused(public.hf, adapter, f"adapter_config.json: {name} is {json.dumps(ACTING[name])}")


def test_settings_that_do_not_act(public, tmp_path):
    idle = {name: None for name in ACTING if name not in ("bias", "peft_type")}
    idle |= {"rank_pattern": {}, "alpha_pattern": {}, "target_parameters": [], "loftq_config": {}}
    adapter = adapter_with(public, tmp_path / "lora", **idle, bias="none")
    agrees("idle settings", public.adapted[1], public.hf, adapter=adapter)


@pytest.mark.parametrize("name, value", (("r", 0), ("r", "4"), ("r", None), ("r", True),
                                         ("lora_alpha", "8"), ("lora_alpha", None)))
def test_sizes_of_an_adapter(public, tmp_path, name, value):
    refused(public.hf, adapter_with(public, tmp_path / "lora", **{name: value}), name,
            "adapter_config.json")


# ---- Whole tensors in an adapter -----------------------------------------------------------------


def raw_keys(wrapped):
    """All that peft trains, by the names of its own modules and not of its files."""
    wanted = ("lora_", "modules_to_save", "original_module", "base_layer")
    return {key: tensor.clone() for key, tensor in wrapped.state_dict().items()
            if any(part in key for part in wanted)}


@pytest.mark.parametrize("modules", (["lm_head"], ["embed_tokens"], ["embed_tokens", "lm_head"]),
                         ids="+".join)
@pytest.mark.parametrize("raw", (False, True))
def test_modules_to_save(public, tmp_path, modules, raw):
    """peft's forward, unmerged, against what we load; as save_pretrained writes it, and as a
    state_dict() names it.
    """
    theirs, wrapped = causal_of(public, target_modules=["q_proj", "down_proj"],
                                modules_to_save=modules)
    moved = ("lora_", "modules_to_save")
    move(p for name, p in wrapped.named_parameters() if any(part in name for part in moved))
    theirs.lm_head = wrapped.base_model.model.lm_head
    expected = expected_of(theirs, public.pieces)
    wrapped.save_pretrained(tmp_path / "lora")
    if raw:
        save_file(raw_keys(wrapped), tmp_path / "lora" / WEIGHTS, {"format": "pt"})
    assert not torch.allclose(expected.logits, public.expected.logits, atol=0.1)
    agrees(f"{modules}", expected, public.hf, adapter=str(tmp_path / "lora"))


def test_saved_embeddings(public, tmp_path):
    """peft's save_embedding_layers: whole tensors though no module was to be saved."""
    theirs, wrapped = causal_of(public, target_modules=["q_proj", "lm_head"])
    move(p for name, p in wrapped.named_parameters()
         if "lora_" in name or "embed_tokens" in name or "lm_head.base_layer" in name)
    theirs.lm_head = wrapped.base_model.model.lm_head
    expected = expected_of(theirs, public.pieces)
    wrapped.save_pretrained(tmp_path / "lora", save_embedding_layers=True)
    keys = load_file(tmp_path / "lora" / WEIGHTS)
    name = "base_model.model.model.embed_tokens.weight"
    keys.setdefault(name, wrapped.state_dict()[name].clone())
    base_layer = "base_model.model.lm_head.base_layer.weight"
    keys.setdefault(base_layer, wrapped.state_dict()[base_layer].clone())
    save_file(keys, tmp_path / "lora" / WEIGHTS, {"format": "pt"})
    agrees("saved embeddings and LoRA of lm_head", expected, public.hf,
           adapter=str(tmp_path / "lora"))


@pytest.mark.parametrize("prefix", ("base_model.model.model.mm_projector.",
                                    "base_model.model.model.multi_modal_projector.",
                                    "base_model.model.model.mm_projector.modules_to_save.default.",
                                    "base_model.model.model.mm_projector.modules_to_save."))
def test_a_projector_in_the_adapter(public, tmp_path, prefix):
    """Over a base that has another one, and over Vicuna, which has none."""
    projector = {key.removeprefix("model.mm_projector."): tensor
                 for key, tensor in load_file(public.llava / "model.safetensors").items()
                 if "mm_projector" in key}
    if "multi_modal" in prefix:
        projector = {key.replace("0.", "linear_1.").replace("2.", "linear_2."): tensor
                     for key, tensor in projector.items()}

    def with_projector(tensors):
        return tensors | {prefix + key: tensor for key, tensor in projector.items()}

    adapter = adapter_with(public, tmp_path / "lora", with_projector,
                           modules_to_save=["mm_projector"])
    zeroed = variant_of(public.llava, tmp_path / "zeroed")
    tensors = load_file(zeroed / "model.safetensors")
    save_file({key: 0 * tensor if "mm_projector" in key else tensor
               for key, tensor in tensors.items()}, zeroed / "model.safetensors")
    agrees("projector", public.adapted[1], zeroed, public.clip, adapter=adapter)
    config = load_json(public.llava / "config.json")
    with open(f"{adapter}/config.json", "w") as file:
        json.dump(config, file)
    agrees("projector over Vicuna", public.adapted[1], vicuna_of(public, tmp_path / "vicuna"),
           public.clip, adapter=adapter)


def test_whole_tensors_of_another_base(public, tmp_path):
    """Each is called what it is."""
    def with_tensor(name, tensor):
        return lambda tensors: tensors | {name: tensor}

    pieces, count = public.pieces + 64, iter(range(99))
    for name, shape, *said in (
            ("base_model.model.model.embed_tokens.weight", (pieces + 3, 32),
             f"embed_tokens.weight is of a vocabulary of {pieces + 3} tokens", f"base has {pieces}",
             "tokenizer.model"),
            ("base_model.model.lm_head.modules_to_save.default.weight", (pieces + 1, 32),
             f"lm_head.weight is of a vocabulary of {pieces + 1} tokens"),
            ("base_model.model.model.multi_modal_projector.linear_1.weight", (5, 24),
             "mm_projector.0.weight is a whole tensor of shape (5, 24)", "own base"),
            ("base_model.model.score.weight", (2, 32), "score.weight", "own base"),
            ("base_model.model.model.embed_tokens.lora_embedding_A", (4, pieces),
             "lora_embedding_A is LoRA of another kind", "merge it with peft")):
        adapter = adapter_with(public, tmp_path / f"{next(count)}",
                               with_tensor(name, torch.ones(shape)))
        refused(public.hf, adapter, *said)


@pytest.mark.parametrize("name", ("lm_head", "embed_tokens", "multi_modal_projector",
                                  "model.mm_projector"))
def test_modules_to_save_that_are_not_there(public, tmp_path, name):
    """The base's own would stand in for what was trained. A name of nothing here is harmless."""
    adapter = adapter_with(public, tmp_path / "lora", modules_to_save=[name])
    refused(public.hf, adapter, f"modules_to_save in adapter_config.json names {name}")
    harmless = adapter_with(public, tmp_path / "harmless", modules_to_save=["vision_resampler"])
    agrees("a module of another model", public.adapted[1], public.hf, adapter=harmless)


def test_another_rank_than_the_file_says(public, tmp_path):
    refused(public.hf, adapter_with(public, tmp_path / "lora", r=8), "rank 8", "save it again")
    refused(public.hf, adapter_with(public, tmp_path / "half", lambda tensors: {
        key: tensor for key, tensor in tensors.items()
        if key != "base_model.model.model.layers.1.self_attn.q_proj.lora_B.weight"}),
        "layers.1.self_attn.q_proj", "None")


def test_lora_of_a_norm_is_no_lora(public, tmp_path):
    """A tensor with one dimension has no product of two matrices."""
    key = "base_model.model.model.norm.lora_{}.weight"
    adapter = adapter_with(public, tmp_path / "lora", lambda tensors: tensors | {
        key.format("A"): torch.ones(4, 32), key.format("B"): torch.ones(32, 4)})
    refused(public.hf, adapter, "model.norm have shapes")


# ---- Tied embeddings -----------------------------------------------------------------------------


def test_an_lm_head_in_the_file_is_not_overwritten(public, tmp_path):
    """tie_word_embeddings fills an lm_head that is missing, and no other."""
    for n, changes in enumerate((
            {"tie_word_embeddings": True},
            {"text_config": load_json(public.hf / "config.json")["text_config"]
             | {"tie_word_embeddings": True}})):
        tied = variant_of(public.hf, tmp_path / f"{n}", **changes)
        agrees("lm_head in the file", public.expected, tied)


def test_a_tied_base_with_saved_embeddings(public, tmp_path):
    """The adapter's embeddings are lm_head too, where neither has an lm_head of its own."""
    tied = variant_of(public.hf, tmp_path / "tied",
                      lambda key: None if "lm_head" in key else key, tie_word_embeddings=True)
    embeddings = torch.randn(public.pieces + 64, 32)
    name = "base_model.model.model.embed_tokens.weight"
    adapter = adapter_with(public, tmp_path / "lora", lambda tensors: tensors | {name: embeddings})
    model = load_base(str(tied), adapter=adapter)
    assert largest_difference("lm_head", model.head.lm_head.weight, embeddings) == 0
    key = "base_model.model.lm_head.lora_{}.weight"
    change = {key.format("A"): torch.randn(4, 32), key.format("B"): torch.randn(embeddings.shape[0],
                                                                               4)}
    adapter = adapter_with(public, tmp_path / "both", lambda tensors: tensors | change)
    model = load_base(str(tied), adapter=adapter)
    expected = load_file(tied / "model.safetensors")["language_model.model.embed_tokens.weight"]
    assert largest_difference("embeddings", model.trunk.model.embed_tokens.weight, expected) == 0
    expected = expected + 2 * change[key.format("B")] @ change[key.format("A")]
    assert largest_difference("lm_head", model.head.lm_head.weight, expected) < 1e-5


def test_the_public_base_is_untouched(public):
    """What these tests share is as it was written."""
    assert sorted(os.listdir(public.adapted[0])) == ["README.md", "adapter_config.json", WEIGHTS]
