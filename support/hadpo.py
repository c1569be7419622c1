"""HA-DPO's files, told apart: they lie under the same names for each of its models.

    rows = read_hadpo_json("llava-v1.5/pope_data.json", list)
    images = read_image_index("VG")                             # {"2317": "VG/VG_100K/2317.jpg"}

Follows opendatalab/HA-DPO (arXiv 2311.16839), whose InstructBLIP's descriptions are a list and
whose InstructBLIP's questions say `rejected` where LLaVA's say `reject`.
"""
import os

from support.common import InputError, field, id_text, of_type, read_json
from support.images import below


def read_hadpo_json(path, expected):
    """A file that was made for LLaVA: desc_data.json is a dict, pope_data.json a list.

    InputError if it is another model's: its rejected answers are not what LLaVA would say.
    """
    rows = read_json(path)
    first = rows[0] if isinstance(rows, list) and rows else None
    if isinstance(first, dict) and "rejected" in first and "reject" not in first:
        raise InputError(f"{path}: is HA-DPO's file for InstructBLIP (a list whose rows say "
                         "'rejected'), not for LLaVA; take the one from its folder llava-v1.5")
    return of_type(rows, expected, path)


def read_image_index(vg_path):
    """Visual Genome's image_data.json → {image_id, as text: path}, the end of its url."""
    path = os.path.join(vg_path, "image_data.json")
    pairs = [(field(row, "image_id", (int, str), path, n), field(row, "url", str, path, n))
             for n, row in enumerate(read_json(path, list))]
    return {id_text(key): below(vg_path, os.path.join(*url.split("/")[-2:]), f"{path}, row {n}")
            for n, (key, url) in enumerate(pairs)}
