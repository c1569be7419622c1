"""What the tests share: a random LLaVA, a tiny world on disk with an untrained base, and a shell.

Nothing is downloaded, and nothing here depends on ../shared; the tests that read it say so and skip
without it.
"""
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
from types import SimpleNamespace

os.environ["CUDA_VISIBLE_DEVICES"] = ""     # numbers are proved in fp32 on the CPU, everywhere
os.environ["HF_HUB_OFFLINE"] = "1"          # no name is looked up; tests/hub_stand_in.py stands in

import pytest
import sentencepiece
import torch
import torch.distributed as dist

import train
from checkpoints.load import fingerprint
from checkpoints.save import save_base
from clip_vit import CLIPVisionConfig
from data import ImageProcessor, PackedDataset, RowFormat, Tokenizer, read_hadpo
from llama import LlamaConfig
from model import Head, Llava, LlavaConfig, Trunk
from post_decoder import VARIANTS
from tiny import world as tiny_world

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

# A shell's background jobs, and their children, ignore Ctrl-C.
signal.signal(signal.SIGINT, signal.default_int_handler)
torch.set_num_threads(1)        # everything here is too small to be worth a second one


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
    tiny_world.write_preferences(folder, answers)

    tokenizer = Tokenizer(f"{folder}/tokenizer.model")
    torch.manual_seed(0)
    config = small_config(vocab_size=len(tokenizer))
    trunk, head = Trunk(config), Head(config)
    save_base(base, Llava(shake(trunk), {"base": shake(head)}, tokenizer, None, ""))
    return SimpleNamespace(
        folder=folder, base=base, tokenizer=f"{folder}/tokenizer.model", vg=f"{folder}/VG",
        coco=f"{folder}/coco", pope=f"{folder}/pope", desc=f"{folder}/hadpo/desc_data.json",
        pairs=f"{folder}/hadpo/pope_data.json", llava=f"{folder}/llava/train.json",
        images=f"{folder}/llava/images")


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


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


def shell(*command, cwd=ROOT):
    """Type a command; returns what subprocess.run does.

    `python`, `deepspeed` and `torchrun` are this environment's.
    """
    port = free_port()
    folder = os.path.dirname(sys.executable)
    path = folder + os.pathsep + os.environ["PATH"]
    program, *rest = map(str, command)
    deepspeed = shutil.which("deepspeed", path=path) or "deepspeed"
    programs = {"python": [sys.executable],
                "torchrun": [sys.executable, "-m", "torch.distributed.run", "--master_port", port],
                "deepspeed": [deepspeed, "--master_port", port]}
    foreign = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "DS_ACCELERATOR")
    environment = {name: value for name, value in os.environ.items() if name not in foreign}
    environment |= {"OMP_NUM_THREADS": "1", "MASTER_PORT": port, "PATH": path}
    return subprocess.run([*programs[program], *rest], cwd=cwd, env=environment,
                          capture_output=True, text=True, timeout=200)


def succeeds(*command, cwd=ROOT):
    done = shell(*command, cwd=cwd)
    typed = " ".join(map(str, command))
    assert done.returncode == 0, f"{typed}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done.stdout


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


WAITING = """
import json, sys, train
for line in sys.stdin:
    sys.argv, code = ["train.py", *json.loads(line)], 0
    try:
        train.train(train.parse_flags())
    except train.InputError as e:
        print("error:", e)
        code = 1
    except SystemExit as e:
        code = e.code
    print(f"\\nexit {code}", flush=True)
"""


class TwoProcesses:
    """Two processes that run one command line of train.py after the other: `two(*flags)`.

    To start them takes longest, so they stay.
    """

    def __init__(self):
        self.processes = []

    def start(self):
        both = {"OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(),
                "WORLD_SIZE": "2"}
        self.processes = [
            subprocess.Popen([sys.executable, "-c", WAITING], cwd=ROOT, text=True,
                             env=os.environ | both | {"RANK": rank, "LOCAL_RANK": rank},
                             stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                             stderr=subprocess.STDOUT)
            for rank in ("0", "1")]

    def begin(self, *flags):
        """Let both begin a run; new ones, where one has ended over the run before."""
        if not self.processes or any(process.poll() is not None for process in self.processes):
            self.kill()
            self.start()
        for process in self.processes:
            print(json.dumps([str(flag) for flag in flags]), file=process.stdin, flush=True)

    def end(self):
        """Wait for both → (how it ended, what it said) of each.

        How it ended is "exit 0", and "" where the process itself has ended.
        """
        clock, ends = threading.Timer(200, self.kill), []
        clock.start()
        for process in self.processes:
            said = ""
            while (line := process.stdout.readline()) and not line.startswith("exit "):
                said += line
            ends.append((line.strip(), said))
        clock.cancel()
        return ends

    def __call__(self, *flags):
        self.begin(*flags)
        ends = self.end()
        said = "\n".join(said[-3000:] for _, said in ends)
        assert [how for how, _ in ends] == ["exit 0", "exit 0"], said
        return ends[0][1]

    def kill(self):
        for process in self.processes:
            process.kill()


@pytest.fixture(scope="session")
def two():
    processes = TwoProcesses()
    yield processes
    processes.kill()
