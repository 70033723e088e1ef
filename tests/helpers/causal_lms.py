"""Tiny causal language models, built from a configuration in the process, and batches for them."""

from pathlib import Path

import torch
from helpers.tokenizer import byte_tokenizer
from torch.utils.data import DataLoader
from transformers import AutoConfig, AutoModelForCausalLM

from wandazeta.datamodules.step_sampler import BatchDataset, StepSampler

SIZES = {"vocab_size": 300, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4}
CONFIGS = {
    "llama": {"intermediate_size": 48, "num_key_value_heads": 2},
    "gemma2": {  # soft-capped logits, two kinds of attention, scaled embeddings, norms after attention and MLP
        "intermediate_size": 48,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "final_logit_softcapping": 2.0,
        "sliding_window": 4,
    },
    "gpt_neox": {"intermediate_size": 48},  # attention and MLP in parallel
    "phi": {"intermediate_size": 48},  # in parallel on one norm, head with a bias
    "gpt2": {"n_positions": 64},  # Conv1D, learned positions
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32, "max_position_embeddings": 64},
    "granite": {"intermediate_size": 48, "num_key_value_heads": 2, "logits_scaling": 3.0},
}


def tiny_lm(kind="llama", seed=0, **changes):
    """Build a model whose weights are so large that its outputs depend on all of them."""
    config = AutoConfig.for_model(kind, **(SIZES | CONFIGS[kind] | changes))
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config)
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.data.normal_(std=0.25)
            else:
                parameter.data.add_(torch.randn_like(parameter), alpha=0.1)
    return model.eval()


def save_tiny_lm(directory, kind="llama", pad=True, seed=0, **changes) -> Path:
    """Save a model and a tokenizer for `from_pretrained`."""
    tiny_lm(kind, seed, **changes).save_pretrained(directory)
    byte_tokenizer(pad=pad).save_pretrained(directory)
    return Path(directory)


def prompts(num, width=12, seed=0, vocabulary=300):
    """Right-padded prompts of different lengths: tokens and mask."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(3, width + 1, (num,), generator=generator)
    mask = (torch.arange(width) < lengths[:, None]).long()
    return torch.randint(3, vocabulary, (num, width), generator=generator) * mask, mask


def classification_batch(num=4, options=((7,), (9,)), seed=0, width=12):
    """A batch like those of `PromptedClassificationDataModule`."""
    ids, mask = prompts(num, width, seed)
    longest = max(map(len, options))
    option_ids = torch.tensor([[*option, *[0] * (longest - len(option))] for option in options])
    option_mask = torch.tensor([[True] * len(option) + [False] * (longest - len(option)) for option in options])
    label = torch.arange(num) % len(options)
    ids[:, 0] = torch.where(label == 0, 50, 60)  # something to learn
    return {
        "input_ids": ids,
        "attention_mask": mask,
        "label": label,
        "example_id": torch.arange(num),
        "option_ids": option_ids,
        "option_mask": option_mask,
    }


def text_batch(num=3, width=12, seed=0):
    """A batch like those of `TextDataModule`."""
    ids, mask = prompts(num, width, seed)
    return {"input_ids": ids, "attention_mask": mask}


def rows_of(batch):
    """Split a batch into examples."""
    shared = {"option_ids", "option_mask"}
    num = len(batch["input_ids"])
    return [{k: v if k in shared else v[i] for k, v in batch.items()} for i in range(num)]


def collate(rows):
    """Join examples to a batch."""
    shared = {"option_ids", "option_mask"}
    return {k: rows[0][k] if k in shared else torch.stack([row[k] for row in rows]) for k in rows[0]}


def step_loader(batch, batch_size, trainer, seed=0):
    """Loader whose batches depend on the step of the trainer alone."""
    rows = rows_of(batch)
    sampler = StepSampler(rows, batch_size, seed, trainer)
    return DataLoader(BatchDataset(rows, collate), sampler=sampler, batch_size=None)
