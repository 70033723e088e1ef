"""A tiny LightningModule with blocks, its data, and a callback that prunes it in a moment."""

import torch
from helpers.prune_options import OF_METHODS, make_options
from lightning.pytorch import LightningModule, Trainer
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from wandazeta.callbacks import WandaPPPruneCallback


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x):
        return x + self.down(F.gelu(self.up(self.norm(x))))


class Tiny(LightningModule):
    def __init__(self, seed=0, width=8, num_blocks=3, learning_rate=0.0):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.embedding = nn.Embedding(16, width)
            self.layers = nn.ModuleList(Block(width) for _ in range(num_blocks))
            self.dropout = nn.Dropout(0.1)
            self.head = nn.Linear(width, 16)
        self.learning_rate = learning_rate

    def forward(self, tokens):
        x = self.embedding(tokens)
        for layer in self.layers:
            x = layer(x)
        return self.head(self.dropout(x))

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self(batch[0]).flatten(0, 1), batch[0].flatten())

    def validation_step(self, batch, batch_idx):
        self.log("loss", self.training_step(batch, batch_idx))

    test_step = validation_step

    def predict_step(self, batch, batch_idx):
        return self(batch[0])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=self.learning_rate)


def loader(num_samples=16, seed=0, shuffle=False):
    tokens = torch.randint(16, (num_samples, 6), generator=torch.Generator().manual_seed(seed))
    return DataLoader(TensorDataset(tokens), batch_size=4, shuffle=shuffle)


def trainer(*callbacks, **kwargs):
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "max_epochs": 1,
        "accelerator": "cpu",
        "devices": 1,
    }
    return Trainer(callbacks=list(callbacks), **{**quiet, **kwargs})


def callback(directory, **kwargs):
    small = {"num_calibration_samples": 8, "samples_per_round": 4, "rounds": 1, "output_dir": str(directory)}
    arguments = {**small, **kwargs}
    of_method = {name: arguments.pop(name) for name in OF_METHODS & arguments.keys()}
    method = make_options(arguments.pop("method", "wanda++"), **of_method).method
    return WandaPPPruneCallback(method=method, **arguments)


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


def fit(callback, module=None, data=None, ckpt_path=None, **kwargs):
    module = module or Tiny()
    trainer(callback, **kwargs).fit(module, data if data is not None else loader(), ckpt_path=ckpt_path)
    return module
