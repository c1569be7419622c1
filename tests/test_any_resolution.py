"""LLaVA-1.6: images of any resolution in tiles. Against transformers' LlavaNext on random weights
(pixels, logits, greedy tokens), against the original's rules written out, and from files through
the programs, with images of different numbers of tiles in one batch.
"""
import json
import math
import os
import re
import shutil
import signal

import numpy as np
import pytest
import torch
from conftest import largest_difference, load_json, run_train, shake
from PIL import Image
from programs import shell, succeeds
from public_checkpoints import (
    LLAVA_KEYS,
    VISION,
    PublicCheckpoints,
    randomised,
    transformers,
    variant_of,
)
from safetensors.torch import load_file, save_file
from short_runs import losses_of, zero_file

from checkpoints.load import load_base
from checkpoints.save import save_base
from data import BOS, EOS, IMAGE, IMAGE_ID, Example, PackedDataset
from evals.sampling import Conversation, Sampling
from model import Head, answer_states, generate
from post_decoder import VARIANTS
from support.anyres import NEWLINE, TileGrid
from support.common import InputError
from training.guards import Guards, long_rows

REAL = ((336, 672), (672, 336), (672, 672), (1008, 336), (336, 1008))
SMALL = tuple((24 * width // 336, 24 * height // 336) for width, height in REAL)
SIZES = ((30, 30), (64, 40), (1, 2000), (40, 64), (4000, 10), (17, 100), (25, 24))
QUESTIONS = "Is there a ball in the image?", "Is there a kite?"
LLMS = "vicuna", "mistral"


# ---- The original's rules ------------------------------------------------------------------------


def original(size, pinpoints, side, patches):
    """Resolution, size in it, and patches that stay, as LLaVA's code computes them, in floats."""
    width, height = size
    best, most, least = None, 0, float("inf")
    for w, h in pinpoints:
        scale = min(w / width, h / height)
        effective = min(int(width * scale) * int(height * scale), width * height)
        wasted = w * h - effective
        if effective > most or effective == most and wasted < least:
            best, most, least = (w, h), effective, wasted
    across, down = best[0] / width, best[1] / height
    if across < down:
        inside = best[0], min(math.ceil(height * across), best[1])
    else:
        inside = min(math.ceil(width * down), best[0]), best[1]
    columns, rows = best[0] // side * patches, best[1] // side * patches
    if width / height > columns / rows:
        pad = (rows - int(height * (columns / width))) // 2
        rows = len(range(rows)[pad:rows - pad])
    else:
        pad = (columns - int(width * (rows / height))) // 2
        columns = len(range(columns)[pad:columns - pad])
    return best, inside, (rows, columns)


# Where an image ends among the tiles: rows and columns of patches.
SHAPES = {(1, 2000): (48, 0), (4000, 10): (0, 72), (640, 480): (36, 48), (336, 336): (24, 24)}


@pytest.mark.parametrize("size", [*SIZES, *SHAPES, (500, 333), (333, 500), (5000, 4000), (7, 3)])
def test_rules_of_the_original(size):
    grid = TileGrid(REAL)
    best, inside, (rows, columns) = original(size, REAL, 336, 24)
    assert (rows, columns) == SHAPES.get(size, (rows, columns))
    tiles, order = grid.layout(size)
    assert grid.resolution(size) == best and tiles == 1 + math.prod(best) // 336 ** 2
    assert len(order) == 576 + rows * (columns + 1) <= grid.most_tokens == 2928
    assert (order == NEWLINE).sum() == rows and order[:576].tolist() == list(range(576))
    if rows:
        assert (order[576:].reshape(rows, columns + 1)[:, -1] == NEWLINE).all()
    # A white image on black: where it lies in the tiles.
    white = [np.asarray(tile).min(-1) > 0 for tile in grid.tiles(Image.new("RGB", size, "white"))]
    assert white[0].all() and sum(tile.sum() for tile in white[1:]) == math.prod(inside)


def test_patches_stand_where_the_picture_has_them():
    """Every patch of a picture in two rows of tiles, found again by its own colour."""
    grid = TileGrid(((4, 4),), 2, 2)                    # a pixel is a patch
    picture = np.arange(16, dtype=np.uint8).reshape(4, 4)
    image = Image.fromarray(np.stack([picture] * 3, -1))
    tiles, order = grid.layout(image.size)
    patches = np.stack([np.asarray(tile)[..., 0] for tile in grid.tiles(image)]).flatten()
    assert tiles == 5 and order.tolist()[:4] == [0, 1, 2, 3]
    rows = order[4:].reshape(4, 5)
    assert (patches[rows[:, :-1]] == picture).all() and (rows[:, -1] == NEWLINE).all()


# ---- transformers --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def public(world, tmp_path_factory):
    return PublicCheckpoints(world, tmp_path_factory)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder, generator = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    for width, height in SIZES:
        noise = generator.integers(0, 255, (height, width, 3), dtype=np.uint8)
        Image.fromarray(noise).save(folder / f"{width}x{height}.png")
    return [str(folder / f"{width}x{height}.png") for width, height in SIZES]


def next_of_transformers(pieces, llm):
    """A random LlavaNextForConditionalGeneration of Vicuna's or Mistral's proportions."""
    torch.manual_seed(0)
    sizes = dict(vocab_size=pieces + 64, hidden_size=32, num_attention_heads=4,
                 num_hidden_layers=3, max_position_embeddings=512, rms_norm_eps=1e-5,
                 bos_token_id=BOS, eos_token_id=EOS)
    if llm == "mistral":
        text = transformers.MistralConfig(
            intermediate_size=112, num_key_value_heads=1, sliding_window=None,
            rope_parameters={"rope_type": "default", "rope_theta": 1e6}, **sizes)
    else:
        text = transformers.LlamaConfig(intermediate_size=56, pad_token_id=0, **sizes)
    config = transformers.LlavaNextConfig(
        vision_config=transformers.CLIPVisionConfig(**VISION), text_config=text,
        image_token_index=pieces, image_grid_pinpoints=[list(pair) for pair in SMALL])
    model = randomised(transformers.LlavaNextForConditionalGeneration(config))
    model.generation_config.pad_token_id = 0
    return model


def theirs_of(public, folder, llm):
    """transformers' model, and its files in both layouts."""
    model = next_of_transformers(public.pieces, llm)
    public.save(model, folder / "hf")
    model.model.vision_tower.save_pretrained(folder / "clip")
    in_hf = load_json(folder / "hf" / "config.json")
    tensors = {}
    for key, tensor in load_file(folder / "hf" / "model.safetensors").items():
        theirs = next((name for name in LLAVA_KEYS if key.startswith(name)), None)
        ours = LLAVA_KEYS[theirs] + key[len(theirs):] if theirs else f"model.{key}"
        tensors[ours] = tensor
    assert "model.image_newline" in tensors
    text = in_hf["text_config"]
    rope = text.pop("rope_parameters")
    config = text | {
        "model_type": "llava_mistral" if llm == "mistral" else "llava",
        "rope_theta": rope["rope_theta"], "mm_vision_tower": "../clip", "mm_hidden_size": 24,
        "mm_projector_type": "mlp2x_gelu", "mm_vision_select_layer": -2,
        "mm_vision_select_feature": "patch", "image_aspect_ratio": "anyres",
        "mm_patch_merge_type": "spatial_unpad", "mm_use_im_start_end": False,
        # (width, height), and the other way round in Hugging Face's: which of two equal ones wins.
        "image_grid_pinpoints": [pair[::-1] for pair in in_hf["image_grid_pinpoints"]],
        "tokenizer_model_max_length": 512}
    os.makedirs(folder / "llava")
    save_file(tensors, folder / "llava" / "model.safetensors", {"format": "pt"})
    (folder / "llava" / "config.json").write_text(json.dumps(config))
    shutil.copy(public.tokenizer, folder / "llava" / "tokenizer.model")
    return model


@pytest.fixture(scope="module", params=LLMS)
def both(request, public, tmp_path_factory):
    """(name of the LLM, transformers' model, the folder with its layouts)"""
    folder = tmp_path_factory.mktemp(request.param)
    return request.param, theirs_of(public, folder, request.param), folder


def asked(pictures, *questions):
    return [Example(path, [[(f"{IMAGE}\n{question}", None)] for question in questions])
            for path in pictures]


@pytest.mark.parametrize("layout", ("hf", "llava", "again"))
def test_transformers_say_the_same(both, pictures, tmp_path, layout):
    """Pixels, tokens, logits and greedy answers; ours from one batch of all images."""
    llm, theirs, folder = both
    if layout == "again":
        save_base(str(tmp_path / "again"), load_base(str(folder / "llava")))
        folder = tmp_path
    model = load_base(str(folder / layout))
    config = model.config
    assert config.template == ("mistral" if llm == "mistral" else "v1")
    assert config.text.num_key_value_heads == (1 if llm == "mistral" else 4)
    assert config.text.rope_theta == (1e6 if llm == "mistral" else 1e4)

    processor = transformers.models.llava_next.image_processing_pil_llava_next
    processor = processor.LlavaNextImageProcessorPil(
        size={"shortest_edge": 24}, crop_size={"height": 24, "width": 24},
        image_grid_pinpoints=[list(pair) for pair in SMALL])
    dataset = PackedDataset(asked(pictures, QUESTIONS[0]), model.row_format())
    batch = dataset[list(range(len(pictures)))]
    hidden_states, _ = model.trunk(batch)
    (answers, _), = generate(model.trunk, [model.head], batch, 8)
    tiles = batch.row_tiles()
    assert len({int((row >= 0).sum()) for row in tiles}) == 3
    for n, path in enumerate(pictures):
        inputs = processor([Image.open(path)], return_tensors="pt")
        pixels = batch.pixel_values[tiles[n][tiles[n] >= 0]]
        assert largest_difference(path, pixels, inputs["pixel_values"][0]) < 1e-5
        length = int((batch.branch[n] >= 0).sum())
        ids = batch.input_ids[n:n + 1, :length]
        ids = ids.masked_fill(ids == IMAGE_ID, theirs.config.image_token_id)
        logits = theirs(input_ids=ids, **inputs).logits[0]
        ours = model.head(hidden_states[n, :length])
        assert logits.std() > 0.1 and largest_difference("logits", ours, logits) < 1e-4
        said = theirs.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **inputs,
                               max_new_tokens=8, do_sample=False)
        said = said[0, length:].tolist()
        assert answers[n][0] == (said[:said.index(EOS)] if EOS in said else said)


def test_mistrals_template(both):
    """By hand: no system sentence, and a space behind an answer."""
    llm, _, folder = both
    model = load_base(str(folder / "llava"))
    turns = [(f"{IMAGE}\nWhat?", "A ball."), ("And?", "A kite.")]
    row_format = model.row_format("a system sentence")
    if llm == "vicuna":
        assert row_format.template.system == "a system sentence"
        return
    row = PackedDataset([Example("x", [turns])], row_format)
    row.format.grid = None
    row = row.row(0)
    encode = model.tokenizer.encode
    said = encode("A ball. "), encode("A kite. ")
    end = [*encode("[INST] And? [/INST]", True), *said[1], EOS]
    start = [BOS, *encode("[INST] "), *row_format.num_patches * [IMAGE_ID],
             *encode("\nWhat? [/INST]"), *said[0], EOS]
    assert row.input_ids == start + end
    assert row.target == [*said[0], EOS, *said[1], EOS]


# ---- The block, packing, several images ----------------------------------------------------------


def with_block(model, variant="full"):
    """A random head with a block, on the lm_head of a model."""
    torch.manual_seed(2)
    block = model.config.block_config(**VARIANTS[variant], zero_init=False)
    head = shake(Head(model.config, block))
    head.lm_head = model.head.lm_head
    return head


@pytest.mark.parametrize("variant", ("full", "align_after_align", "self_attn", None))
def test_a_row_alone_and_among_others(world, pictures, both, variant):
    """The same numbers, whatever stands beside it; and a branch alone as among branches."""
    _, _, folder = both
    model = load_base(str(folder / "llava"))
    head = with_block(model, variant) if variant else model.head
    examples = asked(pictures, *QUESTIONS) + [Example(None, [[(QUESTIONS[0], None)]])]
    dataset = PackedDataset(examples, model.row_format())
    together, first = generate(model.trunk, [head], dataset[list(range(len(examples)))], 4)[0]
    for n in range(len(examples)):
        for branch, turns in enumerate(examples[n].conversations):
            alone = PackedDataset([Example(examples[n].image, [turns])], model.row_format())
            (said, logits), = generate(model.trunk, [head], alone[[0]], 4)
            assert largest_difference("alone", first[n, branch], logits[0, 0]) < 2e-5
            assert said[0][0] == together[n][branch]


def test_the_block_looks_at_all_tiles(pictures, both):
    """Each tile changes what it says; the padding among the tiles of a batch does not."""
    _, _, folder = both
    model = load_base(str(folder / "llava"))
    head = with_block(model)
    batch = PackedDataset(asked(pictures, QUESTIONS[0]), model.row_format())[[1, 2]]
    hidden_states, features = model.trunk(batch)
    at = batch.ends
    h, context, mask = answer_states(head, hidden_states, features, batch, at)
    counts = (batch.row_tiles() >= 0).sum(1).tolist()
    assert len(set(counts)) == 2 and context.shape[1] == 9 * max(counts)
    assert mask.sum((1, 2, 3)).tolist() == [9 * count for count in counts]
    said = head(h, context, mask)
    for tile in range(max(counts)):
        other = context.clone()
        other[:, 9 * tile:9 * tile + 9] += torch.randn(9, 24)
        changed = (head(h, other, mask) - said).abs().amax((1, 2)) > 1e-6
        assert changed.tolist() == [tile < count for count in counts]


# ---- From files through the programs -------------------------------------------------------------


@pytest.fixture(scope="module")
def odd_world(world, tmp_path_factory):
    """The session's world, with its pictures in several shapes."""
    folder = tmp_path_factory.mktemp("odd") / "world"
    shutil.copytree(world.folder, folder)
    shapes = ((48, 48), (60, 30), (30, 80), (100, 12))
    for number, path in enumerate(sorted(folder.rglob("*.jpg"))):
        with Image.open(path) as image:
            resized = image.resize(shapes[number % 4])
        resized.save(path)
    return folder


def flags_of(both, world):
    llm, _, folder = both
    return ["--model_name_or_path", folder / ("llava" if llm == "mistral" else "hf"),
            "--vg_path", world / "VG", "--no-bf16", "--seed", 1, "--max_steps", 3,
            "--desc_data_path", world / "hadpo" / "desc_data.json",
            "--pope_data_path", world / "hadpo" / "pope_data.json",
            "--per_device_train_batch_size", 4, "--gradient_accumulation_steps", 1,
            "--learning_rate", 1e-3]


def test_a_stopped_run_goes_on(both, odd_world, tmp_path, monkeypatch, in_this_process):
    """Also with the projector, the newline and LLaMA in training; to the same bytes."""
    flags = [*flags_of(both, odd_world), "--tune", "projector,llama,post_decoder"]
    run_train(*flags, "--output_dir", tmp_path / "whole")
    check = Guards.check

    def stop(self, now, values, seen):
        if now == 2:
            os.kill(os.getpid(), signal.SIGINT)
        check(self, now, values, seen)

    monkeypatch.setattr(Guards, "check", stop)
    with pytest.raises(SystemExit):
        run_train(*flags, "--output_dir", tmp_path / "cut")
    monkeypatch.setattr(Guards, "check", check)
    run_train(*flags, "--output_dir", tmp_path / "cut", "--resume")
    written = [load_file(tmp_path / name / "model.safetensors") for name in ("whole", "cut")]
    assert all(torch.equal(tensor, written[1][key]) for key, tensor in written[0].items())
    before = load_base(str(flags[1])).trunk.model.image_newline
    assert not torch.equal(written[0]["model.image_newline"], before)


def test_stage_0_on_one_process_and_on_two(both, odd_world, tmp_path, two, in_this_process):
    """With rows that have no image, which alone in a batch still keep all parameters in step."""
    llm, _, folder = both
    if llm == "mistral":
        pytest.skip("ZeRO-3 is the same for it, and slow to start")
    rows = load_json(odd_world / "llava" / "train.json")[:12]
    for row in rows[::3]:
        del row["image"]
        row["conversations"] = [turn | {"value": turn["value"].replace(f"{IMAGE}\n", "")}
                                for turn in row["conversations"]]
    (tmp_path / "talk.json").write_text(json.dumps(rows))
    flags = ["--stage", 0, "--model_name_or_path", folder / "llava", "--learning_rate", 1e-3,
             "--data_path", tmp_path / "talk.json", "--max_steps", 3, "--image_folder",
             odd_world / "llava" / "images"]
    run_train(*flags, "--output_dir", tmp_path / "one", "--no-bf16",
              "--per_device_train_batch_size", 4, "--gradient_accumulation_steps", 1)
    two(*flags, "--output_dir", tmp_path / "two", "--per_device_train_batch_size", 1,
        "--deepspeed", zero_file(tmp_path, 3, train_batch_size=4))
    one, divided = (losses_of(tmp_path / name) for name in ("one", "two"))
    assert largest_difference("losses", one, divided) < 1e-4 and one[0] != one[-1]
    ours, theirs = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    newline = "model.image_newline"
    assert largest_difference(newline, ours[newline], theirs[newline]) < 1e-4
    assert not torch.equal(ours[newline], load_base(str(flags[3])).trunk.model.image_newline)


def test_stage_1_and_pope_from_files(both, odd_world, tmp_path):
    """With kept features and without; then POPE and CHAIR."""
    common = "python", "train.py", "--stage", 1, *flags_of(both, odd_world)
    succeeds(*common, "--output_dir", tmp_path / "plain")
    succeeds(*common, "--output_dir", tmp_path / "kept", "--cache_features", tmp_path / "features")
    lines = [[json.loads(line) for line in open(tmp_path / name / "metrics.jsonl")]
             for name in ("plain", "kept")]
    for one, other in zip(*lines, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], abs=2e-5)
    assert lines[0][0]["loss"] == pytest.approx(math.log(2), abs=1e-4)
    assert lines[0][-1]["loss"] != lines[0][0]["loss"]
    asked = ("--coco_path", odd_world / "coco", "--no-bf16", "--max_new_tokens", 4)
    table = succeeds("python", "eval_pope.py", tmp_path / "kept", *asked,
                     "--pope_path", odd_world / "pope")
    assert "adversarial" in table and "| kept |" in table
    facts = load_json(odd_world / "world.json")["evaluation"]
    instances = {"images": [{"id": n, "file_name": name} for n, name in enumerate(facts)],
                 "categories": [{"id": 0, "name": "kite"}], "annotations": []}
    (tmp_path / "instances_val2014.json").write_text(json.dumps(instances))
    said = succeeds("python", "-m", "evals.chair", tmp_path / "kept", *asked,
                    "--annotations", tmp_path / "instances_val2014.json")
    assert "CHAIR" in said and "| kept |" in said


