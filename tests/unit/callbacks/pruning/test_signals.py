import os
import signal
import stat
import threading

import pytest

from wandazeta.callbacks.pruning.signals import DeferredSignals, requeue_slurm_job


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


def test_slurm_is_asked_to_run_the_job_again(tmp_path, monkeypatch):
    for name in ("SLURM_JOB_ID", "SLURM_ARRAY_JOB_ID", "SLURM_ARRAY_TASK_ID"):
        monkeypatch.delenv(name, raising=False)
    assert "nothing was requeued" in requeue_slurm_job()
    monkeypatch.setenv("SLURM_JOB_ID", "12")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "could not be run" in requeue_slurm_job()
    command = tmp_path / "scontrol"
    command.write_text(f'#!/bin/sh\necho "$@" > {tmp_path}/asked\n')
    command.chmod(command.stat().st_mode | stat.S_IXUSR)
    assert requeue_slurm_job().endswith("done")
    assert (tmp_path / "asked").read_text() == "requeue 12\n"
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "10")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "3")
    requeue_slurm_job()
    assert (tmp_path / "asked").read_text() == "requeue 10_3\n"
