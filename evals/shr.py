"""SHR: how many sentences of a description are hallucinations, as a judge sees it?

    python -m evals.shr tiny/base --judge truth           # the tiny base that comes with the code
    python -m evals.shr out/stage2 --judge truth          # what train.py has made
    python -m evals.shr CKPT --vg_path VG --shr_path SHR \\
        --judge_url http://localhost:8000/v1 --judge_model NAME     # key: OPENAI_API_KEY
    python -m evals.shr --score responses.json --vg_path VG --shr_path SHR --judge_url … …

Asks base and checkpoints for descriptions, "Describe this image in detail.", with 5 beams and at
most 512 tokens. A description is split at full stops; repeats, and sentences that an earlier one
contains, are dropped. A judge sees what Visual Genome knows of the image's regions, further facts,
and the numbered sentences, and says of each whether it is a hallucination, correct, or cannot be
judged. SHR is the share of hallucinations among all of these, over all images together.

Files: Visual Genome's image_data.json, region_descriptions.json and images in --vg_path; HA-DPO's
val_images_final.json and shr_factual_part1.jsonl, shr_factual_part2.jsonl in --shr_path. Everything
that the judge said is written to CKPT/shr. Replies whose lines do not fit the sentences are counted
and named and are no part of the ratio. What was judged is kept: the same command asks the rest.

Follows SHR of HA-DPO (arXiv 2311.16839, opendatalab/HA-DPO). Deliberately different: the judge's
instructions are in our words, it is any model behind an OpenAI-compatible server, which is asked
with temperature 0, and images with long lists of regions are not skipped. Different judges give
different numbers: compare only what one judge said.

The tiny world has its own judge, `--judge truth`: a sentence that names a class or a scene that is
not there is a hallucination, one that names only what is there is correct.
"""
import os
import re
from collections import Counter
from dataclasses import asdict, dataclass, field

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # spinning threads stall where cores are shared

from checkpoints.load import checkpoints_among
from evals.describe import (
    Asking,
    describe,
    existing,
    flags,
    write_metrics,
)
from evals.judge import judge_of, replies
from evals.regions import prompt_of, read_known
from support.command_line import Parser
from support.common import InputError, Number, check_file, progress, read_json, run_program, say
from support.common import field as value_of
from support.folders import check_can_write
from support.outputs import Journal, check_output_folder, digest, write_rows
from support.processes import end_processes, start_processes
from support.questions import find_images
from tiny.pictures import SCENES
from tiny.places import shipped_base, world_beside
from tiny.world import hallucinated

VERDICTS = "hallucination", "correct", "cannot judge"
TINY_IMAGES = 200           # as many as HA-DPO's list has


# ---- Sentences and verdicts ----------------------------------------------------------------------


def sentences_of(text):
    """A description's sentences, without those that are a part of an earlier one."""
    kept = []
    for sentence in (part.strip() for part in text.split(".")):
        if sentence and not any(sentence in earlier for earlier in kept):
            kept.append(sentence)
    return kept


def verdicts_of(reply, count):
    """A judge's reply → `count` verdicts, or None where its lines do not fit the sentences."""
    found = {}
    for line in reply.splitlines():
        match = re.match(r"\W*(\d+)\W+(hallucination|correct|cannot judge)\b", line, re.I)
        if not match:
            continue
        number = int(match[1])
        if number in found:
            return None
        found[number] = match[2].lower()
    if sorted(found) != list(range(1, count + 1)):
        return None
    return [found[number] for number in range(1, count + 1)]


@dataclass
class Judgement:
    """What became of one description."""
    sentences: list
    verdicts: list = None                           # None: the reply did not fit, or none came
    reply: str = None
    tried: list = field(default_factory=list)       # what came in the tries before


def measure(judgements):
    """{image: Judgement} → SHR in percent, and the counts that it is made of."""
    count = Counter(v for one in judgements.values() for v in one.verdicts or ())
    total, rows = count.total(), list(judgements.values())
    return {"shr": 100 * count["hallucination"] / max(1, total),
            **{verdict.replace(" ", "_"): count[verdict] for verdict in VERDICTS},
            "sentences_per_image": sum(len(one.sentences) for one in rows) / max(1, len(rows)),
            "images": len(rows), "unfit": sum(one.verdicts is None for one in rows)}


