import pytest
import torch
from helpers.causal_lms import tiny_lm

from wandazeta.cli import functions
from wandazeta.cli.bench import Speed, bench, verdict
from wandazeta.pruning.export import semi_structured
from wandazeta.pruning.method.masks import group_mask

GPU = "NVIDIA Test"


def test_without_a_gpu_it_says_so_in_one_line(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    functions.main(["bench", "anywhere"])
    (line,) = capsys.readouterr().out.splitlines()
    assert "no GPU" in line


@pytest.fixture
def faster():
    """Memory of the weights that are on faster kernels; a parameter made of a tensor shares it."""
    return {}


@pytest.fixture
def pruned(monkeypatch, faster):
    """A 2:4 model, with kernels that halve the cost of a product of its MLPs in a CUDA graph and change nothing."""
    monkeypatch.setattr(semi_structured, "_device_obstacle", lambda device: None)

    def from_dense(weight, alg_id=0):
        sparse = weight.clone()
        if weight.shape == (128, 64):
            faster[sparse.data_ptr()] = sparse
        return sparse

    for kernel in ("CUSPARSELT", "CUTLASS"):
        kind = getattr(torch.sparse, f"SparseSemiStructuredTensor{kernel}")
        monkeypatch.setattr(kind, "from_dense", from_dense)
    model = tiny_lm(hidden_size=64, intermediate_size=128, num_key_value_heads=4).to(torch.bfloat16)
    with torch.no_grad():
        for layer in model.model.layers.modules():
            if isinstance(layer, torch.nn.Linear):
                layer.weight.mul_(group_mask(layer.weight.abs().float(), 2, 4))
    return model


@pytest.fixture
def timer(monkeypatch, faster):
    linear, spent = torch.nn.functional.linear, []

    def counted(x, weight, bias=None):
        spent.append(weight.data_ptr() in faster)
        return linear(x, weight, bias)

    monkeypatch.setattr(torch.nn.functional, "linear", counted)

    def timer(call, cuda_graph):
        spent.clear()
        call()
        return sum(0.5 if cuda_graph and is_faster else 1.0 for is_faster in spent)

    return timer


def test_each_batch_size_is_measured_eagerly_and_in_a_graph_and_the_model_is_left_as_it_was(pruned, timer):
    weights = dict(pruned.named_parameters())
    speeds = bench(pruned, (1, 2), 8, timer)
    assert [(speed.batch_size, speed.cuda_graph) for speed in speeds] == [(1, False), (1, True), (2, False), (2, True)]
    # 3 blocks with 7 Linears each, and the head; gate and up of each block are faster
    assert [speed.num_sparse for speed in speeds] == [0, 6, 0, 6]
    assert [speed.sparse for speed in speeds] == [None, 8 / 19, None, 16 / 19]
    assert [speed.dense for speed in speeds] == [8 / 22, 8 / 22, 16 / 22, 16 / 22]
    after = dict(pruned.named_parameters())
    assert after.keys() == weights.keys()
    assert all(after[name] is weight for name, weight in weights.items())


def test_a_forward_pass_that_cannot_be_captured_has_no_speed(pruned, timer):
    def refusing(call, cuda_graph):
        if cuda_graph:
            raise RuntimeError("cannot be captured")
        return timer(call, cuda_graph)

    eager, captured = bench(pruned, (1,), 8, refusing)
    assert eager.dense is not None
    assert (captured.dense, captured.sparse) == (None, None)


@pytest.mark.parametrize(
    ("speeds", "said"),
    [
        ([], "does not pay: no layer is faster"),
        ([Speed(1, False, 100.0, None, 0)], "does not pay: no layer is faster"),
        (
            [Speed(1, False, 100.0, 99.0, 2)],
            "does not pay: at best 0.99 times the dense speed, with batch size 1 eagerly",
        ),
        (
            [Speed(1, False, 100.0, 99.0, 2), Speed(8, True, 100.0, 150.0, 2)],
            "pays: 1.50 times the dense speed with batch size 8 in a CUDA graph",
        ),
    ],
)
def test_the_verdict_is_one_sentence(speeds, said):
    sentence = verdict(speeds, GPU)
    assert said in sentence
    assert sentence.startswith(f"On this {GPU} ")
    assert sentence.endswith(".")


def test_a_batch_has_sequences(pruned, timer):
    with pytest.raises(ValueError, match="`batch_sizes` to be an integer larger than 0"):
        bench(pruned, (0,), 8, timer)
