"""What a page of the documentation says: its counts, places, links, commands and messages.

    corrected(text)                   # the page with counts and places as the files are now
    broken_links(name, text)          # and wrong_in(command), unknown_messages(text)
    differences(page, ours, theirs)   # between a page and its translation

A line count is `| \\`file\\` | N |`. A place is `file.py:N`, and the next `code` behind it, in the
same line of the page, stands in that line of the file. A page's translation is README.zh.md or
docs/zh/PAGE.md.
"""
import ast
import functools
import os
import re
import shlex
from glob import glob

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
METHOD = ["llama.py", "clip_vit.py", "post_decoder.py", "data.py", "model.py", "dpo.py",
          "train.py", "eval_pope.py"]                                   # in reading order
FOLDERS = ["support", "checkpoints", "training", "tiny", "evals", "tools", "bench", "docs"]
FOREIGN = {"pytest", "sglang.launch_server"}    # of others, which a page starts with python -m
COUNT = re.compile(r"^\| `([\w/.]+)` \| (\d+) \|", re.M)
PLACE = re.compile(r"`([\w/]+\.py):(\d+)`")
PLACE_AND_CODE = re.compile(PLACE.pattern + r"([^`\n]*)`([^`\n]+)`")
BLOCK = re.compile(r"^```.*?\n(.*?)^```", re.M | re.S)
INLINE = re.compile(r"`([^`\n]+)`")
LINK = re.compile(r"(!?)\[[^][]*\]\(([^)\s]+)\)")
COMMAND = re.compile(r"(?:\w+=\S* )?((?:python|deepspeed|torchrun|pip|ruff|git|printf) .*)")


def under(pattern):
    """Paths below the repository's root."""
    return sorted(os.path.relpath(path, ROOT) for path in glob(os.path.join(ROOT, pattern)))


def read(name):
    with open(os.path.join(ROOT, name), encoding="utf-8") as file:
        return file.read()


def exists(name):
    return os.path.exists(os.path.join(ROOT, name))


def translation(name):
    return "README.zh.md" if name == "README.md" else name.replace("docs/", "docs/zh/")


ENGLISH = ["README.md", *under("docs/*.md")]
PAGES = [*ENGLISH, *filter(exists, map(translation, ENGLISH))]
MODULES = [name for folder in FOLDERS for name in under(f"{folder}/*.py")
           if not name.endswith("__init__.py")]


# ---- What a page says ----------------------------------------------------------------------------


def corrected(text):
    """A page with counts and places as the files are now. A place moves to the nearest line that
    holds its code.
    """
    def count(match):
        assert exists(match[1]), f"{match[1]}: there is no such file"
        return f"| `{match[1]}` | {len(read(match[1]).splitlines())} |"

    def place(match):
        file, said, between, code = match[1], int(match[2]), match[3], match[4]
        assert exists(file), f"{file}: there is no such file"
        lines = [n for n, line in enumerate(read(file).splitlines(), start=1) if code in line]
        assert lines, f"{file} holds no line with {code!r}: name what stands there now"
        return f"`{file}:{min(lines, key=lambda n: abs(n - said))}`{between}`{code}`"

    places = len(PLACE.findall(text)), len(PLACE_AND_CODE.findall(text))
    assert places[0] == places[1], "a place without the code that stands there"
    return COUNT.sub(count, PLACE_AND_CODE.sub(place, text))


def prose(text):
    return BLOCK.sub("", text)


def headings(text):
    """The anchors that GitHub gives to the headings of a page."""
    found = []
    for line in re.findall(r"^#{1,6} (.+)$", prose(text), re.M):
        anchor = re.sub(r"[^\w\- ]", "", line.strip().lower()).replace(" ", "-")
        earlier = sum(re.fullmatch(re.escape(anchor) + r"(-\d+)?", one) is not None
                      for one in found)
        found.append(f"{anchor}-{earlier}" if earlier else anchor)
    return found


def links(name, text):
    """[(is a picture, path from the root, heading or "")] of a page's links into the repository."""
    found = []
    for picture, target in LINK.findall(INLINE.sub("", prose(text))):
        if not re.match(r"\w+:", target):
            path, _, heading = target.partition("#")
            file = os.path.join(os.path.dirname(name), path) if path else name
            found.append((bool(picture), os.path.normpath(file), heading))
    return found