def table(metrics):
    lines = ["| model | SHR | hallucination | correct | cannot judge | sentences per image | "
             "images | of these without judgement |", "|---" * 8 + "|"]
    for name, row in metrics.items():
        cells = [f"{v}" if isinstance(v, int) else f"{v:.2f}" for v in row.values()]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


# ---- Judging -------------------------------------------------------------------------------------


def by_truth(texts, truth):
    """The tiny world's own judge: {image: text}, {image: what it shows} → {image: Judgement}."""
    judged = {}
    for image, text in texts.items():
        there, verdicts = truth[image], []
        for sentence in sentences_of(text):
            known = {*there["objects"], *SCENES}
            named = set(re.findall("[a-z]+", sentence.lower())) & known
            scenes = named & {*SCENES}
            false = hallucinated(sentence, there["objects"]) or scenes - {there["scene"]}
            verdicts.append("hallucination" if false else "correct" if named else "cannot judge")
        judged[image] = Judgement(sentences_of(text), verdicts)
    return judged


def by_server(texts, known, judge, journal):
    """The judgements of a server, kept in the journal as they come → {model: {image: Judgement}}.

    What the server did not answer at all is not kept, so that the same command asks it again.
    """
    judged = {name: {image: Judgement(sentences_of(text)) for image, text in said.items()}
              for name, said in texts.items()}
    for row in journal.read():
        one = judged[row["model"]][row["image"]]
        one.reply, one.tried = row["reply"], row["tried"]
    total = sum(map(len, judged.values()))
    prompts = {(name, image): prompt_of(known, image, one.sentences)
               for name, rows in judged.items() for image, one in rows.items()
               if one.reply is None and one.sentences}
    if len(prompts) < total:
        say(f"{len(prompts)} of {total} descriptions are left to judge")
    bar = progress(replies(judge, prompts) if prompts else (), "judging", total=len(prompts))
    with journal.kept_on_interrupt(total, "descriptions"):
        for (name, image), reply in bar:
            one = judged[name][image]
            one.reply, one.tried = reply.text, reply.tried
            if reply.text is not None:
                journal.add({"model": name, "image": image, "reply": reply.text,
                             "tried": reply.tried})
    for rows in judged.values():
        for one in rows.values():
            if one.reply is not None or not one.sentences:
                one.verdicts = verdicts_of(one.reply or "", len(one.sentences))
    return judged


# ---- One evaluation ------------------------------------------------------------------------------


def evaluate(args):
    """Describe, judge, print the table, write the files. On rank 0 → {model: {image: Judgement}}.
    """
    if bool(args.checkpoints) == bool(args.score):
        raise InputError("name checkpoints to ask, or else texts that exist: --score FILE")
    for path in args.score or ():
        check_file(path)
    if args.checkpoints:
        start_processes()
        args.checkpoints = checkpoints_among(args.checkpoints)
    world, beside = world_beside((args.checkpoints or [shipped_base()])[0])
    output = args.output_dir or os.path.join(beside, "shr")
    check_output_folder(output, "--output_dir")
    if args.judge == "truth":
        judge, known, truth = None, None, read_truth(world, args)
        folder, called = find_images(None, None, world), {image: image for image in truth}
    else:
        judge = judge_of(args)
        if not args.vg_path or not args.shr_path:
            raise InputError("name the judge's knowledge: --vg_path and --shr_path; in the tiny "
                             "world, --judge truth")
        known = read_known(args.vg_path, args.shr_path)
        folder, called = known.folder, {i: image for image, i in known.images.items()}
    images = list(called.values())[:args.num_images]
    if args.score:
        said = existing(args.score, called | {image: image for image in images}, images)
    else:
        said = describe(args, images, folder, output)
    if said is None:
        return None

    journals = [journal for journal in [said.journal] if journal]
    if judge is None:
        judged = {name: by_truth(texts, truth) for name, texts in said.texts.items()}
    else:
        journals.append(judging_journal(output, said.texts, known, judge))
        judged = by_server(said.texts, known, judge, journals[-1])
    metrics = {name: measure(rows) for name, rows in judged.items()}
    by = f"judge {args.judge if judge is None else judge.model}"
    print(f"\n{said.told}; {by}\n\n{table(metrics)}")
    write(output, judged, said, {"judge": by, "metrics": metrics})
    unanswered = tell_lost(judged)
    if not unanswered:
        for journal in journals:
            journal.remove()
    return judged


