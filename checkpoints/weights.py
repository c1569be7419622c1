"""From files to parameters: which tensor fills which, and reading them.

    attach_weights(module, tensors, "llava-v1.5-7b", torch.bfloat16, device)    # nothing is read
    load_weights(module)                                                        # now it is

A module is made on the meta device and filled tensor by tensor, so that loading needs about one
tensor of extra memory (on a GPU eight, read by as many threads). Names and shapes are compared
before anything is read.
"""
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import nn

from checkpoints.quantised import read_linear
from support.common import InputError, progress
from support.packed import PackedLinear


def attach_weights(module, tensors, source, dtype=None, device="cpu"):
    """Note at each parameter of `module`, which is on the meta device, where its values are.

    Nothing is read: `load_weights` does that, with this `dtype` and `device`. `tensors`: {key:
    LazyTensor}; InputError unless they are exactly the module's parameters. `source`: their folder.
    """
    own = {key: tuple(parameter.shape) for key, parameter in module.state_dict().items()}
    missing = sorted(own.keys() - tensors.keys())
    unexpected = sorted(tensors.keys() - own.keys())
    if missing or unexpected:
        raise InputError(f"{source}: does not fit this model; missing keys: "
                         f"{missing[:5] or 'none'} ({len(missing)}), unexpected keys: "
                         f"{unexpected[:5] or 'none'} ({len(unexpected)}); is it whole, and of "
                         "this base?")
    for key, shape in own.items():
        if tensors[key].shape != shape:
            raise InputError(f"{source}: {key} has shape {tensors[key].shape} and config.json "
                             f"makes it {shape}; its weights belong to another model")
    for key, parameter in module.to(dtype=dtype).state_dict(keep_vars=True).items():
        parameter.in_file = tensors[key], source, dtype, device


def load_weights(module):
    """Read the parameters of `module` that are still in their files, and freeze them.

    InputError if one of them holds NaN or infinity.
    """
    waiting = {key: p for key, p in module.state_dict(keep_vars=True).items() if p.is_meta}
    on_gpu = any(torch.device(p.in_file[-1]).type == "cuda" for p in waiting.values())
    few_bits = any(getattr(p, "bits", 16) < 16 for p in waiting.values())

    def read(parameter):
        if getattr(parameter, "bits", 16) < 16:
            return read_linear(parameter)
        lazy, _, dtype, device = parameter.in_file
        tensor = lazy.read(on_gpu).to(device, non_blocking=on_gpu)
        return tensor.to(dtype or tensor.dtype)

    # A GPU takes tensors faster than one core reads them. On a CPU each tensor that is read at the
    # same time as another needs memory beyond the model, which few bits are to save on a GPU too.
    with ThreadPoolExecutor(8 if on_gpu and not few_bits else 1) as pool:
        results = pool.map(read, waiting.values())
        results = progress(results, "reading weights", len(waiting), unit="tensor")
        for (key, parameter), tensor in zip(waiting.items(), results, strict=True):
            source = parameter.in_file[1]
            numbers = tensor.packed.scales() if isinstance(tensor, PackedLinear) else tensor
            # 40 times as fast as numbers.isfinite().all()
            if not all(x.isfinite() for x in numbers.aminmax()):
                pool.shutdown(cancel_futures=True)
                raise InputError(f"{source}: {key} holds NaN or infinity; it is damaged or its "
                                 "training diverged: take another")
            owner, _, name = key.rpartition(".")
            if isinstance(tensor, PackedLinear):
                module.set_submodule(owner, tensor)
                continue
            parameter = nn.Parameter(tensor, requires_grad=False)
            setattr(module.get_submodule(owner), name, parameter)
    return module
