"""Losses of a causal language model, over answer options and over tokens.

Legend: B examples, C answer options, L tokens of the longest option, R rows run by the model, S scored positions of a
row, P perturbed adapters, T tokens, V vocabulary.
"""

import warnings
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from wandazeta.models.blocks import override_forward
from wandazeta.models.positions import check_positions, max_positions
from wandazeta.scoring.frozen_prefix import FrozenPrefix, Prefix, Rows, at_positions

__all__ = [
    "Prepared",
    "Scorer",
    "Scores",
    "check_mask",
    "is_classification",
    "option_losses",
    "option_rows",
    "token_losses",
]

Head = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Prepared:
    """A batch that is ready to be scored any number of times.

    Args:
        rows: Token sequences that the model runs: one row for each example, or for each example and option if options
            have several tokens.
        prefix: Frozen prefix of the rows, if it is reused.
        option_ids: Tokens of the options `[C, L]`; None for running text.
        option_mask: True for tokens, false for padding, `[C, L]`.
        labels: Indices of the right options or classes `[B]`.
    """

    rows: Rows
    prefix: Prefix | None
    option_ids: Tensor | None = None
    option_mask: Tensor | None = None
    labels: Tensor | None = None


@dataclass(frozen=True)
class Scores:
    """Scores of the answer options or classes, and the features that they were computed from.

    Args:
        values: Scores `[P, B, C]` in float64.
        features: Input of the output head at the position where the answer begins, `[P·B, D]`; None if a scorer does
            not have them.
    """

    values: Tensor
    features: Tensor | None = None


def option_rows(batch: Mapping[str, Tensor]) -> Rows:
    """Return the rows that score every option after every prompt.

    If all options are single tokens, the rows are the prompts, scored at their last token. Otherwise there is a row for
    every prompt and option: the prompt followed by the option without its last token, scored where each token of the
    option is predicted. Shorter options repeat their last scored position.

    Args:
        batch: A classification batch with `input_ids`, `attention_mask`, `option_ids` and `option_mask`.
    """
    ids_BT, mask_BT, options_CL = batch["input_ids"], batch["attention_mask"], batch["option_ids"]
    lengths_B = mask_BT.sum(1)
    (num_options, longest), (num_prompts, width) = options_CL.shape, ids_BT.shape
    if longest == 1:
        return Rows(ids_BT, mask_BT, lengths_B[:, None] - 1)
    spare = longest - 1
    ids = F.pad(ids_BT, (0, spare))[:, None].expand(-1, num_options, -1).clone()
    steps = torch.arange(width + spare, device=ids.device)
    places = lengths_B[:, None] + steps[:spare]
    ids.scatter_(2, places[:, None].expand(-1, num_options, -1), options_CL[:, :-1].expand(num_prompts, -1, -1))
    ends = lengths_B[:, None] + batch["option_mask"].sum(1) - 1
    mask = (steps < ends[..., None]).to(mask_BT.dtype)
    positions = torch.minimum(lengths_B[:, None, None] - 1 + steps[:longest], ends[..., None] - 1)
    return Rows(ids.flatten(0, 1) * mask.flatten(0, 1), mask.flatten(0, 1), positions.flatten(0, 1))


def is_classification(batch: Mapping[str, Tensor]) -> bool:
    """Whether a batch is to be classified; otherwise it is running text."""
    return "label" in batch


def option_losses(scores_PBC: Tensor, labels_B: Tensor) -> Tensor:
    """Return the mean cross-entropy over the options, `[P]`."""
    repeats, _, num_options = scores_PBC.shape
    losses = F.cross_entropy(scores_PBC.reshape(-1, num_options), labels_B.repeat(repeats), reduction="none")
    return losses.view(repeats, -1).mean(1)


def token_losses(nll_PBT: Tensor, prepared: Prepared) -> Tensor:
    """Return the mean negative log-likelihood of the tokens of a batch, `[P]` in float64."""
    return nll_PBT.double().sum((1, 2)) / prepared.rows.attention_mask[:, 1:].sum()