def broken_links(name, text):
    wrong = []
    for _, path, heading in links(name, text):
        if path != name and not exists(path):
            wrong.append(f"{path}: there is no such file")
        elif heading and heading not in headings(text if path == name else read(path)):
            wrong.append(f"{path}#{heading}: there is no such heading")
    return wrong


def commands(text):
    """The commands of a page: those in blocks, one by one and without comments; and those in
    prose.
    """
    in_blocks = []
    for block in BLOCK.findall(text):
        for line in block.replace("\\\n", " ").splitlines():
            for part in re.split(r" && |; ", re.sub(r"\s#\s.*", "", line)):
                if match := COMMAND.fullmatch(part.strip()):
                    in_blocks.append(" ".join(match[1].split()))
    in_prose = {match[1] for code in INLINE.findall(prose(text))
                for part in code.split(" && ") if (match := COMMAND.fullmatch(part))}
    return in_blocks, in_prose


@functools.cache
def flags(program):
    """Flags that a program declares, itself or in a module of ours that it imports, but not in that
    one's own main().
    """
    files, text = [program], read(program)
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ImportFrom):
            files.append(node.module.replace(".", "/") + ".py")
    declared = r'\badd(?:_argument|_number)?\(\s*"(--\w+)"'
    texts = [read(file).partition("\ndef main(")[0] for file in files if exists(file)]
    return set(re.findall(declared, text + "".join(texts)))


def wrong_in(command):
    """What a command names that is not there: its program, or a flag of it."""
    words = shlex.split(command.replace("…", " "))
    if words[0] not in ("python", "deepspeed", "torchrun"):
        return []
    if "-m" in words[:2]:
        at, module = 2, words[2]
        program = module if module in FOREIGN else module.replace(".", "/") + ".py"
    else:
        at, program = next(((n, word) for n, word in enumerate(words) if word.endswith(".py")),
                           (0, None))
    if program is None or program in FOREIGN:
        return [] if len(words) == 1 or program else [f"{command}: starts no program of ours"]
    if not exists(program):
        return [f"{command}: there is no {program}"]
    named = [word.partition("=")[0].replace("--no-", "--") for word in words[at + 1:]]
    return [f"{command}: {program} has no {flag}" for flag in named
            if flag.startswith("--") and flag not in flags(program)]


def strings(tree):
    """All texts of a program, `…` for what an f-string fills in."""
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            yield "".join(part.value if isinstance(part, ast.Constant) else "…"
                          for part in node.values)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value


@functools.cache
def texts_of_the_code():
    return [text for name in [*METHOD, *MODULES] for text in strings(ast.parse(read(name)))]


def unknown_messages(text):
    """Messages in the first column of a page's tables that no program prints."""
    cells = re.findall(r"^\| (.+?) \| ", prose(text), re.M)
    said = [message for cell in cells for message in INLINE.findall(cell)]
    patterns = {one: ".*".join(map(re.escape, map(str.strip, one.split("…")))) for one in said}
    return [one for one, pattern in patterns.items()
            if not any(re.search(pattern, text, re.S) for text in texts_of_the_code())]


def facts(name, text):
    """What must not differ between a page and its translation: {kind: what the page says}."""
    english = {translation(page): page for page in ENGLISH}
    found = links(name, text)
    pages = [english.get(path, path) for picture, path, _ in found if not picture]
    itself = {english.get(name, name)}                          # the link to the other language
    in_blocks, in_prose = commands(text)
    return {"line counts": [file for file, _ in COUNT.findall(text)],
            "places": [(match[0], match[3]) for match in PLACE_AND_CODE.findall(text)],
            "pictures": [path for picture, path, _ in found if picture],
            "links": sorted(set(pages) - itself),
            "commands": in_blocks, "commands in prose": sorted(in_prose),
            "files": sorted(set(re.findall(r"`([\w/]+\.(?:py|json|txt|toml|html))`", prose(text))))}


def differences(page, ours, theirs):
    ours, theirs = facts(page, ours), facts(translation(page), theirs)
    return {kind: (ours[kind], theirs[kind]) for kind in ours if ours[kind] != theirs[kind]}
