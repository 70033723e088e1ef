"""The model's own weights, trained by forward passes alone and without a copy of them (MeZO, arXiv 2305.17333).

MeZO perturbs the weights in place to both sides and back, and the rounding errors of this stay in them. Here the stored
weights are not perturbed: each module with trained weights runs on a perturbed copy of its own weights, which is made
when the module is called and freed afterwards, from directions that are drawn again. So nothing has to be restored, and
the extra memory is that of the largest module's weights. Large embedding tables are perturbed in parts, and only in the
rows that are looked up.

Estimators and update rules see the weights as coordinates along the Q directions of the step: the current weights are
the origin, a query is a unit vector, and an update is Q numbers. Legend: Q queries, D features, R rows of a matrix.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from hashlib import blake2b
from struct import pack
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from typing_extensions import override

from wandazeta.adapters.sites import is_linear
from wandazeta.adapters.trained_vector import TrainedVector
from wandazeta.models.blocks import override_forward
from wandazeta.models.experts import fused_weights
from wandazeta.models.sparsity import is_pruned
from wandazeta.utilities.random_streams import Direction, Directions, direction, stream
from wandazeta.utilities.signals import DeferredSignals

PART = 1 << 20
"""Values that are drawn at once; each part of a weight has its own random stream."""

Forward = Callable[..., Any]


class InPlaceWeights(TrainedVector):
    """Perturbs weights of a model during a forward, and updates them in place, along the directions of a step.

    Zeros in pruned Linears and experts are neither perturbed nor trained. The directions are Gaussian and drawn on the
    device of the weights.

    Args:
        model: The model.
        names: Names of its trained parameters; other names of the same parameter make no difference.

    Raises:
        ValueError: If a trained weight is not in float32.
    """

    folds_queries = False
    supports_prefix = False

    def __init__(self, model: nn.Module, names: Iterable[str]) -> None:
        super().__init__()
        trained = {id(model.get_parameter(name)) for name in names}
        keys: dict[int, int] = {}
        self._owners: dict[nn.Module, dict[str, int]] = {}
        parameter_names, self._pruned = [], set()
        for prefix, module in model.named_modules():
            for name, parameter in module._parameters.items():
                if id(parameter) not in trained:
                    continue
                key = keys.setdefault(id(parameter), len(keys))
                self._owners.setdefault(module, {})[name] = key
                parameter_names.append(f"{prefix}.{name}".lstrip("."))
                if _is_pruned(module, name, parameter):
                    self._pruned.add(key)
        self.parameter_names = frozenset(parameter_names)
        self._num_parameters = sum(parameter.numel() for parameter in self.weights())
        self.prepare_fit()
        self._large = max(PART, sum(p.numel() for p in model.parameters()) // 64)
        get_embeddings = getattr(model, "get_input_embeddings", None)
        # nn.Module.__setattr__ would register it
        self.__dict__["_lookup"] = None if get_embeddings is None else get_embeddings()
        self._moves: list[tuple[int, float]] = []
        self.start_step(0, 0, 0)

    def weights(self) -> list[nn.Parameter]:
        """Return the trained weights, each once."""
        return list(self._keyed().values())

    def _keyed(self) -> dict[int, nn.Parameter]:
        owned = ((owner, name, key) for owner, names in self._owners.items() for name, key in names.items())
        return {key: owner.get_parameter(name) for owner, name, key in owned}

    @property
    @override
    def num_parameters(self) -> int:
        return self._num_parameters

    @override
    def prepare_fit(self) -> None:
        # a precision plugin may have cast the weights since they were loaded
        dtype = next((weight.dtype for weight in self.weights() if weight.dtype != torch.float32), None)
        if dtype is not None:
            raise ValueError(
                f"Expected trained weights in float32, but got {dtype}, whose rounding is larger than the updates; set "
                "`loading.dtype` to float32 and `precision` to one that keeps the weights, such as bf16-mixed"
            )

    @override
    def description(self) -> dict[str, Any]:
        sites = blake2b("\n".join(sorted(self.parameter_names)).encode(), digest_size=8).hexdigest()
        return {"kind": "weights", "sites": sites, "num_parameters": self.num_parameters}

    @override
    def start_step(self, seed: int, step: int, num_queries: int, draw: Direction = direction) -> Directions:
        """Begin a step: `theta` becomes the coordinates along its directions, zeros of shape `(Q,)`.

        Args:
            seed: Base seed of the run.
            step: Global step.
            num_queries: Queries of the step, Q.
            draw: Distribution of the directions; only the Gaussian one is supported.

        Returns:
            The directions in these coordinates, unit vectors.
        """
        assert draw is direction
        self._seed, self._step = seed, step
        self.theta = torch.zeros(num_queries, dtype=torch.float32, device=self.weights()[0].device)
        return torch.eye(num_queries, dtype=torch.float32, device=self.theta.device).__getitem__

    @override
    @contextmanager
    def use(self, theta_Pd: Tensor) -> Iterator[None]:
        """Run the model with weights at other coordinates; signals are deferred to the end of the context.

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

    @override
    def apply_update(self, updated: Tensor, decay: float, stored: Sequence[Tensor], new: Sequence[Tensor]) -> None:
        moves = _moves(updated)
        with torch.no_grad(), DeferredSignals():
            for key, weight in self._keyed().items():
                if decay and weight.ndim >= 2:
                    weight.mul_(1 - decay)
                for part in range(_num_parts(weight) if moves else 0):
                    _part(weight, part).add_(self._shift(weight, key, part, moves))
            for tensor, value in zip(stored, new, strict=True):
                tensor.copy_(value)

    @override
    def drift_probe(self) -> Tensor:
        # one value for each weight
        return torch.stack([weight.detach().sum() for weight in self.weights()])

    @override
    def rows(self, linear: nn.Linear, ids: Tensor) -> tuple[Tensor, Tensor | None]:
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
        """Look tokens up in a perturbed table of those that occur in the batch."""
        unique, places = ids.unique(return_inverse=True)
        table = self._moved_rows(embedding.weight, self._owners[embedding]["weight"], unique)
        # the padding index matters for gradients only, and may be out of the range of this table
        padding, embedding.padding_idx = embedding.padding_idx, None
        try:
            with _swapped(embedding, {"weight": table}):
                return forward(places)
        finally:
            embedding.padding_idx = padding

    def _in_parts(self, linear: nn.Linear, x: Tensor) -> Tensor:
        """Apply a Linear in parts of its rows."""
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
        """Return the shift of a part of a weight: the sum of lengths times directions, zero at pruned places."""
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


