"""Prune a model of transformers in a LightningModule that builds it in `configure_model`.

    python examples/prune_transformers_module.py

The model is a tiny random LLaMA, so that the example runs in seconds; `from_pretrained` works the same way.
"""

import tempfile
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel


class CausalModule(pl.LightningModule):
    """Fine-tune the norms of a causal language model."""

    def __init__(self, num_blocks: int = 3) -> None:
        super().__init__()
        self.config = LlamaConfig(
            vocab_size=256,
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=num_blocks,
            num_attention_heads=4,
            num_key_value_heads=2,
        )
        self.model: PreTrainedModel | None = None

    def configure_model(self) -> None:
        """Build the model once: Lightning may call this hook several times."""
        if self.model is None:
            self.model = AutoModelForCausalLM.from_config(self.config)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """Return the language-model loss."""
        assert self.model is not None
        loss = self.model(**batch, labels=batch["input_ids"]).loss
        self.log("loss", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Train one-dimensional parameters only, so that the pruned weights do not change."""
        return torch.optim.AdamW([p for p in self.parameters() if p.ndim == 1], lr=1e-3)


def token_loader(num_samples: int = 64, length: int = 32) -> DataLoader:
    """Return samples of random tokens with padding."""
    generator = torch.Generator().manual_seed(0)
    samples: list[Any] = []
    for index in range(num_samples):
        mask = torch.ones(length, dtype=torch.long)
        mask[length - index % 5 :] = 0
        tokens = torch.randint(256, (length,), generator=generator)
        samples.append({"input_ids": tokens, "attention_mask": mask})
    return DataLoader(samples, batch_size=8)


def main(output_dir: str | None = None) -> pl.LightningModule:
    """Prune the model to 2:4, then train the norms for an epoch."""
    pl.seed_everything(0)
    module, loader = CausalModule(), token_loader()

    from wandazeta.callbacks import WandaPPPruneCallback

    output_dir = output_dir or tempfile.mkdtemp()
    callback = WandaPPPruneCallback(sparsity_pattern="2:4", num_calibration_samples=32, output_dir=output_dir)
    trainer = pl.Trainer(
        callbacks=[callback], max_epochs=1, accelerator="cpu", logger=False, enable_checkpointing=False
    )
    trainer.fit(module, loader)

    assert callback.report is not None
    print(f"sparsity of all blocks: {callback.report.sparsity:.0%}")
    return module


if __name__ == "__main__":
    main()
