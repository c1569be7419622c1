"""Damages: what happens to files on their way here, done on purpose.

    for name, damage in damages("base/config.json", rng, 40):      # the same for the same rng
        damage()                                                   # the file is damaged now

Every file is cut, emptied, zeroed and overwritten in places; a folder, Git LFS's pointer and a web
page stand in its place. Of JSON the values are changed, too, anywhere within: another type, NaN,
numbers that are huge or negative, a name that is missing.
"""
import contextlib
import copy
import json
import os
import shutil
import signal
import traceback
from functools import partial

from support.common import LFS_POINTER, InputError

PAGE = b"<!DOCTYPE html>\n<html><head><title>404</title></head><body>Not found</body></html>\n"
POINTER = LFS_POINTER + b"v1\noid sha256:" + b"4d" * 32 + b"\nsize 12345\n"
# What stands in place of a value of JSON, as text. The last are no numbers, or none that can be.
VALUES = ("null", "true", "false", "0", "-1", "1", "2.5", "1e308", "1000000000000", "NaN",
          "Infinity", "-Infinity", '""', '"text"', '"7"', '"\\ud800"', '"a\\u0000b"', "[]", "[1]",
          "[[]]", "{}", '{"a": 1}', "1e999", "9" * 400, "9" * 5000)
DEEP = b"[" * 200_000
TYPES = (b"null", b"true", b"7", b'"text"', b"[]", b"[1, 2]", b"[null]", b"[[]]", b"{}",
         b'{"a": 1}', b'[{"a": 1}]', b"NaN", DEEP)
HOLE = "<value>"        # a text that no file holds
LIMIT = 60              # seconds, until a reader hangs


# ---- Bytes ---------------------------------------------------------------------------------------


def cut(data, rng):
    return data[:rng.randrange(1, max(2, len(data)))]


def longer(data, rng):
    return data + rng.randbytes(rng.randrange(1, 100))


def flipped(data, rng):
    """Some bytes are others; half of the time in the first kilobyte, where headers are."""
    changed, reach = bytearray(data), rng.choice((len(data), min(len(data), 1000)))
    for _ in range(rng.choice((1, 1, 3, 100))):
        changed[rng.randrange(reach)] ^= 1 << rng.randrange(8)
    return bytes(changed)


def zeroed(data, rng):
    """A block that was never written, as after a loss of power; its length stays."""
    begin = rng.randrange(len(data))
    end = min(len(data), begin + rng.choice((1, 64, 4096, len(data))))
    return data[:begin] + bytes(end - begin) + data[end:]


def turned(data, rng):
    """Two stretches have changed places."""
    at = rng.randrange(len(data))
    return data[at:] + data[:at]


BYTES = {"cut": cut, "longer": longer, "bytes flipped": flipped, "zeros": zeroed, "turned": turned}
WHOLE = {"empty": b"", "a pointer of Git LFS": POINTER, "a web page": PAGE}


# ---- JSON ----------------------------------------------------------------------------------------


def places(value, path=()):
    """Where in a JSON value its values stand: paths of keys."""
    found = [path] if path else []
    items = value.items() if isinstance(value, dict) else \
        enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        found += places(inner, (*path, key))
    return found


def replaced(value, path, new):
    """A copy with one value replaced."""
    value = inner = copy.deepcopy(value)
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = new
    return value


def without(value, path):
    value = inner = copy.deepcopy(value)
    for key in path[:-1]:
        inner = inner[key]
    del inner[path[-1]]
    return value


