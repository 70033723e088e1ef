"""Models of experts: for comparison with a loop over plain Linears, with an idle expert, and as a LightningModule."""

import copy

import torch
from helpers.architectures import build
from lightning.pytorch import LightningModule
from torch import nn
from torch.utils.data import DataLoader

PROJECTIONS = ("gate_up_proj", "down_proj")


class LoopExperts(nn.Module):
    """A loop over experts, each of two Linears."""

    def __init__(self, fused, inputs_first):
        super().__init__()
        self.apply_gate = fused._apply_gate
        self.tokens = None
        for name in PROJECTIONS:
            weights, biases = getattr(fused, name), getattr(fused, f"{name}_bias", None)
            layers = nn.ModuleList()
            for index, weight in enumerate(weights):
                weight = (weight.t() if inputs_first else weight).detach().clone()
                layer = nn.Linear(*reversed(weight.shape), bias=biases is not None)
                layer.weight.data = weight.contiguous()
                if biases is not None:
                    layer.bias.data = biases[index].detach().clone()
                layers.append(layer)
            setattr(self, name, layers)

    def forward(self, hidden, index, weights):
        output = torch.zeros_like(hidden)
        for number, (up, down) in enumerate(zip(self.gate_up_proj, self.down_proj, strict=True)):
            # which tokens the inputs of an expert come from, for hooks
            self.tokens, place = torch.where(index == number)
            if len(self.tokens):
                found = down(self.apply_gate(up(hidden[self.tokens])))
                output = output.index_add(0, self.tokens, found * weights[self.tokens, place, None])
        return output


def with_loops(model, name):
    """A copy of a model with loops in place of fused experts."""
    model = copy.deepcopy(model)
    for module_name, module in list(model.named_modules()):
        if type(module).__name__.endswith("Experts"):
            owner, _, attribute = module_name.rpartition(".")
            setattr(model.get_submodule(owner), attribute, LoopExperts(module, name == "gpt_oss"))
    return model


def weights_of(model, name):
    """The weights of every expert as (experts, out, in), by name of the fused parameter, fused or in a loop."""
    found = {}
    for module_name, module in model.named_modules():
        for projection in PROJECTIONS if type(module).__name__.endswith("Experts") else ():
            weights = getattr(module, projection)
            if isinstance(module, LoopExperts):
                weights = torch.stack([layer.weight for layer in weights])
            elif name == "gpt_oss":
                weights = weights.mT
            found[f"{module_name}.{projection}"] = weights.detach()
    return found


def build_unreached(expert=3):
    """A gpt-oss whose router never chooses one of the experts."""
    model, blocks = build("gpt_oss")
    for block in model.get_submodule(blocks):
        block.mlp.router.bias.data[expert] = -1e4
    return model, blocks


class Mixture(LightningModule):
    """A module with a tiny model of experts."""

    def __init__(self, name="mixtral", learning_rate=0.01):
        super().__init__()
        self.model, _ = build(name)
        self.learning_rate = learning_rate

    def forward(self, tokens):
        return self.model(input_ids=tokens, labels=tokens, use_cache=False)

    def training_step(self, tokens, batch_idx):
        return self(tokens).loss

    def validation_step(self, tokens, batch_idx):
        self.log("loss", self(tokens).loss)

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=self.learning_rate, weight_decay=0.1)


def mixture_loader():
    """Tokens for `Mixture`."""
    return DataLoader(torch.randint(3, 32, (16, 10), generator=torch.Generator().manual_seed(0)), batch_size=4)
