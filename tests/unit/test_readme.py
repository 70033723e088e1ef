import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()


@pytest.fixture
def render(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import render

    return render


def test_the_code_prints_what_is_shown(tmp_path):
    code, output = re.search(r"```python\n(.*?)```\n\n```\n(.*?)```", README, flags=re.DOTALL).groups()
    environment = os.environ | {"PYTHONPATH": str(ROOT / "examples")}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith(output)


def test_the_tables_are_those_of_the_result_files(render):
    texts = {page: (ROOT / page).read_text() for page in render.PAGES}
    for page, text in texts.items():
        assert render.rendered(text) == text, page
    markers = [name for text in texts.values() for name in re.findall(r"<!-- (\w+): written by", text)]
    # a table appears with its first records
    assert sorted(markers) == sorted(
        name for name, (result, _) in render.BLOCKS.items() if (render.RESULTS / f"{result}.json").exists()
    )


def test_links_lead_to_files():
    links = [link for link in re.findall(r"\]\(([^)]+)\)", README) if not link.startswith("https://")]
    assert links
    for link in links:
        assert (ROOT / link).exists(), link


def test_commands_name_files_that_exist():
    for name in re.findall(r"configs/[\w/]+\.yaml", README):
        assert (ROOT / name).exists(), name
