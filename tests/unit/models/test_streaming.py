import copy

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from wandazeta.models.blocks import override_forward
from wandazeta.models.streaming import Stored, bring_in_when_called, is_stored, require_whole, resident, store, whole


@pytest.fixture
def file(tmp_path):
    save_file({"a": torch.arange(6.0).view(2, 3), "b": torch.arange(5, dtype=torch.bfloat16)}, tmp_path / "x")
    return tmp_path / "x"


def stored_block(file, **dtype):
    block = nn.Sequential(nn.Linear(3, 2, bias=False, device="meta", **dtype))
    store(block[0].weight, Stored(file, "a"))
    return block


def test_read_gives_fresh_memory_placed_as_in_the_file(file):
    for name in "ab":
        with safe_open(file, framework="pt") as opened:
            mapped = opened.get_tensor(name)
            copied = Stored(file, name).read()
            assert torch.equal(copied, mapped)
            assert copied.data_ptr() % 64 == mapped.data_ptr() % 64
            assert copied.data_ptr() != mapped.data_ptr()
    before = file.read_bytes()
    Stored(file, "a").read().zero_()
    assert file.read_bytes() == before


def test_what_cannot_be_read_is_named(file, tmp_path):
    for stored in (Stored(file, "c"), Stored(tmp_path / "none", "a")):
        with pytest.raises(ValueError, match=f"to be a whole safetensors file that holds `{stored.name}`"):
            stored.read()


def test_whole_reads_in_the_type_of_the_tensor_and_leaves_others_alone(file):
    tensor = store(torch.empty(2, 3, dtype=torch.float16, device="meta"), Stored(file, "a"))
    assert is_stored(tensor)
    assert torch.equal(whole(tensor), torch.arange(6.0).view(2, 3).half())
    for other in (torch.ones(2), torch.ones(2, device="meta")):
        assert not is_stored(other)
        assert whole(other) is other


def test_a_block_is_resident_for_a_while(file):
    block = stored_block(file)
    parameter = block[0].weight.requires_grad_(False)
    with resident(block):
        inside = block[0].weight
        assert torch.equal(inside, torch.arange(6.0).view(2, 3))
        assert not inside.requires_grad
        with resident(block), torch.no_grad():
            assert block[0].weight is inside
            inside.zero_()
        assert block[0].weight is inside
    assert block[0].weight is parameter
    with resident(block):
        assert block[0].weight.any()


def test_a_file_that_is_gone_leaves_the_block_as_it_was(file):
    block = nn.Sequential(stored_block(file)[0], nn.Linear(3, 2, bias=False, device="meta"))
    store(block[1].weight, Stored(file, "none"))
    first = block[0].weight
    with pytest.raises(ValueError, match="holds `none`"), resident(block):
        pass
    assert block[0].weight is first


def test_tied_parameters_are_read_once(file):
    block = nn.Sequential(stored_block(file)[0], nn.Linear(3, 2, bias=False, device="meta"))
    block[1].weight = block[0].weight
    with resident(block):
        assert block[0].weight is block[1].weight


def test_the_forward_brings_it_in_and_a_skipped_one_does_not(file):
    block = stored_block(file)
    bring_in_when_called(block)
    assert torch.equal(block(torch.ones(1, 3)), torch.tensor([[3.0, 12.0]]))
    assert block[0].weight.is_meta
    file.unlink()
    with override_forward({block: lambda x: x}):
        assert torch.equal(block(torch.ones(1, 3)), torch.ones(1, 3))
    with pytest.raises(ValueError, match="whole safetensors file"):
        block(torch.ones(1, 3))


def test_require_whole(file):
    require_whole(nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"in memory, but `0\.weight` and others are streamed"):
        require_whole(stored_block(file))


def test_ordinary_blocks_are_left_alone():
    block = nn.Sequential(nn.Linear(2, 2))
    before = copy.deepcopy(block.state_dict())
    weight = block[0].weight
    with resident(block):
        assert block[0].weight is weight
        weight.data.add_(1)
    assert torch.equal(weight, before["0.weight"] + 1)
