"""The house stays as it is drawn: who may import whom, single doors, short entries, a README that tells the truth."""
import ast
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = sorted(p.stem for p in (ROOT / "seresnet").glob("*.py") if p.stem != "__init__")
ENTRIES = ("write_datasets.py", "ffcv_train.py")

# Lower layers never import higher ones; modules of one layer do not import each other (but for those named).
LAYERS = [{"gelu"}, {"kernels", "gpu_kernels"}, {"compiled"}, {"winograd"}, {"runtime", "clock", "conv", "norm", "pool", "graphs"},
          {"config", "files", "imageset", "augment", "model", "loss", "optim", "tta", "shift", "synced", "ranks"}, {"cifar"},
          {"sources"}, {"beton"}, {"loader", "checkpoint", "pictures", "inputs"}, {"report", "trained"},
          {"evaluate", "predict", "export", "doctor"}, {"loop"}, {"preview"}]
# and each other: stages with plain arguments
TORCH_ONLY = {"augment", "conv", "graphs", "norm", "pool", "model", "loss", "optim", "clock", "tta", "synced", "winograd"}
DOORS = {"fastargs": {"config"}, "ffcv": {"loader", "runtime"}, "torchvision": {"runtime", "cifar"}, "pyarrow": {"sources"},
         "matplotlib": {"pictures"}, "tqdm": {"report"}, "yaml": {"config", "report"}, "sklearn": {"sources"},
         "onnxruntime": {"export"}, "wandb": {"report"}, "numba": {"loader", "runtime", "compiled", "kernels"}, "triton": {"gpu_kernels"}}


def imports(path):
    """Top-level names that the file imports anywhere, and of ours the modules."""
    others, own = set(), set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            others |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            assert all(alias.name != "*" for alias in node.names), f"{path}: star import"
            top, _, rest = node.module.partition(".")
            if top == "seresnet":
                own |= {rest.split(".")[0]} if rest else {alias.name for alias in node.names}
            else:
                others.add(top)
    return others, own


def layer(module):
    return next(i for i, names in enumerate(LAYERS) if module in names)


def test_every_module_has_its_layer():
    assert set(PACKAGE) == set().union(*LAYERS)


@pytest.mark.parametrize("module", PACKAGE)
def test_imports_run_one_way(module):
    _, own = imports(ROOT / "seresnet" / f"{module}.py")
    wrong = {other for other in own if layer(other) >= layer(module)}
    assert not wrong, f"{module} imports {wrong}"


@pytest.mark.parametrize("module", sorted(TORCH_ONLY))
def test_stages_need_torch_alone(module):
    import sys
    others, own = imports(ROOT / "seresnet" / f"{module}.py")
    assert own <= TORCH_ONLY | {"compiled"} and others <= set(sys.stdlib_module_names) | {"torch"}


@pytest.mark.parametrize("library, doors", DOORS.items())
def test_libraries_have_one_door(library, doors):
    users = {m for m in PACKAGE if library in imports(ROOT / "seresnet" / f"{m}.py")[0]}
    assert users <= doors
    assert not any(library in imports(ROOT / entry)[0] for entry in ENTRIES)


@pytest.mark.parametrize("pattern, door", [(r"os\.environ|getenv", "runtime"), (r"torch\.(save|load)\(", "checkpoint"),
                                           (r"\bprint\(", "report"), (r"yaml\.(load|unsafe_load|full_load)\(", "config"),
                                           (r"torch\.distributed|DistributedDataParallel\(|\bdist\.", "ranks")])
def test_doors_of_calls(pattern, door):
    users = {m for m in PACKAGE if re.search(pattern, (ROOT / "seresnet" / f"{m}.py").read_text())}
    assert users <= {door, "runtime"}    # runtime prints what ends a program


@pytest.mark.parametrize("entry", ENTRIES)
def test_entries_are_short(entry):
    assert len((ROOT / entry).read_text().splitlines()) <= 80


def test_a_step_is_one_screen():
    tree = ast.parse((ROOT / "seresnet/loop.py").read_text())
    [function] = [n for n in tree.body if isinstance(n, ast.FunctionDef) and n.name == "train_epoch"]
    [loop] = [n for n in function.body if isinstance(n, ast.For)]
    assert loop.end_lineno - loop.lineno < 20
    calls = {n.func.attr for n in ast.walk(loop) if isinstance(n, ast.Call) and isinstance(n.func, ast.Attribute)}
    assert not calls & {"item", "cpu", "numpy", "tolist", "synchronize", "print"}    # they would wait for the device


def test_no_device_is_written_into_the_code():
    for path in [*(ROOT / "seresnet").glob("*.py"), *(ROOT / entry for entry in ENTRIES)]:
        assert not re.search(r"cuda:0|\.cuda\(\)", path.read_text()), path


def test_public_functions_say_what_they_do():
    for path in (ROOT / "seresnet").glob("*.py"):
        tree = ast.parse(path.read_text())
        assert path.stem == "__init__" or ast.get_docstring(tree), path
        for node in tree.body:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_"):
                lines = len(ast.unparse(node).splitlines())
                section = path.stem == "config" and isinstance(node, ast.ClassDef)    # each key carries its own line of help
                assert ast.get_docstring(node) or section or lines <= 4, f"{path.name}: {node.name}"


def tracked():
    listing = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if listing.returncode:
        pytest.skip("not a git checkout")
    return listing.stdout.split()


def test_the_readmes_tree_is_the_tree():
    readme = (ROOT / "README.md").read_text()
    tree = re.search(r"## Files\n+```\n(.*?)```", readme, re.S)[1]
    named = set(re.findall(r"([\w.-]+\.(?:py|yaml|toml|sh|sbatch)|Makefile)\b", tree))
    files = {Path(f).name for f in tracked()
             if re.fullmatch(r"[^/]+\.(py|toml)|Makefile|scripts/.*|examples/slurm/.*|(seresnet|benchmarks|rn_configs)/[^/]+", f)}
    assert named == files - {"__init__.py"}


def test_the_readmes_paths_exist():
    readme = (ROOT / "README.md").read_text()
    for path in re.findall(r"\]\((?!http|#)([^)#]+)\)", readme):
        assert (ROOT / path).exists(), path
    for recipe in re.findall(r"rn_configs/[\w]+\.yaml", readme):
        assert (ROOT / recipe).exists(), recipe
