import copy
import re

import pytest
import torch
from helpers.architectures import build, token_batches
from helpers.pruning import Tiny, callback, fit
from torch import nn

from wandazeta.pruning import prune_model
from wandazeta.pruning.method.layers import prunable_layers, validate_layers, weight_view
from wandazeta.pruning.options import PruneOptions
from wandazeta.pruning.pattern import SparsityPattern


class Block(nn.Module):
    def __init__(self, width=8):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up_proj = nn.Linear(width, 12)
        self.down_proj = nn.Linear(12, width)


def make(num_blocks=2, change=lambda block: None):
    blocks = nn.ModuleList(Block() for _ in range(num_blocks))
    change(blocks[0])
    return blocks


def names(blocks, *excluded):
    options = PruneOptions(exclude_modules=excluded)
    validate_layers(blocks, options, block_name="model.layers")
    return [list(prunable_layers(block, excluded, f"model.layers.{i}")) for i, block in enumerate(blocks)]


def test_names_are_those_of_the_weights():
    assert names(make()) == [["up_proj.weight", "down_proj.weight"]] * 2


def test_excluded_by_name_path_block_or_expression():
    assert names(make(), "up_proj") == [["down_proj.weight"]] * 2
    assert names(make(), "layers.0.up_proj") == [["down_proj.weight"], ["up_proj.weight", "down_proj.weight"]]
    assert names(make(), "layers.1") == [["up_proj.weight", "down_proj.weight"], []]
    assert names(make(), r"layers\.[01]\.(up|gate)_proj") == [["down_proj.weight"]] * 2


def test_excluded_names_that_match_nothing_get_the_nearest():
    with pytest.raises(ValueError, match=r"'upproj' matches none; did you mean `up_proj`"):
        names(make(), "upproj")
    with pytest.raises(ValueError, match="found none"):
        names(make(), ".*_proj")


def test_conv1d_is_seen_as_out_by_in():
    model, _ = build("gpt2")
    layers = prunable_layers(model.transformer.h[0])
    assert list(layers) == ["attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight"]
    view = weight_view(layers["attn.c_attn.weight"])
    assert view.shape == (48, 16)
    view[3, 5] = 7.0
    assert layers["attn.c_attn.weight"].weight[5, 3] == 7.0


def test_widths_must_fit_the_pattern():
    with pytest.raises(ValueError, match=r"'4:8' does not divide the 12 inputs of `blocks.0.down_proj.weight`"):
        validate_layers(make(), PruneOptions(pattern="4:8"))
    validate_layers(make(), PruneOptions(pattern="4:8", exclude_modules=("down_proj",)))
    with pytest.raises(ValueError, match=r"8 inputs of `blocks.0.up_proj.weight` rounds down to 0"):
        validate_layers(make(), PruneOptions(pattern=SparsityPattern("unstructured", 0.1)))


def test_what_cannot_be_pruned_is_refused_by_name_and_can_be_excluded():
    def attention(block):
        block.attn = nn.MultiheadAttention(8, 2)

    def experts(block):
        block.experts = nn.Module()
        block.experts.gate_up_proj = nn.Parameter(torch.randn(4, 8, 16))

    def quantised(block):
        block.up_proj.weight = nn.Parameter(torch.zeros(12, 8, dtype=torch.int8), requires_grad=False)

    def meta(block):
        block.up_proj = nn.Linear(8, 12, device="meta")

    def parametrised(block):
        nn.utils.parametrizations.weight_norm(block.up_proj)

    for change, message in (
        (attention, r"`blocks.0.attn` \(MultiheadAttention\).*`in_proj_weight`"),
        (
            experts,
            r"`blocks.0.experts` \(Module\) holds fused experts of an unknown kind, `gate_up_proj` of \(4, 8, 16\)",
        ),
        (quantised, "before it is quantized"),
        (meta, "meta device"),
        (parametrised, "is computed"),
    ):
        with pytest.raises(ValueError, match=message):
            validate_layers(make(change=change), PruneOptions())
    validate_layers(make(change=attention), PruneOptions(exclude_modules=("attn",)))
    assert names(make(change=attention), "attn")[0] == ["up_proj.weight", "down_proj.weight"]


