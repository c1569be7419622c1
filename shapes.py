"""The tiny world: rendered scenes in which objects keep company, written in exactly the real file layouts.

    python shapes.py DIR [--seed N]        writes a whole world into DIR (about 15 seconds on one core)

A picture shows a kitchen, a street or a park with two to five objects in it. The objects are small, pale and noisy,
and most of them belong to their scene: a model that looks badly can still guess well, and by guessing it hallucinates.
That is the disease of the large models, small enough for two CPU cores. What is written:

    tokenizer.model                          SentencePiece, trained on the sentences of this world
    llava/train.json, llava/images/          supervised conversations in LLaVA's layout, with some false answers
    VG/image_data.json, VG/VG_100K[_2]/      the preference images in Visual Genome's layout
    preference.json                          what a person would annotate about them (HA-DPO asked GPT-4)
    coco/val2014/, pope/coco_pope_*.json     evaluation images, POPE's three sets of questions; val/: for validation
    world.json                               seed, sizes, classes, and the truth about every judged image
    hadpo/{pope,desc}_data.json              HA-DPO's files, once a base model has answered (`write_preferences`)

Deliberately different: all classes are one word and take "a". POPE counts frequency and co-occurrence on the judged
images, we on the supervised ones, which are more. HA-DPO's files hold only questions that its model got wrong; ours
hold all (`correct` tells which, its reader skips those); where the model was right, the rejected answer is the opposite
sentence. CLIP learnt from captions; `pretrain_tower` learns class names and what stands in each patch.
"""
import argparse
import json
import math
import os
import re
import shutil
import string
import tempfile
from dataclasses import asdict, dataclass

import numpy as np
import sentencepiece
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from tqdm import tqdm

VERSION = 1                     # raise it when a world would come out differently
SIDE, PATCH = 48, 8             # pixels of an image and of the patches that `pretrain_tower` labels
CONTRAST, NOISE = (.3, .8), 8.  # how far an object stands out from what is behind it; sigma, of 255
SCENES = {"kitchen": .40, "street": .35, "park": .25}
CLASSES = {  # name: (shape, colour, texture); two that live everywhere, then six for each scene
    "person": ("post", "red", "plain"), "chair": ("arch", "brown", "plain"),
    "cup": ("disc", "blue", "plain"), "bowl": ("disc", "brown", "rows"), "bottle": ("post", "green", "rows"),
    "knife": ("bar", "violet", "plain"), "sink": ("square", "blue", "check"), "toaster": ("square", "red", "columns"),
    "car": ("bar", "red", "columns"), "bus": ("square", "yellow", "rows"), "truck": ("square", "green", "plain"),
    "bicycle": ("ring", "blue", "columns"), "sign": ("diamond", "red", "plain"),
    "hydrant": ("cross", "yellow", "plain"), "dog": ("cross", "brown", "check"), "bird": ("wedge", "blue", "plain"),
    "bench": ("arch", "green", "check"), "kite": ("diamond", "violet", "check"), "tree": ("wedge", "green", "rows"),
    "ball": ("ring", "yellow", "plain")}
COLOURS = {name: np.array(rgb, np.float32) for name, rgb in {
    "red": (215, 60, 55), "green": (50, 165, 75), "blue": (60, 95, 215), "yellow": (225, 205, 65),
    "violet": (160, 70, 190), "brown": (135, 90, 55)}.items()}
NAMES = list(CLASSES)           # the order in which descriptions name things; below, a class is an index into it
HOME = {scene: [0, 1, *range(2 + 6 * i, 8 + 6 * i)] for i, scene in enumerate(SCENES)}  # the classes that belong there
# What is wrong with the supervised answers: here the base model learns to hallucinate. Shares of
YES = .60                # questions that ask for what is there
HARD = .24               # the others that ask for what belongs to the scene: less of it, more yes to all plausible
FALSE_YES = .06          # questions about absent objects that are answered with yes
FALSE_DESCRIPTION = .15  # descriptions that name one object too many
TOLD = 8                 # every eighth preference image is described: many more, and the short answers lose their form
STREAMS = ["sft", "preference", "validation", "evaluation", "tower", "tower_test", "words"]  # of random numbers
KINDS = ["random", "popular", "adversarial"]
CLIP_MEAN, CLIP_STD = (.48145466, .4578275, .40821073), (.26862954, .26130258, .27577711)

SYSTEMS = [f"A chat between a curious {who} and an artificial intelligence assistant. The assistant gives helpful, "
           f"detailed, and polite answers to the {who}'s questions." for who in ("user", "human")]
