"""VoCo-LLaMA: a base that learns to compress an image into a few tokens.

    model = with_voco(load_base(…, read_trunk=False), 2)    # train.py --stage 0 --voco 2

Follows arXiv 2406.12275 and Yxxxb/VoCo-LLaMA: one new token, <voco>, stands N times behind the
image, the text behind sees only these N (llama.py, data.py), and supervised training does the rest.
Deliberately different: the new rows of embeddings and lm_head begin as the mean of the others; N is
kept in config.json; a row keeps LLaVA's system sentence and the newlines of its text.
Images compressed once and kept: compressed.py.
"""
import torch
from torch import nn

from checkpoints.identity import fingerprint
from support.common import InputError
from support.tensors import LazyTensor


def with_voco(model, count):
    """A Llava whose trunk is still in its files, for rows with `count` <voco> tokens → the same.

    A base without the token gets it, as the last row of embeddings and lm_head. InputError where
    the base has other tokens around its images, or images of any resolution.
    """
    config, embedding, lm_head = model.config, model.trunk.model.embed_tokens, model.head.lm_head
    for name, value in (("mm_use_im_start_end", config.image_start_end),
                        ("image_grid_pinpoints", config.pinpoints)):
        if value:
            raise InputError(f"--voco {count}: the base's config.json has {name}, and a row with "
                             "<voco> tokens has a plain image of one size; name another base, such "
                             "as a LLaVA-1.5")
    if not config.num_voco:
        lazy, *how = embedding.weight.in_file
        shape = lazy.shape[0] + 1, lazy.shape[1]
        embedding.weight = nn.Parameter(torch.empty(shape, device="meta"), requires_grad=False)
        grown = LazyTensor(shape, lambda pinned=False: with_mean(lazy.read(pinned)))
        embedding.weight.in_file = grown, *how
        lm_head.weight = nn.Parameter(with_mean(lm_head.weight), requires_grad=False)
        config.text.vocab_size += 1
    config.num_voco = count
    model.fingerprint = fingerprint(model.trunk, model.head, model.preprocess)
    return model


def with_mean(weight):
    """(vocab, hidden) → (vocab + 1, hidden): the new row is the mean of the others."""
    mean = weight.float().mean(0, keepdim=True).to(weight.dtype)
    return torch.cat((weight, mean))
