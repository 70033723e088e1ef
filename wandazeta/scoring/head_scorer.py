"""Losses of an encoder with a classification head, by the methods of a language model's scorer.

Legend: B examples, C classes, D hidden size, P perturbed copies, R rows run by the model, T tokens.
"""

from collections.abc import Mapping

from torch import Tensor
from typing_extensions import override

from wandazeta.models.blocks import override_forward
from wandazeta.scoring.frozen_prefix import Rows
from wandazeta.scoring.scorer import Head, Prepared, Scorer, Scores, check_mask, is_classification


class HeadScorer(Scorer):
    """Runs an encoder with a classification head, whose classes take the place of answer options."""

    @override
    def prepare(self, batch: Mapping[str, Tensor]) -> Prepared:
        """Lay out a batch in rows and look up their frozen prefix.

        Args:
            batch: `input_ids`, `attention_mask` and `label`.

        Raises:
            ValueError: If the batch has no labels, or a sequence is empty or padded on the left.
        """
        check_mask(batch)
        if not is_classification(batch):
            raise ValueError(
                "Expected a batch with `label` for a model with `num_classes`, but got one without; use a "
                "ClassificationDataModule, or leave `num_classes` out"
            )
        ids, mask = batch["input_ids"], batch["attention_mask"]
        # the head sees the mean over all positions, so no position is scored by itself
        rows = Rows(ids, mask, ids.new_zeros(len(ids), 1))
        return self.with_prefix(rows, labels=batch["label"])

    @override
    def option_scores(self, prepared: Prepared, repeats: int = 1) -> Scores:
        """Return the logits of the classes as scores.

        Args:
            prepared: A classification batch.
            repeats: Number of perturbed copies in use, P.
        """
        features: list[Tensor] = []
        forward = self.head.forward

        def recorded(hidden: Tensor) -> Tensor:
            features.append(hidden)
            return forward(hidden)

        logits = self._run(prepared, repeats, recorded)
        return Scores(logits.double().view(repeats, -1, logits.shape[-1]), features[0])

    @override
    def max_repeats(self, prepared: Prepared) -> int:
        return 2**31

    @override
    def _run(self, prepared: Prepared, repeats: int, head: Head) -> Tensor:
        with self._replay(prepared, repeats) as (call, _), override_forward({self.head: head}):
            return self.model(**call).logits

    @override
    def _check_prefix(self, rows: Rows) -> None:
        assert self.prefix is not None
        # the mean mixes positions after the last block
        self.prefix.widen()
        super()._check_prefix(rows)
