import threading
import time

import pytest
import torch

from wandazeta.utilities.background import BackgroundThread

CPU = torch.device("cpu")


def fail():
    raise OSError(28, "No space left on device", "block")


def test_work_goes_on_beside_the_caller_in_one_thread():
    may_end, names = threading.Event(), set()

    def work():
        names.add(threading.current_thread().name)
        return may_end.wait(60)

    with BackgroundThread(CPU) as thread:
        assert thread.wait() is None
        for _ in range(2):
            may_end.clear()
            thread.submit(work)
            may_end.set()
            assert thread.wait() is True
        assert thread.wait() is None
    assert len(names) == 1
    assert threading.current_thread().name not in names


def test_an_error_is_raised_by_the_next_wait_once():
    with BackgroundThread(CPU) as thread:
        thread.submit(fail)
        with pytest.raises(OSError, match="No space left on device"):
            thread.wait()
        thread.wait()
    with pytest.raises(OSError, match="No space left on device"), BackgroundThread(CPU) as thread:
        thread.submit(fail)


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
@pytest.mark.parametrize("fails", [False, True])
def test_the_end_of_the_context_waits_whatever_ended_it(error, fails):
    done = []

    def work():
        time.sleep(0.1)
        done.append(1)
        if fails:
            fail()

    def ended():
        with BackgroundThread(CPU) as thread:
            thread.submit(work)
            raise error

    with pytest.raises(error):
        ended()
    assert done == [1]
