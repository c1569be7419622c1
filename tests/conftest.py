"""What the tests share: a random LLaVA, a tiny world on disk with an untrained base, and a shell.

Nothing is downloaded, and nothing here depends on ../shared; the tests that read it say so and skip
without it.
"""
import json
import os
import signal
from types import SimpleNamespace

os.environ["CUDA_VISIBLE_DEVICES"] = ""     # numbers are proved in fp32 on the CPU, everywhere
os.environ["HF_HUB_OFFLINE"] = "1"          # no name is looked up; tests/hub_stand_in.py stands in
os.environ.pop("COLUMNS", None)             # pytest-xdist sets it, and programs would fit into it

import pytest
import sentencepiece
import torch
import torch.distributed as dist
from programs import SERVER, TwoProcesses, free_port

import train
from checkpoints.load import fingerprint
from checkpoints.save import save_base
from clip_vit import CLIPVisionConfig
from data import ImageProcessor, PackedDataset, RowFormat, Tokenizer, read_hadpo
from llama import LlamaConfig
from model import Head, Llava, LlavaConfig, Trunk
from post_decoder import VARIANTS
from tiny import world as tiny_world
from tiny.preferences import write_preferences

# A shell's background jobs, and their children, ignore Ctrl-C.
signal.signal(signal.SIGINT, signal.default_int_handler)
torch.set_num_threads(1)        # everything here is too small to be worth a second one


# The files that take longest, which begin first: several processes then end at the same time.
SLOW = ("test_cli", "test_bench", "test_engine", "test_resume", "test_train", "test_prepare",
        "test_packed", "test_chat", "test_lora", "test_load", "test_merge", "test_faults",
        "test_pitfalls", "test_report", "test_out_of_memory", "test_kept_files", "test_plots")


def pytest_configure(config):
    config.option.loadscopereorder = False      # or pytest-xdist has an order of its own


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: SLOW.index(item.path.stem) if item.path.stem in SLOW else len(SLOW))


# ---- Numbers and modules -------------------------------------------------------------------------


def largest_difference(what, ours, theirs):
    """Print and return max |ours - theirs|. Shapes must agree: broadcasting would hide an error."""
    ours, theirs = torch.as_tensor(ours).double(), torch.as_tensor(theirs).double()
    assert ours.shape == theirs.shape, f"{what}: {tuple(ours.shape)} against {tuple(theirs.shape)}"
    difference = (ours - theirs).abs().max().item()
    print(f"{what}: largest difference {difference:.2e}")
    return difference


def shake(module, seed=0):
    """Random values where a fresh module has zeros or ones, so that each of them counts.

    These are norms, biases and identity blocks.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.dim() == 1 or not parameter.any():
                parameter += 0.2 * torch.randn(parameter.shape, generator=generator)
    return module.requires_grad_(False)


def small_config(heads=4, kv_heads=4, vocab_size=48, **changes):
    text = LlamaConfig(vocab_size, 8 * heads, 56, 2, heads, kv_heads, 512)
    vision = CLIPVisionConfig(24, 48, 3, 4, image_size=24, patch_size=8)                 # 9 patches
    return LlavaConfig(text, vision, **{"projector_hidden_size": 12, "max_length": 256, **changes})


def small_llava(heads=4, kv_heads=4, variant=None, seed=0, zero_init=False, **changes):
    """A random (trunk, head). `variant` is a name in VARIANTS, None is a head without a block."""
    torch.manual_seed(seed)
    config = small_config(heads, kv_heads, **changes)
    block = config.block_config(**VARIANTS[variant], zero_init=zero_init) if variant else None
    trunk, head = Trunk(config), Head(config, block)
    return shake(trunk, seed), head.requires_grad_(False) if zero_init else shake(head, seed)


def row_format(config, tokenizer, **changes):
    """How a model of these sizes wants its rows."""
    preprocess = ImageProcessor(config.vision.image_size)
    values = {"num_patches": config.vision.num_patches, "max_length": config.max_length, **changes}
    return RowFormat(tokenizer, preprocess, **values)


def as_llava(trunk, *heads, tokenizer=None, preprocess=None):
    """Modules as a Llava; the first head is the base's, the others are called head1, head2, ..."""
    names = ["base", *(f"head{n}" for n in range(1, len(heads)))]
    counted = preprocess if isinstance(preprocess, ImageProcessor) else None     # else a test's own
    return Llava(trunk, dict(zip(names, heads, strict=True)), tokenizer, preprocess,
                 fingerprint(trunk, heads[0], counted))


