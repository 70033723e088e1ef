"""The callbacks prune fused experts, hold them sparse while they are trained, and read their masks from files."""

import pytest
import torch
from helpers.experts import Mixture, mixture_loader
from helpers.masked import is_positive_zero
from helpers.pruning import callback, fit, trainer

from wandazeta.callbacks import KeepSparsity
from wandazeta.pruning.export.pretrained import export_pretrained


def expert_weights(module):
    return {name: p for name, p in module.named_parameters() if name.endswith(("gate_up_proj", "down_proj"))}


def zeros_of(module):
    return {name: weight == 0 for name, weight in expert_weights(module).items()}


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
def test_pruned_held_loaded_exported_and_held_again(tmp_path, name):
    pruning = callback(tmp_path / "pruned", method="wanda")
    trained = fit(pruning, Mixture(name), mixture_loader())
    loaded = Mixture(name)
    trainer(callback(tmp_path / "pruned", method="wanda")).validate(loaded, mixture_loader(), verbose=False)
    zeros = zeros_of(loaded)
    assert all(places.float().mean() == 0.5 for places in zeros.values())
    for key, places in zeros.items():
        assert is_positive_zero(expert_weights(trained)[key][places])
        assert bool((expert_weights(trained)[key][~places] != expert_weights(loaded)[key][~places]).any())

    masks = {key.removeprefix("model."): weight != 0 for key, weight in expert_weights(loaded).items()}
    export_pretrained(loaded.model, None, tmp_path / "out", pruning.report, masks)
    for keep in (KeepSparsity(masks=str(tmp_path / "out")), KeepSparsity()):
        module = Mixture(name)
        module.load_state_dict(loaded.state_dict())
        fit(keep, module, mixture_loader())
        held = {key: mask for key, mask in keep.held.masks.items() if key in zeros}
        assert held.keys() == zeros.keys()
        for key, places in zeros.items():
            assert torch.equal(held[key], ~places)
            assert is_positive_zero(expert_weights(module)[key][places])


def test_experts_that_other_code_runs_are_refused_before_any_work(tmp_path):
    module = Mixture()
    for layer in module.model.model.layers:
        experts = layer.mlp.experts

        def fused_kernel(hidden, experts=experts):
            return (hidden @ experts.gate_up_proj[0].t())[..., :16]

        layer.mlp.forward = fused_kernel
    with pytest.raises(ValueError, match=r"but `mlp\.experts\.gate_up_proj` are not, although their weights are"):
        fit(callback(tmp_path / "pruned", method="wanda"), module, mixture_loader())
    assert not list((tmp_path / "pruned").glob("block_*"))
