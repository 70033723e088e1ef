"""Calls that are captured as graphs, here by `helpers.graphs` on a CPU."""

import logging
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from helpers.graphs import FailingGraphs, RecordedGraphs
from torch import nn

from wandazeta.pruning.method.regional import MasterWeights, optimise_block
from wandazeta.pruning.method.statistics import InputStatistics
from wandazeta.pruning.methods import RegionalOptimisation
from wandazeta.utilities import graphs
from wandazeta.utilities.graphs import CUDAGraphBackend, GraphedCall, graph_backend
from wandazeta.utilities.ranks import Ranks


@pytest.fixture
def backend():
    return RecordedGraphs()


@pytest.fixture
def logged(caplog):
    graphs._log.cache_clear()
    caplog.set_level(logging.WARNING)
    return lambda: [record.getMessage() for record in caplog.records]


class Layer:
    """Adds squared gradients of a linear layer, as regional gradients do."""

    def __init__(self):
        self.weight = nn.Parameter(torch.arange(12.0).reshape(3, 4) / 10)
        self.squares = torch.zeros(3, 4)
        self.calls = 0

    def __call__(self, sample, x):
        self.calls += 1
        self.weight.grad = None
        with torch.enable_grad():
            output = torch.tanh(x @ self.weight.t())
            output.square().sum().backward()
        self.squares.addcmul_(self.weight.grad, self.weight.grad)
        return output.detach(), [self.weight.grad, "a value"]


def inputs(num, width=4):
    return list(torch.randn(num, 2, width, generator=torch.Generator().manual_seed(0)))


def test_replays_do_what_the_function_does_with_other_inputs_and_changed_weights(backend):
    graphed, plain = Layer(), Layer()
    call = GraphedCall(graphed, ["a"] * 6, backend)
    found, wanted = [], []
    for index, x in enumerate(inputs(6)):
        for layer, function, results in ((graphed, call, found), (plain, plain, wanted)):
            results.append(function(index, x))
            layer.weight.detach().mul_(1.1)
    assert (graphed.calls, backend.num_captures, backend.num_replays) == (2, 1, 5)
    for (output, (gradient, value)), (wanted_output, (wanted_gradient, _)) in zip(found, wanted, strict=True):
        assert torch.equal(output, wanted_output)
        assert torch.equal(gradient, wanted_gradient)
        assert value == "a value"
    assert torch.equal(graphed.squares, plain.squares)


def test_without_copies_results_last_until_the_next_graph_runs(backend):
    call = GraphedCall(lambda sample, x: 2 * x, ["a"] * 6, backend, copies=False)
    other = GraphedCall(lambda sample, x: 3 * x, ["a"] * 6, backend, copies=False)
    results = [call(index, torch.full((1,), float(index))) for index in range(3)]
    assert results[1] is results[2]
    assert results[2].item() == 4
    for index in range(2):
        other(index, torch.ones(1))
    assert results[2].isnan()


def test_samples_that_are_few_or_unlike_all_others_run_as_usual(backend):
    call = GraphedCall(lambda sample, x: 2 * x, ["a", "a", "a", "b", None, None, None, None], backend)
    for _ in range(3):
        assert [call(index, torch.ones(1)).item() for index in range(8)] == [2.0] * 8
    assert backend.num_captures == 0


def test_each_key_and_shape_has_a_graph(backend):
    keys = [1, 1, 1, 1, 2, 2, 2, 2]
    call = GraphedCall(lambda sample, x: keys[sample] * x.sum(), keys, backend)
    for _ in range(2):
        for index in range(8):
            for length in (1, 2):
                x = torch.full((length,), 1.0 + index)
                assert torch.equal(call(index, x), keys[index] * x.sum())
    assert backend.num_captures == 4