def test_a_report_and_a_merged_model(both, odd_world, pictures, tmp_path):
    """What looks at a checkpoint takes tiles, too."""
    _, _, folder = both
    succeeds("python", "-m", "tools.merge", folder / "llava", tmp_path / "whole")
    succeeds("python", "-m", "tools.report", tmp_path / "whole", "--no-bf16", "--max_new_tokens",
             2, "--coco_path", odd_world / "coco", "--pope_path", odd_world / "pope", "--output",
             tmp_path / "report.html")
    one, other = (load_base(str(path)) for path in (folder / "llava", tmp_path / "whole"))
    assert one.fingerprint == other.fingerprint
    done = shell("python", "-m", "tools.export", folder / "llava", tmp_path / "hf", "--format",
                 "llava-hf")
    assert done.returncode == 1 and "say --format llava" in done.stderr


MIXED = {  # settings of a LLaVA-1.6 in LLaVA's layout → what the message says
    "1.5's images": ({"image_aspect_ratio": "pad"}, "mm_patch_merge_type is .spatial_unpad. and"),
    "1.5's images without the rest": (
        {"image_aspect_ratio": "pad", "mm_patch_merge_type": None, "image_grid_pinpoints": None,
         "model_type": "llava"}, 'image_aspect_ratio is "pad", and the weights hold image_newline'),
    "pinpoints alone": ({"image_aspect_ratio": "pad", "mm_patch_merge_type": "flat"},
                        "image_grid_pinpoints are there and image_aspect_ratio is .pad"),
    "no unpadding": ({"mm_patch_merge_type": "spatial"}, 'mm_patch_merge_type is "spatial" and'),
    "flat tiles": ({"mm_patch_merge_type": None}, 'mm_patch_merge_type is "flat" and'),
    "no pinpoints": ({"image_grid_pinpoints": None}, "image_grid_pinpoints are null"),
    "another tower's": ({"image_grid_pinpoints": [[336, 670]]}, "multiples of the tower's 24 pixe"),
    "far too many": ({"image_grid_pinpoints": [[2400, 2400]]}, "up to 100 tiles"),
    "no numbers": ({"image_grid_pinpoints": "(1x1),...,(6x6)"}, "image_grid_pinpoints are"),
    "v1's marks": ({"mm_use_im_start_end": True}, "mm_use_im_start_end is true and image_aspect"),
    "<voco>": ({"num_voco": 2}, "num_voco is 2 and image_aspect_ratio"),
    "tiles that do not fit": ({"tokenizer_model_max_length": 50},
                              "tokenizer_model_max_length .* is 50, and image_grid_pinpoints make"),
}


