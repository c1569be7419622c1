"""4-bit weights: bitsandbytes' files, read and written, and how many bits a base is held in.

    tensors = with_packed(tensors, path)        # six tensors of a file become one, X.weight
    model = in_bits(model, 4)                   # LLaMA's linears, from the moment they are read
    tensors = packed_tensors(model.trunk)       # {name: tensor} as a file holds them

A weight X.weight of bitsandbytes is a row of bytes, and beside it stand X.weight.absmax,
.quant_map, .nested_absmax, .nested_quant_map, and .quant_state.bitsandbytes__nf4, which is JSON in
bytes. What is read is NF4 in blocks of 64 (support/nf4.py), its scales in fp32 or quantised in
blocks of 256; everything else is refused by its name. A linear outside LLaMA's layers, of tower or
projector, is made whole when it is read. Only LLaMA's linears are ever held in few bits, and an
adapter is merged into them before they are rounded.
"""
import json
from dataclasses import dataclass
from functools import partial
from math import prod

import torch

from llama import LINEARS
from support.common import InputError
from support.nf4 import BLOCK, NESTED_BLOCK, NF4, dynamic_values, quantiles
from support.packed import PackedLinear, packed
from support.tensors import FLOATS, LazyTensor

BITS = 4, 8, 16
STATE = ".quant_state.bitsandbytes__nf4"
PARTS = "", ".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map", STATE
BITS_HELP = "hold LLaMA's linears in 4 (NF4) or 8 bits, or in all 16; default: as the files are"
# What Hugging Face's files say of themselves. The skipped modules stay: names of several
# of its versions.
QUANTISATION = {"quant_method": "bitsandbytes", "load_in_4bit": True, "load_in_8bit": False,
                "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True,
                "bnb_4bit_quant_storage": "uint8", "bnb_4bit_compute_dtype": "bfloat16",
                "llm_int8_skip_modules": [
                    "lm_head", "vision_tower", "model.vision_tower", "multi_modal_projector",
                    "model.multi_modal_projector", "mm_projector", "model.mm_projector"]}
READ = ("quant_method", "load_in_4bit", "bnb_4bit_quant_type", "bnb_4bit_quant_storage")


# ---- Files ---------------------------------------------------------------------------------------


def refuse_quantised(values, path):
    """InputError if a config.json says that its weights are quantised otherwise than in NF4."""
    told = values.get("quantization_config")
    if not told:
        return
    method = told.get("quant_method") if isinstance(told, dict) else told
    if method != "bitsandbytes":
        raise InputError(f"{path}: quantization_config says that the weights are quantised "
                         f"({method or json.dumps(told)}), and only bitsandbytes' NF4 is read "
                         "here; name the checkpoint in 16 or 32 bits that it was made from (if "
                         "this is it, remove quantization_config)")
    for name in READ:
        if told.get(name, QUANTISATION[name]) != QUANTISATION[name]:
            raise InputError(f"{path}: {name} of quantization_config is {json.dumps(told[name])} "
                             f"and only {json.dumps(QUANTISATION[name])} is read here; name the "
                             "checkpoint in 16 or 32 bits that it was made from")


@dataclass
class PackedTensor(LazyTensor):
    """A weight that its file holds in four bits. `read` makes it whole; `read_packed()` → NF4."""
    read_packed: partial = None


def with_packed(tensors, path):
    """{key: LazyTensor} of a folder's files → the same, each 4-bit weight a PackedTensor."""
    tensors = dict(tensors)
    for key in [key for key in tensors if key.endswith(STATE)]:
        name = key.removesuffix(STATE)
        parts = {part: tensors.pop(name + part, None) for part in PARTS}
        shape, dtype, offset = read_state(parts, f"{path}: {name}")
        read_packed = partial(read_nf4, parts, shape, dtype, offset)

        def read(pinned=False, read_packed=read_packed, dtype=dtype):
            return read_packed().dequantised(dtype)

        values = partial(values_at, parts, read_packed, dtype)
        tensors[name] = PackedTensor(shape, read, values, read_packed)
    left = [key for key in tensors if key.endswith(PARTS[1:])]
    if left:
        raise InputError(f"{path}: {min(left)} ({len(left)} such keys) belongs to no 4-bit weight "
                         f"({STATE} is missing); download the checkpoint again")
    return tensors


