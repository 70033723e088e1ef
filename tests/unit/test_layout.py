import ast
import doctest
import importlib
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LAYERS = ("callbacks", "modules", "datamodules")
CORES = ("callbacks/pruning", "modules/adapters", "modules/zo")
PLAIN = ("wandazeta.modules.adapter_files",)  # loads exported adapters wherever they are needed


def python_files(folder):
    return sorted((ROOT / folder).rglob("*.py"))


def imported_names(path):
    """Absolute names of everything a file imports from wandazeta, relative imports resolved."""
    package = ("wandazeta", *path.relative_to(ROOT).parent.parts)
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            yield ".".join([*base, *([node.module] if node.module else [])])


@pytest.mark.parametrize("layer", LAYERS)
def test_siblings_do_not_import_each_other(layer):
    for path in python_files(layer):
        for name in imported_names(path):
            parts = name.split(".")
            if parts[0] == "wandazeta" and len(parts) > 1:
                assert parts[1] in (layer, "blocks", "sharded", "stored"), f"{path.relative_to(ROOT)} imports {name}"
            assert parts[0] not in LAYERS, f"{path.relative_to(ROOT)} imports {name}, which is called wandazeta.{name}"


@pytest.mark.parametrize("core", CORES)
def test_cores_import_without_lightning_and_transformers(core, tmp_path):
    names = [".".join(("wandazeta", *path.relative_to(ROOT).with_suffix("").parts)) for path in python_files(core)]
    names = [
        name.removesuffix(".__init__")
        for name in [*names, "wandazeta.blocks", "wandazeta.sharded", "wandazeta.stored", *PLAIN]
    ]
    program = f"""
import importlib, sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("lightning", "lightning_fabric", "pytorch_lightning", "transformers"):
            raise ModuleNotFoundError("blocked: " + name)

sys.meta_path.insert(0, Blocked())
for name in {names!r}:
    importlib.import_module(name)
"""
    result = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


def test_no_bare_names_are_imported(tmp_path):
    bare = (*(path.stem for path in ROOT.glob("*.py")), *LAYERS)
    program = f"import sys, wandazeta.main; print([n for n in sys.modules if n.split('.')[0] in {bare}])"
    result = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_every_folder_with_code_is_a_listed_package():
    listed = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"])
    folders = {path.parent.relative_to(ROOT) for layer in LAYERS for path in python_files(layer)}
    assert listed == {"wandazeta"} | {".".join(("wandazeta", *folder.parts)) for folder in folders}


def test_the_tested_torch_is_pinned_once():
    constraints = (ROOT / "constraints.txt").read_text().splitlines()
    pin = next(line for line in constraints if line.startswith("torch=="))
    assert f'"{pin}"' in (ROOT / "Makefile").read_text()


def test_examples_in_docstrings_show_what_they_print():
    attempted = 0
    files = [path for layer in LAYERS for path in python_files(layer)]
    for path in [*files, *(path for path in ROOT.glob("*.py") if path.stem not in ("__init__", "main"))]:
        # by the installed name, never by path: a class imported under two names is two classes
        name = ".".join(("wandazeta", *path.relative_to(ROOT).with_suffix("").parts)).removesuffix(".__init__")
        result = doctest.testmod(importlib.import_module(name))
        assert result.failed == 0, name
        attempted += result.attempted
    assert attempted > 0
