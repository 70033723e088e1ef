"""Objectives of training: cross-entropy, or a metric of scores or generated text, of P perturbed copies at once.

Legend: B examples, C classes, N generated tokens, P perturbed copies, T tokens.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric
from typing_extensions import override

from wandazeta.models.positions import check_positions, max_positions
from wandazeta.models.sharded import is_sharded
from wandazeta.scoring.scorer import Prepared, Scorer, Scores, option_losses, token_losses
from wandazeta.utilities.precision import default_dtype

__all__ = ["ExactText", "GeneratedText", "Objective", "check_objective", "metric_losses", "objective_losses"]


class ExactText(Metric):
    """Fraction of texts that equal the right ones, leading and trailing spaces apart.

    Examples:
        >>> ExactText()([" good", "god"], ["good", "good"])
        tensor(0.5000)
    """

    higher_is_better = True
    full_state_update = False
    num_equal: Tensor
    num_texts: Tensor

    def __init__(self) -> None:
        super().__init__()
        for name in ("num_equal", "num_texts"):
            self.add_state(name, torch.tensor(0), dist_reduce_fx="sum")

    @override
    def update(self, preds: list[str], target: list[str]) -> None:
        self.num_equal += sum(a.strip() == b.strip() for a, b in zip(preds, target, strict=True))
        self.num_texts += len(target)

    @override
    def compute(self) -> Tensor:
        return self.num_equal / self.num_texts


class GeneratedText:
    """A metric of the text that the model generates after a prompt, compared with the right option.

    Decoding is greedy, with all perturbed copies in one batch.

    Args:
        metric: Metric of torchmetrics over lists of predicted and right texts, such as
            `torchmetrics.text.CharErrorRate`; by default exact match.
        max_new_tokens: Number of tokens to generate; by default as many as the longest option has.

    Raises:
        ValueError: If `max_new_tokens` is below 1.
    """

    def __init__(self, metric: Metric | None = None, max_new_tokens: int | None = None) -> None:
        if max_new_tokens is not None and max_new_tokens < 1:
            raise ValueError(f"Expected argument `max_new_tokens` to be at least 1, but got {max_new_tokens}")
        self.metric = metric or ExactText()
        self.max_new_tokens = max_new_tokens

    def losses(self, scorer: Scorer, prepared: Prepared, repeats: int, tokenizer: Any) -> Tensor:
        """Return the losses `[P]` of a batch with answer options.

        Args:
            scorer: Scorer of the model.
            prepared: The batch.
            repeats: Number of perturbed copies in use, P.
            tokenizer: Decodes the generated tokens.

        Raises:
            ValueError: If the batch has no answer options, or the model's weights are sharded.
        """
        if any(map(is_sharded, scorer.model.parameters())):
            # ranks end their texts at different tokens, after which they would wait for each other's shards forever
            raise ValueError(
                "Expected whole weights on every rank for an objective over generated text, but the strategy shards "
                "them; use DDP or DeepSpeed ZeRO stage 2, or a metric of the options' scores"
            )
        options, mask, labels = prepared.option_ids, prepared.option_mask, prepared.labels
        if options is None or mask is None or labels is None:
            raise ValueError(
                "Expected a batch with answer options for an objective over generated text, but got one without; use "
                "a PromptedClassificationDataModule and a causal language model"
            )
        right = [tokenizer.decode(options[label][mask[label]]) for label in labels.tolist()]
        generated = _generated_tokens(
            scorer.model, prepared, repeats, self.max_new_tokens or options.shape[1], tokenizer
        )
        texts = tokenizer.batch_decode(generated, skip_special_tokens=True)
        copies = [texts[start : start + len(right)] for start in range(0, len(texts), len(right))]
        return metric_losses(self.metric, ((copy, right) for copy in copies)).to(labels.device)


Objective = Metric | GeneratedText


def objective_losses(
    objective: Objective | None,
    scorer: Scorer,
    prepared: Prepared,
    repeats: int = 1,
    tokenizer: Any = None,
    on_scores: Callable[[Scores], None] | None = None,
) -> Tensor:
    """Return the losses `[P]` of a batch under the P perturbed copies that are in use.

    Args:
        objective: A metric of the classes' scores `[B, C]` and the labels `[B]`, or of generated text. None is the
            cross-entropy: over options or classes if the batch has labels, else over its tokens.
        scorer: Scorer of the model.
        prepared: The batch.
        repeats: Number of copies, P.
        tokenizer: Decodes the generated tokens, for an objective over generated text.
        on_scores: Is called with the scores of options or classes, if the objective uses them.

    Raises:
        ValueError: If the batch does not have what the objective measures.
    """
    if isinstance(objective, GeneratedText):
        return objective.losses(scorer, prepared, repeats, tokenizer)
    if prepared.labels is not None:
        scores = scorer.option_scores(prepared, repeats)
        if on_scores is not None:
            on_scores(scores)
        if objective is None:
            return option_losses(scores.values, prepared.labels)
        return metric_losses(objective, ((scores_BC, prepared.labels) for scores_BC in scores.values))
    if objective is not None:
        raise ValueError(
            f"Expected a batch with `label` for the objective {type(objective).__name__}, but got running text; leave "
            "`objective` out, or use a ClassificationDataModule"
        )
    return token_losses(scorer.token_nll(prepared, repeats), prepared)


def check_objective(objective: Objective) -> None:
    """Check that a metric can be minimised.

    Args:
        objective: The metric.

    Raises:
        ValueError: If the metric does not say whether higher is better.
    """
    metric = objective.metric if isinstance(objective, GeneratedText) else objective
    name = type(metric).__name__
    if metric.higher_is_better is None:
        raise ValueError(
            f"Expected argument `objective` to have `higher_is_better`, but {name} does not set it; do so in a subclass"
        )


def metric_losses(metric: Metric, pairs: Iterable[tuple[Any, Any]]) -> Tensor:
    """Return the losses `[P]` by a metric: one minus its value, or its value if lower is better.

    Args:
        metric: Metric of torchmetrics.
        pairs: Prediction and target of each of the P copies.

    Raises:
        ValueError: If the metric has more than one value.
    """
    losses = []
    for predicted, target in pairs:
        if isinstance(predicted, Tensor):
            metric.to(predicted.device)
        # metrics divide counts in the default dtype, and 16 bits do not resolve one example of some hundred
        with default_dtype(torch.float32):
            value = metric(predicted, target)  # of this pair on this rank, not accumulated
        if not isinstance(value, Tensor) or value.numel() != 1:
            raise ValueError(
                f"Expected a metric with a single value, but {type(metric).__name__} returns {value}; "
                "choose an average over the classes, such as average='macro'"
            )
        losses.append((1 - value if metric.higher_is_better else value).double().reshape(()))
    metric.reset()
    return torch.stack(losses)


def _generated_tokens(model: Any, prepared: Prepared, repeats: int, num_tokens: int, tokenizer: Any) -> Tensor:
    """Return the tokens `[P·B, N]` that the model generates greedily after the prompts, padded after an end of text."""
    rows, labels = prepared.rows, prepared.labels
    assert labels is not None
    # options of several tokens have a row each, which begins with the prompt; that ends at the first scored position
    num_rows = len(rows.input_ids) // len(labels)
    lengths_B = rows.positions[::num_rows, 0] + 1
    width = int(lengths_B.max())
    check_positions(width + num_tokens - 1, max_positions(model))
    # generation continues at the right end, so the padding has to be on the left
    places_BT = torch.arange(width, device=lengths_B.device) - (width - lengths_B)[:, None]
    mask_BT = places_BT >= 0
    prompts_BT = rows.input_ids[::num_rows].gather(1, places_BT.clamp(min=0)).where(mask_BT, tokenizer.pad_token_id)
    generated = model.generate(
        input_ids=prompts_BT.repeat(repeats, 1),
        attention_mask=mask_BT.long().repeat(repeats, 1),
        max_new_tokens=num_tokens,
        do_sample=False,
        temperature=None,
        top_p=None,
        top_k=None,
        pad_token_id=tokenizer.pad_token_id,
    )
    return generated[:, width:]
