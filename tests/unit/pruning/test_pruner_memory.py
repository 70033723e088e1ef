"""What outlives a block: nothing but the pruned weights and the hidden states for the next one."""

import gc
import weakref

import pytest
import torch
from helpers.causal_lms import tiny_lm
from helpers.prune_options import make_options
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from wandazeta.pruning import prune_model
from wandazeta.pruning.method.block import BlockPruner

NUM_BLOCKS = 4


class Made(TorchDispatchMode):
    """References to every tensor that is made while it is on, by block."""

    def __init__(self):
        super().__init__()
        self.tensors = {}
        self.block = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in tree_iter(result):
            if isinstance(tensor, torch.Tensor) and tensor.numel() > 1 and not func._schema.is_mutable:
                self.tensors.setdefault(self.block, []).append((weakref.ref(tensor), str(func)))
        return result


@pytest.fixture
def without_collection():
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.mark.usefixtures("without_collection")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "options",
    [
        {"method": "magnitude"},
        {"method": "wanda"},
        {"method": "sparsegpt"},
        {"method": "tuned-ro", "rounds": 2},
        {"method": "rgs"},
        {"method": "wanda++", "rounds": 2},
    ],
    ids=lambda options: "-".join(map(str, options.values())),
)
def test_no_tensor_of_a_block_is_alive_after_the_next_one(options, dtype):
    model = tiny_lm(num_hidden_layers=NUM_BLOCKS).to(dtype)
    batches = [{"input_ids": row} for row in torch.randint(300, (4, 10)).split(1)]
    made = Made()

    def on_block(record, num_blocks):
        # hidden states and dense outputs of a block live until the next one has replaced them; arguments of all blocks
        # are made before the first one
        earlier = made.tensors.pop(record.index - 1, []) if record.index > 1 else []
        alive = [func for reference, func in earlier if reference() is not None]
        assert not alive, (record.index, alive)
        made.block = record.index + 1

    with made:
        prune_model(model, lambda b: model(**b, use_cache=False), batches, make_options(**options), on_block=on_block)


@pytest.mark.usefixtures("without_collection")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_who_still_refers_to_a_finished_block_holds_none_of_its_tensors(dtype, monkeypatch):
    # as an exception or a lazy import does, whose frames are collected much later
    kept, tensors = [], []
    measure, make = BlockPruner.measure, torch.optim.RMSprop.__init__

    def held(self, *args, **kwargs):
        outputs = measure(self, *args, **kwargs)
        tensors.extend(map(weakref.ref, (*self.gradients.values(), *self.master.masters.values())))
        kept.append(self)
        return outputs

    def held_optimizer(self, parameters, **options):
        make(self, parameters, **options)
        kept.append(self)

    step = torch.optim.RMSprop.step

    def stepped(self, *args, **kwargs):
        result = step(self, *args, **kwargs)
        tensors.extend(weakref.ref(state["square_avg"]) for state in self.state.values())
        return result

    monkeypatch.setattr(BlockPruner, "measure", held)
    monkeypatch.setattr(torch.optim.RMSprop, "__init__", held_optimizer)
    monkeypatch.setattr(torch.optim.RMSprop, "step", stepped)
    model = tiny_lm(num_hidden_layers=2).to(dtype)
    weights = {id(parameter) for parameter in model.parameters()}
    batches = [{"input_ids": row} for row in torch.randint(300, (4, 10)).split(1)]
    prune_model(model, lambda b: model(**b, use_cache=False), batches, make_options("wanda++", rounds=1))
    assert len(kept) == 2 * 2
    assert len(tensors) > 2 * 14
    # masters of float32 weights are the weights
    assert all(tensor() is None or id(tensor()) in weights for tensor in tensors)