@pytest.mark.parametrize(
    "read",
    [
        lambda x: x * x.sum().item(),
        lambda x: x if bool(x.sum() > 1e9) else x + 1,
        lambda x: x[x > 0].sum(),
        lambda x: x.flatten()[torch.nonzero(x.flatten())].sum(),
        lambda x: x * torch.bincount(x.abs().long().flatten()).sum(),
    ],
    ids=["item", "bool", "mask", "nonzero", "bincount"],
)
def test_a_function_that_reads_values_is_never_captured(read, backend, logged):
    layer = Layer()
    function = lambda sample, x: (layer(sample, x), read(x))  # noqa: E731
    call = GraphedCall(function, ["a"] * 4, backend)
    wanted = Layer()
    for index, x in enumerate(inputs(4)):
        assert torch.equal(call(index, x)[1], read(x))
        wanted(index, x)
    assert torch.equal(layer.squares, wanted.squares)
    assert backend.num_captures == 0
    assert len(logged()) == 1
    assert "reads values (aten." in logged()[0]


def test_after_a_capture_that_fails_the_function_runs_as_usual(backend, logged):
    def fails_in_capture(sample, x):
        result = layer(sample, x)
        if torch.utils._python_dispatch._get_current_dispatch_mode_stack() and backend.num_captures:
            raise RuntimeError("out of memory")
        return result

    layer, wanted = Layer(), Layer()
    call = GraphedCall(fails_in_capture, ["a"] * 4, backend)
    for index, x in enumerate(inputs(4)):
        assert torch.equal(call(index, x)[0], wanted(index, x)[0])
        assert torch.equal(layer.weight.grad, wanted.weight.grad)
    assert torch.equal(layer.squares, wanted.squares)
    assert (backend.num_captures, backend.num_failures) == (1, 1)
    assert [message.endswith("RuntimeError: out of memory") for message in logged()] == [True]


def test_weights_that_autocast_has_cast_before_are_not_captured(backend):
    weight = nn.Parameter(torch.ones(2, 2))
    call = GraphedCall(lambda sample, x: nn.functional.linear(x, weight), ["a"] * 4, backend)
    for index in range(4):
        with torch.autocast("cpu", torch.bfloat16):
            nn.functional.linear(torch.ones(1, 2), weight)
            assert call(index, torch.ones(1, 2)).tolist() == [[2.0 * (1 + index)] * 2]
        weight.detach().add_(1)


def test_close_drops_graphs_and_tensors(backend):
    call = GraphedCall(Layer(), ["a"] * 4, backend)
    for index, x in enumerate(inputs(4)):
        call(index, x)
    assert len(backend.recordings) == 1
    call.close()
    assert len(backend.recordings) == 0


def test_statistics_of_a_round_of_replays_are_complete(backend):
    found = []
    for own in (None, backend, FailingGraphs()):
        graphed = partial(GraphedCall, keys=["a"] * 6, backend=own)
        torch.manual_seed(0)
        block = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 4))
        layers, hidden = {"up": block[0], "down": block[2]}, [x[None] for x in inputs(6)]
        statistics, master = InputStatistics(layers), MasterWeights(layers)
        options, counts = RegionalOptimisation(rounds=3, samples_per_round=4, learning_rate=0.1), []

        def prune(statistics=statistics, counts=counts):
            counts.append(statistics.num_tokens("up"))

        optimise_block(
            lambda batch, states, block=block: block(states),
            master,
            prune,
            hidden,
            [torch.ones_like(states) for states in hidden],
            [None] * 6,
            statistics,
            options,
            torch.Generator().manual_seed(0),
            Ranks(),
            graphed,
        )
        found.append([(statistics.norm(name).tolist(), statistics.num_tokens(name)) for name in layers])
        found[-1] += [statistics.num_samples, layers["up"].weight.tolist(), counts]
    assert found[0] == found[1] == found[2]
    assert found[0][0][1] == 4 * 2
    assert backend.num_replays == 3 * 4 - 1


class Broken:
    """Functions that no graph can repeat."""

    def __init__(self):
        self.sums, self.count = [torch.zeros(1)], 0

    def reallocates(self, sample, x):
        self.sums.append(self.sums[-1] + x)
        return self.sums[-1]

    def counts(self, sample, x):
        self.count += 1
        return x * self.count

    def reads_its_argument(self, sample, x):
        return x * sample


