import pytest
import torch
import transformers as hf
from torch import nn

from wandazeta.pruning.held_masks import HeldMasks, masks_from_zeros, pack_mask, unpack_mask


@pytest.mark.parametrize("shape", [(1,), (8,), (3, 5), (16, 8)])
def test_packed_masks_come_back(shape):
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(0)) > 0.5
    packed = pack_mask(mask)
    assert packed.dtype == torch.uint8
    assert len(packed) == -(-mask.numel() // 8)
    assert torch.equal(unpack_mask(packed, mask.shape), mask)


def held_layer(**kwargs):
    layer = nn.Linear(4, 2)
    mask = torch.tensor([[True, False, True, False]] * 2)
    with torch.no_grad():
        layer.weight[~mask] = -0.0
    return layer, HeldMasks({"weight": layer.weight}, {"weight": mask} | kwargs)


def test_minus_zeros_become_plain_ones_and_numbers_are_counted():
    layer, held = held_layer()
    assert layer.weight.signbit()[:, 1].all()
    held.hold([])
    held.check()
    assert not layer.weight[:, 1].signbit().any()
    assert (held.num_weights, held.num_pruned) == (8, 4)


def test_not_finite_gradients_of_pruned_weights_are_nothing():
    layer, held = held_layer()
    held.hold([])
    layer(torch.tensor([1.0, torch.inf, 1.0, torch.nan])).nan_to_num().sum().backward()
    assert layer.weight.grad.isfinite().all()


def test_state_of_another_kind_or_shape_is_left_alone():
    layer, held = held_layer()
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    codes, factor = torch.ones(2, 4, dtype=torch.uint8), torch.ones(2)
    optimizer.state[layer.weight] |= {"codes": codes, "factor": factor, "momentum": torch.ones(2, 4)}
    held.hold([optimizer])
    assert codes.all()
    assert factor.all()
    assert optimizer.state[layer.weight]["momentum"].tolist() == [[1.0, 0.0, 1.0, 0.0]] * 2


def test_foreign_optimizers_are_refused():
    with pytest.raises(ValueError, match="Expected optimizers of torch, but got object"):
        held_layer()[1].hold([object()])


@pytest.mark.parametrize("pruned", ["encoder.block", "decoder.block"])
def test_masks_come_from_every_list_of_blocks_that_was_pruned(pruned):
    config = hf.T5Config(vocab_size=32, d_model=16, d_kv=8, d_ff=24, num_heads=2, num_layers=2, num_decoder_layers=4)
    model = hf.T5ForConditionalGeneration(config)
    with torch.no_grad():
        weight = next(m for m in model.get_submodule(pruned).modules() if isinstance(m, torch.nn.Linear)).weight
        weight[:, ::2] = 0
    (name,) = masks_from_zeros(model)
    assert name.startswith(pruned)
    other = {"encoder.block": "decoder.block", "decoder.block": "encoder.block"}[pruned]
    with pytest.raises(ValueError, match=f"pruned in `{other}`"):
        masks_from_zeros(model, other)
