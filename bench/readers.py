"""The small world that bench/faults.py damages: its files, and what reads each of them.

    make_sound()                                    # in the folder that one is in
    digest = FORMATS["a base's config.json"].read()     # in a copy of it: what is read, in short

Everything is named relative to the folder that one is in, so that a copy is as good as the first.
"""
import re
import shutil
import signal
from argparse import Namespace
from collections.abc import Callable
from dataclasses import asdict, dataclass
from glob import glob

import torch
from safetensors.torch import load_file, save_file

import train
from bench.forked import Kill, run_forked
from checkpoints.identity import head_digest
from checkpoints.load import Source, load_all, load_base, load_trained
from data import PackedDataset, read_hadpo
from evals.score import score_file
from support.common import InputError, file_digest, read_json, write_json
from support.images import check_images
from support.outputs import digest
from support.questions import read_pope
from tiny.places import SHIPPED_BASE
from tiny.preferences import write_preferences
from tiny.prepare import mined_from, refuse_other_sizes
from tiny.world import Sizes, make_world
from training.conversations import image_paths, read_llava
from training.engine import configure, start_deepspeed
from training.features import keep_features
from training.flags import parse_flags
from training.picture import read_run

SIZES = Sizes(sft=12, preference=6, validation=1, evaluation=4)
DATA = ("world/hadpo/desc_data.json", "world/hadpo/pope_data.json", "world/VG")
FLAGS = ["--model_name_or_path", "base", "--desc_data_path", DATA[0], "--pope_data_path", DATA[1],
         "--vg_path", DATA[2], "--keep_correct", "--learning_rate", "1e-2", "--max_steps", "5",
         "--per_device_train_batch_size", "4", "--gradient_accumulation_steps", "2"]
STAGE_2 = ["train.py", "--stage", "2", "--init", "identity", *FLAGS]
LORA = ["train.py", "--lora_r", "4", "--lora_dropout", "0.3", *FLAGS]
ZERO = [*STAGE_2, "--deepspeed", "ds.json"]
# Phases that read what programs leave.
LEFT = "^(trained|adapter|non_lora|answers|kept|state|a log|a journal)|an evaluation"
SAVED = ["--save_steps", "2"]
ASK = ["eval_pope.py", "trained", "--set", "random", "--batch_size", "1", "--max_new_tokens", "8"]


# ---- The world -----------------------------------------------------------------------------------


def make_sound(phases):
    """Write all files that these phases of the campaign need into the folder that one is in."""
    make_world("world", 42, SIZES, progress=False)
    answers = {}            # a base that says yes to everything, and sees a kite in every picture
    for image in read_json("world/preference.json", list):
        for question in image["questions"]:
            said = f"Yes, there is a {question['word']} in the image."
            answers[image["image_id"], question["question"]] = said
        said = "The image shows a park with a kite and a ball."
        answers[image["image_id"], image.get("describe")] = said
    write_preferences("world", answers)
    write_json(DATA[0], {str(image["image_id"]): {
        "chosen": ["The image shows a park.", "A park."], "rejected": ["There is a kite."]}
        for image in read_json("world/preference.json", list)[:3]})
    shutil.copytree(SHIPPED_BASE, "base")
    write_json("world/hadpo/base.json", {"fingerprint": load_base("base").fingerprint})
    write_json("ds.json", {"train_batch_size": 8, "zero_optimization": {"stage": 1},
                           "gradient_clipping": 1.0})

    # The same base in a .bin, and in two shards with an index.
    tensors = load_file("base/model.safetensors")
    for name in ("bin", "shards"):
        shutil.copytree("base", name, ignore=lambda _, names: {"model.safetensors"} & set(names)
                        if "README.md" in names else ())
    torch.save(tensors, "bin/pytorch_model.bin")
    parts = {"one.safetensors": sorted(tensors)[::2], "two.safetensors": sorted(tensors)[1::2]}
    for file, keys in parts.items():
        save_file({key: tensors[key] for key in keys}, f"shards/{file}", {"format": "pt"})
    write_json("shards/model.safetensors.index.json",
               {"weight_map": {key: file for file, keys in parts.items() for key in keys}})

    if not any(re.search(LEFT, name) for name in phases):
        return

    # What programs leave: checkpoints, answers, kept features, interrupted runs.
    for command in ([*STAGE_2, "--output_dir", "trained", "--cache_features", "features"],
                    [*LORA, "--output_dir", "adapter"], ASK):
        ended = run_forked(command)
        if ended.code:
            raise RuntimeError(f"{command}: {ended.said}")
    torch.save(load_file("trained/trained.safetensors"), "non_lora_trainables.bin")
    for command, name in ((LORA, "lora"), (ZERO, "zero")):
        run_forked([*command, *SAVED, "--output_dir", name],
                   Kill(signal.SIGKILL, moment=5, within=f"{name}.run/latest"))
    run_forked([*ASK, "--output_dir", "asked"],
               Kill(signal.SIGKILL, moment=1, within="asked/metrics"))


