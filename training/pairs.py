"""Preference pairs in the forms that people have them: what a row means.

    pair = read_pair(row, "rows.jsonl, row 7")      # a JSON object → Pair, whatever its form

A row's form follows from its keys:

    RLHF-V, RLAIF-V     image, question, chosen, rejected (RLHF-V: the last three as JSON in `text`)
    TRL                 prompt, chosen, rejected, images; texts, or lists of messages
    LLaMA-Factory       conversations, chosen and rejected as one message each, images
    ms-swift            messages that end with the chosen answer, rejected_response, images
    SENTINEL            question, context, y_win, y_lose (image: the row's key in its file)

Follows the data sets of RLHF-V (arXiv 2312.00849), RLAIF-V (arXiv 2405.17220) and SENTINEL (arXiv
2507.12455), and the documents of huggingface/trl, hiyouga/LLaMA-Factory and modelscope/ms-swift.
The question becomes HA-DPO's: `<image>`, a new line, the text. What cannot be the same here is
refused: several images, video, tools, a system prompt of the row's own.

A context is the beginning of the answer. It is given and not learnt, and what follows it need not
be the answer's end, so no `</s>` is learnt. SENTINEL's program learns one behind a first sentence,
whose context is empty; here only a context of null means a whole answer.
"""
import base64
import binascii
from dataclasses import dataclass

from data import IMAGE
from support.common import InputError, parse_json

ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant"}
OTHER_MEDIA = "video", "videos", "audio", "audios", "tools"
PATH_AT_MOST = 1024         # characters; a longer text under "image" is a picture in base64


@dataclass
class Pair:
    """One preference: the conversation so far, and two answers to its last question."""
    turns: list             # [(question, answer), ...]; the answer of the last one is None
    chosen: str
    rejected: str
    image: str = None       # a path as it stands in the row, or:
    has_bytes: bool = False             # the picture itself stands in the row
    context: str = None     # both answers begin with it; None: they are whole answers

    def conversations(self):
        *before, (question, _) = self.turns
        begun = f"{self.context} " if self.context else ""
        return [[*before, (question, begun + answer)] for answer in (self.chosen, self.rejected)]


