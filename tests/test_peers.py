"""Against the public implementation: transformers with random weights in fp32 on the CPU.

Weights are copied key by key.
"""
import pytest
import torch
from conftest import largest_difference

from clip_vit import CLIPVisionConfig, CLIPVisionTower
from data import BOS, EOS, IGNORE, IMAGE_ID, collate, pack
from llama import LlamaConfig, LlamaModel
from model import Head, LlavaConfig, Trunk, generate

transformers = pytest.importorskip("transformers")

# As many key heads, fewer (grouped-query), and 13B's odd count (40 = 5 x 8).
HEADS = [(4, 4), (4, 2), (5, 5)]
VOCAB, IMAGE_TOKEN = 60, 59


def text_sizes(heads, kv_heads):
    return dict(vocab_size=VOCAB, hidden_size=8 * heads, intermediate_size=56, num_hidden_layers=3,
                num_attention_heads=heads, num_key_value_heads=kv_heads,
                max_position_embeddings=256, rms_norm_eps=1e-5)


VISION = dict(hidden_size=24, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4,
              image_size=24, patch_size=8)


def randomised(model):
    """Also norms and biases, which start as ones and zeros."""
    with torch.no_grad():
        for parameter in model.parameters():
            scale = 0.2 if parameter.dim() == 1 else 0.05
            parameter += scale * torch.randn_like(parameter)
    return model.eval().requires_grad_(False)


def copy(module, tensors, skipped=()):
    """Every one of the module's tensors must be there, and all others must be `skipped`."""
    result = module.load_state_dict(tensors, strict=False)
    assert not result.missing_keys, result
    assert all(key.startswith(tuple(skipped)) for key in result.unexpected_keys), result
    return module.requires_grad_(False)


@pytest.mark.parametrize("heads, kv_heads", HEADS)
@pytest.mark.parametrize("theta", (10_000., 500_000.))
def test_llama(heads, kv_heads, theta):
    torch.manual_seed(0)
    sizes = text_sizes(heads, kv_heads)
    rope = {"rope_type": "default", "rope_theta": theta}
    config = transformers.LlamaConfig(**sizes, rope_parameters=rope)
    theirs = randomised(transformers.LlamaForCausalLM(config))
    state = theirs.state_dict()
    tensors = {key.removeprefix("model."): tensor for key, tensor in state.items()}
    ours = copy(LlamaModel(LlamaConfig(**sizes, rope_theta=theta)), tensors, ["lm_head."])
    ids = torch.randint(VOCAB, (2, 150))
    position, branch = torch.arange(150).expand(2, -1), torch.zeros_like(ids)
    logits = ours(ours.embed_tokens(ids), position, branch) @ state["lm_head.weight"].T
    expected = theirs(ids).logits
    assert expected.std() > 0.1
    assert largest_difference(f"LLaMA, {kv_heads} of {heads} heads", logits, expected) < 1e-4


@pytest.mark.parametrize("activation", ("quick_gelu", "gelu"))
@pytest.mark.parametrize("layer", (-1, -2))
def test_clip(layer, activation):
    torch.manual_seed(0)
    config = transformers.CLIPVisionConfig(**VISION, hidden_act=activation)
    theirs = randomised(transformers.CLIPVisionModel(config))
    ours = CLIPVisionTower(CLIPVisionConfig(**VISION, hidden_act=activation), layer)
    tensors = {"vision_model." + key.removeprefix("vision_model."): tensor
               for key, tensor in theirs.state_dict().items()}
    copy(ours, {key: tensor for key, tensor in tensors.items() if not ours.unused_key(key)})
    # No layer too many.
    assert len(ours.vision_model.encoder.layers) == VISION["num_hidden_layers"] + 1 + layer
    pixels = torch.randn(2, 3, 24, 24)
    expected = theirs(pixels, output_hidden_states=True).hidden_states[layer][:, 1:]
    assert largest_difference(f"CLIP, layer {layer}, {activation}", ours(pixels), expected) < 1e-4


def llava_twins(heads=4, kv_heads=4):
    """transformers' LLaVA with random weights, and our trunk and head with the same."""
    torch.manual_seed(0)
    sizes = text_sizes(heads, kv_heads)
    text = transformers.LlamaConfig(**sizes, pad_token_id=0, bos_token_id=BOS, eos_token_id=EOS)
    theirs = randomised(transformers.LlavaForConditionalGeneration(transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(**VISION), text_config=text,
        image_token_index=IMAGE_TOKEN, vision_feature_layer=-2,
        vision_feature_select_strategy="default")))

    config = LlavaConfig(LlamaConfig(**sizes), CLIPVisionConfig(**VISION), select_layer=-2)
    trunk, head = Trunk(config), Head(config)
    names = {"model.language_model.": "model.", "language_model.model.": "model.",
             "model.vision_tower.": "vision_tower.vision_model.",
             "model.multi_modal_projector.linear_1.": "model.mm_projector.0.",
             "model.multi_modal_projector.linear_2.": "model.mm_projector.2."}
    state = {}
    for key, tensor in theirs.state_dict().items():
        old = next((old for old in names if key.startswith(old)), "")
        new = names[old] if old else ""
        state[new + key.removeprefix(old).removeprefix("vision_model.")] = tensor
    head.lm_head.weight.data = state.pop("lm_head.weight")
    unused = trunk.vision_tower.unused_key
    copy(trunk, {key: tensor for key, tensor in state.items() if not unused(key)})
    return theirs, trunk, head


@pytest.mark.parametrize("heads, kv_heads", HEADS)
def test_llava(heads, kv_heads):
    """From pixels and tokens to logits, two rows with an image each, and 20 greedy tokens."""
    theirs, trunk, head = llava_twins(heads, kv_heads)
    pixels = torch.randn(2, 3, 24, 24)
    rows = [[BOS, 7, 8, IMAGE_ID, 9, 10, 11], [BOS, 20, 21, IMAGE_ID, 12, 14, 13]]
    packed = [pack([(ids, [IGNORE] * len(ids))], 9, 256, str(n)) for n, ids in enumerate(rows)]
    batch = collate(packed, lambda n: pixels[int(n)])
    length = int((batch.branch[0] >= 0).sum())              # of both rows; behind it is padding
    ids = batch.input_ids.masked_fill(batch.input_ids == IMAGE_ID, IMAGE_TOKEN)[:, :length]
    expected = theirs(input_ids=ids, pixel_values=pixels).logits
    hidden_states, _ = trunk(batch)
    logits = head(hidden_states[:, :length])
    assert expected.std() > 0.1
    assert largest_difference(f"LLaVA, {kv_heads} of {heads} heads", logits, expected) < 1e-4

    (answers, _), = generate(trunk, [head], batch, 20)
    theirs.generation_config.pad_token_id = 0
    tokens = theirs.generate(input_ids=ids, pixel_values=pixels, max_new_tokens=20, do_sample=False)
    tokens = tokens[:, ids.shape[1]:].tolist()
    tokens = [row[:row.index(EOS)] if EOS in row else row for row in tokens]
    assert [row[0] for row in answers] == tokens and max(map(len, tokens)) > 5
