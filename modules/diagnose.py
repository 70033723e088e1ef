"""Measure which ε of finite differences fits a model, its precision and its data: `wandazeta diagnose`."""

import itertools
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from typing_extensions import override

from wandazeta.models.modes import evaluation_mode
from wandazeta.modules.zeroth_order import ZerothOrderModule
from wandazeta.utilities.arguments import check_range
from wandazeta.zeroth_order import LossFn
from wandazeta.zeroth_order.diagnosis import EPSILONS, EpsilonRow, measure_epsilons, summary, write_report


class EpsilonDiagnosis(Callback):
    """Measures slopes at several distances ε at the start of a fit, and stops the fit before its first step.

    The measurement runs in the strategy and the precision of the fit.

    Args:
        num_batches: Number of training batches, those of the next steps.
        num_queries: Directions for each batch.
        epsilons: Distances to try; by default half decades from 1e-5 to 0.1.

    Raises:
        ValueError: If an argument is out of range, or does not fit the trainer or its module.
    """

    def __init__(self, num_batches: int = 2, num_queries: int = 16, epsilons: Sequence[float] | None = None) -> None:
        epsilons = tuple(epsilons or EPSILONS)
        check_range("num_batches", num_batches, num_batches >= 1, "at least 1")
        check_range("num_queries", num_queries, num_queries >= 2, "at least 2")
        check_range("epsilons", epsilons, min(epsilons) > 0, "above 0")
        self.num_batches = num_batches
        self.num_queries = num_queries
        self.epsilons = epsilons
        self.rows: list[EpsilonRow] = []
        """Results, once the fit has started."""
        self.dtype = torch.float32
        """Precision of the forward passes, once the fit has started."""

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if not isinstance(pl_module, ZerothOrderModule):
            raise ValueError(f"Expected a ZerothOrderModule to diagnose, but got {type(pl_module).__name__}")
        if not pl_module.trainable.has_explicit_directions:
            kind = type(pl_module.trainable).__name__
            raise ValueError(f"Expected adapters to diagnose, but got `{kind}`; leave out `trainable` or name adapters")
        if trainer.world_size > 1:
            raise ValueError(
                f"Expected a single process for a diagnosis, but got {trainer.world_size}; set trainer.devices and "
                "trainer.num_nodes to 1."
            )

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(pl_module, ZerothOrderModule)
        assert pl_module.adapters is not None
        self.dtype = pl_module.compute_dtype
        forward = trainer.precision_plugin.forward_context()
        with torch.no_grad(), evaluation_mode(list(pl_module.backbone.modules())), forward:
            self.rows = measure_epsilons(
                self._losses(trainer, pl_module),
                pl_module.adapters.theta,
                seed=pl_module.seed,
                num_queries=self.num_queries,
                epsilons=self.epsilons,
                chunk_size=pl_module.query_chunk_size,
                draw=pl_module.estimator.draw,
            )
        trainer.should_stop = True

    def _losses(self, trainer: Trainer, module: ZerothOrderModule) -> Iterator[LossFn]:
        loader: Any = trainer.train_dataloader
        for batch in itertools.islice(loader, self.num_batches):
            prepared = module.scorer.prepare(trainer.strategy.batch_to_device(batch))
            yield partial(module.losses, prepared=prepared)

    def to_dict(self) -> dict[str, Any]:
        """Return results and recommendation in plain values."""
        return summary(self.rows, self.dtype) | self._settings()

    def write_report(self, output_dir: str | Path) -> None:
        """Print the results and write them to a directory; see `wandazeta.zeroth_order.diagnosis.write_report`.

        Args:
            output_dir: Directory to write to; it is made if it is missing.
        """
        write_report(self.rows, self.dtype, output_dir, **self._settings())

    def _settings(self) -> dict[str, Any]:
        return {"num_batches": self.num_batches, "num_queries": self.num_queries}
