"""Images compressed once and asked about without them: the answers are those of one pass."""
import glob
import json
import os
import shutil

import pytest
import torch
from conftest import as_llava, largest_difference, load_json, shake, small_llava
from safetensors.torch import load_file, save_file

import eval_pope
from checkpoints.load import load_base
from checkpoints.save import save_base
from data import IMAGE, Example, ImageProcessor, PackedDataset, Tokenizer
from evals import chair
from model import Head, answer
from support.common import InputError
from training import compressed
from training.compressed import without_images

COUNT = 3


@pytest.fixture(scope="module")
def base(world, tmp_path_factory):
    """A random base with three <voco> tokens."""
    tokenizer, root = Tokenizer(world.tokenizer), tmp_path_factory.mktemp("voco")
    folder = str(root / "base")
    os.symlink(world.folder, root / "world")                # as it lies beside a tiny base
    trunk, head = small_llava(4, 2, vocab_size=len(tokenizer) + 1, num_voco=COUNT)
    save_base(folder, as_llava(shake(trunk), shake(head), tokenizer=tokenizer))
    return folder


@pytest.fixture
def model(base):
    return load_base(base)


def questions(world, model, count=7):
    """Rows about seven images, with one to three questions each."""
    images = sorted(glob.glob(f"{world.coco}/val2014/*.jpg"))[:count]
    words = "dog", "cat", "kite"
    examples = [Example(image, [[(f"{IMAGE}\nIs there a {word} in the image?", None)]
                                for word in words[:1 + n % 3]])
                for n, image in enumerate(images)]
    return PackedDataset(examples, model.row_format())


def said(model, dataset):
    """{row: (texts, logits of all words at the first place)} of the only head."""
    words = range(model.config.text.vocab_size)
    return {i: result for i, (result,) in answer(model, dataset, 8, 3, words=words)}


@pytest.fixture
def compressions(monkeypatch):
    """The files that are written."""
    written = []

    def noted(path, tensors):
        written.append(path)
        return write_tensors(path, tensors)

    write_tensors = compressed.write_tensors
    monkeypatch.setattr(compressed, "write_tensors", noted)
    return written


def test_two_passes_say_what_one_says(world, model, tmp_path, compressions, monkeypatch):
    dataset = questions(world, model)
    expected = said(model, dataset)
    rest = without_images(str(tmp_path), dataset, model)
    assert len(compressions) == 7
    monkeypatch.setattr(ImageProcessor, "__call__",
                        lambda self, image: pytest.fail(f"{image} was opened"))
    found = said(model, rest)
    worst = 0
    for i, (texts, logits) in expected.items():
        assert found[i][0] == texts
        worst = max(worst, largest_difference(f"row {i}", found[i][1], logits))
    assert worst < 1e-5
    # Other questions about the same images need no first pass.
    examples = [Example(e.image, [[(f"{IMAGE}\nWhat is there?", None)]]) for e in dataset.examples]
    more = without_images(str(tmp_path), PackedDataset(examples, dataset.format), model)
    assert len(compressions) == 7 and len(said(model, more)) == 7


def test_what_is_kept(world, model, tmp_path):
    """Keys and values of three tokens in all layers, and no more."""
    dataset = questions(world, model)
    rest = without_images(str(tmp_path), dataset, model)
    batch, text = rest[[1, 4]], model.config.text
    shape = (2, 2, text.num_hidden_layers, text.num_key_value_heads, COUNT, text.head_dim)
    assert batch.compressed.shape == shape and batch.pixel_values is None
    files = glob.glob(f"{tmp_path}/*/*.safetensors")
    numbers = sum(t.numel() for t in load_file(files[0]).values())
    assert len(files) == 7 and numbers == batch.compressed[0].numel() + 1
    row = rest.row(1)
    assert row.image is None and min(row.input_ids) >= 0
    assert row.position[0] == 1 + 9 + len(model.tokenizer.encode("\n")) + COUNT
    key = load_json(glob.glob(f"{tmp_path}/*/key.json")[0])
    assert key["base"] == model.fingerprint


def test_an_interrupted_pass_goes_on(world, model, tmp_path, compressions, monkeypatch):
    """What is there is whole, and is not made again; what a kill left half is no image's file."""
    dataset, replace = questions(world, model), os.replace
    expected = said(model, without_images(str(tmp_path / "whole"), dataset, model))
    compressions.clear()
    moved = []

    def killed(source, target):
        if target.endswith(".safetensors") and len(moved) == 3:
            raise KeyboardInterrupt
        moved.append(target)
        replace(source, target)

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        without_images(str(tmp_path / "cut"), dataset, model)
    monkeypatch.setattr(os, "replace", replace)
    done = len(glob.glob(f"{tmp_path}/cut/*/????????????????????????????????.safetensors"))
    assert 0 < done < 7
    compressions.clear()
    rest = without_images(str(tmp_path / "cut"), dataset, model)
    assert len(compressions) == 7 - done
    found = said(model, rest)
    assert all(found[i][0] == texts for i, (texts, _) in expected.items())
    assert max(largest_difference("again", found[i][1], x) for i, (_, x) in expected.items()) < 1e-5


