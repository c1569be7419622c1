"""All 9,000 answers of POPE from image files, beside transformers on the same GPU with the same
weights.

    python bench/bench_pope.py [--size 7b] [--images 500]
    torchrun --nproc_per_node 4 bench/bench_pope.py         # ours only, images split over processes

Writes as many JPEG files of 640 × 480 as POPE has images, and question files in POPE's proportions:
6 questions per image and split, the yes-questions the same in all three, so that about 5,130 of the
9,000 are distinct. Our side is `eval_pope.ask`, timed from paths and questions to texts.

The peer is transformers' `generate`, one by one and in left-padded batches. It is timed on the
first questions, and the rest is extrapolated. Its clock starts when tokens and pixels (made by our
ImageProcessor) are in memory, so opening images counts for our side only. Answers are exactly 10
tokens; random weights never end them.
"""
import argparse
import json
import os
import random
import sys
import tempfile
from dataclasses import dataclass, replace

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
import torch
import torch.distributed as dist

from bench.measuring import (
    Line,
    agreement,
    answer_positions,
    decoder_flops,
    matmul_peak,
    measure,
    table,
    tower_flops,
)
from bench.peer import (
    SIZES,
    environment,
    peer_generate,
    peer_inputs,
    peer_of,
    random_llava,
    unpack,
    write_images,
)
from eval_pope import ask, open_prompts, read_pope
from model import Head, answer
from support.questions import SPLITS

OBJECTS = (
    "person, car, chair, book, bottle, cup, bowl, dog, cat, bird, horse, sheep, cow, elephant, "
    "bear, zebra, giraffe, backpack, umbrella, handbag, tie, suitcase, frisbee, kite, skateboard, "
    "surfboard, fork, knife, spoon, banana, apple, sandwich, orange, broccoli, carrot, pizza, "
    "donut, cake, couch, bed, toilet, laptop, mouse, remote, keyboard, oven, toaster, sink, "
    "refrigerator, clock, vase, scissors, toothbrush, bicycle, motorcycle, airplane, bus, train, "
    "truck, boat, traffic light, fire hydrant, stop sign, parking meter, baseball bat, tennis "
    "racket, wine glass, potted plant, dining table, cell phone, teddy bear, hair drier, hot dog, "
    "sports ball").split(", ")
PROTOCOL = "hadpo"
TOKENS = 10             # of an answer


@dataclass
class PeerRun:
    """How the peer is asked. `count`: how many questions, the first ones."""
    what: str
    count: int
    batch_size: int         # questions at once
    tokens: int = TOKENS


# ---- Questions -----------------------------------------------------------------------------------


def question(word):
    article = "an" if word[0] in "aeiou" else "a"
    return f"Is there {article} {word} in the image?"


def write_pope(folder, images, seed=0):
    """Write POPE's three files. The objects that are not there differ between splits, but overlap
    as often as in the real ones.
    """
    rng, rows = random.Random(seed), {split: [] for split in SPLITS.values()}
    for image in images:
        words = rng.sample(OBJECTS, len(OBJECTS))
        present, absent = words[:3], words[3:]
        asked = {"random": rng.sample(absent, 3), "popular": absent[:3],
                 "adversarial": rng.sample(absent[:6], 3)}
        for split, objects in asked.items():
            for yes, no in zip(present, objects, strict=True):
                rows[split] += [(image, question(yes), "yes"), (image, question(no), "no")]
    for split, questions in rows.items():
        with open(os.path.join(folder, f"coco_pope_{split}.json"), "w") as file:
            for n, (image, text, label) in enumerate(questions, start=1):
                row = {"question_id": n, "image": image, "text": text, "label": label}
                file.write(json.dumps(row) + "\n")


def packed_rows(ours, folder, questions):
    """The rows that eval_pope.py makes of these questions, one per image → PackedDataset."""
    return open_prompts(ours, questions, folder, PROTOCOL)[1]


# ---- Both sides ----------------------------------------------------------------------------------


