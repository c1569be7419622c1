"""Models by their name on the Hugging Face hub, wherever a path is taken.

    folder = folder_of("liuhaotian/llava-v1.5-7b")      # its files here, downloaded if need be
    name = pinned("liuhaotian/llava-v1.5-7b")           # "liuhaotian/llava-v1.5-7b@4481d270cc22…"

A name is OWNER/NAME or OWNER/NAME@REVISION. A folder with that path, or a folder OWNER, comes
first: then a path is meant. The cache is huggingface_hub's own: what it holds is used without
asking anybody. Only the files that are read here are downloaded. A checkpoint keeps the pinned
name of its base, so the hub may change and the checkpoint does not.

HF_HOME and HF_HUB_CACHE name the cache, HF_ENDPOINT another server, HF_HUB_OFFLINE=1 forbids all
requests: these are huggingface_hub's.
"""
import functools
import os
import re
from fnmatch import fnmatchcase

from checkpoints.layouts import SEED_FILE, TRAINED_FILE, weight_files
from support.command_line import first_process, near_path
from support.common import InputError, progress, read_json

NAME = re.compile(r"\w[\w.-]*/\w[\w.-]*(@[\w][\w./-]*)?")
CONFIGS = "config.json", "adapter_config.json"
# Of a repository, what is read here beside the weights.
READ = (*CONFIGS, "README.md", "preprocessor_config.json", "processor_config.json",
        "tokenizer.model", "added_tokens.json", "mm_projector.bin", SEED_FILE, TRAINED_FILE,
        "vision_tower/config.json",
        "vision_tower/preprocessor_config.json", "vision_tower/model.safetensors")
# Weights, the first kind that there is: as layouts.py reads them. Then an adapter's.
WEIGHTS = (("model.safetensors.index.json", "model-*-of-*.safetensors"), ("model.safetensors",),
           ("pytorch_model.bin.index.json", "pytorch_model-*-of-*.bin"), ("pytorch_model.bin",))
ADAPTERS = ("adapter_model.safetensors",), ("adapter_model.bin",)


def is_name(path):
    """Whether a hub's name is meant, and no path."""
    if not NAME.fullmatch(path) or os.path.exists(path):
        return False
    return "@" in path or not os.path.isdir(path.partition("/")[0])


def pinned(path):
    """A hub's name with the revision that is read now; anything else as it is."""
    if not path or not is_name(path):
        return path
    return f"{path.partition('@')[0]}@{os.path.basename(folder_of(path))}"


def folder_of(path):
    """The folder of a hub's name, downloaded if it is not here; anything else as it is.

    InputError for a file inside of a model's folder, which is no model.
    """
    if path and os.path.isfile(path) and path.endswith((".json", ".jsonl", ".md", ".model")):
        beside = os.path.dirname(path) or "."
        if not os.path.isfile(os.path.join(beside, "config.json")):
            raise InputError(f"{path}: is no model; name the folder of one")
        raise InputError(f"{path}: is one file of a model; name its folder, {beside}")
    return fetched(path) if path and is_name(path) else path


@functools.cache
def fetched(name):
    repository, _, revision = name.partition("@")
    hub = import_hub()
    cache = os.path.join(hub.constants.HF_HUB_CACHE, f"models--{repository.replace('/', '--')}")
    folder = in_cache(cache, revision or "main")
    if folder and is_whole(folder):
        return folder
    try:
        info = hub.HfApi().model_info(repository, revision=revision or None, files_metadata=True)
        files = {file.rfilename: file.size or 0 for file in info.siblings}
        wanted = files_read(list(files))
        if not wanted:
            raise InputError(f"{name}: the repository holds no model that is read here (there is "
                             "no config.json); name another")
        download(hub, info, {file: files[file] for file in wanted})
    except InputError:
        raise
    except Exception as e:          # of several libraries: no network, no such name, no disk left
        raise InputError(explained(name, e, hub.constants)) from e
    folder = os.path.join(cache, "snapshots", info.sha)
    if not revision:
        os.makedirs(os.path.join(cache, "refs"), exist_ok=True)
        with open(os.path.join(cache, "refs", "main"), "w") as file:
            file.write(info.sha)
    return folder


def import_hub():
    try:
        import huggingface_hub
        import huggingface_hub.constants
        import huggingface_hub.utils
    except ImportError as e:
        raise InputError(f"huggingface_hub cannot be imported ({e}), which reads the hub's names: "
                         "pip install -r requirements.txt, or name a folder") from e
    return huggingface_hub


def in_cache(cache, revision):
    """The folder of a revision in huggingface_hub's cache, or None."""
    ref = os.path.join(cache, "refs", revision)
    if os.path.isfile(ref):
        with open(ref) as file:
            revision = file.read().strip()
    folder = os.path.join(cache, "snapshots", revision)
    return folder if os.path.isdir(folder) else None


def is_whole(folder):
    """Whether a folder holds all that would be read: settings, weights, and a model's tokenizer."""
    def holds(*names):
        return any(os.path.exists(os.path.join(folder, name)) for name in names)

    try:
        if not holds(TRAINED_FILE, SEED_FILE, *(name for name, in ADAPTERS)):
            if not holds("config.json") or not weight_files(folder):
                return False
            values = read_json(os.path.join(folder, "config.json"), dict)
            is_tower = str(values.get("model_type")).startswith("clip")
            return is_tower or holds("tokenizer.model")
    except InputError:              # a shard that the index names is not there
        return False
    return holds(*CONFIGS, SEED_FILE)


def files_read(names):
    """Of a repository's files those that are read here. Settings come last, behind the weights."""
    if not set(CONFIGS) & set(names) and SEED_FILE not in names:
        return []
    found = []
    for kinds in WEIGHTS, ADAPTERS:
        for patterns in kinds:
            if patterns[0] in names:
                found += [n for n in names if any(fnmatchcase(n, one) for one in patterns)]
                break
    return found + [name for name in reversed(READ) if name in names]


def download(hub, info, files):
    """Bring files ({name: bytes}) into the cache. Processes wait for the one that is first."""
    first = first_process()
    if first:
        print(f"{info.id}: {len(files)} files, {sum(files.values()) / 1e9:.2f} GB, from "
              f"{hub.constants.ENDPOINT} at {info.sha[:12]}", flush=True)
    hub.utils.disable_progress_bars()
    for name in progress(files, "downloading", unit="file"):
        hub.hf_hub_download(info.id, name, revision=info.sha)


def explained(name, error, constants):
    """Why a name could not be fetched, and what to do, in one line."""
    kind, server = type(error).__name__, constants.ENDPOINT
    repository, _, revision = name.partition("@")
    near = near_path(name)
    no_folder = f"no such folder (is {near} meant?)" if near else "no such folder"
    if kind == "GatedRepoError":
        return f"{name}: {server} asks for a login; hf auth login, and ask for access on its page"
    if kind == "RevisionNotFoundError":
        return f"{name}: {server} has no revision {revision or 'main'}; check what stands behind @"
    if kind == "RepositoryNotFoundError":
        return (f"{name}: {no_folder}, and {server} has no model of this name (or only for "
                "those who log in: hf auth login); check the path or the name")
    reason = str(error).strip().partition("\n")[0] or kind
    at = f" --revision {revision}" if revision else ""
    return (f"{name}: {no_folder}; as a name on the hub it is not whole in "
            f"{constants.HF_HUB_CACHE}, and {server} gave nothing ({reason}). Where there is a "
            f"network: hf download {repository}{at} --local-dir FOLDER; copy FOLDER here and name "
            "it instead")
