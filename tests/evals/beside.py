"""A tiny world with a base and a checkpoint beside it, as a run leaves them, for what asks them."""
import os
import shutil

from checkpoints.load import load_base
from checkpoints.save import save_trained


def checkpoints_beside(world, folder):
    """The session's world and base in `folder`; in stage1 another `lm_head`, which says other
    things → the folder.
    """
    os.symlink(world.folder, folder / "world")
    shutil.copytree(world.base, folder / "base")
    base = load_base(world.base)
    info = {"base": str(folder / "base"), "fingerprint": base.fingerprint}
    weight = base.head.lm_head.weight.roll(1, 0)
    save_trained(str(folder / "stage1"), {"lm_head.weight": weight}, info, base.tokenizer)
    return folder