# ---- Who reads what ------------------------------------------------------------------------------


def of_model(model):
    """A model, in short: its settings, all of its weights, and what it makes of a pair."""
    rows = PackedDataset(read_hadpo(*DATA, True), model.row_format())
    states, _ = model.trunk(rows[[0, 1]])
    heads = {name: head_digest(head) for name, head in model.heads.items()}
    words = model.tokenizer.decode(model.tokenizer.encode("Is there a dog in the image?"))
    return digest([asdict(model.config), str(model.preprocess), head_digest(model.trunk), heads,
                   words, states.tolist()])


def base(folder="base"):
    return of_model(load_base(folder, dtype=torch.float32))


def checkpoint(path):
    return of_model(load_all(Source([path]), torch.device("cpu"), torch.float32))


def seed_file():
    model = load_base("base", dtype=torch.float32)
    model.heads["notes"] = load_trained("non_lora_trainables.bin", model)
    return of_model(model)


def pairs():
    return digest(list(map(vars, read_hadpo(*DATA, True))))


def pairs_as_rows():
    """And as token ids and pixels."""
    model, found = load_base("base"), read_hadpo(*DATA, True)
    if not found:
        raise InputError("the data hold no examples")       # as train.py says
    check_images(image_paths(found))
    rows = PackedDataset(found, model.row_format())
    batch = rows[range(len(rows))].tensors()
    return pairs() + digest({name: x.tolist() for name, x in batch.items()})


def conversations():
    found = read_llava("world/llava/train.json", "world/llava/images")
    check_images(image_paths(found))
    rows = PackedDataset(found, load_base("base").row_format())
    return digest([list(map(vars, found)), rows[range(len(rows))].input_ids.tolist()])


def questions():
    rows = read_pope("world/pope/coco_pope_random.json")
    check_images([f"world/coco/val2014/{row['image']}" for row in rows])
    return digest(rows)


def scores():
    return digest(score_file(Namespace(
        answers="trained/pope/trained_random.jsonl", pope_path=["world/pope"], set=["random"],
        question_file=None)))


def features():
    model = load_base("base", dtype=torch.float32, read_trunk=False)
    rows = PackedDataset(read_hadpo(*DATA, True), model.row_format(), always_image=True)
    kept = keep_features("features", rows, model, model.config.block_config())
    batch = kept[range(len(kept))].tensors()
    return digest({name: x.tolist() for name, x in batch.items()})


def going_on(command, name):
    """A run that goes on, and what it leaves."""
    train.train(parse_flags([*command[1:], *SAVED, "--output_dir", name, "--resume"]))
    return digest({path: file_digest(path) for path in glob(f"{name}/*.safetensors")})


def deepspeed_file():
    module, device = start_deepspeed()
    args = parse_flags([*ZERO[1:], "--output_dir", "other"])
    return digest(configure(args, module, device))


def notes_of_the_world():
    """What the tiny world tells of itself."""
    args = parse_flags(["--output_dir", "other"])
    refuse_other_sizes(args, "world", "untrained", "base")
    return digest(mined_from("world", load_base("base").fingerprint))


