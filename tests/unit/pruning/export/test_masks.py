import pytest
import torch
from helpers.architectures import WITH_EXPERTS, build
from safetensors.torch import load_file
from torch import nn
from transformers.core_model_loading import WeightRenaming

from wandazeta.pruning.export.masks import match_masks
from wandazeta.pruning.method.layers import prunable_layers


class Holder(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.backbone, self.blocks = build(kind)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert", "opt"])
@pytest.mark.parametrize("renamed", [False, True])
def test_names_are_those_in_the_files_of_the_model(tmp_path, kind, renamed):
    holder = Holder(kind)
    if renamed:
        # as a checkpoint whose names differ from those in memory
        holder.backbone._weight_conversions = [WeightRenaming("stack.of", holder.blocks.replace(".", r"\."))]
    holder.backbone.save_pretrained(tmp_path)
    on_disk = load_file(tmp_path / "model.safetensors")
    layers = {
        f"backbone.{holder.blocks}.{index}.{name}"
        for index, block in enumerate(holder.backbone.get_submodule(holder.blocks))
        for name in prunable_layers(block)
    }
    wanted = "stack.of" if renamed else holder.blocks
    masks = {name: weight > 0 for name, weight in on_disk.items() if name.startswith(wanted) and weight.ndim == 2}
    found = match_masks(holder, masks)
    assert found.keys() == layers
    for name, mask in found.items():
        assert torch.equal(mask, holder.get_parameter(name) > 0)


@pytest.mark.parametrize("kind", WITH_EXPERTS)
def test_masks_of_experts_are_those_of_their_fused_weights(tmp_path, kind):
    holder = Holder(kind)
    experts = {name: p for name, p in holder.named_parameters() if name.endswith(("gate_up_proj", "down_proj"))}
    holder.backbone.save_pretrained(tmp_path)
    on_disk = load_file(tmp_path / "model.safetensors")
    masks = {name: weight > 0 for name, weight in on_disk.items() if ".experts." in name and "bias" not in name}
    found = match_masks(holder, masks)
    assert found.keys() == experts.keys() != set()
    for name, mask in found.items():
        assert torch.equal(mask, experts[name] > 0)


def test_a_missing_or_foreign_mask_of_an_expert_is_named():
    holder = Holder("mixtral")
    name = "model.layers.0.block_sparse_moe.experts.{}.w2.weight"
    masks = {name.format(expert): torch.ones(16, 24, dtype=torch.bool) for expert in range(4)}
    (key,) = match_masks(holder, masks)
    assert key == "backbone.model.layers.0.mlp.experts.down_proj"
    lacking = {key: mask for key, mask in masks.items() if key != name.format(2)}
    with pytest.raises(ValueError, match=r"`\S+experts\.2\.w2\.weight` of shape \(16, 24\) .* but got None"):
        match_masks(holder, lacking)
    masks[name.format(1)] = torch.ones(16, 20, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"`\S+experts\.1\.w2\.weight` .* but got \(16, 20\)"):
        match_masks(holder, masks)


def test_masks_of_parameters_need_no_transformers_model():
    masks = {"0.weight": torch.ones(2, 2, dtype=torch.bool)}
    assert match_masks(nn.Sequential(nn.Linear(2, 2)), masks).keys() == {"0.weight"}


def test_a_mask_of_nothing_is_refused():
    name = "model.layers.0.mlp.upp_proj.weight"
    with pytest.raises(ValueError, match=r"has no `model.layers.0.mlp.upp_proj.weight`; did you mean `model.layers"):
        match_masks(Holder("llama"), {name: torch.ones(1, dtype=torch.bool)})
