from importlib.util import find_spec

import pytest
import torch
from helpers.interpreter import run_interpreted
from helpers.sparsegpt_reference import pattern_of, problem, published

from wandazeta.pruning.method.sparsegpt import sparsegpt
from wandazeta.pruning.pattern import SparsityPattern

PATTERNS = [(576, "2:4"), (96, "1:4"), (160, "4:8"), (160, "10:16"), (15, "2:5"), (300, 0.5), (64, 0.7), (129, 0.6)]


@pytest.mark.parametrize(("width", "pattern"), PATTERNS)
def test_equals_the_published_procedure(width, pattern):
    weight, x = problem(width)
    before = weight.clone()
    # two layers with one input are each what they would be alone
    parts = weight.split([10, 14])
    for part, (found, kept) in zip(parts, sparsegpt(parts, x.t() @ x, pattern_of(pattern)), strict=True):
        expected, expected_mask = published(part, x.t() @ x, pattern_of(pattern))
        assert torch.equal(kept, expected_mask)
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)
        assert (found[~kept] == 0).all()
        assert not found[~kept].signbit().any()
    assert torch.equal(weight, before)


def test_what_is_kept_makes_up_for_what_is_pruned():
    weight, x = problem(64)
    ((found, kept),) = sparsegpt([weight], x.t() @ x, SparsityPattern())
    error = (x @ (found - weight).t()).norm()
    assert error < 0.8 * (x @ (weight * kept - weight).t()).norm()


def test_the_scale_of_the_gram_matrix_does_not_matter():
    weight, x = problem(64)
    found = [sparsegpt([weight], scale * (x.t() @ x), SparsityPattern())[0][0] for scale in (1.0, 1024.0)]
    torch.testing.assert_close(*found)


def test_a_feature_that_is_never_seen_costs_nothing():
    weight, x = problem(64)
    x[:, 5] = 0
    ((found, _),) = sparsegpt([weight], x.t() @ x, SparsityPattern())
    assert (found[:, 5] == 0).all()
    assert found.isfinite().all()


def test_a_layer_that_only_sees_zeros_costs_nothing():
    weight, _ = problem(64)
    ((found, kept),) = sparsegpt([weight], torch.zeros(64, 64), SparsityPattern())
    assert (found == 0).all()
    assert (kept.view(-1, 4).sum(1) == 2).all()


@pytest.mark.parametrize("value", ["nan", "inf", "1e30"])
def test_activations_that_are_not_finite_are_an_error(value):
    weight, x = problem(64)
    x[3, 3] = float(value)
    with pytest.raises(ValueError, match="Gram matrix can be inverted"):
        sparsegpt([weight], x.t() @ x, SparsityPattern())


def test_a_gram_matrix_that_rounding_has_spoiled_is_an_error():
    weight, _ = problem(64)
    with pytest.raises(ValueError, match="Gram matrix can be inverted"):
        sparsegpt(
            [weight], torch.eye(64) + 2 * torch.eye(64).roll(1, 0) + 2 * torch.eye(64).roll(-1, 0), SparsityPattern()
        )


def test_sixteen_bit_weights_are_solved_in_thirty_two():
    weight, x = problem(64)
    weight = weight.bfloat16()
    found, expected = (sparsegpt([w], x.t() @ x, SparsityPattern())[0] for w in (weight, weight.float()))
    assert found[0].dtype == torch.float32
    assert torch.equal(found[0], expected[0])


@pytest.mark.skipif(find_spec("triton") is None, reason="no Triton")
def test_the_kernel_equals_the_published_procedure_and_the_loop_in_torch(repository):
    run_interpreted(repository / "tests" / "helpers" / "interpreted_sparsegpt.py")


@pytest.mark.skipif(find_spec("triton") is None, reason="no Triton")
@pytest.mark.parametrize("group", [(0, 0), (2, 4)])
def test_the_kernel_can_be_compiled_for_an_a100(group, tmp_path, monkeypatch):
    """The interpreter runs Python that the compiler refuses."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from wandazeta.pruning.method import sparsegpt_kernel

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    kernel = sparsegpt_kernel._eliminate
    pointers = {"columns_ptr": "*fp32", "errors_ptr": "*fp32", "kept_ptr": "*u8", "factor_ptr": "*fp32"}
    constants = {"num_pruned": group[1] - group[0], "group_size": group[1], "block_size": 128, "rows_at_once": 32}
    signature = pointers | {"num_rows": "i32", "size": "i32"} | dict.fromkeys(constants, "constexpr")
    compiled = triton.compile(ASTSource(kernel, signature, constants), target=GPUTarget("cuda", 80, 32))
    assert "st.global" in compiled.asm["ptx"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize(("width", "pattern"), [*PATTERNS, (512, "128:256")])
def test_a_gpu_equals_the_published_procedure(width, pattern):
    weight, x = problem(width, rows=77)
    gram = x.t() @ x
    ((found, kept),) = sparsegpt([weight.cuda()], gram.cuda(), pattern_of(pattern))
    expected, expected_mask = published(weight, gram, pattern_of(pattern))
    assert torch.equal(kept.cpu(), expected_mask)
    torch.testing.assert_close(found.cpu(), expected, rtol=1e-3, atol=1e-4)
