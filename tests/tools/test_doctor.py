"""tools.doctor: what it says of machines and folders that it is shown, and how fast."""
import os
import re
import subprocess
import sys
from types import SimpleNamespace

import pytest
from programs import ROOT

from tools import doctor
from tools.doctor import CARDS, PATHS, TRAINED, fault_of, package_faults, what_fits

NOTHING = SimpleNamespace(**dict.fromkeys(PATHS))


def run(*typed, cwd=ROOT):
    return subprocess.run([sys.executable, "-m", "tools.doctor", *typed], cwd=cwd, text=True,
                          capture_output=True, env=os.environ | {"PYTHONPATH": ROOT})


def test_a_named_folder(world, tmp_path):
    """Folders that are whole are there; what is missing is said, and the exit code tells."""
    good = run("--model_name_or_path", world.base, "--vg_path", world.vg, "--coco_path", world.coco,
               "--pope_path", world.pope, "--desc_data_path", world.desc)
    assert good.returncode == 0 and good.stdout.count(": there\n") == 5, good.stdout
    assert "next: python eval_pope.py tiny/base" in good.stdout
    os.makedirs(tmp_path / "VG" / "VG_100K")
    (tmp_path / "VG" / "image_data.json").write_text("[]")
    assert "holds no VG_100K_2" in run("--vg_path", str(tmp_path / "VG")).stdout
    bad = run("--vg_path", "nowhere", "--coco_path", str(tmp_path))
    assert bad.returncode == 1 and "mend this" in bad.stdout
    assert bad.stdout.count("--vg_path nowhere") == 1       # no fault is said twice
    assert "wrong: --vg_path nowhere: no such file" in bad.stdout
    assert re.search(r"wrong: --coco_path .*: holds no val2014", bad.stdout)


def test_torch_is_not_imported(tmp_path):
    """It must answer at once, so nothing that is slow to import may be."""
    code = ("import sys, tools.doctor; sys.argv = ['doctor']\n"
            "try: tools.doctor.main()\n"
            "except SystemExit: print([n for n in ('torch', 'numpy', 'PIL') if n in sys.modules])")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, text=True, capture_output=True)
    assert done.stdout.endswith("[]\n"), done.stdout + done.stderr


def test_faults_of_paths(tmp_path):
    for name, path in (("model_name_or_path", "liuhaotian/llava-v1.5-7b"),
                       ("vision_tower", "openai/clip-vit-large-patch14-336@main"),
                       ("vision_tower", "open_clip:ViT-L-14-336/openai")):
        assert fault_of(name, path) is None
    assert "no such file" in fault_of("vg_path", "liuhaotian/llava-v1.5-7b")
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "tokenizer.model").write_text("x")
    assert "holds no weights" in fault_of("model_name_or_path", str(tmp_path))
    (tmp_path / "pytorch_model-00001-of-00002.bin").write_text("x")
    assert fault_of("model_name_or_path", str(tmp_path)) is None
    assert "no *pope*" in fault_of("pope_path", str(tmp_path))
    (tmp_path / "lfs.json").write_text("version https://git-lfs.github.com/spec/v1\noid x\n")
    assert "git lfs pull" in fault_of("data_path", str(tmp_path / "lfs.json"))


def test_faults_of_packages(monkeypatch):
    versions = {"torch": "2.5.1+cu121", "numpy": "1.26.4", "deepspeed": "0.19.9"}

    def version(name):
        if name not in versions:
            raise doctor.importlib.metadata.PackageNotFoundError(name)
        return versions[name]

    monkeypatch.setattr(doctor.importlib.metadata, "version", version)
    found, faults = package_faults(["torch>=2.6", "numpy>=1.26", "deepspeed==0.19.8", "tqdm>=4.60"])
    assert found == {**versions, "tqdm": None}
    assert [fault.partition(":")[0] for fault in faults] == [
        "torch is 2.5.1+cu121 and must be >= 2.6", "deepspeed is 0.19.9 and must be == 0.19.8",
        "tqdm is not installed"]


def test_cards_are_those_of_the_page(monkeypatch):
    """Each cell that the doctor prints stands in docs/memory.md, in the row of that card."""
    with open(os.path.join(ROOT, "docs", "memory.md"), encoding="utf-8") as file:
        of_7b = file.read().split("\n##")[0]         # the 13B model has a table of its own
    rows = re.findall(r"^\| (.+? × (?:24|40|80) GB) \| (.+?) \| (.+?) \| (.+?) \|$", of_7b, re.M)
    page = {(name.split()[-2], not name.startswith("1 ×")): cells for name, *cells in rows}
    named = zip(("24", "40", "80"), CARDS.values(), strict=True)
    assert page == {(size, several): list(row) for size, (one, more) in named
                    for several, row in ((False, one), (True, more))}
    lines = what_fits([("H100", 79.6, 0), ("H100", 79.6, 1)])
    assert lines == [f"{what}: {how}" for what, how in zip(TRAINED, CARDS[76][1], strict=True)]
    assert "tiny world" in what_fits([("2080", 11, 0)])[0]


def test_a_machine_with_a_gpu(monkeypatch):
    said = SimpleNamespace(returncode=0, stdout="NVIDIA GeForce RTX 3090, 24576, 512\n")
    monkeypatch.setattr(doctor.subprocess, "run", lambda *_, **__: said)
    monkeypatch.setattr(doctor, "required", lambda: [])
    lines, faults = doctor.report(NOTHING, doctor.gpus())
    assert "GPU: NVIDIA GeForce RTX 3090, 24 GiB, 0 used" in lines and faults == []
    assert f"stages 1 and 2: {CARDS[22][0][0]}" in lines
    said.stdout = "broken"
    assert doctor.gpus() == []


@pytest.mark.parametrize("command", ("deepspeed train.py", "python eval_pope.py"))
def test_what_comes_next_can_be_typed(command):
    texts = [doctor.what_next(args, [], [1]) for args in (
        NOTHING, SimpleNamespace(**vars(NOTHING) | {"model_name_or_path": "x", "vg_path": "y"}))]
    assert any(command in text for text in texts)
