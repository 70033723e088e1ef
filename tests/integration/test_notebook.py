import re
from copy import deepcopy
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOK = Path(__file__).parents[2] / "examples" / "quickstart.ipynb"
NUMBER = r"\d+(?:,\d{3})*(?:\.\d+)?"


def printed(notebook):
    """The lines that the cells print; errors and warnings are no part of the notebook."""
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    assert {output.get("name") for output in outputs} == {"stdout"}
    return "".join(output.text for output in outputs).splitlines()


def numbers(line):
    return [float(number.replace(",", "")) for number in re.findall(NUMBER, line)]


@pytest.mark.slow
def test_the_notebook_runs_in_an_empty_folder_and_prints_what_it_shows(tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    shown = printed(notebook)
    executed = deepcopy(notebook)
    NotebookClient(executed, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
    found = printed(executed)
    assert [re.sub(NUMBER, "#", line) for line in found] == [re.sub(NUMBER, "#", line) for line in shown]
    for line, expected in zip(found, shown, strict=True):
        # other processors round differently, and training amplifies it
        assert numbers(line) == pytest.approx(numbers(expected), rel=0.15), (line, expected)
    assert not list(tmp_path.iterdir())
    assert [line for line in found if "50.0% zeros" in line] == found[1:]
