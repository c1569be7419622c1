"""The tiny world: pictures and what is said about them, written in exactly the real file layouts.

    python -m tiny.world world                              # a whole world, 15 seconds
    python -m tiny.world other --seed 1 --preference 100    # another one, with fewer pairs

Most objects in a picture belong to its scene (pictures.py). So a model that looks badly can still
guess well, and by guessing it hallucinates. That is the disease of the large models, small enough
for two CPU cores. What is written:

    tokenizer.model                        SentencePiece, trained on the sentences of this world
    llava/train.json, llava/images/        conversations in LLaVA's layout, some answers are false
    VG/image_data.json, VG/VG_100K[_2]/    the preference images in Visual Genome's layout
    preference.json                        what a person would note about them (HA-DPO asked GPT-4)
    coco/val2014/, pope/coco_pope_*.json   images to evaluate on, and POPE's three sets of questions
    val/coco/val2014/, val/pope/           the same, to choose settings with
    world.json                             seed, sizes, classes, the truth about every judged image
    hadpo/{pope,desc}_data.json            HA-DPO's files, from a base's answers: preferences.py

Follows POPE (arXiv 2305.10355) and HA-DPO (arXiv 2311.16839). Deliberately different: each class is
one word that takes "a". POPE counts how often classes appear, and appear together, in the judged
images; we count in the supervised ones, which are more.
"""
import json
import os
import re
import shutil
import string
import tempfile
from dataclasses import asdict, dataclass

import numpy as np
import sentencepiece
from PIL import Image

from data import DESCRIBE
from support import common
from support.command_line import Parser
from support.common import InputError, Number, run_program
from support.templates import SYSTEM
from tiny.pictures import CLASSES, HOME, NAMES, SCENES, SIDE, STREAMS, facts, picture

VERSION = 1                 # to be raised when a world would come out different

# What is wrong with the supervised answers, from which the base learns to hallucinate. Shares of
YES = 0.60                  # questions about what is there
HARD = 0.24                 # the others about what belongs to the scene: with fewer, the base says
                            # yes to all that belongs
FALSE_YES = 0.06            # questions about absent objects that are answered with yes
FALSE_DESCRIPTION = 0.15    # descriptions that name one object too many

KINDS = ["random", "popular", "adversarial"]                        # POPE's sets of questions


@dataclass(frozen=True)
class Sizes:
    """Images per split."""
    sft: int = 16000
    preference: int = 5800
    validation: int = 200
    evaluation: int = 400


@dataclass(frozen=True)
class Shown:
    """What an image of the world shows."""
    path: str               # in the world's folder
    scene: str
    objects: list           # classes, in ascending order

    @property
    def name(self):
        return os.path.basename(self.path)

    def absent(self):
        return [c for c in range(len(NAMES)) if c not in self.objects]

    def facts(self):
        return {"scene": self.scene, "objects": [NAMES[c] for c in self.objects]}


# ---- Sentences -----------------------------------------------------------------------------------


def ask(word):
    return f"Is there a {word} in the image?"


def answer(word, there):
    if there:
        return f"Yes, there is a {word} in the image."
    return f"No, there is no {word} in the image."


def describe(scene, objects):
    return sentence(scene, [NAMES[c] for c in sorted(objects)])


def sentence(scene, words):
    *most, last = [f"a {word}" for word in words]
    listed = f"{', '.join(most)} and {last}" if most else last
    return f"The image shows a {scene} with {listed}."


def well_formed(question, text):
    """Whether an answer is one of the two sentences about the word that the question asks for."""
    asked = re.fullmatch(r"Is there an? (.+) in the image\?", question.strip())
    return bool(asked) and text.strip() in (answer(asked[1], True), answer(asked[1], False))


def hallucinated(description, objects):
    """The classes, as words, that a description names and that are not among `objects` (words)."""
    named = dict.fromkeys(re.findall(r"[a-z]+", description.lower()))
    return [word for word in named if word in CLASSES and word not in objects]


# ---- The world -----------------------------------------------------------------------------------

PATHS = {"sft": "llava/images/{:06}.jpg", "preference": "VG/VG_100K{1}/{0}.jpg",
         "validation": "val/coco/val2014/COCO_val2014_1{:011}.jpg",
         "evaluation": "coco/val2014/COCO_val2014_2{:011}.jpg"}
# Objects in an image, at least: judged images have three to ask for, as POPE's.
FEWEST = {"sft": 2, "preference": 3, "validation": 3, "evaluation": 3}


