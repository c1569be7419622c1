"""What `pip install .` puts on the path: nanohadpo-train, nanohadpo-pope, nanohadpo-chat.

    deepspeed $(which nanohadpo-train) --stage 2        # as deepspeed train.py --stage 2
    nanohadpo-pope out/stage2                           # as python eval_pope.py out/stage2
    nanohadpo-chat out/stage2                           # as python -m tools.chat out/stage2

pyproject.toml names these functions.
"""
import eval_pope
import tools.chat
import train
from support.common import run_program


def run_train():
    run_program(train.main)


def run_pope():
    run_program(eval_pope.main)


def run_chat():
    run_program(tools.chat.main)