def _is_pruned(module: nn.Module, name: str, parameter: nn.Parameter) -> bool:
    if name in fused_weights(module):
        # every output feature has zeros in at least one of the experts
        return is_pruned(parameter, rows_dim=2 if module.is_transposed else 1)
    return name == "weight" and is_linear(module) and is_pruned(parameter)


def _moves(coordinates: Tensor) -> list[tuple[int, float]]:
    """Return the queries whose coordinate is not zero, each with its coordinate."""
    return [(query, length) for query, length in enumerate(coordinates.tolist()) if length != 0]


def _rows_of_part(weight: Tensor) -> int:
    return max(1, PART // max(1, weight[0].numel()))


def _num_parts(weight: Tensor) -> int:
    return -(-len(weight) // _rows_of_part(weight))


def _part(weight: Tensor, part: int) -> Tensor:
    """Return a part of a weight, which consists of whole rows, as a flat view."""
    rows = _rows_of_part(weight)
    return weight.detach()[part * rows : (part + 1) * rows].view(-1)


@contextmanager
def _swapped(module: nn.Module, tensors: dict[str, Tensor]) -> Iterator[None]:
    """Temporarily replace parameters of a module by other tensors."""
    own = {name: module._parameters[name] for name in tensors}
    try:
        module._parameters.update(tensors)  # type: ignore[arg-type]
        yield
    finally:
        module._parameters.update(own)
