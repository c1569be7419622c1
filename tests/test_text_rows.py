"""Rows without an image: alone, among others, and with an image that no row looks at."""
import json

import pytest
import torch
from conftest import largest_difference, row_format, small_config, small_llava
from test_packed import PATCHES, make_sequences, pixels

from data import PackedDataset, Tokenizer, collate, pack
from dpo import token_logps
from model import answer_states
from training.conversations import read_llava


def packed(images, seed=0):
    """Rows with the given images (None = text only), all different."""
    rows = []
    for n, image in enumerate(images):
        _, sequences = make_sequences(False, seed + n)[0 if image else 3]
        rows.append(pack(sequences, PATCHES, 256, image))
    return rows


class Pixels:
    size, grid = 24, None

    def __call__(self, image):
        return pixels(image)


def logits_of(trunk, head, rows, **options):
    batch = collate(rows, Pixels(), **options)
    hidden_states, image_features = trunk(batch)
    context = trunk.image_context(head.block_config, image_features)
    states = answer_states(head, hidden_states, context, batch)
    return head(*states, batch.target >= 0)


@pytest.mark.parametrize("variant", (None, "full", "self_attn", "no_cross_attn",
                                     "align_after_align"))
def test_text_rows_in_any_company(variant):
    """Alone, among text rows and among image rows a text row has the same logits: its block sees
    zeros."""
    trunk, head = small_llava(variant=variant)
    rows = packed((None, "a.jpg", None, "b.jpg"))
    mixed = logits_of(trunk, head, rows)
    separate = torch.cat([logits_of(trunk, head, [row]) for row in rows])
    assert largest_difference(f"block {variant}, mixed against alone", mixed, separate) < 1e-4
    text = [rows[0], rows[2]]
    alone = torch.cat([logits_of(trunk, head, [row]) for row in text])
    assert collate(text, Pixels()).pixel_values is None
    among_text = logits_of(trunk, head, text)
    assert largest_difference(f"block {variant}, only text", among_text, alone) < 1e-4


def test_always_an_image_changes_nothing():
    """A zero image that no row looks at: tower and projector run, and loss and gradients are as
    without it."""
    rows, results = packed((None, None)), []
    for always in (False, True):
        trunk, head = (module.requires_grad_(True) for module in small_llava(variant="full"))
        ran = watch(tower=trunk.vision_tower, projector=trunk.model.mm_projector)
        batch = collate(rows, Pixels(), always_image=always)
        assert (batch.image_index == -1).all() and (batch.pixel_values is not None) == always
        logits = logits_of(trunk, head, rows, always_image=always)
        loss = -token_logps(logits, batch.target[batch.target >= 0]).mean()
        loss.backward()
        assert ran == ({"tower", "projector"} if always else set())
        named = [*trunk.named_parameters(), *head.named_parameters()]
        gradients = {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in named}
        results.append((loss.detach(), gradients, {name for name, p in named if p.grad is None}))
    (loss, gradients, without), (loss_with, gradients_with, still_without) = results
    assert largest_difference("loss", loss_with, loss) < 1e-6
    assert max((gradients_with[name] - g).abs().max() for name, g in gradients.items()) < 1e-6
    print(f"without a gradient: {len(without)} tensors, with an image {len(still_without)}: "
          f"{sorted(still_without)}")
    assert any("mm_projector" in name for name in without)
    assert not any("mm_projector" in name for name in still_without)
    with_images = packed(("a.jpg", None))
    expected = collate(with_images, Pixels()).pixel_values
    assert torch.equal(collate(with_images, Pixels(), True).pixel_values, expected)


def watch(**modules):
    """A set that will hold the names of the modules that have run."""
    ran = set()
    for name, module in modules.items():
        module.register_forward_hook(lambda *_, name=name: ran.add(name))
    return ran


def test_dataset_passes_it_on(world, tmp_path):
    path = tmp_path / "talk.json"
    said = [{"from": "human", "value": "Hi."}, {"from": "gpt", "value": "Hello."}]
    path.write_text(json.dumps([{"conversations": said}] * 2))
    examples = read_llava(str(path), "")
    rows_are = row_format(small_config(), Tokenizer(world.tokenizer))
    assert PackedDataset(examples, rows_are)[[0, 1]].pixel_values is None
    batch = PackedDataset(examples, rows_are, always_image=True)[[0, 1]]
    assert batch.pixel_values.shape == (1, 3, 24, 24) and not batch.pixel_values.any()
    assert batch.image_index.tolist() == [-1, -1]