class Scorer:
    """Runs a causal language model and computes no more logits than a loss needs.

    The model's own forward is used throughout; its output embeddings see the scored positions only, and compute only
    the logits of the options if these are single tokens. So scaling and soft-capping of logits remain the model's own.

    Args:
        model: Causal language model of transformers, or one with the same interface.
        prefix: Reuses what lies below the adapters; None runs the whole model each time. Can be set later.
        max_logits: Largest number of logits of a forward over all tokens, which bounds the perturbed adapters of one
            forward.

    Raises:
        ValueError: If the model has no output embeddings.
    """

    def __init__(self, model: nn.Module, prefix: FrozenPrefix | None = None, max_logits: int = 2**28) -> None:
        self.model = model
        self.prefix = prefix
        self.max_logits = max_logits
        self._head_rows: Callable[[nn.Linear, Tensor], tuple[Tensor, Tensor | None]] = _rows
        self._answers: Head | None = None
        self._prefix_checked = False
        self._max_positions = max_positions(model)
        if self.head is None:
            raise ValueError(f"Expected a language model with output embeddings, but got {type(model).__name__}")

    def adapt(
        self,
        *,
        head_rows: Callable[[nn.Linear, Tensor], tuple[Tensor, Tensor | None]] | None = None,
        answers: Head | None = None,
    ) -> None:
        """Take trained values into account that the forward of the model does not apply by itself.

        Args:
            head_rows: Returns the rows of the output embeddings' weight and bias with these indices; for weights that
                are perturbed while they are used.
            answers: Returns what is added to the scores of the options `[P·B, C]`, from the features `[P·B, D]` where
                the answer begins.
        """
        self._head_rows = head_rows or self._head_rows
        self._answers = answers or self._answers

    @property
    def head(self) -> nn.Module:
        """The output embeddings of the model."""
        return self.model.get_output_embeddings()  # type: ignore[operator]

    def prepare(self, batch: Mapping[str, Tensor]) -> Prepared:
        """Lay out a batch in rows and look up their frozen prefix.

        Args:
            batch: `input_ids` and `attention_mask`; for classification also `label`, `option_ids` and `option_mask`.

        Raises:
            ValueError: If a sequence is empty or padded on the left, or an answer option is missing or empty.
        """
        check_mask(batch)
        _check_options(batch)
        ids, mask = batch["input_ids"], batch["attention_mask"]
        if is_classification(batch):
            extra = {"option_ids": batch["option_ids"], "option_mask": batch["option_mask"], "labels": batch["label"]}
            return self.with_prefix(option_rows(batch), **extra)
        places = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
        return self.with_prefix(Rows(ids, mask, torch.minimum(places, mask.sum(1, keepdim=True) - 1)))

    def with_prefix(self, rows: Rows, **extra: Tensor) -> Prepared:
        """Look up the frozen prefix of the rows, if it is reused.

        Raises:
            ValueError: If the rows are longer than the positions that the model has learned.
        """
        check_positions(rows.input_ids.shape[1], self._max_positions)
        if self.prefix is not None and not self._prefix_checked:
            self._check_prefix(rows)
        prefix = None if self.prefix is None else self.prefix.lookup(rows)
        return Prepared(rows, prefix, **extra)

    def option_scores(self, prepared: Prepared, repeats: int = 1) -> Scores:
        """Return the length-normalised log-probabilities of the options, up to a constant of each example.

        Args:
            prepared: A classification batch.
            repeats: Number of perturbed adapters in use, P.

        Raises:
            ValueError: If the number of trained answers differs from the number of options.
        """
        options_CL, mask_CL = prepared.option_ids, prepared.option_mask
        assert options_CL is not None
        assert mask_CL is not None
        num_options, longest = options_CL.shape
        if longest == 1:
            # the log-softmax over the vocabulary cancels in the cross-entropy over the options
            logits, features = self._run_with_features(prepared, repeats, self._option_head(options_CL[:, 0]))
            return self._with_answers(logits.double().view(repeats, -1, num_options), features)
        logits, features = self._run_with_features(prepared, repeats, self.head.forward)
        logits_RLV = logits.float()
        logprobs_RLV = logits_RLV.view(-1, num_options, longest, logits_RLV.shape[-1]).log_softmax(-1)
        tokens = options_CL.expand(len(logprobs_RLV), -1, -1)[..., None]
        logprobs = logprobs_RLV.gather(-1, tokens)[..., 0].double() * mask_CL
        scores_PBC = (logprobs.sum(-1) / mask_CL.sum(-1)).view(repeats, -1, num_options)
        # the rows of an example all begin with the same prompt
        return self._with_answers(scores_PBC, features.unflatten(0, (-1, num_options))[:, 0])

    def _with_answers(self, scores_PBC: Tensor, features: Tensor) -> Scores:
        """Add the trained answers to the scores, if there are any."""
        if self._answers is None:
            return Scores(scores_PBC, features)
        added = self._answers(features)
        num_options = scores_PBC.shape[-1]
        if added.shape[-1] != num_options:
            raise ValueError(f"Expected batches of `num_answers` = {added.shape[-1]} options, but got {num_options}")
        return Scores(scores_PBC + added.double().view_as(scores_PBC), features)

    def token_nll(self, prepared: Prepared, repeats: int = 1) -> Tensor:
        """Return the negative log-likelihood of every token except the first: `[P, B, T - 1]`, zero where padded.

        Args:
            prepared: A batch of running text.
            repeats: Number of perturbed adapters in use, P.
        """
        logits = self.token_logits(prepared, repeats)[:, :-1]
        ids, mask = prepared.rows.input_ids, prepared.rows.attention_mask
        targets = ids[:, 1:].repeat(repeats, 1)
        nll = F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), reduction="none").view_as(targets)
        # masked instead of multiplied: a non-finite value at a padded position must not reach the sum
        return nll.masked_fill(mask[:, 1:].repeat(repeats, 1) == 0, 0.0).view(repeats, *ids[:, 1:].shape)

    def token_logits(self, prepared: Prepared, repeats: int = 1) -> Tensor:
        """Return the logits of the next token at every position: `[P·B, T, V]`, repeated where padded.

        Args:
            prepared: A batch of running text.
            repeats: Number of perturbed adapters in use, P.
        """
        return self._run(prepared, repeats, self.head.forward)

    def max_repeats(self, prepared: Prepared) -> int:
        """Return the largest number of perturbed adapters for one forward."""
        if prepared.option_ids is not None:
            return 2**31
        weight: Any = self.head.weight
        vocabulary = int(getattr(weight, "ds_shape", weight.shape)[0])  # ZeRO-3 leaves an empty shape
        return max(1, self.max_logits // (prepared.rows.input_ids.numel() * vocabulary))

    def _option_head(self, option_ids: Tensor) -> Head:
        """Return an output head that computes the logits of single-token options only."""
        head = self.head
        if not isinstance(head, nn.Linear):
            full = head.forward
            return lambda hidden: full(hidden)[..., option_ids]

        def options_only(hidden: Tensor) -> Tensor:
            # float32 whatever the model's precision: zeroth-order losses differ by far less than 16 bits resolve
            weight, bias = self._head_rows(head, option_ids)
            with torch.autocast(hidden.device.type, enabled=False):
                return F.linear(hidden.float(), weight.float(), None if bias is None else bias.float())

        return options_only

    def _run_with_features(self, prepared: Prepared, repeats: int, head: Head) -> tuple[Tensor, Tensor]:
        """Return the output of `_run`, and the input of the head at the first scored position of each row."""
        features: list[Tensor] = []

        def recorded(hidden: Tensor) -> Tensor:
            features.append(hidden[:, 0])
            return head(hidden)

        return self._run(prepared, repeats, recorded), features[0]

    def _run(self, prepared: Prepared, repeats: int, head: Head) -> Tensor:
        """Return the output of the model with another output head, on the scored positions only: `[P·R, S, …]`.

        Args:
            prepared: The batch.
            repeats: Number of perturbed adapters in use, P.
            head: Replaces the output embeddings; maps `[P·R, S, D]`.
        """
        rows, replay = prepared.rows, self._replay(prepared, repeats)
        with replay as (call, narrowed):
            positions = rows.positions.repeat(repeats, 1)

            def narrow(hidden: Tensor) -> Tensor:
                return head(hidden if narrowed else at_positions(hidden, positions))

            with override_forward({self.head: narrow}):
                return self.model(**call, use_cache=False).logits

    def _replay(self, prepared: Prepared, repeats: int) -> AbstractContextManager[tuple[dict[str, Any], bool]]:
        """Return a context in which the model continues from the frozen prefix, if it is reused.

        It yields the keyword arguments of the forward, and whether hidden states are those of scored positions only.
        """
        if self.prefix is not None and prepared.prefix is not None:
            return self.prefix.replay(prepared.prefix, prepared.rows, repeats)
        rows = prepared.rows.repeat(repeats)
        return nullcontext(({"input_ids": rows.input_ids, "attention_mask": rows.attention_mask}, False))

    @torch.no_grad()
    def _check_prefix(self, rows: Rows) -> None:
        """Compare the replay with the plain forward of the model, and reuse less, or nothing, if they differ."""
        assert self.prefix is not None
        self._prefix_checked = True
        few = Rows(rows.input_ids[:2], rows.attention_mask[:2], rows.positions[:2])

        def scored_states(prefix: Prefix | None) -> Tensor:
            states: list[Tensor] = []

            def record(hidden: Tensor) -> Tensor:
                states.append(hidden.float())
                return hidden[..., :1]

            self._run(Prepared(few, prefix), 1, record)
            return states[0]

        plain = scored_states(None)
        tolerance = 1e-3 if self.head.weight.dtype == torch.float32 else 5e-2
        for attempt in ("scored positions", "all positions"):
            try:
                replayed = scored_states(self.prefix.lookup(few))
            except torch.OutOfMemoryError:
                raise
            except (RuntimeError, IndexError):
                replayed = torch.full_like(plain, torch.nan)  # the model depends on its full shapes
            if (replayed - plain).norm() <= tolerance * plain.norm():
                return
            if attempt == "scored positions":
                self.prefix.widen()
        self.prefix = None
        warnings.warn(
            f"The outputs of {type(self.model).__name__} change when its lower blocks are replayed, so the frozen "
            "prefix is not reused and every step runs the whole model",
            stacklevel=2,
        )


def _rows(linear: nn.Linear, ids: Tensor) -> tuple[Tensor, Tensor | None]:
    """Return rows of a Linear's weight and bias."""
    return linear.weight[ids], None if linear.bias is None else linear.bias[ids]


def check_mask(batch: Mapping[str, Tensor]) -> None:
    """Check that no sequence of a batch is empty or padded on the left.

    Args:
        batch: A batch with an `attention_mask`.

    Raises:
        ValueError: If one is.
    """
    mask = batch["attention_mask"]
    # right-padded: ones, then zeros
    if mask.shape[1] == 0 or bool((mask[:, 0] == 0).any() | (mask[:, 1:] > mask[:, :-1]).any()):
        raise ValueError(
            "Expected `attention_mask` of right-padded, non-empty sequences, but got padding before a token; "
            'set padding_side="right"'
        )


def _check_options(batch: Mapping[str, Tensor]) -> None:
    """Check that a classification batch has answer options, and no empty one."""
    if not is_classification(batch):
        return
    missing = [name for name in ("option_ids", "option_mask") if name not in batch]
    if missing:
        raise ValueError(
            f"Expected a classification batch with `option_ids` and `option_mask`, but {missing} is missing"
        )
    if not bool(batch["option_mask"].any(1).all()):
        raise ValueError("Expected every answer option to have a token, but `option_mask` has an empty row")
