"""What to prune and how: one frozen, plain-valued record that decides the result."""

import re
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, get_args

from wandazeta.utilities.arguments import check_at_least, check_choice

Method = Literal["magnitude", "wanda", "rgs", "ro", "wanda++", "sparsegpt"]
Optimizer = Literal["rmsprop", "adamw"]
LRSchedule = Literal["constant", "linear"]
Start = Literal["score", "sparsegpt"]
Target = Literal["dense_block", "dense_stream"]
MaskMode = Literal["free", "fixed", "straight_through"]
ComputeDtype = Literal["model", "bfloat16"]
Alpha = float | Literal["auto"]

UNSTRUCTURED = "unstructured"
_CHOICES = {
    "method": Method,
    "optimizer": Optimizer,
    "lr_schedule": LRSchedule,
    "start": Start,
    "target": Target,
    "mask_mode": MaskMode,
    "compute_dtype": ComputeDtype,
}


@dataclass(frozen=True)
class PruneOptions:
    """Options of a pruning run; two runs with equal options, model and data give the same weights.

    Args:
        method: Score and optimisation: `magnitude` (|W|), `wanda` (‖X‖·|W|), `rgs` (regional gradients), `ro`
            (Wanda score with regional optimisation), `wanda++` (both) or `sparsegpt` (error passed on to the weights
            that are kept).
        sparsity_pattern: `"N:M"`, of every M consecutive inputs of a row N are kept, or `"unstructured"`.
        sparsity: Fraction of each row that is set to zero, for `"unstructured"` only.
        sparsity_slope: By how much the last block's fraction is above the first's, with a straight line between them
            around `sparsity`; for `"unstructured"` only.
        alpha: Weight of the regional gradient in the score (Wanda++, equation 4). The paper's 100 belongs to its
            models' width and text; `auto` gives the gradient, layer by layer, a tenth of the weight of the norms.
        rounds: Rounds of regional optimisation, K; each prunes, then takes optimizer steps.
        samples_per_round: Calibration samples drawn for each round, M.
        optimizer: Optimizer of the regional optimisation, `rmsprop` (the paper's) or `adamw`.
        learning_rate: Learning rate of the regional optimisation.
        lr_schedule: `constant`, or `linear`, which falls to zero over the rounds.
        start: What the first round prunes by: the `score`, or `sparsegpt`, whose mask and weights the optimisation
            starts from.
        target: What the pruned block is fitted to: `dense_block`, the dense block's output on the same input (the
            paper's), or `dense_stream`, what the unpruned model has at this depth.
        samples_per_step: Samples whose mean loss makes an optimizer step.
        generated_copies: Samples that the dense model writes for each calibration sample, from some of its tokens on,
            used beside it where blocks are optimised, which learn few by heart; for transformers' causal models.
        mask_mode: What pruned weights do during the steps: `free`, they move away from zero and the next round prunes
            again (the paper's); `fixed`, they stay zero and with them the first round's mask; `straight_through`, they
            keep their values beside the block, which runs without them, get its gradients (the straight-through
            estimator, as in SR-STE, arXiv 2102.04010) and may come back in the next round. `free` prunes once more
            after the last steps; the others end with the mask that these were made with.
        compute_dtype: Precision of the block's matrix products: the `model`'s, or `bfloat16` by autocast; weights,
            statistics and scores stay as they are.
        exclude_modules: Names, or regular expressions of names, of modules inside the blocks to leave dense.
        seed: Seed of the draws of calibration samples.

    Raises:
        ValueError: If an option is out of range or two options contradict each other.

    Example:
        >>> PruneOptions(sparsity_pattern="2:4").group
        (2, 4)
        >>> PruneOptions(sparsity_pattern="unstructured", sparsity=0.6).target_sparsity
        0.6
    """

    method: Method = "wanda++"
    sparsity_pattern: str = "2:4"
    sparsity: float | None = None
    sparsity_slope: float = 0.0
    alpha: Alpha = 100.0
    rounds: int = 5
    samples_per_round: int = 32
    optimizer: Optimizer = "rmsprop"
    learning_rate: float = 3e-7
    lr_schedule: LRSchedule = "constant"
    start: Start = "score"
    target: Target = "dense_block"
    samples_per_step: int = 1
    generated_copies: int = 0
    mask_mode: MaskMode = "free"
    compute_dtype: ComputeDtype = "model"
    exclude_modules: tuple[str, ...] = ()
    seed: int = 0

    def __post_init__(self) -> None:
        for name, choices in _CHOICES.items():
            check_choice(name, getattr(self, name), get_args(choices))
        self._check_pattern()
        least = {"rounds": 0, "samples_per_round": 1, "samples_per_step": 1, "generated_copies": 0, "seed": 0}
        for name, smallest in least.items():
            check_at_least(name, getattr(self, name), smallest)
        if self.samples_per_round % self.samples_per_step:
            raise ValueError(
                f"Expected argument `samples_per_step` to divide `samples_per_round` ({self.samples_per_round}), "
                f"but got {self.samples_per_step}"
            )
        if self.alpha != "auto" and (isinstance(self.alpha, str) or not 0 <= self.alpha < float("inf")):
            raise ValueError(
                f'Expected argument `alpha` to be a number of at least 0 or "auto", but got {self.alpha!r}'
            )
        if not 0 < self.learning_rate < float("inf"):
            raise ValueError(f"Expected argument `learning_rate` to be larger than 0, but got {self.learning_rate!r}")
        if isinstance(self.exclude_modules, str):
            raise ValueError(f"Expected argument `exclude_modules` to be a list, but got {self.exclude_modules!r}")
        # a list from YAML would make the record unhashable and unequal to its own copy read from JSON
        object.__setattr__(self, "exclude_modules", tuple(self.exclude_modules))
        for pattern in self.exclude_modules:
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(
                    f"Expected argument `exclude_modules` to hold names or regular expressions, but got {pattern!r} "
                    f"({error})"
                ) from error

    def _check_pattern(self) -> None:
        if self.sparsity_pattern == UNSTRUCTURED:
            if self.sparsity is None or not 0 < self.sparsity < 1:
                raise ValueError(
                    'Expected argument `sparsity` to be between 0 and 1 with sparsity_pattern="unstructured", '
                    f"but got {self.sparsity!r}; 0.5 removes half of each row"
                )
            if not abs(self.sparsity_slope) / 2 < min(self.sparsity, 1 - self.sparsity):
                raise ValueError(
                    "Expected argument `sparsity_slope` to leave every block's sparsity between 0 and 1, but got "
                    f"{self.sparsity_slope!r} with sparsity={self.sparsity!r}"
                )
            return
        if self.sparsity_slope != 0:
            raise ValueError(
                f"Expected argument `sparsity_slope` to be 0 with sparsity_pattern={self.sparsity_pattern!r}, which is "
                f"the same in every block, but got {self.sparsity_slope!r}"
            )
        match = re.fullmatch(r"([1-9]\d*):([1-9]\d*)", str(self.sparsity_pattern))
        if match is None or int(match[1]) >= int(match[2]):
            raise ValueError(
                'Expected argument `sparsity_pattern` to be "unstructured" or "N:M" with N < M (N of M are kept), '
                f'but got {self.sparsity_pattern!r}; write it quoted in YAML, "2:4"'
            )
        if self.sparsity is not None and abs(self.sparsity - self.target_sparsity) > 1e-9:
            raise ValueError(
                f"Expected argument `sparsity` to be left out with sparsity_pattern={self.sparsity_pattern!r}, "
                f"which fixes it to {self.target_sparsity:g}, but got {self.sparsity!r}"
            )

    def of_block(self, index: int, num_blocks: int) -> "PruneOptions":
        """The options of one block: its own sparsity, and no slope.

        Args:
            index: The block, from 0.
            num_blocks: How many there are.

        Example:
            >>> options = PruneOptions(sparsity_pattern="unstructured", sparsity=0.6, sparsity_slope=0.2)
            >>> [round(options.of_block(index, 3).target_sparsity, 6) for index in range(3)]
            [0.5, 0.6, 0.7]
        """
        if self.sparsity_slope == 0 or num_blocks == 1:
            return replace(self, sparsity_slope=0.0)
        assert self.sparsity is not None
        place = index / (num_blocks - 1) - 0.5
        return replace(self, sparsity=self.sparsity + place * self.sparsity_slope, sparsity_slope=0.0)

    @property
    def group(self) -> tuple[int, int] | None:
        """(N kept, of M), or None for an unstructured pattern."""
        if self.sparsity_pattern == UNSTRUCTURED:
            return None
        kept, size = self.sparsity_pattern.split(":")
        return int(kept), int(size)

    @property
    def target_sparsity(self) -> float:
        """Fraction of zeros that the pattern asks for."""
        if self.group is not None:
            return 1 - self.group[0] / self.group[1]
        assert self.sparsity is not None
        return self.sparsity

    @property
    def pattern_label(self) -> str:
        """The pattern for tables: `2:4` or `50%`."""
        return self.sparsity_pattern if self.group is not None else f"{100 * self.target_sparsity:g}%"

    @property
    def uses_calibration(self) -> bool:
        """Whether the method looks at calibration data at all."""
        return self.method != "magnitude"

    @property
    def uses_gradients(self) -> bool:
        """Whether the score holds regional gradients (RGS)."""
        return self.method in ("rgs", "wanda++") and self.alpha != 0

    @property
    def uses_optimisation(self) -> bool:
        """Whether the block is optimised after pruning (RO)."""
        return self.method in ("ro", "wanda++") and self.rounds > 0

    @property
    def num_copies(self) -> int:
        """Generated copies of each sample that are used."""
        return self.generated_copies if self.uses_optimisation else 0

    @property
    def uses_gram(self) -> bool:
        """Whether the first pruning of a block is SparseGPT's, which wants Gram matrices of the inputs."""
        return self.method == "sparsegpt" or (self.uses_optimisation and self.start == "sparsegpt")

    @property
    def keeps_pruned(self) -> bool:
        """Whether pruned weights are trained beside the block."""
        return self.uses_optimisation and self.mask_mode == "straight_through"

    def to_dict(self) -> dict[str, Any]:
        """Plain values only, for JSON and for keys."""
        return {**asdict(self), "exclude_modules": list(self.exclude_modules)}


def num_pruned(count: int, sparsity: float) -> int:
    """How many of so many weights are pruned, rounded down.

    Args:
        count: Weights.
        sparsity: Fraction to prune, meant as the decimal that it is written as: binary fractions lie beside it.

    Example:
        >>> num_pruned(100, 0.29), int(100 * 0.29)
        (29, 28)
    """
    return int(count * sparsity + 1e-6)
