import peft
import pytest
import torch
from helpers.architectures import WITH_EXPERTS, build, token_batches
from torch import nn
from transformers import MixtralConfig
from transformers.integrations.moe import batched_mm_experts_forward, use_experts_implementation

from wandazeta.models.experts import ExpertLayer, expert_layers, find_routers, fused_weights, split_experts


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm"])
@pytest.mark.parametrize("name", WITH_EXPERTS)
@torch.no_grad()
def test_a_model_computes_the_same_whatever_ran_its_experts(name, implementation):
    model, _ = build(name)
    model.set_experts_implementation(implementation)
    (batch,) = token_batches(1, rows=3)
    plain = model(**batch).logits
    before = [list(module._modules) for module in model.modules()]
    with split_experts(model.modules()):
        torch.testing.assert_close(model(**batch).logits, plain, rtol=1e-4, atol=1e-5)
    assert [list(module._modules) for module in model.modules()] == before
    assert torch.equal(model(**batch).logits, plain)


def make_experts(has_gate, is_transposed, has_bias, has_post_expert_norm):
    """Experts of three with every option of transformers' decorator."""

    class Experts(nn.Module):
        def __init__(self, config):
            super().__init__()
            self.num_experts, width, inner = 3, 8, 12
            first, name = (2 * inner, "gate_up_proj") if has_gate else (inner, "up_proj")
            for key, shape in ((name, (first, width)), ("down_proj", (width, inner))):
                stored = shape[::-1] if is_transposed else shape
                setattr(self, key, nn.Parameter(torch.randn(self.num_experts, *stored)))
                if has_bias:
                    setattr(self, f"{key}_bias", nn.Parameter(torch.randn(self.num_experts, shape[0])))
            self.act_fn = nn.SiLU()
            if has_post_expert_norm:
                self.post_expert_norm = nn.LayerNorm(width)

    options = {
        "has_gate": has_gate,
        "is_transposed": is_transposed,
        "has_bias": has_bias,
        "has_post_expert_norm": has_post_expert_norm,
    }
    Experts.forward = batched_mm_experts_forward
    return use_experts_implementation(Experts, **options)(MixtralConfig())


@pytest.mark.parametrize("option", ["has_gate", "is_transposed", "has_bias", "has_post_expert_norm", "all"])
def test_outputs_and_gradients_equal_those_of_transformers_for_every_kind_of_experts(option):
    options = ("has_gate", "is_transposed", "has_bias", "has_post_expert_norm")
    experts = make_experts(**{name: option in (name, "all") for name in options}).double()
    hidden = torch.randn(10, 8, dtype=torch.float64)
    chosen = torch.stack([torch.randperm(3)[:2] for _ in range(10)])
    weights = torch.rand(10, 2, dtype=torch.float64)
    wanted = batched_mm_experts_forward(experts, hidden, chosen, weights)
    gradients = torch.autograd.grad(wanted.square().sum(), fused_weights(experts).values())
    with split_experts([experts]):
        layers = {name: expert_layers(experts, name) for name in fused_weights(experts)}
        for layer in [*layers["down_proj"], *layers[next(iter(layers))]]:
            layer.weight.requires_grad_(True)
        found = experts(hidden, chosen, weights)
        torch.testing.assert_close(found, wanted)
        found.square().sum().backward()
        for own, gradient in zip(layers.values(), gradients, strict=True):
            torch.testing.assert_close(torch.stack([layer.weight.grad for layer in own]), gradient)


@torch.no_grad()
def test_the_number_of_experts_stands_for_none():
    experts = make_experts(True, False, False, False)
    hidden, weights = torch.randn(4, 8), torch.ones(4, 1)
    with split_experts([experts]):
        some = experts(hidden, torch.tensor([[0], [3], [2], [3]]), weights)
    assert torch.equal(some[[1, 3]], torch.zeros(2, 8))
    torch.testing.assert_close(
        some[[0, 2]], batched_mm_experts_forward(experts, hidden, torch.tensor([[0], [0], [2], [2]]), weights)[[0, 2]]
    )


@torch.no_grad()
def test_layers_share_their_memory_with_the_fused_weights_and_know_their_tokens():
    experts, seen = make_experts(True, True, False, False), []
    with split_experts([experts]):
        layers = expert_layers(experts, "gate_up_proj")
        assert [type(layer) for layer in layers] == [ExpertLayer] * 3
        assert dict(experts.named_modules())["gate_up_proj[1]"] is layers[1]
        layers[1].weight.zero_()
        layers[1].register_forward_pre_hook(lambda layer, args: seen.append(args[1:]))
        experts(torch.randn(4, 8), torch.tensor([[0], [1], [2], [1]]), torch.ones(4, 1))
    assert not experts.gate_up_proj[1].any()
    assert experts.gate_up_proj[::2].all()
    ((tokens, num_tokens),) = seen
    assert (tokens.tolist(), num_tokens) == ([1, 3], 4)


def test_only_experts_of_transformers_are_known():
    model, _ = build("mixtral")
    (experts,) = {type(module) for module in model.modules() if fused_weights(module)}
    assert experts.__name__ == "MixtralExperts"
    assert list(fused_weights(model.model.layers[0].mlp.experts)) == ["gate_up_proj", "down_proj"]
    other = nn.Module()
    other.gate_up_proj = other.down_proj = nn.Parameter(torch.randn(2, 4, 4))
    assert not fused_weights(other)


@pytest.mark.parametrize(
    ("name", "routers"),
    [
        ("mixtral", {"mlp.gate"}),
        ("qwen2_moe", {"mlp.gate", "mlp.shared_expert_gate"}),
        ("gpt_oss", {"mlp.router"}),
        ("deepseek_v3", {"mlp.gate"}),
        ("jamba", {"feed_forward.router"}),
        ("llama", set()),
    ],
)
def test_routers_are_found_beside_experts(name, routers):
    model, blocks = build(name)
    found = [find_routers(block) for block in model.get_submodule(blocks)]
    names = [
        {n for n, m in block.named_modules() if m in f}
        for block, f in zip(model.get_submodule(blocks), found, strict=True)
    ]
    assert names[-1] == routers


def test_routers_are_known_by_their_class_beside_other_experts():
    class Router(nn.Linear):
        """As that of Llama 4."""

    block = nn.Module()
    block.router, block.gate, block.experts = Router(8, 2), nn.Linear(8, 2), nn.ModuleList([nn.Linear(8, 8)] * 2)
    assert find_routers(block) == {block.router}


def test_routers_may_be_linears_and_may_have_adapters():
    model, _ = build("qwen2_moe")
    for block in model.model.layers:
        block.mlp.gate = nn.Linear(16, 4)
    assert {block.mlp.gate, block.mlp.shared_expert_gate} == find_routers(block)
    config = peft.LoraConfig(r=2, target_modules=["gate", "shared_expert_gate", "q_proj"])
    adapted = peft.get_peft_model(model, config).base_model.model.model.layers[0]
    bases = {name for name, module in adapted.named_modules() if module in find_routers(adapted) and "lora" not in name}
    assert {name for name in bases if name.endswith("base_layer")} == {
        "mlp.gate.base_layer",
        "mlp.shared_expert_gate.base_layer",
    }