def read_pair(row, place):
    """A row of any form → Pair. InputError names what is wrong with it."""
    refuse = refuser(place)
    refuse(not isinstance(row, dict), f"is a {type(row).__name__}, where an object should be")
    refuse("image_id" in row and "reject" in row, "is a row of HA-DPO's pope_data.json: name that "
           "file with --pope_data_path (and --desc_data_path, --vg_path)")
    other = next((name for name in OTHER_MEDIA if row.get(name)), None)
    refuse(other, f"names {other!r}, which is not built here")
    if isinstance(row.get("text"), str) and "chosen" not in row:            # RLHF-V
        try:
            inside = parse_json(row["text"])
        except ValueError as e:
            raise InputError(f"{place}: 'text' is no JSON ({e}), as RLHF-V's is; mend or remove "
                             "the row") from e
        refuse(not isinstance(inside, dict), "'text' is no JSON object, as RLHF-V's is")
        row = row | inside

    history, chosen, rejected = split(row, place)
    refuse(any(role == "system" for role, _ in history), "has a system prompt of its own, and all "
           "rows have LLaVA's here")
    roles = [role for role, _ in history]
    refuse(roles != ["user", "assistant"] * (len(roles) // 2) + ["user"],
           "turns must alternate user, assistant, and end with a question")
    for name, answer in (("chosen", chosen), ("rejected", rejected)):
        refuse(not answer.strip(), f"the {name} answer is empty, so nothing of it can be learnt")
    image, has_bytes = image_of(row, refuse)
    texts = [text for _, text in history]
    if image or has_bytes:
        texts = marked(texts, refuse)
    turns = list(zip(texts[::2], [*texts[1::2], None], strict=True))
    refuse(not all(text.strip() for text in texts), "a turn is empty")
    context = row.get("context") if "y_win" in row else None                # SENTINEL
    if context is None:
        return Pair(turns, chosen, rejected, image, has_bytes)
    refuse(not isinstance(context, str), f"its context is a {type(context).__name__}")
    return Pair(turns, chosen.strip(), rejected.strip(), image, has_bytes, context.strip())


def refuser(place):
    """A function that ends in an InputError about the row there, when its first argument is true.
    """
    def refuse(when, text):
        if when:
            raise InputError(f"{place}: {text}; mend or remove the row")
    return refuse


# ---- The words -----------------------------------------------------------------------------------


def split(row, place):
    """A row → [(role, text), ...] up to the last question, and the chosen and rejected answers."""
    messages = row.get("messages") or row.get("conversations")
    chosen, rejected = (row.get(name, row.get(sentinels)) for name, sentinels in
                        (("chosen", "y_win"), ("rejected", "y_lose")))
    second = row.get("rejected_response")
    system = [("system", row["system"])] if row.get("system") else []
    if isinstance(second, str) and messages:                                # ms-swift
        *history, (role, answer) = said_in(messages, place)
        if role != "assistant":
            raise InputError(f"{place}: 'messages' must end with the chosen answer; mend or remove "
                             "the row")
        return system + history, answer, second
    if isinstance(chosen, dict) and isinstance(rejected, dict):             # LLaMA-Factory
        answers = [said_in([one], place)[0][1] for one in (chosen, rejected)]
        return system + said_in(messages, place), *answers
    prompt = next((row[name] for name in ("prompt", "question") if row.get(name)), None)
    prompt = said_in([{"role": "user", "content": prompt}] if isinstance(prompt, str) else
                     prompt or [], place)
    if isinstance(chosen, list) and isinstance(rejected, list):             # TRL, messages
        ours, theirs = said_in(chosen, place), said_in(rejected, place)
        if not prompt and ours[:-1] == theirs[:-1]:
            prompt, ours, theirs = ours[:-1], ours[-1:], theirs[-1:]
        if [role for role, _ in ours + theirs] == ["assistant"] * 2:
            return system + prompt, ours[0][1], theirs[0][1]
    elif isinstance(chosen, str) and isinstance(rejected, str) and prompt:
        return system + prompt, chosen, rejected
    raise InputError(f"{place}: is no preference pair of a form that is known here (keys: "
                     f"{', '.join(map(str, list(row)[:8]))}); the forms are RLHF-V's, TRL's, "
                     "LLaMA-Factory's, ms-swift's and SENTINEL's, see "
                     "docs/training.md")


def said_in(messages, place):
    """Messages with from and value, or role and content → [(role, text), ...]. A part that is an
    image becomes its mark.
    """
    found = []
    for message in messages if isinstance(messages, list) else [messages]:
        values = message if isinstance(message, dict) else {}
        role = values.get("role", values.get("from"))
        content = values.get("content", values.get("value"))
        if isinstance(content, list):
            parts = [IMAGE if part.get("type") in ("image", "image_url") else part.get("text")
                     for part in content if isinstance(part, dict)]
            texts = all(isinstance(part, str) for part in parts)
            content = "".join(parts) if texts and len(parts) == len(content) else None
        role = ROLES.get(role, role)
        if role not in ("user", "assistant", "system") or not isinstance(content, str):
            raise InputError(f"{place}: {str(message)[:60]!r} is no message of user or assistant; "
                             "mend or remove the row")
        found.append((role, content))
    return found


def marked(texts, refuse):
    """The texts of a row with an image: its mark stands in front of one question, as in LLaVA."""
    where = [n for n, text in enumerate(texts) if IMAGE in text]
    refuse(len(where) > 1 or any(n % 2 for n in where) or any(
        texts[n].count(IMAGE) > 1 for n in where),
        f"has one image, and {IMAGE} stands elsewhere than once in a question")
    if not where:
        return [f"{IMAGE}\n{texts[0]}", *texts[1:]]
    texts = list(texts)
    texts[where[0]] = f"{IMAGE}\n{texts[where[0]].replace(IMAGE, '').strip()}"
    return texts


# ---- The picture ---------------------------------------------------------------------------------


def image_of(row, refuse):
    """A row's image → (its path or None, whether the picture itself stands in the row)."""
    value = the_image(row, refuse)
    if isinstance(value, dict):
        if value.get("bytes"):
            return None, True
        value = value.get("path") or value.get("url")
    refuse(value and not isinstance(value, str), f"its image is a {type(value).__name__}")
    if value and (value.startswith("data:") or len(value) > PATH_AT_MOST):
        return None, True
    refuse(value and value.startswith(("http://", "https://")),
           f"image {str(value)[:60]!r} is an address, and nothing is downloaded here")
    return value or None, False


def the_image(row, refuse):
    """What stands for a row's only image: under image, images, or in a message's parts."""
    values = row.get("images") or row.get("image") or []
    values = values if isinstance(values, list) else [values]
    if not values:
        prompt = row.get("prompt") or row.get("messages") or []
        parts = [part for message in prompt if isinstance(message, dict)
                 for part in message.get("content") or [] if isinstance(part, dict)]
        values = [part.get(part.get("type")) for part in parts
                  if part.get("type") in ("image", "image_url") and part.get(part.get("type"))]
    refuse(len(values) > 1, f"has {len(values)} images, and a row here has one or none")
    return values[0] if values else None


def picture_bytes(row, place):
    """The encoded picture that stands in a row: bytes, or base64 with or without `data:` before.
    """
    value = the_image(row, refuser(place))
    value = value["bytes"] if isinstance(value, dict) else value
    if isinstance(value, bytes):
        return value
    try:
        return base64.b64decode(value.rpartition("base64,")[2], validate=True)
    except (ValueError, binascii.Error, AttributeError) as e:
        raise InputError(f"{place}: its picture is no base64 ({e}); mend or remove the row") from e

