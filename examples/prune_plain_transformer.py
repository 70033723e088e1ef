"""Prune a transformer in plain torch, in a LightningModule written without wandazeta.

    python examples/prune_plain_transformer.py

`main` at the end adds the pruning; everything above it is an ordinary Lightning project.
"""

import tempfile
from pathlib import Path

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset


class Block(nn.Module):
    """A decoder block made of Linears."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Return hidden states of the same shape `(batch, tokens, width)`."""
        q, k, v = (t.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for t in self.qkv(self.norm1(x)).chunk(3, -1))
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(attended.transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class CharacterModel(pl.LightningModule):
    """A character-level language model."""

    def __init__(self, vocabulary: int = 128, width: int = 64, num_blocks: int = 4, max_length: int = 64) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.positions = nn.Parameter(0.02 * torch.randn(max_length, width))
        self.layers = nn.ModuleList(Block(width, num_heads=4) for _ in range(num_blocks))
        self.head = nn.Linear(width, vocabulary)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        """Return the cross-entropy of the next character."""
        (tokens,) = batch
        x = self.embedding(tokens) + self.positions[: tokens.shape[1]]
        for layer in self.layers:
            x = layer(x)
        loss = F.cross_entropy(self.head(x)[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
        self.log("loss", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Train the head only, so that the pruned weights do not change."""
        return torch.optim.SGD(self.head.parameters(), lr=0.1)


def text_loader(num_samples: int = 64, length: int = 32) -> DataLoader:
    """Return samples of characters from this file."""
    text = torch.tensor(list(Path(__file__).read_bytes()))
    starts = torch.arange(num_samples) * 31 % (len(text) - length)
    tokens = torch.stack([text[start : start + length] for start in starts.tolist()]) % 128
    return DataLoader(TensorDataset(tokens), batch_size=8, shuffle=True)


def main(output_dir: str | None = None) -> pl.LightningModule:
    """Prune the model to 2:4, then train the head for an epoch."""
    pl.seed_everything(0)
    module, loader = CharacterModel(), text_loader()

    from wandazeta.callbacks import WandaPPPruneCallback

    output_dir = output_dir or tempfile.mkdtemp()
    callback = WandaPPPruneCallback(sparsity_pattern="2:4", num_calibration_samples=32, output_dir=output_dir)
    trainer = pl.Trainer(
        callbacks=[callback], max_epochs=1, accelerator="cpu", logger=False, enable_checkpointing=False
    )
    trainer.fit(module, loader)

    zeros = sum(int((weight == 0).sum()) for weight in module.layers[0].parameters() if weight.ndim == 2)
    total = sum(weight.numel() for weight in module.layers[0].parameters() if weight.ndim == 2)
    print(f"sparsity of the first block: {zeros / total:.0%}")
    return module


if __name__ == "__main__":
    main()
