import pytest
import torch
from helpers.pruning import Tiny, loader, trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger

from wandazeta.callbacks import PeakMemoryMonitor, monitors

GIB = 2**30


@pytest.fixture
def peaks(monkeypatch):
    """Peak memory after every batch, in GiB."""

    def after_every_batch(*values):
        following = iter(values)
        monkeypatch.setattr(monitors, "peak_memory", lambda device: int(next(following) * GIB))

    return after_every_batch


def fit(monitor, *callbacks, ckpt_path=None, **kwargs):
    run = trainer(monitor, *callbacks, log_every_n_steps=2, **kwargs)
    run.fit(Tiny(), loader(), ckpt_path=ckpt_path)
    return run


def test_the_peak_of_the_process_is_logged(tmp_path):
    monitor = PeakMemoryMonitor()
    run = fit(monitor, logger=CSVLogger(tmp_path, version=""))
    assert run.logged_metrics["peak_memory_gib"] == pytest.approx(monitor.peak_bytes / GIB)
    # torch alone takes more than this
    assert monitor.peak_bytes > 2**26
    assert "peak_memory_gib" in (tmp_path / "lightning_logs/metrics.csv").read_text()


def test_the_largest_peak_stays(peaks):
    peaks(1, 4, 3, 2)
    monitor = PeakMemoryMonitor()
    run = fit(monitor)
    assert monitor.peak_bytes == 4 * GIB
    assert run.callback_metrics["peak_memory_gib"] == 4


@pytest.mark.parametrize(("later", "expected"), [(2, 3), (5, 5)])
def test_a_resumed_run_starts_from_the_larger_peak(tmp_path, peaks, later, expected):
    peaks(1, 3, 2, 2)
    fit(PeakMemoryMonitor(), ModelCheckpoint(tmp_path, "first"), enable_checkpointing=True)
    state = torch.load(tmp_path / "first.ckpt", weights_only=True)["callbacks"]["PeakMemoryMonitor"]
    assert state == {"peak_bytes": 3 * GIB}

    peaks(*[later] * 4)
    monitor = PeakMemoryMonitor()
    run = fit(monitor, ckpt_path=tmp_path / "first.ckpt", max_epochs=2)
    assert monitor.peak_bytes == expected * GIB
    assert run.callback_metrics["peak_memory_gib"] == expected


def test_no_logging_in_between():
    monitor = PeakMemoryMonitor()
    run = trainer(monitor, log_every_n_steps=0)
    run.fit(Tiny(), loader())
    assert monitor.peak_bytes > 0
    assert "peak_memory_gib" not in run.callback_metrics
