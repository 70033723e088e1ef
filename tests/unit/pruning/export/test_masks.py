import pytest
import torch
from helpers.architectures import build
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


def test_masks_of_parameters_need_no_transformers_model():
    masks = {"0.weight": torch.ones(2, 2, dtype=torch.bool)}
    assert match_masks(nn.Sequential(nn.Linear(2, 2)), masks).keys() == {"0.weight"}


def test_a_mask_of_nothing_is_refused():
    name = "model.layers.0.mlp.upp_proj.weight"
    with pytest.raises(ValueError, match=r"has no `model.layers.0.mlp.upp_proj.weight`; did you mean `model.layers"):
        match_masks(Holder("llama"), {name: torch.ones(1, dtype=torch.bool)})
