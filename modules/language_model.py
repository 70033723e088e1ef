"""A language model as a LightningModule: perplexity, accuracy over answer options or of a classification head."""

from collections.abc import Mapping
from typing import Any, Self

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torchmetrics import MeanMetric
from typing_extensions import override

from wandazeta.adapters.files import backbone_fingerprint
from wandazeta.models.encoder import EncoderClassifier
from wandazeta.models.loading import LoadingOptions, load_backbone, load_tokenizer
from wandazeta.models.streaming import is_stored, require_whole
from wandazeta.modules.shares import loading_in_shares
from wandazeta.modules.strategies import configure_deepspeed
from wandazeta.scoring.head_scorer import HeadScorer
from wandazeta.scoring.scorer import Scorer, is_classification


class LanguageModel(LightningModule):
    """A language model with its tokenizer, to be pruned, validated, tested and asked for predictions.

    Batches with a `label` are classified among answer options, or by the head of an encoder (`val/accuracy`,
    `val/option_loss`); all others are scored as running text (`val/loss`, the mean over tokens, and `val/perplexity`).

    Args:
        model_name_or_path: Hugging Face name or local directory of a causal language model, or of an encoder.
        loading: Precision, attention kernels, pad token and other options of loading; see `LoadingOptions`.

    Raises:
        ValueError: If the model cannot be loaded or an option does not fit it.
    """

    def __init__(self, model_name_or_path: str, loading: LoadingOptions | None = None) -> None:
        super().__init__()
        self.loading = loading or LoadingOptions()
        self.loading.check_source(model_name_or_path)
        self._model_name_or_path = model_name_or_path
        self.tokenizer = load_tokenizer(model_name_or_path, self.loading.trust_remote_code, self.loading.pad_token)
        if not self.loading.shard_on_load:
            self._build()
        self.metrics = nn.ModuleDict({stage: _metrics() for stage in ("val", "test")})

    def _build(self) -> None:
        self.backbone = load_backbone(self._model_name_or_path, self.loading)
        self.scorer = (
            HeadScorer(self.backbone) if isinstance(self.backbone, EncoderClassifier) else Scorer(self.backbone)
        )

    def _build_in_shares(self) -> bool:
        """Load the weights that `shard_on_load` left out until the ranks know each other, and say whether it did.

        In `setup` and not in `configure_model`: there Lightning's context for stage 3 would give the adapters, which
        come next, the precision of the weights.
        """
        if "backbone" in self._modules:
            return False
        with loading_in_shares(self.trainer.strategy, self.loading.dtype):
            self._build()
        return True

    def fingerprint(self) -> str:
        """Digest some values of every tensor of the model, for ranks to find out whether they have the same.

        It tells another model, revision, precision or pruning without reading gigabytes; no check of integrity. Weights
        that are still to be loaded in shares are those of rank 0 on all, so there is nothing to tell.

        Raises:
            ValueError: If the weights are streamed from their files.
        """
        if "backbone" not in self._modules:
            return ""
        require_whole(self)
        return backbone_fingerprint(self.backbone)

    @override
    def setup(self, stage: str) -> None:
        if self._trainer is not None:
            configure_deepspeed(self._trainer.strategy)
        self._build_in_shares()
        require_whole(self)

    @override
    def cpu(self) -> Self:
        # a trainer does this on its way out of an error, that of `setup` too; what is streamed stays where it is
        return self if any(map(is_stored, self.parameters())) else super().cpu()

    @override
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the backbone."""
        return self.backbone(*args, **kwargs)

    def calibration_forward(self, batch: Mapping[str, Tensor]) -> Any:
        """Run the backbone on the tokens of a batch of any kind."""
        return self.backbone(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False)

    @override
    def validation_step(self, batch: dict[str, Tensor], batch_idx: int, dataloader_idx: int = 0) -> None:
        self._evaluate(batch, "val")

    @override
    def test_step(self, batch: dict[str, Tensor], batch_idx: int, dataloader_idx: int = 0) -> None:
        self._evaluate(batch, "test")

    @override
    def predict_step(self, batch: dict[str, Tensor], batch_idx: int, dataloader_idx: int = 0) -> dict[str, Tensor]:
        """Return option scores and the best option of every example, or the mean loss of every text."""
        prepared = self.scorer.prepare(batch)
        if not is_classification(batch):
            nll = self.scorer.token_nll(prepared)[0]
            return {"loss": nll.sum(1) / batch["attention_mask"][:, 1:].sum(1)}
        scores = self.scorer.option_scores(prepared)[0]
        result = {"prediction": scores.argmax(1), "scores": scores}
        return result | ({"example_id": batch["example_id"]} if "example_id" in batch else {})

    @override
    def on_validation_epoch_end(self) -> None:
        self._log_metrics("val")

    @override
    def on_test_epoch_end(self) -> None:
        self._log_metrics("test")

    def _evaluate(self, batch: dict[str, Tensor], stage: str) -> None:
        metrics: Any = self.metrics[stage]
        prepared = self.scorer.prepare(batch)
        if is_classification(batch):
            scores = self.scorer.option_scores(prepared)[0]
            losses = nn.functional.cross_entropy(scores, batch["label"], reduction="none")
            metrics["option_loss"].update(losses)
            metrics["accuracy"].update((scores.argmax(1) == batch["label"]).double())
        else:
            num_tokens = batch["attention_mask"][:, 1:].sum()
            metrics["loss"].update(self.scorer.token_nll(prepared)[0].double().sum() / num_tokens, weight=num_tokens)

    def _log_metrics(self, stage: str) -> None:
        metrics: Any = self.metrics[stage]
        for name, metric in metrics.items():
            if metric.update_called:
                value = metric.compute()
                self.log(f"{stage}/{name}", value, prog_bar=True)
                if name == "loss":
                    self.log(f"{stage}/perplexity", value.exp(), prog_bar=True)
            metric.reset()


def _metrics() -> nn.ModuleDict:
    # fp64: a perplexity over millions of tokens is a long sum
    return nn.ModuleDict({name: MeanMetric().set_dtype(torch.float64) for name in ("loss", "option_loss", "accuracy")})
