"""Compare the adapter as one kernel with dense matrices; as a program, in Triton's interpreter on the CPU."""

import torch


def by_hand(x_PND, m):
    """The adapters of all copies through full matrices, in fp64."""
    x_PND = x_PND.double()
    down, up = (a.double() @ b.double() for a, b in ((m.down_A, m.down_B), (m.up_A, m.up_B)))
    return x_PND + torch.relu(x_PND @ down + m.down_bias) @ up + m.up_bias


def cases(device):
    """Activations with their matrices: two widths and several copies, then one vector for all rows."""
    from wandazeta.adapters.tensor_train_vector import AdapterLayout

    generator = torch.Generator().manual_seed(0)
    layout = AdapterLayout([12, 40, 12], rank=3, bottleneck=6)
    for copies in ((5,), ()):
        theta = torch.randn(*copies, layout.num_parameters, generator=generator).to(device)
        for width, matrices in zip((12, 40, 12), layout.merge(theta), strict=True):
            yield torch.randn(*copies, 19, width, generator=generator).to(device), matrices


def check_kernel(device):
    """Compare all cases."""
    from wandazeta.adapters.fused_kernel import apply_fused, try_out

    try_out(torch.device(device))
    for x, matrices in cases(device):
        # the sums of fp32; bfloat16 has eight significant bits, which the interpreter cuts off instead of rounding
        for dtype, rounding in ((torch.float32, 0.0), (torch.bfloat16, 2**-7)):
            found, expected = apply_fused(x.to(dtype), matrices), by_hand(x.to(dtype), matrices)
            assert found.dtype == dtype
            atol = 1e-4 * float(expected.std())
            torch.testing.assert_close(found.double(), expected, atol=atol, rtol=1e-5 + rounding)
        x.view(-1, x.shape[-1])[7, 2] = torch.nan
        is_nan = apply_fused(x, matrices).isnan().view(-1, x.shape[-1])
        assert is_nan[7].all(), "what is not finite stays so"
        assert is_nan.sum() == x.shape[-1]


if __name__ == "__main__":
    check_kernel("cpu")