DESCRIBE = ["Describe this image in detail.", "Take a look at this image and describe what you notice.",
            "Please provide a detailed description of the picture.",
            "Could you describe the contents of this image for me?"]


@dataclass(frozen=True)
class Sizes:
    """Images per split."""
    sft: int = 16000
    preference: int = 5800
    validation: int = 200
    evaluation: int = 400


# ------------------------------------------------------------------------------------------------ sentences
def ask(word):
    return f"Is there a {word} in the image?"


def answer(word, there):
    return f"Yes, there is a {word} in the image." if there else f"No, there is no {word} in the image."


def describe(scene, objects):
    *most, last = [f"a {NAMES[c]}" for c in sorted(objects)]
    return f"The image shows a {scene} with {', '.join(most)} and {last}."


def well_formed(question, text):
    """Is the whole answer one of the two sentences about the word that the question asks for?"""
    asked = re.fullmatch(r"Is there an? (.+) in the image\?", question.strip())
    return bool(asked) and text.strip() in (answer(asked[1], True), answer(asked[1], False))


def hallucinated(description, objects):
    """The words that a description names though they are not among `objects`, in the order of naming."""
    named = dict.fromkeys(re.findall(r"[a-z]+", description.lower()))
    return [word for word in named if word in CLASSES and word not in objects]


# ------------------------------------------------------------------------------------------------- pictures
def stencil(shape, _, texture, size):
    """-> the object's mask (0 or 1) and the brightness of its texture, both [size, size, 1]"""
    x, y = np.meshgrid(*2 * [np.linspace(-1, 1, size)])
    ax, ay, r = abs(x), abs(y), np.hypot(x, y)
    mask = {"disc": r < 1, "ring": (r < 1) & (r > .5), "square": np.maximum(ax, ay) < .9, "diamond": ax + ay < 1.05,
            "wedge": ax < (y + 1) / 2, "cross": np.minimum(ax, ay) < .33, "bar": ay < .5, "post": ax < .5,
            "arch": (ax > .5) | (y < -.4)}[shape]
    row, column = np.indices((size, size)) // 2 % 2  # two light, two dark
    dark = {"plain": 0 * row, "rows": row, "columns": column, "check": row ^ column}[texture]
    return mask[..., None].astype(np.float32), (1 - .45 * dark[..., None]).astype(np.float32)


