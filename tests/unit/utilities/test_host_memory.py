import pytest
import torch

from wandazeta.utilities.host_memory import pack_mask, unpack_mask


@pytest.mark.parametrize("shape", [(1,), (7,), (8,), (3, 5), (2, 3, 11), (64, 33), (0,)])
def test_packed_masks_are_an_eighth_and_become_the_same_masks(shape):
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(0)) < 0.5
    packed = pack_mask(mask)
    assert packed.dtype == torch.uint8
    assert packed.shape == (-(-mask.numel() // 8),)
    found = unpack_mask(packed, mask.shape)
    assert found.dtype == torch.bool
    assert torch.equal(found, mask)


def test_masks_that_are_views_are_packed_in_the_order_of_their_values():
    mask = torch.eye(9, dtype=torch.bool)[:, 1:4]
    assert pack_mask(mask.T).tolist() == [2, 8, 32, 0]
    assert torch.equal(unpack_mask(pack_mask(mask.T), mask.T.shape), mask.T)
