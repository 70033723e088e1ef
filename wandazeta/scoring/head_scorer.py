"""Losses of an encoder with a classification head, through the same calls as a language model's.

Legend: B examples, C classes, P perturbed copies, R rows run by the model, T tokens.
"""

from collections.abc import Callable, Mapping

from torch import Tensor
from typing_extensions import override

from wandazeta.models.blocks import override_forward
from wandazeta.scoring.prefix import Rows
from wandazeta.scoring.scorer import Prepared, Scorer, check_mask, is_classification


class HeadScorer(Scorer):
    """Runs an encoder with a classification head, under the same calls as a language model over answer options."""

    @override
    def prepare(self, batch: Mapping[str, Tensor]) -> Prepared:
        """Lay out a batch and look up its frozen prefix.

        Raises:
            ValueError: If the batch has no labels, or padding before a token.
        """
        check_mask(batch)
        if not is_classification(batch):
            raise ValueError(
                "Expected a batch with `label` for a model with `num_classes`, but got one without; take a "
                "ClassificationDataModule, or leave `num_classes` out"
            )
        ids, mask = batch["input_ids"], batch["attention_mask"]
        # every position is pooled, so none is scored by itself
        rows = Rows(ids, mask, ids.new_zeros(len(ids), 1))
        return self.with_prefix(rows, labels=batch["label"])

    @override
    def option_scores(self, prepared: Prepared, repeats: int = 1) -> Tensor:
        """Logits of the classes `[P, B, C]` in fp64."""

        def noted(features: Tensor) -> Tensor:
            self.last_features = features
            return forward(features)

        forward = self.head.forward
        logits = self._run(prepared, repeats, noted)
        self.last_scores = logits.double().view(repeats, -1, logits.shape[-1])
        return self.last_scores

    @override
    def max_repeats(self, prepared: Prepared) -> int:
        return 2**31

    @override
    def _run(self, prepared: Prepared, repeats: int, head: Callable[[Tensor], Tensor]) -> Tensor:
        with self._replay(prepared, repeats) as (call, _), override_forward({self.head: head}):
            return self.model(**call).logits

    @override
    def _check_prefix(self, rows: Rows) -> None:
        assert self.prefix is not None
        self.prefix.widen()
        super()._check_prefix(rows)
