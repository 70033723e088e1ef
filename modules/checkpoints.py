"""What forward passes have trained, in checkpoints and in files of its own."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from typing_extensions import override

from wandazeta.adapters import AdapterVector, InPlaceWeights
from wandazeta.adapters.files import load_adapter_files, require_same, save_adapter_files
from wandazeta.lightning_compat import attached_trainer
from wandazeta.modules.language_model import LanguageModel
from wandazeta.utilities.arguments import describe_rates
from wandazeta.zeroth_order import QuerySchedule, Update


class TrainedByForwards(LanguageModel, ABC):
    """The part of `ZerothOrderModule` that keeps and restores what is trained; checkpoints hold nothing else."""

    adapters: AdapterVector | InPlaceWeights | None
    update_rule: Update
    schedule: QuerySchedule
    query_chunk_size: int
    lr_scheduler: Callable[[Optimizer], LRScheduler] | None
    progress: Tensor
    pruned_backbone_key: str | None
    """Key of the backbone's pruning; set by whoever prunes it."""
    _backbone_description: dict[str, Any]
    _nonfinite_steps: int

    @abstractmethod
    def _insert_adapters(self) -> None:
        """Put the adapters into the backbone."""

    @abstractmethod
    def _new_optimizer(self) -> Optimizer:
        """The one whose learning rate a scheduler moves."""

    @property
    def backbone_key(self) -> str:
        """Key of the backbone, pruned or not, that the adapters belong to."""
        return str(self._backbone_description.get("backbone_key", ""))

    @override
    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        state = checkpoint["state_dict"]
        checkpoint["state_dict"] = {name: state[name] for name in state if self._is_trained(name)}
        checkpoint["zeroth_order"] = {
            **self._description(),
            **self._rules(),
            **describe_rates(self._new_optimizer(), self.lr_scheduler),
            "query_chunk_size": self.query_chunk_size,
            "nonfinite_steps": self._nonfinite_steps,
            "theta_sum": self._theta_sum(),
        }

    @override
    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        saved = checkpoint.get("zeroth_order")
        if saved is None:
            raise ValueError("Expected a checkpoint of ZerothOrderModule, but it has no `zeroth_order` entry")
        here = self._description() | self._rules()
        if attached_trainer(self) is not None and self.trainer.training:
            here |= describe_rates(self._new_optimizer(), self.lr_scheduler)
        require_same(saved, here)
        if "state_dict" in checkpoint:
            expected = {name for name in self.state_dict() if self._is_trained(name)}
            found = set(checkpoint["state_dict"])
            if expected != found:
                raise ValueError(
                    f"Expected a checkpoint with exactly {sorted(expected)}, but it lacks {sorted(expected - found)} "
                    f"and has {sorted(found - expected)} too"
                )
        elif self._theta_sum() != saved["theta_sum"]:  # DeepSpeed has loaded its own file by now
            raise ValueError("Expected the checkpoint's adapters to be loaded, but they differ; is a file missing?")
        self.query_chunk_size = saved["query_chunk_size"]
        self._nonfinite_steps = saved["nonfinite_steps"]

    def save_adapters(self, directory: str | Path) -> None:
        """Write the adapters, LoRA's as peft does, what they fit (`adapters.json`) and a model card.

        Raises:
            ValueError: If there are none, as the model's own weights are trained.
        """
        if not isinstance(self.adapters, AdapterVector):
            raise ValueError("Expected adapters to save, but got none; `backbone.save_pretrained` saves the weights")
        save_adapter_files(Path(directory), self.adapters, self.adapters.description() | self._backbone_description)

    def load_adapters(self, directory: str | Path) -> None:
        """Load adapters that `save_adapters` wrote for the same backbone and sites.

        Raises:
            ValueError: If they are for another backbone or other sites.
        """
        if self.adapters is None:
            self._insert_adapters()
        if not isinstance(self.adapters, AdapterVector):
            raise ValueError("Expected adapters to load into, but got none; train from the directory of the weights")
        load_adapter_files(Path(directory), self.adapters, self._description())

    def _description(self) -> dict[str, Any]:
        assert self.adapters is not None
        return {**self.adapters.description(), "backbone_key": self.backbone_key}

    def _rules(self) -> dict[str, Any]:
        return {"update": type(self.update_rule).__name__, "schedule_states": self.schedule.num_states}

    def _theta_sum(self) -> float:
        assert self.adapters is not None
        return float(self.adapters.checked().double().sum())

    def _is_trained(self, name: str) -> bool:
        """Whether an entry of the state belongs into checkpoints."""
        assert self.adapters is not None
        inner = name.removeprefix("backbone.")
        return inner == name or inner in self.adapters.model_names
