from types import SimpleNamespace

import pytest
import torch
from lightning import LightningModule, Trainer
from torch.utils.data import DataLoader

from wandazeta.datamodules.step_sampler import BatchDataset, StepSampler


def trainer_at(step, sharding=None, world_size=1, rank=0, overfit_batches=0):
    module = SimpleNamespace() if sharding is None else SimpleNamespace(data_sharding=sharding)
    return SimpleNamespace(
        global_step=step,
        accumulate_grad_batches=1,
        lightning_module=module,
        world_size=world_size,
        global_rank=rank,
        overfit_batches=overfit_batches,
    )


def sampler(step=0, rows=23, seed=3, **kwargs):
    return StepSampler(range(rows), 4, seed, trainer_at(step, **kwargs))


def test_an_epoch_is_a_permutation_without_the_rest():
    batches = list(sampler())
    rows = [row for batch in batches for row in batch]
    assert len(sampler()) == len(batches) == 5
    assert [len(batch) for batch in batches] == [4] * 5
    assert len(set(rows)) == 20
    assert set(rows) <= set(range(23))
    assert rows != sorted(rows)


def test_resuming_gives_the_rest_of_the_epoch():
    whole = list(sampler()) + list(sampler(5))
    for step in range(10):
        assert list(sampler(step)) == whole[step : (step // 5 + 1) * 5]
    assert whole[:5] != whole[5:]


def test_seeds_and_epochs_differ():
    assert list(sampler(seed=3)) != list(sampler(seed=4))
    assert list(sampler(0, seed=4)) != list(sampler(5, seed=3))


def test_the_global_generator_is_neither_read_nor_moved():
    torch.manual_seed(0)
    first = list(sampler())
    assert torch.initial_seed() == 0
    before = torch.get_rng_state()
    torch.manual_seed(1)
    assert list(sampler()) == first
    torch.set_rng_state(before)


def test_data_ranks_share_the_global_batch_and_query_ranks_repeat_it():
    shares = [list(sampler(sharding=(2, rank))) for rank in range(2)]
    assert len(shares[0]) == len(shares[1]) == 2
    rows = [row for batches in shares for batch in batches for row in batch]
    assert len(set(rows)) == 16
    together = [sorted(a + b) for a, b in zip(*shares, strict=True)]
    single = StepSampler(range(23), 8, 3, trainer_at(0))
    assert together == [sorted(batch) for batch in single]
    assert list(sampler(sharding=(1, 0), world_size=2, rank=1)) == list(sampler())


def test_modules_that_say_nothing_get_their_processes_share():
    assert list(sampler(world_size=2, rank=1)) == list(sampler(sharding=(2, 1)))


def test_too_few_rows():
    with pytest.raises(ValueError, match=r"at most the number of training examples \(3\)"):
        StepSampler(range(3), 4)
    with pytest.raises(ValueError, match=r"Expected 8 x `batch_size`"):
        len(sampler(sharding=(8, 0)))


class Recorder(LightningModule):
    """Writes down the batches it sees; manual optimisation, one optimizer step a batch."""

    def __init__(self, fail_at=None):
        super().__init__()
        self.automatic_optimization = False
        self.anchor = torch.nn.Parameter(torch.zeros(()))
        self.seen = []
        self.fail_at = fail_at

    def training_step(self, batch, batch_idx):
        if self.global_step == self.fail_at:
            raise KeyboardInterrupt
        self.seen.append((self.global_step, batch["row"].tolist()))
        self.manual_backward(self.anchor * 0.0)
        self.optimizers().step()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(module, folder, ckpt_path=None, steps=12):
    from lightning.pytorch.callbacks import ModelCheckpoint

    trainer = Trainer(
        max_steps=steps,
        default_root_dir=folder,
        logger=False,
        accelerator="cpu",
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[ModelCheckpoint(folder, save_last=True, every_n_train_steps=1, save_top_k=0)],
    )
    rows = list(range(23))
    dataset = BatchDataset(rows, lambda chosen: {"row": torch.tensor(chosen)})
    loader = DataLoader(dataset, sampler=StepSampler(rows, 4, 3, trainer), batch_size=None)
    trainer.fit(module, loader, ckpt_path=ckpt_path)
    return module.seen


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("stop", [3, 5, 7])
def test_a_resumed_fit_sees_the_batches_of_an_undisturbed_one(tmp_path, stop):
    whole = fit(Recorder(), tmp_path / "whole")
    assert [step for step, _ in whole] == list(range(12))
    assert [rows for _, rows in whole[:5]] == list(sampler())
    first = Recorder(fail_at=stop)
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        fit(first, tmp_path / "cut")
    second = fit(Recorder(), tmp_path / "cut", ckpt_path=tmp_path / "cut" / "last.ckpt")
    assert first.seen + second == whole


@pytest.mark.parametrize(("limit", "number"), [(2, 2), (99, 5), (0.4, 2), (0.01, 1)])
def test_overfitting_repeats_the_first_batches(limit, number):
    whole = list(sampler())
    assert len(sampler(overfit_batches=limit)) == 5  # Lightning takes the fraction of it
    for step in range(7):
        assert list(sampler(step, overfit_batches=limit)) == whole[step % number : number]
