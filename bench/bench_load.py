"""How long loading takes and how much memory it needs beyond the model itself.

    python bench/bench_load.py [--gigabytes 13.5] [--format bin] [--folder /tmp/bench_load] [--keep]

Writes a checkpoint in LLaVA's layout at LLaVA-1.5-7B's widths, fp16, with as many layers as make up
the size (13.5 GB are its 32), in two shards as LLaVA's files are, and a full-size CLIP tower beside
it. Then it drops the files from the page cache and loads them in a process of its own. For
comparison it only reads the same files, and only fills as much memory.

Prints seconds, GB/s, and the highest resident memory (VmHWM, mapped file pages included) without
the model and without what the process had before.
"""
import argparse
import json
import os
import shutil
import subprocess
import sys
import time

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
import torch
from safetensors.torch import save_file

from checkpoints.load import load_base
from clip_vit import CLIPVisionConfig, CLIPVisionTower
from llama import LlamaConfig
from model import Head, LlavaConfig, Trunk
from support.common import write_json
from tiny.world import train_tokenizer

NAMES = {"bin": "pytorch_model", "safetensors": "model"}     # of a shard, by its format


# ---- The files -----------------------------------------------------------------------------------


def random_tensors(shapes):
    """{key: shape} → fp16 tensors: one million random numbers again and again, because only their
    number matters.
    """
    block, tensors = torch.randn(2 ** 20).half() * 0.02, {}
    for key, shape in shapes.items():
        count = shape.numel()
        blocks = -(-count // 2 ** 20)
        tensors[key] = block.repeat(blocks)[:count].view(shape)
    return tensors


def write_checkpoint(folder, gigabytes, kind):
    """Write the files, one shard at a time."""
    config = LlavaConfig()
    with torch.device("meta"):
        none, one = (Trunk(LlavaConfig(LlamaConfig(num_hidden_layers=n))) for n in (0, 1))
        outside = sum(p.numel() for p in (*Head(config).parameters(), *none.parameters()))
        layer = sum(p.numel() for p in one.model.layers.parameters())
        layers = max(1, round((gigabytes * 1e9 / 2 - outside) / layer))
        config.text.num_hidden_layers = layers
        state = Trunk(config).model.state_dict(prefix="model.") | Head(config).state_dict()
        tower = CLIPVisionTower(CLIPVisionConfig(), -1).state_dict()
    os.makedirs(os.path.join(folder, "clip"))
    names, weight_map = list(state), {}
    middle = len(names) // 2
    for n, part in enumerate((names[:middle], names[middle:]), start=1):
        name = f"{NAMES[kind]}-0000{n}-of-00002.{kind}"
        tensors = random_tensors({key: state[key].shape for key in part})
        save = torch.save if kind == "bin" else save_file
        save(tensors, os.path.join(folder, name))
        weight_map |= dict.fromkeys(part, name)
        del tensors
    index = os.path.join(folder, f"{NAMES[kind]}.{kind}.index.json")
    write_json(index, {"weight_map": weight_map})
    tensors = random_tensors({key: t.shape for key, t in tower.items()})
    save_file(tensors, os.path.join(folder, "clip", "model.safetensors"))
    write_json(os.path.join(folder, "clip", "config.json"), vars(config.vision))
    settings = {"mm_vision_tower": "clip", "image_aspect_ratio": "pad"}
    write_json(os.path.join(folder, "config.json"), vars(config.text) | settings)
    train_tokenizer(os.path.join(folder, "tokenizer.model"))


def weights(folder):
    paths = [os.path.join(where, name) for where, _, names in os.walk(folder) for name in names]
    return [path for path in paths if path.endswith((".bin", ".safetensors"))]


def forget(folder):
    """Drop the files from the page cache, so that they are read from the disk."""
    for path in weights(folder):
        with open(path, "rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


# ---- What is measured ----------------------------------------------------------------------------


def read_plainly(folder):
    """Seconds that reading the same files into one small buffer takes."""
    began, buffer = time.perf_counter(), bytearray(2 ** 24)
    for path in weights(folder):
        with open(path, "rb", buffering=0) as file:
            while file.readinto(buffer):
                pass
    return time.perf_counter() - began


def fill_memory(size):
    """Seconds that filling as much fresh memory as the model needs takes. A virtual machine may get
    memory more slowly than files.
    """
    began = time.perf_counter()
    pieces = [torch.ones(min(2 ** 28, size - done), dtype=torch.uint8)
              for done in range(0, size, 2 ** 28)]
    del pieces
    return time.perf_counter() - began


def memory(name):
    """Bytes of this process: VmRSS, resident now; VmHWM, the highest so far."""
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(name + ":"))


def load(folder):
    """What the measured process does → one line of JSON."""
    before, began = memory("VmRSS"), time.perf_counter()
    model = load_base(folder)
    seconds = time.perf_counter() - began
    sizes = [p.nbytes for module in (model.trunk, model.head) for p in module.parameters()]
    extra = memory("VmHWM") - before - sum(sizes)
    print(json.dumps({"seconds": seconds, "model": sum(sizes), "largest": max(sizes),
                      "extra": extra}))


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--gigabytes", type=float, default=13.5)
    parser.add_argument("--format", choices=("safetensors", "bin"), default="safetensors")
    parser.add_argument("--folder", default="/tmp/bench_load",
                        help="where the files are written; removed at the end")
    parser.add_argument("--keep", action="store_true",
                        help="leave the files, and use those that are there")
    parser.add_argument("--load", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.load:
        load(args.folder)
        return
    if not os.path.isdir(args.folder):
        write_checkpoint(args.folder, args.gigabytes, args.format)
    size = sum(map(os.path.getsize, weights(args.folder))) / 1e9
    forget(args.folder)
    plain = read_plainly(args.folder)
    forget(args.folder)
    command = [sys.executable, os.path.abspath(__file__), "--load", "--folder", args.folder]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    result = json.loads(done.stdout.splitlines()[-1])
    seconds, filled = result["seconds"], fill_memory(result["model"])
    print(f"{size:.2f} GB of {args.format}: loaded in {seconds:.1f} s ({size / seconds:.2f} GB/s); "
          f"the same files only read {plain:.1f} s, as much memory only filled {filled:.1f} s")
    print(f"model {result['model'] / 1e9:.2f} GB, beyond it at most {result['extra'] / 1e6:.0f} MB "
          f"(largest tensor {result['largest'] / 1e6:.0f} MB)")
    if not args.keep:
        shutil.rmtree(args.folder)


if __name__ == "__main__":
    main()
