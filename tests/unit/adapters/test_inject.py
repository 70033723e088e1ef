import pytest
import torch
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MPNetConfig,
    MPNetModel,
    OPTConfig,
    OPTForCausalLM,
)

from wandazeta.adapters import AdaptedModule, LoRAAdapters, TensorTrainAdapters, inject_adapters, remove_adapters
from wandazeta.utilities.precision import default_dtype

SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4, "vocab_size": 67}
GATED = ["before:mlp.gate_proj", "before:mlp.up_proj", "after:mlp.down_proj"]


def llama():
    model = LlamaForCausalLM(LlamaConfig(**SIZES, num_key_value_heads=2))
    return model, model.model.layers


def bert():
    model = BertForSequenceClassification(BertConfig(**SIZES))
    return model, model.bert.encoder.layer


def mpnet():
    model = MPNetModel(MPNetConfig(**SIZES))
    return model, model.encoder.layer


def gpt2():
    model = GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=3, n_head=4, vocab_size=67, bos_token_id=0, eos_token_id=0))
    return model, model.transformer.h


def opt():
    model = OPTForCausalLM(
        OPTConfig(
            hidden_size=32,
            ffn_dim=48,
            num_hidden_layers=3,
            num_attention_heads=4,
            vocab_size=67,
            word_embed_proj_dim=32,
        )
    )
    return model, model.model.decoder.layers


@pytest.fixture(params=[llama, bert, mpnet, gpt2, opt])
def built(request):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model, blocks = request.param()
    return model.eval(), blocks


def places(vector):
    return [f"{site.position}:{site.name}" for site in vector.sites if site.block == 0]


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (llama, GATED),
        (bert, ["after:attention.output.dense", "after:output.dense"]),
        (mpnet, ["after:attention.attn.o", "after:output.dense"]),
        (gpt2, ["after:mlp.c_proj"]),
        (opt, ["after:fc2"]),
    ],
)
def test_default_sites(make, expected):
    model, blocks = make()
    vector = inject_adapters(model, blocks=blocks)
    assert places(vector) == expected
    assert {site.width for site in vector.sites} == {32}
    assert len(vector.sites) == 3 * len(expected)


@torch.no_grad()
def test_identity_start_folding_and_removal(built):
    model, blocks = built
    ids = torch.randint(3, 67, (2, 7), generator=torch.Generator().manual_seed(0))
    names = list(model.state_dict())
    dense = model(ids)[0]
    vector = inject_adapters(model, blocks=blocks)
    assert torch.equal(model(ids)[0], dense)
    generator = torch.Generator().manual_seed(1)
    theta_Pd = vector.theta + 0.1 * torch.randn(3, vector.num_parameters, generator=generator)
    with vector.use(theta_Pd):
        folded = model(ids.repeat(3, 1))[0]
    loop = []
    for theta in theta_Pd:
        vector.theta.copy_(theta)
        loop.append(model(ids)[0])
        assert (loop[-1] - dense).abs().max() > 1e-4
    torch.testing.assert_close(folded, torch.cat(loop), atol=1e-5, rtol=1e-4)
    remove_adapters(model)
    assert torch.equal(model(ids)[0], dense)
    assert list(model.state_dict()) == names


def test_random_start_changes_the_model():
    model, blocks = llama()
    ids = torch.arange(5)[None]
    with torch.no_grad():
        dense = model(ids).logits
        inject_adapters(model, blocks=blocks, identity_start=False)
        assert not torch.equal(model(ids).logits, dense)


@torch.no_grad()
def test_one_token_decoding_of_a_batch():
    model, blocks = llama()
    model.eval()
    vector = inject_adapters(model, blocks=blocks, identity_start=False)
    for rows in (1, 3):
        ids = torch.randint(0, 67, (rows, 6), generator=torch.Generator().manual_seed(0))
        whole = model(ids).logits
        cache = model(ids[:, :-1], use_cache=True).past_key_values
        step = model(ids[:, -1:], past_key_values=cache, use_cache=True).logits
        assert step.shape == (rows, 1, 67)
        torch.testing.assert_close(step, whole[:, -1:], atol=1e-5, rtol=1e-4)
        with vector.use(vector.theta.repeat(2, 1)):
            folded = model(ids[:, :1].repeat(2, 1)).logits
        torch.testing.assert_close(folded, model(ids[:, :1]).logits.repeat(2, 1, 1), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("layers", "expected"), [(None, [0, 1, 2]), (slice(-2, None), [1, 2]), ([0], [0]), ([-1, 0], [0, 2])]
)
def test_layers(layers, expected):
    model, blocks = llama()
    vector = inject_adapters(model, blocks=blocks, layers=layers)
    assert sorted({site.block for site in vector.sites}) == expected
    for index, block in enumerate(blocks):
        assert any(isinstance(module, AdaptedModule) for module in block.modules()) == (index in expected)


