"""Compare packages, model and training data across ranks before a fit."""

from typing import Any

import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer
from typing_extensions import override

from wandazeta.protocols import SupportsFingerprint
from wandazeta.utilities import environment

# those that decide the bits of a run, or whose versions cannot exchange data
_COMPARED = ("wandazeta", "python", "torch", "transformers", "lightning", "deepspeed")


class RankConsistencyCheck(Callback):
    """Refuses to fit if a rank has another package version, another model or other training data than rank 0.

    Before anything is pruned or trained, the ranks compare the versions of wandazeta, torch, transformers, lightning,
    deepspeed and Python, and the fingerprints of the module and of the data module if these have a `fingerprint`
    method (`wandazeta.protocols.SupportsFingerprint`).

    Put it before all other callbacks except `RankWatchdog`. `wandazeta` adds it to every run.
    """

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Compare the ranks.

        Raises:
            ValueError: On every rank, if any rank differs from rank 0. The message names the rank and all differences.
        """
        if stage != "fit" or trainer.world_size == 1:
            return
        sources: dict[str, Any] = {"model": pl_module, "training data": getattr(trainer, "datamodule", None)}
        digests = {
            name: source.fingerprint() for name, source in sources.items() if isinstance(source, SupportsFingerprint)
        }
        ranks: list[tuple[dict[str, str], dict[str, str]]] = [({}, {})] * trainer.world_size
        dist.all_gather_object(ranks, (_versions(), digests))
        first_versions, first_digests = ranks[0]
        for rank, (versions, digests) in enumerate(ranks):
            found = [
                f"{name} {versions[name]} instead of {first}"
                for name, first in first_versions.items()
                if versions[name] != first
            ]
            found += [f"another {name}" for name, first in first_digests.items() if digests.get(name) != first]
            if found:
                raise ValueError(
                    f"Expected every rank to have the same as rank 0, but rank {rank} has {', '.join(found)}; give all "
                    "machines the same packages, model and data, and set the seeds of everything random"
                )


def _versions() -> dict[str, str]:
    found = environment.versions()
    # bugfix releases of Python work together
    found["python"] = found["python"].rpartition(".")[0]
    return {name: found.get(name, "(none)") for name in _COMPARED}
