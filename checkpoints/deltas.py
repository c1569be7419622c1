"""LLaVA v1 was released as deltas: its weights less those of LLaMA, which everybody gets elsewhere.

    model = load_delta("LLaVA-7b-delta-v1-1", "llama-7b", "clip-vit-large-patch14")     # a base

Follows `llava/model/apply_delta.py` of haotian-liu/LLaVA: the first rows of embeddings and lm_head
are sums, the rows of added tokens and the projector are there as they are.
"""
from dataclasses import replace
from functools import partial

from checkpoints.hub import folder_of
from checkpoints.layouts import read_tensors
from checkpoints.load import read_base
from checkpoints.weights import load_weights
from clip_vit import TOWER
from support.common import InputError
from support.tensors import LazyTensor

ADDED_ROWS = "model.embed_tokens.weight", "lm_head.weight"
WHOLE = TOWER, "model.mm_projector."


def load_delta(folder, base, vision_tower=None):
    """The delta in `folder` and the LLaMA that was subtracted from it → Llava, in its dtype.

    InputError where they do not fit, before weights are read.
    """
    files, base = read_base(folder, vision_tower), folder_of(base)
    model = replace(files, tensors=sums(files.tensors, read_tensors(base), base)).model(None, "cpu")
    load_weights(model.head)
    load_weights(model.trunk)
    return model


def sums(delta, base, place):
    """{our name: LazyTensor} of a delta and of its base, which lies in `place` → of both."""
    changed = {key for key in delta if not key.startswith(WHOLE)}
    alone = sorted(changed ^ base.keys())
    if alone:
        raise InputError(f"{place}: {alone[0]} ({len(alone)} such keys) is not in both base and "
                         "delta; name the LLaMA that the delta was made from")
    for key in changed:
        (rows, *width), (base_rows, *base_width) = delta[key].shape, base[key].shape
        if width != base_width or rows != base_rows and (key not in ADDED_ROWS or rows < base_rows):
            raise InputError(f"{place}: {key} has shape {base[key].shape} there, and "
                             f"{delta[key].shape} in the delta; name the LLaMA that the delta was "
                             "made from")
    return delta | {key: LazyTensor(delta[key].shape, partial(read_sum, delta[key], base[key]))
                    for key in changed}


def read_sum(delta, base, pinned=False):
    """One tensor of both. It is rounded once, as a sum in 16 bits is."""
    whole = delta.read(pinned)
    summed = whole.float()
    summed[:base.shape[0]] += base.read().float()
    return summed.to(whole.dtype)
