"""Records of a pruning: what was done to every layer and block, as plain values for JSON."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

__all__ = ["BlockRecord", "LayerRecord", "PruneReport", "TuningRecord"]


@dataclass(frozen=True)
class LayerRecord:
    """One pruned weight matrix.

    Args:
        name: Parameter name relative to the block, such as `mlp.up_proj.weight`.
        shape: Output features, input features; the output features of all experts if they are fused.
        pattern: The requested pattern, `2:4` or `50%`.
        sparsity: Fraction of zeros that was reached.
        score_mean: Mean of the final pruning score over the whole matrix; for SparseGPT, which scores one group of
            columns after the other, the mean magnitude.
        score_std: Standard deviation of the final pruning score.
        expert_tokens: Number of calibration tokens that reached each of the fused experts; those that none reached
            were pruned by magnitude. Empty for other weights, and without calibration data.
    """

    name: str
    shape: tuple[int, int]
    pattern: str
    sparsity: float
    score_mean: float
    score_std: float
    expert_tokens: tuple[int, ...] = ()

    @classmethod
    def fused(cls, name: str, experts: "Sequence[LayerRecord]") -> "LayerRecord":
        """Return one record of weights that are slices of one parameter.

        Args:
            name: Name of the parameter.
            experts: The records of its slices, which all have one shape.
        """
        rows, columns = experts[0].shape
        num = len(experts)
        mean = sum(record.score_mean for record in experts) / num
        variance = sum(record.score_std**2 + (record.score_mean - mean) ** 2 for record in experts) / num
        return cls(
            name,
            (num * rows, columns),
            experts[0].pattern,
            sum(record.sparsity for record in experts) / num,
            mean,
            variance**0.5,
            tuple(tokens for record in experts for tokens in record.expert_tokens),
        )

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "LayerRecord":
        """Build a record from the dictionary that `asdict` returned."""
        tuples = {key: tuple(value) for key, value in values.items() if isinstance(value, list | tuple)}
        return cls(**{**values, **tuples})


@dataclass(frozen=True)
class TuningRecord:
    """What the tuned regional optimisation of one block chose, and its error on held-out samples.

    Args:
        rate: Step of the optimizer as a fraction of the root mean square of each layer's weights.
        rounds: Rounds that were kept; 0 if the block stayed as it was before the optimisation.
        num_held_out: Number of held-out samples.
        error_before: Mean error of their tokens before the optimisation, relative to the size of each token.
        error_after: The same error of the finished block.
    """

    rate: float
    rounds: int
    num_held_out: int
    error_before: float
    error_after: float


@dataclass(frozen=True)
class BlockRecord:
    """One pruned block.

    Args:
        index: Position of the block, from 0.
        name: Dotted name of the block in the model.
        layers: Its pruned weight matrices.
        loss_before: Mean squared error of the block's output against its target after the first pruning, before the
            regional optimisation; None for methods without calibration data.
        loss_after: The same error of the finished block, on the same samples.
        seconds: Wall-clock seconds spent on the block.
        peak_memory: Peak memory in bytes: of the device, or of the process where the device is the CPU.
        num_samples: Number of calibration samples.
        num_tokens: Number of calibration tokens without padding.
        tuning: Record of the optimisation, of methods that tune it.
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
    tuning: TuningRecord | None = None

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
        """Build a record from the dictionary that `to_dict` returned."""
        layers = tuple(LayerRecord.from_dict(layer) for layer in values["layers"])
        tuning = TuningRecord(**values["tuning"]) if values.get("tuning") else None
        return cls(**{**values, "layers": layers, "tuning": tuning})

    def to_dict(self) -> dict[str, Any]:
        """The record as nested dictionaries of plain values."""
        return asdict(self)


@dataclass(frozen=True)
class PruneReport:
    """Everything that a pruning did.

    Args:
        options: The options by name, in plain values, as `PruneOptions.to_dict` returns them.
        block_name: Dotted name of the `ModuleList` that holds the blocks.
        blocks: One record per block, in order.
    """

    options: dict[str, Any]
    block_name: str
    blocks: tuple[BlockRecord, ...] = ()

    @property
    def method_name(self) -> str:
        """Name of the pruning method, such as `wanda++`; `?` if it was not recorded."""
        return str(self.options.get("method", "?"))

    @property
    def sparsity_pattern(self) -> str:
        """The requested pattern, `2:4` or `unstructured`; `?` if it was not recorded."""
        return str(self.options.get("sparsity_pattern", "?"))

    @property
    def num_samples(self) -> int:
        """Number of calibration samples."""
        return max((block.num_samples for block in self.blocks), default=0)

    @property
    def num_tokens(self) -> int:
        """Number of calibration tokens without padding."""
        return max((block.num_tokens for block in self.blocks), default=0)

    @property
    def unreached_experts(self) -> dict[str, tuple[int, ...]]:
        """Positions of the experts that no calibration token reached, which were pruned by magnitude, by module."""
        found = {}
        for block in self.blocks:
            for layer in block.layers:
                unreached = tuple(index for index, tokens in enumerate(layer.expert_tokens) if tokens == 0)
                if unreached:
                    found[f"{block.name}.{layer.name}".rpartition(".")[0]] = unreached
        return found

    @property
    def num_layers(self) -> int:
        """Number of pruned layers."""
        return sum(len(block.layers) for block in self.blocks)

    @property
    def num_weights(self) -> int:
        """Number of weights in the pruned layers."""
        return sum(block.num_weights for block in self.blocks)

    @property
    def seconds(self) -> float:
        """Wall-clock seconds over all blocks."""
        return sum(block.seconds for block in self.blocks)

    @property
    def peak_memory(self) -> int:
        """Peak memory of the most demanding block in bytes."""
        return max((block.peak_memory for block in self.blocks), default=0)

    @property
    def sparsity(self) -> float:
        """Fraction of zeros over all pruned layers."""
        return sum(block.sparsity * block.num_weights for block in self.blocks) / max(self.num_weights, 1)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "PruneReport":
        """Build a report from the dictionary that `to_dict` returned."""
        blocks = tuple(BlockRecord.from_dict(block) for block in values["blocks"])
        return cls(values["options"], values["block_name"], blocks)

    def to_dict(self) -> dict[str, Any]:
        """The report as nested dictionaries of plain values, with the totals first."""
        totals = ("sparsity", "num_samples", "num_tokens", "seconds", "peak_memory", "unreached_experts")
        return {**{name: getattr(self, name) for name in totals}, **asdict(self)}

    @property
    def unreached_words(self) -> str:
        """A sentence that names the experts that no calibration token reached; empty if there are none."""
        unreached = [f"`{name}` {', '.join(map(str, indices))}" for name, indices in self.unreached_experts.items()]
        start = "Experts that no calibration token reached, which were pruned by magnitude"
        return f"{start}: {'; '.join(unreached)}." if unreached else ""

    @property
    def gain(self) -> str:
        """What the zeros change about size and speed, in two or three sentences."""
        words = (
            "Pruned weights are stored as zeros: plain files and dense kernels are neither smaller nor faster than "
            "before."
        )
        if self.sparsity_pattern != "2:4":
            return f"{words} A packed file format and sparse GPU kernels exist for the 2:4 pattern only."
        return (
            f"{words} The 2:4 packed file (`wandazeta prune --pack true`) stores the pruned weights in 0.56 of their "
            "size in 16-bit precision, 0.53 in 32-bit; dense models are unpacked from it first. Only sparse "
            "kernels (`wandazeta.pruning.export.semi_structured`) can be faster; they need an NVIDIA GPU (Ampere or "
            "newer) and 16-bit weights."
        )