def journal():
    """Answers of an evaluation that was killed: a damaged line is asked again, never believed."""
    args = ["eval_pope.py", *ASK[1:], "--output_dir", "asked"]
    ended = run_forked(args)
    if ended.code == 1 and "error: " in ended.said:
        raise InputError(ended.said.rpartition("error: ")[2].strip())
    if ended.code:
        raise RuntimeError(ended.said)
    return file_digest("asked/trained_random.jsonl")


@dataclass
class Format:
    """A kind of file: one of them (a pattern), what reads it, and whether that can tell every
    change of its content, by checksums or because the content is all there is to it.
    """
    pattern: str
    read: Callable
    checked: bool = False

    @property
    def path(self):
        return sorted(glob(self.pattern))[-1]


FORMATS = {
    "a base's config.json": Format("base/config.json", base),
    "model.safetensors": Format("base/model.safetensors", base),
    "tokenizer.model": Format("base/tokenizer.model", base),
    "pytorch_model.bin": Format("bin/pytorch_model.bin", lambda: base("bin")),
    "the index of shards": Format("shards/*.index.json", lambda: base("shards")),
    "a shard": Format("shards/two.safetensors", lambda: base("shards")),
    "a tower's config.json": Format("base/vision_tower/config.json", base),
    "a tower's weights": Format("base/vision_tower/model.safetensors", base),
    "preprocessor_config.json": Format("base/vision_tower/preprocessor_config.json", base),
    "trained: config.json": Format("trained/config.json", lambda: checkpoint("trained")),
    "trained.safetensors": Format("trained/trained.safetensors", lambda: checkpoint("trained")),
    "adapter: config.json": Format("adapter/config.json", lambda: checkpoint("adapter")),
    "adapter_config.json": Format("adapter/adapter_config.json", lambda: checkpoint("adapter")),
    "adapter_model.safetensors": Format("adapter/adapter_model.safetensors",
                                        lambda: checkpoint("adapter")),
    "non_lora_trainables.bin": Format("non_lora_trainables.bin", seed_file),
    "desc_data.json": Format(DATA[0], pairs_as_rows),
    "pope_data.json": Format(DATA[1], pairs_as_rows),
    "image_data.json": Format("world/VG/image_data.json", pairs_as_rows),
    "a JPEG": Format("world/VG/VG_100K*/*.jpg", pairs_as_rows),
    "conversations": Format("world/llava/train.json", conversations),
    "POPE's questions": Format("world/pope/coco_pope_random.json", questions),
    "answers": Format("trained/pope/trained_random.jsonl", scores),
    "kept: hidden states": Format("features/*/hidden.bin", features, True),
    "kept: image features": Format("features/*/features.bin", features, True),
    "kept: sums.bin": Format("features/*/sums.bin", features, True),
    "kept: rows.npz": Format("features/*/rows.npz", features, True),
    "kept: key.json": Format("features/*/key.json", features, True),
    "state: weights": Format("lora.run/step-4/mp_rank_00_model_states.pt",
                             lambda: going_on(LORA, "lora"), True),
    "state: optimizer": Format("zero.run/step-4/*optim_states.pt",
                               lambda: going_on(ZERO, "zero"), True),
    "state: reference.pt": Format("lora.run/reference.pt", lambda: going_on(LORA, "lora"), True),
    "state: run.json": Format("lora.run/run.json", lambda: going_on(LORA, "lora"), True),
    "state: latest": Format("lora.run/latest", lambda: going_on(LORA, "lora"), True),
    "state: metrics.jsonl": Format("lora.run/metrics.jsonl",
                                   lambda: going_on(LORA, "lora"), True),
    "a log of steps": Format("trained/metrics.jsonl",
                             lambda: digest(read_run("trained/metrics.jsonl"))),
    "a journal of answers": Format("asked/unfinished-*.jsonl", journal, True),
    "a DeepSpeed file": Format("ds.json", deepspeed_file),
    "notes of the world": Format("world/world.json", notes_of_the_world),
    "notes of the base": Format("world/hadpo/base.json", notes_of_the_world),
}
