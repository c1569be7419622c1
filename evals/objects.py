"""Which objects a text names, and which an image shows.

    words = read_words()                          # our list of COCO's 80 classes
    words = read_words("synonyms.txt")            # another list
    words.mentions("Two hot dogs near a bat.")    # [Mention("hot dog", 4, 12), Mention(…, 20, 23)]
    shown = read_annotations(["instances_val2014.json", "captions_val2014.json"], words)
    shown["COCO_val2014_000000000042.jpg"]        # {"dog", "person"}

A list has a class a line: its name, then synonyms, separated by commas. This is the public form.
`coco_objects.txt` is ours.

How words are matched. Upper and lower case are one, and a hyphen or an apostrophe is a space. Each
entry also matches with its last word in the plural (knife, knives; woman, women). At each word of
the text the longest entry wins and its words are used up, so a "hot dog" is no dog, and a "baseball
bat" is one object and not two. No entry reaches across a comma or a full stop. If two classes have
an entry in common, the class that stands first in the list gets it.

A line that begins with "-" holds what names no object: "toy car", "train station". A `_` at the end
of such an entry stands for any word but a small one (on, is, …), and that word is not used up:
after "orange _", an orange cat is a cat and no fruit, and an orange on a plate still is one. Both
are ours; public lists have neither.

Follows CHAIR (arXiv 1809.02156), which finds words likewise in texts and in captions. Deliberately
different: its programs bring each word to the singular with a library and keep their two-word names
in code. Ours needs no library, and all names stand in the list.
"""
import os
import re
from dataclasses import dataclass, field

from support.common import InputError, check_text, read_json
from support.common import field as value_of

OUR_LIST = os.path.join(os.path.dirname(os.path.abspath(__file__)), "coco_objects.txt")
IRREGULAR = {"mouse": "mice", "goose": "geese", "child": "children", "calf": "calves",
             "knife": "knives", "ox": "oxen", "foot": "feet", "shelf": "shelves"}
# After one of these words, "orange" was a thing and no colour.
SMALL = set("a an and are as at be being beside but by for from has hanging in inside into is it "
            "its lies lying near next of off on or resting sits sitting that the there to under "
            "was were which with".split())
STOP = "."              # stands between words that no entry may join


@dataclass(frozen=True)
class Mention:
    """A class that a text names, and where: text[start:end]."""
    name: str
    start: int
    end: int


@dataclass
class Words:
    """A list of classes, ready to be looked up."""
    classes: list                                   # their names, in the list's order
    entries: dict = field(default_factory=dict)     # {(word, ...): class, or None for no object}
    longest: int = 1                                # words of an entry

    def add(self, phrase, name):
        """Add an entry, in the singular and the plural."""
        tokens = [word.lower() for word, _, _ in split_words(phrase)]
        if phrase.strip().endswith(" _"):
            tokens.append("_")
        if not tokens:
            return
        for last in plurals(tokens[-1]):
            self.entries.setdefault((*tokens[:-1], last), name)
        self.longest = max(self.longest, len(tokens))

    def mentions(self, text):
        """All objects that a text names, in its order and as often as it names them."""
        tokens, found, i = split_words(text), [], 0
        words = [word.lower() for word, _, _ in tokens]
        while i < len(words):
            name, used = self.longest_entry(words, i)
            if name is not None:
                found.append(Mention(name, tokens[i][1], tokens[i + used - 1][2]))
            i += used
        return found

    def longest_entry(self, words, i):
        """The entry that begins at word i → its class (None: no object), how many words it uses."""
        for length in range(min(self.longest, len(words) - i), 0, -1):
            phrase = tuple(words[i:i + length])
            if phrase in self.entries:
                return self.entries[phrase], length
            if phrase[-1] not in SMALL and phrase[-1] != STOP and (*phrase[:-1], "_") in (
                    self.entries):
                return None, length - 1
        return None, 1


def split_words(text):
    """A text → [(word, start, end), ...], with a STOP where more than a space is between words."""
    found, end = [], 0
    for match in re.finditer(r"[^\W\d_]+", text):
        if found and not re.fullmatch(r"[\s'’-]+", text[end:match.start()]):
            found.append((STOP, end, end))
        found.append((match[0], *match.span()))
        end = match.end()
    return found