def time_ours(ours, folder, what, questions, tokens=TOKENS, batch_size=None):
    """One run of `ask`, behind a warm-up on its first 32 images → Line, {question: text} of the
    first head.
    """
    def answers(questions):
        prompts = open_prompts(ours, questions, folder, PROTOCOL)
        said = list(ask(ours, prompts, tokens, batch_size).values())
        wrong = sum(len(text.split()) != tokens for s in said for text, _ in s.values())
        if wrong or any(s.keys() != set(questions) for s in said):
            raise SystemExit(f"answers are missing, or {wrong} of them are not {tokens} tokens "
                             "long: their time would mean nothing")
        return said[0]

    first = set(list(dict.fromkeys(image for image, _ in questions))[:32])
    beginning = [q for q in questions if q[0] in first]
    measure(lambda: answers(beginning), ours.device, repeats=1, warm_up=0)
    measured = measure(lambda: answers(questions), ours.device, repeats=1, warm_up=0)
    dataset, positions = packed_rows(ours, folder, questions), []
    for i in range(len(dataset)):
        row = dataset.row(i)
        lengths = [row.position[end] + 1 for end in row.ends]
        positions += row.position + answer_positions(lengths, tokens)
    flops = decoder_flops(ours.config, positions) + tower_flops(ours.config, len(dataset))
    line = Line(what, measured.seconds, len(questions), len(positions), flops, measured.memory)
    return line, {question: text for question, (text, _) in measured.result.items()}


def time_peer(ours, theirs, dataset, run):
    """One PeerRun over the packed rows → Line, ids (count, tokens), first logits (count, vocab)."""
    sequences, pixels = [], {}
    for i in range(len(dataset)):
        row = dataset.row(i)
        sequences += [(ids, row.image) for ids in unpack(row)]
        if len(sequences) >= run.count:
            break
    sequences = sequences[:run.count]
    for _, image in sequences:
        pixels.setdefault(image, ours.preprocess(image))

    def answers(count):
        results = []
        for start in range(0, count, run.batch_size):
            part = sequences[start:min(count, start + run.batch_size)]
            pixel_values = torch.stack([pixels[image] for _, image in part])
            inputs = peer_inputs(ours, [ids for ids, _ in part], pixel_values)
            results.append(peer_generate(theirs, inputs, run.tokens))
        return results

    answers(min(run.count, run.batch_size))
    measured = measure(lambda: answers(len(sequences)), ours.device, repeats=1, warm_up=0)
    positions = [p for ids, _ in sequences for p in range(len(ids) + run.tokens - 1)]
    flops = decoder_flops(ours.config, positions) + tower_flops(ours.config, len(sequences))
    ids, logits = (torch.cat(parts) for parts in zip(*measured.result, strict=True))
    line = Line(run.what, measured.seconds, len(sequences), len(positions), flops, measured.memory)
    return line, ids, logits


def first_logits(ours, dataset, count):
    """Our logits of the first answer token of the first `count` questions, (count, vocab)."""
    rows, total = [], 0
    while total < count:
        total += len(dataset.examples[len(rows)].conversations)
        rows.append(len(rows))
    words = range(ours.config.text.vocab_size)
    answered = dict(answer(ours, dataset, 1, indices=rows, words=words))
    return torch.cat([answered[n][0][1] for n in rows])[:count]


def differ(what, one, other):
    pairs = list(zip(one, other, strict=True))
    print(f"{what}: {sum(a != b for a, b in pairs)} of {len(pairs)} answers differ, "
          f"{sum(a[0] != b[0] for a, b in pairs)} in their first token", flush=True)


# ---- The tables ----------------------------------------------------------------------------------


def beside_the_peer(ours, folder, distinct, total, peak, args):
    """The main table, the time over questions and over tokens, and whether the answers agree."""
    theirs, dataset = peer_of(ours), packed_rows(ours, folder, distinct)
    run = PeerRun("transformers, one by one", args.peer_single, 1)
    single, single_ids, single_logits = time_peer(ours, theirs, dataset, run)
    run = PeerRun(f"transformers, batches of {args.peer_batch}", args.peer_batched, args.peer_batch)
    batched, ids, logits = time_peer(ours, theirs, dataset, run)
    once = replace(batched, what=batched.what + ", equal questions once",
                   units=round(batched.units * total / len(distinct)))

    line, said = time_ours(ours, folder, "ours", distinct, batch_size=args.batch_size)
    block = Head(ours.config, ours.config.block_config()).to(ours.device, ours.dtype)
    block.lm_head = ours.head.lm_head
    two = replace(ours, heads={"base": ours.head, "checkpoint": block})
    both, _ = time_ours(two, folder, "ours, base and a checkpoint", distinct,
                        batch_size=args.batch_size)
    line.units = both.units = total
    line.peers = both.peers = (single, batched, once)
    print("\n" + table([single, batched, once, line, both], "answer", total, peak) + "\n")

    images = list(dict.fromkeys(image for image, _ in distinct))
    print("\n" + table(over_questions(ours, folder, images[:32], batched), "image", 1, peak) + "\n")
    lines = over_tokens(ours, theirs, folder, images[:16], args.peer_batch)
    print(table(lines, "answer", 1, peak) + "\n")

    theirs_said = [ours.tokenizer.decode(row).split() for row in ids.tolist()]
    ours_said = [said[q].split() for q in distinct[:len(ids)]]
    alone_said = [ours.tokenizer.decode(row).split() for row in single_ids.tolist()]
    differ("transformers alone against in batches", alone_said, theirs_said[:len(alone_said)])
    differ("ours against transformers in batches", ours_said, theirs_said)
    agreement("logits of first tokens, transformers alone against in batches", single_logits,
              logits[:len(single_logits)], ours.dtype, control=True)
    agreement("logits of first tokens, ours against transformers in batches",
              first_logits(ours, dataset, len(logits)), logits, ours.dtype)


