"""What the chapters share: a random LLaVA, a tiny world on disk with an untrained base, and a shell to type into.

Nothing is downloaded, and nothing here depends on ../shared; the tests that read it say so and skip without it.
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

os.environ["CUDA_VISIBLE_DEVICES"] = ""        # the suite proves numbers in fp32 on the CPU, wherever it runs

import pytest
import torch
import torch.distributed as dist

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)

import shapes
from checkpoint import save_base
from clip_vit import CLIPVisionConfig
from data import ImageProcessor, PackedDataset, Tokenizer
from llama import LlamaConfig
from model import Head, LlavaConfig, Trunk
from post_decoder import VARIANTS
from readers import read_hadpo

signal.signal(signal.SIGINT, signal.default_int_handler)        # a shell's background jobs, and their children, ignore Ctrl-C
torch.set_num_threads(1)        # everything here is too small to be worth a second one


def largest_difference(what, ours, theirs):
    """Print and return max |ours - theirs|. Shapes must agree: broadcasting would hide an error."""
    ours, theirs = torch.as_tensor(ours).double(), torch.as_tensor(theirs).double()
    assert ours.shape == theirs.shape, f"{what}: {tuple(ours.shape)} against {tuple(theirs.shape)}"
    difference = (ours - theirs).abs().max().item()
    print(f"{what}: largest difference {difference:.2e}")
    return difference


def shake(module, seed=0):
    """Random values where a fresh module has zeros or ones (norms, biases, identity blocks), so that each one counts."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.dim() == 1 or not parameter.any():
                parameter += 0.2 * torch.randn(parameter.shape, generator=generator)
    return module.requires_grad_(False)


def small_config(heads=4, kv_heads=4, vocab_size=48, **changes):
    text = LlamaConfig(vocab_size, 8 * heads, 56, 2, heads, kv_heads, 512)
    vision = CLIPVisionConfig(24, 48, 3, 4, image_size=24, patch_size=8)                    # 9 patches
    return LlavaConfig(text, vision, **{"projector_hidden_size": 12, "max_length": 256, **changes})


def small_llava(heads=4, kv_heads=4, variant=None, seed=0, zero_init=False, **changes):
    """A random (trunk, head). `variant` is a name in VARIANTS, None is a head without a block."""
    torch.manual_seed(seed)
    config = small_config(heads, kv_heads, **changes)
    block = config.block(**VARIANTS[variant], zero_init=zero_init) if variant else None
    trunk, head = Trunk(config), Head(config, block)
    return shake(trunk, seed), head.requires_grad_(False) if zero_init else shake(head, seed)


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    """A tiny world, an untrained base and preference files, once per session: tests read it and never write into it."""
    root = tmp_path_factory.mktemp("session")
    folder, base = str(root / "world"), str(root / "base")
    shapes.make_world(folder, 42, shapes.Sizes(sft=96, preference=24, validation=8, evaluation=12), progress=False)

    # What a base might have said about the preference images: yes to everything, and a kite in every picture.
    answers = {}
    for image in load_json(f"{folder}/preference.json"):
        for question in image["questions"]:
            answers[image["image_id"], question["question"]] = f"Yes, there is a {question['word']} in the image."
        answers[image["image_id"], image.get("describe")] = "The image shows a park with a kite and a ball."
    shapes.write_preferences(folder, answers)

    tokenizer = Tokenizer(f"{folder}/tokenizer.model")
    torch.manual_seed(0)
    config = small_config(vocab_size=len(tokenizer))
    trunk, head = Trunk(config), Head(config)
    save_base(base, shake(trunk), shake(head), tokenizer)
    return SimpleNamespace(
        folder=folder, base=base, tokenizer=f"{folder}/tokenizer.model", vg=f"{folder}/VG", coco=f"{folder}/coco", pope=f"{folder}/pope",
        desc=f"{folder}/hadpo/desc_data.json", pairs=f"{folder}/hadpo/pope_data.json",
        llava=f"{folder}/llava/train.json", images=f"{folder}/llava/images")


