"""Tensors that stay in their files until somebody needs them.

    tensors = read_file("model.safetensors")          # {key: LazyTensor}; only the header is read
    weight = tensors["lm_head.weight"].read()         # now the values are read
    write_tensors("trained.safetensors", {"lm_head.weight": weight})

Both public formats are read: safetensors, and the `.bin` files of `torch.save`. A model is loaded
tensor by tensor, so it needs memory for itself and one more tensor. What is no file of whole floats
(quantised, left empty by ZeRO-3, a pointer of Git LFS) is refused by its name. A .bin is opened
with `weights_only=True`, so that none of its content is run.
"""
import ctypes
import json
import mmap
import os
import re
import warnings
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from support.common import InputError, check_file

# safetensors' names of the dtypes that are read. Whole numbers are positions and sizes.
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
          "I64": torch.int64, "I32": torch.int32, "U8": torch.uint8}
FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
# Parts of keys that only quantised files have → what writes them.
QUANTISED = {
    r"\.(absmax|quant_map|nested_absmax|nested_quant_map|SCB|weight_format)$|\.quant_state\.":
        "bitsandbytes",
    r"\.(qweight|qzeros|scales|g_idx)$": "GPTQ or AWQ",
    r"\.(weight_scale|weight_scale_inv|weight_packed|weight_shape|weight_zero_point|input_scale)$":
        "FP8 or compressed-tensors"}
# Keys of bitsandbytes' NF4, and of nothing else that it writes.
NF4_KEYS = re.compile(
    r"\.(absmax|quant_map|nested_absmax|nested_quant_map|quant_state\.bitsandbytes__nf4)$")
GGUF = b"GGUF"          # how llama.cpp's files begin


@dataclass
class LazyTensor:
    """A tensor that is still in its file.

    read(pinned=False) → the whole tensor. `pinned` asks for memory from which a GPU can copy while
        the CPU goes on.
    read_values(indices) → the values at `indices` (n,) of the flattened tensor, without reading the
        rest of it. None if the file does not allow this.
    """
    shape: tuple
    read: Callable
    read_values: Callable = None

    def values_at(self, indices):
        """The values at `indices` (n,) of the flattened tensor, read with as little as possible."""
        if self.read_values:
            return self.read_values(indices)
        return self.read().flatten()[indices]


def read_file(path, nf4=False):
    """One weight file → {key: LazyTensor}. Only the header is read; a .bin is memory-mapped.

    nf4: 4-bit weights of bitsandbytes' are allowed, in pieces (checkpoints/quantised.py joins
    them).
    """
    check_file(path)
    with open(path, "rb") as file:
        if file.read(len(GGUF)) == GGUF:
            refuse_gguf(path)
    return (read_safetensors if path.endswith(".safetensors") else read_bin)(path, nf4)


def refuse_gguf(path):
    raise InputError(f"{path}: is a GGUF file, llama.cpp's format, which is not read here; name "
                     "the model's original folder, in LLaVA's or Hugging Face's layout")


def refuse_foreign(path, header, nf4):
    """InputError for what is no whole tensor of floats. `header`: {key: (shape, dtype)}.

    A dtype is torch's, or the name of one that is not read. `nf4`: 4-bit weights are allowed.
    """
    if nf4 and any(NF4_KEYS.search(key) for key in header):
        header = {key: (shape, dtype) for key, (shape, dtype) in header.items()
                  if not NF4_KEYS.search(key) and (dtype, shape[1:]) != (torch.uint8, (1,))}
    for pattern, writer in QUANTISED.items():
        for key in filter(re.compile(pattern).search, header):
            raise InputError(f"{path}: {key} says that this checkpoint is quantised ({writer}); "
                             "name the checkpoint in 16 or 32 bits that it was made from")
    for key, (shape, dtype) in header.items():
        if 0 in shape:
            raise InputError(
                f"{path}: {key} has shape {shape}, so it holds no values; ZeRO-3 leaves such "
                "tensors where they were not gathered before saving: make the file again with "
                "DeepSpeed's zero_to_fp32.py, or train with "
                "stage3_gather_16bit_weights_on_model_save")
        is_count = dtype in (torch.int64, torch.int32) and not key.endswith((".weight", ".bias"))
        if dtype not in FLOATS and not is_count:
            name = str(dtype).removeprefix("torch.")
            raise InputError(f"{path}: {key} has dtype {name}, so it is quantised or of another "
                             "program; only float64, float32, float16 and bfloat16 are read: name "
                             "the checkpoint in 16 or 32 bits")


