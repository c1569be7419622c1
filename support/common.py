"""What every program here uses: errors with a cure, JSON files, the device, and what rank 0 says.

    raise InputError(f"{path}: no such file; check the path")       # the user sees this one line
    rows = read_json("desc_data.json", dict)                        # errors name file and place
    device, dtype = device_and_dtype()                              # bf16 on a GPU, fp32 on a CPU

An InputError is something that the user can mend. Its message names the file, the value and the
cure, and `run_program` prints nothing else. All other exceptions are faults of ours.
"""
import glob
import hashlib
import importlib
import importlib.metadata
import io
import json
import math
import os
import re
import sys
import time
import uuid
from dataclasses import dataclass

import torch
import torch.distributed as dist
from tqdm import tqdm

from support.bars import in_a_log_file
from support.command_line import first_process, meant

LFS_POINTER = b"version https://git-lfs.github.com/spec/"     # how such a file begins
BOM = b"\xef\xbb\xbf"           # some programs write it in front of UTF-8


class InputError(Exception):
    """Something that the user can mend. The message names the file, the value and the cure."""


def run_program(main):
    """Run a command-line program.

    An InputError ends it with one line on stderr and exit code 1, Ctrl-C with exit code 130. What
    the terminal's encoding has no letter for is printed as an escape.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):            # None, where the shell has closed it
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        main()
    except InputError as e:
        # If rank 0 meets the same error, the launcher ends this process before it prints it again.
        if not first_process():
            time.sleep(5)
        # An error from a DataLoader worker has a traceback of many lines in front of its message.
        message = str(e).rpartition("InputError: ")[2].strip()
        print(f"error: {message}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        sys.exit(130)


def progress(*args, disable=False, **options):
    """A tqdm bar. Only rank 0 shows it, and only for work that takes more than three seconds.

    In a log file it is a line every half minute (bars.py).
    """
    options = {"leave": False, "delay": 3} | options | in_a_log_file()
    return tqdm(*args, disable=disable or not first_process(), **options)


def say(text):
    """Print a line, on rank 0 only."""
    if not dist.is_initialized() or dist.get_rank() == 0:
        print(text, flush=True)


# ---- Flags ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Number:
    """An argparse type: a finite number within its range.

        add("--seed", type=Number("--seed", int, low=0))

    InputError names the flag, the value as it was typed, and the range.
    """
    flag: str
    kind: type                  # int or float
    above: float = None         # the value must be larger
    low: float = None           # the smallest value
    below: float = None         # the value must be smaller
    high: float = None          # the largest value

    def __call__(self, text):
        try:
            value = self.kind(text)
        except ValueError:
            value = math.nan
        if not abs(value) < math.inf:           # not a number, or infinite
            what = "a whole number" if self.kind is int else "a finite number"
            raise InputError(f"{self.flag} {text}: must be {what} {self.range()}".rstrip())
        if not self.holds(value):
            raise InputError(f"{self.flag} {text}: must be {self.range()}")
        return value

    def holds(self, value):
        return ((self.above is None or value > self.above)
                and (self.low is None or value >= self.low)
                and (self.below is None or value < self.below)
                and (self.high is None or value <= self.high))

    @property
    def metavar(self):
        return "N" if self.kind is int else "X"

    def range(self):
        bounds = {"above": self.above, "at least": self.low, "below": self.below,
                  "at most": self.high}
        return " and ".join(f"{words} {bound}" for words, bound in bounds.items()
                            if bound is not None)


# ---- Files ---------------------------------------------------------------------------------------


def check_file(path):
    """InputError if there is no such file, or only Git LFS's pointer to it."""
    if os.path.isdir(path):
        raise InputError(f"{path}: is a folder, and a file is meant; name the file")
    if not os.path.isfile(path):
        raise InputError(f"{path}: no such file; {meant(path)}")
    try:
        with open(path, "rb") as file:
            is_pointer = file.read(len(LFS_POINTER)) == LFS_POINTER
    except OSError as e:
        raise InputError(f"{path}: cannot be opened ({e.strerror}); check its permissions") from e
    if is_pointer:
        raise InputError(f"{path}: is only Git LFS's pointer to the file; get the file itself, "
                         "with: git lfs pull")


