import pytest
import torch
import transformers as hf
from helpers.architectures import ARCHITECTURES, build, pad, token_batches
from torch import nn

from wandazeta.models.blocks import (
    BlockCall,
    CallCapture,
    StopForward,
    block_lists,
    call_block,
    capture_block_calls,
    find_blocks,
    override_forward,
    run_until_stopped,
)


class Block(nn.Module):
    def __init__(self, width=4):
        super().__init__()
        self.linear = nn.Linear(width, width)

    def forward(self, x):
        return x + self.linear(x)


class Plain(nn.Module):
    def __init__(self, num_blocks=3, kind=nn.ModuleList):
        super().__init__()
        self.embedding = nn.Embedding(8, 4)
        self.layers = kind(*([[Block() for _ in range(num_blocks)]] if kind is nn.ModuleList else []))
        if kind is nn.Sequential:
            self.layers = nn.Sequential(*(Block() for _ in range(num_blocks)))

    def between(self, x, index):
        return x

    def forward(self, tokens):
        x = self.embedding(tokens)
        for index, layer in enumerate(self.layers):
            x = self.between(layer(x), index)
        return x


TOKENS = torch.arange(6)[None]


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_blocks_are_found_in_every_architecture(name):
    model, expected = build(name)
    batch = token_batches(1)[0]
    found, blocks = find_blocks(model, lambda: model(**batch))
    assert found == expected
    assert list(blocks) == list(model.get_submodule(expected))


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_replayed_blocks_equal_the_real_forward_for_each_sample(name, side):
    model, list_name = build(name)
    blocks = model.get_submodule(list_name)
    capture = CallCapture(blocks)
    for number, batch in enumerate(token_batches(3)):
        batch = pad(batch, 2 * number, side) if number else batch
        wanted = []
        hook = blocks[-1].register_forward_hook(
            lambda _, __, out, wanted=wanted: wanted.append(out if torch.is_tensor(out) else out[0])
        )
        with torch.no_grad():
            model(**batch)
        hook.remove()
        for hidden, calls in (
            capture_block_calls(lambda b=batch: model(**b), blocks),
            capture(lambda b=batch: model(**b)),
        ):
            assert len(calls) == len(blocks)
            with torch.no_grad():
                for block, call in zip(blocks, calls, strict=True):
                    hidden = call_block(block, hidden, call)
            assert torch.equal(hidden, wanted[0])


@pytest.mark.parametrize("name", ["gemma3", "modernbert"])
def test_rotary_tables_differ_between_types_of_layers(name):
    model, list_name = build(name)
    _, calls = capture_block_calls(lambda: model(**token_batches(1)[0]), model.get_submodule(list_name))
    assert not torch.equal(calls[0].kwargs["position_embeddings"][0], calls[1].kwargs["position_embeddings"][0])


def test_gemma2_gets_a_mask_for_each_type_of_layer():
    model, name = build("gemma2")
    _, calls = capture_block_calls(lambda: model(**token_batches(1)[0]), model.get_submodule(name))
    assert not torch.equal(calls[0].kwargs["attention_mask"], calls[1].kwargs["attention_mask"])
    assert torch.equal(calls[0].kwargs["attention_mask"], calls[2].kwargs["attention_mask"])


def test_no_cache_is_kept():
    for name in ("llama", "gpt2", "opt"):
        model, list_name = build(name)
        _, calls = capture_block_calls(lambda m=model: m(**token_batches(1)[0]), model.get_submodule(list_name))
        for call in calls:
            for value in (*call.args, *call.kwargs.values()):
                assert "Cache" not in type(value).__name__
            assert not call.kwargs.get("use_cache")


def test_further_samples_skip_the_blocks_only_where_nothing_depends_on_them():
    runs = {"llama": 0, "t5": 0}
    for name in runs:
        model, list_name = build(name)
        blocks = model.get_submodule(list_name)
        capture = CallCapture(blocks)
        linear = next(m for m in blocks[-1].modules() if isinstance(m, nn.Linear))
        counted = []
        linear.register_forward_hook(lambda *_, counted=counted: counted.append(1))
        for batch in token_batches(4):
            capture(lambda m=model, b=batch: m(**b))
        runs[name] = len(counted)
        assert not any("forward" in vars(block) for block in blocks)
    assert runs == {"llama": 1, "t5": 4}


