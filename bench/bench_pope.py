"""All 9,000 answers of POPE from image files, beside transformers on the same GPU with the same weights.

    python bench/bench_pope.py [--size 7b] [--images 500]
    torchrun --nproc_per_node 4 bench/bench_pope.py              # ours only, images split over the processes (also 1)

Writes as many JPEG files of 640 × 480 as POPE has images, and question files in POPE's proportions: 6 questions per image
and split, the yes-questions the same in all three, so that about 5,130 of the 9,000 are distinct. Ours is `eval_pope.ask`,
timed from paths and questions to texts. The peer, timed on the first questions and extrapolated, is transformers'
`generate`, one by one and in left-padded batches; its clock starts when tokens and pixels (made by our ImageProcessor) lie
in memory: opening images counts for ours only. Answers are exactly 10 tokens; random weights never end them.
"""
import argparse
import json
import os
import random
import sys
import tempfile
from dataclasses import replace

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
import torch
import torch.distributed as dist

from data import PackedDataset
from eval_pope import PROTOCOLS, SPLITS, ask
from model import Head, answer
from peer import (SIZES, Line, agreement, answer_positions, decoder_flops, environment, matmul_peak, measure, peer_generate,
                  peer_inputs, peer_of, random_llava, table, tower_flops, unpack, write_images)
from readers import IMAGE, Example, read_pope

OBJECTS = ("person, car, chair, book, bottle, cup, bowl, dog, cat, bird, horse, sheep, cow, elephant, bear, zebra, giraffe, "
           "backpack, umbrella, handbag, tie, suitcase, frisbee, kite, skateboard, surfboard, fork, knife, spoon, banana, "
           "apple, sandwich, orange, broccoli, carrot, pizza, donut, cake, couch, bed, toilet, laptop, mouse, remote, "
           "keyboard, oven, toaster, sink, refrigerator, clock, vase, scissors, toothbrush, bicycle, motorcycle, airplane, "
           "bus, train, truck, boat, traffic light, fire hydrant, stop sign, parking meter, baseball bat, tennis racket, "
           "wine glass, potted plant, dining table, cell phone, teddy bear, hair drier, hot dog, sports ball").split(", ")
PROTOCOL = "hadpo"


def question(word):
    return f"Is there {'an' if word[0] in 'aeiou' else 'a'} {word} in the image?"


def write_pope(folder, images, seed=0):
    """POPE's three files. The objects that are not there differ between splits, but overlap as often as in the real ones."""
    rng, rows = random.Random(seed), {split: [] for split in SPLITS.values()}
    for image in images:
        words = rng.sample(OBJECTS, len(OBJECTS))
        present, absent = words[:3], words[3:]
        asked = {"random": rng.sample(absent, 3), "popular": absent[:3], "adversarial": rng.sample(absent[:6], 3)}
        for split, objects in asked.items():
            for yes, no in zip(present, objects):
                rows[split] += [(image, question(yes), "yes"), (image, question(no), "no")]
    for split, questions in rows.items():
        with open(os.path.join(folder, f"coco_pope_{split}.json"), "w") as file:
            for n, (image, text, label) in enumerate(questions, start=1):
                file.write(json.dumps({"question_id": n, "image": image, "text": text, "label": label}) + "\n")


def pack(ours, folder, questions):
    """The packed rows that eval_pope.py makes of these questions, one per image → PackedDataset."""
    (system, suffix, _), by_image = PROTOCOLS[PROTOCOL], {}
    for image, text in questions:
        by_image.setdefault(image, []).append([(f"{IMAGE}\n{text}{suffix}", None)])
    examples = [Example(os.path.join(folder, image), conversations) for image, conversations in by_image.items()]
    return PackedDataset(examples, ours.tokenizer, ours.preprocess, ours.config.vision.num_patches, ours.config.max_length, system)


def time_ours(ours, folder, what, questions, tokens, batch_size=None, heads=None):
    """One run of `ask`, behind a warm-up on its first 32 images → Line, {question: text} of the first head."""
    def answers(questions):
        said = list(ask(ours.trunk, heads or {"base": ours.head}, ours.tokenizer, ours.preprocess, questions, folder, PROTOCOL,
                        tokens, batch_size).values())
        wrong = sum(len(text.split()) != tokens for s in said for text, _ in s.values())
        if wrong or any(s.keys() != set(questions) for s in said):
            raise SystemExit(f"answers are missing, or {wrong} of them are not {tokens} tokens long: their time would mean nothing")
        return said[0]

    first = set(list(dict.fromkeys(image for image, _ in questions))[:32])
    measure(lambda: answers([q for q in questions if q[0] in first]), ours.device, repeats=1, warm_up=0)
    measured = measure(lambda: answers(questions), ours.device, repeats=1, warm_up=0)
    dataset, positions = pack(ours, folder, questions), []
    for i in range(len(dataset)):
        row = dataset.row(i)
        positions += row.position + answer_positions([row.position[end] + 1 for end in row.ends], tokens)
    flops = decoder_flops(ours.config, positions) + tower_flops(ours.config, len(dataset))
    return Line(what, measured.seconds, len(questions), len(positions), flops, measured.memory), \
        {question: text for question, (text, _) in measured.result.items()}


