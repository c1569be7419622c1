"""One preference pair, from a row of JSON to its loss: each stage with shapes, numbers and source.

    python -m tools.explain                       # the tiny world in out/, before training
    python -m tools.explain out/stage2            # a trained checkpoint beside its reference
    python -m tools.explain out/stage2 --pair 7   # another of the pairs

Nothing is computed here. The pair goes once through what train.py runs (dpo.py), hooks note what
leaves the modules, and the lines named are looked up in the source. A checkpoint names its data,
its loss and its reference; a base lies beside the tiny world. Where there is neither a checkpoint
nor out/, a small world with a random model is made in a temporary folder. It takes seconds and
shows the same shapes and formulas, but that model has learnt nothing. docs/architecture.py draws
the same path.
"""
import itertools
import math
import os
import tempfile
import textwrap
from dataclasses import dataclass

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # spinning threads stall where cores are shared
import torch

from clip_vit import CLIPVisionTower
from data import (
    IMAGE_ID,
    Batch,
    Example,
    ImageProcessor,
    PackedDataset,
    Row,
    collate,
    encode_conversation,
    pack,
    read_hadpo,
)
from dpo import CHOSEN, REJECTED, Objective, mean_nll, preference_loss, sequence_logps
from llama import LlamaModel, branch_mask
from model import Head, Trunk, answer_states, set_trained
from post_decoder import Block, BlockAttention, PostInteractionBlock
from support.command_line import Parser
from support.common import InputError, Number, run_program
from tiny.places import shipped_base
from tools.explain_load import load, random_model
from tools.explain_text import (
    COLUMN,
    NARROW,
    WIDTH,
    answer_tokens,
    four_digits,
    line_with_place,
    mask_picture,
    paragraph,
    place_of,
    shaded,
    shown_tokens,
    side_by_side,
    tensor_line,
)

# ---- One pair ------------------------------------------------------------------------------------


@dataclass
class Passage:
    """One pair, and what became of it."""
    example: Example
    row: Row
    pieces: list            # the row's tokens, as text
    batch: Batch            # of this row alone
    objective: Objective    # with the pair's gradient
    metrics: dict
    seen: dict              # {module: (inputs, output)}


def explain(objective, dataset, i):
    """Example i of a PackedDataset on its way through an Objective → lines of text."""
    row, parameter = dataset.row(i), next(objective.parameters())
    batch = dataset[[i]].to(parameter.device, parameter.dtype)
    name_of = dataset.format.tokenizer.model.id_to_piece
    pieces = ["<image>" if t == IMAGE_ID else name_of(t).replace("\n", "\\n")
              for t in row.input_ids]
    (loss, metrics), seen = watch(objective.modules(), lambda: objective(batch))
    loss.backward()
    metrics = {name: float(value) for name, value in metrics.items()}
    passage = Passage(dataset.examples[i], row, pieces, batch, objective, metrics, seen)
    for stage in (show_text, show_tokens, show_mask, show_trunk, show_block, show_logps, show_loss,
                  show_gradient):
        yield ""
        yield from stage(passage)


def watch(modules, run):
    """run() → its result, and {module: (inputs, output)} of the first call of each module."""
    seen = {}

    def note(module, inputs, output):
        seen.setdefault(module, (inputs, output))

    hooks = [module.register_forward_hook(note) for module in modules]
    result = run()
    for hook in hooks:
        hook.remove()
    return result, seen


# ---- The stages ----------------------------------------------------------------------------------


def show_text(passage):
    (question, chosen), (_, rejected) = (turns[0] for turns in passage.example.conversations)
    yield line_with_place("1  A ROW OF HA-DPO'S FILE", f"{place_of(read_hadpo)} read_hadpo")
    yield f"   image     {passage.example.image}"
    for name, text in ("question", question), ("chosen", chosen), ("rejected", rejected):
        for n, part in enumerate(textwrap.wrap(text.replace("\n", "\\n"), WIDTH - 13)):
            yield f"   {'' if n else name:<10}{part}"


