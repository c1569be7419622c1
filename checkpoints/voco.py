"""VoCo-LLaMA's checkpoints: how many <voco> tokens compress an image.

    config.num_voco = num_voco(values, "voco_llama/config.json")        # 0: no VoCo-LLaMA

Follows Yxxxb/VoCo-LLaMA (arXiv 2406.12275), whose files are LLaVA's with one more embedding, the
last. Their config.json does not say how many of these tokens stand in a row, so the user adds it.
"""
import os

from support.common import InputError, read_json

TOKEN = "<voco>"


def added_tokens(folder):
    """{text: id} of the tokens that Hugging Face's files add to tokenizer.model; {} without any."""
    path = os.path.join(folder, "added_tokens.json")
    if os.path.isfile(path):
        return read_json(path, dict)
    path = os.path.join(folder, "tokenizer_config.json")
    decoder = read_json(path, dict).get("added_tokens_decoder") if os.path.isfile(path) else None
    if not isinstance(decoder, dict):
        return {}
    return {row.get("content"): int(number) for number, row in decoder.items()
            if number.isdigit() and isinstance(row, dict)}


def num_voco(values, path):
    """What a base's config.json (`values`, read from `path`) says; 0 where there is no <voco>.

    InputError where it says nothing of a token that is there, or the token is not the last one.
    """
    count, token = values.get("num_voco"), added_tokens(os.path.dirname(path)).get(TOKEN)
    if count is None and token is None:
        return 0
    if type(count) is not int or not 0 < count < 1024:
        raise InputError(f"{path}: num_voco is {count!r}; {TOKEN} compresses images here, so write "
                         "into the file how many of them stand in a row, as the model was trained, "
                         'e.g. "num_voco": 2')
    rows = values.get("vocab_size")
    if token is not None and token + 1 != rows:
        raise InputError(f"{path}: vocab_size is {rows}, and {TOKEN} has the id {token}, which "
                         "must be the last one; download the checkpoint again")
    return count