def read_state(parts, where):
    """The settings of a 4-bit weight → its shape, dtype, and offset of its scales. InputError
    where they are not those of nf4.py, or its parts do not fit each other.
    """
    nested = parts[".nested_absmax"] is not None
    needed = [part for part in PARTS if nested or not part.startswith(".nested")]
    missing = [part for part in needed if parts[part] is None]
    if missing:
        raise InputError(f"{where}: has no {missing[0] or '.weight'} beside its quant_state; "
                         "download the checkpoint again")
    try:
        state = json.loads(bytes(parts[STATE].read().tolist()))
        shape, dtype = tuple(map(int, state["shape"])), getattr(torch, state["dtype"])
        offset = float(state["nested_offset"]) if nested else None
    except (ValueError, KeyError, TypeError, AttributeError) as e:
        raise InputError(f"{where}: its quant_state cannot be read ({type(e).__name__}: {e}); "
                         "download the checkpoint again") from e
    built = {"quant_type": "nf4", "blocksize": BLOCK}
    if nested:
        built |= {"nested_blocksize": NESTED_BLOCK, "nested_dtype": "float32"}
    for name, only in built.items():
        if state.get(name) != only:
            raise InputError(f"{where}: {name} is {json.dumps(state.get(name))} and only "
                             f"{json.dumps(only)} is read here; name the checkpoint in 16 or 32 "
                             "bits that it was made from")
    blocks = -(-prod(shape) // BLOCK)
    shapes = {"": ((prod(shape) + 1) // 2, 1), ".absmax": (blocks,),
              ".nested_absmax": (-(-blocks // NESTED_BLOCK),)}
    for part in needed:
        if part in shapes and parts[part].shape != shapes[part]:
            raise InputError(f"{where}{part} has shape {parts[part].shape} and should have "
                             f"{shapes[part]} for a weight {shape} in bytes; name another "
                             "checkpoint, or download it again")
    cpu = torch.device("cpu")
    maps = {".quant_map": quantiles(cpu), ".nested_quant_map": dynamic_values(cpu)}
    for part in needed:
        if part in maps and not torch.equal(parts[part].read(), maps[part]):
            raise InputError(f"{where}{part} holds other values than bitsandbytes'; name the "
                             "checkpoint in 16 or 32 bits that it was made from")
    if dtype not in FLOATS or (offset is not None and offset != offset):
        raise InputError(f"{where}: its quant_state says dtype {state['dtype']}, offset {offset}; "
                         "download the checkpoint again")
    return shape, dtype, offset


def read_nf4(parts, shape, dtype, offset):
    nested = parts[".nested_absmax"]
    return NF4(parts[""].read(), parts[".absmax"].read(), nested and nested.read(), offset, shape,
               dtype)


def values_at(parts, read_packed, dtype, indices):
    """Some values of a 4-bit weight, read with as little as possible: each with its own block."""
    block = indices // BLOCK
    byte = parts[""].values_at(indices // 2).int()
    absmax, nested = parts[".absmax"].values_at(block), parts[".nested_absmax"]
    scale = absmax
    if nested is not None:
        offset = read_packed.args[-1]
        nested = nested.values_at(block // NESTED_BLOCK)
        scale = dynamic_values(torch.device("cpu"))[absmax.int()] * nested + offset
    code = torch.where(indices % 2 == 0, byte >> 4, byte & 15)
    return (quantiles(torch.device("cpu"))[code] * scale).to(dtype)


def packed_tensors(trunk):
    """{name: tensor} of every 4-bit linear of a trunk, as bitsandbytes' files hold it."""
    tensors = {}
    for name, module in trunk.named_modules():
        if isinstance(module, PackedLinear):
            weight, name = module.packed, f"{name}.weight"
            state = {"quant_type": "nf4", "blocksize": BLOCK, "dtype": dtype_name(weight.dtype),
                     "shape": list(weight.shape)}
            device = weight.codes.device
            tensors |= {name: weight.codes, f"{name}.absmax": weight.absmax,
                        f"{name}.quant_map": quantiles(device).clone()}
            if weight.nested_absmax is not None:
                state |= {"nested_blocksize": NESTED_BLOCK, "nested_dtype": "float32",
                          "nested_offset": weight.offset}
                tensors |= {f"{name}.nested_absmax": weight.nested_absmax,
                            f"{name}.nested_quant_map": dynamic_values(device).clone()}
            tensors[name + STATE] = torch.tensor(list(json.dumps(state).encode()),
                                                 dtype=torch.uint8)
    return tensors


def whole_tensors(model):
    """{our name: tensor} of a Llava with one head, as files hold it."""
    trunk = model.trunk
    return dict(trunk.state_dict()) | packed_tensors(trunk) | dict(model.head.state_dict())


def dtype_name(dtype):
    return str(dtype).removeprefix("torch.")


# ---- Models --------------------------------------------------------------------------------------


def in_bits(model, bits=None):
    """A Llava whose trunk is still in its files → the same, whose LLaMA's linears will be held in
    so many bits. None: as the files are.
    """
    held = []
    for name, parameter in model.trunk.model.layers.named_parameters():
        if name.split(".")[-2] not in LINEARS or not parameter.is_meta:
            continue
        lazy, source, *_ = parameter.in_file
        is_packed = isinstance(lazy, PackedTensor)
        if is_packed and bits == 8:
            raise InputError(f"--bits 8: {source} holds LLaMA's linears in 4 bits already; leave "
                             "--bits out, or name the checkpoint in 16 bits that it was made from")
        parameter.bits = bits or (4 if is_packed else 16)
        held.append(parameter.bits)
    model.config.bits = min(held, default=model.config.bits)
    return model


def read_linear(parameter):
    """A linear's weight that is still in its file → PackedLinear. What is not in few bits there is
    rounded as it comes from the file, on the device that it is for.
    """
    lazy, _, _, device = parameter.in_file
    if isinstance(lazy, PackedTensor):
        return PackedLinear(lazy.read_packed()).to(device)
    return PackedLinear(packed(lazy.read().to(device), parameter.bits))
