"""The rows of the experiment in effect.py: what is compared, as flags of train.py.

A row is a run of train.py on the tiny world. All take the same number of optimizer steps, STEPS,
unless `steps` says otherwise; each has its own learning rate out of LADDER, the one that answers
best about the validation images of seeds 42 and 43. The row `reference` is what the others are
compared with: the block alone, DPO and the NLL of the chosen answer in equal parts, all questions,
repaired descriptions. A run without files weighs the NLL ten times (`default1`, `default2`).
"""
import os
from dataclasses import dataclass

from bench.measuring import read_rows

REFERENCE = "reference"
STEPS = 1632                    # six epochs of 34,800 pairs, 128 at once
LADDER = 3e-4, 1e-3, 3e-3
VALIDATION_SEEDS = 42, 43       # for the choice of rates; settings were tuned on them before
SEEDS = tuple(range(46, 62))    # 16 that no choice has seen, for rows that carry a claim
FEW = tuple(range(62, 68))      # six more, for the others and what they are compared with


@dataclass(frozen=True)
class Row:
    """One row. `flags`, `first` and `teacher` are train.py's, `pairs` those of tiny.prepare."""
    question: str               # which question it belongs to
    title: str
    flags: str
    claim: bool = False         # SEEDS instead of FEW
    steps: float = 1.0          # of STEPS, of each run
    first: str = None           # a run before, which this one starts from
    teacher: str = None         # a run before, whose answers are the chosen ones
    pairs: str = ""             # other preference pairs than the default's
    second_round: bool = False  # the pairs are mined from what `first` says, instead of the base
    projector: int = 0          # another base: the inner width of its projector, 0 = 8
    rate: float = 0             # a learning rate that is no choice, 0 = the best of LADDER
    image: str = ""             # "test" or "always": the block sees another image's features


BOTH = "--sft_weight 1"                 # DPO + NLL in equal parts
OLD = "--described true --every 8"      # few descriptions, in other words than the base's
AS_TOLD = "--described true"            # of a teacher: its own words
SFT = "--loss sft"
ROWS = {
    REFERENCE: Row("loss", "DPO + NLL", f"--stage 1 {BOTH}", claim=True),
    "sft": Row("loss", "SFT on the chosen answers", f"--stage 1 {SFT}", claim=True),
    "default1": Row("loss", "DPO + 10 × NLL (the default, stage 1)", "--stage 1 --sft_weight 10",
                    claim=True, rate=2e-3),
    "nll30": Row("loss", "DPO + 30 × NLL", "--stage 1 --sft_weight 30", claim=True, rate=3e-3),
    "dpo": Row("loss", "DPO alone", "--stage 1 --sft_weight 0", claim=True),
    "ipo": Row("loss", "IPO + NLL", f"--stage 1 {BOTH} --loss ipo"),
    "length": Row("loss", "length-normalised DPO (beta 1) + NLL",
                  f"--stage 1 {BOTH} --length_normalised --beta 1"),
    "sft_then_both": Row("loss", "SFT, then DPO + NLL, half the steps each", f"--stage 1 {BOTH}",
                         steps=0.5, first=f"--stage 1 {SFT}"),
    "sft_then_dpo": Row("loss", "SFT, then DPO alone, half the steps each",
                        "--stage 1 --sft_weight 0", steps=0.5, first=f"--stage 1 {SFT}"),

    "old": Row("data", "true descriptions of every 8th image", f"--stage 1 {BOTH}", claim=True,
               pairs=OLD),
    "old_sft": Row("data", "true descriptions of every 8th image, SFT", f"--stage 1 {SFT}",
                   pairs=OLD),
    "true": Row("data", "true descriptions of every image", f"--stage 1 {BOTH}",
                pairs="--described true"),
    "deleted": Row("data", "wrong objects deleted from every description", f"--stage 1 {BOTH}",
                   pairs="--described deleted"),
    "none": Row("data", "no descriptions", f"--stage 1 {BOTH}", pairs="--described none"),
    "wrong": Row("data", "only what the base got wrong", f"--stage 1 {BOTH} --no-keep_correct"),
    "wrong_dpo": Row("data", "only what the base got wrong, DPO alone",
                     "--stage 1 --no-keep_correct --sft_weight 0"),
    "flip20": Row("data", "20 % of the labels flipped", f"--stage 1 {BOTH}", claim=True,
                  pairs="--flipped 0.2"),
    "flip20_sft": Row("data", "20 % of the labels flipped, SFT", f"--stage 1 {SFT}", claim=True,
                      pairs="--flipped 0.2"),
    "any": Row("data", "absent objects asked about: any", f"--stage 1 {BOTH}",
               pairs="--questions any"),
    "any_sft": Row("data", "absent objects asked about: any, SFT", f"--stage 1 {SFT}",
                   pairs="--questions any"),
    "held_out": Row("data", "4 classes in no pair", f"--stage 1 {BOTH}", pairs="--held_out 4"),
    "held_out_sft": Row("data", "4 classes in no pair, SFT", f"--stage 1 {SFT}",
                        pairs="--held_out 4"),

    "nothing": Row("what the block sees", "nothing", f"--stage 1 {BOTH} --block no_cross_attn",
                   claim=True),
    "widened": Row("what the block sees", "nothing, as many parameters",
                   f"--stage 1 {BOTH} --block no_cross_attn --block_intermediate_size 676"),
    "other_test": Row("what the block sees", "in the test another image", f"--stage 1 {BOTH}",
                      image="test"),
    "other_always": Row("what the block sees", "always another image", f"--stage 1 {BOTH}",
                        image="always"),
    "text": Row("what the block sees", "the text (self-attention)",
                f"--stage 1 {BOTH} --block self_attn"),
    "projector": Row("what the block sees", "the projector's output",
                     f"--stage 1 {BOTH} --block align_after_align"),

    "default2": Row("what is trained", "block and lm_head, DPO + 10 × NLL (the default, stage 2)",
                    "--stage 2 --init identity --sft_weight 10", claim=True, rate=2e-3),
    "stage2_sft": Row("what is trained", "block and lm_head, SFT",
                      f"--stage 2 --init identity {SFT}", claim=True),
    "stage2": Row("what is trained", "block and lm_head, DPO + NLL",
                  f"--stage 2 --init identity {BOTH}"),
    "lm_head": Row("what is trained", "lm_head", f"--tune lm_head {BOTH}"),
    "lora": Row("what is trained", "LoRA, rank 16", f"--lora_r 16 --lora_alpha 32 {BOTH}"),
    "twice": Row("what is trained", "block, twice the steps", f"--stage 1 {BOTH}", steps=2.0),
    "stage1_stage2": Row("what is trained", "block, then block and lm_head", f"--stage 2 {BOTH}",
                         first=f"--stage 1 {BOTH}"),

    "original": Row("the notes' form", "doubled residual, not the identity at first",
                    f"--stage 1 {BOTH} --block original", rate=2e-3),

    "round2": Row("data", "half the steps, then pairs of what came out and the other half",
                  f"--stage 1 {BOTH}", steps=0.5, first=f"--stage 1 {BOTH}", second_round=True),
    "teacher": Row("data", "chosen: what a trained model says, true or not", f"--stage 1 {BOTH}",
                   pairs=AS_TOLD, teacher=f"--stage 1 {SFT}"),
    "teacher_sft": Row("data", "chosen: what a trained model says, true or not; SFT",
                       f"--stage 1 {SFT}", pairs=AS_TOLD, teacher=f"--stage 1 {SFT}"),
}
# These have the rate of a row like them, without a ladder of their own.
SAME_RATE = {"other_test": REFERENCE, "round2": REFERENCE, "teacher": REFERENCE,
             "teacher_sft": "sft", "steps39_reference": "steps39_sft"}
