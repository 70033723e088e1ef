"""Fit on two processes and write down which batches each of them saw; run as a program."""

import json
import sys
from pathlib import Path

import torch
from lightning import LightningModule, Trainer

from wandazeta.datamodules import TextDataModule
from wandazeta.datamodules.step_sampler import StepSampler

sys.path.insert(0, str(Path(__file__).parents[1]))
from helpers.processes import leave_process_group
from helpers.tokenizer import byte_tokenizer


class Recorder(LightningModule):
    """Remembers its batches; says how it wants the data shared out, or nothing."""

    def __init__(self, sharing: str) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.anchor = torch.nn.Parameter(torch.zeros(()))
        self.sharing = sharing
        self.seen: list[list[list[int]]] = []

    @property
    def data_sharding(self) -> tuple[int, int]:
        if self.sharing == "silent":
            raise AttributeError
        return (1, 0) if self.sharing == "queries" else (self.trainer.world_size, self.global_rank)

    def training_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> None:
        self.seen.append(batch["input_ids"].tolist())
        self.manual_backward(self.anchor * 0.0)
        self.optimizers().step()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def main(sharing: str, source: str, output: str) -> None:
    """Fit one epoch and write `output`.RANK.json."""
    module = Recorder(sharing)
    data = TextDataModule(source, byte_tokenizer(), sequence_length=16, batch_size=3)
    trainer = Trainer(
        accelerator="cpu",
        devices=2,
        strategy="ddp",
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, data)
    assert isinstance(trainer.train_dataloader.sampler, StepSampler), "Lightning put in a sampler of its own"
    Path(f"{output}.{trainer.global_rank}.json").write_text(json.dumps(module.seen))
    leave_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