def show_tokens(passage):
    row, pieces = passage.row, passage.pieces
    prefix = sum(branch <= 0 for branch in row.branch)
    yield line_with_place("2  TOKENS: what both answers share stands in the row once",
                          f"{place_of(encode_conversation)} encode_conversation")
    yield line_with_place(f"   branch 0, the prefix: tokens 0 to {prefix - 1}, positions alike, "
                          "no labels", f"{place_of(pack)} pack")
    words = []
    for piece, same in itertools.groupby(pieces[:prefix]):
        times = len(list(same))
        piece = f"{piece[:16]}…{piece[-11:]}" if len(piece) > 40 else piece
        words.append(f"{piece} × {times}" if times > 1 else piece)
    yield from (f"      {part}" for part in textwrap.wrap(" ".join(words), WIDTH - 6))
    columns = []
    for number, name in (CHOSEN, "chosen"), (REJECTED, "rejected"):
        place, source = ("at", "from") if NARROW else ("position", "predicted by")
        column = [f"branch {number}, {name}", f"token  {place:>4}  piece       label  {source}"]
        for t, k in answer_tokens(row, number):
            column.append(f"{t:>5}  {row.position[t]:>{max(4, len(place))}}  {pieces[t]:<11}"
                          f"{row.target[k]:>6}  {row.source[k]:>{len(source)}}")
        columns.append(column)
    yield from side_by_side(*columns)
    yield from paragraph(f"   Both answers begin at position {prefix}, and token {prefix - 1} "
                         "predicts the first word of both.")


def show_mask(passage):
    shown, pieces = shown_tokens(passage.row), passage.pieces
    position, branch = passage.batch.position[:, shown], passage.batch.branch[:, shown]
    allowed = branch_mask(position, branch, position, branch)[0, 0]                         # (n, n)
    drawn = mask_picture(allowed, branch[0].tolist())
    yield line_with_place("3  WHO SEES WHOM: what is not later, and in the prefix or in one's own "
                          "branch", f"{place_of(branch_mask)} branch_mask")
    for t, cells in zip(shown, drawn, strict=True):
        yield f"   {t:>4} {pieces[t][:15]:<16}{cells}"
    yield f"   {len(shown)} of {len(pieces)} tokens: the others would be more of the same"


def show_trunk(passage):
    trunk, pixels, seen = passage.objective.trunk, passage.batch.pixel_values, passage.seen
    vision, layers = trunk.config.vision, len(trunk.model.layers)
    yield line_with_place("4  THE TRUNK, frozen", f"{place_of(Trunk.forward)} Trunk.forward")
    yield tensor_line("pixel values", pixels, f"{pixels.min():.2f} to {pixels.max():.2f}, "
                      "normalised as for CLIP", place_of(ImageProcessor))
    size = f"{vision.patch_size} × {vision.patch_size}"
    yield tensor_line("CLIP's features F", seen[trunk.vision_tower][1], "one for each patch of "
                      f"{size} pixels, layer {trunk.config.select_layer}",
                      place_of(CLIPVisionTower.forward))
    marks = (passage.batch.input_ids == IMAGE_ID).sum()
    yield tensor_line("projected", seen[trunk.model.mm_projector][1], "in the places of the "
                      f"{marks} <image> tokens", place_of(Trunk.embed))
    inputs, hidden_states = seen[trunk.model]
    yield tensor_line("embeddings", inputs[0], f"{len(passage.pieces)} tokens, padded to a "
                      "multiple of 8", place_of(collate))
    yield tensor_line("hidden states", hidden_states, f"behind {layers} layers and the last norm",
                      place_of(LlamaModel.forward))
    inputs, _ = seen[passage.objective.head]
    yield tensor_line("h", inputs[0], "of them those that predict an answer token",
                      place_of(answer_states))


