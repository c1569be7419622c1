"""POPE's question files, of whatever data set and under whatever name, and other lists of rows.

    files = question_files("POPE/output/coco")                # {"random": path, "popular": …}
    files = question_files(["gqa_pope_seem_random.json"])     # the split follows from the name
    rows = read_pope(path)              # [{"question_id", "image", "text", "label"}, …]
    rows = read_list(path)              # a row per line, or one list of rows

POPE (arXiv 2305.10355) publishes files for COCO, A-OKVQA and GQA, and others spread them with
other names and forms. All of these are read: a row per line or one list, `text` or `question`,
yes and no in capitals.
"""
import argparse
import os
import re
from fnmatch import fnmatchcase

from support.common import InputError, check_file, check_text, field, read_json
from support.images import below

SPLITS = {"random": "random", "popular": "popular", "adv": "adversarial"}      # --set → POPE's name
FOLDERS = "", "output/coco", "coco"         # where POPE's files lie in its repository


# ---- Which files ---------------------------------------------------------------------------------


def question_files(pope_path, sets=None):
    """Which file holds which split → {split: path}.

    `pope_path` is a folder, a file, or a list of one folder or of files. `sets` are keys of SPLITS,
    None means all that there are in the files, and all three in a folder.
    """
    paths = [pope_path] if isinstance(pope_path, str) else pope_path
    folders = [path for path in paths if os.path.isdir(path)]
    if folders and len(paths) > 1:
        raise InputError(f"{folders[0]}: is a folder; --pope_path names one folder, or files")
    is_file = os.path.isfile(paths[0]) or os.path.splitext(paths[0])[1]
    if folders or len(paths) == 1 and not is_file:
        return files_in(paths[0], [SPLITS[name] for name in sets or SPLITS])
    return named_files(paths, sets)


def files_in(folder, splits):
    """POPE's files of these splits in a folder: all must be there, and be of one data set."""
    if not os.path.isdir(folder):
        raise InputError(f"{folder}: no such folder; --pope_path names POPE's folder, or its files")
    for inside in FOLDERS:
        place = os.path.join(folder, inside) if inside else folder
        names = sorted(os.listdir(place)) if os.path.isdir(place) else []
        found = [(split, name) for split in splits for name in names
                 if fnmatchcase(name.lower(), f"*pope*_{split}.json")]
        sets = {name[:-len(f"_{split}.json")] for split, name in found}
        if len(sets) > 1:
            raise InputError(f"{place}: holds questions of several data sets ("
                             f"{', '.join(name for _, name in found)}); name the files to ask: "
                             f"--pope_path {os.path.join(place, found[0][1])} …")
        if found:
            missing = [split for split in splits if split not in dict(found)]
            if missing:
                raise InputError(f"{place}: holds no {sets.pop()}_{missing[0]}.json; --set names "
                                 "the splits to ask")
            return {split: os.path.join(place, name) for split, name in found}
    raise InputError(f"{folder}: holds no coco_pope_{splits[0]}.json and no other "
                     f"*pope*_{splits[0]}.json (also not in output/coco); --pope_path names "
                     "POPE's folder, or its files")


def split_name(text):
    """An argparse type: the word of --set for a split, whichever of its two names was typed."""
    for short, name in SPLITS.items():
        if text in (short, name):
            return short
    raise argparse.ArgumentTypeError(f"{text!r}: choose from {', '.join(SPLITS.values())}")


def named_files(paths, sets):
    """The files that the user named: a name may end with its split, else it is the split's name."""
    for path in paths:
        check_file(path)
    stems = {path: os.path.splitext(os.path.basename(path))[0] for path in paths}
    split_of = {}
    for path, stem in stems.items():
        found = re.search(r"(?<![a-z])(random|popular|adv|adversarial)$", stem.lower())
        split_of[path] = SPLITS.get(found[1], found[1]) if found else stem
    if sets:
        chosen = {SPLITS[name] for name in sets}
        odd = next((path for path, split in split_of.items() if split not in SPLITS.values()), None)
        if odd:
            raise InputError(f"{odd}: its name ends with none of {', '.join(SPLITS.values())}, so "
                             "--set cannot choose it; leave --set out")
        split_of = {path: split for path, split in split_of.items() if split in chosen}
        if not split_of:
            raise InputError(f"{paths[0]}: --set {' '.join(sets)} leaves none of the named files; "
                             "leave --set out, or name other files")
    if len(set(split_of.values())) < len(split_of):         # one split of two data sets
        split_of = {path: stems[path] for path in split_of}
    if len(set(split_of.values())) < len(split_of):
        raise InputError(f"{', '.join(split_of)}: have the same name, which would be one table; "
                         "evaluate them one after the other, each with its --output_dir")
    return {split: path for path, split in split_of.items()}


def find_images(image_folder, coco_path, world):
    """The folder that the questions' images lie in: as one of the flags says, else the world's."""
    if image_folder and coco_path:
        raise InputError(f"--image_folder {image_folder}: names the images already; leave "
                         "--coco_path out")
    folder = image_folder or os.path.join(coco_path or os.path.join(world, "coco"), "val2014")
    if not os.path.isdir(folder):
        raise InputError(f"{folder}: no such folder; --coco_path names the folder that holds "
                         "val2014, --image_folder the images' own")
    return folder


# ---- Rows ----------------------------------------------------------------------------------------


def read_list(path, *names):
    """The rows of a file: one per line, or one JSON list, indented or not.

    InputError if there are none, or if a row has no text under one of the `names`.
    """
    start = check_text(path)
    with open(path, "rb") as file:
        file.seek(start)
        begins = file.read(4096)
    if begins.lstrip().startswith(b"["):
        rows = read_json(path, list)
    else:
        rows = read_lines(path)
    if not rows:
        empty = "is empty; was the download cut short?"
        raise InputError(f"{path}: {'holds an empty list' if begins.strip() else empty}")
    for n, row in enumerate(rows):
        for name in names:
            field(row, name, str, path, n)
    return rows


def read_lines(path):
    """A JSON value per line. InputError tells a damaged line from a file of another form."""
    try:
        return read_json(path, lines=True)
    except InputError as damaged:
        try:
            value = read_json(path)
        except InputError:
            raise damaged from None
    about = f" ({', '.join(map(repr, list(value)[:4]))} …)" if isinstance(value, dict) else ""
    raise InputError(f"{path}: is one JSON {type(value).__name__}{about}, where a row per line or "
                     "a list of rows should be; is it the right file?")


def read_pope(path, split=None):
    """A question file → [{"question_id", "image", "text", "label"}, …]; label is yes or no.

    `split`: the one to read where `path` is POPE's folder.
    """
    if split:
        path = files_in(path, [split])[split]
    rows = []
    for n, row in enumerate(read_list(path)):
        image = field(row, "image", str, path, n)
        below(None, image, f"{path}, row {n}")          # the folder is not known yet
        name = "question" if row.get("text") is None and "question" in row else "text"
        text, label = field(row, name, str, path, n), field(row, "label", str, path, n)
        if label.strip().lower() not in ("yes", "no"):
            raise InputError(f"{path}, row {n}: label {label!r} is neither yes nor no; mend or "
                             "remove the row")
        rows.append(row | {"text": text, "label": label.strip().lower()})
    return rows
