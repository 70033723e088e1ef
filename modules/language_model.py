"""A language model or encoder with its tokenizer as a LightningModule: perplexity, accuracy and predictions."""

from collections.abc import Mapping
from typing import Any, Self

import torch
from lightning.pytorch import Callback, LightningModule
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule
from torchmetrics import MeanMetric, Metric
from typing_extensions import override

from wandazeta.adapters.files import backbone_fingerprint
from wandazeta.lightning_compat import attached_trainer
from wandazeta.models.encoder import EncoderClassifier
from wandazeta.models.loading import LoadingOptions, load_backbone, load_skeleton, load_tokenizer
from wandazeta.models.positions import check_positions, max_positions
from wandazeta.models.streaming import is_file_backed, require_in_memory
from wandazeta.modules.checkpoints import require_weights_of
from wandazeta.modules.strategies import check_fsdp2, configure_deepspeed, loading_sharded_by, shard_by_fsdp2
from wandazeta.scoring.head_scorer import HeadScorer
from wandazeta.scoring.scorer import Scorer, is_classification

# settings that a perplexity was measured with, logged beside it
_SETTINGS = ("sequence_length", "bos")
_METRICS = ("loss", "option_loss", "accuracy", *_SETTINGS)


class NonFiniteLossError(ValueError):
    """Training has diverged, or its data or precision give losses that are not finite."""


