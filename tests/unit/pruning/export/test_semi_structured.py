import copy

import pytest
import torch
from torch import nn

from wandazeta.pruning.export import semi_structured
from wandazeta.pruning.export.semi_structured import to_semi_structured
from wandazeta.pruning.method.masks import group_mask


def model(dtype=torch.bfloat16, sparse=("0", "2"), shapes=((64, 128), (128, 128), (128, 64))):
    """Linears of shapes (in, out), of which those named are 2:4."""
    torch.manual_seed(0)
    layers = nn.Sequential(*(nn.Linear(*shape) for shape in shapes))
    with torch.no_grad():
        for name in sparse:
            weight = layers.get_submodule(name).weight
            weight.mul_(group_mask(weight.abs(), 2, 4))
    return layers.to(dtype)


@pytest.mark.parametrize(
    ("layers", "reasons"),
    [
        (model(), ("2 on the CPU", "1 not 2:4")),
        (model(torch.float32), ("2 in float32, not in 16-bit precision", "1 not 2:4")),
        (model(sparse=()), ("3 not 2:4",)),
        (
            model(shapes=((32, 128), (48, 48), (64, 48))),
            ("2 of a shape that is not a multiple of 32 by 64", "1 not 2:4"),
        ),
        (nn.Embedding(2, 2), ("there are no Linear layers",)),
    ],
)
def test_where_nothing_is_gained_it_says_why_and_changes_nothing(layers, reasons):
    before = copy.deepcopy(layers.state_dict())
    with pytest.raises(ValueError, match="sparse kernels support, but got none") as caught:
        to_semi_structured(layers)
    for reason in reasons:
        assert reason in str(caught.value)
    assert all(torch.equal(tensor, before[name]) for name, tensor in layers.state_dict().items())


def test_only_layers_that_fit_are_handed_over(monkeypatch):
    # a CPU has no such tensors: what is checked is which weights are given to torch
    given = []
    monkeypatch.setattr(semi_structured, "_device_obstacle", lambda device: None)
    monkeypatch.setattr(torch.sparse, "to_sparse_semi_structured", lambda weight: given.append(weight) or weight)
    layers = model()
    assert to_semi_structured(layers) == ["0", "2"]
    assert [weight.shape for weight in given] == [(128, 64), (64, 128)]
    assert [layer.weight.requires_grad for layer in layers] == [False, True, False]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_outputs_are_those_of_the_dense_kernels(dtype):
    layers = model(dtype).cuda()
    x = torch.randn(32, 64, device="cuda", dtype=dtype)
    with torch.no_grad():
        expected = layers(x)
        assert to_semi_structured(layers) == ["0", "2"]
        torch.testing.assert_close(layers(x), expected, rtol=2e-2, atol=2e-2)