def over_questions(ours, folder, images, batched):
    """How the time grows with the questions about an image. `batched`: the peer's Line."""
    lines = []
    for n in (1, 2, 4, 8, 12):
        asked = [(image, question(word)) for image in images for word in OBJECTS[:n]]
        line, _ = time_ours(ours, folder, f"ours, questions about an image: {n}", asked)
        peer = replace(batched, units=batched.units / n)
        lines.append(replace(line, units=len(images), peers=(peer,)))
    return lines


def over_tokens(ours, theirs, folder, images, peer_batch):
    """How the time grows with the length of the answers."""
    asked = [(image, question(word)) for image in images for word in OBJECTS[:10]]
    dataset, lines = packed_rows(ours, folder, asked), []
    for tokens in (10, 32, 128):
        run = PeerRun(f"transformers, {tokens} tokens", peer_batch, peer_batch, tokens)
        peer, _, _ = time_peer(ours, theirs, dataset, run)
        line, _ = time_ours(ours, folder, f"ours, {tokens} tokens", asked, tokens)
        lines += [peer, replace(line, peers=(peer,))]
    return lines


def on_several_processes(ours, folder, distinct, total, peak, args):
    """Ours on all processes of torchrun; rank 0 prints the table."""
    count = dist.get_world_size()
    line, _ = time_ours(ours, folder, f"ours, {count} processes", distinct,
                        batch_size=args.batch_size)
    line.units = total
    if dist.get_rank() == 0:
        print("\n" + table([line], "answer", total, peak * count))
        print(f"\n{total / line.seconds:,.0f} answers/s, "
              f"{len(distinct) / line.seconds:,.0f} distinct questions/s")


# ---- Command line --------------------------------------------------------------------------------


def parse_flags(argv):
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--size", choices=SIZES, default="7b")
    parser.add_argument("--images", type=int, default=500)
    parser.add_argument("--batch_size", type=int, help="images at once, ours; default: what fits")
    parser.add_argument("--peer_single", type=int, default=48,
                        help="questions that the peer answers one by one")
    parser.add_argument("--peer_batched", type=int, default=512,
                        help="questions that the peer answers in batches")
    parser.add_argument("--peer_batch", type=int, default=64, help="questions at once, peer")
    return parser.parse_args(argv)


def main(argv=None):
    args = parse_flags(argv)
    alone = int(os.environ.get("WORLD_SIZE", 1)) == 1       # set by torchrun
    if not alone:
        dist.init_process_group("gloo")                     # as in eval_pope.py
    ours = random_llava(args.size)
    peak = matmul_peak(ours.device, ours.dtype)
    with tempfile.TemporaryDirectory() as folder:
        if not alone:
            folders = [folder]
            dist.broadcast_object_list(folders)
            folder, = folders
        if alone or dist.get_rank() == 0:
            print(environment(ours.device, peak), flush=True)
            print(f"writing {args.images} images and their questions", flush=True)
            write_pope(folder, write_images(folder, args.images))
        if not alone:
            dist.barrier()
        rows = [q for split in SPLITS.values() for q in read_pope(folder, split)]
        distinct = dict.fromkeys((q["image"], q["text"]) for q in rows)
        distinct = sorted(distinct, key=lambda q: q[0])
        if alone:
            print(f"{len(rows):,} questions, {len(distinct):,} distinct, about {args.images} "
                  "images", flush=True)
            beside_the_peer(ours, folder, distinct, len(rows), peak, args)
        else:
            on_several_processes(ours, folder, distinct, len(rows), peak, args)
            dist.barrier()                                  # the folder is rank 0's
            dist.destroy_process_group()


if __name__ == "__main__":
    main()