def read_truth(world, args):
    """The tiny world's images and what they show → {image: {"scene", "objects"}}."""
    path = os.path.join(world, "world.json")
    truth = value_of(read_json(path, dict), "evaluation", dict, path, "all")
    for image, facts in truth.items():
        value_of(facts, "scene", str, path, image)
        value_of(facts, "objects", list, path, image)
    return dict(list(truth.items())[:args.num_images or TINY_IMAGES])


def judging_journal(output, texts, known, judge):
    """The journal of what this judge says of these texts, knowing this."""
    prompts = [[name, image, prompt_of(known, image, sentences_of(text))]
               for name, said in texts.items() for image, text in said.items()]
    return Journal(output, {"judge": judge.model, "temperature": judge.temperature,
                            "prompts": digest(prompts)})


def tell_lost(judged):
    """Name the descriptions that are no part of the ratio → how many were not answered at all."""
    unanswered = 0
    for name, rows in judged.items():
        lost = [image for image, one in rows.items() if one.verdicts is None]
        silent = [image for image in lost if rows[image].reply is None]
        unfit = [image for image in lost if rows[image].reply is not None]
        if unfit:
            print(f"{name}: the judge's lines do not fit the sentences of {len(unfit)} images, "
                  f"which do not count: {', '.join(unfit)}")
        if silent:
            print(f"{name}: the judge did not answer about {len(silent)} images, which do not "
                  f"count; the same command asks again: {', '.join(silent)}")
        unanswered += len(silent)
    return unanswered


def write(folder, judged, said, values):
    """A JSONL file per model with all replies, and metrics.json."""
    check_can_write(folder)
    for name, rows in judged.items():
        write_rows(os.path.join(folder, f"{name}.jsonl"),
                   [{"image": image, "answer": said.texts[name][image]} | asdict(one)
                    for image, one in rows.items()])
    write_metrics(folder, said, values)
    print(f"\ndescriptions, replies and metrics.json: {folder}")


def parser():
    parser = Parser(__doc__)
    flags(parser, Asking(system_prompt="hadpo", num_beams=5))
    add = parser.add_argument
    add("--vg_path", help="Visual Genome: image_data.json, region_descriptions.json, VG_100K[_2]")
    add("--shr_path", help="HA-DPO's val_images_final.json and shr_factual_part{1,2}.jsonl")
    add("--judge", choices=("server", "truth"), default="server",
        help="a language model behind --judge_url, or the tiny world's own truth")
    add("--judge_url", metavar="URL",
        help="an OpenAI-compatible server, e.g. http://localhost:8000/v1")
    add("--judge_model", metavar="NAME", help="its model; the key is read from OPENAI_API_KEY")
    add("--judge_timeout", type=Number("--judge_timeout", float, above=0), default=300.0,
        help="seconds for one answer")
    add("--judge_at_once", type=Number("--judge_at_once", int, above=0), default=8,
        help="requests at the same time")
    add("--num_images", type=Number("--num_images", int, above=0),
        help=f"the first so many; default: all of the list, {TINY_IMAGES} in the tiny world")
    add("--output_dir", help="for replies and numbers; default: CKPT/shr of the first checkpoint; "
        "out/shr for tiny/base")
    return parser


def main():
    evaluate(parser().parse_args())
    end_processes()


if __name__ == "__main__":
    run_program(main)
