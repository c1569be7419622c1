"""`pip install .`: what is installed runs without the repository."""
import os
import shutil
import subprocess
import sys

import pytest
from conftest import dpo_flags
from programs import ROOT, free_port


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The package, built from a copy and installed into a folder of its own."""
    pytest.importorskip("setuptools")
    source, site = (tmp_path_factory.mktemp(name) for name in ("source", "site"))
    leave_out = shutil.ignore_patterns(".git", "out", "__pycache__", "tests", "bench")
    shutil.copytree(ROOT, source, ignore=leave_out, dirs_exist_ok=True)
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", "--no-build-isolation",
                    "--no-deps", "--target", site, source], check=True, capture_output=True)
    return site


def run(site, folder, command, *typed):
    environment = {name: value for name, value in os.environ.items()
                   if name not in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR",
                                   "DS_ACCELERATOR")}
    environment |= {"PYTHONPATH": str(site), "OMP_NUM_THREADS": "1", "MASTER_PORT": free_port()}
    start = [site / "bin" / command] if command.startswith("nanohadpo") else [command]
    return subprocess.run([sys.executable, *map(str, [*start, *typed])], cwd=folder, text=True,
                          env=environment, capture_output=True, timeout=200)


def test_train_pope_and_chat(site, world, tmp_path):
    """In an empty folder: a run, the command that its last line names, and an answer."""
    done = run(site, tmp_path, "nanohadpo-train", "--stage", 1, "--max_steps", 1, "--keep_correct",
               *dpo_flags(world))
    assert done.returncode == 0, done.stderr[-2000:]
    assert "done; look at it with: nanohadpo-pope out/stage1" in done.stdout
    done = run(site, tmp_path, "nanohadpo-pope", "out/stage1", "--coco_path", world.coco,
               "--pope_path", world.pope, "--set", "adv", "--max_new_tokens", 2)
    assert done.returncode == 0 and "| stage1 |" in done.stdout, done.stderr[-2000:]
    done = run(site, tmp_path, "nanohadpo-chat", "out/stage1", "--prompt", "is there a dog",
               "--max_new_tokens", 2)
    assert done.returncode == 0, done.stderr[-2000:]
    done = run(site, tmp_path, "nanohadpo-chat", "nowhere", "--prompt", "is there a dog")
    assert done.returncode == 1 and "error: nowhere: no such folder" in done.stderr


def test_everything_is_from_the_package(site, tmp_path):
    """Modules, the shipped base and the report's template."""
    code = ("import model, train, tools.chat, tools.report; from tiny.places import SHIPPED_BASE;"
            "print(model.__file__, train.__file__, tools.chat.__file__, SHIPPED_BASE)")
    done = run(site, tmp_path, "-c", code)
    assert done.returncode == 0, done.stderr[-2000:]
    assert all(path.startswith(str(site)) for path in done.stdout.split())
    for name in ("tiny/base/model.safetensors", "tiny/base/vision_tower/model.safetensors",
                 "tools/report_template.html"):
        assert (site / name).is_file(), name