@pytest.mark.parametrize("layers", [[3], [-4], [], slice(5, 9)])
def test_layers_out_of_range(layers):
    model, blocks = llama()
    with pytest.raises(ValueError, match="`layers`"):
        inject_adapters(model, blocks=blocks, layers=layers)


def test_explicit_sites_on_both_sides_of_one_module():
    model, blocks = llama()
    vector = inject_adapters(
        model, blocks=blocks, sites=["before:mlp.up_proj", "after:mlp.up_proj", "after:input_layernorm"]
    )
    assert [site.width for site in vector.sites[:3]] == [32, 48, 32]
    up = blocks[0].mlp.up_proj
    assert (up.index, up.base.index) == (1, 0)
    assert torch.isfinite(model(torch.arange(4)[None]).logits).all()


@pytest.mark.parametrize(
    ("sites", "message"),
    [
        (["before:mlp.up_prj"], "did you mean `mlp.up_proj`"),
        (["mlp.up_proj"], "like 'before:mlp.up_proj'"),
        (["inside:mlp.up_proj"], "like 'before:mlp.up_proj'"),
        (["after:mlp"], "width is unknown"),
        (["after:mlp.up_proj", "after:mlp.up_proj"], "once"),
        ([], "at least one"),
    ],
)
def test_bad_sites_leave_the_model_alone(sites, message):
    model, blocks = llama()
    with pytest.raises(ValueError, match=message):
        inject_adapters(model, blocks=blocks, sites=sites)
    assert not any(isinstance(module, AdaptedModule) for module in model.modules())


def test_second_injection_is_refused():
    model, blocks = llama()
    inject_adapters(model, blocks=blocks)
    with pytest.raises(ValueError, match="remove_adapters"):
        inject_adapters(model, blocks=blocks)
    remove_adapters(model)
    inject_adapters(model, blocks=blocks)


def test_vector_is_registered_by_its_owner_only():
    model, blocks = llama()
    before = {name for name, _ in model.named_buffers()} | {name for name, _ in model.named_parameters()}
    vector = inject_adapters(model, blocks=blocks)
    after = {name for name, _ in model.named_buffers()} | {name for name, _ in model.named_parameters()}
    assert {name.replace(".base.", ".") for name in after} == before
    model.adapters = vector
    assert [name for name in model.state_dict() if name.endswith("theta")] == ["adapters.theta"]


def test_wrapped_module_answers_for_itself():
    base = nn.Linear(4, 6)
    model = nn.Module()
    model.blocks = nn.ModuleList([nn.Sequential(base)])
    inject_adapters(model, blocks=model.blocks)
    wrapped = model.blocks[0][0]
    assert wrapped.weight is base.weight
    assert (wrapped.in_features, wrapped.out_features) == (4, 6)
    with pytest.raises(AttributeError, match="nothing_such"):
        _ = wrapped.nothing_such


def test_fused_encoder_layers_are_refused():
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2)
    with pytest.raises(ValueError, match="set_fastpath_enabled"):
        inject_adapters(model, blocks=model.layers)


def test_block_without_an_mlp_is_refused():
    block = nn.ModuleDict({"attention": nn.Linear(4, 4), "norm": nn.LayerNorm(4), "router": nn.Linear(4, 3)})
    with pytest.raises(ValueError, match="after:norm"):
        inject_adapters(nn.Module(), blocks=nn.ModuleList([block]))


def test_only_the_first_item_of_a_tuple_is_adapted():
    class Pair(nn.Linear):
        def forward(self, x):
            return super().forward(x), x

    model = nn.Module()
    model.blocks = nn.ModuleList([nn.Sequential(Pair(4, 6))])
    x = torch.randn(3, 4)
    plain, _ = model.blocks[0](x)
    vector = inject_adapters(model, blocks=model.blocks, identity_start=False)
    adapted, same = model.blocks[0](x)
    assert same is x
    assert torch.equal(adapted, vector.adapt(0, plain))
    assert not torch.equal(adapted, plain)


@pytest.mark.parametrize("kind", [TensorTrainAdapters, LoRAAdapters])
def test_defaults_of_torch_do_not_change_the_initial_values(kind):
    models = [llama()[0], llama()[0]]
    expected = kind(rank=2).insert(models[0], 0, []).theta
    with default_dtype(torch.bfloat16), torch.device("meta"):
        found = kind(rank=2).insert(models[1], 0, []).theta
    assert torch.equal(found, expected)
    assert found.dtype == torch.float32
