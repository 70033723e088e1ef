"""Pruning models with adapters of peft: base layers are pruned, adapters stay dense, names come out right."""

import peft
import pytest
import torch
from helpers.architectures import build
from helpers.causal_lms import tiny_lm
from helpers.prune_model import prune, rows_of
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM

from wandazeta.models.pretrained import find_pretrained
from wandazeta.pruning.export.masks import match_masks
from wandazeta.pruning.export.pretrained import export_pretrained
from wandazeta.pruning.held_masks import masks_from_zeros

CONFIGS = {
    "lora": peft.LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False),
    "dora": peft.LoraConfig(r=4, target_modules=["q_proj", "up_proj"], use_dora=True, init_lora_weights=False),
    "adalora": peft.AdaLoraConfig(target_modules=["q_proj"], init_r=4, total_step=10, init_lora_weights=False),
    "loha": peft.LoHaConfig(r=4, target_modules=["q_proj", "down_proj"], init_weights=False),
    "ia3": peft.IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
}


def adapted(kind="lora", model=None):
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return peft.get_peft_model(model or tiny_lm(), CONFIGS[kind]).eval()


def batches():
    ids = torch.randint(3, 300, (8, 1, 10), generator=torch.Generator().manual_seed(0))
    return [{"input_ids": row} for row in ids]


def prune_adapted(model, **options):
    return prune(model, [] if options.get("method") == "magnitude" else batches(), **options)


@pytest.mark.parametrize(
    ("kind", "method"),
    [
        *((kind, method) for kind in CONFIGS for method in ("magnitude", "wanda")),
        ("lora", "wanda++"),
        ("lora", "sparsegpt"),
    ],
)
def test_base_layers_are_pruned_and_adapters_stay_dense(kind, method):
    model, dense = adapted(kind), adapted(kind).state_dict()
    report = prune_adapted(model, method=method)
    assert report.num_layers == 3 * 7
    for name, tensor in model.state_dict().items():
        layer = model.get_submodule(name.rpartition(".")[0])
        if isinstance(layer, nn.Linear) and ".layers." in name and "lora_" not in name:
            assert ((rows_of(layer) != 0).reshape(-1, 4).sum(1) <= 2).all(), name
        else:
            assert torch.equal(tensor, dense[name]), name
    assert not any("lora_" in layer.name for block in report.blocks for layer in block.layers)
    assert any("base_layer" in layer.name for block in report.blocks for layer in block.layers)


@pytest.mark.parametrize("kind", ["lora", "dora", "ia3"])
def test_the_export_has_the_names_of_the_model_and_its_adapters_beside(kind, tmp_path):
    model = adapted(kind)
    report = prune_adapted(model, method="wanda")
    prefix, own = find_pretrained(model)
    assert prefix == "base_model.model."
    masks = {
        name.removeprefix(prefix): mask
        for name, mask in masks_from_zeros(model, "base_model.model.model.layers").items()
    }
    export_pretrained(own, None, tmp_path / "out", report, masks)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert "`adapters/`" in (tmp_path / "out" / "README.md").read_text()
    names = load_file(tmp_path / "out" / "sparsity" / "masks.safetensors")
    assert names.keys() <= dict(loaded.named_parameters()).keys()
    assert len(names) == 21
    batch = batches()[0]
    with torch.no_grad():
        again = peft.PeftModel.from_pretrained(loaded, tmp_path / "out" / "adapters" / "default").eval()
        assert torch.equal(again(**batch).logits, model(**batch).logits)
    # masks of the plain model fit the one with adapters
    assert match_masks(again, names).keys() == {f"{prefix}{name}" for name in masks}


def test_adapters_that_transformers_has_added_are_written_beside_the_model(tmp_path):
    model = tiny_lm()
    model.add_adapter(CONFIGS["lora"])
    report = prune_adapted(model.eval(), method="wanda")
    export_pretrained(model, None, tmp_path / "out", report, masks_from_zeros(model))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    again = peft.PeftModel.from_pretrained(loaded, tmp_path / "out" / "adapters" / "default").eval()
    with torch.no_grad():
        assert torch.equal(again(**batches()[0]).logits, model(**batches()[0]).logits)
    assert model._hf_peft_config_loaded


def test_layers_that_do_not_run_as_they_are_are_refused():
    model = adapted()
    model.merge_adapter()
    with pytest.raises(ValueError, match=r"merged into its weight; call `unmerge_adapter\(\)`"):
        prune_adapted(model)
    config = peft.LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["up_proj"])
    model = peft.get_peft_model(tiny_lm(), config).eval()
    with pytest.raises(ValueError, match=r"`modules_to_save` has made; add `mlp.up_proj` to"):
        prune_adapted(model)
    assert prune_adapted(model, exclude_modules=("mlp.up_proj",)).num_layers == 18


def test_adapters_on_fused_experts_are_refused():
    config = peft.LoraConfig(r=2, target_parameters=["mlp.experts.down_proj"], init_lora_weights=False)
    model = peft.get_peft_model(build("mixtral")[0], config).eval()
    with pytest.raises(ValueError, match=r"experts without adapters, .* add `mlp\.experts` to `exclude_modules`"):
        prune_adapted(model)
    report = prune_adapted(model, exclude_modules=("mlp.experts",), method="magnitude")
    assert report.num_layers == 3 * 4
