"""Whole prunings whose calls are captured as graphs have the same bits as those that run as usual."""

import gc
import logging

import pytest
import torch
from helpers.architectures import build
from helpers.causal_lms import tiny_lm
from helpers.graphs import FailingGraphs, RecordedGraphs
from helpers.prune_options import make_options

from wandazeta.pruning import prune_model, pruner
from wandazeta.utilities import graphs

TUNED = {"method": "tuned-ro", "rounds": 1}
WANDAPP = {"method": "wanda++", "rounds": 2, "samples_per_round": 6, "learning_rate": 1e-2}
IN_BFLOAT16 = {"compute_dtype": "bfloat16"}
GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


def pruned(monkeypatch, backend, options, model=None, padding=0, device="cpu", on_block=None):
    """Weights and figures of a pruning of 8 samples, of which 3 are padded."""
    monkeypatch.setattr(pruner, "graph_backend", lambda device: backend)
    model = (model or tiny_lm(num_hidden_layers=2)).to(device)
    ids = torch.randint(30, (8, 10), generator=torch.Generator().manual_seed(0)).to(device)
    mask = torch.ones_like(ids)
    mask[:3, 10 - padding :] = 0
    report = prune_model(
        model,
        lambda batch: model(**batch, use_cache=False),
        [{"input_ids": i, "attention_mask": m} for i, m in zip(ids.split(1), mask.split(1), strict=True)],
        make_options(**options),
        device=device,
        token_mask=lambda batch: batch["attention_mask"].bool(),
        on_block=on_block,
    )
    figures = [(block.loss_before, block.loss_after, block.tuning, block.layers) for block in report.blocks]
    return model.state_dict(), figures


def assert_same_bits(found, wanted):
    assert found[1] == wanted[1]
    for name, weight in wanted[0].items():
        assert torch.equal(found[0][name], weight), name


@pytest.mark.parametrize(
    ("options", "dtype", "padding"),
    [
        (TUNED | IN_BFLOAT16, torch.float32, 3),
        (TUNED, torch.bfloat16, 0),
        (WANDAPP, torch.float32, 0),
        (WANDAPP | IN_BFLOAT16, torch.bfloat16, 3),
        (WANDAPP, torch.float16, 0),
    ],
    ids=["tuned-padded-autocast", "tuned-bfloat16", "wanda++", "wanda++-padded-bfloat16", "wanda++-float16"],
)
def test_graphs_change_no_bits(options, dtype, padding, monkeypatch):
    backend, alive = RecordedGraphs(), []
    models = [tiny_lm(num_hidden_layers=2).to(dtype) for _ in range(2)]
    wanted = pruned(monkeypatch, None, options, models[0], padding)
    gc.disable()
    try:
        note = lambda record, num_blocks: alive.append(len(backend.recordings))  # noqa: E731
        found = pruned(monkeypatch, backend, options, models[1], padding, on_block=note)
    finally:
        gc.enable()
    assert_same_bits(found, wanted)
    # in each block two graphs, of gradients and held-out errors, or of regional gradients and gradients
    assert (backend.num_captures, backend.num_failures) == (4, 0)
    assert backend.num_replays > 20
    # no graph outlives its block
    assert alive == [0, 0]


@pytest.mark.parametrize("options", [TUNED, WANDAPP], ids=["tuned-ro", "wanda++"])
def test_captures_that_fail_change_no_bits(options, monkeypatch):
    backend = FailingGraphs()
    assert_same_bits(pruned(monkeypatch, backend, options), pruned(monkeypatch, None, options))
    assert backend.num_failures == backend.num_captures == 4


def test_experts_run_as_usual(monkeypatch, caplog):
    graphs._log.cache_clear()
    caplog.set_level(logging.WARNING)
    backend = RecordedGraphs()
    wanted = pruned(monkeypatch, None, WANDAPP, build("mixtral")[0])
    assert_same_bits(pruned(monkeypatch, backend, WANDAPP, build("mixtral")[0]), wanted)
    assert backend.num_captures == 0
    assert sum("CUDA graphs are not used" in record.getMessage() for record in caplog.records) == 1


@pytest.mark.gpu
@GPU
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", [TUNED, WANDAPP, WANDAPP | IN_BFLOAT16], ids=["tuned", "paper", "autocast"])
def test_cuda_graphs_change_no_bits(options, dtype, monkeypatch):
    replays, replay = [], torch.cuda.CUDAGraph.replay
    monkeypatch.setattr(torch.cuda.CUDAGraph, "replay", lambda graph: (replays.append(graph), replay(graph)))
    backend = graphs.graph_backend(torch.device("cuda"))
    # attention whose backward pass adds in a fixed order
    models = [tiny_lm(num_hidden_layers=2, attn_implementation="eager").to(dtype) for _ in range(2)]
    wanted = pruned(monkeypatch, None, options, models[0], 3, "cuda")
    assert_same_bits(pruned(monkeypatch, backend, options, models[1], 3, "cuda"), wanted)
    assert len(replays) > 10