def plurals(word):
    """A noun → itself, and how its plural may be written."""
    forms = [word, word + "s"]
    if word in IRREGULAR:
        forms.append(IRREGULAR[word])
    elif word.endswith("man"):
        forms.append(word.removesuffix("man") + "men")
    elif re.search("(s|x|z|ch|sh|o)$", word):
        forms.append(word + "es")
    elif re.search("[^aeiou]y$", word):
        forms.append(word.removesuffix("y") + "ies")
    return forms


def list_of_words(names):
    """Words of a list of classes without synonyms."""
    words = Words(list(names))
    for name in names:
        words.add(name, name)
    return words


def read_words(path=OUR_LIST):
    """A list of classes and synonyms → Words. InputError where it holds none."""
    check_text(path)
    try:
        with open(path, encoding="utf-8-sig") as file:
            lines = [line.strip() for line in file if line.strip()]
    except UnicodeDecodeError as e:
        raise InputError(f"{path}: is no UTF-8 ({e}); save it as UTF-8") from e
    words = Words([])
    for line in lines:
        nothing = line.startswith("-")
        phrases = [phrase.strip() for phrase in line.removeprefix("-").split(",")]
        if not nothing:
            words.classes.append(phrases[0])
        for phrase in phrases:
            words.add(phrase, None if nothing else phrases[0])
    if not words.classes:
        raise InputError(f"{path}: names no class; it needs a class a line, with its synonyms "
                         "behind commas")
    return words


# ---- What images show ----------------------------------------------------------------------------


def annotation_files(paths, folder):
    """The annotation files that are meant: the files themselves, or those of a folder of COCO's.

    Of a folder those are taken that belong to the images' `folder`, e.g. val2014.
    """
    if len(paths) > 1 or not os.path.isdir(paths[0]):
        return paths
    there = sorted(os.listdir(paths[0]))
    name = os.path.basename(os.path.normpath(folder))
    found = [f"{kind}_{name}.json" for kind in ("instances", "captions")
             if f"{kind}_{name}.json" in there]
    if f"instances_{name}.json" not in found:
        raise InputError(f"{paths[0]}: holds no instances_{name}.json, which would tell what the "
                         f"images in {folder} show; name the files: --annotations instances_….json")
    return [os.path.join(paths[0], file) for file in found]


def read_annotations(paths, words):
    """COCO's instances_*.json and captions_*.json → {image's file name: set of classes}.

    An image shows what is marked in it and what its captions name. Images that only captions_*.json
    knows are left out, because captions tell only a part.
    """
    names, shown, captions = {}, {}, []         # id: file name; id: classes; (id, caption)
    for path in paths:
        value = read_json(path, dict)
        rows = value_of(value, "annotations", list, path, "all")
        if "categories" not in value:
            captions += [(value_of(row, "image_id", int, path, n),
                          value_of(row, "caption", str, path, n)) for n, row in enumerate(rows)]
            continue
        for n, row in enumerate(value_of(value, "images", list, path, "all")):
            names[value_of(row, "id", int, path, n)] = value_of(row, "file_name", str, path, n)
        classes = {}
        for n, row in enumerate(value["categories"]):
            name = value_of(row, "name", str, path, n)
            if name not in words.classes:
                raise InputError(f"{path}: knows a class {name!r}, for which the list of synonyms "
                                 "has no line; add one, or name another list with --synonyms")
            classes[value_of(row, "id", int, path, n)] = name
        for n, row in enumerate(rows):
            image, kind = (value_of(row, key, int, path, n) for key in ("image_id", "category_id"))
            if image not in names or kind not in classes:
                raise InputError(f"{path}, row {n}: image {image} or category {kind} is not in the "
                                 "file's own lists; is it whole?")
            shown.setdefault(image, set()).add(classes[kind])
    if not names:
        raise InputError(f"{', '.join(paths)}: hold no categories; one of COCO's instances_*.json "
                         "is needed")
    for image, caption in captions:
        shown.setdefault(image, set()).update(m.name for m in words.mentions(caption))
    return {os.path.basename(name): shown.get(image, set()) for image, name in names.items()}
