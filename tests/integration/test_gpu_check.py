"""`make gpu-check` on the CPU with tiny shapes; the measured values are not checked."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture
def check(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks" / "gpu")
    import check

    return check


def run(folder, *arguments):
    command = [sys.executable, "benchmarks/gpu/check.py", "--device", "cpu", "--folder", folder, *arguments]
    return subprocess.run(
        command,
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=900,
    )


def results(folder):
    return {record["step"]: record for record in json.loads((folder / "gpu_check.json").read_text())["records"]}


def test_steps_that_are_named_are_added_to_the_file_and_the_page(tmp_path):
    done = run(tmp_path, "--steps", "correctness")
    assert done.returncode == 0, done.stdout + done.stderr
    (left_out,) = (line for line in done.stdout.splitlines() if "needs a GPU" in line)
    assert "DeepSpeed" in left_out
    done = run(tmp_path, "--steps", "block_steps")
    assert done.returncode == 0, done.stdout + done.stderr
    found = results(tmp_path)
    assert [record["status"] for record in found.values()] == ["ok", "ok"]
    assert all(record["passed"] for record in found["correctness"]["records"])
    page = (tmp_path / "gpu_check.md").read_text()
    assert "## correctness" in page
    assert "## block_steps" in page


@pytest.mark.slow
def test_everything_runs_without_a_gpu(tmp_path, check):
    done = run(tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    found = results(tmp_path)
    assert list(found) == list(check.STEPS)
    for name, record in found.items():
        assert record["status"] == ("needs a GPU" if check.STEPS[name].needs_gpu else "ok"), record
    assert {record["strategy"] for record in found["strategies"]["records"]} == {"cpu", "ddp", "fsdp2"}
    assert {r["method"] for r in found["peer"]["records"]} == {"wanda", "sparsegpt"}
    assert all(r["sparsity"] == 0.5 and r["seconds_per_block"] > 0 for r in found["peer"]["records"])
    assert found["best"]["records"][1]["perplexity"] > 0
    assert found["demo"]["records"][0]["val/accuracy"] >= 0


def step(check, tmp_path, code, limit=60):
    (tmp_path / "script.py").write_text(code)
    return check.Step("a step", limit, lambda call: [str(tmp_path / "script.py")])


def test_a_step_that_hangs_is_stopped_with_what_it_has_started_and_keeps_its_result(tmp_path, check, monkeypatch):
    code = """
import json, subprocess, sys, time
from pathlib import Path
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
Path(sys.argv[2]).parent.mkdir(parents=True)
Path(sys.argv[2]).write_text(json.dumps({"records": [{"child": child.pid}]}))
time.sleep(600)
"""
    monkeypatch.setitem(check.STEPS, "zo", step(check, tmp_path, code, limit=2))
    record = check.run_step("zo", check.Call("cpu", tmp_path / "check"), 100)
    assert record["status"] == "stopped after 10 s"
    (child,) = (r["child"] for r in record["records"])
    state, end = Path(f"/proc/{child}/stat"), time.monotonic() + 60
    while state.exists() and state.read_text().split()[2] != "Z":
        assert time.monotonic() < end
        time.sleep(0.1)


def test_a_step_that_fails_says_why_in_its_last_line(tmp_path, check, monkeypatch):
    monkeypatch.setitem(check.STEPS, "zo", step(check, tmp_path, "raise SystemExit('error: no luck')"))
    record = check.run_step("zo", check.Call("cpu", tmp_path / "check"), 100)
    assert (record["status"], record["error"]) == ("failed", "error: no luck")


def test_no_step_starts_when_the_time_is_over(tmp_path, check, monkeypatch):
    monkeypatch.setitem(check.STEPS, "zo", step(check, tmp_path, "raise SystemExit('never')"))
    assert check.run_step("zo", check.Call("cpu", tmp_path), 0.5)["status"] == "no time left"


def test_the_page_on_the_check_lists_its_steps_and_limits(check):
    page = (ROOT / "benchmarks" / "gpu" / "README.md").read_text()
    for name, each in check.STEPS.items():
        assert f"| `{name}` | {each.limit} |" in page
