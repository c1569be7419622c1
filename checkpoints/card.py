"""A model card, README.md, beside every checkpoint and export: what it is and what it is made from.

    write_card("out/stage2", "stage2", values)  # `values`: its config.json's
    add_pope("out/stage2", "…")                 # after an evaluation: the table, as Markdown

The card follows the form of the Hugging Face hub: a head of names, then Markdown. A README.md that
does not begin as ours does is somebody's own, and is never replaced.
"""
import contextlib
import os
import re
import subprocess

from checkpoints.hub import folder_of, is_name
from support.common import InputError, read_json
from support.outputs import write_text

NAME = "README.md"
BEGINS = "---\nlibrary_name: nanohadpo\n"
POPE = "\n## POPE\n\n"
NOT_ASKED = "Not evaluated yet; `python eval_pope.py` writes its table here.\n"
# Of a run's arguments those that say nothing of the result.
SILENT = "resume", "local_rank", "plot", "default_batch", "default_micro", "undecayed"
DATA = "vg_path", "desc_data_path", "pope_data_path", "preference_data", "data_path"
LLAVA_LICENCE = ("not stated beside the base (LLaVA-1.5's own weights are under the LLAMA 2 "
                 "Community License)")


def is_card(path):
    """Whether a README.md is a card of ours."""
    with contextlib.suppress(OSError, UnicodeDecodeError), open(path, encoding="utf-8") as file:
        return file.read(len(BEGINS)) == BEGINS
    return False


def refuse_other_readme(folder):
    """Before training: InputError for a README.md in the output folder that is not ours."""
    path = os.path.join(folder, NAME)
    if os.path.lexists(path) and not is_card(path):
        raise InputError(f"{folder}: holds a README.md that is not ours and would be lost; move "
                         "it, or name a new folder")


def write_card(folder, name, values, pope=NOT_ASKED):
    """`name`: the card's heading. `values`: of the checkpoint's config.json."""
    write_text(os.path.join(folder, NAME), card(values, name, pope))


def add_pope(folder, text):
    """Put an evaluation into a checkpoint's card, in place of the one before."""
    path = os.path.join(folder, NAME)
    if os.path.isdir(folder) and is_card(path):
        with open(path, encoding="utf-8") as file:
            head = file.read().partition(POPE)[0]
        with contextlib.suppress(InputError):       # a folder that cannot be written: no matter
            write_text(path, head + POPE + text)


def pope_of(folder):
    """What a checkpoint's card says of POPE."""
    path = os.path.join(folder, NAME)
    if not is_card(path):
        return NOT_ASKED
    with open(path, encoding="utf-8") as file:
        return file.read().partition(POPE)[2] or NOT_ASKED


def card(values, name, pope):
    """The whole text. Of `values` nothing is needed."""
    arguments = values.get("arguments") or {}
    base = values.get("base") or arguments.get("model_name_or_path")
    licence = licence_of(base)
    head = f"license: {licence}\n" if re.fullmatch(r"[\w.-]+", licence) else "license: other\n"
    if base and is_name(base):
        head += f"base_model: {base.partition('@')[0]}\n"
    block = values.get("block") or values.get("post_interaction_block")
    rows = {
        "base": f"`{base}`" if base else "the tiny world's",
        "licence of the base": licence,
        "trained": ", ".join(arguments.get("tune") or ()) or "nothing",
        "post-interaction block": f"attention {block['attention']}" if block else "none",
        "loss": arguments.get("loss", "none"),
        "steps": values.get("steps", "not counted"),
        "data": ", ".join(data_of(arguments)) or "the tiny world's",
        "digest of the data": (values.get("identity") or {}).get("data", "none")[:16],
        "code": f"nanoHADPO, commit {code_commit()}"}
    flags = [f"--{key} {shown(value)}".rstrip()
             for key, value in sorted(as_typed(arguments).items())
             if key not in SILENT and value not in (None, "", [], {}, False)]
    return (f"{BEGINS}{head}tags: [llava, dpo, hallucination]\n---\n\n# {name}\n\n"
            "A LLaVA-1.5 that was trained against object hallucination with nanoHADPO "
            "(HA-DPO, arXiv 2311.16839).\n\n| | |\n|---|---|\n"
            + "".join(f"| {key} | {value} |\n" for key, value in rows.items())
            + "\n## Flags\n\n```\n" + "\n".join(flags or ["none"]) + "\n```\n" + POPE + pope)


def data_of(arguments):
    """The names of a run's data files."""
    found = []
    for name in DATA:
        value = arguments.get(name)
        found += value if isinstance(value, list) else [value] if value else []
    return [f"`{os.path.basename(os.path.normpath(path))}`" for path in found]


def as_typed(arguments):
    """A run's arguments as its command names them: a stage in place of its groups of tensors."""
    tune = ",".join(arguments.get("tune") or ())
    left_out = {"tune"} if arguments.get("stage") is not None else set()
    if not arguments.get("lora_r"):
        left_out |= {"lora_alpha", "lora_dropout"}
    return {key: value for key, value in (arguments | {"tune": tune}).items()
            if key not in left_out}


def shown(value):
    if isinstance(value, list):
        return " ".join(map(str, value))
    return "" if value is True else str(value)


def licence_of(base):
    """What the README.md of a base says of its licence, in the head that the hub reads."""
    if not base:
        return "apache-2.0"                                     # the tiny world is this project's
    with contextlib.suppress(InputError, OSError, UnicodeDecodeError):
        with open(os.path.join(folder_of(base), NAME), encoding="utf-8") as file:
            head = re.match(r"---\n(.*?)\n---", file.read(), re.S)
        names = dict(re.findall(r"^(license(?:_name)?): *['\"]?(.+?)['\"]?$", head[1] if head else
                                "", re.M))
        if names:
            return names.get("license_name") or names["license"]
    return LLAVA_LICENCE


def code_commit():
    """The commit of this code; "unknown" where it is no git repository."""
    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    if not os.path.exists(os.path.join(root, ".git")):      # installed, perhaps in another's
        return "unknown"
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        said = subprocess.run(["git", "-C", root, "rev-parse", "--short", "HEAD"], timeout=10,
                              capture_output=True, text=True)
        if said.returncode == 0:
            return said.stdout.strip()
    return "unknown"


def values_of(folder):
    """A checkpoint's config.json; {} without one."""
    path = os.path.join(folder, "config.json")
    return read_json(path, dict) if os.path.isfile(path) else {}
