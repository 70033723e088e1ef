import pytest
import torch
from helpers.fused_adapters import by_hand, cases, check_kernel
from helpers.interpreter import run_interpreted


def test_the_kernel_equals_dense_matrices_in_the_interpreter(repository):
    pytest.importorskip("triton")
    run_interpreted(repository / "tests" / "helpers" / "fused_adapters.py")


def test_the_kernel_compiles_for_a_gpu_and_does_not_use_tf32(tmp_path, monkeypatch):
    """The interpreter runs code that no compiler would take."""
    triton = pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from wandazeta.adapters.fused_kernel import _adapter_kernel

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    matrices = ("down_A", "down_B", "down_bias", "up_A", "up_B", "up_bias")
    tensors = dict.fromkeys(("x_PND", "y_PND"), "*bf16") | dict.fromkeys(matrices, "*fp32")
    constants = {"rank": 2, "rows": 4, "padded_width": 128, "padded_bottleneck": 16}
    names = _adapter_kernel.arg_names
    types = {name: tensors.get(name, "constexpr" if name in constants else "i32") for name in names}
    values = {(at,): constants[name] for at, name in enumerate(names) if name in constants}
    compiled = triton.compile(ASTSource(_adapter_kernel, types, values), target=GPUTarget("cuda", 90, 32))
    assert "fma.rn.f32" in compiled.asm["ptx"]
    assert "mma" not in compiled.asm["ptx"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_site_is_one_kernel_on_a_gpu():
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