@pytest.mark.parametrize("name", ["reallocates", "counts", "reads_its_argument"])
def test_the_recorder_shows_what_a_graph_cannot_repeat(name, backend):
    graphed, plain = Broken(), Broken()
    call = GraphedCall(getattr(graphed, name), ["a"] * 5, backend)
    found = [call(index, torch.full((1,), 1.0 + index)).item() for index in range(5)]
    assert found != [getattr(plain, name)(index, torch.full((1,), 1.0 + index)).item() for index in range(5)]


def test_the_recorder_shows_memory_that_was_freed(backend):
    held = [torch.ones(1)]
    call = GraphedCall(lambda sample, x: x + held[0], ["a"] * 4, backend)
    for index in range(2):
        call(index, torch.ones(1))
    held[0] = torch.ones(1)
    with pytest.raises(AssertionError, match="memory that was freed"):
        call(2, torch.ones(1))


class Fake:
    """What `CUDAGraphBackend` calls of torch.cuda, as a list of events."""

    def __init__(self, monkeypatch, error_at_end=False, free=50):
        self.events, self.stack, self.num_graphs = events, stack, num_graphs = [], ["main"], [0]
        current = SimpleNamespace(name="main", wait_stream=lambda other: events.append(("main waits for", other.name)))

        def graph():
            num_graphs[0] += 1
            number = num_graphs[0]

            def end():
                events.append(("end", number, stack[-1]))
                if error_at_end:
                    raise RuntimeError("capture failed")

            return SimpleNamespace(
                capture_begin=lambda pool, capture_error_mode: events.append(("begin", number, stack[-1], pool)),
                capture_end=end,
                pool=lambda: f"pool of {number}",
                replay=lambda: events.append(("replay", number, stack[-1])),
            )

        class Entered:
            def __init__(self, stream):
                self.stream = stream

            def __enter__(self):
                stack.append(self.stream.name)

            def __exit__(self, *error):
                stack.pop()

        side = SimpleNamespace(
            name="side", device_index=0, wait_stream=lambda other: events.append(("side waits for", other.name))
        )
        generator = SimpleNamespace(clone_state=lambda: "clone", graphsafe_set_state=events.append)
        for name, value in {
            "mem_get_info": lambda device: (free, 100),
            "empty_cache": lambda: events.append("empty"),
            "Stream": lambda device: side,
            "current_stream": lambda device: current,
            "stream": Entered,
            "CUDAGraph": graph,
            "default_generators": (generator,),
        }.items():
            monkeypatch.setattr(torch.cuda, name, value)


def test_cuda_graphs_are_captured_on_the_stream_of_the_first_call_and_share_a_pool(monkeypatch):
    fake = Fake(monkeypatch)
    backend = graph_backend(torch.device("cuda"))
    assert backend.run(lambda: fake.stack[-1]) == "side"
    assert fake.events == [("side waits for", "main"), ("main waits for", "side")]
    fake.events.clear()
    (where, replay), _ = (backend.capture(lambda: fake.stack[-1]) for _ in range(2))
    replay()
    assert where == "side"
    assert fake.events == [
        ("side waits for", "main"),
        ("begin", 1, "side", None),
        ("end", 1, "side"),
        ("side waits for", "main"),
        ("begin", 2, "side", "pool of 1"),
        ("end", 2, "side"),
        ("replay", 1, "main"),
    ]
    assert graph_backend(torch.device("cpu")) is None


def test_a_capture_has_room(monkeypatch):
    fake = Fake(monkeypatch, free=10)
    CUDAGraphBackend(torch.device("cuda")).capture(lambda: None)
    assert fake.events[0] == "empty"


@pytest.mark.parametrize("error_at_end", [False, True])
def test_a_cuda_capture_that_fails_is_the_last(error_at_end, monkeypatch):
    fake = Fake(monkeypatch, error_at_end)
    backend = CUDAGraphBackend(torch.device("cuda"))

    def fails():
        raise RuntimeError("not permitted")

    with pytest.raises(RuntimeError, match="capture failed" if error_at_end else "not permitted"):
        backend.capture(fails)
    assert fake.events[1:] == [("begin", 1, "side", None), ("end", 1, "side"), "clone"]
    assert fake.stack == ["main"]
    with pytest.raises(RuntimeError, match="an earlier capture has failed"):
        backend.capture(lambda: None)
    assert fake.num_graphs == [1]
