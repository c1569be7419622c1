"""The words of the tiny world: what it contains, and what in a text it has no word for.

    unknown_words(model.tokenizer, "Is there an elephant in the image?")    # ["an", "elephant"]
    print(CONTAINS)
    about(0.2)                                                              # "about 1 s"

Each word of this world is one token (world.py). A word that is none is spelt in letters, which the
tiny model has never seen; then it answers about something else, and as surely as ever.
"""
import math
import re

from tiny.pictures import NAMES, SCENES
from tiny.world import DESCRIBE, ask

CONTAINS = (f"The tiny world: {', '.join(NAMES)}, in a {', a '.join(SCENES)}. Its model answers "
            f"“{ask('dog')}” and “{DESCRIBE[0]}”")


def about(seconds):
    """How long work will take, in words."""
    return f"about {math.ceil(seconds)} s"


def is_tiny(tokenizer):
    """Whether a tokenizer is the tiny world's: each of its classes is a token."""
    return all(tokenizer.model.piece_to_id(f"▁{name}") for name in NAMES)


def unknown_words(tokenizer, text):
    """The words of a text that are no tokens of the tiny world; [] with another tokenizer."""
    if not is_tiny(tokenizer):
        return []
    words = dict.fromkeys(re.findall(r"[^\W\d_]+", text))
    return [word for word in words if not tokenizer.model.piece_to_id(f"▁{word}")]
