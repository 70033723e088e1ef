"""Tiny encoders, built from a configuration in the process, and batches for their heads."""

from pathlib import Path

import torch
from helpers.causal_lms import prompts
from helpers.tokenizer import byte_tokenizer
from transformers import AutoConfig, AutoModel

SIZES = {
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 66,
    "pad_token_id": 2,
}
KINDS = ("bert", "roberta", "mpnet")


def tiny_encoder(kind="bert", seed=0):
    """Build a model whose weights are so large that its outputs depend on all of them."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModel.from_config(AutoConfig.for_model(kind, **SIZES))
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.data.normal_(std=0.25)
            else:
                parameter.data.add_(torch.randn_like(parameter), alpha=0.1)
    return model.eval()


def save_tiny_encoder(directory, kind="bert", seed=0) -> Path:
    """Save a model and a tokenizer for `from_pretrained`."""
    tiny_encoder(kind, seed).save_pretrained(directory)
    byte_tokenizer().save_pretrained(directory)
    return Path(directory)


def labelled_batch(num=6, num_classes=3, seed=0, width=12):
    """A batch like those of `ClassificationDataModule`."""
    ids, mask = prompts(num, width, seed)
    label = torch.arange(num) % num_classes
    ids[:, 0] = 50 + label  # something to learn
    return {
        "input_ids": ids.where(mask.bool(), SIZES["pad_token_id"]),
        "attention_mask": mask,
        "label": label,
        "example_id": torch.arange(num),
    }