class LanguageModel(LightningModule):
    """A language model with its tokenizer, to prune, validate, test and predict with.

    Batches with a `label` are classified among answer options, or by the classification head of an encoder, and
    measured by `val/accuracy` and `val/option_loss`. All others are running text, measured by `val/loss`, the mean
    negative log-likelihood of a token in nats, and `val/perplexity`. A perplexity depends on how long the texts are and
    how they start: `val/sequence_length` is their mean number of tokens, and `val/bos` the fraction of them that starts
    with the beginning-of-sequence token. `test` measures the same under `test/`. With several dataloaders each has its
    own values, such as `val/loss/dataloader_idx_0`.

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
        self._metrics: list[dict[str, Metric]] = []
        self._is_set_up = False

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

    @property
    def max_positions(self) -> int | None:
        """Largest number of tokens that the model has learned positions for; None if they are not learned."""
        if "backbone" in self._modules:
            return max_positions(self.backbone)
        return max_positions(load_skeleton(self._model_name_or_path, self.loading))

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
        self._is_set_up = True

    @override
    def configure_callbacks(self) -> list[Callback]:
        """Check the strategy before a callback prunes the model, which takes long."""
        check_fsdp2(self.trainer)
        return []

    @override
    def configure_model(self) -> None:
        """Shard the model where FSDP2 leaves that to the module; callbacks that prune call this before `setup`, too."""
        if not self._is_set_up or isinstance(self.backbone, FSDPModule) or attached_trainer(self) is None:
            return
        mesh = shard_by_fsdp2(self.trainer, self.backbone)
        if mesh is not None:
            self._complete_sharding(mesh)

    def _complete_sharding(self, mesh: DeviceMesh) -> None:
        """Prepare what FSDP2 leaves to the module: checkpoints, and in subclasses the gradients of adapters.

        Args:
            mesh: The ranks among which the model is sharded.
        """
        self.register_state_dict_post_hook(LanguageModel._remove_unsaved)

    def _remove_unsaved(self, state_dict: dict[str, Any], prefix: str, local_metadata: dict[str, Any]) -> None:
        """Leave out of a state what no checkpoint holds: it would be gathered from all ranks for nothing."""
        for name in [name for name in state_dict if not self._is_saved(name)]:
            del state_dict[name]

    def _is_saved(self, name: str) -> bool:
        """Whether an entry of the state dict belongs into checkpoints."""
        return True

    @override
    def cpu(self) -> Self:
        # the trainer calls this after an error too; streamed weights cannot be moved
        return self if any(map(is_file_backed, self.parameters())) else super().cpu()

    @override
    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add what identifies the class."""
        checkpoint["language_model"] = {}

    @override
    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Check that the checkpoint holds the weights of this model."""
        if self.strict_loading:
            require_weights_of(self, checkpoint)

    @override
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the backbone."""
        return self.backbone(*args, **kwargs)

    def calibration_forward(self, batch: Mapping[str, Tensor]) -> Any:
        """Run the backbone on the tokens of a batch of any kind."""
        check_positions(batch["input_ids"].shape[1], self.max_positions)
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
        self._metrics = self._new_metrics(len(self.trainer.num_val_batches))

    @override
    def on_test_epoch_start(self) -> None:
        self._metrics = self._new_metrics(len(self.trainer.num_test_batches))

    @override
    def on_validation_epoch_end(self) -> None:
        self._log_metrics("val")

    @override
    def on_test_epoch_end(self) -> None:
        self._log_metrics("test")

    def _new_metrics(self, num_loaders: int) -> list[dict[str, Metric]]:
        """Make the metrics of every loader.

        They are made anew in every epoch and are no submodules: `fit` cannot change tensors that `validate` made in
        inference mode, and precision plugins cast the states of submodules. In float64, because a perplexity is a sum
        over millions of tokens.
        """
        return [{name: self._new_metric() for name in _METRICS} for _ in range(num_loaders)]

    def _new_metric(self) -> Metric:
        # one rank has nothing to exchange, though it may have a process group
        metric = MeanMetric(distributed_available_fn=lambda: self.trainer.world_size > 1)
        return metric.set_dtype(torch.float64).to(self.device)

    def _evaluate(self, batch: dict[str, Tensor], dataloader_idx: int) -> None:
        """Update the metrics of a loader with a batch."""
        metrics = self._metrics[dataloader_idx]
        prepared = self.scorer.prepare(batch)
        if is_classification(batch):
            scores = self.scorer.option_scores(prepared).values[0]
            losses = nn.functional.cross_entropy(scores, batch["label"], reduction="none")
            metrics["option_loss"].update(losses)
            metrics["accuracy"].update((scores.argmax(1) == batch["label"]).double())
            return
        num_tokens = batch["attention_mask"][:, 1:].sum()
        metrics["loss"].update(self.scorer.token_nll(prepared)[0].double().sum() / num_tokens, weight=num_tokens)
        metrics["sequence_length"].update(batch["attention_mask"].sum(1).double())
        bos = getattr(self.tokenizer, "bos_token_id", None)
        metrics["bos"].update((batch["input_ids"][:, 0] == (-1 if bos is None else bos)).double())

    def _log_metrics(self, stage: str) -> None:
        """Log the metrics of all ranks, for several loaders under the names that Lightning gives their metrics."""
        updated = torch.tensor(
            [[metric.update_called for metric in metrics.values()] for metrics in self._metrics],
            dtype=torch.float64,
            device=self.device,
        )
        # `compute` exchanges values: also a rank without a batch of a loader has to take part
        anywhere = self.trainer.strategy.reduce(updated, reduce_op="sum") > 0
        for index, metrics in enumerate(self._metrics):
            suffix = f"/dataloader_idx_{index}" if len(self._metrics) > 1 else ""
            used = zip(metrics.items(), anywhere[index].tolist(), strict=True)
            measured = {name: metric.compute() for (name, metric), was_updated in used if was_updated}
            if "loss" in measured:
                measured["perplexity"] = measured["loss"].exp()
            for name, value in measured.items():
                self.log(
                    f"{stage}/{name}{suffix}",
                    value,
                    prog_bar=name not in _SETTINGS,
                    # Lightning would not accept the suffix, which it adds only to what a step logs
                    add_dataloader_idx=False,
                    # all ranks have the same value; the maximum of equal values is exact, a mean is rounded
                    sync_dist=True,
                    reduce_fx="max",
                )
