"""The structure of the repository, read from its sources: what stands where, and who imports whom.

No module is imported to be looked at. Each check is a function of the sources, {path: text}, that
returns what is wrong, one line each. It is asked about this repository, and about made-up sources
with a fault, which it must find.
"""
import ast
import os
import re
import subprocess
import sys
from fnmatch import fnmatch

import pytest
from programs import ROOT

CORE = ("model", "clip_vit", "llama", "post_decoder", "dpo", "data", "train", "eval_pope")
BESIDE_CORE = ("README*", "LICENSE", "pyproject.toml", "requirements*.txt", "ds_zero3.json",
               ".gitignore")
# From the ground up. An import may only go down; inside one folder it may go anywhere.
FLOORS = (("support",), ("llama", "clip_vit", "post_decoder"), ("data",), ("model",), ("dpo",),
          ("checkpoints",), ("training",), ("tiny",), ("train",), ("eval_pope",), ("evals",),
          ("tools",), ("bench",), ("docs",), ("tests",))
MAX_LINES, MAX_COLUMNS, MAX_PARAMETERS = 350, 100, 6


# ---- Reading imports -----------------------------------------------------------------------------


def python(sources):
    """{path: syntax tree} of the Python files."""
    return {path: ast.parse(text, path) for path, text in sources.items() if path.endswith(".py")}


def room_of(path):
    """The folder in the root, or the name of a module there."""
    return path.split("/")[0].removesuffix(".py")


def is_test(path):
    return path.startswith("tests/")


def own_modules(sources):
    """{dotted name: path}. pytest also finds the files of tests/ by their bare names."""
    modules = {}
    for path in sources:
        if path.endswith(".py"):
            name = path.removesuffix(".py").removesuffix("/__init__")
            modules[name.replace("/", ".")] = path
            if is_test(path):
                modules.setdefault(name.split("/")[-1], path)
    return modules


