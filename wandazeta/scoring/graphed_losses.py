"""Losses of perturbed adapters whose forward passes are CUDA graphs.

A step of a small model launches thousands of short kernels, and the GPU waits for the host most of the time. A graph
launches all kernels of a forward pass at once. What differs between steps (vectors, tokens, states of the frozen
prefix) is copied to where the graph reads it.

What a graph cannot repeat is that transformers reads, in every forward pass, whether any token is masked, to choose the
attention kernel. So the masks that the blocks get are computed once for each batch, by a forward pass that skips the
blocks, and are an input of the graph, too. Its kernels are those of the usual forward pass, and so are its bits.

Legend: P perturbed adapters, d length of a vector.
"""

import inspect
from collections import Counter
from collections.abc import Callable, Hashable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple
from weakref import ReferenceType, ref

import torch
from torch import Tensor, nn

from wandazeta.models.blocks import StopForward, find_blocks, override_forward, run_until_stopped
from wandazeta.models.encoder import EncoderClassifier
from wandazeta.scoring.frozen_prefix import Prefix, Rows
from wandazeta.scoring.objectives import objective_losses
from wandazeta.scoring.scorer import Prepared, Scorer, Scores
from wandazeta.scoring.tracing import pack_hidden
from wandazeta.utilities.graphs import GraphBackend, GraphedCall

__all__ = ["GraphedLosses"]

# each graph keeps its kernels' arguments on the host and the device, a few MB for thousands of kernels
_MAX_GRAPHS = 32
# largest relative difference between losses with prepared masks and those of the usual forward pass, of equal kernels
_TOLERANCE = 1e-5

Masks = dict[int, Tensor | None]
"""Attention masks by the index of the block."""
_Result = tuple[Tensor, Tensor | None, Tensor | None]
"""Losses `[P]`, and the values and features of `Scores` for a batch with labels."""


class _Layout(NamedTuple):
    """How the inputs of a graph make up a batch.

    Args:
        num_states: Number of states of the frozen prefix; None if it is not reused.
        narrow: Whether the prefix holds the scored positions only.
        has_options: Whether there are answer options.
        has_labels: Whether there are labels.
        masks: Index of a block, and of its mask among the masks; None if it has none.
    """

    num_states: int | None
    narrow: bool
    has_options: bool
    has_labels: bool
    masks: tuple[tuple[int, int | None], ...]


