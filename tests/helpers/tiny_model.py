"""A tiny LLaMA with its tokenizer, built in process."""

from pathlib import Path

import torch
from helpers.tokenizer import byte_tokenizer
from transformers import LlamaConfig, LlamaForCausalLM


def save_tiny_llama(
    folder: Path, *, words: tuple[str, ...] = (" good", " bad"), seed: int = 0, num_blocks: int = 2
) -> Path:
    """Write a random LLaMA of width 32 as a Hugging Face directory."""
    tokenizer = byte_tokenizer(words)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=num_blocks,
        num_attention_heads=2,
        num_key_value_heads=1,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
