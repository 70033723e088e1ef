import pytest
from helpers.pruning import Tiny, loader, trainer
from lightning.pytorch import LightningDataModule

from wandazeta.callbacks.calibration_data import calibration_loader

TRAIN, SPECIAL, GIVEN = loader(4), loader(4), loader(4)


class Train(LightningDataModule):
    def __init__(self):
        super().__init__()
        self.done = []

    def prepare_data(self):
        self.done.append("prepare")

    def setup(self, stage):
        self.done.append(stage)

    def train_dataloader(self):
        return TRAIN


class Special(Train):
    special = SPECIAL

    def calibration_dataloader(self):
        return self.special


class Neither(LightningDataModule):
    pass


class WithData(Tiny):
    def train_dataloader(self):
        return TRAIN


class WithLateData(Tiny):
    def setup(self, stage):
        self.data = TRAIN

    def train_dataloader(self):
        return self.data


def find(calibration=None, module=None, datamodule=None, data=None):
    """What the callback would find in its setup."""
    module, runner = module or Tiny(), trainer()
    runner.strategy.connect(module)
    runner._data_connector.attach_data(module, train_dataloaders=data, datamodule=datamodule)
    return calibration_loader(runner, module, calibration)


def test_what_was_asked_for_comes_first():
    assert find(GIVEN, WithData(), datamodule=Special()) is GIVEN
    own = Train()
    assert find(own, datamodule=Special()) is TRAIN
    assert own.done == ["prepare", "fit"]
    assert find(Special(), data=GIVEN) is SPECIAL


def test_then_the_data_module_with_its_calibration_data_first():
    assert find(datamodule=Special(), module=WithData()) is SPECIAL
    assert find(datamodule=Train()) is TRAIN
    without = Special()
    without.special = None
    assert find(datamodule=without) is TRAIN


def test_then_the_training_data():
    assert find(data=GIVEN, module=WithData()) is GIVEN
    assert find(module=WithData()) is TRAIN


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "there are no training data to take them from; give the callback a dataloader"),
        ({"datamodule": Neither()}, "Neither to have calibration or training data"),
        ({"data": {"a": TRAIN, "b": TRAIN}}, "the training data are a dict of several"),
        ({"data": [TRAIN, TRAIN]}, "the training data are a list of several"),
        ({"calibration": 3}, "`calibration` to be a dataloader or a LightningDataModule, but got int"),
        ({"module": WithLateData()}, r"WithLateData\.train_dataloader\(\) to work before the module's `setup`"),
    ],
)
def test_what_cannot_be_used_is_said(arguments, message):
    with pytest.raises(ValueError, match=message):
        find(**arguments)
