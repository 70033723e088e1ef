"""A language model or encoder with its tokenizer as a LightningModule: perplexity, accuracy and predictions."""

from collections.abc import Mapping
from typing import Any, Self

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from typing_extensions import override

from wandazeta.adapters.files import backbone_fingerprint
from wandazeta.lightning_compat import attached_trainer
from wandazeta.models.encoder import EncoderClassifier
from wandazeta.models.loading import LoadingOptions, load_backbone, load_tokenizer
from wandazeta.models.streaming import is_file_backed, require_in_memory
from wandazeta.modules.strategies import configure_deepspeed, loading_sharded_by
from wandazeta.scoring.head_scorer import HeadScorer
from wandazeta.scoring.scorer import Scorer, is_classification

_METRICS = ("loss", "option_loss", "accuracy")


class NonFiniteLossError(ValueError):
    """Training has diverged, or its data or precision lead to losses that are not finite."""


class LanguageModel(LightningModule):
    """A language model with its tokenizer, to prune, validate, test and predict with.

    Batches with a `label` are classified among answer options, or by the classification head of an encoder, and
    measured by `val/accuracy` and `val/option_loss`. All others are running text, measured by `val/loss`, the mean
    negative log-likelihood of a token in nats, and `val/perplexity`. `test` measures the same under `test/`. With
    several dataloaders each has its own values, such as `val/loss/dataloader_idx_0`.

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
        self._totals = torch.zeros(0, dtype=torch.float64)

    def _build(self) -> None:
        """Load the model and make its scorer."""
        self.backbone = load_backbone(self._model_name_or_path, self.loading)
        is_encoder = isinstance(self.backbone, EncoderClassifier)
        self.scorer = HeadScorer(self.backbone) if is_encoder else Scorer(self.backbone)

    def _build_sharded(self) -> bool:
        """Load the model now if `shard_on_load` had to wait for the ranks, and return whether that was the case.

        `setup` calls this, not `configure_model`: there Lightning's context for ZeRO stage 3 would convert the
        adapters, which are inserted next, to the precision of the weights.
        """
        if "backbone" in self._modules:
            return False
        with loading_sharded_by(self.trainer.strategy, self.loading.dtype):
            self._build()
        return True

    def fingerprint(self) -> str:
        """Return a digest of some values of every tensor of the model, to compare the ranks.

        It distinguishes models, revisions, precisions and prunings without reading gigabytes; it does not detect every
        changed value. It is empty as long as `shard_on_load` has not loaded the weights: all ranks get those that rank
        0 reads.

        Raises:
            ValueError: If the weights are streamed from their files.
        """
        if "backbone" not in self._modules:
            return ""
        require_in_memory(self)
        return backbone_fingerprint(self.backbone)

    @override
    def setup(self, stage: str) -> None:
        if attached_trainer(self) is not None:
            configure_deepspeed(self.trainer.strategy)
        self._build_sharded()
        require_in_memory(self)

    @override
    def cpu(self) -> Self:
        # the trainer calls this after an error too; streamed weights cannot be moved
        return self if any(map(is_file_backed, self.parameters())) else super().cpu()

    @override
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the backbone."""
        return self.backbone(*args, **kwargs)

    def calibration_forward(self, batch: Mapping[str, Tensor]) -> Any:
        """Run the backbone on the tokens of a batch of any kind."""
        return self.backbone(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False)

    @override
    def validation_step(self, batch: dict[str, Tensor], batch_idx: int, dataloader_idx: int = 0) -> None:
        self._evaluate(batch, dataloader_idx)

    @override
    def test_step(self, batch: dict[str, Tensor], batch_idx: int, dataloader_idx: int = 0) -> None:
        self._evaluate(batch, dataloader_idx)

    @override
    def predict_step(self, batch: dict[str, Tensor], batch_idx: int, dataloader_idx: int = 0) -> dict[str, Tensor]:
        """Return the option scores and the best option of every example, or the mean loss of every text."""
        prepared = self.scorer.prepare(batch)
        if not is_classification(batch):
            nll = self.scorer.token_nll(prepared)[0]
            return {"loss": nll.sum(1) / batch["attention_mask"][:, 1:].sum(1)}
        scores = self.scorer.option_scores(prepared).values[0]
        result = {"prediction": scores.argmax(1), "scores": scores}
        return result | ({"example_id": batch["example_id"]} if "example_id" in batch else {})

    @override
    def on_validation_epoch_start(self) -> None:
        self._totals = self._new_totals(len(self.trainer.num_val_batches))

    @override
    def on_test_epoch_start(self) -> None:
        self._totals = self._new_totals(len(self.trainer.num_test_batches))

    @override
    def on_validation_epoch_end(self) -> None:
        self._log_metrics("val")

    @override
    def on_test_epoch_end(self) -> None:
        self._log_metrics("test")

    def _new_totals(self, num_loaders: int) -> Tensor:
        """Return zeros for the weighted sum and the weight of every metric of every loader.

        They are new in every epoch and not a state of the module: `fit` cannot change tensors that `validate` made in
        inference mode, and precision plugins cast the states of a module. In float64, because a perplexity is a sum
        over millions of tokens.
        """
        return torch.zeros(num_loaders, len(_METRICS), 2, dtype=torch.float64, device=self.device)

    def _evaluate(self, batch: dict[str, Tensor], dataloader_idx: int) -> None:
        """Add a batch to the metrics of its loader."""
        prepared = self.scorer.prepare(batch)
        if is_classification(batch):
            scores = self.scorer.option_scores(prepared).values[0]
            losses = nn.functional.cross_entropy(scores, batch["label"], reduction="none")
            sums = {"option_loss": losses, "accuracy": scores.argmax(1) == batch["label"]}
            weight = torch.tensor(len(losses))
        else:
            sums = {"loss": self.scorer.token_nll(prepared)[0]}
            weight = batch["attention_mask"][:, 1:].sum()
        totals = self._totals[dataloader_idx]
        for name, values in sums.items():
            totals[_METRICS.index(name), 0] += values.double().sum()
            totals[_METRICS.index(name), 1] += weight

    def _log_metrics(self, stage: str) -> None:
        """Log the metrics of all ranks, for several loaders under the names that Lightning gives their metrics."""
        totals = self.trainer.strategy.reduce(self._totals, reduce_op="sum")
        for index, of_loader in enumerate(totals):
            suffix = f"/dataloader_idx_{index}" if len(totals) > 1 else ""
            for name, (value, weight) in zip(_METRICS, of_loader, strict=True):
                if weight == 0:
                    continue
                values = {name: value / weight}
                if name == "loss":
                    values["perplexity"] = values["loss"].exp()
                # Lightning would not accept the suffix, which it adds only to what a step logs
                self.log_dict(
                    {f"{stage}/{name}{suffix}": value for name, value in values.items()},
                    prog_bar=True,
                    add_dataloader_idx=False,
                )