Y, X = np.indices((SIDE, SIDE, 1))[:2]
BACKDROPS = {  # tiles, a road below a wall, grass below the sky; [SIDE, SIDE, 3], grey enough not to drown the objects
    "kitchen": np.where((Y % 12 == 0) | (X % 12 == 0), (130, 126, 117), (165, 160, 148)).astype(np.float32),
    "street": np.where(Y < SIDE // 2, (150, 145, 150), (110, 110, 112)).astype(np.float32),
    "park": np.where(Y < SIDE // 2, (150, 165, 185), (115, 145, 105)).astype(np.float32)}
STENCILS = {(c, size): stencil(*look, size) for c, look in enumerate(CLASSES.values()) for size in range(10, 19)}


def picture(seed, split, index, fewest=2, biased=True):
    """Draw picture `index` of a split. Each has its own random numbers and so depends on no other.
    -> scene, classes in order, pixels uint8 [SIDE, SIDE, 3], owner of each pixel [SIDE, SIDE]: 0 = nobody, class + 1"""
    rng = np.random.default_rng([seed, STREAMS.index(split), index])
    scene = str(rng.choice(list(SCENES), p=list(SCENES.values())))
    chance = np.full(len(NAMES), .12 / (len(NAMES) - 8))       # 12 % of the objects have lost their way
    chance[HOME[scene]] = .88 / 8 * np.linspace(1.6, .6, 8) / 1.1
    if not biased:
        chance[:] = 1                                          # the scene then says nothing about the objects
    # The first arrivals of exponential clocks with these rates are a weighted draw without replacement.
    objects = np.argsort(rng.exponential(size=len(NAMES)) / chance)[:rng.integers(fewest, 6)].tolist()

    canvas = BACKDROPS[scene] * rng.uniform(.85, 1.15, 3).astype(np.float32)
    owner = np.zeros((SIDE, SIDE), np.uint8)
    centres = np.full((1, 2), -99.)
    for c in objects:
        size = int(rng.integers(10, 19))
        # Of eight places the one farthest from all earlier objects: they may touch but seldom hide each other.
        places = rng.integers(0, SIDE - size + 1, (8, 2)) + size / 2
        centre = places[np.abs(places[:, None] - centres).max(-1).min(-1).argmax()]
        centres = np.vstack([centres, centre])
        top, left = (centre - size / 2).astype(int)
        where = slice(top, top + size), slice(left, left + size)
        mask, shade = STENCILS[c, size]
        colour = CLASSES[NAMES[c]][1] if rng.random() < .9 else str(rng.choice(list(COLOURS)))
        canvas[where] += rng.uniform(*CONTRAST) * mask * (COLOURS[colour] * shade - canvas[where])
        owner[where][mask[..., 0] > 0] = c + 1
    canvas += NOISE * rng.standard_normal(canvas.shape, np.float32)
    return scene, sorted(objects), canvas.clip(0, 255).astype(np.uint8), owner


# ------------------------------------------------------------------------------------------------ the world
def make_world(root, seed=42, sizes=Sizes(), hard=HARD, progress=True):
    """Write a whole world to `root`, which appears only when it is complete."""
    if os.path.exists(root):
        raise FileExistsError(f"{root} exists already: remove it or name another folder")
    partial = os.path.abspath(root) + ".partial"
    shutil.rmtree(partial, ignore_errors=True)

    layout = {"sft": "llava/images/{:06}.jpg", "preference": "VG/VG_100K{1}/{0}.jpg",
              "validation": "val/coco/val2014/COCO_val2014_1{:011}.jpg",
              "evaluation": "coco/val2014/COCO_val2014_2{:011}.jpg"}
    scenes = {split: [] for split in layout}  # split -> [(path, scene, objects)]
    with tqdm(total=sum(asdict(sizes).values()), desc="tiny world", unit="image", disable=not progress) as bar:
        for split, name in layout.items():
            for i in range(1, getattr(sizes, split) + 1):
                path = name.format(i, "_2" * (i % 2))
                os.makedirs(os.path.dirname(f"{partial}/{path}"), exist_ok=True)
                # Judged images have three objects to ask for, as POPE's.
                scene, objects, pixels, _ = picture(seed, split, i, fewest=2 if split == "sft" else 3)
                # Full chroma resolution: halving it would blur the colours of ten-pixel objects.
                Image.fromarray(pixels).save(f"{partial}/{path}", quality=95, subsampling=0)
                scenes[split].append((path, scene, objects))
                bar.update()

    rng = np.random.default_rng([seed, STREAMS.index("words")])
    together = np.zeros((len(NAMES), len(NAMES)))  # in how many images two classes meet; diagonal: how many show one
    for _, _, objects in scenes["sft"]:
        together[np.ix_(objects, objects)] += 1
    save(f"{partial}/llava/train.json", [conversation(rng, hard, *scene) for scene in scenes["sft"]])

    facts = lambda scene, objects: {"scene": scene, "objects": [NAMES[c] for c in objects]}
    images, notes = [], []
    for i, (path, scene, objects) in enumerate(scenes["preference"], 1):
        images.append({"image_id": i, "url": f"https://example.org/{path[3:]}", "width": SIDE, "height": SIDE})
        there, absent = rng.choice(objects, 3, replace=False).tolist(), []
        for kind in KINDS:  # an absent class of each kind, all different
            absent.append(rng.choice([c for c in strangers(rng, together, objects, kind) if c not in absent]))
        told = {"describe": str(rng.choice(DESCRIBE)), "description": describe(scene, objects)} if i % TOLD == 0 else {}
        notes.append({"image_id": i, **facts(scene, objects), **told,
                      "questions": [{"question": ask(NAMES[c]), "word": NAMES[c], "label": label}
                                    for pair in zip(there, absent) for c, label in zip(pair, ("yes", "no"))]})
    save(f"{partial}/VG/image_data.json", images)
    save(f"{partial}/preference.json", notes)

    for split, folder in (("validation", "val/pope"), ("evaluation", "pope")):
        there = [rng.choice(objects, 3, replace=False) for _, _, objects in scenes[split]]  # the same in all three sets
        for kind in KINDS:
            rows = [(os.path.basename(path), c, label) for (path, _, objects), yes in zip(scenes[split], there)
                    for pair in zip(yes, strangers(rng, together, objects, kind))
                    for c, label in zip(pair, ("yes", "no"))]
            save(f"{partial}/{folder}/coco_pope_{kind}.json", "".join(
                json.dumps({"question_id": i, "image": image, "text": ask(NAMES[c]), "label": label}) + "\n"
                for i, (image, c, label) in enumerate(rows, 1)))
    truth = {split: {os.path.basename(path): facts(*rest) for path, *rest in scenes[split]}
             for split in ("validation", "evaluation")}
    save(f"{partial}/world.json", {"version": VERSION, "seed": seed, "sizes": asdict(sizes), "hard": hard,
                                   "classes": NAMES, **truth})
    train_tokenizer(f"{partial}/tokenizer.model")
    os.rename(partial, root)


def save(path, content):
    """Write text, or anything else as JSON; a file appears only when it is complete."""
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path + ".partial", "w") as f:
        f.write(content if isinstance(content, str) else json.dumps(content))
    os.replace(path + ".partial", path)


def strangers(rng, together, objects, kind):
    """Three absent classes as POPE picks them: any, the most frequent, or those that most often meet the present."""
    absent = [c for c in range(len(NAMES)) if c not in objects]
    if kind == "random":
        return rng.choice(absent, 3, replace=False).tolist()
    score = together.diagonal() if kind == "popular" else together[objects].sum(0)
    return sorted(absent, key=lambda c: -score[c])[:3]


def conversation(rng, hard, path, scene, objects):
    """Five questions and one description about an image, in any order, with the flaws. -> an entry of LLaVA's JSON"""
    absent = rng.permutation([c for c in range(len(NAMES)) if c not in objects]).tolist()
    likely, unlikely = ([c for c in absent if (c in HOME[scene]) == home] for home in (True, False))
    there, turns = rng.permutation(objects).tolist(), []
    for _ in range(5):
        # Images with few objects run out of them, so the others are asked about more: 1.2 restores the share.
        yes = rng.random() < 1.2 * YES and len(there) > 0
        word = NAMES[(there if yes else likely if rng.random() < hard and likely else unlikely).pop()]
        turns.append((ask(word), answer(word, yes or rng.random() < FALSE_YES)))
    extra = likely[:1] if rng.random() < FALSE_DESCRIPTION else []
    turns.append((str(rng.choice(DESCRIBE)), describe(scene, objects + extra)))
    talk = [{"from": who, "value": text} for i in rng.permutation(6) for who, text in zip(("human", "gpt"), turns[i])]
    talk[0]["value"] = "<image>\n" + talk[0]["value"]
    image = os.path.basename(path)
    return {"id": image[:-4], "image": image, "conversations": talk}


def train_tokenizer(path):
    """A SentencePiece model with LLaMA's conventions. Each word of this world is one token, and so is each fixed part
    of the prompt, which keeps rows short: a question costs ten tokens. Other text falls back to characters."""
    prompts = [ask(name) for name in NAMES] + DESCRIBE
    text = prompts + [answer(name, there) for name in NAMES for there in (True, False)]
    text += [describe(scene, HOME[scene]) for scene in SCENES]
    words = sorted({word for line in text for word in re.findall("[A-Za-z]+", line)})
    first = sorted({line.split()[0] for line in prompts})  # these also follow "<image>\n", with no space before them
    pieces = ["▁" + part.replace(" ", "▁") for part in SYSTEMS[:1] + ["USER:", "ASSISTANT:"] + words]
    with open(path, "wb") as f, tempfile.NamedTemporaryFile("w", suffix=".tsv") as rules:
        # Nothing here could teach the model that HA-DPO's evaluation prompt, with "human", means what "user" means.
        rules.write("\t".join(" ".join(f"{ord(c):04X}" for c in word) for word in ("human", "user")) + "\n")
        rules.flush()
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(text), model_writer=f, model_type="char", vocab_size=1000, hard_vocab_limit=False,
            user_defined_symbols=["\n", "USER:", *pieces, *first], required_chars=string.ascii_letters + string.digits + "▁'",
            unk_id=0, bos_id=1, eos_id=2, pad_id=-1, add_dummy_prefix=True, remove_extra_whitespaces=False,
            normalization_rule_tsv=rules.name, character_coverage=1., minloglevel=2)


# --------------------------------------------------------------------------------------- the base's mistakes
def write_preferences(root, answers):
    """Write HA-DPO's two files from what the base model said: `answers` maps (image_id, question) to its sentence, for
    the six questions of each image in preference.json and for its `describe` prompt. -> counts"""
    with open(f"{root}/preference.json") as f:
        notes = json.load(f)
    pope, descriptions = [], {}
    for image in notes:
        key = image["image_id"]
        for q in image["questions"]:
            said, there = answers[key, q["question"]].strip(), q["label"] == "yes"
            correct = said.lower().startswith(q["label"])
            pope.append({"image_id": key, "question": q["question"], "answer": q["label"],
                         "chosen": answer(q["word"], there), "correct": correct,
                         "reject": said if said and not correct else answer(q["word"], not there)})
        said = answers[key, image["describe"]].strip() if "describe" in image else ""
        if hallucinated(said, image["objects"]):
            descriptions[str(key)] = {"chosen": [image["description"]], "rejected": [said]}
    save(f"{root}/hadpo/desc_data.json", descriptions)
    save(f"{root}/hadpo/pope_data.json", pope)
    return {"questions": len(pope), "wrong": sum(not row["correct"] for row in pope), "descriptions": len(descriptions)}


# ------------------------------------------------------------------------------- in place of CLIP's training
def pretrain_tower(tower, seed=42, images=12000, epochs=3, batch_size=32, learning_rate=3e-3, progress=True):
    """Teach `tower`, in place, to see: which class stands in each patch, and which classes stand in the image.
    tower(pixels [B, 3, 48, 48], normalised as for CLIP) -> [B, 36, hidden_size]. -> mean class AUC on fresh images"""
    device, C = next(tower.parameters()).device, len(NAMES)
    mean, std = (torch.tensor(v, device=device).view(3, 1, 1) for v in (CLIP_MEAN, CLIP_STD))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        head = nn.Sequential(nn.LayerNorm(tower.hidden_size), nn.Linear(tower.hidden_size, C + 1 + C)).to(device)
        batches = torch.cat([torch.randperm(images) for _ in range(epochs)]).split(batch_size)
        for module in tower.modules():
            if isinstance(module, nn.Embedding):  # torch draws positions from N(0, 1), which drowns the patches
                nn.init.normal_(module.weight, std=.02)

    def look(pixels):
        """uint8 [B, 3, 48, 48] -> logits of each patch's class (0 = nobody) [B, 36, C + 1] and of the image's [B, C]"""
        patch, image = head(tower((pixels.to(device) / 255 - mean) / std)).split([C + 1, C], -1)
        return patch, image.logsumexp(1) - math.log(image.shape[1])  # between mean and max: an object fills few patches

    pixels, shares = render(seed, "tower", images, progress)
    parameters = [*tower.requires_grad_(True).train().parameters(), *head.parameters()]
    optimizer = torch.optim.AdamW(parameters, weight_decay=.01, fused=True)
    for step, batch in enumerate(tqdm(batches, desc="vision tower", unit="step", disable=not progress)):
        done = (step + 1) / len(batches)  # a tenth of warm-up, then a cosine
        optimizer.param_groups[0]["lr"] = learning_rate * min(10 * done, .5 + .5 * math.cos(math.pi * done))
        patch, image = look(pixels[batch])
        share = shares[batch].to(device)                                                  # [B, 36, C + 1]
        loss = (F.cross_entropy(patch.flatten(0, 1), share.flatten(0, 1))
                + F.binary_cross_entropy_with_logits(image, (share[..., 1:].amax(1) > 0).float()))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    tower.eval()
    pixels, shares = render(seed, "tower_test", 2000, progress=False)
    with torch.no_grad():
        score = torch.cat([look(part)[1] for part in pixels.split(250)]).cpu()                    # [2000, C]
    present = shares[..., 1:].amax(1) > 0
    # AUC, the chance that a positive scores above a negative, from the sum of the positives' ranks (Mann-Whitney).
    rank, n = score.argsort(0).argsort(0) + 1., present.sum(0)
    return (((rank * present).sum(0) - n * (n + 1) / 2) / (n * (len(score) - n))).mean().item()


def render(seed, split, count, progress):
    """-> pixels uint8 [count, 3, 48, 48] and the share of each patch that each class fills [count, 36, C + 1].
    Every second image is drawn without scene bias, so that the tower must look and cannot guess."""
    side, width = SIDE // PATCH, len(NAMES) + 1
    pixels, shares = torch.empty(count, SIDE, SIDE, 3, dtype=torch.uint8), torch.empty(count, side ** 2, width)
    patch_of = np.kron(np.arange(side ** 2).reshape(side, side), np.ones((PATCH, PATCH), int))    # [48, 48]
    for i in tqdm(range(count), desc="pictures for the tower", unit="image", disable=not progress):
        _, _, image, owner = picture(seed, split, i, biased=i % 2 == 0)
        area = np.bincount((patch_of * width + owner).ravel(), minlength=side ** 2 * width)
        pixels[i], shares[i] = torch.from_numpy(image), torch.from_numpy(area / PATCH ** 2).view(-1, width)
    return pixels.permute(0, 3, 1, 2).contiguous(), shares


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Write the tiny world.")
    parser.add_argument("dir", help="folder to create")
    parser.add_argument("--seed", type=int, default=42)
    args = parser.parse_args()
    try:
        make_world(args.dir, args.seed)
    except OSError as error:
        parser.exit(1, f"shapes.py: {error}\n")