def time_peer(ours, theirs, what, dataset, count, tokens, batch_size):
    """One run over the first `count` questions of the packed rows → Line, ids (count, tokens), first logits (count, vocab)."""
    sequences, pixels = [], {}
    for i in range(len(dataset)):
        row = dataset.row(i)
        sequences += [(ids, row.image) for ids in unpack(row)]
        if len(sequences) >= count:
            break
    sequences = sequences[:count]
    for _, image in sequences:
        pixels.setdefault(image, ours.preprocess(image))

    def answers(count):
        parts = [sequences[start:min(count, start + batch_size)] for start in range(0, count, batch_size)]
        inputs = (peer_inputs(ours, [ids for ids, _ in part], torch.stack([pixels[image] for _, image in part])) for part in parts)
        return [peer_generate(theirs, part, tokens) for part in inputs]

    answers(min(count, batch_size))
    measured = measure(lambda: answers(len(sequences)), ours.device, repeats=1, warm_up=0)
    positions = [p for ids, _ in sequences for p in range(len(ids) + tokens - 1)]
    flops = decoder_flops(ours.config, positions) + tower_flops(ours.config, len(sequences))
    ids, logits = (torch.cat(parts) for parts in zip(*measured.result))
    return Line(what, measured.seconds, len(sequences), len(positions), flops, measured.memory), ids, logits


def first_logits(ours, dataset, count):
    """Our logits of the first answer token of the first `count` questions, (count, vocab)."""
    rows, total = [], 0
    while total < count:
        total += len(dataset.examples[len(rows)].conversations)
        rows.append(len(rows))
    result, = answer(ours.trunk, [ours.head], dataset, 1, indices=rows, words=slice(None))
    return torch.cat([result[n][1] for n in rows])[:count]


def differ(what, one, other):
    print(f"{what}: {sum(a != b for a, b in zip(one, other))} of {len(one)} answers differ, "
          f"{sum(a[0] != b[0] for a, b in zip(one, other))} in their first token", flush=True)


def beside_the_peer(ours, folder, distinct, total, peak, args):
    """The main table, how time grows with questions and with tokens, and whether the answers agree."""
    theirs, size = peer_of(ours), args.batch_size
    dataset = pack(ours, folder, distinct)
    single, single_ids, single_logits = time_peer(ours, theirs, "transformers, one by one", dataset, args.peer_single, 10, 1)
    batched, ids, logits = time_peer(ours, theirs, f"transformers, batches of {args.peer_batch}", dataset, args.peer_batched, 10,
                                     args.peer_batch)
    once = replace(batched, what=batched.what + ", equal questions once", units=round(batched.units * total / len(distinct)))
    line, said = time_ours(ours, folder, "ours", distinct, 10, size)
    block = Head(ours.config, ours.config.block()).to(ours.device, ours.dtype)
    block.lm_head = ours.head.lm_head
    both, _ = time_ours(ours, folder, "ours, base and a checkpoint", distinct, 10, size, {"base": ours.head, "checkpoint": block})
    line.units = both.units = total
    line.peers = both.peers = (single, batched, once)
    print("\n" + table([single, batched, once, line, both], "answer", total, peak) + "\n")

    images, lines = list(dict.fromkeys(image for image, _ in distinct))[:32], []
    for n in (1, 2, 4, 8, 12):
        asked = [(image, question(word)) for image in images for word in OBJECTS[:n]]
        line, _ = time_ours(ours, folder, f"ours, questions about an image: {n}", asked, 10, size)
        lines.append(replace(line, units=len(images), peers=(replace(batched, units=batched.units / n),)))
    print("\n" + table(lines, "image", 1, peak) + "\n")

    asked, lines = [(image, question(word)) for image in images[:16] for word in OBJECTS[:10]], []
    for tokens in (10, 32, 128):
        peer, _, _ = time_peer(ours, theirs, f"transformers, {tokens} tokens", pack(ours, folder, asked), args.peer_batch, tokens,
                               args.peer_batch)
        line, _ = time_ours(ours, folder, f"ours, {tokens} tokens", asked, tokens, size)
        lines += [peer, replace(line, peers=(peer,))]
    print(table(lines, "answer", 1, peak) + "\n")

    theirs_said = [ours.tokenizer.decode(row).split() for row in ids.tolist()]
    ours_said = [said[q].split() for q in distinct[:len(ids)]]
    alone_said = [ours.tokenizer.decode(row).split() for row in single_ids.tolist()]
    differ("transformers alone against in batches", alone_said, theirs_said)
    differ("ours against transformers in batches", ours_said, theirs_said)
    agreement("logits of first tokens, transformers alone against in batches", single_logits, logits[:len(single_logits)],
              ours.dtype, control=True)
    agreement("logits of first tokens, ours against transformers in batches", first_logits(ours, dataset, len(logits)), logits,
              ours.dtype)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--size", choices=SIZES, default="7b")
    parser.add_argument("--images", type=int, default=500)
    parser.add_argument("--batch_size", type=int, help="images at once, ours; default: what fits")
    parser.add_argument("--peer_single", type=int, default=48, help="questions that the peer answers one by one")
    parser.add_argument("--peer_batched", type=int, default=512, help="questions that the peer answers in batches")
    parser.add_argument("--peer_batch", type=int, default=64, help="questions at once, peer")
    args = parser.parse_args(argv)
    alone = "TORCHELASTIC_RUN_ID" not in os.environ         # set by torchrun
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
        distinct = sorted(dict.fromkeys((q["image"], q["text"]) for q in rows), key=lambda q: q[0])
        if alone:
            print(f"{len(rows):,} questions, {len(distinct):,} distinct, about {args.images} images", flush=True)
            beside_the_peer(ours, folder, distinct, len(rows), peak, args)
        else:
            line, _ = time_ours(ours, folder, f"ours, {dist.get_world_size()} processes", distinct, 10, args.batch_size)
            line.units = len(rows)
            if dist.get_rank() == 0:
                print("\n" + table([line], "answer", len(rows), peak * dist.get_world_size())
                      + f"\n\n{len(rows) / line.seconds:,.0f} answers/s, {len(distinct) / line.seconds:,.0f} distinct questions/s")
            dist.barrier()                                  # the folder is rank 0's
            dist.destroy_process_group()


if __name__ == "__main__":
    main()