class GraphedLosses:
    """Cross-entropy losses of perturbed adapters, with a CUDA graph for each shape of a batch that recurs.

    Forward passes run as usual where there is no backend, for shapes that have not recurred, and for models that a
    graph cannot repeat. Adapters must be applied by the model's forward alone, and the weights must stay where they are
    and be whole.

    Args:
        scorer: Scorer of the model.
        use: Returns a context in which the model runs with vectors `(P, d)`, each on its share of the rows.
        backend: Captures graphs; None if nothing does.
    """

    def __init__(
        self, scorer: Scorer, use: Callable[[Tensor], AbstractContextManager[None]], backend: GraphBackend | None
    ) -> None:
        self._scorer = scorer
        self._use = use
        self._call = GraphedCall(self._from_tensors, backend=backend)
        self._seen: Counter[Hashable] = Counter()
        self._checked: set[Hashable] = set()
        # lengths of the tuples that blocks return, from the first forward pass
        self._tuple_lengths: dict[int, int] = {}
        self._masks: tuple[ReferenceType[Prepared], dict[int, Masks]] | None = None
        model = scorer.model
        # the mean over positions of an encoder needs the mask as it is
        self._masked = model.encoder if isinstance(model, EncoderClassifier) else model
        self._blocks = list(find_blocks(model)[1]) if backend is not None else []

    def __call__(
        self, theta_Pd: Tensor, prepared: Prepared, on_scores: Callable[[Scores], None] | None = None
    ) -> Tensor:
        """Return the losses `[P]` of a batch.

        Args:
            theta_Pd: The vectors.
            prepared: The batch.
            on_scores: Is called with the scores of options or classes, if the batch has labels.
        """
        losses, values, features = self._losses_and_scores(theta_Pd, prepared)
        if on_scores is not None and values is not None:
            on_scores(Scores(values, features))
        return losses

    def _losses_and_scores(self, theta_Pd: Tensor, prepared: Prepared) -> _Result:
        """Return the losses, and the values and features of the scores, if there are any."""
        if not self._call.is_graphed:
            return self._losses(theta_Pd, prepared)
        shapes = (len(theta_Pd), *(None if tensor is None else tensor.shape for tensor in _tensors(prepared)))
        self._seen[shapes] += 1
        if not self._tuple_lengths:
            with override_forward({block: self._measuring(i, block) for i, block in enumerate(self._blocks)}):
                return self._losses(theta_Pd, prepared)
        if self._seen[shapes] > 1:
            try:
                return self._graphed(shapes, theta_Pd, prepared)
            except torch.OutOfMemoryError:
                raise
            # whatever a model raises that cannot do without its own mask
            except (RuntimeError, ValueError, IndexError, TypeError, KeyError) as error:
                first_line = (str(error).splitlines() or [""])[0]
                kind = type(self._scorer.model).__name__
                self._call.give_up(f"{kind} fails with prepared attention masks: {type(error).__name__}: {first_line}")
        return self._losses(theta_Pd, prepared)

    def _graphed(self, shapes: Hashable, theta_Pd: Tensor, prepared: Prepared) -> _Result:
        """Return the result of a graph, once its losses have been compared with those of the usual forward pass."""
        layout, inputs = self._inputs(prepared, len(theta_Pd))
        if (shapes, layout) in self._checked:
            return self._call(layout, theta_Pd, *inputs)
        result = self._losses(theta_Pd, prepared)
        if len(self._checked) < _MAX_GRAPHS:
            # not captured yet
            found = self._call(layout, theta_Pd, *inputs)
            if not torch.allclose(found[0], result[0], rtol=_TOLERANCE, atol=0.0, equal_nan=True):
                self._call.give_up(f"{type(self._scorer.model).__name__} uses the attention mask outside of its blocks")
            self._checked.add((shapes, layout))
        return result

    def _losses(self, theta_Pd: Tensor, prepared: Prepared) -> _Result:
        scores: list[Scores] = []
        with self._use(theta_Pd):
            losses = objective_losses(None, self._scorer, prepared, len(theta_Pd), on_scores=scores.append)
        return (losses, scores[0].values, scores[0].features) if scores else (losses, None, None)

    def _inputs(self, prepared: Prepared, repeats: int) -> tuple[_Layout, list[Tensor]]:
        """Return the tensors of a batch and of the masks that its blocks get, and what they are."""
        if self._masks is None or self._masks[0]() is not prepared:
            self._masks = (ref(prepared), {})
        by_repeats = self._masks[1]
        if repeats not in by_repeats:
            by_repeats[repeats] = self._record_masks(prepared, repeats)
        masks = by_repeats[repeats]
        distinct = list({id(mask): mask for mask in masks.values() if mask is not None}.values())
        places = {id(mask): place for place, mask in enumerate(distinct)}
        prefix = prepared.prefix
        layout = _Layout(
            None if prefix is None else len(prefix.states),
            prefix is not None and prefix.narrow,
            prepared.option_ids is not None,
            prepared.labels is not None,
            tuple((index, None if mask is None else places[id(mask)]) for index, mask in masks.items()),
        )
        return layout, [tensor for tensor in _tensors(prepared) if tensor is not None] + distinct

    def _from_tensors(self, layout: _Layout, theta_Pd: Tensor, *tensors: Tensor) -> _Result:
        """Return the losses of a batch that is given as tensors."""
        remaining = iter(tensors)
        rows = Rows(*(next(remaining) for _ in range(3)))
        prefix = None
        if layout.num_states is not None:
            prefix = Prefix([next(remaining) for _ in range(layout.num_states)], layout.narrow)
        option_ids, option_mask = (next(remaining) if layout.has_options else None for _ in range(2))
        labels = next(remaining) if layout.has_labels else None
        distinct = list(remaining)
        masks = {index: None if place is None else distinct[place] for index, place in layout.masks}
        forwards: dict[nn.Module, Callable[..., Any]] = {
            self._blocks[index]: _with_mask(self._blocks[index].forward, mask) for index, mask in masks.items()
        }
        # transformers passes 4-D masks on as they are, so that it reads none of them
        unread = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=theta_Pd.device)
        forwards[self._masked] = _with_mask(self._masked.forward, unread, always=True)
        with override_forward(forwards):
            return self._losses(theta_Pd, Prepared(rows, prefix, option_ids, option_mask, labels))

    def _record_masks(self, prepared: Prepared, repeats: int) -> Masks:
        """Return the masks of the blocks that run, by a forward pass that skips the blocks."""
        masks: Masks = {}

        def recording(index: int, block: nn.Module) -> Callable[..., Any]:
            forward = block.forward

            def recorded(*args: Any, **kwargs: Any) -> Any:
                mask = _attention_mask(forward, args, kwargs)
                if mask is not None and not isinstance(mask, Tensor):
                    raise TypeError(f"the blocks get a {type(mask).__name__} as attention mask")
                masks[index] = mask
                if index == len(self._blocks) - 1:
                    raise StopForward(masks)
                hidden = args[0] if args else kwargs["hidden_states"]
                return pack_hidden(hidden, self._tuple_lengths[index])

            return recorded

        with override_forward({block: recording(index, block) for index, block in enumerate(self._blocks)}):
            run_until_stopped(lambda: objective_losses(None, self._scorer, prepared, repeats), token=masks)
        return masks

    def _measuring(self, index: int, block: nn.Module) -> Callable[..., Any]:
        """Return a forward of a block that also records the length of its output."""
        forward = block.forward

        def measured(*args: Any, **kwargs: Any) -> Any:
            output = forward(*args, **kwargs)
            self._tuple_lengths[index] = len(output) if isinstance(output, tuple) else 0
            return output

        return measured