def show_block(passage):
    module = passage.objective.head.post_interaction_block
    if module is None:
        yield "5  NO POST-INTERACTION BLOCK: h goes to lm_head as it is"
        return
    (h, context, *_), out = passage.seen[module]                       # (answer tokens, hidden)
    parameters = sum(x.numel() for x in module.parameters())
    yield line_with_place(f"5  THE POST-INTERACTION BLOCK, {parameters:,} numbers",
                          f"{place_of(PostInteractionBlock)} PostInteractionBlock")

    # Which submodule's output each equation adds, by the last part of the submodule's name.
    whole = PostInteractionBlock
    equations = {"image_norm": ("eq. 1  f = LayerNorm(align(F))", "f", whole),
                 "cross_attn": ("eq. 2  a = h + Attention(LN1(h), f)", "a − h", Block),
                 "self_attn": ("eq. 2  a = h + Attention(LN1(h), LN1(H))", "a − h", Block),
                 "mlp": ("eq. 3  b = a + W2 SiLU(W1 LN2(a))", "b − a", Block)}
    if module.config.attention == "none":
        equations["mlp"] = "eq. 3  b = h + W2 SiLU(W1 LN1(h))", "b − h", Block
    rows = []
    for name, part in module.named_modules():
        last = name.rpartition(".")[2]
        if last in equations:
            rows.append((*equations[last], passage.seen[part][1]))
    residual = " + h" if module.config.outer_residual else ""
    rows.append((f"eq. 4  out = b{residual}", "out − h", whole, out - h))
    for equation, name, where, x in rows:
        largest = four_digits(x.detach().abs().max())
        size = f"|{name}| ≤ {largest}" if NARROW else f"largest |{name}| {largest}"
        shape = str(tuple(x.shape)).ljust(12 if NARROW else 15)
        yield line_with_place(f"   {equation:<41}{shape} {size}",
                              place_of(where, f"# {equation[:5]}"))
    if module.is_identity():
        yield from paragraph("   The identity, because out_proj and fc2 start at zero: policy = "
                             "reference, and this is step 0.")
    if module.config.attention == "cross":
        weights = module.attention_weights(h[None, :1], context)[0, :, 0].mean(0)
        weights = weights[:passage.objective.trunk.config.vision.num_patches]          # (P,)
        side = math.isqrt(len(weights))
        drawn = side * max(1, 12 // side)
        yield line_with_place("   The image, and where eq. 2 looks for the first answer token: "
                              f"{100 * weights.min():.1f} to {100 * weights.max():.1f} % a patch",
                              place_of(BlockAttention.weights))
        image = shaded(passage.batch.pixel_values[0].mean(0), drawn)
        looks = shaded(weights.view(side, side), drawn)
        yield from (f"   │{left}│    │{right}│" for left, right in zip(image, looks, strict=True))


def show_logps(passage):
    objective, row, pieces = passage.objective, passage.row, passage.pieces
    states, logits = passage.seen[objective.head]
    yield line_with_place("6  LOG-PROBABILITIES, in nats",
                          f"{place_of(Objective.logps)} Objective.logps")
    yield tensor_line("logits", logits, "lm_head, for answer tokens only", place_of(Head.forward))
    with torch.no_grad():
        policy = objective.logps(objective.head, states[:3], passage.batch)                 # (1, A)
        reference = objective.logps(objective.reference, states[:3], passage.batch)
        branches = passage.batch.target_branch
        sums = [sequence_logps(x, branches)[0] for x in (policy, reference)]                # (2,)
    columns = []
    for number, name in (CHOSEN, "chosen"), (REJECTED, "rejected"):
        column = [f"{name:<14}{'log π':>10}{'log π_ref':>13}"]
        for t, k in answer_tokens(row, number):
            ours, theirs = four_digits(policy[0, k]), four_digits(reference[0, k])
            column.append(f"{pieces[t]:<14}{ours:>10}{theirs:>13}")
        columns.append(column)
    yield from side_by_side(*columns)
    chosen, rejected = (f"{'sum':<14}{four_digits(ours):>10}{four_digits(theirs):>13}"
                        for ours, theirs in zip(*sums, strict=True))
    yield line_with_place(f"   {chosen:<{COLUMN}}{rejected}", place_of(sequence_logps))


def show_loss(passage):
    loss, metrics = passage.objective.loss, passage.metrics
    equation, code, source = {
        "dpo": ("−log σ(margin)", "F.logsigmoid(margin)", "DPO, eq. 7"),
        "ipo": ("(margin / β − 1 / 2β)²", "1 / (2 * beta)) **", "IPO, eq. 17"),
        "hinge": ("max(0, 1 − margin)", "F.relu(1 - margin)", "SLiC")}[loss.name]
    if loss.label_smoothing:
        equation = f"{100 * loss.label_smoothing:g} % of the labels are taken to be wrong"
        source = "conservative DPO, eq. 3"
    preference = metrics["loss"] - loss.sft_weight * metrics["nll"]
    if abs(preference - math.log(2)) < 1e-6:
        source += " = ln 2"
    reward = f"β (log π − log π_ref), β = {loss.beta:g}"
    reward_place = place_of(preference_loss, "rewards = beta")
    rows = [("reward, chosen", reward, "rewards/chosen", "DPO, below eq. 5", reward_place),
            ("reward, rejected", "the same of the rejected answer", "rewards/rejected", "",
             reward_place),
            ("margin", "chosen − rejected", "rewards/margin", "",
             place_of(preference_loss, "margin = rewards")),
            (loss.name, equation, None, source, place_of(preference_loss, code)),
            ("NLL", "mean of −log π over the chosen tokens", "nll", "", place_of(mean_nll)),
            ("loss", f"{loss.name} + {loss.sft_weight:g} · NLL", "loss", "",
             place_of(Objective, "self.loss.sft_weight * nll"))]
    yield line_with_place("7  THE LOSS", f"{place_of(preference_loss)} preference_loss")
    for name, formula, metric, source, place in rows:
        value = four_digits(metrics[metric] if metric else preference)
        line = f"   {name:<18}{formula:<42}{value:>9}"
        if NARROW and source:
            source, place = "", f"{source}   {place}"
        yield line_with_place(f"{line}   {source}".rstrip(), place)


def show_gradient(passage):
    norms = {name: float(x.grad.norm())
             for name, x in passage.objective.head.named_parameters() if x.grad is not None}
    moved = sorted((name for name in norms if norms[name]), key=norms.get, reverse=True)
    yield line_with_place("8  THE GRADIENT of this pair", f"{place_of(set_trained)} set_trained")
    yield from (f"   {name:<60}{norms[name]:9.4f}" for name in moved[:4])
    if len(moved) > 4:
        yield f"   {f'{len(moved) - 4} others':<60}{'less':>9}"
    still = len(norms) - len(moved)
    if still:
        rest = f"   {f'{still} others':<60}{0:9.4f}"
        yield f"{rest}{chr(10) if NARROW else ''}   what multiplies them is still zero"


# ---- Command line --------------------------------------------------------------------------------


def main():
    parser = Parser(__doc__)
    parser.add_argument("checkpoint", nargs="?", metavar="CKPT",
                        help="trained checkpoint or base; default: the tiny world's base")
    parser.add_argument("--pair", type=Number("--pair", int, low=0), default=0,
                        help="which of the pairs that the base answered wrong")
    args = parser.parse_args()
    path = args.checkpoint
    there = os.path.isfile("out/world/hadpo/pope_data.json")
    if not path and there:
        path = "out/base" if os.path.isdir("out/base") else shipped_base()
    with tempfile.TemporaryDirectory() as folder:
        if path:
            objective, model, examples = load(path)
        else:
            print(textwrap.fill("no tiny world in out/ (train.py makes it): drawing a small one, "
                                "with a random model, in a temporary folder", WIDTH))
            objective, model, examples = random_model(os.path.join(folder, "world"))
        if not 0 <= args.pair < len(examples):
            raise InputError(f"--pair {args.pair}: the data hold {len(examples)} pairs, counted "
                             "from 0")
        dataset = PackedDataset(examples, model.row_format())
        print(f"pair {args.pair} of the {len(examples):,} that the base answered wrong, through "
              f"{path or 'a random model'}")
        for line in explain(objective, dataset, args.pair):
            print(line)


if __name__ == "__main__":
    run_program(main)