def load_json(path):
    with open(path, encoding="utf-8") as file:
        return json.load(file)


def preference_rows(world, trunk):
    """The session world's preference pairs as a dataset."""
    config = trunk.config
    return PackedDataset(read_hadpo(world.desc, world.pairs, world.vg, keep_correct=True), Tokenizer(world.tokenizer),
                         ImageProcessor(config.vision.image_size), config.vision.num_patches, config.max_length)


def dpo_flags(world):
    """How a user names the world's files, as if they were real ones."""
    return ["--model_name_or_path", world.base, "--vg_path", world.vg, "--desc_data_path", world.desc, "--pope_data_path", world.pairs]


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


def shell(*command, cwd=ROOT):
    """Type a command; `python`, `deepspeed` and `torchrun` are this environment's. Returns what subprocess.run does."""
    port = free_port()
    folder = os.path.dirname(sys.executable)
    program, *rest = map(str, command)
    program = {"python": [sys.executable],
               "torchrun": [sys.executable, "-m", "torch.distributed.run", "--master_port", port],
               "deepspeed": [shutil.which("deepspeed", path=folder + os.pathsep + os.environ["PATH"]) or "deepspeed", "--master_port", port],
               }[program]
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "DS_ACCELERATOR")}
    environment |= {"OMP_NUM_THREADS": "1", "MASTER_PORT": port, "PATH": folder + os.pathsep + os.environ["PATH"]}
    return subprocess.run([*program, *rest], cwd=cwd, env=environment, capture_output=True, text=True, timeout=200)


def succeeds(*command, cwd=ROOT):
    done = shell(*command, cwd=cwd)
    assert done.returncode == 0, f"{' '.join(map(str, command))}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done.stdout


@pytest.fixture(scope="session")
def in_this_process():
    """DeepSpeed as one process, here, so that a run's modules can be looked at afterwards. It cannot be started twice."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        for name, value in dict(RANK=0, LOCAL_RANK=0, WORLD_SIZE=1, MASTER_ADDR="127.0.0.1", MASTER_PORT=free_port(),
                                DS_ACCELERATOR="cpu").items():
            monkeypatch.setenv(name, str(value))
        yield
    if dist.is_initialized():
        dist.destroy_process_group()


def run_train(*flags):
    """train.py in this process: needs `in_this_process`. Returns its arguments."""
    import train
    args = train.parse([str(flag) for flag in flags])
    train.train(args)
    return args


WAITING = """
import json, sys, train
for line in sys.stdin:
    sys.argv, code = ["train.py", *json.loads(line)], 0
    try:
        train.train(train.parse())
    except train.InputError as e:
        print("error:", e)
        code = 1
    except SystemExit as e:
        code = e.code
    print(f"\\nexit {code}", flush=True)
"""


class TwoProcesses:
    """Two processes that run one command line of train.py after the other, because to start them takes longest: `two(*flags)`."""

    def __init__(self):
        self.processes = []

    def begin(self, *flags):
        """Let both begin a run; new ones, where one has ended over the run before."""
        if not self.processes or any(process.poll() is not None for process in self.processes):
            self.kill()
            both = {"OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(), "WORLD_SIZE": "2"}
            self.processes = [subprocess.Popen([sys.executable, "-c", WAITING], cwd=ROOT, text=True, stdin=subprocess.PIPE,
                                               env=os.environ | both | {"RANK": rank, "LOCAL_RANK": rank},
                                               stdout=subprocess.PIPE, stderr=subprocess.STDOUT) for rank in ("0", "1")]
        for process in self.processes:
            print(json.dumps([str(flag) for flag in flags]), file=process.stdin, flush=True)

    def end(self):
        """Wait for both → (how it ended: "exit 0", and "" where the process itself has; what it said) of each."""
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
        assert [how for how, _ in ends] == ["exit 0", "exit 0"], "\n".join(said[-3000:] for _, said in ends)
        return ends[0][1]

    def kill(self):
        for process in self.processes:
            process.kill()


@pytest.fixture(scope="session")
def two():
    processes = TwoProcesses()
    yield processes
    processes.kill()
