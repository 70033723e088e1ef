"""Input statistics of layers, collected by forward hooks."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import combinations
from typing import Any

import torch
from torch import Tensor, nn

from wandazeta.models.blocks import StopForward
from wandazeta.models.experts import ExpertLayer
from wandazeta.pruning.method.layers import weight_view
from wandazeta.pruning.method.tokens import select_rows
from wandazeta.utilities.ranks import Ranks

# values squared at once: one MiB of float32
SQUARES_AT_ONCE = 2**18
GRAM_TILE = 512


class InputStatistics:
    """Sums over the inputs of layers: Σx² of every feature and, for SparseGPT, the Gram matrix Σxxᵀ.

    Args:
        layers: The layers by name.
        with_gram: Collect Gram matrices, too.

    Examples:
        >>> layer = nn.Linear(2, 1)
        >>> statistics = InputStatistics({"layer": layer})
        >>> with statistics.collect(), statistics.sample():
        ...     _ = layer(torch.tensor([[[3.0, 1.0], [4.0, 0.0]]]))
        >>> statistics.norm("layer")
        tensor([5., 1.])
    """

    def __init__(self, layers: Mapping[str, nn.Linear], with_gram: bool = False) -> None:
        self._layers = dict(layers)
        self._with_gram = with_gram
        self._mask: Tensor | None = None
        self._last: tuple[Tensor, int, Tensor, Tensor | None] | None = None
        self.seen: list[tuple[str, int]] = []
        """The layers that have run in this forward, in order, each with the number of tokens that have reached it. A
        graph that is replayed runs no hooks, so who replays it sets what its capture has seen."""
        self._stop_at: str | None = None
        # name of the layer that runs last, by shape of the hidden states; None if a layer runs twice or not at all
        self._last_layers: dict[torch.Size, str | None] = {}
        # layers without an entry were reached by no token
        self._num_tokens: dict[str, int] = {}
        # never replaced, as graphs add to them
        self._sums: dict[str, Tensor] = {}
        self._grams: dict[str, Tensor] = {}
        self._earlier: dict[str, Tensor] = {}
        self.num_samples = 0

    def reset(self) -> None:
        """Discard all samples; a layer that does not run afterwards, such as a rare expert, keeps its last norm."""
        self._earlier.update({name: self.norm(name) for name in self._num_tokens})
        self._num_tokens.clear()
        for total in (*self._sums.values(), *self._grams.values()):
            total.zero_()
        self.num_samples = 0

    def close(self) -> None:
        """Drop all tensors, whoever still refers to this object."""
        for tensors in (self._layers, self._sums, self._grams, self._earlier):
            tensors.clear()
        self._mask = self._last = None

    @contextmanager
    def collect(self) -> Iterator[None]:
        """Collect statistics from every forward of the layers inside the context."""
        handles = [
            layer.register_forward_pre_hook(self._hook(name), with_kwargs=True) for name, layer in self._layers.items()
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
            self._last = None

    @contextmanager
    def sample(
        self,
        mask: Tensor | None = None,
        num_samples: int = 1,
        shape: torch.Size | None = None,
        may_stop: bool = False,
    ) -> Iterator[None]:
        """Context of one forward of the block, inside `collect`.

        Args:
            mask: Positions that are no padding, bool of shape (samples, tokens); None if all are.
            num_samples: Number of samples in the batch.
            shape: Shape of the hidden states.
            may_stop: The output is not used, so the forward may end at the last layer; it does once a complete forward
                with this shape has shown that every layer runs exactly once.
        """
        self._mask = mask
        self.seen = []
        self._stop_at = self._last_layers.get(shape) if shape is not None and may_stop else None
        try:
            yield
        except StopForward as signal:
            if signal.token is not self:
                raise
        else:
            if shape is not None:
                names = [name for name, _ in self.seen]
                self._last_layers[shape] = names[-1] if sorted(names) == sorted(self._layers) else None
        finally:
            # a reference to the activation would keep its graph alive
            self._last = None
            self._stop_at = None
        for name, num_tokens in self.seen:
            if num_tokens:
                self._num_tokens[name] = self.num_tokens(name) + num_tokens
        self.num_samples += num_samples

    def norm(self, name: str) -> Tensor:
        """Norm of each input feature, `‖X_j‖ = sqrt(mean over samples of the per-sample Σx²)`, as in Wanda.

        Args:
            name: Name of the layer.

        Returns:
            Float32 of shape (in,).

        Raises:
            ValueError: If the layer never ran.
        """
        if name not in self._num_tokens and name in self._earlier:
            return self._earlier[name]
        self._require(name)
        return (self._sums[name] / max(self.num_samples, 1)).sqrt().float()

    def num_tokens(self, name: str) -> int:
        """Number of tokens that have reached a layer since the last `reset`.

        Args:
            name: Name of the layer.
        """
        return self._num_tokens.get(name, 0)

    def gram_groups(self) -> list[tuple[Tensor, list[str]]]:
        """Gram matrices with the layers that share each of them, such as query, key and value.

        Returns:
            Pairs of a float32 matrix of shape (in, in), summed over all positions, and layer names. Layers of experts
            share none, and those that no token has reached are left out.

        Raises:
            ValueError: If a layer did not run.
        """
        of_experts: list[tuple[Tensor, list[str]]] = []
        names: list[str] = []
        for name, layer in self._layers.items():
            if isinstance(layer, ExpertLayer):
                of_experts += [(self._grams[name], [name])] if name in self._num_tokens else []
            else:
                self._require(name)
                names.append(name)
        # nearly all pairs that differ do so on the diagonal; each round of comparisons is one read of the device
        pairs = [(a, b) for a, b in combinations(names, 2) if self._grams[a].shape == self._grams[b].shape]
        pairs = _equal_pairs(pairs, {name: self._grams[name].diagonal() for name in names})
        same = set(_equal_pairs(pairs, self._grams))
        found: list[tuple[Tensor, list[str]]] = []
        for name in names:
            group = next((group for _, group in found if (group[0], name) in same), None)
            if group is None:
                found.append((self._grams[name], [name]))
            else:
                group.append(name)
        return found + of_experts

    def all_reduce(self, ranks: Ranks) -> None:
        """Sum the statistics over all ranks.

        Args:
            ranks: The ranks; each has collected from its own samples since the last `reset`.
        """
        if ranks.size == 1:
            return
        for name, layer in self._layers.items():
            width = weight_view(layer).shape[1]
            num_tokens = int(ranks.sum(self.num_tokens(name)))
            if not num_tokens:
                continue
            self._num_tokens[name] = num_tokens
            device = layer.weight.device
            sums = self._sums.setdefault(name, torch.zeros(width, dtype=torch.float64, device=device))
            ranks.all_reduce_([sums])
            if self._with_gram:
                zeros = torch.zeros(width, width, dtype=torch.float32, device=device)
                ranks.all_reduce_([self._grams.setdefault(name, zeros)])
        self.num_samples = int(ranks.sum(self.num_samples))

    def _require(self, name: str) -> None:
        if name not in self._num_tokens:
            raise ValueError(
                f"Expected every layer of the block to run on the calibration data, but `{name}` did not; "
                "add it to `exclude_modules` to leave it dense"
            )

    def _hook(self, name: str) -> Any:
        def hook(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x = args[0] if args else next(iter(kwargs.values()))
            # query, key and value get the same tensor: compute its products once
            if self._last is None or self._last[0] is not x:
                routed = args[1:] if isinstance(layer, ExpertLayer) else ()
                self._last = (x, *self._products(name, x, *routed))
            _, num_tokens, squares, gram = self._last
            if num_tokens:
                if name not in self._sums:
                    self._sums[name] = torch.zeros_like(squares)
                self._sums[name].add_(squares)
                if gram is not None:
                    self._grams.setdefault(name, torch.zeros_like(gram)).add_(gram)
            self.seen.append((name, num_tokens))
            # if the order has changed, the layer that ran last before may run earlier than others
            if name == self._stop_at and len({seen for seen, _ in self.seen}) == len(self._layers):
                raise StopForward(self)

        return hook

    def _products(
        self, name: str, x: Tensor, tokens: Tensor | None = None, num_positions: int | None = None
    ) -> tuple[int, Tensor, Tensor | None]:
        """Return the number of rows that are no padding, their Σx² and their Σxxᵀ.

        Args:
            name: Name of the layer.
            x: Its input.
            tokens: For an expert, the position of each row among all tokens; None if the rows are all of them.
            num_positions: For an expert, the number of all tokens.
        """
        rows = x.detach().reshape(-1, x.shape[-1])
        if self._mask is not None:
            num_positions = rows.shape[0] if num_positions is None else num_positions
            if num_positions != self._mask.numel():
                raise ValueError(
                    f"Expected {self._mask.numel()} positions at the input of `{name}`, but got {num_positions}: "
                    "padding cannot be told from text there; calibrate on samples without padding, or exclude the layer"
                )
            rows = select_rows(rows, self._mask) if tokens is None else rows[self._mask.reshape(-1)[tokens]]
        if not self._with_gram:
            return len(rows), _square_sums(rows), None
        # without the block's autocast: a Gram matrix rounded to bfloat16 has negative eigenvalues
        with torch.autocast(rows.device.type, enabled=False):
            return len(rows), _square_sums(rows), _gram(rows)


def _equal_pairs(pairs: Sequence[tuple[str, str]], tensors: Mapping[str, Tensor]) -> list[tuple[str, str]]:
    """Return the pairs of names whose tensors are equal."""
    if not pairs:
        return []
    equal = torch.stack([(tensors[a] == tensors[b]).all() for a, b in pairs]).tolist()
    return [pair for pair, is_equal in zip(pairs, equal, strict=True) if is_equal]


def _square_sums(rows: Tensor) -> Tensor:
    """Σx² of every column, in pieces on a CPU, where allocating all squares takes longer than adding them."""
    pieces = rows.split(max(1, SQUARES_AT_ONCE // rows.shape[1])) if rows.device.type == "cpu" else (rows,)
    # in float64, so that small terms are not lost in large sums
    return torch.stack([piece.float().square().sum(0).double() for piece in pieces]).sum(0)


def _gram(rows: Tensor) -> Tensor:
    """Σxxᵀ in float32; on a CPU in tiles, of which those below the diagonal are copied from those above it."""
    if rows.is_cuda and rows.element_size() == 2:
        # products of 16-bit values are exact in float32, in which tensor cores sum them
        return torch.mm(rows.t(), rows, out_dtype=torch.float32)
    rows = rows.float()
    if rows.is_cuda:
        return rows.t() @ rows
    gram = rows.new_empty(rows.shape[1], rows.shape[1])
    starts = range(0, rows.shape[1], GRAM_TILE)
    for row, left in zip(starts, rows.split(GRAM_TILE, dim=1), strict=True):
        for column, right in zip(starts, rows.split(GRAM_TILE, dim=1), strict=True):
            if column >= row:
                tile = left.t() @ right
                gram[row : row + GRAM_TILE, column : column + GRAM_TILE] = tile
                gram[column : column + GRAM_TILE, row : row + GRAM_TILE] = tile.t()
    return gram
