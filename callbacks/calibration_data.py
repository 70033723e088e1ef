"""Find the calibration data of a Lightning run."""

from collections.abc import Iterable, Mapping
from typing import Any

from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.utilities import CombinedLoader
from lightning.pytorch.utilities.model_helpers import is_overridden

from wandazeta.lightning_compat import training_data
from wandazeta.protocols import SupportsCalibrationData

_REMEDY = "give the callback a dataloader or a LightningDataModule as `calibration`."


def calibration_loader(trainer: Trainer, pl_module: LightningModule, calibration: Any = None) -> Iterable[Any]:
    """Return a loader of calibration data, without touching the trainer's own loaders.

    Args:
        trainer: The trainer, in its `setup` or before.
        pl_module: The module that is pruned.
        calibration: A loader or a data module. By default the trainer's data module (its `calibration_dataloader()` if
            it has one, else its training data), else the training data given to `fit`, else those of the module.

    Returns:
        Batches of calibration data.

    Raises:
        ValueError: If there are no data, or several loaders that only the trainer knows how to combine.
    """
    if isinstance(calibration, LightningDataModule):
        calibration.trainer = calibration.trainer or trainer
        calibration.prepare_data()
        calibration.setup("fit")
        loader = _from_data_module(calibration)
    elif calibration is not None:
        loader = calibration
    elif (datamodule := getattr(trainer, "datamodule", None)) is not None:
        loader = _from_data_module(datamodule)
    else:
        loader = _from_fit(trainer, pl_module)
    if isinstance(loader, (Mapping, CombinedLoader)) or (
        isinstance(loader, (list, tuple)) and loader and hasattr(loader[0], "dataset")
    ):
        raise ValueError(
            f"Expected one loader of calibration data, but the training data are a {type(loader).__name__} of several; "
            f"{_REMEDY}"
        )
    if not isinstance(loader, Iterable):
        raise ValueError(
            f"Expected argument `calibration` to be a dataloader or a LightningDataModule, but got "
            f"{type(loader).__name__}."
        )
    return loader


def _from_data_module(datamodule: LightningDataModule) -> Any:
    loader = datamodule.calibration_dataloader() if isinstance(datamodule, SupportsCalibrationData) else None
    if loader is not None:
        return loader
    if is_overridden("train_dataloader", datamodule):
        return datamodule.train_dataloader()
    raise ValueError(
        f"Expected {type(datamodule).__name__} to have calibration or training data, but it has neither a "
        f"`calibration_dataloader` nor a `train_dataloader`; {_REMEDY}"
    )


def _from_fit(trainer: Trainer, pl_module: LightningModule) -> Any:
    given = training_data(trainer)
    if given is not None and not isinstance(given, LightningModule):
        return given
    if not is_overridden("train_dataloader", pl_module):
        raise ValueError(f"Expected calibration data, but there are no training data to take them from; {_REMEDY}")
    try:
        return pl_module.train_dataloader()
    except Exception as error:
        # callbacks are set up before the module, which may make its data in its own `setup`
        raise ValueError(
            f"Expected {type(pl_module).__name__}.train_dataloader() to work before the module's `setup`, but it "
            f"raised {type(error).__name__}: {error}; {_REMEDY}"
        ) from error
