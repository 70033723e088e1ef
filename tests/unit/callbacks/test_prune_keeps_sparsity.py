"""The pruning callback keeps the sparsity while what it pruned is trained, and reports it."""

import pytest
import torch
from helpers.masked import is_positive_zero, prunable, reference
from helpers.pruning import Tiny, callback, loader, same, trainer
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import FSDPStrategy

import wandazeta.callbacks.prune
from wandazeta.callbacks import KeepSparsity


def adamw(parameters):
    return torch.optim.AdamW(parameters, lr=0.01, weight_decay=0.1)


def tiny():
    module = Tiny()
    module.dropout.p = 0.0
    module.configure_optimizers = lambda: adamw(module.parameters())
    return module


def fit(*callbacks, module=None, steps=6, ckpt_path=None, **options):
    module = module or tiny()
    run = trainer(*callbacks, max_steps=steps, max_epochs=-1, **options)
    run.fit(module, loader(), ckpt_path=ckpt_path)
    return module


def pruned_places(folder):
    module = Tiny()
    trainer(callback(folder)).validate(module, loader(), verbose=False)
    return {name: weight == 0 for name, weight in prunable(module).items()}


def num_zeros(module):
    return sum(int((weight == 0).sum()) for weight in prunable(module).values())


def test_an_ordinary_fit_ends_as_sparse_as_it_was_pruned_and_says_so(folder, caplog):
    module, plain = fit(callback(folder)), Tiny()
    for name, pruned in pruned_places(folder).items():
        assert is_positive_zero(module.get_parameter(name)[pruned]), name
        assert bool((module.get_parameter(name)[~pruned] != 0).all()), name
    assert caplog.text.count("Sparsity after the fit: 50.0% of 768 weights in the pruned layers.") == 1
    trainer(callback(folder)).validate(plain, loader(), verbose=False)
    plain.dropout.p = 0.0
    reference(plain, adamw, 6)
    assert same(module, plain)


def test_without_it_the_weights_become_dense_with_a_warning(folder, caplog):
    with pytest.warns(UserWarning, match=r"0\.0% of 768 .* but 50\.0% after the pruning.*Set `keep_sparsity` to True"):
        module = fit(callback(folder, keep_sparsity=False))
    assert num_zeros(module) == 0
    assert "Keeping" not in caplog.text


def test_the_masks_are_those_of_the_pruning_and_not_the_zeros(folder):
    fit(callback(folder), steps=1)
    name = "layers.0.up.weight"
    # the first kept value of every row; rows without influence have no gradient
    chosen = (~pruned_places(folder)[name]).int().argmax(1, keepdim=True)

    class ZeroByChance(Callback):
        def on_fit_start(self, trainer, module):
            with torch.no_grad():
                module.get_parameter(name).scatter_(1, chosen, 0.0)

    module = fit(ZeroByChance(), callback(folder))
    assert (module.get_parameter(name).gather(1, chosen) != 0).float().mean() > 0.5


class FreezeBlocks(Callback):
    def __init__(self, thaw_at=None):
        self.thaw_at = thaw_at

    def on_fit_start(self, trainer, module):
        module.layers.requires_grad_(False)

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        if trainer.global_step == self.thaw_at:
            module.layers.requires_grad_(True)


def test_nothing_is_masked_where_nothing_pruned_is_trained(folder, monkeypatch, caplog):
    def refuse(*_):
        raise AssertionError("masks of frozen weights")

    monkeypatch.setattr(wandazeta.callbacks.prune, "HeldMasks", refuse)
    module = fit(callback(folder), FreezeBlocks())
    assert not torch.equal(module.head.weight, Tiny().head.weight)
    assert "Keeping" not in caplog.text
    assert "Sparsity after the fit: 50.0%" in caplog.text


def test_weights_that_are_unfrozen_in_the_middle_are_kept_sparse(folder):
    module, frozen = (fit(callback(folder), FreezeBlocks(thaw)) for thaw in (3, None))
    assert not torch.equal(module.layers[0].up.weight, frozen.layers[0].up.weight)
    assert num_zeros(module) == 384