def make_world(root, seed=42, sizes=None, supervised=True, progress=True):
    """Write a whole world to the folder `root`, which appears only when it is complete.

    `sizes` None: those of `Sizes`. `supervised` False: without llava/images/, most of all images,
    which only stage 0 looks at; `draw_supervised` adds them. InputError if `root` exists.
    """
    if os.path.exists(root):
        raise InputError(f"{root}: exists already; remove it or name another folder")
    sizes = sizes or Sizes()
    partial = os.path.abspath(root) + ".partial"
    shutil.rmtree(partial, ignore_errors=True)
    shown = {split: shown_images(split, seed, getattr(sizes, split)) for split in PATHS}
    drawn = {split: images for split, images in shown.items() if supervised or split != "sft"}
    draw_images(partial, seed, drawn, progress)

    # Everything that is said about the images comes from one stream of random numbers.
    rng = np.random.default_rng([seed, STREAMS.index("words")])
    together = np.zeros((len(NAMES), len(NAMES)))   # images with both classes; diagonal: with one
    for image in shown["sft"]:
        together[np.ix_(image.objects, image.objects)] += 1
    save(f"{partial}/llava/train.json", [conversation(rng, image) for image in shown["sft"]])
    save_preference(partial, rng, together, shown["preference"])
    save_pope(f"{partial}/val/pope", rng, together, shown["validation"])
    save_pope(f"{partial}/pope", rng, together, shown["evaluation"])
    truth = {split: {image.name: image.facts() for image in shown[split]}
             for split in ("validation", "evaluation")}
    save(f"{partial}/world.json", {"version": VERSION, "seed": seed, "sizes": asdict(sizes),
                                   "hard": HARD, "classes": NAMES, **truth})
    train_tokenizer(f"{partial}/tokenizer.model")
    os.rename(partial, root)


def draw_supervised(root):
    """Draw llava/images/ of a world that was made without them. They appear when all are there."""
    with open(f"{root}/world.json") as f:
        world = json.load(f)
    partial = f"{root}/supervised.partial"
    shutil.rmtree(partial, ignore_errors=True)
    shown = shown_images("sft", world["seed"], world["sizes"]["sft"])
    draw_images(partial, world["seed"], {"sft": shown})
    os.rename(f"{partial}/llava/images", f"{root}/llava/images")
    shutil.rmtree(partial)


def shown_images(split, seed, count):
    """What the images of a split show → [Shown]."""
    return [Shown(PATHS[split].format(i, "_2" if i % 2 else ""),
                  *facts(seed, split, i, FEWEST[split])) for i in range(1, count + 1)]


def draw_images(root, seed, shown, progress=True):
    """Write the images of some splits: {split: [Shown]}."""
    with common.progress(total=sum(map(len, shown.values())), desc="tiny world", unit="image",
                         disable=not progress) as bar:
        for split, images in shown.items():
            for i, image in enumerate(images, 1):
                os.makedirs(os.path.dirname(f"{root}/{image.path}"), exist_ok=True)
                _, _, pixels, _ = picture(seed, split, i, FEWEST[split])
                # Full chroma resolution: half of it would blur the colours of ten-pixel objects.
                Image.fromarray(pixels).save(f"{root}/{image.path}", quality=95, subsampling=0)
                bar.update()


def save(path, content):
    """Write a text, or anything else as JSON. A file appears only when it is complete."""
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path + ".partial", "w") as f:
        f.write(content if isinstance(content, str) else json.dumps(content))
    os.replace(path + ".partial", path)


def conversation(rng, image):
    """Five questions and one description, in any order, some answers false → LLaVA's JSON entry."""
    absent = rng.permutation(image.absent()).tolist()
    likely = [c for c in absent if c in HOME[image.scene]]
    unlikely = [c for c in absent if c not in HOME[image.scene]]
    there = rng.permutation(image.objects).tolist()
    turns = []
    for _ in range(5):
        # An image with few objects runs out of them; 1.2 restores the share of yes.
        if rng.random() < 1.2 * YES and there:
            word = NAMES[there.pop()]
            turns.append((ask(word), answer(word, True)))
            continue
        hard = rng.random() < HARD
        word = NAMES[likely.pop() if hard and likely else unlikely.pop()]
        turns.append((ask(word), answer(word, rng.random() < FALSE_YES)))
    extra = likely[:1] if rng.random() < FALSE_DESCRIPTION else []
    turns.append((str(rng.choice(DESCRIBE)), describe(image.scene, image.objects + extra)))

    talk = []
    for i in rng.permutation(6):
        question, reply = turns[i]
        talk += [{"from": "human", "value": question}, {"from": "gpt", "value": reply}]
    talk[0]["value"] = "<image>\n" + talk[0]["value"]
    return {"id": image.name.removesuffix(".jpg"), "image": image.name, "conversations": talk}


def strangers(rng, together, image, kind):
    """Three absent classes, chosen as POPE does.

    random: any; popular: the most frequent; adversarial: those seen most often with the present.
    """
    absent = image.absent()
    if kind == "random":
        return rng.choice(absent, 3, replace=False).tolist()
    score = together.diagonal() if kind == "popular" else together[image.objects].sum(0)
    return sorted(absent, key=lambda c: -score[c])[:3]


def labelled(there, absent):
    """[class that is there, ...], [class that is not, ...] → [(class, "yes" or "no")], in turns."""
    rows = []
    for yes, no in zip(there, absent, strict=True):
        rows += [(yes, "yes"), (no, "no")]
    return rows


