"""Load a backbone and its tokenizer by a Hugging Face name or from a directory."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn

from wandazeta.models.encoder import EncoderClassifier
from wandazeta.models.streamed_model import build_streamed


def load_tokenizer(model_name_or_path: str, trust_remote_code: bool, pad_token: str | None) -> Any:
    """Load a model's tokenizer.

    Raises:
        ValueError: If there is none, or it does not know `pad_token`.
    """
    from transformers import AutoTokenizer

    with _explaining(model_name_or_path, "a model with its tokenizer"):
        tokenizer = AutoTokenizer.from_pretrained(model_name_or_path, trust_remote_code=trust_remote_code)
    if pad_token is not None:
        # not by the id of what is unknown: of GPT-2 that is the end-of-text token
        if pad_token not in tokenizer.get_vocab():
            raise ValueError(
                f"Expected argument `pad_token` to be a token of the vocabulary, but got {pad_token!r}; "
                f"the end-of-sequence token {tokenizer.eos_token!r} is a usual choice"
            )
        tokenizer.pad_token = pad_token
    return tokenizer


def check_loading(model_name_or_path: str, dtype: str, num_classes: int | None, stream: bool, shard: bool) -> None:
    """Check what can be known before anything is loaded.

    Raises:
        ValueError: If an argument is out of range or does not go with another.
    """
    if dtype not in ("float32", "bfloat16", "float16"):
        raise ValueError(f"Expected argument `dtype` to be float32, bfloat16 or float16, but got {dtype!r}")
    if num_classes is not None and num_classes < 2:
        raise ValueError(f"Expected argument `num_classes` to be at least 2, but got {num_classes}")
    if (stream or shard) and num_classes is not None:
        raise ValueError(
            f"Expected argument `num_classes` to be null with `{'stream_weights' if stream else 'shard_on_load'}`, but "
            f"got {num_classes}; an encoder fits into memory"
        )
    if stream and shard:
        raise ValueError(
            "Expected one of `stream_weights` and `shard_on_load` at most, but got both; the first is for `prune`"
        )
    if stream and not Path(model_name_or_path).is_dir():
        raise ValueError(
            f"Expected argument `model_name_or_path` to be a local directory, from which `stream_weights` reads, but "
            f"got {str(model_name_or_path)!r}; download the model first"
        )


def load_backbone(
    model_name_or_path: str,
    dtype: str,
    attn_implementation: str | None,
    trust_remote_code: bool,
    num_classes: int | None = None,
    stream_weights: bool = False,
) -> nn.Module:
    """Load a causal language model, or an encoder under a new head, from safetensors only.

    Raises:
        ValueError: If it cannot be loaded, or the model is not of the kind asked for.
    """
    from transformers import AutoModel, AutoModelForCausalLM

    with _explaining(model_name_or_path, "a causal language model" if num_classes is None else "an encoder"):
        if stream_weights:
            return build_streamed(
                Path(model_name_or_path), getattr(torch, dtype), attn_implementation, trust_remote_code
            )
        if num_classes is not None:
            _require_encoder(model_name_or_path, trust_remote_code)
        model: nn.Module = (AutoModelForCausalLM if num_classes is None else AutoModel).from_pretrained(
            model_name_or_path,
            dtype=getattr(torch, dtype),
            attn_implementation=attn_implementation,
            trust_remote_code=trust_remote_code,
            use_safetensors=True,
        )
    return model if num_classes is None else EncoderClassifier(model, num_classes)


@contextmanager
def _explaining(model_name_or_path: str, kind: str) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, ImportError, SafetensorError) as error:
        first_line = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        if _is_missing_directory(str(model_name_or_path)):
            # it was asked of the hub, whose answer leads astray
            first_line = f"there is no such directory; {_how_to_get(Path(model_name_or_path))}"
        raise ValueError(
            f"Expected argument `model_name_or_path` to be {kind}, a Hugging Face name or a directory "
            f"with config, tokenizer and safetensors, but got {str(model_name_or_path)!r}: {first_line}"
        ) from error


def _is_missing_directory(model_name_or_path: str) -> bool:
    """Whether this cannot be meant for a name of the hub, `owner/model`, and leads nowhere."""
    is_path = model_name_or_path.startswith((".", "/", "~", "runs/")) or model_name_or_path.count("/") > 1
    return is_path and not Path(model_name_or_path).exists()


def _how_to_get(directory: Path) -> str:
    folder, chosen = directory.parent.absolute(), os.environ.get("WANDAZETA_CACHE")
    is_chosen = chosen is not None and folder == Path(chosen).expanduser().absolute()
    if not is_chosen and folder.parts[-2:] != (".cache", "wandazeta"):
        return "write it first, or name another"
    # samples go there by themselves if it is chosen or there already
    variable = "" if is_chosen or (chosen is None and folder.is_dir()) else f"WANDAZETA_CACHE={directory.parent} "
    return f"run `{variable}python -m wandazeta.data.samples {directory.name}` to fetch this sample"


def _require_encoder(model_name_or_path: str, trust_remote_code: bool) -> None:
    """Refuse what reads from left to right only: its mean over the tokens is no representation of the text."""
    from transformers import MODEL_FOR_MASKED_LM_MAPPING, AutoConfig

    config = AutoConfig.from_pretrained(model_name_or_path, trust_remote_code=trust_remote_code)
    if type(config) not in MODEL_FOR_MASKED_LM_MAPPING or config.is_encoder_decoder:
        raise ValueError(
            f"a {config.model_type} model is no encoder such as BERT, RoBERTa or MPNet; leave `num_classes` out to "
            "have it choose among answer options"
        )