@pytest.mark.parametrize("order", [1, -1])
def test_beside_the_other_callback_only_one_of_them_works(folder, caplog, order):
    module = fit(*[callback(folder), KeepSparsity()][::order])
    assert caplog.text.count("Keeping 384 of 768 weights") == 1
    assert same(module, fit(callback(folder)))


def test_several_fits_of_one_process(folder):
    pruning, module = callback(folder), tiny()
    for _ in range(2):
        fit(pruning, module=module)
        assert num_zeros(module) == 384


def test_gradients_are_not_masked_after_a_failed_fit(folder):
    class Fail(Callback):
        def on_train_batch_end(self, *_):
            raise RuntimeError("of the test")

    module = tiny()
    with pytest.raises(RuntimeError, match="of the test"):
        fit(callback(folder), Fail(), module=module)
    module.zero_grad()
    module.training_step(next(iter(loader())), 0).backward()
    assert module.layers[0].up.weight.grad[pruned_places(folder)["layers.0.up.weight"]].any()


# -- checkpoints ------------------------------------------------------------------------------------------------------


def saved(tmp_path, *callbacks, weights_only=False):
    saving = ModelCheckpoint(tmp_path, "saved", every_n_train_steps=4, save_weights_only=weights_only)
    fit(*callbacks, saving, steps=4, enable_checkpointing=True)
    return tmp_path / "saved.ckpt"


def test_resuming_is_bit_identical(folder, tmp_path):
    path = saved(tmp_path, callback(folder))
    assert same(fit(callback(folder), steps=8, ckpt_path=path), fit(callback(folder), steps=8))
    run, module = trainer(callback(folder)), tiny()
    run.test(module, loader(), ckpt_path=path, verbose=False)
    assert num_zeros(module) == 384


# Lightning resumes a fit from complete checkpoints only
@pytest.mark.parametrize(
    ("stage", "weights_only"),
    [("fit", False), *((stage, only) for stage in ("validate", "test", "predict") for only in (False, True))],
)
def test_a_dense_checkpoint_is_refused(folder, tmp_path, stage, weights_only):
    fit(callback(folder))
    path = saved(tmp_path, weights_only=weights_only)
    run = trainer(callback(folder), max_epochs=3)
    with pytest.raises(ValueError, match=r"`ckpt_path` to be a checkpoint with the sparsity of the pruning in .*saved"):
        getattr(run, stage)(tiny(), loader(), ckpt_path=path)


def test_a_checkpoint_that_became_dense_goes_on_only_without_keeping_the_sparsity(folder, tmp_path):
    path = saved(tmp_path, callback(folder, keep_sparsity=False))
    module = fit(callback(folder, keep_sparsity=False), steps=8, ckpt_path=path)
    assert num_zeros(module) == 0
    with pytest.raises(ValueError, match="`keep_sparsity=False`"):
        fit(callback(folder), steps=8, ckpt_path=path)
    with pytest.raises(ValueError, match="a run without this callback"):
        fit(callback(folder, keep_sparsity=False), steps=8, ckpt_path=saved(tmp_path / "dense"))


# -- strategies -------------------------------------------------------------------------------------------------------


def test_strategies_that_flatten_weights_are_refused_where_pruned_weights_are_trained(folder):
    module, pruning, run = tiny(), callback(folder), trainer()
    fit(pruning, module=module)
    run.strategy_ = FSDPStrategy()
    run._accelerator_connector.strategy = run.strategy_
    with pytest.raises(ValueError, match="a strategy that does not flatten weights"):
        pruning.on_fit_start(run, module)
    module.layers.requires_grad_(False)
    pruning.on_fit_start(run, module)
    module.layers.requires_grad_(True)
    pruning.keep_sparsity = False
    pruning.on_fit_start(run, module)
