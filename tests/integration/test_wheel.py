import os
import re
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from email import message_from_bytes
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    # from a copy: building in the checkout would leave build/ there, which a later wheel would pick up
    source = tmp_path_factory.mktemp("source")
    ignored = shutil.ignore_patterns(".*", "runs", "build", "dist", "*.egg-info", "__pycache__", "tests", "benchmarks")
    shutil.copytree(ROOT, source, ignore=ignored, dirs_exist_ok=True)
    output = tmp_path_factory.mktemp("wheel")
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--quiet",
        "--no-deps",
        "--no-build-isolation",
        "-w",
        output,
        source,
    ]
    subprocess.run(command, check=True)
    return next(output.glob("*.whl"))


def test_the_wheel_holds_every_package_and_nothing_else(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    assert {name.partition("/")[0].partition("-")[0] for name in names} == {"wandazeta"}
    folders = ("callbacks", "modules", "datamodules")
    expected = {str(path.relative_to(ROOT)) for folder in folders for path in (ROOT / folder).rglob("*.py")}
    package = ROOT / "wandazeta"
    code = {
        *package.rglob("*.py"),
        *package.glob("presets/*.yaml"),
        *package.glob("data/tasks/*.yaml"),
        package / "py.typed",
    }
    expected |= {str(path.relative_to(package)) for path in code} | {"pruning/report/page.html"}
    inside = {name.removeprefix("wandazeta/") for name in names if name.startswith("wandazeta/")}
    assert inside == expected


def test_the_description_of_the_package_has_no_relative_link(wheel):
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        metadata = message_from_bytes(archive.read(name))
    home = dict(url.split(", ") for url in metadata.get_all("Project-URL"))["Homepage"]
    description = metadata.get_payload()
    links = re.findall(r"\]\(([^)]+)\)", description)
    assert len(links) == len(re.findall(r"\]\(([^)]+)\)", (ROOT / "README.md").read_text()))
    assert all(link.startswith("https://") for link in links)
    for link in links:
        if link.startswith(home):
            kind, branch, path = link.removeprefix(f"{home}/").split("/", 2)
            assert (ROOT / path).exists(), link
            # a picture has to be the file, not the page about it
            assert (kind, branch) == (
                "raw" if f"]({link})" in re.findall(r"!\[[^]]*(.*)", description) else "blob",
                "main",
            )
    assert f"{home}/raw/main/docs/demo.svg" in links


@pytest.mark.slow
def test_the_wheel_runs_from_another_directory(wheel, tmp_path):
    folder = tmp_path / "environment"
    venv.create(folder, with_pip=False)
    python = folder / "bin" / "python"
    site = next((folder / "lib").glob("python*/site-packages"))
    install = [sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-deps", wheel]
    subprocess.run(install, check=True)
    # nothing generic lands in site-packages
    assert {path.name.partition("-")[0] for path in site.iterdir()} == {"wandazeta"}
    # the dependencies are those of this environment; as a plain path, its own editable wandazeta stays behind
    (site / "dependencies.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}

    def run(*command):
        return subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False, timeout=300
        )

    shown = run(folder / "bin" / "wandazeta", "--help")
    assert shown.returncode == 0, shown.stderr
    assert "prune" in shown.stdout
    model = ("--model", "LanguageModel", "--model.model_name_or_path", "x", "--data", "TextDataModule")
    printed = run(folder / "bin" / "wandazeta", "prune", "-c", "preset:best", *model, "--print_config")
    assert "tuned-ro" in printed.stdout, printed.stderr
    where = run(python, "-c", "import wandazeta.callbacks as m; print(m.__file__)")
    assert Path(where.stdout.strip()).is_relative_to(site), where.stderr
