"""Pruning models with adapters of peft: base layers are pruned, adapters stay dense, names come out right."""

import peft
import pytest
import torch
from helpers.causal_lms import tiny_lm
from helpers.prune_model import prune, rows_of
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM

from wandazeta.models.pretrained import find_pretrained
from wandazeta.pruning.export.masks import match_masks
from wandazeta.pruning.export.pretrained import export_pretrained
from wandazeta.pruning.held_masks import masks_from_zeros

CONFIGS = {
    "lora": peft.LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False),
    "dora": peft.LoraConfig(r=4, target_modules=["q_proj", "up_proj"], use_dora=True, init_lora_weights=False),
    "adalora": peft.AdaLoraConfig(target_modules=["q_proj"], init_r=4, total_step=10, init_lora_weights=False),
    "loha": peft.LoHaConfig(r=4, target_modules=["q_proj", "down_proj"], init_weights=False),
    "ia3": peft.IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
}


def adapted(kind="lora", model=None):
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return peft.get_peft_model(model or tiny_lm(), CONFIGS[kind]).eval()


def batches():
    ids = torch.randint(3, 300, (8, 1, 10), generator=torch.Generator().manual_seed(0))
    return list(ids)


def prune_adapted(model, **options):
    calibrated = options.get("method") != "magnitude"
    return prune(_Called(model), batches() if calibrated else [], **options)


class _Called(nn.Module):
    """Calls a model with tokens; `prune` passes keywords."""

    def __init__(self, model):
        super().__init__()
        self.inner = model

    def keys(self):
        return ()

    def forward(self, tokens):
        return self.inner(input_ids=tokens)
