"""Measures for a model, precision and data which distance ε the differences of losses should be taken at."""

import itertools
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from typing_extensions import override

from wandazeta.adapters import Weights
from wandazeta.models.modes import evaluation_mode
from wandazeta.modules.zeroth_order import ZerothOrderModule
from wandazeta.modules.zo_options import EPSILON
from wandazeta.utilities.arguments import check_range
from wandazeta.zeroth_order import DISTRIBUTIONS
from wandazeta.zeroth_order.diagnosis import EPSILONS, EpsilonRow, measure_epsilons, recommended_epsilon
from wandazeta.zeroth_order.estimators import LossFn

if TYPE_CHECKING:
    from rich.table import Table

_ENOUGH = 0.9
_ESTIMATORS = ("two_sided", "one_sided")


class EpsilonDiagnosis(Callback):
    """Measures at the start of a fit, in its strategy and precision, and ends the fit before its first step.

    Args:
        num_batches: Training batches, those of the next steps.
        num_queries: Directions for each batch.
        epsilons: Distances to try; by default half decades from 1e-5 to 0.1.

    Raises:
        ValueError: If an argument is out of range, or the trainer or its module does not fit.
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
        self.dtype = torch.float32

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if not isinstance(pl_module, ZerothOrderModule):
            raise ValueError(f"Expected a ZerothOrderModule to diagnose, but got {type(pl_module).__name__}")
        if isinstance(pl_module.trainable, Weights):
            raise ValueError("Expected adapters to diagnose, but got `Weights`; leave out `trainable` or name adapters")
        if trainer.world_size > 1:
            raise ValueError(
                f"Expected one process to diagnose with, but got {trainer.world_size}; set trainer.devices and "
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
                draw=DISTRIBUTIONS[pl_module.directions],
            )
        trainer.should_stop = True

    def _losses(self, trainer: Trainer, module: ZerothOrderModule) -> Iterator[LossFn]:
        loader: Any = trainer.train_dataloader
        for batch in itertools.islice(loader, self.num_batches):
            prepared = module.scorer.prepare(trainer.strategy.batch_to_device(batch))

            def loss_fn(theta_Nd: Tensor, prepared: Any = prepared) -> Tensor:
                return module.losses(theta_Nd, prepared)

            yield loss_fn

    def to_dict(self) -> dict[str, Any]:
        """Return what was measured and what it recommends, in plain values."""
        return {
            "dtype": str(self.dtype).removeprefix("torch."),
            "num_batches": self.num_batches,
            "num_queries": self.num_queries,
            "default": EPSILON[self.dtype],
            "recommended": {name: recommended_epsilon(self.rows, name).epsilon for name in _ESTIMATORS},
            "rows": [row.as_dict() for row in self.rows],
        }


def report(diagnosis: EpsilonDiagnosis, output_dir: str | Path) -> None:
    """Print the table and the recommendation, and write `epsilon.json` and, with matplotlib, `epsilon.svg`.

    Args:
        diagnosis: A callback that has measured.
        output_dir: Directory to write to.
    """
    from rich.console import Console

    result, folder = diagnosis.to_dict(), Path(output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "epsilon.json").write_text(json.dumps(result, indent=2) + "\n")
    Console(file=sys.stdout).print(table(diagnosis.rows, result["dtype"]))
    for name in _ESTIMATORS:
        sys.stdout.write(advice(diagnosis.rows, name, result["default"]) + "\n")
    try:
        picture(diagnosis.rows, folder / "epsilon.svg")
    except ImportError:
        sys.stdout.write("no picture, as matplotlib is missing: pip install -e '.[report]'\n")
    sys.stdout.write(f"diagnosis: {folder.absolute()}\n")


def table(rows: Sequence[EpsilonRow], dtype: str) -> "Table":
    """Return the rows as a rich table, a line for each epsilon, the recommended ones marked.

    Args:
        rows: What was measured.
        dtype: Precision of the forward.
    """
    from rich.table import Table

    result = Table(title=f"Correlation of measured slopes with exact derivatives, {dtype}", caption="* recommended")
    result.add_column("epsilon", justify="right")
    columns = []
    for name in _ESTIMATORS:
        result.add_column(name, justify="right")
        best = recommended_epsilon(rows, name)
        columns.append([f"{row.correlation:.3f}{'*' if row == best else ' '}" for row in rows if row.estimator == name])
    epsilons = dict.fromkeys(row.epsilon for row in rows)
    for epsilon, *cells in zip(epsilons, *columns, strict=True):
        result.add_row(f"{epsilon:g}", *cells)
    return result


def advice(rows: Sequence[EpsilonRow], estimator: str, default: float) -> str:
    """Return in a line which epsilon to use with an estimator.

    Args:
        rows: What was measured.
        estimator: `two_sided` or `one_sided`.
        default: What is used where nothing is said.
    """
    best = recommended_epsilon(rows, estimator)
    line = f"{estimator}: epsilon={best.epsilon:g} (correlation {best.correlation:.3f}; the default is {default:g})"
    if best.correlation < _ENOUGH:
        line += "; no distance measures well: use a higher precision, or estimator=forward_mode"
    return line


def picture(rows: Sequence[EpsilonRow], path: Path) -> None:
    """Draw the correlations over epsilon.

    Args:
        rows: What was measured.
        path: File to write, in the format of its suffix.

    Raises:
        ImportError: If matplotlib is not installed.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5, 3), layout="constrained")
    axes = figure.subplots()
    for name in _ESTIMATORS:
        mine = [row for row in rows if row.estimator == name]
        axes.semilogx([row.epsilon for row in mine], [row.correlation for row in mine], "o-", label=name)
    axes.set(xlabel="epsilon", ylabel="correlation with the exact derivative", ylim=(-0.1, 1.05))
    axes.legend(loc="lower center")
    figure.savefig(path)