def test_processes_share_the_images(world, model, tmp_path, compressions, monkeypatch):
    """Each compresses its share; the second finds the first one's and adds its own."""
    dataset = questions(world, model)
    monkeypatch.setattr(compressed.dist, "barrier", lambda: None)
    monkeypatch.setattr(compressed, "place", lambda: (0, 2))
    without_images(str(tmp_path), dataset, model)
    assert len(compressions) == 4


def test_an_image_is_known_by_its_content(world, model, tmp_path, compressions):
    dataset = questions(world, model, 2)
    without_images(str(tmp_path / "kept"), dataset, model)
    for n, example in enumerate(dataset.examples):
        example.image = shutil.copy(example.image, tmp_path / f"{n}.jpg")
    without_images(str(tmp_path / "kept"), dataset, model)
    assert len(compressions) == 2
    shutil.copy(tmp_path / "0.jpg", tmp_path / "1.jpg")         # another picture, the same name
    rest = without_images(str(tmp_path / "kept"), dataset, model)
    assert len(compressions) == 2 and torch.equal(*rest[[0, 1]].compressed)


def test_another_base_has_other_files(world, model, tmp_path, compressions):
    dataset = questions(world, model, 2)
    without_images(str(tmp_path), dataset, model)
    model.fingerprint = "another"
    without_images(str(tmp_path), dataset, model)
    assert len(compressions) == 4


DAMAGE = {
    "a value": lambda tensors: tensors["compressed"].view(-1)[5:6].add_(1),
    "no checksum": lambda tensors: tensors.pop("crc32"),
    "another shape": lambda tensors: tensors.update(compressed=tensors["compressed"][:, :1]),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_a_damaged_file_is_named(world, model, tmp_path, what):
    dataset = questions(world, model, 2)
    rest = without_images(str(tmp_path), dataset, model)
    path = rest.files[dataset.examples[1].image]
    tensors = load_file(path)
    DAMAGE[what](tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
    with pytest.raises(InputError) as error:
        said(model, rest)
    assert str(error.value).startswith(f"{path}: is not what was written there; remove it")
    os.remove(path)
    assert len(said(model, without_images(str(tmp_path), dataset, model))) == 2


def test_what_cannot_answer_without_the_image(world, model, tmp_path):
    for variant in "cross", "self":
        block_config = model.config.block_config(attention=variant)
        model.heads = {"base": model.head, "trained": Head(model.config, block_config)}
        with pytest.raises(InputError, match="trained has a block that looks at the image"):
            without_images(str(tmp_path), questions(world, model), model)
    plain = load_base(world.base)
    with pytest.raises(InputError, match="has no <voco> tokens"):
        without_images(str(tmp_path), questions(world, plain), plain)
    assert os.listdir(tmp_path) == []


def test_a_block_that_sees_nothing_can(world, model, tmp_path):
    block_config = model.config.block_config(attention="none", zero_init=False)
    model.heads = {"block": shake(Head(model.config, block_config))}
    dataset = questions(world, model, 3)
    expected, found = said(model, dataset), said(model, without_images(str(tmp_path), dataset,
                                                                       model))
    assert all(found[i][0] == texts for i, (texts, _) in expected.items())


# ---- Programs ------------------------------------------------------------------------------------


def test_pope_and_chair(world, base, tmp_path):
    """The same answers with and without --compressed, which both programs share."""
    said = [base, "--max_new_tokens", "6"]
    for n, more in enumerate(([], ["--compressed", str(tmp_path / "kept")])):
        folder = str(tmp_path / str(n))
        args = eval_pope.flags(eval_pope.__doc__).parse_args(
            [*said, "--output_dir", f"{folder}/pope", *more])
        eval_pope.evaluate(args)
        args = chair.parser().parse_args([*said, "--output_dir", f"{folder}/chair", *more])
        chair.evaluate(args)
    kept = glob.glob(f"{tmp_path}/kept/*/*.safetensors")
    assert len(kept) == len(load_json(f"{world.folder}/world.json")["evaluation"])
    for name in "pope/base_random.jsonl", "chair/base.jsonl":
        one, two = ([json.loads(line) for line in (tmp_path / n / name).open()] for n in "01")
        assert [row["answer"] for row in one] == [row["answer"] for row in two]
        if "pope" in name:
            scores = ([row["yes_score"] for row in rows] for rows in (one, two))
            assert largest_difference("yes-scores", *scores) < 1e-5
            assert len({row["yes_score"] for row in one}) > 20


def test_beams_ask_with_the_image(world, base, tmp_path):
    args = chair.parser().parse_args([base, "--coco_path", world.coco, "--num_beams", "2",
                                      "--compressed", str(tmp_path / "kept")])
    with pytest.raises(InputError, match="--num_beams 2.*leave one of them out"):
        chair.describe(args, [], world.coco, str(tmp_path / "out"))