def test_all_that_hold_matrices_of_their_own_are_named_at_once_by_the_names_to_exclude():
    def mixture(block):
        block.mlp = nn.Module()
        block.mlp.gate, block.mlp.experts = nn.Module(), nn.Module()
        block.mlp.gate.weight = nn.Parameter(torch.randn(4, 8))
        block.mlp.experts.weights = nn.Parameter(torch.randn(4, 8, 16))

    with pytest.raises(
        ValueError, match=r"`\S+0.mlp.gate` \(.*`\S+0.mlp.experts` \(.*; add `mlp.gate`, `mlp.experts` to"
    ):
        validate_layers(make(change=mixture), PruneOptions())


@pytest.mark.parametrize("method", ["magnitude", "wanda"])
@pytest.mark.parametrize("name", ["mamba", "jamba"])
def test_a_remedy_that_is_offered_works(name, method):
    """What the message says to exclude is all that has to be excluded, and leaves layers to prune."""
    model, blocks = build(name)

    def pruned(*exclude):
        forward, batches = (lambda batch: model(**batch)), token_batches(4) if method == "wanda" else []
        options = PruneOptions(method, exclude_modules=exclude)
        return prune_model(model, forward, batches, options, block_name=blocks)

    with pytest.raises(ValueError, match=r"to `exclude_modules` to leave that dense$") as caught:
        pruned()
    offered = re.findall(r"`([^`]+)`", str(caught.value).rsplit("; add ", 1)[1])[:-1]
    if name == "mamba":
        assert offered == ["mixer.A_log", "mixer.dt_proj"][: 1 if method == "magnitude" else 2]
    assert pruned(*offered).num_layers > 0


@pytest.mark.parametrize("change", ["own", "width"])
def test_no_remedy_is_offered_that_leaves_nothing_to_prune(change):
    def own(block):
        del block.up_proj, block.down_proj
        block.attn = nn.MultiheadAttention(8, 2)

    if change == "own":
        message, blocks, options = "nothing else in these blocks can be pruned", make(change=own), PruneOptions()
        blocks[1] = copy.deepcopy(blocks[0])
    else:
        message, blocks, options = "; choose another pattern$", make(), PruneOptions(pattern="5:16")
    with pytest.raises(ValueError, match=message):
        validate_layers(blocks, options)


def test_a_layer_whose_weight_is_used_without_a_call_is_refused_before_any_work(tmp_path):
    module = Tiny()
    for layer in module.layers:
        layer.extra = nn.Linear(8, 8)
        layer.forward = lambda x, layer=layer: x + layer.up(x)[..., :8] @ layer.extra.weight + layer.down(layer.up(x))
    with pytest.raises(ValueError, match=r"but `extra` are not, .* add `extra` to `exclude_modules`"):
        fit(callback(tmp_path / "pruned"), module)
    assert not list((tmp_path / "pruned").glob("block_*"))
    fit(callback(tmp_path / "pruned", exclude_modules=["extra"]), module)


def test_shared_and_tied_weights_are_refused():
    def shared(block):
        block.again = nn.Linear(8, 12)
        block.again.weight = block.up_proj.weight

    with pytest.raises(ValueError, match="share one"):
        validate_layers(make(change=shared), PruneOptions())
    model = nn.Module()
    model.layers, model.embedding = make(), nn.Embedding(12, 8)
    validate_layers(model.layers, PruneOptions(), model=model, block_name="layers")
    model.embedding.weight = model.layers[1].up_proj.weight
    with pytest.raises(ValueError, match=r"`layers.1.up_proj.weight` is tied to `embedding.weight`"):
        validate_layers(model.layers, PruneOptions(), model=model, block_name="layers")


def test_a_second_name_of_the_blocks_ties_nothing():
    model, blocks = build("llama")
    model.alias = model.get_submodule(blocks)
    validate_layers(model.get_submodule(blocks), PruneOptions(), model=model, block_name=blocks)
    model.other = nn.Linear(16, 16, bias=False)
    model.other.weight = model.get_submodule(blocks)[0].self_attn.q_proj.weight
    with pytest.raises(ValueError, match=r"q_proj\.weight` is tied to `other\.weight`"):
        validate_layers(model.get_submodule(blocks), PruneOptions(), model=model, block_name=blocks)
