"""What SHR's judge is told: an image's regions and facts, and the sentences to check.

    known = read_known("VG", "SHR")                 # Visual Genome's files and HA-DPO's
    text = prompt_of(known, "VG_100K/7.jpg", ["A dog runs", "It is red"])

Follows SHR of HA-DPO (arXiv 2311.16839) in its files and in what the judge may know. The
instructions are in our own words.
"""
import os
from dataclasses import dataclass

from support.common import InputError, check_text, field, id_text, progress, read_json, say
from support.hadpo import read_image_index
from training.conversations import CHUNK, parse_row, whole_objects

INSTRUCTIONS = """\
You check descriptions of an image that you cannot see. This is known about the image.

Regions, as [x1, y1, x2, y2]: what is there. The corners are shares of width and height. Boxes that
overlap much may be about the same thing.
{regions}

Facts, all of them true:
{facts}

These are the sentences to check:
{sentences}

Say of each sentence whether it is a hallucination (it contradicts what is known, or names something
that is not there), correct, or whether you cannot judge it from what is known, for example because
it tells a mood or a style. Answer with one line for each sentence and with nothing else, in the
form

1. hallucination: the reason in a few words
2. correct: the reason in a few words
3. cannot judge: the reason in a few words"""


@dataclass
class Known:
    """The images to describe, and what the judge may know of them."""
    folder: str
    images: dict             # {name in the folder: image id}
    regions: dict            # {image id: [line]}
    facts: dict              # {image id: [line]}


def read_known(vg_path, shr_path):
    """HA-DPO's list of images with Visual Genome's regions → Known."""
    paths = {os.path.relpath(path, vg_path): i for i, path in read_image_index(vg_path).items()}
    listed = os.path.join(shr_path, "val_images_final.json")
    wanted = [id_text(field(row, "image_id", (int, str), listed, n))
              for n, row in enumerate(read_json(listed, list))]
    name_of = {i: path for path, i in paths.items()}
    for n, image in enumerate(wanted):
        if image not in name_of:
            raise InputError(f"{listed}, row {n}: image_id {image} is not in "
                             f"{vg_path}/image_data.json; do both belong to the same data?")
    facts = {}
    for part in "shr_factual_part1.jsonl", "shr_factual_part2.jsonl":
        path = os.path.join(shr_path, part)
        for n, row in enumerate(read_json(path, lines=True)):
            if not isinstance(row, dict) or not all(isinstance(v, list) for v in row.values()):
                raise InputError(f"{path}, row {n}: should be an object with an image_id and a "
                                 "list of facts; mend or remove the row")
            facts |= {id_text(image): [str(fact) for fact in row[image]] for image in row}
    images = {name_of[i]: i for i in wanted}
    return Known(vg_path, images, read_regions(vg_path, set(wanted)), facts)


def rows_of(path):
    """The objects of a large JSON list, one after the other: all together would fill the memory."""
    rest, number, position = b"", 0, check_text(path)
    bar = progress(total=os.path.getsize(path), desc="regions", unit="B", unit_scale=True)
    with open(path, "rb") as file, bar:
        file.seek(position)
        while more := file.read(max(CHUNK, len(rest))):
            text, behind = rest + more, 0
            for begin, behind in whole_objects(text).tolist():
                yield parse_row(text[begin:behind], path, number)
                number += 1
            rest = text[behind:]
            bar.update(len(more))
    if rest.strip(b", \r\n\t") not in (b"]", b"[]"):
        raise InputError(f"{path}, row {number}: the list does not end behind it; was the download "
                         "cut short?")


def read_regions(vg_path, wanted):
    """Visual Genome's region_descriptions.json → {image id: ["[x1, y1, x2, y2]: phrase", ...]}."""
    sizes, lines = {}, {}
    path = os.path.join(vg_path, "image_data.json")
    for n, row in enumerate(read_json(path, list)):
        if id_text(row["image_id"]) in wanted:
            sizes[id_text(row["image_id"])] = [field(row, side, int, path, n)
                                               for side in ("width", "height")]
    path = os.path.join(vg_path, "region_descriptions.json")
    say(f"reading {path}")
    for n, row in enumerate(rows_of(path)):
        for region in field(row, "regions", list, path, n):
            image = id_text(field(region, "image_id", (int, str), path, n))
            if image not in wanted:
                break                               # all regions of a row are of one image
            x, y, w, h = (field(region, key, (int, float), path, n)
                          for key in ("x", "y", "width", "height"))
            width, height = sizes[image]
            box = x / width, y / height, (x + w) / width, (y + h) / height
            phrase = field(region, "phrase", str, path, n).strip()
            lines.setdefault(image, []).append(f"[{', '.join(f'{v:.2f}' for v in box)}]: {phrase}")
    lost = sorted(wanted - lines.keys())
    if lost:
        raise InputError(f"{path}: knows no region of {len(lost)} images, e.g. {lost[0]}; is the "
                         "file whole?")
    return lines


def prompt_of(known, image, sentences):
    """What the judge is told about an image and asked about its description."""
    number = known.images[image]
    numbered = [f"{n}. {sentence}." for n, sentence in enumerate(sentences, 1)]
    return INSTRUCTIONS.format(regions="\n".join(known.regions[number]),
                               facts="\n".join(known.facts.get(number, ["(none)"])),
                               sentences="\n".join(numbered))
