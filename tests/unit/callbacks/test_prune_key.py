"""Several fits of one process, what the key covers, and which of several models is pruned."""

import os
import signal

import pytest
import torch
import transformers
from helpers.pruning import Tiny, callback, fit, loader, same, trainer
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader

from wandazeta.pruning.progress.folder import ProgressFolder

# -- one process, several fits ----------------------------------------------------------------------------------------


def test_a_second_fit_goes_on_with_what_the_first_trained(folder, forbid_pruning):
    pruning = callback(folder, keep_sparsity=False)
    runner, module = trainer(pruning), Tiny(learning_rate=0.1)
    runner.fit(module, loader())
    forbid_pruning()
    assert (module.layers[0].up.weight != 0).all(), "trained without keeping the sparsity"
    runner.fit_loop.max_epochs = 2
    runner.fit(module, loader())
    trainer(pruning).fit(module, loader())
    assert runner.global_step == 8


def test_a_fit_after_one_that_was_stopped_keeps_its_checkpoints(folder, tmp_path, monkeypatch):
    pruning, save = callback(folder), ProgressFolder.save

    def saving(self, index, result):
        if index == 0:
            os.kill(os.getpid(), signal.SIGINT)
        save(self, index, result)

    with monkeypatch.context() as patch:
        patch.setattr(ProgressFolder, "save", saving)
        with pytest.raises(SystemExit):
            fit(pruning)
    trainer(pruning, ModelCheckpoint(tmp_path / "kept"), enable_checkpointing=True).fit(Tiny(), loader())
    assert len(list((tmp_path / "kept").glob("*.ckpt"))) == 1


# -- what the key covers ----------------------------------------------------------------------------------------------


class Headed(Tiny):
    """Its blocks hold settings that no tensor and no `repr` shows."""

    def __init__(self, heads=1, activation=torch.relu, **config):
        super().__init__()
        for layer in self.layers:
            layer.heads, layer.activation = heads, activation
            layer.config = transformers.MistralConfig(**config)


@pytest.mark.parametrize(
    "change", [{"heads": 4}, {"activation": torch.tanh}, {"sliding_window": 4}], ids=["number", "function", "config"]
)
@pytest.mark.parametrize("stage", ["fit", "validate"])
def test_another_setting_of_the_blocks_is_refused(folder, forbid_pruning, change, stage):
    fit(callback(folder), Headed())
    forbid_pruning()
    fit(callback(folder), Headed(use_cache=False))
    with pytest.raises(ValueError, match=r"1 of \d+ model tensors, first `\(architecture\)`"):
        getattr(trainer(callback(folder)), stage)(Headed(**change), loader())


@pytest.mark.parametrize("stage", ["fit", "validate"])
def test_what_is_read_between_the_blocks_decides(folder, forbid_pruning, stage):
    class Shifted(Tiny):
        def __init__(self, shift=0.0):
            super().__init__()
            self.shift = nn.Parameter(torch.full((8,), shift))

        def forward(self, tokens):
            x = self.embedding(tokens)
            for index, layer in enumerate(self.layers):
                # the last block is given a weight of the model
                x = layer(x, shift=self.shift if index == 2 else None)
            return self.head(x)

    def block_forward(self, x, shift=None):
        x = x if shift is None else x + shift
        return x + self.down(nn.functional.gelu(self.up(self.norm(x))))

    def module(shift=0.0):
        built = Shifted(shift)
        for layer in built.layers:
            layer.forward = block_forward.__get__(layer)
        return built

    fit(callback(folder), module())
    forbid_pruning()
    getattr(trainer(callback(folder)), stage)(module(), loader())
    with pytest.raises(ValueError, match=r"1 of \d+ model tensors, first `shift`"):
        getattr(trainer(callback(folder)), stage)(module(shift=1.0), loader())


def test_preparing_leaves_the_module_as_it_was(folder, forbid_pruning):
    class Counting(Tiny):
        def __init__(self):
            super().__init__()
            self.bn = nn.BatchNorm1d(8)
            self.others = nn.ModuleList(nn.Sequential(nn.Linear(8, 8)) for _ in range(3))
            for layer in self.layers:
                layer.register_forward_hook(self.count)
                layer.calls = 0

        @staticmethod
        def count(layer, args, output):
            layer.calls += 1

        def forward(self, tokens):
            x = self.bn(self.embedding(tokens).transpose(1, 2)).transpose(1, 2)
            for layer in self.layers:
                x = layer(x)
            return self.head(x)

    seen = []

    class Look(Callback):
        def on_train_start(self, trainer, pl_module):
            seen.append(int(pl_module.bn.num_batches_tracked))

    trainer(callback(folder), Look()).fit(Counting(), loader())
    assert seen == [0]
    forbid_pruning()
    trainer(callback(folder)).validate(Counting(), loader())


def test_how_samples_are_batched_changes_nothing(folder, forbid_pruning):
    expected = fit(callback(folder))
    forbid_pruning()
    data = DataLoader(loader().dataset, batch_size=3)
    assert same(fit(callback(folder), data=data), expected)


def test_a_folder_without_a_block_belongs_to_nobody(folder):
    with pytest.raises(ValueError, match="`device` to be one of this machine, but got 'cuda:99'"):
        fit(callback(folder, device="cuda:99"))
    broken = callback(folder)
    broken.token_mask = lambda batch: torch.ones(1, 2)
    with pytest.raises(ValueError, match="`token_mask` to give a mask of shape"):
        fit(broken)
    assert (folder / "key.json").exists()
    pruning = callback(folder, alpha=3.0)
    fit(pruning)
    assert pruning.report.sparsity == 0.5


class WithTeacher(Tiny):
    """Holds another model that its forward does not run."""

    def __init__(self, num_blocks, width=8):
        super().__init__()
        self.teacher = Tiny(seed=1, num_blocks=num_blocks, width=width)


@pytest.mark.parametrize(("num_blocks", "width"), [(5, 8), (3, 8), (2, 8), (5, 6)])
def test_a_model_that_does_not_run_is_left_alone(folder, num_blocks, width):
    module = WithTeacher(num_blocks, width)
    pruning = callback(folder)
    fit(pruning, module)
    assert [block.name for block in pruning.report.blocks] == ["layers.0", "layers.1", "layers.2"]
    assert same(module.teacher, Tiny(seed=1, num_blocks=num_blocks, width=width))


def test_without_data_several_models_are_refused(folder):
    with pytest.raises(ValueError, match=r"`blocks` to name one of `layers`, `teacher\.layers`"):
        fit(callback(folder, method="magnitude"), WithTeacher(5))
    pruning = callback(folder, method="magnitude", blocks="layers")
    fit(pruning, WithTeacher(5))
    assert pruning.report.blocks[0].name == "layers.0"
