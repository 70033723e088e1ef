import copy

import pytest
import torch
from helpers.causal_lms import prompts, tiny_lm

from wandazeta.adapters import LoRAAdapters, inject_lora, remove_adapters
from wandazeta.models.blocks import find_blocks


def gen(seed):
    return torch.Generator().manual_seed(seed)


def adapted(kind="llama", dtype=torch.float64, **options):
    """A model with factors that do something, and the model as it was."""
    plain = tiny_lm(kind).to(dtype)
    model = copy.deepcopy(plain)
    vector = inject_lora(model, rank=3, alpha=6, generator=gen(1), dtype=dtype, **options)
    with torch.no_grad():
        vector.theta.add_(0.1 * torch.randn(vector.num_parameters, generator=gen(2), dtype=dtype))
    return model, vector, plain


def merged(plain, vector, theta):
    """A plain model whose weights are W + (alpha / rank) B A, with slices of the vector found by counting."""
    model, start = copy.deepcopy(plain), 0
    for site in vector.sites:
        sizes = 3 * site.in_features, 3 * site.out_features
        A, B = theta[start : start + sum(sizes)].split(sizes)
        start += sum(sizes)
        product = 2.0 * B.view(-1, 3) @ A.view(3, -1)
        module = model.get_submodule(site.name)
        with torch.no_grad():
            module.weight.add_(product if isinstance(module, torch.nn.Linear) else product.T)
    assert start == len(theta)
    return model


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gpt_neox", "opt"])
def test_folded_copies_are_models_with_merged_weights(kind):
    model, vector, plain = adapted(kind)
    ids, mask = prompts(3)
    theta_Pd = vector.theta + 0.1 * torch.randn(4, vector.num_parameters, generator=gen(3), dtype=torch.float64)
    with torch.no_grad():
        with vector.use(theta_Pd):
            folded = model(ids.repeat(4, 1), attention_mask=mask.repeat(4, 1)).logits.view(4, *ids.shape, -1)
        loop = torch.stack([merged(plain, vector, theta)(ids, attention_mask=mask).logits for theta in theta_Pd])
        alone = model(ids, attention_mask=mask).logits
    assert (folded[0] - folded[1]).abs().max() > 1e-2
    # padded places of sdpa are not defined
    places = mask.bool()
    torch.testing.assert_close(folded[:, places], loop[:, places])
    expected = merged(plain, vector, vector.theta)(ids, attention_mask=mask).logits
    torch.testing.assert_close(alone[places], expected[places])


def test_default_targets_are_all_linears_but_the_head():
    model, vector, plain = adapted()
    expected = {n for n, m in plain.named_modules() if isinstance(m, torch.nn.Linear) and n != "lm_head"}
    assert {site.name for site in vector.sites} == expected
    remove_adapters(model)
    assert model.state_dict().keys() == plain.state_dict().keys()


def test_targets_and_layers():
    model = tiny_lm()
    vector = LoRAAdapters(2, target_modules=["q_proj", "mlp.up_proj"], layers="last:1").insert(model, seed=0)
    assert {site.name for site in vector.sites} == {"model.layers.2.self_attn.q_proj", "model.layers.2.mlp.up_proj"}
    assert vector.num_parameters == 2 * (32 + 32) + 2 * (32 + 48)
    with pytest.raises(ValueError, match="without adapters"):
        LoRAAdapters(2).insert(model, seed=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target_modules": ["q_prj"]}, "got 'q_prj'; did you mean `q_proj`"),
        ({"target_modules": ["lm_head"]}, "other than its head, but got 'lm_head'"),
        ({"target_modules": ["norm"]}, "got 'norm'"),
        ({"layers": "last:4"}, "at most the 3 blocks"),
        ({"rank": 0}, "`rank`"),
        ({"alpha": 0}, "`alpha`"),
        ({"target_modules": []}, "`target_modules`"),
        ({"layers": "top:1"}, "`layers`"),
    ],
)
def test_what_does_not_fit_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        LoRAAdapters(**options).insert(tiny_lm(), seed=0)


def test_the_start_is_that_of_peft():
    peft = pytest.importorskip("peft")
    model = tiny_lm()
    vector = inject_lora(model, rank=8, generator=gen(5))
    theirs = peft.get_peft_model(tiny_lm(), peft.LoraConfig(r=8, target_modules="all-linear")).state_dict()
    assert len(vector.factors()) == 2 * len(vector.sites) == 2 * len(find_blocks(model)[1]) * 7
    for name, factor in vector.factors().items():
        reference = theirs["base_model.model." + name.replace(".weight", ".default.weight")]
        assert factor.shape == reference.shape
        if "lora_A" in name:
            bound = reference.shape[1] ** -0.5
            assert 0.9 * bound < factor.abs().max() <= bound
            assert 0.9 * bound < reference.abs().max() <= bound
            assert factor.std().item() == pytest.approx(bound / 3**0.5, rel=0.15)
        else:
            assert not factor.any()
            assert not reference.any()
    again = inject_lora(tiny_lm(), rank=8, generator=gen(5))
    assert torch.equal(vector.theta, again.theta)
    assert not torch.equal(vector.theta, inject_lora(tiny_lm(), rank=8, generator=gen(6)).theta)
    ids, _ = prompts(2)
    assert torch.equal(model(ids).logits, tiny_lm()(ids).logits)


def test_factors_stay_fp32_beside_16_bit_weights():
    model, vector, _ = adapted(dtype=torch.float32)
    module = model.model.layers[0].mlp.up_proj
    model.vector = vector
    model.bfloat16()
    assert vector.theta.dtype == torch.float32
    x = torch.randn(2, 5, 32, generator=gen(0)).bfloat16()
    factors = vector.factors()
    A, B = (factors[f"model.layers.0.mlp.up_proj.lora_{which}.weight"] for which in "AB")
    expected = (module.base(x).float() + 2.0 * x.float() @ A.T @ B.T).bfloat16()
    torch.testing.assert_close(module(x), expected)
    assert module(x).dtype == torch.bfloat16


def test_rows_that_cannot_be_shared_out_are_refused():
    model, vector, _ = adapted()
    with pytest.raises(ValueError, match="multiple of the 2"), vector.use(vector.theta.repeat(2, 1)):
        model(torch.ones(3, 4, dtype=torch.long))
