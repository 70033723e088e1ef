"""What training lowers: the loss of a batch under P perturbed copies at once, by cross-entropy or by any metric.

Legend: B examples, C classes, N generated tokens, P perturbed copies, T tokens.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric
from typing_extensions import override

from wandazeta.models.zero3 import is_shared_out
from wandazeta.scoring.scorer import Prepared, Scorer, option_losses, token_losses


class ExactText(Metric):
    """Share of texts that equal the right ones, but for spaces around them.

    Example:
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
    """A metric of the text that the model writes after a prompt, against the right option.

    It writes greedily, under every perturbed copy at once.

    Args:
        metric: Metric of torchmetrics over lists of predicted and right texts, such as
            `torchmetrics.text.CharErrorRate`; by default exact match.
        max_new_tokens: Tokens to write; by default as many as the longest option has.

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

        Raises:
            ValueError: If the batch has none, or the model's weights are sharded.
        """
        if any(map(is_shared_out, scorer.model.parameters())):
            # each rank would stop at its own end of text, and the others wait for its share of the weights
            raise ValueError(
                "Expected whole weights on every rank for an objective over generated text, but ZeRO stage 3 shards "
                "them; use stage 2, or a metric of the options' scores"
            )
        options, mask, labels = prepared.option_ids, prepared.option_mask, prepared.labels
        if options is None or mask is None or labels is None:
            raise ValueError(
                "Expected a batch with answer options for an objective over generated text, but got one without; take "
                "a PromptedClassificationDataModule and a causal language model"
            )
        right = [tokenizer.decode(options[label][mask[label]]) for label in labels.tolist()]
        written = written_tokens(scorer.model, prepared, repeats, self.max_new_tokens or options.shape[1], tokenizer)
        texts = tokenizer.batch_decode(written, skip_special_tokens=True)
        copies = [texts[start : start + len(right)] for start in range(0, len(texts), len(right))]
        return metric_losses(self.metric, ((copy, right) for copy in copies)).to(labels.device)


Objective = Metric | GeneratedText


def objective_losses(
    objective: Objective | None, scorer: Scorer, prepared: Prepared, repeats: int = 1, tokenizer: Any = None
) -> Tensor:
    """Return the losses `[P]` of a batch under the P perturbed copies that are in use.

    Args:
        objective: A metric of the classes' scores `[B, C]` and the labels `[B]`, or of generated text; `None` is the
            cross-entropy, over options or classes where the batch has labels, else over its tokens.
        scorer: Runs the model.
        prepared: The batch.
        repeats: Number of copies, P.
        tokenizer: Reads what the model writes, for an objective over generated text.

    Raises:
        ValueError: If the batch has nothing that the objective could look at.
    """
    if isinstance(objective, GeneratedText):
        return objective.losses(scorer, prepared, repeats, tokenizer)
    if prepared.labels is not None:
        scores_PBC = scorer.option_scores(prepared, repeats)
        if objective is None:
            return option_losses(scores_PBC, prepared.labels)
        return metric_losses(objective, ((scores_BC, prepared.labels) for scores_BC in scores_PBC))
    if objective is not None:
        raise ValueError(
            f"Expected a batch with `label` for the objective {type(objective).__name__}, but got running text; leave "
            "`objective` out, or take a data module of classification"
        )
    return token_losses(scorer.token_nll(prepared, repeats), prepared)


def check_objective(objective: Objective) -> None:
    """Check that a metric can be minimised.

    Args:
        objective: The metric.

    Raises:
        ValueError: If it is not known whether higher values are better.
    """
    metric = objective.metric if isinstance(objective, GeneratedText) else objective
    name = type(metric).__name__
    if metric.higher_is_better is None:
        raise ValueError(
            f"Expected argument `objective` to have `higher_is_better`, but {name} leaves it open; set it in a subclass"
        )


def metric_losses(metric: Metric, pairs: Iterable[tuple[Any, Any]]) -> Tensor:
    """Return one minus the metric, or the metric itself where less is better, of each prediction and target: `[P]`.

    Raises:
        ValueError: If the metric has more than one value.
    """
    losses = []
    for predicted, target in pairs:
        value = metric(predicted, target)  # of this pair alone, on this rank alone
        if not isinstance(value, Tensor) or value.numel() != 1:
            raise ValueError(
                f"Expected a metric with a single value, but {type(metric).__name__} gives {value}; "
                "choose an average over the classes, such as average='macro'"
            )
        losses.append((1 - value if metric.higher_is_better else value).double().reshape(()))
    metric.reset()
    return torch.stack(losses)


def written_tokens(model: Any, prepared: Prepared, repeats: int, num_tokens: int, tokenizer: Any) -> Tensor:
    """Return what the model writes after the prompts, greedily: `[P·B, N]`, filled up after the end of a text."""
    rows, labels = prepared.rows, prepared.labels
    assert labels is not None
    # options of several tokens have a row each; all begin with the prompt, which ends where the first is scored
    every = len(rows.input_ids) // len(labels)
    lengths_B = rows.positions[::every, 0] + 1
    width = int(lengths_B.max())
    # generation continues at the right end, so the padding moves to the left
    places_BT = torch.arange(width, device=lengths_B.device) - (width - lengths_B)[:, None]
    mask_BT = places_BT >= 0
    prompts_BT = rows.input_ids[::every].gather(1, places_BT.clamp(min=0)).where(mask_BT, tokenizer.pad_token_id)
    written = model.generate(
        input_ids=prompts_BT.repeat(repeats, 1),
        attention_mask=mask_BT.long().repeat(repeats, 1),
        max_new_tokens=num_tokens,
        do_sample=False,
        temperature=None,
        top_p=None,
        top_k=None,
        pad_token_id=tokenizer.pad_token_id,
    )
    return written[:, width:]