# ---- The tiny world ------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    """A tiny world, an untrained base and preference files, once per session.

    Tests read it and never write into it.
    """
    root = tmp_path_factory.mktemp("session")
    folder, base = str(root / "world"), str(root / "base")
    sizes = tiny_world.Sizes(sft=96, preference=24, validation=8, evaluation=12)
    tiny_world.make_world(folder, 42, sizes, progress=False)

    # What a base might have said about the preference images: yes to everything, and a kite in
    # every picture.
    answers = {}
    for image in load_json(f"{folder}/preference.json"):
        for question in image["questions"]:
            said = f"Yes, there is a {question['word']} in the image."
            answers[image["image_id"], question["question"]] = said
        described = "The image shows a park with a kite and a ball."
        answers[image["image_id"], image.get("describe")] = described
    write_preferences(folder, answers)

    tokenizer = Tokenizer(f"{folder}/tokenizer.model")
    torch.manual_seed(0)
    config = small_config(vocab_size=len(tokenizer))
    trunk, head = Trunk(config), Head(config)
    save_base(base, Llava(shake(trunk), {"base": shake(head)}, tokenizer, None, ""))
    before = files_below(root)
    yield SimpleNamespace(
        folder=folder, base=base, tokenizer=f"{folder}/tokenizer.model", vg=f"{folder}/VG",
        coco=f"{folder}/coco", pope=f"{folder}/pope", desc=f"{folder}/hadpo/desc_data.json",
        pairs=f"{folder}/hadpo/pope_data.json", llava=f"{folder}/llava/train.json",
        images=f"{folder}/llava/images")
    assert files_below(root) == before, "a test has written into the session's world or base"


def files_below(folder):
    """{path: (size, time of the last change)}"""
    return {path: (path.stat().st_size, path.stat().st_mtime_ns) for path in folder.rglob("*")}


@pytest.fixture(scope="session")
def byte_tokenizer(tmp_path_factory):
    """A tokenizer that knows English letters and, as LLaMA's does, writes others byte by byte."""
    path = tmp_path_factory.mktemp("bytes") / "tokenizer.model"
    with open(path, "wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(["is there a dog and a cat in the <image>: USER"] * 9),
            model_writer=file, model_type="bpe", byte_fallback=True, vocab_size=330,
            hard_vocab_limit=False, normalization_rule_name="identity",
            remove_extra_whitespaces=False, minloglevel=2)
    return Tokenizer(str(path))


def load_json(path):
    with open(path, encoding="utf-8") as file:
        return json.load(file)


def preference_rows(world, trunk):
    """The session world's preference pairs as a dataset."""
    examples = read_hadpo(world.desc, world.pairs, world.vg, keep_correct=True)
    return PackedDataset(examples, row_format(trunk.config, Tokenizer(world.tokenizer)))


def dpo_flags(world):
    """How a user names the world's files, as if they were real ones."""
    return ["--model_name_or_path", world.base, "--vg_path", world.vg,
            "--desc_data_path", world.desc, "--pope_data_path", world.pairs]


# ---- Programs ------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def in_this_process():
    """DeepSpeed as one process, here, so that a run's modules can be looked at afterwards.

    It cannot be started twice, so a program's main() does not end the process group here.
    """
    values = dict(RANK=0, LOCAL_RANK=0, WORLD_SIZE=1, MASTER_ADDR="127.0.0.1",
                  MASTER_PORT=free_port(), DS_ACCELERATOR="cpu")
    with pytest.MonkeyPatch.context() as monkeypatch:
        for name, value in values.items():
            monkeypatch.setenv(name, str(value))
        monkeypatch.setattr(dist, "destroy_process_group", lambda: None)
        yield
    if dist.is_initialized():
        dist.destroy_process_group()


def run_train(*flags):
    """train.py in this process: needs `in_this_process`. Returns its arguments."""
    args = train.parse_flags([str(flag) for flag in flags])
    train.train(args)
    return args


@pytest.fixture(scope="session")
def two():
    return TwoProcesses()


def pytest_sessionfinish():
    SERVER.stop()
