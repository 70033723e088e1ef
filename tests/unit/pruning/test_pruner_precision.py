"""Models in 16 bits, and 16-bit products for models in 32."""

import copy
import warnings
from contextlib import nullcontext

import pytest
import torch
from helpers.architectures import build
from helpers.prune_model import linears, prune, tiny
from helpers.prune_options import make_options

from wandazeta.data.samples import cache_folder
from wandazeta.datamodules import TextDataModule
from wandazeta.modules import LanguageModel
from wandazeta.pruning import prune_model
from wandazeta.pruning.pruner import _BlockSequence


def test_sixteen_bit_models_stay_so():
    model, _ = build("llama")
    model = model.bfloat16()
    report = prune(model)
    assert all(p.dtype == torch.bfloat16 for p in model.parameters())
    for layer in linears(model.model.layers):
        assert ((layer.weight != 0).view(-1, 4).sum(1) == 2).all()
    assert report.blocks[0].loss_after < report.blocks[0].loss_before


def test_bfloat16_compute_hardly_changes_the_masks():
    for method in ("wanda", "rgs"):
        found, losses = [], []
        for compute_dtype in ("model", "bfloat16"):
            model, blocks, report = tiny(method=method, compute_dtype=compute_dtype, alpha=10.0)
            losses.append(report.blocks[-1].loss_after)
            assert all(parameter.dtype == torch.float32 for parameter in model.parameters())
            found.append(torch.cat([(layer.weight != 0).flatten() for block in blocks for layer in linears(block)]))
        assert losses[0] != losses[1], "autocast was on"
        assert (found[0] != found[1]).float().mean() < 0.05, "and did no harm"


@pytest.mark.parametrize("method", ["wanda", "sparsegpt", "rgs", "wanda++"])
def test_casts_that_are_kept_are_never_stale(method, monkeypatch):
    found = []
    for constant_weights in (_BlockSequence._constant_weights, lambda self, index: nullcontext()):
        monkeypatch.setattr(_BlockSequence, "_constant_weights", constant_weights)
        model = build("llama")[0].requires_grad_(False)
        report = prune(model, method=method, compute_dtype="bfloat16")
        found.append((model.state_dict(), report.blocks[-1].loss_after))
        assert not any(parameter.requires_grad for parameter in model.parameters())
    assert found[0][1] == found[1][1]
    for name, value in found[0][0].items():
        assert torch.equal(value, found[1][0][name]), name


@pytest.mark.slow
@pytest.mark.samples
def test_bfloat16_compute_hardly_changes_the_masks_of_the_sample_model():
    """Bar: fewer than 1% of the places. Perplexities of every method: `benchmarks/prune_quality.py bf16`."""
    folder = str(cache_folder() / "smollm2-135m")
    whole = LanguageModel(folder)
    # a few blocks: products in bfloat16 are slow on a CPU
    whole.backbone.model.layers = whole.backbone.model.layers[:3]
    text = TextDataModule(tokenizer=folder, sequence_length=32, num_calibration_samples=8)
    batches = list(text.calibration_dataloader())
    for method in ("wanda", "rgs"):
        found = []
        for compute_dtype in ("model", "bfloat16"):
            model = copy.deepcopy(whole)
            options = make_options(method, alpha=5.0, compute_dtype=compute_dtype)
            prune_model(model, model.calibration_forward, batches, options)
            blocks = model.backbone.model.layers
            found.append([torch.cat([(x.weight != 0).flatten() for x in linears(block)]) for block in blocks])
        for block, (mine, other) in enumerate(zip(*found, strict=True)):
            assert 0 < (mine != other).float().mean() < 0.01, f"{method}, block {block}"


@pytest.mark.parametrize(
    ("capabilities", "warns"),
    [
        ({"architecture": "x86_64"}, True),
        ({"architecture": "x86_64", "avx512_bf16": True}, False),
        ({"architecture": "x86_64", "amx_bf16": True}, False),
        ({"architecture": "aarch64"}, False),  # its own names are not known here
    ],
)
def test_bfloat16_on_a_cpu_without_it_is_told(monkeypatch, capabilities, warns):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        tiny(method="wanda", compute_dtype="bfloat16")
        tiny(method="wanda")
    assert sum("no instructions for bfloat16" in str(warning.message) for warning in caught) == warns
