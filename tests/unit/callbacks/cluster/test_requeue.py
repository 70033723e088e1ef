"""What a preempted job keeps of a step of several batches."""

import os
import shutil
import signal

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader

from wandazeta.callbacks import SLURMRequeue
from wandazeta.callbacks.cluster import requeue

ACCUMULATED, BATCHES = 4, 10  # the last step of an epoch has two


class Line(LightningModule):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(3, 1)
        self.batches = torch.randn(BATCHES, 2, 3, generator=torch.Generator().manual_seed(1))

    def training_step(self, _, batch_idx):
        batch = self.batches[batch_idx]  # also when resumed within an epoch, where a plain loader begins anew
        return (self.layer(batch) - batch.sum(1, keepdim=True)).square().mean()

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=0.1)


class PreemptedAt(Callback):
    """The signal, while the batch with this number is worked on."""

    def __init__(self, batch):
        self.batch = batch

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if batch_idx == self.batch and trainer.current_epoch == 0:
            os.kill(os.getpid(), signal.SIGUSR1)


def fit(folder, *callbacks, resume=None):
    seed_everything(0, verbose=False)
    module = Line()
    trainer = Trainer(
        accelerator="cpu",
        devices=1,
        max_epochs=2,
        accumulate_grad_batches=ACCUMULATED,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[ModelCheckpoint(folder, save_last=True, every_n_epochs=99), *callbacks],
    )
    trainer.fit(module, DataLoader(range(BATCHES)), ckpt_path=resume)
    return module, trainer


@pytest.mark.parametrize(("batch", "steps"), [(0, 1), (1, 1), (3, 1), (5, 2), (8, 3), (9, 3)])
def test_a_preempted_step_of_several_batches_is_finished_before_it_is_saved(tmp_path, monkeypatch, batch, steps):
    monkeypatch.setattr(requeue, "requeue_signal", lambda _: signal.SIGUSR1)
    undisturbed, whole = fit(tmp_path / "undisturbed")
    assert whole.global_step == 6

    kept = tmp_path / "kept.ckpt"
    # SLURM would end the job now; here it goes on, and writes over its file in the end
    monkeypatch.setattr(requeue, "requeue_slurm_job", lambda: shutil.copy(tmp_path / "preempted" / "last.ckpt", kept))
    fit(tmp_path / "preempted", SLURMRequeue(), PreemptedAt(batch))
    assert torch.load(kept, weights_only=True)["global_step"] == steps
    resumed, trainer = fit(tmp_path / "resumed", resume=kept)
    assert trainer.global_step == 6
    for name, value in resumed.state_dict().items():
        assert torch.equal(value, undisturbed.state_dict()[name]), name