def changed_json(data, rng):
    """(name, bytes) of a JSON file, or one of a row a line, in which a value is another."""
    text = data.decode()
    lines = text.splitlines()
    in_lines = len(lines) > 1 and lines[0].startswith("{") and lines[0].endswith("}")
    values = [json.loads(line) for line in lines] if in_lines else [json.loads(text)]
    n = rng.randrange(len(values))
    found = places(values[n])
    # Rows are many and alike: every depth gets its share.
    depth = rng.choice(sorted({len(path) for path in found}))
    path = rng.choice([path for path in found if len(path) == depth])
    where = ".".join(map(str, path))
    if rng.random() < 0.15:
        name, values[n] = f"{where} is missing", without(values[n], path)
        new = HOLE
    else:
        new = rng.choice(VALUES)
        name, values[n] = f"{where} is {new[:20]}", replaced(values[n], path, HOLE)
    texts = [json.dumps(value).replace(json.dumps(HOLE), new) for value in values]
    return name, "\n".join(texts).encode()


# ---- All of them ---------------------------------------------------------------------------------


def damages(path, rng, count):
    """`count` damages of the file at `path` → [(name, function that damages it)]."""
    with open(path, "rb") as file:
        data = file.read()
    is_json = path.endswith((".json", ".jsonl"))
    made = [(name, partial(write, path, content)) for name, content in WHOLE.items()]
    made.append(("a folder", partial(make_folder, path)))
    made.append(("is missing", partial(remove, path)))
    if is_json:
        made += [(f"JSON: {content[:12].decode()}", partial(write, path, content))
                 for content in rng.sample(TYPES, 3)]
    for n in range(len(made), count):
        if is_json and n % 3:
            name, content = changed_json(data, rng)
        else:
            name = list(BYTES)[n // (3 if is_json else 1) % len(BYTES)]
            content = BYTES[name](data, rng)
        made.append((name, partial(write, path, content)))
    return made[:count]


def write(path, content):
    with open(path, "wb") as file:
        file.write(content)


def make_folder(path):
    remove(path)
    os.makedirs(path)


def remove(path):
    if os.path.isdir(path):
        shutil.rmtree(path)
    elif os.path.lexists(path):
        os.remove(path)


# ---- Reading what is damaged --------------------------------------------------------------------


class Hang(BaseException):
    """So that nothing takes it for an error of a file."""


def hangs(*_):
    raise Hang(f"no end within {LIMIT} s")


def outcome(read, right, checked):
    """What comes of reading a damaged file → (column, what was said)."""
    signal.signal(signal.SIGALRM, hangs)
    signal.alarm(LIMIT)
    try:
        found = read()
    except InputError as e:
        said = str(e).rpartition("InputError: ")[2].strip()
        return ("faults" if "\n" in said else "refused"), said
    except BaseException as e:
        place = traceback.extract_tb(e.__traceback__)[-1]
        ours = [f for f in traceback.extract_tb(e.__traceback__) if "site-packages" not in f[0]]
        at = " < ".join(f"{os.path.basename(f[0])}:{f[1]}" for f in (place, *ours[:-4:-1]))
        return "faults", f"{type(e).__name__}: {str(e)[:200]!r} at {at}"
    finally:
        signal.alarm(0)
    if found == right:
        return "right", ""
    return ("faults", "silently another result") if checked else ("another value", "")


def try_damages(named, sound, rng, count):
    """A kind of file, damaged `count` times → rows of (its name, damage, column, said).

    `named`: name and Format (bench/readers.py). `sound`: the folder that is copied each time.
    """
    name, kind = named
    with open(os.devnull, "w") as null, contextlib.redirect_stdout(null):
        for number in (1, 2):
            os.dup2(null.fileno(), number)
        with copied(sound):
            found = damages(kind.path, rng, count)
            right = kind.read()
        for damage, do in found:
            with copied(sound):
                do()
                yield name, damage, *outcome(kind.read, right, kind.checked)


@contextlib.contextmanager
def copied(sound):
    """Inside, one is in a copy of the folder `sound`."""
    folder = f"{sound}-{os.getpid()}"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(sound, folder)
    before = os.getcwd()
    os.chdir(folder)
    try:
        yield folder
    finally:
        os.chdir(before)
        shutil.rmtree(folder, ignore_errors=True)
