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
        to_semi_structured(layers, 16)
    for reason in reasons:
        assert reason in str(caught.value)
    assert all(torch.equal(tensor, before[name]) for name, tensor in layers.state_dict().items())


@pytest.fixture
def costs(monkeypatch):
    """Costs of a product by kernel and shape of the weight, which the timer adds up; the tensors stay dense ones."""
    costs, spent = {}, []
    linear = torch.nn.functional.linear

    def counted(x, weight, bias=None):
        spent.append(costs.get((getattr(weight, "kernel", "dense"), tuple(weight.shape)), 1.0))
        return linear(x, weight, bias)

    def kept(kernel):
        def from_dense(weight, alg_id=0):
            if costs.get(kernel) == "not built":
                raise RuntimeError("no such kernel")
            weight = weight.clone()
            weight.kernel = kernel
            return weight + 1 if costs.get(kernel) == "wrong" else weight

        return from_dense

    monkeypatch.setattr(torch.nn.functional, "linear", counted)
    monkeypatch.setattr(torch.sparse.SparseSemiStructuredTensorCUSPARSELT, "from_dense", kept("cusparselt"))
    monkeypatch.setattr(torch.sparse.SparseSemiStructuredTensorCUTLASS, "from_dense", kept("cutlass"))
    monkeypatch.setattr(semi_structured, "_device_obstacle", lambda device: None)

    def timer(call, cuda_graph):
        spent.clear()
        call()
        return sum(spent) * (0.5 if cuda_graph and costs.get("graphs help") else 1.0)

    costs["timer"] = timer
    return costs


def test_each_shape_gets_its_fastest_kernel_and_stays_dense_where_that_is_the_dense_one(costs):
    layers = model(sparse=("0", "1", "2"))
    costs |= {("cutlass", (128, 64)): 0.8, ("cusparselt", (128, 64)): 0.9}  # layer 0
    costs |= {("cusparselt", (64, 128)): 0.7}  # layer 2
    before = layers[1].weight
    assert to_semi_structured(layers, 16, timer=costs["timer"]) == {"0": "cutlass", "2": "cusparselt"}
    assert layers[1].weight is before
    assert [layer.weight.requires_grad for layer in layers] == [False, True, False]


def test_layers_that_are_not_2of4_are_left_alone(costs):
    costs |= {("cutlass", shape): 0.5 for shape in ((128, 64), (128, 128), (64, 128))}
    assert to_semi_structured(model(), 16, timer=costs["timer"]) == {"0": "cutlass", "2": "cutlass"}


def test_where_no_kernel_is_faster_nothing_changes(costs):
    layers = model()
    before = [layer.weight for layer in layers]
    assert to_semi_structured(layers, 16, timer=costs["timer"]) == {}
    assert all(layer.weight is weight for layer, weight in zip(layers, before, strict=True))


@pytest.mark.parametrize("fault", ["wrong", "not built"])
def test_kernels_that_fail_or_are_wrong_are_not_chosen(costs, fault):
    costs |= {("cutlass", (128, 64)): 0.1, "cutlass": fault}
    assert to_semi_structured(model(), 16, timer=costs["timer"]) == {}
    times = semi_structured.measure_kernels(model()[0].weight.detach(), 16, timer=costs["timer"])
    assert [(each.kernel, each.seconds is None) for each in times if not each.cuda_graph] == [
        ("dense", False),
        ("cusparselt", False),
        ("cutlass", True),
    ]


@pytest.mark.parametrize(("share", "converts"), [(0.97, False), (0.99, True)])
def test_a_model_that_is_slower_as_a_whole_stays_dense(costs, share, converts):
    # each product is faster when timed alone, and all together are not
    costs |= {("cutlass", (128, 64)): 0.5, ("cutlass", (64, 128)): 0.5}
    timer, calls = costs["timer"], []

    def unsteady(call, cuda_graph):
        calls.append(call)
        # two shapes on three kernels, then all dense products and all sparse ones
        return {6: share, 7: 1.0}.get(len(calls) - 1, timer(call, cuda_graph))

    layers = model()
    assert bool(to_semi_structured(layers, 16, timer=unsteady)) == converts
    assert len(calls) == 8
    assert layers[0].weight.requires_grad != converts


def test_the_batch_and_the_way_of_calling_that_are_asked_for_are_measured(costs):
    asked = []

    def timer(call, cuda_graph):
        if hasattr(call, "args") and isinstance(call.args[0], torch.Tensor):
            asked.append((len(call.args[0]), cuda_graph))
        return costs["timer"](call, cuda_graph)

    to_semi_structured(model(), 48, cuda_graph=True, timer=timer)
    assert set(asked) == {(48, True)}


def test_a_batch_has_tokens(costs):
    with pytest.raises(ValueError, match="`num_tokens` to be an integer larger than 0"):
        to_semi_structured(model(), 0, timer=costs["timer"])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kernel", semi_structured.KERNELS)
def test_outputs_are_those_of_the_dense_kernels(dtype, kernel):
    weight = model(dtype).cuda()[0].weight.detach()
    found = [each for each in semi_structured.measure_kernels(weight, 32, (False,)) if each.kernel == kernel]
    assert [each.relative_error is None or each.relative_error < 2e-2 for each in found] == [True]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("cuda_graph", [False, True])
def test_a_converted_model_computes_the_same(cuda_graph):
    layers = model().cuda()
    x = torch.randn(32, 64, device="cuda", dtype=torch.bfloat16)
    with torch.no_grad():
        expected = layers(x)
        to_semi_structured(layers, 32, cuda_graph=cuda_graph)
        torch.testing.assert_close(layers(x), expected, rtol=2e-2, atol=2e-2)
