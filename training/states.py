"""The states in OUTPUT_DIR.run: which one is the latest, and whether it is what was saved.

    state = read_latest("out/stage2.run")               # "step-40", or None
    json.dump(digests(folder, state), file)             # written into the state as checksums.json
    refuse_damaged(folder, state)                       # InputError that names the file

A disk gives back other bytes than were written more often than one thinks, and a run that goes on
from them ends with other weights and without any error.
"""
import glob
import os
import re
from concurrent.futures import ThreadPoolExecutor

import torch.distributed as dist

from support.common import InputError, check_file, file_digest, read_json
from support.outputs import gathered

SUMS = "checksums.json"         # in a state: the digests of its files and of reference.pt


def read_latest(folder):
    """The name of the state to go on from, None without one. InputError where none is named."""
    path = os.path.join(folder, "latest")
    if not os.path.exists(path):
        return None
    check_file(path)
    with open(path, "rb") as file:
        name = file.read(100).decode(errors="replace")
    if not re.fullmatch(r"step-\d+", name) or not os.path.isdir(os.path.join(folder, name)):
        raise InputError(f"{path}: names {name!r}, which is no state that lies there; write the "
                         f"name of one into it{of_states(folder)}, or remove it to start anew")
    return name


def of_states(folder, but=None):
    """ (step-38, step-40), the states that lie in a folder, for a message; "" without any."""
    paths = glob.glob(os.path.join(glob.escape(folder), "step-*[0-9]"))
    names = sorted({os.path.basename(path) for path in paths} - {but})
    return f" ({', '.join(names)})" if names else ""


def digests(folder, state):
    """The digests of a state's files, and of the reference beside it → {name: text}."""
    place = os.path.join(folder, state)
    paths = [entry.path for entry in os.scandir(place)
             if entry.is_file() and entry.name != SUMS and not entry.name.startswith(".nfs")]
    reference = os.path.join(folder, "reference.pt")
    paths += [reference] if os.path.isfile(reference) else []
    with ThreadPoolExecutor(8) as pool:
        return dict(zip(map(os.path.basename, paths), pool.map(file_digest, paths), strict=True))


def refuse_damaged(folder, state):
    """InputError, on all ranks, where a state is not what was saved. One of an earlier version has
    no checksums."""
    path, fault = os.path.join(folder, state, SUMS), None
    if dist.get_rank() == 0 and os.path.exists(path):
        try:
            saved, there = read_json(path, dict), digests(folder, state)
        except InputError as e:
            saved, there, fault = {}, {}, str(e)
        changed = [name for name in saved.keys() | there.keys()
                   if saved.get(name) != there.get(name)]
        if changed:
            fault = (f"{os.path.join(folder, state)}: {min(changed)} is not what was saved; leave "
                     "--resume out to start anew, or write the name of another state"
                     f"{of_states(folder, but=state)} into {os.path.join(folder, 'latest')}")
    fault = gathered(fault)[0]
    if fault:
        raise InputError(fault)
