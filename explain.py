"""One preference pair on its way from a row of JSON to a loss: every stage with its shapes, its numbers and its line.

    python model.py --explain                       # the tiny world in out/ and an untrained block: step 0 of stage 1
    python model.py --explain out/stage2            # a trained checkpoint beside the reference that it was trained against
    python model.py --explain out/stage2 --pair 7   # another of the pairs that the base answered wrong

Nothing here computes: the pair goes once through what train.py runs (objective.py), hooks note what leaves the modules, and
the lines named are looked up in the source. A checkpoint names its data, loss and reference; a base lies beside the tiny
world. Where there is neither checkpoint nor out/, a small world with a random model is made in a temporary folder: the
same shapes and formulas, in seconds, and nothing learnt. The figure of the same path: docs/architecture.py.
"""
import argparse
import copy
import inspect
import itertools
import math
import os
import tempfile
import textwrap
from dataclasses import dataclass

os.environ.setdefault("OMP_WAIT_POLICY", "passive")     # spinning threads stall for seconds where cores are shared
import torch
import torch.nn.functional as F

import shapes
from checkpoint import kind, read_config
from clip_vit import CLIPVisionTower
from data import IMAGE_ID, Batch, ImageProcessor, PackedDataset, Row, Tokenizer, collate, encode_conversation, pack
from dpo import CHOSEN, REJECTED, dpo_loss, mean_nll, sequence_logps
from eval_pope import load_all
from llama import LlamaModel, branch_mask
from model import Head, Trunk, answer_states, device_and_dtype
from objective import Objective, set_trained
from post_decoder import Block, BlockAttention, PostInteractionBlock
from readers import Example, InputError, read_hadpo, read_json, run_program
from tiny import TINY_LLAVA

WIDTH = 110
SHADES = " ░▒▓█"
TINY = "out/base"           # what is explained when nothing is named
MOST = 11, 3                # first and last tokens of a long answer that are printed


# ---------------------------------------------------------------------------------------------------------------------
# What is explained


def load(path):
    """A trained checkpoint or a base → Objective, tokenizer, preprocess, examples; data, loss and reference as in its run."""
    what = kind(path)
    if what not in ("trained", "base"):
        raise InputError(f"{path}: neither a base nor a checkpoint of train.py's stages; --explain needs one that names its data")
    run = read_config(path).get("arguments", {}) if what == "trained" else {}
    before = [run["init"]] if run.get("init", "identity") != "identity" else []
    named = argparse.Namespace(checkpoints=[*before, path], model_name_or_path=None, vision_tower=None)
    trunk, heads, tokenizer, preprocess = load_all(named, *device_and_dtype())
    *_, reference, head = [None, *heads.values()]
    world = os.path.join(os.path.dirname(path.rstrip("/")), "world")
    paths = [run.get(name) or path for name, path in zip(("desc_data_path", "pope_data_path", "vg_path"), hadpo_paths(world))]
    loss = {name: run[name] for name in ("loss", "beta", "sft_weight", "label_smoothing") if run.get(name) not in (None, "sft")}
    objective = objective_of(trunk, head, reference, run.get("tune", ("post_decoder",)), **loss)
    return objective, tokenizer, preprocess, read_hadpo(*paths)


def hadpo_paths(world):
    return [os.path.join(world, *parts) for parts in (("hadpo", "desc_data.json"), ("hadpo", "pope_data.json"), ("VG",))]


def random_model(folder):
    """A small tiny world in `folder` and a model that was never trained, as `load`. Its "answers" are a yes to everything."""
    shapes.make_world(folder, 42, shapes.Sizes(sft=96, preference=24, validation=8, evaluation=8), progress=False)
    said = {}
    for image in read_json(os.path.join(folder, "preference.json")):
        said |= {(image["image_id"], q["question"]): shapes.answer(q["word"], True) for q in image["questions"]}
        said[image["image_id"], image.get("describe")] = ""
    shapes.write_preferences(folder, said)
    tokenizer, config = Tokenizer(os.path.join(folder, "tokenizer.model")), copy.deepcopy(TINY_LLAVA)
    config.text.vocab_size = len(tokenizer)
    torch.manual_seed(42)
    objective = objective_of(Trunk(config), Head(config), None, ("post_decoder",))
    return objective, tokenizer, ImageProcessor(config.vision.image_size), read_hadpo(*hadpo_paths(folder))