@pytest.mark.parametrize("what", MIXED)
def test_mixed_versions_are_refused_by_the_settings_name(both, tmp_path, what):
    llm, _, folder = both
    settings, said = MIXED[what]
    shutil.copytree(folder / "clip", tmp_path / "clip")
    model = variant_of(folder / "llava", tmp_path / "mixed", **settings)
    with pytest.raises(InputError) as error:
        load_base(str(model))
    said = said if llm == "vicuna" or settings.get("image_aspect_ratio") is None else "is"
    assert re.search(said, str(error.value)) and "\n" not in str(error.value)


def test_more_refusals(both, odd_world, pictures, tmp_path):
    """Mistral's window and its images; 1.5's weights; a row that is too long."""
    llm, _, folder = both
    shutil.copytree(folder / "clip", tmp_path / "clip")
    settings = {"sliding_window": 128}
    model = variant_of(folder / "llava", tmp_path / "window", **settings)
    if llm == "mistral":
        with pytest.raises(InputError, match="sliding_window is 128 and rows have up to 512"):
            load_base(str(model))
    as_15 = variant_of(folder / "llava", tmp_path / "lost",
                       lambda key: None if "newline" in key else key)
    with pytest.raises(InputError, match="anyres., and the weights do not hold image_newline"):
        load_base(str(as_15))

    # The largest image still fits, the prompt behind it does not.
    short = variant_of(folder / "llava", tmp_path / "short", tokenizer_model_max_length=53)
    dataset = PackedDataset(asked(pictures, QUESTIONS[0]), load_base(str(short)).row_format())
    with pytest.raises(InputError, match="a prompt of .* tokens does not fit into 53"):
        long_rows(dataset)
    done = shell("python", "eval_pope.py", short, "--no-bf16", "--coco_path",
                 odd_world / "coco", "--pope_path", odd_world / "pope")
    assert done.returncode == 1 and "tokens does not fit into 53" in done.stderr
    assert "Traceback" not in done.stderr