def _tensors(prepared: Prepared) -> list[Tensor | None]:
    """Return all tensors of a batch."""
    rows = prepared.rows
    states = [] if prepared.prefix is None else prepared.prefix.states
    options = (prepared.option_ids, prepared.option_mask)
    return [rows.input_ids, rows.attention_mask, rows.positions, *states, *options, prepared.labels]


def _place(forward: Callable[..., Any], args: Sequence[Any]) -> int | None:
    """Return the index of the attention mask among positional arguments, if it is one of them."""
    names = list(inspect.signature(forward).parameters)
    place = names.index("attention_mask") if "attention_mask" in names else len(args)
    return place if place < len(args) else None


def _attention_mask(forward: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """Return the attention mask of a call; None if there is none."""
    if "attention_mask" in kwargs:
        return kwargs["attention_mask"]
    place = _place(forward, args)
    return None if place is None else args[place]


def _with_mask(forward: Callable[..., Any], mask: Tensor | None, always: bool = False) -> Callable[..., Any]:
    """Return a forward that runs with another attention mask.

    Args:
        forward: The forward of a module.
        mask: The mask.
        always: Pass the mask even if the call has none.
    """

    def masked(*args: Any, **kwargs: Any) -> Any:
        place = _place(forward, args)
        if "attention_mask" in kwargs or (always and place is None):
            kwargs["attention_mask"] = mask
        elif place is not None:
            args = (*args[:place], mask, *args[place + 1 :])
        return forward(*args, **kwargs)

    return masked