def objective_of(trunk, head, reference, tune, loss="dpo", **settings):
    """What train.py wraps for DeepSpeed. Without a reference, training begins here: a head without a block gets a fresh one."""
    head = copy.deepcopy(head)
    if reference is None and not head.block:
        torch.manual_seed(42)
        parameter = head.lm_head.weight
        head.post_interaction_block = PostInteractionBlock(trunk.config.block()).to(parameter.device, parameter.dtype)
    set_trained(trunk, head, tune)
    objective = Objective(trunk, head, loss, **settings)
    if reference is not None:
        objective.reference = reference
    return objective


# ---------------------------------------------------------------------------------------------------------------------
# How it is printed


def at(thing, text=None):
    """`file.py:line` of a function or class, or of the first line in it that holds `text`."""
    lines, first = inspect.getsourcelines(thing)
    offset = next(n for n, code in enumerate(lines) if text in code) if text else 0
    return f"{os.path.basename(inspect.getsourcefile(thing))}:{first + offset}"


def line(text="", place=""):
    """Text, and at the right margin the place in the source."""
    return f"{text.ljust(WIDTH - 1 - len(place))} {place}".rstrip()


def four(x):
    """A number with four digits behind the point, none of them -0.0000."""
    return f"{round(float(x), 4) + 0.0:.4f}"


def tensor(name, x, said, place=""):
    return line(f"   {name:<19}{str(tuple(x.shape)):<16}{said}", place)


def abridged(indices, first, last):
    """A run of indices, the middle of a long one left out."""
    indices = list(indices)
    return indices if len(indices) <= first + last else indices[:first] + indices[-last:]


def shown_tokens(row):
    """Which tokens of a row the picture of its mask shows: some of the prefix, most of each branch."""
    image = [t for t, i in enumerate(row.input_ids) if i == IMAGE_ID]
    text = [t for t in range(row.branch.count(0)) if t not in image]
    branches = [[t for t, b in enumerate(row.branch) if b == n] for n in (CHOSEN, REJECTED)]
    return sorted(abridged(image, 2, 1) + abridged(text, 1, 3)) + [t for branch in branches for t in abridged(branch, *MOST)]


def mask_picture(mask, groups):
    """A mask (n, n) as n lines, ■ = may attend; a gap where the next column belongs to another of the groups (n)."""
    gaps = ["  " if j and groups[j] != groups[j - 1] else "" for j in range(len(groups))]
    return ["".join(gap + ("■ " if seen else "· ") for gap, seen in zip(gaps, row)).rstrip() for row in mask.tolist()]


def shaded(x, side):
    """A square of numbers as side lines of 2 · side characters, the smallest blank, the largest black."""
    x = F.interpolate(x[None, None].float(), (side, side), mode="area")[0, 0]
    levels = (len(SHADES) * (x - x.min()) / (x.max() - x.min()).clamp(min=1e-12)).long().clamp(max=len(SHADES) - 1)
    return ["".join(2 * SHADES[level] for level in row) for row in levels.tolist()]


def answer_tokens(row, number):
    """[(token, which answer token of the row it is), ...] of a branch."""
    tokens = [t for t, branch in enumerate(row.branch) if branch == number]
    return list(zip(tokens, [k for k, branch in enumerate(row.target_branch) if branch == number]))


def side_by_side(left, right):
    """Two columns of lines of any lengths, the middle of long ones left out."""
    pairs = list(itertools.zip_longest(left, right, fillvalue=""))
    for n in (kept := abridged(range(len(pairs)), *MOST)):
        if n and n - 1 not in kept:
            yield f"   {'…':<54}…"
        yield f"   {pairs[n][0]:<54}{pairs[n][1]}".rstrip()


def watch(modules, run):
    """run() → its result, and {module: (inputs, output)} of the first time that each module was called."""
    seen = {}

    def note(module, inputs, output):
        seen.setdefault(module, (inputs, output))

    hooks = [module.register_forward_hook(note) for module in modules]
    result = run()
    for hook in hooks:
        hook.remove()
    return result, seen


