import json
import re

import pytest
import torch
import transformers
from helpers.architectures import ARCHITECTURES, EXCLUDED, build, token_batches
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
    zeros = rows == 0
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
        # GPT-2's layers alone keep the inputs first
        assert has_the_pattern(weight.t() if name == "gpt2" else weight, pattern), key

    assert masks.keys() <= weights.keys()
    excluded = tuple(f".{module}" for module in EXCLUDED.get(name, ()))
    named = loaded.get_submodule(blocks).named_modules()
    layers = [m for n, m in named if isinstance(m, (nn.Linear, Conv1D)) and not f".{n}".endswith(excluded)]
    assert len(masks) == len(layers) > 0
    for layer in layers:
        assert has_the_pattern(layer.weight.t() if isinstance(layer, Conv1D) else layer.weight, pattern)


@pytest.mark.parametrize("name", ["mixtral", "qwen2_moe"])
def test_fused_experts_are_refused_by_name_and_the_remedy_works(tmp_path, name):
    model, _ = build(name)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(
        ValueError, match=r"`model.layers.0.mlp.experts` \(\w+\) holds fused experts, .* cannot be"
    ) as error:
        prune(model)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    remedy = re.findall("`([^`]+)`", str(error.value).rpartition("; add ")[2])
    assert remedy == ["mlp.gate", "mlp.experts", "exclude_modules"]
    assert prune(model, exclude_modules=remedy[:-1]).sparsity == 0.5