COMPARED = {"base", REFERENCE, "sft", "default1", "default2", "nothing"}    # on SEEDS and on FEW
for share in (10, 5):
    flip = f"--flipped {share / 100}"
    ROWS[f"flip{share}"] = Row("data", f"{share} % of the labels flipped", f"--stage 1 {BOTH}",
                               pairs=flip)
    ROWS[f"flip{share}_sft"] = Row("data", f"{share} % of the labels flipped, SFT",
                                   f"--stage 1 {SFT}", pairs=flip)
for part, count in ((4, 1450), (16, 362)):
    few = f"--images {count}"
    ROWS[f"images{part}"] = Row("data", f"1/{part} of the images", f"--stage 1 {BOTH}", pairs=few)
    ROWS[f"images{part}_sft"] = Row("data", f"1/{part} of the images, SFT", f"--stage 1 {SFT}",
                                    pairs=few)
for name, flags in ((REFERENCE, f"--stage 1 {BOTH}"), ("dpo", "--stage 1 --sft_weight 0"),
                    ("sft", f"--stage 1 {SFT}")):
    title = "39 steps" + {REFERENCE: "", "dpo": ", DPO alone", "sft": ", SFT"}[name]
    ROWS[f"steps39_{name}"] = Row("data", title, flags, steps=39 / STEPS)
for width in (16, 32, 96):
    for name, flags in ((REFERENCE, f"--stage 1 {BOTH}"), ("sft", f"--stage 1 {SFT}"),
                        ("nothing", f"--stage 1 {BOTH} --block no_cross_attn")):
        title = {REFERENCE: "", "sft": ", SFT", "nothing": ", block sees nothing"}[name]
        ROWS[f"projector{width}_{name}"] = Row("world", f"projector {width}{title}", flags,
                                               projector=width)


def read_results(output_dir):
    """The lines of results.jsonl."""
    return read_rows(os.path.join(output_dir, "results.jsonl"))


def best_rates(lines):
    """{row: the rate with which it answers best about validation images}: the mean over the seeds
    of the three sets' accuracy, of which only well-formed answers count.
    """
    found = {}
    for line in lines:
        if line["validation"] and line["rate"]:
            numbers = line["numbers"]
            accuracy = sum(numbers[f"{split}/accuracy"]
                           for split in ("random", "popular", "adversarial"))
            of_rate = found.setdefault(line["row"], {}).setdefault(line["rate"], [])
            of_rate.append(accuracy * numbers["well_formed"])
    best = {row: max(rates, key=lambda rate: sum(rates[rate]) / len(rates[rate]))
            for row, rates in found.items()}
    best |= {name: row.rate for name, row in ROWS.items() if row.rate}
    return best | {name: best.get(like) for name, like in SAME_RATE.items()}


def seeds_of(name):
    """The seeds of a row, or of the base."""
    if name in COMPARED:
        return SEEDS + FEW
    return SEEDS if name in ROWS and ROWS[name].claim else FEW
