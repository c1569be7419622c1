"""What is here, what fits on it, and what to do next. Takes a second: torch is not even imported.

    python -m tools.doctor
    python -m tools.doctor --model_name_or_path tiny/base     # your own folders, instead
    python -m tools.doctor --model_name_or_path llava-v1.5-7b --vg_path VG --coco_path coco

Prints versions, GPUs, memory and disk, the line of docs/memory.md that this machine has, and what
is wrong with the folders that you name, by the flags that the programs have. The exit code is 1 if
something has to be mended. It looks only at names and sizes; the programs look into the files.
"""
import importlib.metadata
import os
import re
import shutil
import subprocess
import sys

from support.command_line import Parser

# GiB of a card that its row of docs/memory.md needs: (with one card, with 2 or more), by what is
# trained: stages 1 and 2, HA-DPO's LoRA, projector and LLaMA.
CARDS = {
    22: (("ZeRO-0, 4 pairs at once; from kept features 16",
          "ZeRO-0 and `--gradient_checkpointing`; `--offload` with ZeRO-2 leaves 3 GiB more", "no"),
         ("as on one, on each; 1.8 × as fast on 2, 3.6 × on 4", "as on one",
          "ZeRO-3 on 8 (14 GiB of states each and what a step needs: untried)")),
    38: (("ZeRO-0, 16 pairs at once", "ZeRO-0", "no"),
         ("as on one, on each", "as on one", "ZeRO-3 (28 GiB of states on 4, untried)")),
    76: (("ZeRO-0, 16 pairs at once", "ZeRO-0 without checkpointing", "no"),
         ("as on one, on each", "as on one", "ZeRO-3 (58 GiB on 2, measured)"))}
TRAINED = "stages 1 and 2", "HA-DPO's LoRA", "projector and LLaMA"
MODEL_GB = 13.5                 # of the 7B model in 16 bits
OLDEST = 3, 11
# What is only needed for one thing.
OPTIONAL = {"pyarrow": "--preference_data in parquet", "tensorboard": "--report_to tensorboard",
            "wandb": "--report_to wandb"}
WEIGHTS = re.compile(r"(model|pytorch_model)(-\d+-of-\d+)?\.(safetensors|bin)")
PATHS = ("model_name_or_path", "vision_tower", "vg_path", "desc_data_path", "pope_data_path",
         "preference_data", "data_path", "image_folder", "coco_path", "pope_path")
# What must lie in a folder.
NEEDED = {"model_name_or_path": ("config.json", "tokenizer.model"),
          "vision_tower": ("config.json",), "coco_path": ("val2014",),
          "vg_path": ("image_data.json", "VG_100K", "VG_100K_2")}


# ---- The machine ---------------------------------------------------------------------------------


def required():
    """The packages that are needed: lines as in requirements.txt."""
    path = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))),
                        "requirements.txt")
    if os.path.isfile(path):
        with open(path, encoding="utf-8") as file:
            return file.read().split()
    return [line for line in importlib.metadata.requires("nanohadpo") or () if ";" not in line]


def numbers(version):
    return [int(part) for part in re.findall(r"\d+", version.partition("+")[0])[:3]]


def package_faults(lines):
    """{package: version or None}, and what is missing or too old."""
    found, faults = {}, []
    for line in lines:
        name, relation, wanted = re.fullmatch(r"([\w.-]+)(?:(>=|==)([\w.]+))?", line).groups()
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
            faults.append(f"{name} is not installed: pip install -r requirements.txt")
            continue
        there = numbers(found[name])
        if relation == ">=" and there < numbers(wanted) or relation == "==" and (
                there != numbers(wanted)):
            faults.append(f"{name} is {found[name]} and must be {relation} {wanted}: pip install "
                          "-r requirements.txt")
    return found, faults


def gpus():
    """[(name, GiB, GiB that are used)], as the driver tells; [] without one."""
    query = "--query-gpu=name,memory.total,memory.used", "--format=csv,noheader,nounits"
    try:
        said = subprocess.run(["nvidia-smi", *query], capture_output=True, text=True, timeout=5)
    except (OSError, subprocess.SubprocessError):
        return []
    found = []
    for line in said.stdout.splitlines() if said.returncode == 0 else ():
        name, *sizes = (part.strip() for part in line.rsplit(",", 2))
        if len(sizes) == 2 and all(size.isdecimal() for size in sizes):
            found.append((name, *(int(size) / 1024 for size in sizes)))
    return found


def memory():
    """GiB of RAM and of it available; None where /proc does not tell."""
    try:
        with open("/proc/meminfo") as file:
            values = dict(re.findall(r"(\w+):\s+(\d+) kB", file.read()))
        return tuple(int(values[name]) / 2 ** 20 for name in ("MemTotal", "MemAvailable"))
    except (OSError, KeyError):
        return None


def what_fits(cards):
    """The row of docs/memory.md that these cards have, as lines; the smallest card counts."""
    smallest = min(size for _, size, _ in cards)
    fits = [least for least in CARDS if smallest >= least]
    if not fits:
        return [f"the 7B model does not fit on {smallest:.0f} GiB for training (24 GB is the "
                "smallest card in docs/memory.md); the tiny world does"]
    row = CARDS[max(fits)][len(cards) > 1]
    return [f"{what}: {how}" for what, how in zip(TRAINED, row, strict=True)]


