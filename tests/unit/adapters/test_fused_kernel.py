import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers.fused_adapters import by_hand, cases, check_kernel


def test_the_kernel_equals_dense_matrices_in_the_interpreter():
    pytest.importorskip("triton")
    # in a process of its own: Triton decides at its import whether it interprets
    program = Path(__file__).parents[2] / "helpers" / "fused_adapters.py"
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, program], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_site_is_one_kernel_on_a_gpu():
    from wandazeta.adapters.tensor_train_vector import _fused_kernel

    assert _fused_kernel() is not None
    check_kernel("cuda")
    for x, matrices in cases("cuda"):
        rows = (len(x), -1) if x.ndim == 3 else (-1,)
        found = matrices.apply(x, rows).double()
        torch.testing.assert_close(found, by_hand(x, matrices), atol=1e-3, rtol=1e-4)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            matrices.apply(x, rows)
        kernels = [event for event in profile.events() if "adapter_kernel" in event.name]
        assert len(kernels) == 1
        assert not [event for event in profile.events() if "gemm" in event.name]
