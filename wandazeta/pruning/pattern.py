"""Sparsity patterns: N:M, or a fraction of every row."""

import re
from dataclasses import dataclass, replace
from typing import Any

UNSTRUCTURED = "unstructured"


@dataclass(frozen=True)
class SparsityPattern:
    """Which fraction of the weights is set to zero, and in which groups.

    Args:
        sparsity_pattern: `"N:M"`, of every M consecutive inputs of a row N are kept, or `"unstructured"`; `"auto"` is
            `"unstructured"` if `sparsity` or `sparsity_slope` is given, else `"2:4"`.
        sparsity: Fraction of each row that is set to zero, for `"unstructured"` only; by default 0.5.
        sparsity_slope: Sparsity of the last block minus that of the first; the blocks in between lie on a straight
            line around `sparsity`. For `"unstructured"` only.

    Raises:
        ValueError: If an argument is out of range or two arguments contradict each other.

    Examples:
        >>> SparsityPattern("2:4").group
        (2, 4)
        >>> SparsityPattern("unstructured", sparsity=0.6).label
        '60%'
        >>> SparsityPattern(sparsity=0.6).sparsity_pattern
        'unstructured'
    """

    sparsity_pattern: str = "auto"
    sparsity: float | None = None
    sparsity_slope: float = 0.0

    def __post_init__(self) -> None:
        if self.sparsity_pattern == "auto":
            is_free = self.sparsity is not None or self.sparsity_slope != 0
            object.__setattr__(self, "sparsity_pattern", UNSTRUCTURED if is_free else "2:4")
        if self.sparsity_pattern == UNSTRUCTURED and self.sparsity is None:
            object.__setattr__(self, "sparsity", 0.5)
        if self.sparsity_pattern == UNSTRUCTURED:
            self._check_unstructured()
        else:
            self._check_group()

    def _check_unstructured(self) -> None:
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

    def _check_group(self) -> None:
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

    @property
    def group(self) -> tuple[int, int] | None:
        """(N, M): weights kept in each group, and the group's size; None for an unstructured pattern."""
        if self.sparsity_pattern == UNSTRUCTURED:
            return None
        kept, size = self.sparsity_pattern.split(":")
        return int(kept), int(size)

    @property
    def target_sparsity(self) -> float:
        """Fraction of zeros, over all blocks."""
        if self.group is not None:
            return 1 - self.group[0] / self.group[1]
        assert self.sparsity is not None
        return self.sparsity

    @property
    def label(self) -> str:
        """Short name for tables, such as `2:4` or `50%`."""
        return self.sparsity_pattern if self.group is not None else f"{100 * self.target_sparsity:g}%"

    def of_block(self, index: int, num_blocks: int) -> "SparsityPattern":
        """Return the pattern of one block, which has the block's own sparsity and no slope.

        Args:
            index: Position of the block, from 0.
            num_blocks: Number of blocks.

        Examples:
            >>> pattern = SparsityPattern("unstructured", sparsity=0.6, sparsity_slope=0.2)
            >>> [round(pattern.of_block(index, 3).target_sparsity, 6) for index in range(3)]
            [0.5, 0.6, 0.7]
        """
        if self.sparsity_slope == 0 or num_blocks == 1:
            return replace(self, sparsity_slope=0.0)
        assert self.sparsity is not None
        position = index / (num_blocks - 1) - 0.5
        return replace(self, sparsity=self.sparsity + position * self.sparsity_slope, sparsity_slope=0.0)

    def to_dict(self) -> dict[str, Any]:
        """Return the arguments that have an effect, for JSON and for keys."""
        if self.group is not None:
            return {"sparsity_pattern": self.sparsity_pattern}
        return {
            "sparsity_pattern": self.sparsity_pattern,
            "sparsity": self.sparsity,
            "sparsity_slope": self.sparsity_slope,
        }


def num_pruned(count: int, sparsity: float) -> int:
    """Number of weights to prune, rounded down.

    Args:
        count: Number of weights.
        sparsity: Fraction to prune. Products that binary fractions put just below an integer count as that integer.

    Examples:
        >>> num_pruned(100, 0.29), int(100 * 0.29)
        (29, 28)
    """
    return int(count * sparsity + 1e-6)