def read_safetensors(path, nf4=False):
    """A safetensors file → {key: LazyTensor}.

    The library checks the header. We read the values straight into a new tensor, which needs no
    memory beyond that tensor. The format: length of the header (8 bytes), header (JSON), values.
    """
    try:
        with safe_open(path, framework="pt") as file:
            slices = {key: file.get_slice(key) for key in file.keys()}
            shapes = {key: tuple(part.get_shape()) for key, part in slices.items()}
            dtypes = {key: DTYPES.get(part.get_dtype(), part.get_dtype())
                      for key, part in slices.items()}
    except (SafetensorError, OSError) as e:
        raise InputError(f"{path}: not a whole safetensors file of floats ({e}); "
                         "download it again") from e
    refuse_foreign(path, {key: (shape, dtypes[key]) for key, shape in shapes.items()}, nf4)
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
    begins = {key: 8 + length + header[key]["data_offsets"][0] for key in shapes}

    def read(key, pinned=False):
        tensor = torch.empty(shapes[key], dtype=dtypes[key], pin_memory=pinned)
        with open(path, "rb", buffering=0) as file:
            file.seek(begins[key])
            rest = memoryview(tensor.view(-1).view(torch.uint8).numpy())
            while rest:
                count = file.readinto(rest)
                if not count:
                    raise InputError(f"{path}: was cut while it was read; load it again")
                rest = rest[count:]
        return tensor

    def read_values(key, indices):
        size = dtypes[key].itemsize
        with open(path, "rb", buffering=0) as file:
            values = [os.pread(file.fileno(), size, begins[key] + size * index)
                      for index in indices.tolist()]
        return torch.frombuffer(bytearray(b"".join(values)), dtype=dtypes[key])

    return {key: LazyTensor(shape, partial(read, key), partial(read_values, key))
            for key, shape in shapes.items()}


def read_bin(path, nf4=False):
    """A file of torch.save → {key: LazyTensor}.

    Unpickling its table is slow, so the file is memory-mapped once and stays so.
    """
    mapped = zipfile.is_zipfile(path)       # torch before 1.6 wrote no zip: read it as a whole
    try:
        with warnings.catch_warnings(action="ignore"):
            tensors = torch.load(path, map_location="cpu", mmap=mapped, weights_only=True)
    except Exception as e:      # a damaged or foreign file may raise anything
        raise InputError(f"{path}: cannot be read as a file of tensors {why_unreadable(e)}") from e
    if isinstance(tensors, dict) and isinstance(tensors.get("state_dict"), dict):
        tensors = tensors["state_dict"]     # open_clip's training checkpoints
    if not isinstance(tensors, dict):
        raise InputError(f"{path}: holds a {type(tensors).__name__} and no tensors by name; "
                         "name another file")
    for key, value in tensors.items():
        if not isinstance(key, str) or not isinstance(value, torch.Tensor):
            raise InputError(f"{path}: {key} is no tensor; a weight file holds tensors and nothing "
                             "else: name another file")
        if value.layout != torch.strided or value.is_meta or value.is_quantized:
            raise InputError(f"{path}: {key} holds no plain values (layout {value.layout}, dtype "
                             f"{value.dtype}, device {value.device}); save it again as a dense "
                             "tensor of floats")
    refuse_foreign(path, {key: (tuple(t.shape), t.dtype) for key, t in tensors.items()}, nf4)

    def read(key, pinned=False):
        tensor = tensors[key]
        copy = torch.empty_like(tensor, pin_memory=pinned).copy_(tensor)
        if mapped:
            forget_pages(tensor)
        return copy

    def read_values(key, indices):
        return tensors[key].flatten()[indices]

    return {key: LazyTensor(tuple(tensor.shape), partial(read, key), partial(read_values, key))
            for key, tensor in tensors.items()}


def why_unreadable(error):
    """What torch.load stopped at, and the cure. torch's own text advises to run the file's code."""
    code = re.search(r"GLOBAL (\S+)", str(error))
    if code:
        return (f"(it also holds {code[1]}, and to open that would run code of the file); save its "
                "state_dict() alone")
    if isinstance(error, OSError) and error.strerror:
        return f"({error.strerror}); check the path"
    return "(it is damaged, cut, or of another kind); copy or download it again"


def forget_pages(tensor):
    """Give the memory of a mapped tensor back. It can be used again: its pages are then reread."""
    begin = tensor.data_ptr() // mmap.PAGESIZE * mmap.PAGESIZE
    size = tensor.data_ptr() + tensor.nbytes - begin
    ctypes.CDLL(None).madvise(ctypes.c_void_p(begin), ctypes.c_size_t(size), mmap.MADV_DONTNEED)


def write_tensors(path, tensors):
    """Write {key: tensor}, then read the file again and compare.

    InputError where it cannot be written. RuntimeError if a key is lost, a value differs or is NaN,
    or if there is nothing to write.
    """
    tensors = {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}
    try:
        save_file(tensors, path, {"format": "pt"})
    except (SafetensorError, OSError) as e:
        raise InputError(f"{path}: cannot be written ({e}); make room there, or name another "
                         "folder") from e
    written = read_file(path, nf4=True)
    bad = [key for key, tensor in tensors.items()
           if key not in written or not torch.equal(written[key].read(), tensor)]
    if bad or not tensors:
        raise RuntimeError(f"{path}: what was written is not what was to be written, or holds NaN "
                           f"({bad[:5] or 'nothing'})")
