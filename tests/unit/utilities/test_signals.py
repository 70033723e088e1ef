import os
import signal
import stat
import threading
from types import SimpleNamespace

import pytest
import torch
from helpers.processes import fork_ranks

from wandazeta.callbacks import WandaPPPruneCallback
from wandazeta.callbacks import prune as wandapp
from wandazeta.utilities.signals import DeferredSignals, requeue_slurm_job


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGUSR2])
def test_a_signal_sets_a_flag_and_handlers_come_back(signum):
    before = {s: signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGUSR2)}
    with DeferredSignals(signal.SIGUSR2) as signals:
        assert signals.received is None
        os.kill(os.getpid(), signum)
        assert signals.received == signum
    assert {s: signal.getsignal(s) for s in before} == before


def test_a_second_interrupt_ends_the_work_at_once():
    with DeferredSignals() as signals:
        signals.received = signal.SIGTERM
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_other_threads_change_no_handlers():
    errors = []

    def work():
        try:
            with DeferredSignals():
                pass
        except ValueError as error:
            errors.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert not errors


def scontrol(folder, before="true"):
    command = folder / "scontrol"
    command.write_text(f'#!/bin/sh\n{before}\necho "$@" > {folder}/asked\n')
    command.chmod(command.stat().st_mode | stat.S_IXUSR)


def test_no_rank_of_a_preempted_pruning_ends_before_its_job_is_requeued(tmp_path, monkeypatch):
    scontrol(tmp_path, "sleep 1")
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.delenv("SLURM_ARRAY_JOB_ID", raising=False)
    monkeypatch.setenv("SLURM_JOB_ID", "12")
    monkeypatch.setattr(wandapp, "requeue_signal", lambda _: signal.SIGUSR1)

    def work(rank, size):
        callback = WandaPPPruneCallback(output_dir=str(tmp_path / "progress"))
        strategy = SimpleNamespace(root_device=torch.device("cpu"))
        trainer = SimpleNamespace(is_global_zero=rank == 0, strategy=strategy)
        # the signal came to one of them only
        with pytest.raises(SystemExit):
            callback._stop(trainer, SimpleNamespace(received=signal.SIGUSR1 if rank == 0 else None))
        return (tmp_path / "asked").exists()

    assert fork_ranks(work, tmp_path, 3) == [True, True, True]


def test_slurm_is_asked_to_run_the_job_again(tmp_path, monkeypatch):
    for name in ("SLURM_JOB_ID", "SLURM_ARRAY_JOB_ID", "SLURM_ARRAY_TASK_ID"):
        monkeypatch.delenv(name, raising=False)
    assert "nothing was requeued" in requeue_slurm_job()
    monkeypatch.setenv("SLURM_JOB_ID", "12")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "could not be run" in requeue_slurm_job()
    scontrol(tmp_path)
    assert requeue_slurm_job().endswith("done")
    assert (tmp_path / "asked").read_text() == "requeue 12\n"
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "10")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "3")
    requeue_slurm_job()
    assert (tmp_path / "asked").read_text() == "requeue 10_3\n"
