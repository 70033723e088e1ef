"""What a pruning run did, for every layer and block: plain values for JSON, and a table for the terminal."""

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.table import Table


@dataclass(frozen=True)
class LayerRecord:
    """One pruned weight.

    Args:
        name: Parameter name relative to the block, as in `mlp.up_proj.weight`.
        shape: Output features, input features.
        pattern: Pattern asked for, `2:4` or `50%`.
        sparsity: Fraction of zeros reached.
        score_mean: Mean of the final score over the whole weight; of the magnitudes for SparseGPT, which scores
            column by column.
        score_std: Standard deviation of the final score.
    """

    name: str
    shape: tuple[int, int]
    pattern: str
    sparsity: float
    score_mean: float
    score_std: float


@dataclass(frozen=True)
class BlockRecord:
    """One pruned block.

    Args:
        index: Position of the block, from 0.
        name: Dotted name of the block in the model.
        layers: Its pruned weights.
        loss_before: Mean squared error against the target after the first pruning, before optimisation; None where
            the method looks at no data.
        loss_after: The same of the finished block, on the same probe samples.
        seconds: Wall-clock seconds spent on the block.
        peak_memory: Peak bytes: of the device, or of the process where the device is the CPU.
        num_samples: Calibration samples used.
        num_tokens: Calibration tokens that counted (padding does not).
    """

    index: int
    name: str
    layers: tuple[LayerRecord, ...]
    loss_before: float | None = None
    loss_after: float | None = None
    seconds: float = 0.0
    peak_memory: int = 0
    num_samples: int = 0
    num_tokens: int = 0

    @property
    def num_weights(self) -> int:
        """Number of weights in the pruned layers."""
        return sum(layer.shape[0] * layer.shape[1] for layer in self.layers)

    @property
    def sparsity(self) -> float:
        """Fraction of zeros over the pruned layers."""
        zeros = sum(layer.sparsity * layer.shape[0] * layer.shape[1] for layer in self.layers)
        return zeros / max(self.num_weights, 1)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "BlockRecord":
        """Inverse of `to_dict`."""
        layers = tuple(LayerRecord(**{**layer, "shape": tuple(layer["shape"])}) for layer in values["layers"])
        return cls(**{**values, "layers": layers})

    def to_dict(self) -> dict[str, Any]:
        """Plain values only."""
        return asdict(self)


@dataclass(frozen=True)
class PruneReport:
    """A whole run.

    Args:
        options: The options, as `PruneOptions.to_dict` gives them.
        block_name: Dotted name of the list of blocks.
        blocks: One record for each block, in order.
    """

    options: dict[str, Any]
    block_name: str
    blocks: tuple[BlockRecord, ...] = ()

    @property
    def num_samples(self) -> int:
        """Calibration samples used."""
        return max((block.num_samples for block in self.blocks), default=0)

    @property
    def num_tokens(self) -> int:
        """Calibration tokens that counted."""
        return max((block.num_tokens for block in self.blocks), default=0)

    @property
    def seconds(self) -> float:
        """Wall-clock seconds over all blocks."""
        return sum(block.seconds for block in self.blocks)

    @property
    def peak_memory(self) -> int:
        """Largest peak of any block in bytes."""
        return max((block.peak_memory for block in self.blocks), default=0)

    @property
    def sparsity(self) -> float:
        """Fraction of zeros over all pruned layers."""
        weights = sum(block.num_weights for block in self.blocks)
        return sum(block.sparsity * block.num_weights for block in self.blocks) / max(weights, 1)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "PruneReport":
        """Inverse of `to_dict`."""
        blocks = tuple(BlockRecord.from_dict(block) for block in values["blocks"])
        return cls(values["options"], values["block_name"], blocks)

    def to_dict(self) -> dict[str, Any]:
        """Plain values only, with the totals first."""
        totals = ("sparsity", "num_samples", "num_tokens", "seconds", "peak_memory")
        return {**{name: getattr(self, name) for name in totals}, **asdict(self)}

    @property
    def gain(self) -> str:
        """What the zeros buy, in plain words."""
        words = (
            "The zeros are stored as zeros: plain files and dense kernels are neither smaller nor faster than before."
        )
        if self.options.get("sparsity_pattern") != "2:4":
            return f"{words} What would help exists for 2:4 alone: a packed file, and sparse kernels on some GPUs."
        return (
            f"{words} What helps: the 2:4 packed file (`wandazeta prune --pack true`) takes 0.56 of the size of the "
            "pruned weights on disk in 16 bit, 0.53 in 32 bit, and must be unpacked to be run; sparse kernels "
            "(`wandazeta.pruning.export.semi_structured`) need an NVIDIA GPU from Ampere on and weights in 16 bit."
        )


def table(report: PruneReport) -> "Table":
    """The report as a rich table, one line a block.

    Args:
        report: What `prune_model` returned.

    Returns:
        A table to print with `rich.print`.
    """
    from rich.table import Table  # the core needs torch only

    result = Table(title=f"Pruned by {report.options.get('method', '?')}: {report.block_name}", caption=report.gain)
    for heading in ("block", "weights", "pattern", "sparsity", "loss before", "loss after", "seconds", "peak memory"):
        result.add_column(heading, justify="right")
    for block in report.blocks:
        result.add_row(
            str(block.index),
            f"{block.num_weights:,}",
            ", ".join(sorted({layer.pattern for layer in block.layers})),
            f"{block.sparsity:.2%}",
            _loss(block.loss_before),
            _loss(block.loss_after),
            f"{block.seconds:.1f}",
            _gib(block.peak_memory),
        )
    weights = sum(block.num_weights for block in report.blocks)
    total = ("all", f"{weights:,}", "", f"{report.sparsity:.2%}", "", "", f"{report.seconds:.1f}")
    result.add_section()
    result.add_row(*total, _gib(report.peak_memory), style="bold")
    return result


def _loss(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.2f} GiB"
