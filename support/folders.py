"""Folders of ours: written whole, put right after a kill, and never somebody else's.

    check_output(folder, CHECKPOINT_FILES)          # before training: may it be written there?
    put_right(folder, CHECKPOINT_FILES)             # what a killed save left half done
    replace_folder(folder, fill, CHECKPOINT_FILES)             # fill(partial) writes the new files
    names_of(["one/a", "two/a"], [])                # ["one-a", "two-a"]

A folder is written under a hidden name beside its own. The folder before gets another hidden name,
the new one takes its place, and the folder before is from then on FOLDER-old1, or the next free
number: nothing that was finished is lost. A kill at any moment leaves both whole, and `put_right`
ends what was begun. A folder with anything else in it than files of ours is refused. A symlink is
followed: the folder that it points to is written.
"""
import contextlib
import fnmatch
import itertools
import os
import shutil

from support.common import InputError, temporary


def old_name(folder):
    """What a folder will be called when another one takes its place."""
    numbers = itertools.count(1)
    names = (f"{folder}-old{number}" for number in numbers)
    return next(name for name in names if not os.path.lexists(name))


def hidden_names(real):
    """Where a folder is written, and where the one before waits: names that nobody else takes."""
    above, name = os.path.split(real)
    return (os.path.join(above, f".{name}.nanohadpo-new"),
            os.path.join(above, f".{name}.nanohadpo-old"))


def foreign_files(folder, own):
    """What lies in a folder and has no name of ours; a folder of ours is looked into.

    own: {name or pattern: None for a file, or the names inside of a folder}.
    """
    found = []
    for entry in os.scandir(folder):
        pattern = next((p for p in own if fnmatch.fnmatch(entry.name, p)), None)
        inside = own.get(pattern)
        if pattern is None or entry.is_symlink() or entry.is_dir() != (inside is not None):
            found.append(entry.name)
        elif inside is not None and inside != "*":
            names = foreign_files(entry.path, inside)
            found += [os.path.join(entry.name, name) for name in names]
    return sorted(found)


def check_only_ours(folder, own):
    """InputError where a folder holds anything that we did not write."""
    if not os.path.isdir(folder):
        raise InputError(f"{folder}: is a file, where a folder would be written; move it, or name "
                         "another folder")
    foreign = foreign_files(folder, own)
    if foreign:
        named = ", ".join(foreign[:5]) + (" …" if foreign[5:] else "")
        raise InputError(f"{folder}: holds {named}, which is not ours and would be lost; name a "
                         "new folder, for example one inside of it")


def check_output(folder, own):
    """Before long work: InputError where `folder` cannot be written, or holds what is not ours."""
    real = os.path.realpath(folder)
    if os.path.commonpath((real, os.getcwd())) == real:
        raise InputError(f"--output_dir {folder}: is the folder that you are in, or one above it; "
                         "name a folder in it")
    if os.path.ismount(real):
        raise InputError(f"--output_dir {folder}: is a mount point, which cannot be replaced as a "
                         f"whole; name a folder in it, e.g. {os.path.join(folder, 'run')}")
    put_right(folder, own)
    if os.path.lexists(real):
        check_only_ours(real, own)
    check_can_write(os.path.dirname(real))


def check_can_write(folder):
    """InputError where nothing can be written into a folder; folders that are missing are made."""
    try:
        os.makedirs(folder, exist_ok=True)
        path = temporary(os.path.join(folder, "nanohadpo"))
        with open(path, "wb") as file:
            file.write(bytes(4096))
        os.remove(path)
    except OSError as e:
        with contextlib.suppress(OSError, UnboundLocalError):
            os.remove(path)
        raise InputError(f"{folder}: cannot be written ({e.strerror}); name another folder, or "
                         "make room there") from e


def put_right(folder, own):
    """End or undo what a killed `replace_folder` left: the newest whole folder has the name."""
    real = os.path.realpath(folder)
    partial, old = hidden_names(real)
    for rest in (partial, old):
        if os.path.lexists(rest):
            check_only_ours(rest, own)
    if os.path.isdir(old) and not os.path.isdir(real):
        # The old folder had been renamed, so the new one was whole.
        os.rename(partial if os.path.isdir(partial) else old, real)
    if os.path.isdir(old):
        os.rename(old, old_name(real))
    if os.path.isdir(partial):
        shutil.rmtree(partial)


def replace_folder(folder, fill, own):
    """Write a folder with `fill(partial)`; an older one of ours gets its `old_name`. Atomic."""
    real = os.path.realpath(folder)
    put_right(folder, own)
    partial, old = hidden_names(real)
    if os.path.lexists(real):
        check_only_ours(real, own)
    try:
        os.makedirs(partial)
        fill(partial)
    except OSError as e:
        raise InputError(f"{partial}: cannot be written ({e.strerror}); make room there, or name "
                         "another folder") from e
    if not os.path.isdir(real):
        os.rename(partial, real)
        return
    os.rename(real, old)
    os.rename(partial, real)
    os.rename(old, old_name(real))


def discard(folder):
    """Remove a folder. Other processes see the whole folder or none, never a part of it."""
    if os.path.isdir(folder):
        gone = temporary(folder)
        os.rename(folder, gone)
        shutil.rmtree(gone)


def names_of(paths, taken):
    """A name for each path, unlike all others and unlike those `taken`: its last part, if it can.
    """
    names = [os.path.basename(path).partition("@")[0] for path in paths]
    if len(set(names)) < len(names):        # two runs may have a folder of the same name
        names = [path.replace("/", "-").lstrip(".-") for path in paths]
    used = set(taken)
    for n, (name, path) in enumerate(zip(names, paths, strict=True)):
        if name in used:
            name = os.path.abspath(path).replace("/", "-").lstrip("-")
        while name in used:
            name += "-2"
        names[n] = name
        used.add(name)
    return names
