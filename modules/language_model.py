"""A causal language model as a LightningModule: loading, perplexity, accuracy over answer options."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, Self

import torch
from lightning.pytorch import LightningModule
from safetensors import SafetensorError
from torch import Tensor, nn
from torchmetrics import MeanMetric
from typing_extensions import override

from wandazeta.stored import is_stored, require_whole

from .scoring import Scorer, is_classification
from .streamed_model import build_streamed


class LanguageModel(LightningModule):
    """A causal language model with its tokenizer, to be pruned, validated, tested and asked for predictions.

    Batches with a `label` are classified among answer options (`val/accuracy`, `val/option_loss`); all others are
    scored as running text (`val/loss`, the mean over tokens, and `val/perplexity`).

    Args:
        model_name_or_path: Hugging Face name or local directory of a causal language model.
        dtype: Precision that the weights are loaded in, such as float32 or bfloat16.
        attn_implementation: Attention kernels, such as sdpa or flash_attention_2; by default the model's best.
        trust_remote_code: Run code that comes with the model; only for sources that you trust.
        pad_token: Token to pad with, for tokenizers that have none.
        stream_weights: Leave the blocks' weights in the model's safetensors and bring in one block at a time, to prune
            a model larger than memory; for `prune` alone, from a local directory.

    Raises:
        ValueError: If the model cannot be loaded or an argument does not fit it.
    """

    def __init__(
        self,
        model_name_or_path: str,
        dtype: Literal["float32", "bfloat16", "float16"] = "float32",
        attn_implementation: str | None = None,
        trust_remote_code: bool = False,
        pad_token: str | None = None,
        stream_weights: bool = False,
    ) -> None:
        super().__init__()
        self.backbone, self.tokenizer = load_causal_lm(
            model_name_or_path, dtype, attn_implementation, trust_remote_code, pad_token, stream_weights
        )
        self.scorer = Scorer(self.backbone)
        self.metrics = nn.ModuleDict({stage: _metrics() for stage in ("val", "test")})

    @override
    def setup(self, stage: str) -> None:
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


def load_causal_lm(
    model_name_or_path: str,
    dtype: str,
    attn_implementation: str | None,
    trust_remote_code: bool,
    pad_token: str | None,
    stream_weights: bool = False,
) -> tuple[nn.Module, Any]:
    """Load a causal language model, from safetensors only, and its tokenizer.

    Raises:
        ValueError: If either cannot be loaded, or the tokenizer does not know `pad_token`.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if dtype not in ("float32", "bfloat16", "float16"):
        raise ValueError(f"Expected argument `dtype` to be float32, bfloat16 or float16, but got {dtype!r}")
    if stream_weights and not Path(model_name_or_path).is_dir():
        raise ValueError(
            f"Expected argument `model_name_or_path` to be a local directory, from which `stream_weights` reads, but "
            f"got {str(model_name_or_path)!r}; download the model first"
        )
    try:
        tokenizer = AutoTokenizer.from_pretrained(model_name_or_path, trust_remote_code=trust_remote_code)
        model = (
            build_streamed(Path(model_name_or_path), getattr(torch, dtype), attn_implementation, trust_remote_code)
            if stream_weights
            else AutoModelForCausalLM.from_pretrained(
                model_name_or_path,
                dtype=getattr(torch, dtype),
                attn_implementation=attn_implementation,
                trust_remote_code=trust_remote_code,
                use_safetensors=True,
            )
        )
    except (OSError, ValueError, ImportError, SafetensorError) as error:
        first_line = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(
            f"Expected argument `model_name_or_path` to be a causal language model, a Hugging Face name or a directory "
            f"with config, tokenizer and safetensors, but got {str(model_name_or_path)!r}: {first_line}"
        ) from error
    if pad_token is not None:
        if tokenizer.convert_tokens_to_ids(pad_token) in (None, tokenizer.unk_token_id):
            raise ValueError(
                f"Expected argument `pad_token` to be a token of the vocabulary, but got {pad_token!r}; "
                f"the end-of-sequence token {tokenizer.eos_token!r} is a usual choice"
            )
        tokenizer.pad_token = pad_token
    return model, tokenizer


@contextmanager
def evaluating(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Put modules into evaluation mode for a while, each back into its own afterwards.

    Takes a flat list and writes the flag itself: `train()` walks the tree, a millisecond in every step.
    """
    training = [module for module in modules if module.training]
    for module in training:
        module.__dict__["training"] = False
    try:
        yield
    finally:
        for module in training:
            module.__dict__["training"] = True