# ---- Files ---------------------------------------------------------------------------------------


def fault_of(name, path):
    """What is wrong with a path that a flag names, or None."""
    hub = re.fullmatch(r"\w[\w.-]*/\w[\w.-]*(@[\w./-]+)?", path)
    if not os.path.exists(path):
        if name in ("model_name_or_path", "vision_tower") and (hub or path.startswith("open_clip")):
            return None                                     # a name, which the programs look up
        return "no such file or folder; check the path"
    lacks = [part for part in NEEDED.get(name, ()) if not os.path.exists(os.path.join(path, part))]
    if lacks:
        return f"holds no {', '.join(lacks)}"
    if name in ("model_name_or_path", "vision_tower"):
        names = os.listdir(path) if os.path.isdir(path) else []
        if not any(WEIGHTS.fullmatch(one) for one in names):
            return "holds no weights (model*.safetensors or pytorch_model*.bin)"
    if name == "pope_path":
        places = [os.path.join(path, inside) for inside in ("", "output/coco", "coco")]
        if os.path.isdir(path) and not any(
                "pope" in one and one.endswith(".json") for place in places
                if os.path.isdir(place) for one in os.listdir(place)):
            return "holds no *pope*_random.json and its like, also not in output/coco"
    if os.path.isfile(path) and os.path.getsize(path) < 1024:
        with open(path, "rb") as file:
            if file.read(8) == b"version ":
                return "is only Git LFS's pointer; get the file with: git lfs pull"
    return None


def look(args):
    """A line for each named path: of those that are there, and what is wrong with the others."""
    lines, faults = [], []
    for name in PATHS:
        value = getattr(args, name)
        for path in value if isinstance(value, list) else [value] if value else []:
            fault = fault_of(name, path)
            if fault:
                faults.append(f"--{name} {path}: {fault}")
            else:
                lines.append(f"--{name} {path}: there")
    return lines, faults


# ---- The page ------------------------------------------------------------------------------------


def report(args, cards):
    """`cards`: the machine's `gpus()` → (lines, faults)."""
    (found, faults), ram = package_faults(required()), memory()
    python = ".".join(map(str, sys.version_info[:3]))
    if sys.version_info[:2] < OLDEST:
        faults.append(f"Python is {python} and must be {'.'.join(map(str, OLDEST))} or newer")
    lines = [f"Python {python}, " + ", ".join(f"{name} {version or '(missing)'}"
                                              for name, version in found.items())]
    for name, what in OPTIONAL.items():
        try:
            lines.append(f"{name} {importlib.metadata.version(name)}: {what}")
        except importlib.metadata.PackageNotFoundError:
            lines.append(f"{name} is not installed; only {what} needs it")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    disk = shutil.disk_usage(os.getcwd()).free / 1e9
    lines.append(f"{cores} CPU cores; {disk:.0f} GB free on this disk" + (
        f"; {ram[0]:.0f} GiB of memory, {ram[1]:.0f} free" if ram else ""))
    for name, size, used in cards:
        lines.append(f"GPU: {name}, {size:.0f} GiB, {used:.0f} used")
    if cards:
        lines += what_fits(cards)
        if (found.get("torch") or "").endswith("+cpu"):
            faults.append("torch is built without CUDA and there is a GPU: install another one "
                          "(pytorch.org/get-started)")
    else:
        lines.append("no GPU that nvidia-smi finds: the tiny world runs on the CPU")
    if ram and ram[1] * 1.074 < MODEL_GB and cards:
        lines.append(f"the 7B model has {MODEL_GB} GB: with this memory it is read slowly")
    of_files, wrong = look(args)
    return lines + of_files, faults + wrong


def what_next(args, faults, cards):
    """The command to type now."""
    if faults:
        return "mend this, and ask again"
    if not cards:
        return "python eval_pope.py tiny/base"
    if args.model_name_or_path and (args.vg_path or args.preference_data):
        return ("deepspeed train.py --stage 1 … with these paths; then python eval_pope.py "
                "out/stage1 …")
    return ("python eval_pope.py tiny/base; with the real model name its files here: "
            "docs/real_weights.md")


def main():
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--model_name_or_path", help="the base")
    add("--vision_tower", help="CLIP")
    add("--vg_path", help="Visual Genome")
    add("--desc_data_path", help="HA-DPO's desc_data.json")
    add("--pope_data_path", help="HA-DPO's pope_data.json")
    add("--preference_data", nargs="+", help="other pairs")
    add("--data_path", help="LLaVA's conversations")
    add("--image_folder", help="the images of --preference_data or --data_path")
    add("--coco_path", help="the folder that holds COCO's val2014")
    add("--pope_path", nargs="+", help="POPE's folder or question files")
    args = parser.parse_args()
    cards = gpus()
    lines, faults = report(args, cards)
    print("\n".join(lines))
    for fault in faults:
        print(f"wrong: {fault}")
    print(f"next: {what_next(args, faults, cards)}")
    sys.exit(1 if faults else 0)


if __name__ == "__main__":
    main()
