import pytest
from helpers.pruning import Tiny, loader, trainer
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint

from wandazeta.callbacks import RunProgressBar


class Watch(Callback):
    """Notes the bar after every batch: steps that are done, of how many, and seconds left."""

    def __init__(self, bar):
        self.bar, self.seen = bar, []

    def on_train_batch_end(self, *_):
        task = self.bar.train_progress_bar
        self.seen.append((task.completed, task.total, task.description.strip()))


def fit(ckpt_path=None, data=None, callbacks=(), **options):
    bar = RunProgressBar()
    watch = Watch(bar)
    # the bar is drawn before the callback looks at it
    run = trainer(bar, watch, *callbacks, **{"enable_progress_bar": True} | options)
    run.fit(Tiny(), data if data is not None else loader(), ckpt_path=ckpt_path)
    return watch.seen


def test_the_bar_counts_the_steps_of_the_whole_fit():
    # 4 batches in an epoch
    seen = fit(max_epochs=3)
    assert [completed for completed, _, _ in seen] == list(range(1, 13))
    assert {total for _, total, _ in seen} == {12}
    assert [description for _, _, description in seen][::4] == ["Epoch 0", "Epoch 1", "Epoch 2"]


def test_it_ends_where_the_steps_do():
    assert fit(max_epochs=3, max_steps=6)[-1][:2] == (6, 6)
    assert fit(max_epochs=-1, max_steps=6)[-1][:2] == (6, 6)


def test_a_resumed_fit_goes_on_where_it_stopped(tmp_path):
    checkpoint = ModelCheckpoint(tmp_path, save_last=True, every_n_train_steps=1)
    fit(max_steps=6, max_epochs=-1, callbacks=[checkpoint], enable_checkpointing=True)
    seen = fit(max_steps=10, max_epochs=-1, ckpt_path=str(tmp_path / "last.ckpt"))
    assert [completed for completed, _, _ in seen] == [7, 8, 9, 10]
    assert {total for _, total, _ in seen} == {10}


@pytest.mark.parametrize("accumulated", [1, 2])
def test_steps_are_those_of_the_optimizer(accumulated):
    seen = fit(max_epochs=2, accumulate_grad_batches=accumulated)
    assert seen[-1][:2] == (8 // accumulated, 8 // accumulated)


class Stop(Callback):
    def on_train_batch_end(self, trainer, *_):
        trainer.should_stop = trainer.global_step == 6


def test_without_a_known_end_the_bar_is_that_of_the_epoch():
    seen = fit(max_epochs=-1, callbacks=[Stop()], min_steps=6)
    assert [completed for completed, _, _ in seen] == [1, 2, 3, 4, 1, 2]
    assert {total for _, total, _ in seen} == {4}


def test_it_can_be_turned_off():
    bar = RunProgressBar(refresh_rate=0)
    trainer(bar, enable_progress_bar=True).fit(Tiny(), loader())
    assert bar.progress is None