def test_equal_tensors_of_samples_are_kept_once():
    model, name = build("llama")
    capture = CallCapture(model.get_submodule(name))
    first, second = (capture(lambda b=batch: model(**b))[1] for batch in token_batches(2))
    assert first[0].kwargs["position_embeddings"][0] is second[1].kwargs["position_embeddings"][0]


def test_the_forward_stops_after_the_last_block():
    model = Plain()
    model.head = nn.Linear(4, 4)
    reached = []
    original = model.forward

    def forward():
        original(TOKENS)
        reached.append(1)

    capture_block_calls(forward, model.layers)
    assert not reached
    assert not model.layers[0]._forward_hooks
    assert not model.layers[0]._forward_pre_hooks


def test_hidden_states_may_come_by_name_and_outputs_in_tuples():
    class Named(Block):
        def forward(self, hidden_states, scale):
            return super().forward(hidden_states) * scale, "rest"

    class Model(Plain):
        def forward(self, tokens):
            x = self.embedding(tokens)
            for index, layer in enumerate(self.layers):
                x = layer(scale=index + 1.0, hidden_states=x)[0]
            return x

    model = Model()
    model.layers = nn.ModuleList(Named() for _ in range(3))
    hidden, calls = capture_block_calls(lambda: model(TOKENS), model.layers)
    assert calls[1] == BlockCall((), {"scale": 2.0}, "hidden_states")
    for block, call in zip(model.layers, calls, strict=True):
        hidden = call_block(block, hidden, call)
    assert torch.equal(hidden, model(TOKENS))


def test_sequential_and_name():
    model = Plain(kind=nn.Sequential)
    assert find_blocks(model)[0] == "layers"
    assert list(find_blocks(model, name="layers")[1]) == list(model.layers)
    with pytest.raises(ValueError, match="did you mean `layers`"):
        find_blocks(model, name="layer")
    with pytest.raises(ValueError, match="not a Embedding"):
        find_blocks(model, name="embedding")


def test_experts_inside_blocks_are_not_blocks():
    model = Plain(num_blocks=2)
    for layer in model.layers:
        layer.experts = nn.ModuleList(Block() for _ in range(5))
    assert find_blocks(model)[0] == "layers"


def test_of_two_lists_the_one_that_runs_counts():
    model = Plain()
    model.unused = nn.ModuleList(Block() for _ in range(9))
    assert find_blocks(model, lambda: model(TOKENS))[0] == "layers"
    model.layers_b = nn.ModuleList(Block() for _ in range(9))
    with pytest.raises(ValueError, match=r"found 3: `layers` \(3 blocks\), `unused` \(9 blocks\), `layers_b`"):
        find_blocks(model)


def encoder_decoder(decoder_layers=4, encoder_layers=2):
    config = hf.T5Config(
        vocab_size=32,
        d_model=16,
        d_kv=8,
        d_ff=24,
        num_heads=2,
        num_layers=encoder_layers,
        num_decoder_layers=decoder_layers,
        pad_token_id=0,
        decoder_start_token_id=0,
    )
    return hf.T5ForConditionalGeneration(config).eval()


@pytest.mark.parametrize("num_layers", [(4, 2), (1, 1), (1, 2)])
def test_of_two_stacks_that_run_none_is_chosen(num_layers):
    model = encoder_decoder(*num_layers)
    for forward in (None, lambda: model(input_ids=TOKENS, decoder_input_ids=TOKENS)):
        with pytest.raises(ValueError, match=r"found 2: `encoder.block` .*, `decoder.block` .*; set `blocks`"):
            find_blocks(model, forward)
    assert list(block_lists(model)) == ["encoder.block", "decoder.block"]
    for name in block_lists(model):
        assert find_blocks(model, name=name)[0] == name
        assert list(block_lists(model, name)) == [name]


