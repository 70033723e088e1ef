"""A model's own weights, trained by forward passes alone and without a copy of them (MeZO, arXiv 2305.17333).

MeZO walks the weights to both sides and back, and every rounding on the way stays in them. Here they stay where they
are: each module that owns some runs on a moved copy of its own alone, made when it is called and gone afterwards, from
directions that are drawn again. So nothing has to be restored, and the memory is that of the largest module's weights.
Large tables of tokens are moved in parts, and only where tokens are looked up.

What estimators and updates see is not the weights but coordinates along the Q directions of the step: the weights are
at the origin, a query is a unit vector, and a step is Q numbers. Legend: Q queries, D features, R rows of a matrix.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from hashlib import blake2b
from struct import pack
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from wandazeta.adapters.sites import is_linear
from wandazeta.models.blocks import override_forward
from wandazeta.utilities.signals import DeferredSignals
from wandazeta.zeroth_order.directions import Direction, Directions, direction, stream

PART = 1 << 20
"""Values that are drawn at once: each part of a tensor has a stream of its own."""

Forward = Callable[..., Any]


class InPlaceWeights(nn.Module):
    """Moves weights of a model along directions of a step, for a forward or for good.

    Weights of pruned Linears that are zero are neither moved nor trained. The directions are Gaussian, drawn on the
    device of the weights.

    Args:
        model: The model.
        names: Its parameters that are trained; further names of the same parameter do not matter.

    Raises:
        ValueError: If a trained weight is not in 32 bits.
    """

    folds = False
    """Whether several copies go through one forward."""

    def __init__(self, model: nn.Module, names: Iterable[str]) -> None:
        super().__init__()
        trained = {id(model.get_parameter(name)) for name in names}
        keys: dict[int, int] = {}
        self._owners: dict[nn.Module, dict[str, int]] = {}
        model_names, self._pruned = [], set()
        for prefix, module in model.named_modules():
            for name, parameter in module._parameters.items():
                if id(parameter) not in trained:
                    continue
                key = keys.setdefault(id(parameter), len(keys))
                self._owners.setdefault(module, {})[name] = key
                model_names.append(f"{prefix}.{name}".lstrip("."))
                if name == "weight" and is_linear(module) and _is_pruned(parameter):
                    self._pruned.add(key)
        self.model_names = frozenset(model_names)
        self.num_parameters = sum(parameter.numel() for parameter in self.weights())
        self.require_fp32()
        self._large = max(PART, sum(p.numel() for p in model.parameters()) // 64)
        get_embeddings = getattr(model, "get_input_embeddings", None)
        # past nn.Module.__setattr__, which would register it
        self.__dict__["_lookup"] = None if get_embeddings is None else get_embeddings()
        self._moves: list[tuple[int, float]] = []
        self.start(0, 0, 0)

    def weights(self) -> list[nn.Parameter]:
        """The trained weights, each once."""
        return list(self._keyed().values())

    def _keyed(self) -> dict[int, nn.Parameter]:
        owned = ((owner, name, key) for owner, names in self._owners.items() for name, key in names.items())
        return {key: owner.get_parameter(name) for owner, name, key in owned}

    def require_fp32(self) -> None:
        """Refuse weights in 16 bits.

        Raises:
            ValueError: If there are any.
        """
        dtype = next((weight.dtype for weight in self.weights() if weight.dtype != torch.float32), None)
        if dtype is not None:
            raise ValueError(
                f"Expected trained weights in float32, but got {dtype}, which would round steps of this size away; set "
                "`dtype` to float32 and `precision` to one that keeps the weights, such as bf16-mixed"
            )

    def description(self) -> dict[str, Any]:
        """What was trained, in plain values."""
        sites = blake2b("\n".join(sorted(self.model_names)).encode(), digest_size=8).hexdigest()
        return {"kind": "weights", "sites": sites, "num_parameters": self.num_parameters}

    def start(self, seed: int, step: int, num_queries: int, draw: Direction = direction) -> Directions:
        """Go to a step; `theta`, zeros of shape `(Q,)`, are coordinates along its directions.

        Args:
            seed: Base seed of the run.
            step: Global step.
            num_queries: Queries of the step, Q.
            draw: Distribution of the directions; only the Gaussian one, which is drawn where the weights are.

        Returns:
            The directions in these coordinates: unit vectors.
        """
        assert draw is direction
        self._seed, self._step = seed, step
        self.theta = torch.zeros(num_queries, device=self.weights()[0].device)
        return torch.eye(num_queries, device=self.theta.device).__getitem__

    @contextmanager
    def use(self, theta_Pd: Tensor) -> Iterator[None]:
        """Run the model with weights at other coordinates; signals are put off until it is over.

        Args:
            theta_Pd: One row of coordinates, shape `(1, Q)`.
        """
        if theta_Pd.shape != (1, len(self.theta)):
            raise ValueError(
                f"Expected argument `theta_Pd` to have shape (1, {len(self.theta)}), but got {tuple(theta_Pd.shape)}."
            )
        self._moves = _moves(theta_Pd[0])
        forwards = {owner: self._moved_forward(owner) for owner in self._owners} if self._moves else {}
        try:
            with DeferredSignals(), override_forward(forwards):
                yield
        finally:
            self._moves = []

    def store(self, updated: Tensor, shrink: float, stored: Sequence[Tensor], new: Sequence[Tensor]) -> None:
        """Move the weights for good, and note it down.

        Args:
            updated: Coordinates `(Q,)` to go to.
            shrink: Share that matrices lose first, the decay.
            stored: Tensors that say how far training is.
            new: Their new values.
        """
        moves = _moves(updated)
        with torch.no_grad(), DeferredSignals():
            for key, weight in self._keyed().items():
                if shrink and weight.ndim >= 2:
                    weight.mul_(1 - shrink)
                for part in range(_num_parts(weight) if moves else 0):
                    _part(weight, part).add_(self._shift(weight, key, part, moves))
            for tensor, value in zip(stored, new, strict=True):
                tensor.copy_(value)

    def checked(self) -> Tensor:
        """One value for each weight tensor, by which ranks that drifted apart are noticed."""
        return torch.stack([weight.detach().sum() for weight in self.weights()])

    def rows(self, linear: nn.Linear, ids: Tensor) -> tuple[Tensor, Tensor | None]:
        """Rows `(…, D)` of a Linear's weight and `(…)` of its bias, moved if others are in use.

        Args:
            linear: The Linear, trained or not.
            ids: Which rows, `(R,)`.
        """
        keys, bias = self._owners.get(linear, {}), linear.bias
        weight = self._moved_rows(linear.weight, keys["weight"], ids) if "weight" in keys else linear.weight[ids]
        if bias is None:
            return weight, None
        return weight, (self._moved(bias, keys["bias"]) if "bias" in keys else bias)[ids]

    def _moved_forward(self, owner: nn.Module) -> Forward:
        forward, keys = owner.forward, self._owners[owner]
        weight = owner._parameters.get("weight")
        if weight is not None and "weight" in keys and weight.numel() > self._large:
            if owner is self._lookup:
                return lambda ids: self._look_up(owner, forward, ids)
            if type(owner) is nn.Linear:
                return lambda x: self._in_parts(owner, x)

        def moved(*args: Any, **kwargs: Any) -> Any:
            with _swapped(owner, {name: self._moved(owner.get_parameter(name), key) for name, key in keys.items()}):
                return forward(*args, **kwargs)

        return moved

    def _look_up(self, embedding: Any, forward: Forward, ids: Tensor) -> Tensor:
        """Look tokens up in a table of those that occur."""
        unique, places = ids.unique(return_inverse=True)
        table = self._moved_rows(embedding.weight, self._owners[embedding]["weight"], unique)
        padding, embedding.padding_idx = embedding.padding_idx, None  # may be beyond this table; it is for gradients
        try:
            with _swapped(embedding, {"weight": table}):
                return forward(places)
        finally:
            embedding.padding_idx = padding

    def _in_parts(self, linear: nn.Linear, x: Tensor) -> Tensor:
        """Apply a Linear part by part of its rows."""
        output = None
        for start in range(0, linear.out_features, _rows_of_part(linear.weight)):
            ids = torch.arange(start, min(start + _rows_of_part(linear.weight), linear.out_features), device=x.device)
            part = F.linear(x, *self.rows(linear, ids))
            if output is None:
                output = part.new_empty(*x.shape[:-1], linear.out_features)
            output[..., start : start + len(ids)] = part
        assert output is not None
        return output

    def _moved(self, weight: Tensor, key: int) -> Tensor:
        moved = torch.empty_like(weight, requires_grad=False)
        for part in range(_num_parts(weight)):
            torch.add(_part(weight, part), self._shift(weight, key, part, self._moves), out=_part(moved, part))
        return moved

    def _moved_rows(self, weight: Tensor, key: int, ids: Tensor) -> Tensor:
        rows, parts = weight.detach()[ids], ids // _rows_of_part(weight)
        for part in parts.unique().tolist() if self._moves else []:
            here = parts == part
            shift_RD = self._shift(weight, key, part, self._moves).view(-1, *weight.shape[1:])
            rows[here] += shift_RD[ids[here] - part * _rows_of_part(weight)]
        return rows

    def _shift(self, weight: Tensor, key: int, part: int, moves: Sequence[tuple[int, float]]) -> Tensor:
        """What is added to a part of a weight: the sum of the moves times the directions, zero where it is pruned."""
        values = _part(weight.detach(), part)
        digest = blake2b(pack("<qqq", self._seed, key, part), digest_size=8).digest()
        seed = int.from_bytes(digest, "little", signed=True)
        shift = torch.zeros_like(values)
        generator = torch.Generator(values.device)
        z = torch.empty_like(values)
        for query, length in moves:
            z.normal_(generator=generator.manual_seed(stream(seed, self._step, query)))
            shift.add_(z, alpha=length)
        return shift.mul_(values != 0) if key in self._pruned else shift


def _moves(coordinates: Tensor) -> list[tuple[int, float]]:
    """Queries along which to go, and how far."""
    return [(query, length) for query, length in enumerate(coordinates.tolist()) if length != 0]


def _rows_of_part(weight: Tensor) -> int:
    return max(1, PART // max(1, weight[0].numel()))


def _num_parts(weight: Tensor) -> int:
    return -(-len(weight) // _rows_of_part(weight))


def _part(weight: Tensor, part: int) -> Tensor:
    """Whole rows of a weight, as a flat view."""
    rows = _rows_of_part(weight)
    return weight.detach()[part * rows : (part + 1) * rows].view(-1)


@contextmanager
def _swapped(module: nn.Module, tensors: dict[str, Tensor]) -> Iterator[None]:
    """Give a module other tensors for its parameters."""
    own = {name: module._parameters[name] for name in tensors}
    try:
        module._parameters.update(tensors)  # type: ignore[arg-type]
        yield
    finally:
        module._parameters.update(own)


def _is_pruned(weight: Any) -> bool:
    """Whether a matrix was pruned: then every row lost some; a zero by chance is in few of them."""
    # part by part: of a whole table of tokens these would be as large as the table, and a dense one ends it at once
    parts = weight.detach().split(_rows_of_part(weight))
    return all(bool((part == 0).any(1).all()) for part in parts) and any(bool(part.any()) for part in parts)
