import json

import pytest
import torch
import transformers
from helpers.architectures import ARCHITECTURES, EXCLUDED, WITH_EXPERTS, build, token_batches
from helpers.prune_model import Memory
from helpers.prune_options import make_options
from safetensors.torch import load_file
from torch import nn
from transformers.pytorch_utils import Conv1D

from wandazeta.pruning import prune_model
from wandazeta.pruning.export.pretrained import export_pretrained

pytestmark = pytest.mark.slow

PATTERNS = {"2:4": {"sparsity_pattern": "2:4"}, "50%": {"sparsity_pattern": "unstructured", "sparsity": 0.5}}


def prune(model, progress=None, **options):
    options = make_options(rounds=2, samples_per_round=2, learning_rate=1e-3, **options)
    return prune_model(model, lambda batch: model(**batch), token_batches(4), options, progress=progress)


def prune_and_export(model, directory, **options):
    progress = Memory()
    report = prune(model, progress, **options)
    masks = {
        f"{block.name}.{name}": mask
        for block in report.blocks
        for name, mask in progress.results[block.index].masks.items()
    }
    export_pretrained(model, None, directory, report, masks)


def load(directory):
    """As anybody would who has the directory and transformers, nothing else."""
    name = json.loads((directory / "config.json").read_text())["architectures"][0]
    model, info = getattr(transformers, name).from_pretrained(directory, output_loading_info=True)
    assert not any(info.values())
    return model.eval()


@torch.no_grad()
def in_fresh_memory(model):
    """A mapped file has weights at addresses of 8 modulo 16, where CPU kernels may round the last bit otherwise."""
    for parameter in model.parameters():
        parameter.data = parameter.clone()
    return model


@torch.no_grad()
def outputs(model):
    found = [model(**batch, output_hidden_states=True) for batch in token_batches(2, seed=1)]
    return [tensor for output in found for tensor in (output[0], *output.hidden_states)]


def has_the_pattern(rows, pattern):
    zeros = rows.reshape(-1, rows.shape[-1]) == 0
    if pattern == "2:4":
        return bool((zeros.unflatten(1, (-1, 4)).sum(2) == 2).all())
    return bool((zeros.sum(1) == int(zeros.shape[1] * 0.5)).all())


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_pruned_exported_and_loaded_by_transformers_alone(tmp_path, name, pattern):
    model, blocks = build(name)
    model.save_pretrained(tmp_path / "dense")
    prune_and_export(model, tmp_path / "pruned", exclude_modules=EXCLUDED.get(name, ()), **PATTERNS[pattern])

    loaded = load(tmp_path / "pruned")
    assert model.state_dict().keys() == loaded.state_dict().keys()
    for key, value in loaded.state_dict().items():
        assert torch.equal(value, model.state_dict()[key]), key
    wanted = outputs(model)
    torch.testing.assert_close(outputs(loaded), wanted)
    assert all(map(torch.equal, outputs(in_fresh_memory(loaded)), wanted))

    dense = load_file(tmp_path / "dense" / "model.safetensors")
    weights = load_file(tmp_path / "pruned" / "model.safetensors")
    masks = load_file(tmp_path / "pruned" / "sparsity/masks.safetensors")
    assert weights.keys() == dense.keys()
    for key, weight in weights.items():
        if key not in masks:
            assert torch.equal(weight, dense[key]), key
            continue
        assert torch.equal(weight != 0, masks[key]), key
        # GPT-2's layers and the experts of gpt-oss alone keep the inputs first
        inputs_first = name == "gpt2" or weight.ndim == 3
        assert has_the_pattern(weight.transpose(-1, -2) if inputs_first else weight, pattern), key

    assert masks.keys() <= weights.keys()
    dense_modules = (*EXCLUDED.get(name, ()), "shared_expert_gate")
    named = loaded.get_submodule(blocks).named_modules()
    layers = [m for n, m in named if isinstance(m, (nn.Linear, Conv1D)) and not n.endswith(dense_modules)]
    rows = [layer.weight.t() if isinstance(layer, Conv1D) else layer.weight for layer in layers]
    fused = [p for n, p in loaded.named_parameters() if n.endswith(("experts.gate_up_proj", "experts.down_proj"))]
    rows += [weight.transpose(1, 2) if name == "gpt_oss" else weight for weight in fused]
    assert bool(fused) == (name in WITH_EXPERTS)
    assert all(has_the_pattern(weight, pattern) for weight in rows)
    # and nothing else has a mask
    assert sum(mask.numel() for mask in masks.values()) == sum(weight.numel() for weight in rows) > 0