def test_a_short_list_of_heads_that_run_is_not_left_out_without_a_word():
    class Model(Plain):
        def forward(self, tokens):
            x = super().forward(tokens)
            return [head(x) for head in self.heads]

    model = Model()
    model.heads = nn.ModuleList(Block() for _ in range(2))
    with pytest.raises(ValueError, match=r"`layers` \(3 blocks\), `heads` \(2 blocks\)"):
        find_blocks(model, lambda: model(TOKENS))


def test_of_a_model_for_images_and_text_the_text_decoder_is_taken():
    class Vision(Plain):
        config = hf.PretrainedConfig()

        def __init__(self):
            super().__init__()
            self.tower = Plain(num_blocks=9)

        def get_decoder(self):
            return self.layers

    assert find_blocks(Vision())[0] == "layers"
    assert list(block_lists(Vision())) == ["layers", "tower.layers"]


class Other(Block):
    pass


@pytest.mark.parametrize("num_blocks", [2, 4])
def test_blocks_of_mixed_classes_are_found(num_blocks):
    model = Plain()
    model.layers = nn.ModuleList((Block, Other)[i % 2]() for i in range(num_blocks))
    model.layers[1].expert = nn.ModuleList([Block()])
    assert find_blocks(model)[0] == "layers"
    assert list(find_blocks(model, lambda: model(TOKENS))[1]) == list(model.layers)


def test_a_jamba_has_one_list_of_blocks():
    model, name = build("jamba")
    assert len({type(block) for block in model.get_submodule(name)}) == 2
    assert find_blocks(model)[0] == name


def test_parts_of_a_model_in_a_list_are_not_its_blocks():
    model = Plain()
    model.parts = nn.ModuleList([Plain(num_blocks=4), Block()])
    del model.layers
    assert find_blocks(model)[0] == "parts.0.layers"


def test_refusals():
    with pytest.raises(ValueError, match="list of blocks"):
        find_blocks(nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"`nn.ModuleList` or `nn.Sequential`$"):  # a list of Linears is not offered
        find_blocks(nn.Sequential(nn.Linear(2, 2)))
    model = Plain()
    model.between = lambda x, index: x * 2
    with pytest.raises(ValueError, match="output of block 0"):
        capture_block_calls(lambda: model(TOKENS), model.layers)
    model = Plain()
    with pytest.raises(ValueError, match="ended after 0"):
        capture_block_calls(lambda: None, model.layers)
    with pytest.raises(ValueError, match="in order"):
        capture_block_calls(lambda: model(TOKENS), nn.ModuleList(reversed(model.layers)))
    model.layers[1] = model.layers[0]
    with pytest.raises(ValueError, match="more than once"):
        capture_block_calls(lambda: model(TOKENS), model.layers)


def test_an_error_of_the_model_is_not_swallowed():
    model = Plain()

    def between(x, index):
        raise RuntimeError("boom")

    model.between = between
    with pytest.raises(RuntimeError, match="boom"):
        capture_block_calls(lambda: model(TOKENS), model.layers)
    assert not model.layers[0]._forward_hooks


def test_a_block_that_changes_its_input_is_refused():
    class InPlace(Block):
        def forward(self, x):
            return x.add_(1)

    with pytest.raises(ValueError, match="in place"):
        call_block(InPlace(), torch.zeros(1, 2, 4), BlockCall())


def test_forwards_are_restored_after_an_error():
    layer = nn.Linear(2, 2)
    original = layer.forward
    with pytest.raises(RuntimeError, match="stop"), override_forward({layer: lambda x: x}):
        raise RuntimeError("stop")
    assert layer.forward == original
    assert "forward" not in layer.__dict__


def test_a_signal_ends_only_the_forward_that_it_is_meant_for():
    inner, outer = object(), object()

    def forward():
        assert run_until_stopped(lambda: None, inner) is False
        run_until_stopped(stop(outer), inner)

    def stop(token):
        def work():
            raise StopForward(token)

        return work

    assert run_until_stopped(forward, outer) is True
    assert run_until_stopped(stop(inner), inner) is True
    with pytest.raises(StopForward):
        run_until_stopped(stop(inner), outer)