def test_voco_is_refused(both, odd_world, tmp_path):
    _, _, folder = both
    done = shell("python", "train.py", "--stage", 0, "--voco", 2, "--model_name_or_path",
                 folder / "llava", "--data_path", odd_world / "llava" / "train.json",
                 "--image_folder", odd_world / "llava" / "images", "--output_dir",
                 tmp_path / "out", "--no-bf16")
    assert done.returncode == 1
    assert "--voco 2: the base's config.json has image_grid_pinpoints" in done.stderr


def test_pinpoints_as_a_text(both, tmp_path):
    """As LLaVA's training writes them, where they were typed."""
    _, _, folder = both
    shutil.copytree(folder / "clip", tmp_path / "clip")
    pairs = load_json(folder / "llava" / "config.json")["image_grid_pinpoints"]
    typed = "[" + ", ".join(f"({width}, {height})" for width, height in pairs) + "]"
    as_text = variant_of(folder / "llava", tmp_path / "text", image_grid_pinpoints=typed)
    one, other = load_base(str(folder / "llava")), load_base(str(as_text))
    assert one.config.pinpoints == other.config.pinpoints and one.fingerprint == other.fingerprint


def test_a_conversation(both, pictures):
    """What tools/chat.py says is what the packed rows say."""
    _, _, folder = both
    model = load_base(str(folder / "llava"))
    dataset = PackedDataset(asked(pictures[:2], QUESTIONS[0]), model.row_format())
    (answers, _), = generate(model.trunk, [model.head], dataset[[0, 1]], 6)
    for n, path in enumerate(pictures[:2]):
        conversation = Conversation(model, model.head, path)
        said = list(conversation.answer(QUESTIONS[0], Sampling(max_new_tokens=6)))
        assert said == answers[n][0]
