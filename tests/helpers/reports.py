"""Reports of prunings that nobody ran, and one of a small model pruned in the process."""

from dataclasses import replace

import torch
from helpers.prune_options import make_options
from transformers import AutoModelForCausalLM, LlamaConfig

from wandazeta.pruning import PruneOptions, prune_model
from wandazeta.pruning.records import BlockRecord, LayerRecord, PruneReport
from wandazeta.pruning.report.evaluation import EvaluatedModel, EvaluationSummary


def made_up(
    num_blocks=3,
    losses=(0.5, 0.25),
    names=("up.weight", "down.weight"),
    options=None,
    width=40,
    sparsity=None,
    **record,
):
    """A report whose layer `i` of block `b` has (b + i + 1) % 10 tenths of zeros, or all of them one sparsity."""
    blocks = []
    for index in range(num_blocks):
        zeros = [(index + i + 1) % 10 / 10 if sparsity is None else sparsity for i in range(len(names))]
        layers = tuple(
            LayerRecord(name, (8, width), "2:4", zeros[i], 1.5 + i, 0.25 + index) for i, name in enumerate(names)
        )
        costs = {"seconds": 1.5, "peak_memory": 2**30, "num_samples": 4, "num_tokens": 40} | record
        blocks.append(BlockRecord(index, f"model.layers.{index}", layers, *losses, **costs))
    options = PruneOptions().to_dict() if options is None else options
    return PruneReport(options, "model.layers", tuple(blocks))


def with_unreached_expert(report):
    """The same report with the first layer as fused experts, of which the last gets no token."""
    block = report.blocks[0]
    experts = replace(block.layers[0], name="mlp.experts.up_proj", expert_tokens=(4, 36, 0))
    return replace(report, blocks=(replace(block, layers=(experts, *block.layers[1:])), *report.blocks[1:]))


def pruned_llama(num_blocks=6):
    """The report of a random LLaMA, pruned by Wanda++ to 2:4."""
    config = LlamaConfig(
        vocab_size=300,
        hidden_size=32,
        intermediate_size=48,
        num_attention_heads=4,
        num_hidden_layers=num_blocks,
        initializer_range=0.25,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config)
    batches = list(torch.randint(300, (8, 12), generator=torch.Generator().manual_seed(0)).split(4))
    options = make_options(rounds=2, samples_per_round=4, learning_rate=1e-3)
    return prune_model(model, lambda tokens: model(input_ids=tokens), batches, options)


def evaluation(text="The ship was", **perplexities):
    """An evaluation that nobody ran, of models with these perplexities."""
    models = tuple(
        EvaluatedModel(name, value, 2**20, index / 4, f"sunk {index} times.")
        for index, (name, value) in enumerate(perplexities.items())
    )
    return EvaluationSummary(models, text, 512, 16384)
