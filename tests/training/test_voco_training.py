"""--voco N: a base gets the token, and stage 0's loop teaches it to compress."""
import pytest
import torch
from conftest import dpo_flags, largest_difference, load_json, run_train
from short_runs import llava_flags, logged

from checkpoints.load import load_base
from data import IMAGE, Example, PackedDataset
from llama import VOCO
from support.common import InputError
from training.flags import parse_flags
from training.voco import with_voco


def base_with(world, count):
    return with_voco(load_base(world.base, read_trunk=False), count)


@pytest.fixture(scope="module")
def trained(world, tmp_path_factory, in_this_process):
    folder = str(tmp_path_factory.mktemp("voco") / "base")
    run_train(*llava_flags(world), "--stage", 0, "--voco", 2, "--max_steps", 3,
              "--learning_rate", "1e-2", "--output_dir", folder)
    return folder


def test_the_token_is_the_last_row_and_the_mean_of_the_others(world):
    before = load_base(world.base)
    model = base_with(world, 2)
    assert all(p.is_meta for p in model.trunk.parameters())              # nothing was read for it
    grown = model.trunk.model.embed_tokens.weight.in_file[0].read()
    for new, old in ((grown, before.trunk.model.embed_tokens.weight),
                     (model.head.lm_head.weight, before.head.lm_head.weight)):
        assert torch.equal(new[:-1], old) and new.shape == (len(old) + 1, old.shape[1])
        assert largest_difference("the new row", new[-1], old.mean(0)) < 1e-6
    assert model.config.text.vocab_size == before.config.text.vocab_size + 1
    assert model.fingerprint != before.fingerprint
    assert model.fingerprint == base_with(world, 2).fingerprint != base_with(world, 4).fingerprint


def test_training_moves_the_token(world, trained):
    """Its embedding gets a gradient only through rows with images."""
    model = load_base(trained)
    assert model.config.num_voco == 2 and load_json(f"{trained}/config.json")["num_voco"] == 2
    start = base_with(world, 2).trunk.model.embed_tokens.weight.in_file[0].read()
    moved = (model.trunk.model.embed_tokens.weight - start).abs().max(1).values
    assert moved[-1] > 1e-3
    unused = moved == 0             # pieces in no text of these rows: nothing moves without use
    assert unused.any() and len(logged(trained)) == 3


def test_a_base_that_has_the_token_keeps_it(trained):
    """Another number of the same tokens: nothing grows."""
    model, before = with_voco(load_base(trained, read_trunk=False), 4), load_base(trained)
    assert model.config.num_voco == 4
    assert model.config.text.vocab_size == before.config.text.vocab_size
    again = model.trunk.model.embed_tokens.weight.in_file[0].read()
    assert torch.equal(again, before.trunk.model.embed_tokens.weight)


@pytest.mark.parametrize("flags", (("--stage", 1), ("--lora_r", 4)))
def test_dpo_on_such_a_base(world, trained, tmp_path, flags):
    """The block from kept features, and LoRA with the trunk in the loop: ln 2 at the first step."""
    flags = [*dpo_flags(world), *flags, "--keep_correct", "--max_steps", 2, "--output_dir",
             tmp_path / "run", "--learning_rate", "1e-3"]
    flags[flags.index("--model_name_or_path") + 1] = trained
    if "--stage" in flags:
        flags += ["--cache_features", tmp_path / "features"]
    run_train(*flags)
    rows = logged(tmp_path / "run")
    assert largest_difference("first loss", rows[0]["loss"], torch.tensor(2.0).log()) < 1e-5
    assert rows[1]["loss"] != rows[0]["loss"]


def test_kept_features_are_what_the_trunk_makes(world, trained, tmp_path):
    """A pair behind <voco> tokens, kept and in the loop: the same losses."""
    losses = []
    for kept in ([], ["--cache_features", tmp_path / "features"]):
        flags = [*dpo_flags(world), "--stage", 2, "--init", "identity", "--keep_correct",
                 "--max_steps", 3, "--learning_rate", "1e-2", *kept, "--output_dir",
                 tmp_path / f"run{len(losses)}"]
        flags[flags.index("--model_name_or_path") + 1] = trained
        run_train(*flags)
        losses.append([row["loss"] for row in logged(flags[-1])])
    assert largest_difference("losses", *losses) < 1e-5 and losses[0][2] != losses[0][0]


def test_the_image_reaches_the_answer_through_the_token(world, trained):
    """And only so: what is in front of it is hidden from the text."""
    model = load_base(trained)
    image = f"{world.images}/{load_json(world.llava)[0]['image']}"
    example = Example(image, [[(f"{IMAGE}\nIs there a dog in the image?", None)]])
    batch = PackedDataset([example], model.row_format())[[0]]
    states, last = model.trunk(batch)[0], batch.ends[0, 0]
    batch.pixel_values = -batch.pixel_values
    assert (model.trunk(batch)[0] - states)[0, last].abs().max() > 1e-6
    batch.branch[batch.branch == VOCO] = 0                      # <voco> tokens look away
    blind = model.trunk(batch)[0]
    batch.pixel_values = -batch.pixel_values
    assert torch.equal(model.trunk(batch)[0][0, last], blind[0, last])


REFUSED = {
    "dpo": ["--stage", "1", "--voco", "2"],
    "the trunk by DPO": ["--tune", "llama", "--voco", "2"],
    "only the projector": ["--tune", "projector", "--loss", "sft", "--voco", "2"],
    "LoRA": ["--lora_r", "4", "--loss", "sft", "--voco", "2"]}


@pytest.mark.parametrize("what", REFUSED)
def test_the_token_is_learnt_with_llama_from_conversations(what):
    with pytest.raises(InputError) as error:
        parse_flags(REFUSED[what])
    assert str(error.value).startswith("--voco 2: a new token is learnt with LLaMA")


@pytest.mark.parametrize("name, setting, value", (
    ("image_start_end", "mm_use_im_start_end", True),
    ("pinpoints", "image_grid_pinpoints", ((48, 24),))))
def test_other_versions_of_llava_are_refused(world, name, setting, value):
    model = load_base(world.base, read_trunk=False)
    setattr(model.config, name, value)
    with pytest.raises(InputError, match=f"--voco 2: the base's config.json has {setting}, and"):
        with_voco(model, 2)


@pytest.mark.parametrize("value", ("0", "-1", "1.5", "many"))
def test_numbers_that_cannot_be(value):
    with pytest.raises(InputError, match=f"--voco {value}: must be "):
        parse_flags(["--stage", "0", f"--voco={value}"])


def test_the_notes_settings_of_a_real_model(world):
    """Two epochs, batch 128, 2e-5; without --voco LLaVA's one epoch."""
    flags = [*map(str, llava_flags(world)), "--stage", "0"]
    args = parse_flags([*flags, "--voco", "2"])
    assert (args.num_train_epochs, args.default_batch, args.learning_rate) == (2, 128, [2e-5])
    assert parse_flags(flags).num_train_epochs == 1
