import os
import signal
import stat
import threading
from contextlib import suppress
from types import SimpleNamespace

import pytest
import torch
from helpers.processes import fork_ranks

from wandazeta.callbacks import WandaPPPruneCallback
from wandazeta.callbacks import prune as wandapp
from wandazeta.utilities.signals import STOP_SIGNALS, DeferredSignals, requeue_slurm_job

WATCHED = STOP_SIGNALS | {signal.SIGUSR2}


@pytest.mark.parametrize("signum", sorted(WATCHED))
def test_a_signal_is_recorded_and_the_handlers_are_restored(signum):
    before = {number: signal.getsignal(number) for number in WATCHED}
    with DeferredSignals(WATCHED, deliver=False) as signals:
        assert signals.received is None
        os.kill(os.getpid(), signum)
        assert signals.received == signum
    assert {number: signal.getsignal(number) for number in before} == before


def test_a_second_interrupt_ends_the_work_at_once():
    with DeferredSignals(STOP_SIGNALS, deliver=False):
        signal.raise_signal(signal.SIGTERM)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


@pytest.mark.parametrize("fails", [False, True])
def test_handlers_run_when_the_context_ends_and_in_order(fails):
    ran = []
    before = {number: signal.signal(number, lambda number, _: ran.append(number)) for number in WATCHED}
    came = [signal.SIGTERM, signal.SIGINT, signal.SIGINT, signal.SIGUSR2]
    try:
        with suppress(RuntimeError), DeferredSignals():
            for number in came:
                signal.raise_signal(number)
            assert ran == []
            if fails:
                raise RuntimeError
        assert ran == came
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def test_signals_without_a_handler_in_python_are_left_alone():
    before = signal.signal(signal.SIGUSR2, signal.SIG_IGN)
    try:
        with DeferredSignals() as signals:
            signal.raise_signal(signal.SIGUSR2)
            assert signals.received is None
    finally:
        signal.signal(signal.SIGUSR2, before)


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