def check_text(path):
    """`check_file` of a text → its first byte behind a BOM. InputError if it is UTF-16."""
    check_file(path)
    with open(path, "rb") as file:
        begins = file.read(3)
    if re.match(rb"\xff\xfe|\xfe\xff|[\[{]\0|\0[\[{]", begins):
        raise InputError(f"{path}: is UTF-16; save it as UTF-8")
    return 3 if begins == BOM else 0


def parse_json(text):
    """The value of a JSON text, a str or UTF-8. Half a character in it becomes U+FFFD."""
    text = text if isinstance(text, str) else text.decode()
    value = json.loads(text, parse_int=whole_number)
    return without_halves(value) if "\\ud" in text or "\\uD" in text else value


def without_halves(value):
    """A JSON value without halves of characters, which JSON can say and UTF-8 cannot."""
    if isinstance(value, str):
        return re.sub("[\ud800-\udfff]", "\ufffd", value)
    if isinstance(value, list):
        return [without_halves(inner) for inner in value]
    if isinstance(value, dict):
        return {without_halves(name): without_halves(inner) for name, inner in value.items()}
    return value


def read_json(path, expected=object, lines=False):
    """The value of a JSON file, which must be of the type `expected`.

    With `lines`, each line of the file is a JSON value, and a list of them is returned. InputError
    names the file, and the row if there are rows.
    """
    check_text(path)
    place = path
    try:
        with open(path, encoding="utf-8-sig") as file:      # a BOM is no content
            if not lines:
                value = parse_json(file.read())
            else:
                value = []
                for line in filter(str.strip, file):        # empty lines are no rows
                    place = f"{path}, row {len(value)}"
                    value.append(parse_json(line))
    except UnicodeDecodeError as e:
        raise InputError(f"{path}: not readable as JSON, which is UTF-8 ({e}); save it as UTF-8, "
                         "if the download was not damaged") from e
    except (ValueError, RecursionError) as e:      # also numbers of 5,000 digits, 1,000 levels
        raise InputError(f"{place}: not readable as JSON ({e}); was the download cut short?") from e
    return of_type(value, expected, path)


def of_type(value, expected, path):
    """The value of a JSON file. InputError if it is not of the type `expected`."""
    if not isinstance(value, expected):
        raise InputError(f"{path}: holds a {type(value).__name__} where a {expected.__name__} "
                         "should be; is it the right file?")
    return value


def id_text(value):
    """An id as text, to be compared: files write the same one as 17, "17" or "0017"."""
    text = str(value)
    return text.lstrip("0") or "0" if text.isdecimal() else text


def whole_number(text):
    """ValueError for one that no float can be: nothing that is counted is as large."""
    if len(text) > 300:
        raise ValueError(f"a number of {len(text):,} digits")
    return int(text)


def field(row, name, expected, path, number):
    """row[name]. InputError with file and row number if it is absent or not of type `expected`.

    `expected` is a type or a tuple of types.
    """
    value = row.get(name) if isinstance(row, dict) else None
    if not isinstance(value, expected):
        types = expected if isinstance(expected, tuple) else (expected,)
        names = " or ".join(t.__name__ for t in types)
        raise InputError(f"{path}, row {number}: {name!r} should be {names} and is {value!r}; "
                         "mend or remove the row")
    return value


def read_rows(path, *names):
    """The rows of a file with one JSON object per line.

    InputError if there are none, or if a row has no text under one of the `names`.
    """
    rows = read_json(path, lines=True)
    if not rows:
        raise InputError(f"{path}: is empty; was the download cut short?")
    for n, row in enumerate(rows):
        for name in names:
            field(row, name, str, path, n)
    return rows


def temporary(path):
    """A name beside `path` that no other process takes, on this machine or another one."""
    return f"{path}.{uuid.uuid4().hex[:12]}.partial"


