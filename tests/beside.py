"""A tiny world with a base and a checkpoint beside it, as a run leaves them, for what asks them."""
import shutil

from checkpoints.load import load_base
from checkpoints.save import save_trained


def checkpoints_beside(world, folder):
    """Copies of the session's world and base in `folder`; in stage1 another `lm_head`, which says
    other things → the folder.
    """
    shutil.copytree(world.folder, folder / "world")             # some write into it
    shutil.copytree(world.base, folder / "base")
    base = load_base(world.base)
    info = {"base": str(folder / "base"), "fingerprint": base.fingerprint}
    weight = base.head.lm_head.weight.roll(1, 0)
    save_trained(str(folder / "stage1"), {"lm_head.weight": weight}, info, base.tokenizer)
    return folder