# ---------------------------------------------------------------------------------------------------------------------
# The stages


@dataclass
class Passage:
    """One pair, and what became of it."""
    example: Example
    row: Row
    pieces: list            # of the row's tokens, as text
    batch: Batch            # of this row alone
    objective: Objective    # with the pair's gradient
    metrics: dict
    seen: dict              # {module: (inputs, output)}


def explain(objective, dataset, i):
    """Example i of a PackedDataset on its way through an Objective → lines of text."""
    row, parameter = dataset.row(i), next(objective.parameters())
    batch = dataset[[i]].to(parameter.device, parameter.dtype)
    pieces = ["<image>" if t == IMAGE_ID else dataset.tokenizer.model.id_to_piece(t).replace("\n", "\\n") for t in row.input_ids]
    (loss, metrics), seen = watch(objective.modules(), lambda: objective(batch))
    loss.backward()
    passage = Passage(dataset.examples[i], row, pieces, batch, objective, {k: float(v) for k, v in metrics.items()}, seen)
    for stage in (text, tokens, mask, frozen_trunk, block, log_probabilities, losses, gradients):
        yield ""
        yield from stage(passage)


def text(p):
    (question, chosen), (_, rejected) = (turns[0] for turns in p.example.conversations)
    yield line("1  A ROW OF HA-DPO'S FILE", f"{at(read_hadpo)} read_hadpo")
    yield f"   image     {p.example.image}"
    for name, said in ("question", question), ("chosen", chosen), ("rejected", rejected):
        for n, part in enumerate(textwrap.wrap(said.replace("\n", "\\n"), WIDTH - 13)):
            yield f"   {'' if n else name:<10}{part}"


def tokens(p):
    row, prefix = p.row, p.row.branch.count(0)
    yield line("2  TOKENS: what both answers share stands in the row once", f"{at(encode_conversation)} encode_conversation")
    yield line(f"   branch 0, the prefix: tokens 0 to {prefix - 1}, positions alike, no labels", f"{at(pack)} pack")
    runs = [(piece, len(list(same))) for piece, same in itertools.groupby(p.pieces[:prefix])]
    runs = [(f"{piece[:16]}…{piece[-11:]}" if len(piece) > 40 else piece, n) for piece, n in runs]
    said = " ".join(f"{piece} × {n}" if n > 1 else piece for piece, n in runs)
    yield from (f"      {part}" for part in textwrap.wrap(said, WIDTH - 6))
    columns = []
    for number, name in (CHOSEN, "chosen"), (REJECTED, "rejected"):
        columns.append([f"branch {number}, {name}", "token  position  piece       label  predicted by"])
        columns[-1] += [f"{t:>5}  {row.position[t]:>8}  {p.pieces[t]:<11}{row.target[k]:>6}  {row.source[k]:>12}"
                        for t, k in answer_tokens(row, number)]
    yield from side_by_side(*columns)
    yield f"   Both answers begin at position {prefix}, and token {prefix - 1} predicts the first word of both."


def mask(p):
    shown = shown_tokens(p.row)
    position, branch = p.batch.position[:, shown], p.batch.branch[:, shown]
    picture = mask_picture(branch_mask(position, branch, position, branch)[0, 0], branch[0].tolist())
    yield line("3  WHO SEES WHOM: what is not later, and in the prefix or in one's own branch", f"{at(branch_mask)} branch_mask")
    yield from (f"   {t:>4} {p.pieces[t][:15]:<16}{drawn}" for t, drawn in zip(shown, picture))
    yield f"   {len(shown)} of {len(p.pieces)} tokens: the others would be more of the same"


