import pytest
import torch

from wandazeta.utilities.triton_kernels import load_kernels

CPU = torch.device("cpu")
MODULE = """
calls = []

def try_out(device):
    calls.append(device)
    {effect}
"""


@pytest.fixture(autouse=True)
def nothing_was_tried():
    load_kernels.cache_clear()
    yield
    load_kernels.cache_clear()


def module_with(tmp_path, monkeypatch, name, effect):
    (tmp_path / f"{name}.py").write_text(MODULE.format(effect=effect))
    monkeypatch.syspath_prepend(tmp_path)
    return name


def test_kernels_are_tried_out_once_on_each_device(tmp_path, monkeypatch, caplog):
    name = module_with(tmp_path, monkeypatch, "kernels_that_run", "pass")
    found = [load_kernels(name, torch.device(device), "it is slow") for device in ("cpu", "cpu", "meta")]
    assert found[0] is found[1] is found[2]
    assert found[0].calls == [CPU, torch.device("meta")]
    assert not caplog.messages


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("kernels_that_fail", "RuntimeError: no C compiler"),
        ("no.such.kernels", "ModuleNotFoundError: No module named 'no'"),
    ],
)
def test_where_kernels_do_not_run_one_line_says_why(tmp_path, monkeypatch, caplog, name, reason):
    module_with(tmp_path, monkeypatch, "kernels_that_fail", "raise RuntimeError('no C compiler\\n  in a.c')")
    assert [load_kernels(name, CPU, "it is slow") for _ in range(2)] == [None, None]
    assert caplog.messages == [f"Triton cannot be used on cpu, so that it is slow: {reason}"]