def write_json(path, value):
    """Write `value` as JSON. The file is never half-written, even if the process is killed."""
    partial = temporary(path)
    try:
        with open(partial, "w", encoding="utf-8") as file:
            json.dump(value, file, indent=2, ensure_ascii=False)
            file.write("\n")
        os.replace(partial, path)
    except OSError as e:
        raise InputError(f"{path}: cannot be written ({e.strerror}); make room there, or name "
                         "another folder") from e


def import_fault(module):
    """Why a module cannot be imported, in a line; None if it can. Some are there and do not fit the
    rest.
    """
    try:
        importlib.import_module(module)
    except Exception as e:
        return str(e).partition("\n")[0] or type(e).__name__
    return None


def file_digest(path):
    """The SHA-256 of a file's content, in hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# ---- The device ----------------------------------------------------------------------------------


def versions():
    """The versions of what must fit together: torch, CUDA, NVIDIA's driver, DeepSpeed. A text."""
    cuda = f"CUDA {torch.version.cuda}" if torch.version.cuda else "no CUDA"
    driver = "(not found)"
    path = "/proc/driver/nvidia/version"
    if os.path.isfile(path):
        with open(path) as file:
            number = re.search(r"\d+\.\d+[.\d]*", file.readline())
        driver = number[0] if number else driver
    try:
        deepspeed = importlib.metadata.version("deepspeed")
    except importlib.metadata.PackageNotFoundError:
        deepspeed = "(not installed)"
    return (f"torch {torch.__version__} (built for {cuda}), NVIDIA's driver {driver}, "
            f"deepspeed {deepspeed}")


def can_use_gpu():
    """Whether there is a GPU to compute on.

    InputError if the machine has a GPU that this torch cannot use. On a CPU everything takes so
    long that the user should ask for it, with CUDA_VISIBLE_DEVICES= (empty).
    """
    found = torch.cuda.is_available()
    if found:
        refuse_surplus_processes()
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES", "all") in ("", "-1")
    try:
        if found:       # torch may list a GPU that it has no kernels for; the addition needs one
            torch.ones(1, device=f"cuda:{os.environ.get('LOCAL_RANK', 0)}").add_(1)
        elif not hidden and glob.glob("/dev/nvidia[0-9]*"):
            raise RuntimeError("torch finds none, but this machine has one")
    except RuntimeError as e:
        reason = str(e).splitlines()[0]
        raise InputError(f"the GPU cannot be used ({reason}). Here are {versions()}: install a "
                         "torch that is built for this GPU and driver (pytorch.org/get-started), "
                         "or a newer driver; CUDA_VISIBLE_DEVICES= (empty) takes the CPU") from e
    return found


def refuse_surplus_processes():
    """InputError if more processes were started on this machine than it has GPUs."""
    # torchrun calls their number LOCAL_WORLD_SIZE, DeepSpeed's launcher LOCAL_SIZE.
    told = [int(os.environ[name]) for name in ("LOCAL_WORLD_SIZE", "LOCAL_SIZE")
            if name in os.environ]
    processes = max([int(os.environ.get("LOCAL_RANK", 0)) + 1, *told])
    gpus = torch.cuda.device_count()
    if processes > gpus:
        raise InputError(f"{processes} processes and {gpus} GPUs: start {gpus} (deepspeed "
                         f"--num_gpus {gpus}, torchrun --nproc_per_node {gpus}); "
                         "CUDA_VISIBLE_DEVICES says which GPUs there are")


def device_and_dtype(bf16=None):
    """The device and dtype of this process: bf16 on a GPU, fp32 on a CPU, or as `bf16` says."""
    on_gpu = can_use_gpu()
    if bf16 is None:
        bf16 = on_gpu
    dtype = torch.bfloat16 if bf16 else torch.float32
    if not on_gpu:
        return torch.device("cpu"), dtype
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    # NCCL and CUDA graphs use the current device, which is the first GPU unless it is set.
    torch.cuda.set_device(device)
    return device, dtype
