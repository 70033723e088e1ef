import doctest
import importlib
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
# folder -> name of the package that it is installed as
PACKAGES = {
    "wandazeta": "wandazeta",
    "callbacks": "wandazeta.callbacks",
    "datamodules": "wandazeta.datamodules",
    "modules": "wandazeta.modules",
}
PLAIN_ROOMS = ("adapters", "data", "models", "pruning", "scoring", "utilities", "zeroth_order")
# rooms that need torch alone to be imported; the others need torchmetrics or transformers, too
TORCH_ROOMS = ("adapters", "data", "models", "pruning", "utilities", "zeroth_order")


def module_names(folder):
    for path in sorted((ROOT / folder).rglob("*.py")):
        parts = path.relative_to(ROOT / folder).with_suffix("").parts
        if parts[-1] != "__main__":
            yield ".".join((PACKAGES[folder], *parts)).removesuffix(".__init__")


def import_without(blocked, names, folder):
    program = f"""
import importlib, sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {blocked!r}:
            raise ModuleNotFoundError("blocked: " + name)

sys.meta_path.insert(0, Blocked())
for name in {names!r}:
    importlib.import_module(name)
"""
    result = subprocess.run(
        [sys.executable, "-c", program], cwd=folder, capture_output=True, text=True, check=False, timeout=300
    )
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("room", PLAIN_ROOMS)
def test_plain_torch_rooms_import_without_lightning(room, tmp_path):
    names = [name for name in module_names("wandazeta") if name.split(".")[1:2] == [room]]
    import_without(("lightning", "lightning_fabric", "pytorch_lightning"), names, tmp_path)


@pytest.mark.parametrize("room", TORCH_ROOMS)
def test_core_rooms_import_without_transformers(room, tmp_path):
    names = [name for name in module_names("wandazeta") if name.split(".")[1:2] == [room]]
    import_without(("lightning", "lightning_fabric", "pytorch_lightning", "transformers"), names, tmp_path)


def test_no_bare_names_are_imported(tmp_path):
    bare = ("callbacks", "datamodules", "modules", "main")
    program = f"import sys, wandazeta.cli.main; print([n for n in sys.modules if n.split('.')[0] in {bare}])"
    result = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=True, timeout=300
    )
    assert result.stdout.strip() == "[]"


def test_every_folder_with_code_is_a_listed_package():
    listed = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"])
    folders = {(folder, path.parent) for folder in PACKAGES for path in (ROOT / folder).rglob("*.py")}
    named = {".".join((PACKAGES[top], *path.relative_to(ROOT / top).parts)) for top, path in folders}
    assert listed == named


@pytest.mark.parametrize("package", ["wandazeta.callbacks", "wandazeta.modules", "wandazeta.datamodules"])
def test_tab_completion_shows_the_public_names_and_nothing_else(package):
    module = importlib.import_module(package)
    assert dir(module) == sorted(module.__all__)


def test_the_tested_torch_is_pinned_once():
    constraints = (ROOT / "constraints.txt").read_text().splitlines()
    pin = next(line for line in constraints if line.startswith("torch=="))
    assert f'"{pin}"' in (ROOT / "Makefile").read_text()


def test_the_citation_and_the_extras_are_those_of_the_package():
    from wandazeta.version import __version__

    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert citation["version"] == __version__
    assert citation["license"] == project["license"]
    assert citation["repository-code"] == project["urls"]["Homepage"]
    (everything,) = project["optional-dependencies"]["all"]
    extras = re.fullmatch(r"wandazeta\[(.*)\]", everything)[1].split(",")
    assert sorted(extras) == sorted(project["optional-dependencies"].keys() - {"all", "dev", "docs"})


def test_the_workflow_runs_what_the_continuous_integration_runs():
    steps = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())["jobs"]["check"]["steps"]
    assert [step["run"] for step in steps if "run" in step] == [".ci/run"]
    targets = re.search(r"make (.*)", (ROOT / ".ci" / "run").read_text().splitlines()[-1])[1].split()
    makefile = (ROOT / "Makefile").read_text()
    assert {"docs", "dist", "test"} <= set(targets)
    for target in targets:
        assert f"\n{target}:" in makefile


@pytest.mark.parametrize(
    "path", sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("*_*.yml")), ids=lambda path: path.stem
)
def test_issue_templates_have_what_github_needs(path):
    template = yaml.safe_load(path.read_text())
    assert template.keys() >= {"name", "description", "body"}
    for field in template["body"]:
        assert field["attributes"]["label"]


def test_docstrings_call_their_examples_as_the_site_does():
    for folder in PACKAGES:
        for path in (ROOT / folder).rglob("*.py"):
            assert not re.search(r"^ *Example:$", path.read_text(), flags=re.MULTILINE), path


def test_examples_in_docstrings_show_what_they_print():
    attempted = 0
    for folder in PACKAGES:
        for name in module_names(folder):
            result = doctest.testmod(importlib.import_module(name))
            assert result.failed == 0, name
            attempted += result.attempted
    assert attempted > 0