def imported_names(node, path):
    """What an import statement of a file may mean: the dotted names of modules."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if not isinstance(node, ast.ImportFrom):
        return []
    folder = path.split("/")[:-1]
    above = folder[:len(folder) - node.level + 1] if node.level else []
    base = ".".join([*above, *([node.module] if node.module else [])])
    return [f"{base}.{alias.name}".lstrip(".") for alias in node.names]


def imports(tree, path, modules):
    """(line, path of the module) of every import of one of our own modules."""
    found = []
    for node in ast.walk(tree):
        for name in imported_names(node, path):
            while name and name not in modules:             # `from a.b import c` may mean a.b
                name = name.rpartition(".")[0]
            if name:
                found.append((node.lineno, modules[name]))
    return found


# ---- The checks ----------------------------------------------------------------------------------


def wrong_root(sources):
    """The root holds the core, what belongs beside it, and folders."""
    in_root = {path for path in sources if "/" not in path}
    core = {f"{name}.py" for name in CORE}
    faults = [f"{path}: is missing in the root" for path in sorted(core - in_root)]
    for path in sorted(in_root - core):
        if not any(fnmatch(path, allowed) for allowed in BESIDE_CORE):
            faults.append(f"{path}: does not belong in the root")
    return faults


def upward_imports(sources):
    """Every import goes to a lower floor, so the core never needs tools, evals or bench."""
    height = {room: n for n, rooms in enumerate(FLOORS) for room in rooms}
    modules, faults = own_modules(sources), []
    for path, tree in python(sources).items():
        room = room_of(path)
        if room not in height:
            faults.append(f"{path}: {room} has no floor; give it one in FLOORS")
            continue
        for line, target in imports(tree, path, modules):
            other = room_of(target)
            if other != room and height.get(other, len(FLOORS)) >= height[room]:
                faults.append(f"{path}:{line}: imports {target}, which is not on a lower floor")
    return faults


def circles(sources):
    """No module imports itself through others, wherever in the file the import stands."""
    modules, faults, done = own_modules(sources), [], set()
    graph = {path: sorted({target for _, target in imports(tree, path, modules)})
             for path, tree in python(sources).items()}

    def visit(path, trail):
        if path in trail:
            faults.append(" → ".join([*trail[trail.index(path):], path]))
        elif path not in done:
            for target in graph[path]:
                visit(target, [*trail, path])
            done.add(path)

    for path in graph:
        visit(path, [])
    return faults


def hidden_imports(sources):
    """Our own modules are imported at the top of a file, never inside a function."""
    modules, faults = own_modules(sources), set()
    for path, tree in python(sources).items():
        for node in ast.walk(tree):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                faults.update(f"{path}:{line}: imports {target} inside a function"
                              for line, target in imports(node, path, modules))
    return sorted(faults)


def lines_of(text):
    """As an editor shows them: some other characters also end a line for str.splitlines."""
    return text.removesuffix("\n").split("\n")


def long_files(sources):
    """At most 350 lines; a test file may be longer."""
    lengths = {path: len(lines_of(text)) for path, text in sources.items()
               if path.endswith(".py") and not is_test(path)}
    return [f"{path}: has {length} lines" for path, length in lengths.items()
            if length > MAX_LINES]


def long_lines(sources):
    """At most 100 characters a line."""
    return [f"{path}:{n}: has {len(line)} columns"
            for path, text in sources.items() if path.endswith(".py")
            for n, line in enumerate(lines_of(text), 1) if len(line) > MAX_COLUMNS]


def wrong_inits(sources):
    """A folder with code says in one docstring what may live there; pytest wants none in tests."""
    folders = {path.rpartition("/")[0] for path in sources
               if path.endswith(".py") and "/" in path and not is_test(path)}
    faults = []
    for init in (f"{folder}/__init__.py" for folder in sorted(folders)):
        tree = ast.parse(sources.get(init, ""))
        if init not in sources:
            faults.append(f"{init}: is missing")
        elif len(tree.body) != 1 or not ast.get_docstring(tree):
            faults.append(f"{init}: is not one docstring")
    return faults


def many_parameters(sources):
    """No function takes more than six; what always travels together is a dataclass."""
    faults = []
    for path, tree in python(sources).items():
        for node in ast.walk(tree):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and not is_test(path):
                a = node.args
                names = [x.arg for x in (*a.posonlyargs, *a.args, *a.kwonlyargs)]
                count = len(names) - (names[:1] in (["self"], ["cls"]))
                if count > MAX_PARAMETERS:
                    faults.append(f"{path}:{node.lineno}: {node.name} takes {count} parameters")
    return faults


# ---- This repository -----------------------------------------------------------------------------

CHECKS = (wrong_root, upward_imports, circles, hidden_imports, long_files, long_lines, wrong_inits,
          many_parameters)


@pytest.fixture(scope="module")
def sources():
    """{path: text} of the tracked files; the text of files that are not Python is left out."""
    if not os.path.exists(os.path.join(ROOT, ".git")):
        pytest.skip(f"{ROOT} is no git repository, so what is tracked is not known")
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, check=True, capture_output=True)
    texts = {}
    for path in listed.stdout.decode().split("\0"):
        if os.path.isfile(os.path.join(ROOT, path)):
            texts[path] = ""
        if path in texts and path.endswith(".py"):
            with open(os.path.join(ROOT, path), encoding="utf-8") as file:
                texts[path] = file.read()
    return texts


def test_every_module_is_looked_at(sources):
    """Else the checks could be content with nothing."""
    rooms = {room_of(path) for path in python(sources)}
    assert rooms == {room for rooms in FLOORS for room in rooms}
    targets = {room_of(target) for path, tree in python(sources).items()
               for _, target in imports(tree, path, own_modules(sources))}
    assert {"support", "data", "model", "checkpoints", "training", "tiny"} < targets


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_the_house_is_in_order(sources, check):
    assert check(sources) == []


# ---- Made-up repositories ------------------------------------------------------------------------

GOOD = {f"{name}.py": "" for name in CORE} | {
    "README.md": "", "README.zh.md": "", "LICENSE": "", "pyproject.toml": "", "ds_zero3.json": "",
    "requirements.txt": "", "requirements-dev.txt": "", ".gitignore": "", ".ci/run": "",
    "docs/speed.md": "x" * 101 + "\n" * 400,
    "support/__init__.py": '"""What every room uses."""\n',
    "support/common.py": "import os\n" + "x = 1\n" * 349,
    "support/charts.py": "from support import common\nfrom .common import os\n",
    "data.py": f"from support.common import os\nTEXT = '{'漢' * 91}'\n",
    "model.py": "import data\nfrom llama import x\n\ndef f(a, b, c, *d, e, f, g=1, **h): pass\n",
    "train.py": "import model\n\nclass A:\n    def f(self, a, b, c, d, e, f):\n        import os\n",
    "tools/__init__.py": '"""Programs."""',
    "tools/chat.py": "import support.common, train\nfrom tools import other\n",
    "tools/other.py": "",
    "tests/conftest.py": "from tools.chat import train\n" + "x = 1\n" * 400,
    "tests/tools/test_chat.py": "from conftest import x\n\ndef f(a, b, c, d, e, f, g): pass\n",
}

FAULTS = [  # (check, what is changed in GOOD, what must be said)
    (wrong_root, {"objective.py": ""}, ["objective.py: does not belong in the root"]),
    (wrong_root, {"notes.txt": ""}, ["notes.txt: does not belong in the root"]),
    (wrong_root, {"dpo.py": None}, ["dpo.py: is missing in the root"]),
    (upward_imports, {"support/charts.py": "import os\nimport data"},
     ["support/charts.py:2: imports data.py, which is not on a lower floor"]),
    (upward_imports, {"train.py": "from tools.chat import main"},
     ["train.py:1: imports tools/chat.py, which is not on a lower floor"]),
    (upward_imports, {"train.py": "from tools import chat"},
     ["train.py:1: imports tools/chat.py, which is not on a lower floor"]),
    (upward_imports, {"train.py": "import tools"},
     ["train.py:1: imports tools/__init__.py, which is not on a lower floor"]),
    (upward_imports, {"llama.py": "from clip_vit import x"},              # the same floor
     ["llama.py:1: imports clip_vit.py, which is not on a lower floor"]),
    (upward_imports, {"support/charts.py": "from ..data import x"},
     ["support/charts.py:1: imports data.py, which is not on a lower floor"]),
    (upward_imports, {"support/charts.py": "def f():\n    if x:\n        import model as m"},
     ["support/charts.py:3: imports model.py, which is not on a lower floor"]),
    (upward_imports, {"tools/chat.py": "from conftest import x"},
     ["tools/chat.py:1: imports tests/conftest.py, which is not on a lower floor"]),
    (upward_imports, {"attic/old.py": ""}, ["attic/old.py: attic has no floor; give it one in "
                                            "FLOORS"]),
    (circles, {"support/common.py": "from support.charts import x"},
     ["support/common.py → support/charts.py → support/common.py"]),
    (circles, {"tools/other.py": "def f():\n    from . import third",
               "tools/third.py": "import tools.chat"},
     ["tools/chat.py → tools/other.py → tools/third.py → tools/chat.py"]),
    (circles, {"dpo.py": "import dpo"}, ["dpo.py → dpo.py"]),
    (hidden_imports, {"train.py": "def f():\n    def g():\n        from support.common import os"},
     ["train.py:3: imports support/common.py inside a function"]),
    (hidden_imports, {"train.py": "class A:\n    async def f(self):\n        import model"},
     ["train.py:3: imports model.py inside a function"]),
    (hidden_imports, {"tests/tools/test_chat.py": "def f():\n    import tools.chat"},
     ["tests/tools/test_chat.py:2: imports tools/chat.py inside a function"]),
    (long_files, {"support/common.py": "x = 1\n" * 351}, ["support/common.py: has 351 lines"]),
    (long_files, {"train.py": "\n" * 351}, ["train.py: has 351 lines"]),
    (long_lines, {"data.py": f"import os\nTEXT = '{'漢' * 93}'\n"}, ["data.py:2: has 102 columns"]),
    (long_lines, {"tests/conftest.py": "#" * 101}, ["tests/conftest.py:1: has 101 columns"]),
    (long_lines, {"dpo.py": "#" * 60 + "\u2028" + "#" * 60}, ["dpo.py:1: has 121 columns"]),
    (wrong_inits, {"tools/__init__.py": None}, ["tools/__init__.py: is missing"]),
    (wrong_inits, {"tools/__init__.py": ""}, ["tools/__init__.py: is not one docstring"]),
    (wrong_inits, {"tools/__init__.py": '"""Programs."""\nfrom tools.chat import train'},
     ["tools/__init__.py: is not one docstring"]),
    (wrong_inits, {"tools/deep/one.py": ""}, ["tools/deep/__init__.py: is missing"]),
    (many_parameters, {"model.py": "def f(a, b, c, *, d, e, f, g=1): pass"},
     ["model.py:1: f takes 7 parameters"]),
    (many_parameters, {"train.py": "class A:\n    def f(self, a, b, c, d, e, f, g): pass"},
     ["train.py:2: f takes 7 parameters"]),
    (many_parameters, {"train.py": "def g():\n    async def f(a, b, /, c, d, e, f, g): pass"},
     ["train.py:2: f takes 7 parameters"]),
]


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_nothing_is_wrong_with_a_house_in_order(check):
    assert check(GOOD) == []


@pytest.mark.parametrize("check, changes, said", FAULTS,
                         ids=[f"{check.__name__} {n}" for n, (check, *_) in enumerate(FAULTS)])
def test_a_planted_fault_is_found(check, changes, said):
    changed = {path: text for path, text in (GOOD | changes).items() if text is not None}
    assert check(changed) == said


def test_every_check_has_planted_faults():
    assert {check for check, *_ in FAULTS} == set(CHECKS)


def late_settings(sources):
    """Programs of the folders that import torch or numpy, themselves or through ours, before they
    say how its threads wait. Then it is too late.
    """
    late = []
    for path, text in sources.items():
        if not path.startswith(("evals/", "tools/")) or '__name__ == "__main__"' not in text:
            continue
        before = text.partition('os.environ.setdefault("OMP_WAIT_POLICY"')[0]
        before = before.replace("from support.command_line import", "")      # needs neither
        heads = re.findall(r"^(?:from|import) (\w+)", before, re.M)
        late += [path] * bool(set(heads) - set(sys.stdlib_module_names))
    return late


def test_threads_wait_quietly(sources):
    """Spinning threads made CHAIR take 20 s of processor time, and 9 s without."""
    assert late_settings(sources) == []
    chair = sources["evals/chair.py"]
    spoilt = chair.replace("import os", "import torch\nimport os", 1)
    assert late_settings({"evals/chair.py": spoilt}) == ["evals/chair.py"]
