import sys

import pytest
import torch

from wandazeta.adapters.tensor_train_vector import AdapterLayout

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


def by_hand(x_PND, m):
    """The adapters of all copies through full matrices, in fp64."""
    x_PND = x_PND.double()
    down, up = (a.double() @ b.double() for a, b in ((m.down_A, m.down_B), (m.up_A, m.up_B)))
    return x_PND + torch.relu(x_PND @ down + m.down_bias) @ up + m.up_bias


def cases(device):
    """Activations with their matrices: two widths and several copies, then one vector for all rows."""
    generator = torch.Generator().manual_seed(0)
    layout = AdapterLayout([12, 40, 12], rank=3, bottleneck=6)
    for copies in ((5,), ()):
        theta = torch.randn(*copies, layout.num_parameters, generator=generator).to(device)
        for width, matrices in zip((12, 40, 12), layout.merge(theta), strict=True):
            yield torch.randn(*copies, 19, width, generator=generator).to(device), matrices


@pytest.fixture
def apply_fused(monkeypatch):
    """The kernel, run by Triton's interpreter where there is no GPU."""
    pytest.importorskip("triton")
    if not torch.cuda.is_available():
        monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.delitem(sys.modules, "wandazeta.adapters.fused_kernel", raising=False)
    from wandazeta.adapters.fused_kernel import apply_fused

    yield apply_fused
    # with the interpreter, it is of no use to others
    monkeypatch.delitem(sys.modules, "wandazeta.adapters.fused_kernel")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_kernel_equals_dense_matrices(apply_fused, dtype):
    for x, matrices in cases("cuda" if torch.cuda.is_available() else "cpu"):
        x = x.to(dtype)
        found, expected = apply_fused(x, matrices), by_hand(x, matrices)
        assert found.dtype == dtype
        assert found.shape == x.shape
        # the sums of fp32, and one rounding to the eight significant bits of bfloat16
        rounding = 0.0 if dtype == torch.float32 else 2**-8
        torch.testing.assert_close(found.double(), expected, atol=1e-4 * float(expected.std()), rtol=1e-5 + rounding)


def test_what_is_not_finite_stays_so(apply_fused):
    x, matrices = next(iter(cases("cuda" if torch.cuda.is_available() else "cpu")))
    x[1, 2, 3] = torch.nan
    found = apply_fused(x, matrices)
    assert found[1, 2].isnan().all()
    assert found.isnan().sum() == 12


@pytest.mark.gpu
@needs_gpu
def test_a_site_is_one_kernel_on_a_gpu():
    from wandazeta.adapters.tensor_train_vector import _fused_kernel

    assert _fused_kernel() is not None
    for x, matrices in cases("cuda"):
        rows = (len(x), -1) if x.ndim == 3 else (-1,)
        torch.testing.assert_close(
            matrices.apply(x, rows).double(), by_hand(x, matrices), atol=1e-4, rtol=1e-4, check_dtype=False
        )
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            matrices.apply(x, rows)
        assert len(profile.events()) == 1