def save_preference(root, rng, together, shown):
    """Visual Genome's index; of each image three questions of each label, and a description."""
    images, notes = [], []
    for i, image in enumerate(shown, 1):
        url = f"https://example.org/{image.path.removeprefix('VG/')}"
        images.append({"image_id": i, "url": url, "width": SIDE, "height": SIDE})
        there, absent = rng.choice(image.objects, 3, replace=False).tolist(), []
        for kind in KINDS:                          # one absent class of each kind, all different
            choices = strangers(rng, together, image, kind)
            absent.append(rng.choice([c for c in choices if c not in absent]))
        # POPE's questions come from the same stream of random numbers. So it is asked for every
        # 8th prompt only, as in the worlds where only those images were described.
        prompt = rng.choice(DESCRIBE) if i % 8 == 0 else DESCRIBE[i % len(DESCRIBE)]
        notes.append(preference_note(i, image, str(prompt), labelled(there, absent)))
    save(f"{root}/VG/image_data.json", images)
    save(f"{root}/preference.json", notes)


def preference_note(image_id, image, prompt, questions):
    return {"image_id": image_id, **image.facts(), "describe": prompt,
            "description": describe(image.scene, image.objects),
            "questions": [{"question": ask(NAMES[c]), "word": NAMES[c], "label": label}
                          for c, label in questions]}


def any_questions(root):
    """The notes of a world's preference images with other questions than preference.json's: the
    three absent classes are any, and not those that POPE would ask about.
    """
    with open(f"{root}/world.json") as f:
        world = json.load(f)
    rng = np.random.default_rng([world["seed"], STREAMS.index("words"), 1])
    shown = shown_images("preference", world["seed"], world["sizes"]["preference"])
    notes = []
    for i, image in enumerate(shown, 1):
        there = rng.choice(image.objects, 3, replace=False).tolist()
        absent = rng.choice(image.absent(), 3, replace=False).tolist()
        prompt = DESCRIBE[i % len(DESCRIBE)]
        notes.append(preference_note(i, image, prompt, labelled(there, absent)))
    return notes


def save_pope(folder, rng, together, shown):
    """POPE's three sets of questions about the same images. All have the same yes questions."""
    there = [rng.choice(image.objects, 3, replace=False) for image in shown]
    for kind in KINDS:
        lines = []
        for image, present in zip(shown, there, strict=True):
            for c, label in labelled(present, strangers(rng, together, image, kind)):
                lines.append(json.dumps({"question_id": len(lines) + 1, "image": image.name,
                                         "text": ask(NAMES[c]), "label": label}))
        save(f"{folder}/coco_pope_{kind}.json", "".join(f"{line}\n" for line in lines))


def train_tokenizer(path):
    """A SentencePiece model with LLaMA's conventions.

    Each word of this world is one token, and so is each fixed part of the prompt. That keeps rows
    short: a question costs ten tokens. Other text falls back to characters.
    """
    prompts = [ask(name) for name in NAMES] + list(DESCRIBE)
    text = prompts + [answer(name, there) for name in NAMES for there in (True, False)]
    text += [describe(scene, HOME[scene]) for scene in SCENES]
    words = sorted({word for line in text for word in re.findall("[A-Za-z]+", line)})
    # These also follow "<image>\n", with no space before them.
    first = sorted({line.split()[0] for line in prompts})
    pieces = ["▁" + part.replace(" ", "▁") for part in [SYSTEM, "USER:", "ASSISTANT:"] + words]
    with open(path, "wb") as f, tempfile.NamedTemporaryFile("w", suffix=".tsv") as rules:
        # HA-DPO's evaluation prompt says "human" for "user", which nothing here could teach.
        codes = [" ".join(f"{ord(c):04X}" for c in word) for word in ("human", "user")]
        rules.write("\t".join(codes) + "\n")
        rules.flush()
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(text), model_writer=f, model_type="char", vocab_size=1000,
            hard_vocab_limit=False, user_defined_symbols=["\n", "USER:", *pieces, *first],
            required_chars=string.ascii_letters + string.digits + "▁'",
            unk_id=0, bos_id=1, eos_id=2, pad_id=-1, add_dummy_prefix=True,
            remove_extra_whitespaces=False, normalization_rule_tsv=rules.name,
            character_coverage=1.0, minloglevel=2)


def main():
    parser = Parser(__doc__)
    parser.add_argument("dir", metavar="DIR", help="folder to create")
    parser.add_argument("--seed", type=Number("--seed", int, low=0), default=42,
                        help="of everything that is drawn")
    for split, count in asdict(Sizes()).items():
        parser.add_argument(f"--{split}", type=Number(f"--{split}", int, above=0), default=count,
                            help="images of this split")
    args = parser.parse_args()
    try:
        make_world(args.dir, args.seed, Sizes(**{name: getattr(args, name) for name in PATHS}))
    except OSError as e:
        raise InputError(f"{args.dir}: cannot be written ({e}); name another folder") from e


if __name__ == "__main__":
    run_program(main)
