"""Losses whose forward passes are graphs, here recorded on a CPU, are those of the usual forward passes."""

import logging
from functools import partial

import pytest
import torch
from helpers.architectures import build
from helpers.causal_lms import classification_batch, text_batch, tiny_lm
from helpers.graphs import FailingGraphs, RecordedGraphs
from torch import nn
from transformers import LlamaForCausalLM

from wandazeta.adapters import AdaptedModule, inject_adapters, train_linears
from wandazeta.models.blocks import find_blocks
from wandazeta.models.encoder import EncoderClassifier
from wandazeta.scoring.frozen_prefix import FrozenPrefix
from wandazeta.scoring.graphed_losses import GraphedLosses
from wandazeta.scoring.head_scorer import HeadScorer
from wandazeta.scoring.objectives import objective_losses
from wandazeta.scoring.scorer import Scorer
from wandazeta.utilities import graphs
from wandazeta.utilities.graphs import graph_backend

GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
LONG = ((7, 11), (9,), (13, 17, 19))


@pytest.fixture(autouse=True)
def logged(caplog):
    graphs._log.cache_clear()
    caplog.set_level(logging.WARNING)
    return lambda: [record.getMessage() for record in caplog.records if record.name == graphs.__name__]


def adapted(model, layers=None, prefix=True, scorer=Scorer, device="cpu"):
    _, blocks = find_blocks(model)
    generator = torch.Generator().manual_seed(0)
    vector = inject_adapters(
        model, blocks=blocks, layers=layers, rank=2, bottleneck=8, identity_start=False, generator=generator
    )
    train_linears(model, vector, ["head"] if scorer is HeadScorer else [])
    model.requires_grad_(False).to(device)
    vector.to(device)
    sites = {module for module in model.modules() if isinstance(module, AdaptedModule)}
    return vector, scorer(model, FrozenPrefix(model, blocks, sites, 2**30) if prefix else None)


@torch.no_grad()
def losses_of_steps(vector, scorer, backend, batches, chunks=(4, 4, 2)):
    """Losses of some steps, graphed and as usual; directions and vectors of all chunks differ."""
    call, found, wanted = GraphedLosses(scorer, vector.use, backend), [], []
    generator = torch.Generator().manual_seed(1)
    for batch in batches:
        prepared = scorer.prepare({name: tensor.to(vector.theta.device) for name, tensor in batch.items()})
        for num in chunks:
            draw = torch.randn(num, vector.num_parameters, generator=generator)
            theta_Pd = vector.theta + 0.3 * draw.to(vector.theta.device)
            found.append(call(theta_Pd, prepared))
            with vector.use(theta_Pd):
                wanted.append(objective_losses(None, scorer, prepared, num))
        vector.theta += 0.01
    return torch.cat(found), torch.cat(wanted)


def whole(batch):
    """The batch without padding."""
    return batch | {"input_ids": batch["input_ids"].clamp(min=3), "attention_mask": torch.ones_like(batch["input_ids"])}


# padded ones and whole ones, whose blocks get no mask
CLASSIFIED = [classification_batch(seed=seed) for seed in range(3)]
MIXED = [*CLASSIFIED, *map(whole, CLASSIFIED)]


@pytest.mark.parametrize(
    ("kind", "layers", "batches"),
    [
        ("llama", None, MIXED),
        ("llama", [1, 2], MIXED),
        ("llama", [-1], MIXED),
        ("gemma2", [1, 2], MIXED),  # two masks
        ("llama", [1, 2], [classification_batch(options=LONG, seed=seed) for seed in range(3)]),
        ("gpt2", None, [text_batch(seed=seed) for seed in range(3)]),
    ],
    ids=["all", "prefix", "last", "windows", "long options", "text"],
)
def test_losses_are_the_same_bits(kind, layers, batches, logged):
    backend = RecordedGraphs()
    found, wanted = losses_of_steps(*adapted(tiny_lm(kind), layers), backend, batches)
    assert torch.equal(found, wanted)
    assert wanted.std() > 1e-3
    assert not logged()
    assert backend.num_replays >= len(batches)


def test_an_encoder(logged):
    backend = RecordedGraphs()
    model, _ = build("bert")
    model = EncoderClassifier(model.bert, 2)
    nn.init.normal_(model.head.weight)
    batches = [batch | {"input_ids": batch["input_ids"] % 30} for batch in MIXED]
    found, wanted = losses_of_steps(*adapted(model.eval(), [1, 2], scorer=HeadScorer), backend, batches)
    assert torch.equal(found, wanted)
    assert not logged()
    assert backend.num_replays > 6


def scaled_by_the_mask():
    """A model that uses the mask outside of its blocks."""

    class Scaled(LlamaForCausalLM):
        def forward(self, attention_mask, **kwargs):
            output = super().forward(attention_mask=attention_mask, **kwargs)
            output.logits = output.logits * attention_mask.float().mean()
            return output

    model = tiny_lm()
    model.__class__ = Scaled
    return model


@pytest.mark.parametrize(
    ("make", "reason"),
    [(partial(tiny_lm, "opt"), "too many values to unpack"), (scaled_by_the_mask, "Scaled uses the attention mask")],
)
def test_models_that_use_the_mask_outside_of_their_blocks_run_as_usual(make, reason, logged):
    backend = RecordedGraphs()
    found, wanted = losses_of_steps(*adapted(make(), prefix=False), backend, CLASSIFIED)
    assert torch.equal(found, wanted)
    assert backend.num_captures == 0
    assert [reason in message for message in logged()] == [True]


def test_where_captures_fail_losses_are_the_same_bits(logged):
    found, wanted = losses_of_steps(*adapted(tiny_lm()), FailingGraphs(), CLASSIFIED)
    assert torch.equal(found, wanted)
    assert len(logged()) == 1


def test_shapes_that_do_not_recur_are_not_captured():
    backend = RecordedGraphs()
    batches = [classification_batch(seed=0, width=width) for width in range(8, 14)]
    found, wanted = losses_of_steps(*adapted(tiny_lm()), backend, batches, chunks=(2,))
    assert torch.equal(found, wanted)
    assert backend.num_captures == 0


@pytest.mark.gpu
@GPU
@pytest.mark.parametrize("layers", [None, [1, 2], [-1]])
def test_cuda_graphs_of_losses(layers, logged):
    backend = graph_backend(torch.device("cuda"))
    found, wanted = losses_of_steps(*adapted(tiny_lm(), layers, device="cuda"), backend, MIXED)
    assert torch.equal(found, wanted)
    assert not logged()
    assert backend._last is not None
