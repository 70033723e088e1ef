"""Fused experts of transformers: find them and their routers, and run them expert by expert.

transformers stores the weights of all experts of a layer in one parameter for each projection, of shape
(experts, out, in), or (experts, in, out) in models such as gpt-oss. All classes that its decorator
`use_experts_implementation` has prepared compute the same function, whatever kernels run it; so one forward here, with
a layer for every expert, stands for all of them.
"""

import re
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from wandazeta.models.blocks import override_forward
from wandazeta.models.peft_layers import is_adapted
from wandazeta.models.zero3 import full_shape

__all__ = ["ExpertLayer", "expert_layers", "find_routers", "fused_name", "fused_weights", "split_experts"]

# attributes that the decorator sets
_DECORATED = ("num_experts", "has_gate", "has_bias", "is_transposed", "_apply_gate")
_ROUTER_CLASS = re.compile(r"Router$")
_ROUTER_CLASS_BESIDE_EXPERTS = re.compile(r"(Router|Gate)$")


class ExpertLayer(nn.Module):
    """One projection of one expert: a linear layer whose weight shares its memory with a slice of a fused parameter.

    Args:
        weight: The slice, of shape (out, in), or (in, out) if `is_transposed`.
        bias: Shape (out,), or None.
        is_transposed: Whether the inputs are the first dimension of the weight.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, is_transposed: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.bias = bias
        self.is_transposed = is_transposed

    def forward(self, x: Tensor, tokens: Tensor, num_tokens: int) -> Tensor:
        """Apply the layer; hooks that collect statistics see which tokens its input comes from.

        Args:
            x: Shape (rows, in).
            tokens: Position of every row among all tokens of the batch.
            num_tokens: Number of all tokens of the batch.
        """
        return F.linear(x, self.weight.t() if self.is_transposed else self.weight, self.bias)


def fused_weights(module: nn.Module) -> dict[str, nn.Parameter]:
    """Return the fused weights of a module of experts by parameter name; empty for any other module.

    Args:
        module: A module, such as the `experts` of a transformers model.
    """
    if not all(hasattr(module, name) for name in _DECORATED) or getattr(module, "_is_expert_parallel", False):
        return {}
    names = ("gate_up_proj" if module.has_gate else "up_proj", "down_proj")
    weights = {name: weight for name in names if (weight := module._parameters.get(name)) is not None}
    is_fused = len(weights) == len(names) and all(len(full_shape(weight)) == 3 for weight in weights.values())
    return weights if is_fused else {}


def find_routers(block: nn.Module) -> set[nn.Module]:
    """Find the modules that choose among experts or weigh them, with everything inside them.

    These are modules whose class is named so and, beside fused experts, Linears with one output for each expert, or
    with a single one (the gate of a shared expert).

    Args:
        block: The block.
    """
    found: set[nn.Module] = set()
    for parent in block.modules():
        children = {child: _without_adapters(child) for child in parent.children()}
        num_experts = {_num_experts(inner) for inner in children.values() if fused_weights(inner)}
        class_name = _ROUTER_CLASS_BESIDE_EXPERTS if num_experts else _ROUTER_CLASS
        sizes = num_experts | {1} if num_experts else num_experts
        for child, inner in children.items():
            chooses = isinstance(inner, nn.Linear) and inner.out_features in sizes
            if chooses or class_name.search(type(inner).__name__):
                found |= set(child.modules())
    return found


def _without_adapters(module: nn.Module) -> nn.Module:
    while is_adapted(module):
        module = module.get_submodule("base_layer")
    return module


def expert_layers(experts: nn.Module, weight_name: str) -> list[ExpertLayer]:
    """Return the layers of one fused weight, in the order of the experts, inside `split_experts`.

    Args:
        experts: A module of experts.
        weight_name: Name of its parameter, such as `gate_up_proj`.
    """
    found = [experts._modules[f"{weight_name}[{index}]"] for index in range(_num_experts(experts))]
    return [layer for layer in found if isinstance(layer, ExpertLayer)]


def fused_name(layer_name: str) -> str:
    """Return the name of the parameter that holds the weight of a layer.

    Args:
        layer_name: Name of a weight matrix, such as `mlp.experts.down_proj[3]` or `mlp.up_proj.weight`.
    """
    return layer_name.partition("[")[0]


@contextmanager
def split_experts(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Temporarily run fused experts one by one, each through layers of its own.

    The layers are modules named `gate_up_proj[0]` and so on inside the experts. They share their memory with the fused
    weights, which must not be moved meanwhile.

    Args:
        modules: Modules of experts; any others are left alone.
    """
    forwards = {}
    with ExitStack() as undo:
        for experts in set(modules):
            for name, weight in fused_weights(experts).items():
                bias = getattr(experts, f"{name}_bias") if experts.has_bias else None
                for index, rows in enumerate(weight.detach()):
                    own_bias = None if bias is None else bias.detach()[index]
                    layer = ExpertLayer(rows, own_bias, bool(experts.is_transposed))
                    experts._modules[f"{name}[{index}]"] = layer
                    undo.callback(experts._modules.pop, f"{name}[{index}]")
                forwards[experts] = partial(_forward, experts)
        undo.enter_context(override_forward(forwards))
        yield


def _num_experts(experts: nn.Module) -> int:
    return int(experts.num_experts)  # type: ignore[arg-type]


def _forward(experts: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """Run every expert on the tokens that are routed to it; the arguments are those of transformers' kernels.

    Args:
        experts: The module.
        hidden_states: Shape (tokens, width).
        top_k_index: Experts of each token, shape (tokens, k); the number of experts stands for none.
        top_k_weights: Their weights, of the same shape.
    """
    num_tokens, num_chosen = top_k_index.shape
    chosen = top_k_index.reshape(-1)
    # stable, so that the tokens of an expert stay in order
    order = chosen.argsort(stable=True)
    counts = chosen.bincount(minlength=experts.num_experts)[: experts.num_experts].tolist()
    places = order[: sum(counts)]
    names = tuple(fused_weights(experts))
    up_layers, down_layers = (expert_layers(experts, name) for name in names)
    outputs = []
    for up, down, own in zip(up_layers, down_layers, (places // num_chosen).split(counts), strict=True):
        if len(own):
            states = up(hidden_states[own], own, num_tokens)
            states = experts._apply_gate(states) if experts.has_gate else experts.act_fn(states)
            outputs.append(down(states, own, num_tokens))
    output = torch.cat(outputs)
    if getattr(experts, "has_post_expert_norm", False):
        output = experts.post_expert_norm(output)
    output = output * top_k_weights.reshape(-1)[places, None]
    # a sum over the choices of each token, as an addition by index is not deterministic on a GPU
    spread = output.new_zeros(len(chosen), output.shape[1]).index_copy(0, places, output)
    return spread.view(num_tokens, num_chosen, -1).sum(1).to(hidden_states.dtype)
