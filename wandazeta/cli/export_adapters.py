"""The command `wandazeta export-adapters`: write the adapters of a run for use outside of it."""

import os
import warnings
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

import torch
import yaml
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from wandazeta.adapters import Weights
from wandazeta.callbacks import WandaPPPruneCallback
from wandazeta.cli.main import command_line
from wandazeta.cli.prune import attach
from wandazeta.lightning_compat import checkpoint_path
from wandazeta.models.pretrained import find_pretrained
from wandazeta.pruning.export.pretrained import export_pretrained
from wandazeta.pruning.progress.folder import ProgressFolder
from wandazeta.utilities.files import check_writable, replace_directory

__all__ = ["export_adapters"]

_BACKBONE = "backbone"
# entries of a configuration that the objects of the run are made from; data are not needed
_NEEDED = ("checkpoint_every", "prune", "model")
_KEPT_CALLBACKS = (WandaPPPruneCallback, ModelCheckpoint)


def export_adapters(run: str | os.PathLike[str], output_dir: str | os.PathLike[str], ckpt_path: str = "last") -> None:
    """Write the adapters of a run, and the backbone if the run has pruned it.

    `wandazeta.load_adapters` loads the adapters, peft those of `PeftLoRA`; the model card shows how.

    Args:
        run: Folder of the run (`run_dir`), from whose working directory this is called if its configuration has
            relative paths.
        output_dir: Directory to write, new or empty.
        ckpt_path: Checkpoint of the run; `last` is the newest.

    Raises:
        ValueError: If the folder has no run of a module with adapters or no such checkpoint, or the directory is not
            empty.
    """
    target = Path(output_dir).absolute()
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise ValueError(f"Expected argument `output_dir` to be a new or empty folder, but got '{output_dir}'")
    check_writable(target.parent)
    settings = _settings(Path(run))
    with warnings.catch_warnings():
        # the arguments of the process are those of this command
        warnings.filterwarnings("ignore", "LightningCLI's args parameter")
        # without a subcommand the objects are created and nothing runs
        cli = command_line(settings, run=False)
    trainer, module = cli.trainer, cli.model
    if not hasattr(module, "save_adapters") or isinstance(getattr(module, "trainable", None), Weights):
        raise ValueError(
            f"Expected argument `run` to be a run that trains adapters, but '{run}' is of {type(module).__name__}"
            + (" with `Weights`" if hasattr(module, "trainable") else "")
        )
    checkpoint = _read_checkpoint(trainer, ckpt_path)
    with replace_directory(target) as directory:
        backbone = _prepare(trainer, module, directory)
        module.on_load_checkpoint(checkpoint)
        module.load_state_dict(checkpoint["state_dict"], strict=module.strict_loading)
        module.save_adapters(directory, backbone)


def _settings(run: Path) -> dict[str, Any]:
    """Return the settings of a run, for one process on the CPU and without what only a training needs."""
    file = run / "log" / "config.yaml"
    if not file.is_file():
        raise ValueError(
            f"Expected argument `run` to be the folder of a run of `wandazeta fit`, with log/config.yaml, but got "
            f"'{run}', which has none"
        )
    saved = yaml.safe_load(file.read_text())
    given = saved["trainer"].get("callbacks") or []
    callbacks = [callback for callback in given if issubclass(resolve_name(callback["class_path"]), _KEPT_CALLBACKS)]
    trainer = {"accelerator": "cpu", "devices": 1, "logger": False, "callbacks": callbacks}
    settings = {name: saved[name] for name in _NEEDED if saved.get(name) is not None}
    loading = settings["model"]["init_args"].get("loading")
    if loading is not None:
        loading["shard_on_load"] = False
    # the folder may have been moved since
    return settings | {"trainer": trainer, "run_dir": str(run), "seed_everything": False}


def _read_checkpoint(trainer: Trainer, ckpt_path: str) -> dict[str, Any]:
    path = checkpoint_path(trainer, ckpt_path) if ckpt_path in ("last", "best") else ckpt_path
    if path is None or not Path(path).exists():
        raise ValueError(
            f"Expected argument `ckpt_path` to be a checkpoint of the run, but got {ckpt_path!r}, which does not exist"
        )
    if Path(path).is_dir():
        raise ValueError(
            f"Expected argument `ckpt_path` to be a file, but got '{path}', which several ranks wrote; load it with "
            "the strategy of the run, and call `save_adapters` of the module"
        )
    checkpoint: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    return checkpoint


def _prepare(trainer: Trainer, module: LightningModule, directory: Path) -> str | None:
    """Load the pruning of the run and insert the adapters; returns the folder of the backbone if it was pruned."""
    attach(trainer, module)
    callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
    prunings = [callback for callback in callbacks if isinstance(callback, WandaPPPruneCallback)]
    if len(prunings) > 1:
        raise ValueError(
            f"Expected a run with one pruning of the backbone at most, but got {len(prunings)}; call `save_adapters` "
            "of the module"
        )
    module.configure_model()
    for callback in prunings:
        callback.setup(trainer, module, "test")
        assert callback.report is not None
        folder = ProgressFolder(Path(callback.output_dir).absolute())
        folder.open_existing()
        prefix, model = find_pretrained(module)
        masks = {name.removeprefix(prefix): mask for name, mask in folder.stored_masks(callback.report).items()}
        tokenizer = getattr(module, "tokenizer", None)
        export_pretrained(model, tokenizer, directory / _BACKBONE, callback.report, masks, key=callback.key)
    module.setup("test")
    return _BACKBONE if prunings else None
