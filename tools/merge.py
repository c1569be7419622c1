"""Write a checkpoint and its base as one whole model, in LLaVA's layout.

    python -m tools.merge tiny/base half --dtype fp16           # half the bytes of fp32
    python -m tools.merge tiny/base quarter --bits 4            # LLaMA's linears in NF4
    python -m tools.merge out/stage2 whole                      # what train.py has made
    python -m tools.merge non_lora_trainables.bin whole --model_name_or_path llava-v1.5-7b
    python -m tools.merge LLaVA-7b-delta-v1-1 llava-v1 --delta llama-7b     # LLaVA v1's releases

The result is a base: train.py, eval_pope.py and the tools take it as one. The arguments of the
training notes' replace_bin.py are understood too (training/originals.py).
"""
import os
import sys

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # spinning threads stall where cores are shared
import torch

from checkpoints.deltas import load_delta
from checkpoints.load import Source, base_of, checkpoint_type, load_whole
from checkpoints.save import save_base
from support.command_line import Parser
from support.common import InputError, run_program
from support.outputs import check_output_folder
from training.originals import merge_arguments

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def main():
    parser = Parser(__doc__)
    parser.add_argument("checkpoint", metavar="CKPT",
                        help="trained checkpoint, LoRA adapter, or a base in any layout")
    parser.add_argument("output", metavar="OUT", help="folder to write; must not exist yet")
    parser.add_argument("--model_name_or_path", help="the base, where CKPT does not name it")
    parser.add_argument("--vision_tower",
                        help="CLIP's folder, where base and CKPT name none that is there")
    parser.add_argument("--delta", metavar="BASE",
                        help="CKPT is a delta, as LLaVA v1 was released: the LLaMA to add to it")
    parser.add_argument("--dtype", choices=DTYPES, help="of all weights; default: as in the files")
    parser.add_argument("--bits", type=int, choices=(4, 16),
                        help="write LLaMA's linears in 4 bits (NF4, bitsandbytes' layout), or in "
                             "all 16; default: as the files are")
    args = parser.parse_args(merge_arguments(sys.argv[1:]))
    if os.path.lexists(args.output):
        raise InputError(f"{args.output}: exists already; name a new folder")
    check_output_folder(args.output, "OUT")
    what = checkpoint_type(args.checkpoint)
    base = base_of(args.checkpoint, args.model_name_or_path)
    if args.delta and what != "base":
        raise InputError(f"{args.checkpoint}: --delta takes a whole model less its LLaMA, and this "
                         f"is what was trained ({what}); leave out --delta")
    if args.delta and args.bits:
        raise InputError("--delta with --bits: a delta is made whole first; merge it, and then the "
                         "result with --bits")
    if args.delta:
        model = load_delta(args.checkpoint, args.delta, args.vision_tower)
    else:
        model = load_whole(Source([args.checkpoint], base, args.vision_tower, args.bits))
    if args.dtype:
        model.trunk.to(DTYPES[args.dtype])
        model.head.to(DTYPES[args.dtype])
    try:
        save_base(args.output, model)
    except OSError as e:
        raise InputError(f"{args.output}: cannot be written ({e.strerror}); make room there, or "
                         "name another folder") from e
    beside = f" with {args.checkpoint}" if what != "base" else ""
    beside = f" with {args.delta}" if args.delta else beside
    bits = f", LLaMA's linears in {args.bits} bits" if args.bits else ""
    print(f"{args.output}: {base}{beside}, a base of its own{bits}")


if __name__ == "__main__":
    run_program(main)
