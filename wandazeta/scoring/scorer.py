"""Losses of a causal language model: over answer options, and over tokens. Plain torch.

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
from wandazeta.scoring.prefix import FrozenPrefix, Prefix, Rows, at_positions


@dataclass(frozen=True)
class Prepared:
    """A batch, ready to be scored any number of times.

    Args:
        rows: What the model runs: one row per example, or per example and option where options have several tokens.
        prefix: Frozen prefix of the rows, if it is reused.
        option_ids: Tokens of the options `[C, L]`, none for a language-model batch.
        option_mask: Which of these are tokens.
        labels: Right options `[B]`.
    """

    rows: Rows
    prefix: Prefix | None
    option_ids: Tensor | None = None
    option_mask: Tensor | None = None
    labels: Tensor | None = None


def option_rows(batch: Mapping[str, Tensor]) -> Rows:
    """Lay out the rows that score the options of every prompt.

    Where all options are single tokens, the prompts themselves, scored at their last token. Otherwise every prompt is
    followed by every option but for its last token, and scored where each option token is predicted (a shorter
    option's spare positions repeat its last one).
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
    """Whether a batch asks for answer options rather than for the next tokens."""
    return "label" in batch


def option_losses(scores_PBC: Tensor, labels_B: Tensor) -> Tensor:
    """Cross-entropy over the options, `[P]`."""
    repeats, _, num_options = scores_PBC.shape
    losses = F.cross_entropy(scores_PBC.reshape(-1, num_options), labels_B.repeat(repeats), reduction="none")
    return losses.view(repeats, -1).mean(1)


def token_losses(nll_PBT: Tensor, prepared: Prepared) -> Tensor:
    """Mean negative log-likelihood of the tokens of a batch, `[P]` in fp64."""
    return nll_PBT.double().sum((1, 2)) / prepared.rows.attention_mask[:, 1:].sum()


class Scorer:
    """Runs a causal language model and returns only what a loss needs.

    The model's own forward is used throughout, with its output embeddings narrowed to the scored positions and, for
    single-token options, to the options' rows; so scalings and soft-caps after the head stay the model's own.

    Args:
        model: A causal language model of transformers, or one with the same interface.
        prefix: Reuses what lies below the adapters.
        max_logits: Most logits that a forward over all tokens may hold before `repeats` are run one after another.

    Raises:
        ValueError: If the model has no output embeddings.
    """

    last_features: Tensor
    """What the head was last given where the answer begins, `[P·B, D]`; noted where something is trained on it."""
    last_scores: Tensor
    """Scores that came of it, `[P, B, C]` in fp64."""

    def __init__(self, model: nn.Module, prefix: FrozenPrefix | None = None, max_logits: int = 2**28) -> None:
        self.model = model
        self.prefix = prefix
        self.max_logits = max_logits
        self.head_rows: Callable[[nn.Linear, Tensor], tuple[Tensor, Tensor | None]] = _rows
        """Gives rows of the head's weight and bias; whoever moves weights has others to give."""
        self.answers: Callable[[Tensor], Tensor] | None = None
        """Adds to the scores of the options, from the features `[P·B, D]`; what is trained of the answers."""
        self._prefix_checked = False
        if self.head is None:
            raise ValueError(f"Expected a language model with output embeddings, but got {type(model).__name__}")

    @property
    def head(self) -> nn.Module:
        """The output embeddings."""
        return self.model.get_output_embeddings()  # type: ignore[operator]

    def prepare(self, batch: Mapping[str, Tensor]) -> Prepared:
        """Lay out a batch and look up its frozen prefix."""
        check_mask(batch)
        _check_options(batch)
        ids, mask = batch["input_ids"], batch["attention_mask"]
        if is_classification(batch):
            extra = {"option_ids": batch["option_ids"], "option_mask": batch["option_mask"], "labels": batch["label"]}
            return self.with_prefix(option_rows(batch), **extra)
        places = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
        return self.with_prefix(Rows(ids, mask, torch.minimum(places, mask.sum(1, keepdim=True) - 1)))

    def with_prefix(self, rows: Rows, **extra: Tensor) -> Prepared:
        """Add the frozen prefix of the rows, if it is reused."""
        if self.prefix is not None and not self._prefix_checked:
            self._check_prefix(rows)
        prefix = None if self.prefix is None else self.prefix.lookup(rows)
        return Prepared(rows, prefix, **extra)

    def option_scores(self, prepared: Prepared, repeats: int = 1) -> Tensor:
        """Length-normalised log-probabilities of the options, up to a constant of each example.

        Args:
            prepared: A classification batch.
            repeats: Number of perturbed adapters in use, P.

        Returns:
            Scores `[P, B, C]` in fp64.

        Raises:
            ValueError: If another number of answers is trained than there are options.
        """
        scores_PBC = self._prompted_scores(prepared, repeats)
        if self.answers is None:
            return scores_PBC
        num_options = scores_PBC.shape[-1]
        if len(self.last_features) != scores_PBC.shape[:2].numel():
            # a row for each option, all with the same prompt
            self.last_features = self.last_features.unflatten(0, (-1, num_options))[:, 0]
        added = self.answers(self.last_features)
        if added.shape[-1] != num_options:
            raise ValueError(f"Expected batches of `num_answers` = {added.shape[-1]} options, but got {num_options}")
        self.last_scores = scores_PBC + added.double().view_as(scores_PBC)
        return self.last_scores

    def _prompted_scores(self, prepared: Prepared, repeats: int) -> Tensor:
        options_CL, mask_CL = prepared.option_ids, prepared.option_mask
        assert options_CL is not None
        assert mask_CL is not None
        num_options, longest = options_CL.shape
        if longest == 1:
            # the log-softmax over the vocabulary cancels in the cross-entropy over the options
            logits = self._run(prepared, repeats, self._noting(self._option_head(options_CL[:, 0])))
            return logits.double().view(repeats, -1, num_options)
        logits_RLV = self._run(prepared, repeats, self._noting(self.head.forward)).float()
        logprobs_RLV = logits_RLV.view(-1, num_options, longest, logits_RLV.shape[-1]).log_softmax(-1)
        tokens = options_CL.expand(len(logprobs_RLV), -1, -1)[..., None]
        logprobs = logprobs_RLV.gather(-1, tokens)[..., 0].double() * mask_CL
        return (logprobs.sum(-1) / mask_CL.sum(-1)).view(repeats, -1, num_options)

    def token_nll(self, prepared: Prepared, repeats: int = 1) -> Tensor:
        """Negative log-likelihood of every token but the first: `[P, B, T - 1]` in fp32, zero where padded."""
        logits = self._run(prepared, repeats, self.head.forward)[:, :-1]
        ids, mask = prepared.rows.input_ids, prepared.rows.attention_mask
        targets = ids[:, 1:].repeat(repeats, 1)
        nll = F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), reduction="none").view_as(targets)
        # not a product: a non-finite value at a padded place must not spoil the sum
        return nll.masked_fill(mask[:, 1:].repeat(repeats, 1) == 0, 0.0).view(repeats, *ids[:, 1:].shape)

    def max_repeats(self, prepared: Prepared) -> int:
        """How many perturbed adapters one forward may serve."""
        if prepared.option_ids is not None:
            return 2**31
        weight: Any = self.head.weight
        vocabulary = int(getattr(weight, "ds_shape", weight.shape)[0])  # ZeRO-3 leaves an empty shape
        return max(1, self.max_logits // (prepared.rows.input_ids.numel() * vocabulary))

    def _option_head(self, option_ids: Tensor) -> Callable[[Tensor], Tensor]:
        head = self.head
        if not isinstance(head, nn.Linear):
            full = head.forward
            return lambda hidden: full(hidden)[..., option_ids]

        def options_only(hidden: Tensor) -> Tensor:
            # in fp32 whatever the model's precision: the loss difference of two sides is far below 16-bit steps
            weight, bias = self.head_rows(head, option_ids)
            with torch.autocast(hidden.device.type, enabled=False):
                return F.linear(hidden.float(), weight.float(), None if bias is None else bias.float())

        return options_only

    def _noting(self, head: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        if self.answers is None:
            return head

        def noted(hidden: Tensor) -> Tensor:
            self.last_features = hidden[:, 0]
            return head(hidden)

        return noted

    def _run(self, prepared: Prepared, repeats: int, head: Callable[[Tensor], Tensor]) -> Tensor:
        """Return the output of the model whose output embeddings see the scored positions only: `[P·R, S, …]`."""
        rows, replay = prepared.rows, self._replay(prepared, repeats)
        with replay as (call, narrowed):
            positions = rows.positions.repeat(repeats, 1)

            def narrow(hidden: Tensor) -> Tensor:
                return head(hidden if narrowed else at_positions(hidden, positions))

            with override_forward({self.head: narrow}):
                return self.model(**call, use_cache=False).logits

    def _replay(self, prepared: Prepared, repeats: int) -> AbstractContextManager[tuple[dict[str, Any], bool]]:
        if self.prefix is not None and prepared.prefix is not None:
            return self.prefix.replay(prepared.prefix, prepared.rows, repeats)
        rows = prepared.rows.repeat(repeats)
        return nullcontext(({"input_ids": rows.input_ids, "attention_mask": rows.attention_mask}, False))

    @torch.no_grad()
    def _check_prefix(self, rows: Rows) -> None:
        """Compare the replay with the model's plain forward once; use less of it where they differ."""
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
                replayed = torch.full_like(plain, torch.nan)  # a model that counts on its full shapes
            if (replayed - plain).norm() <= tolerance * plain.norm():
                return
            if attempt == "scored positions":
                self.prefix.widen()
        self.prefix = None
        warnings.warn(
            f"{type(self.model).__name__} does not give the same outputs when its lower blocks are replayed, so the "
            "frozen prefix is not reused; every step runs the whole model",
            stacklevel=2,
        )


def _rows(linear: nn.Linear, ids: Tensor) -> tuple[Tensor, Tensor | None]:
    return linear.weight[ids], None if linear.bias is None else linear.bias[ids]


def check_mask(batch: Mapping[str, Tensor]) -> None:
    """Refuse sequences that are empty or padded on the left.

    Raises:
        ValueError: If one is.
    """
    mask = batch["attention_mask"]
    # right-padded: ones, then zeros
    if mask.shape[1] == 0 or not bool((mask[:, 0] != 0).all()) or bool((mask[:, 1:] > mask[:, :-1]).any()):
        raise ValueError(
            "Expected `attention_mask` of right-padded, non-empty sequences, but got padding before a token; "
            'set padding_side="right"'
        )


def _check_options(batch: Mapping[str, Tensor]) -> None:
    if not is_classification(batch):
        return
    missing = [name for name in ("option_ids", "option_mask") if name not in batch]
    if missing:
        raise ValueError(
            f"Expected a classification batch with `option_ids` and `option_mask`, but {missing} is missing"
        )
    if not bool(batch["option_mask"].any(1).all()):
        raise ValueError("Expected every answer option to have a token, but `option_mask` has an empty row")