def frozen_trunk(p):
    trunk, pixels, seen = p.objective.trunk, p.batch.pixel_values, p.seen
    vision, patches = trunk.config.vision, trunk.config.vision.num_patches
    yield line("4  THE TRUNK, frozen", f"{at(Trunk.forward)} Trunk.forward")
    yield tensor("pixel values", pixels, f"{pixels.min():.2f} to {pixels.max():.2f}, normalised as for CLIP", at(ImageProcessor))
    yield tensor("CLIP's features F", seen[trunk.vision_tower][1], f"one for each patch of {vision.patch_size} × "
                 f"{vision.patch_size} pixels, layer {trunk.config.select_layer}", at(CLIPVisionTower.forward))
    yield tensor("projected", seen[trunk.model.mm_projector][1], f"in the places of the {patches} <image> tokens", at(Trunk.embed))
    yield tensor("embeddings", seen[trunk.model][0][0], f"{len(p.pieces)} tokens, padded to a multiple of 8", at(collate))
    yield tensor("hidden states", seen[trunk.model][1], f"behind {len(trunk.model.layers)} layers and the last norm",
                 at(LlamaModel.forward))
    yield tensor("h", seen[p.objective.head][0][0], "of them those that predict an answer token", at(answer_states))


def block(p):
    module = p.objective.head.post_interaction_block
    if module is None:
        yield "5  NO POST-INTERACTION BLOCK: h goes to lm_head as it is"
        return
    (h, context, *_), out = p.seen[module]
    yield line(f"5  THE POST-INTERACTION BLOCK, {sum(x.numel() for x in module.parameters()):,} numbers",
               f"{at(PostInteractionBlock)} PostInteractionBlock")

    equations = {"image_norm": ("eq. 1  f = LayerNorm(align(F))", "f", PostInteractionBlock),
                 "cross_attn": ("eq. 2  a = h + Attention(LN1(h), f)", "a − h", Block),
                 "self_attn": ("eq. 2  a = h + Attention(LN1(h), LN1(H))", "a − h", Block),
                 "mlp": ("eq. 3  b = a + W2 SiLU(W1 LN2(a))", "b − a", Block)}
    if module.config.attention == "none":
        equations["mlp"] = "eq. 3  b = h + W2 SiLU(W1 LN1(h))", "b − h", Block
    parts = [(*equations[end], p.seen[part][1]) for name, part in module.named_modules()
             if (end := name.rpartition(".")[2]) in equations]
    whole = "eq. 4  out = b" + " + h" * module.config.outer_residual, "out − h", PostInteractionBlock, out - h
    for equation, name, where, x in (*parts, whole):
        size = f"largest |{name}| {four(x.detach().abs().max())}"
        yield line(f"   {equation:<41}{str(tuple(x.shape)):<16}{size}", at(where, f"# {equation[:5]}"))
    if module.is_identity():
        yield "   The identity, because out_proj and fc2 start at zero: policy = reference, and this is step 0."
    if module.config.attention == "cross":
        weights = module.attention_weights(h[:, :1], context)[0, :, 0].mean(0)              # (P,)
        side = math.isqrt(len(weights))
        drawn = side * max(1, 12 // side)
        yield line(f"   The image, and where eq. 2 looks for the first answer token: {100 * weights.min():.1f} to "
                   f"{100 * weights.max():.1f} % a patch", at(BlockAttention.weights))
        pictures = shaded(p.batch.pixel_values[0].mean(0), drawn), shaded(weights.view(side, side), drawn)
        yield from (f"   │{image}│    │{looks}│" for image, looks in zip(*pictures))


def log_probabilities(p):
    states, logits = p.seen[p.objective.head]
    yield line("6  LOG-PROBABILITIES, in nats", f"{at(Objective.logps)} Objective.logps")
    yield tensor("logits", logits, "lm_head, for answer tokens only", at(Head.forward))
    with torch.no_grad():
        policy, reference = (p.objective.logps(head, states[:3], p.batch) for head in (p.objective.head, p.objective.reference))
        sums = zip(*(sequence_logps(x, p.batch.target_branch)[0] for x in (policy, reference)))
    columns = []
    for number, name in (CHOSEN, "chosen"), (REJECTED, "rejected"):
        columns.append([f"{name:<14}{'log π':>10}{'log π_ref':>13}"])
        columns[-1] += [f"{p.pieces[t]:<14}{four(policy[0, k]):>10}{four(reference[0, k]):>13}"
                        for t, k in answer_tokens(p.row, number)]
    yield from side_by_side(*columns)
    chosen, rejected = (f"{'sum':<14}{four(ours):>10}{four(theirs):>13}" for ours, theirs in sums)
    yield line(f"   {chosen:<54}{rejected}", at(sequence_logps))


def losses(p):
    o, m = p.objective, p.metrics
    equation, code, source = {"dpo": ("−log σ(margin)", "F.logsigmoid(margin)", "DPO, eq. 7"),
                              "ipo": ("(margin / β − 1 / 2β)²", "1 / (2 * beta)) **", "IPO, eq. 17"),
                              "hinge": ("max(0, 1 − margin)", "F.relu(1 - margin)", "SLiC")}[o.loss]
    if o.label_smoothing:
        equation, source = f"{100 * o.label_smoothing:g} % of the labels are taken to be wrong", "conservative DPO, eq. 3"
    preference = m["loss"] - o.sft_weight * m["nll"]
    source += " = ln 2" if abs(preference - math.log(2)) < 1e-6 else ""
    rows = [("reward, chosen", f"β (log π − log π_ref), β = {o.beta:g}", m["rewards/chosen"], "DPO, below eq. 5", dpo_loss,
             "chosen_rewards ="),
            ("reward, rejected", "the same of the rejected answer", m["rewards/rejected"], "", dpo_loss, "rejected_rewards ="),
            ("margin", "chosen − rejected", m["rewards/margin"], "", dpo_loss, "margin = chosen_rewards"),
            (o.loss, equation, preference, source, dpo_loss, code),
            ("NLL", "mean of −log π over the chosen tokens", m["nll"], "", mean_nll, None),
            ("loss", f"{o.loss} + {o.sft_weight:g} · NLL", m["loss"], "", Objective, "self.sft_weight * nll")]
    yield line("7  THE LOSS", f"{at(dpo_loss)} dpo_loss")
    yield from (line(f"   {name:<18}{equation:<42}{four(value):>9}   {source}", at(where, code))
                for name, equation, value, source, where, code in rows)


def gradients(p):
    norms = {name: float(x.grad.norm()) for name, x in p.objective.head.named_parameters() if x.grad is not None}
    moved = sorted((name for name in norms if norms[name]), key=norms.get, reverse=True)
    yield line("8  THE GRADIENT of this pair", f"{at(set_trained)} set_trained")
    yield from (f"   {name:<60}{norms[name]:9.4f}" for name in moved[:4])
    if len(moved) > 4:
        yield f"   {f'{len(moved) - 4} others':<60}{'less':>9}"
    if still := len(norms) - len(moved):
        yield f"   {f'{still} others':<60}{0:9.4f}   what multiplies them is still zero"


# ---------------------------------------------------------------------------------------------------------------------
# Command line


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], prog="model.py --explain")
    parser.add_argument("--explain", action="store_true", help=argparse.SUPPRESS)       # what brought us here (model.py)
    parser.add_argument("checkpoint", nargs="?", metavar="CKPT", help="trained checkpoint or base; default: the tiny world's base")
    parser.add_argument("--pair", type=int, default=0, help="which of the pairs that the base answered wrong; default 0")
    args = parser.parse_args()
    path = args.checkpoint or (TINY if os.path.isfile("out/world/hadpo/pope_data.json") and os.path.isdir(TINY) else None)
    with tempfile.TemporaryDirectory() as folder:
        if path is None:
            print("no tiny world in out/ (train.py makes it): drawing a small one, with a random model, in a temporary folder")
        objective, tokenizer, preprocess, examples = load(path) if path else random_model(os.path.join(folder, "world"))
        if not 0 <= args.pair < len(examples):
            raise InputError(f"--pair {args.pair}: the data hold {len(examples)} pairs, counted from 0")
        config = objective.trunk.config
        dataset = PackedDataset(examples, tokenizer, preprocess, config.vision.num_patches, config.max_length)
        print(f"pair {args.pair} of the {len(examples):,} that the base answered wrong, through {path or 'a random model'}")
        for said in explain(objective, dataset, args.pair):
            print(said)


if __name__ == "__main__":
    run_program(main)
