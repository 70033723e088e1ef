"""Load a model and its tokenizer from the Hugging Face hub or from a local directory."""

import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from torch import nn

from wandazeta.models.checkpoint import is_of_a_head, load_config, require_loaded
from wandazeta.models.encoder import EncoderClassifier
from wandazeta.models.streaming import load_streamed_model
from wandazeta.utilities.arguments import check_range
from wandazeta.utilities.hub import offline_without_hub

# a directory with adapters has another message
_NEEDED_FILES = ("config.json", "adapters.json", "adapter_config.json")


@dataclass(frozen=True)
class LoadingOptions:
    """How a model and its tokenizer are loaded.

    Args:
        dtype: Precision that the weights are loaded in. Adapters are float32 whatever it is.
        attn_implementation: Attention kernels, such as sdpa or flash_attention_2; by default those that transformers
            chooses for the model.
        trust_remote_code: Run Python code that comes with the model; only for sources that you trust.
        pad_token: Token to pad with, for tokenizers that have none.
        num_classes: Number of classes of a new classification head on an encoder such as BERT; by default the model is
            a causal language model.
        stream_weights: Leave the weights of the blocks in their safetensors files and load one block at a time, to
            prune a model larger than the CPU memory. For `prune` alone, and from a local directory.
        shard_on_load: Load only a shard of every weight on each rank, for a model larger than the CPU memory of one
            process. For DeepSpeed ZeRO stage 3; prune such a model with `wandazeta prune` and `stream_weights` first.

    Raises:
        ValueError: If an option is out of range or contradicts another one.

    Examples:
        >>> LoadingOptions(dtype="bfloat16").torch_dtype
        torch.bfloat16
    """

    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    attn_implementation: str | None = None
    trust_remote_code: bool = False
    pad_token: str | None = None
    num_classes: int | None = None
    stream_weights: bool = False
    shard_on_load: bool = False

    def __post_init__(self) -> None:
        check_range(
            "dtype", self.dtype, self.dtype in ("float32", "bfloat16", "float16"), "float32, bfloat16 or float16"
        )
        check_range("num_classes", self.num_classes, self.num_classes is None or self.num_classes >= 2, "at least 2")
        if self.stream_weights and self.shard_on_load:
            raise ValueError(
                "Expected at most one of `stream_weights` and `shard_on_load`, but got both; `stream_weights` is for "
                "`prune`, `shard_on_load` for DeepSpeed ZeRO stage 3"
            )
        if self.num_classes is not None and (self.stream_weights or self.shard_on_load):
            option = "stream_weights" if self.stream_weights else "shard_on_load"
            raise ValueError(
                f"Expected argument `num_classes` to be null with `{option}`, but got {self.num_classes}; leave out "
                f"`{option}`, an encoder fits into memory"
            )

    @property
    def torch_dtype(self) -> torch.dtype:
        """The torch type of `dtype`."""
        dtype: torch.dtype = getattr(torch, self.dtype)
        return dtype

    def check_source(self, model_name_or_path: str) -> None:
        """Check the options that depend on where the model is, before anything is loaded.

        Args:
            model_name_or_path: Hugging Face name or local directory.

        Raises:
            ValueError: If `stream_weights` is set and the model is not in a local directory.
        """
        if self.stream_weights and not Path(model_name_or_path).is_dir():
            raise ValueError(
                "Expected argument `model_name_or_path` to be a local directory, from which `stream_weights` reads, "
                f"but got {str(model_name_or_path)!r}; download the model first"
            )

    def refuse(self, option: Literal["stream_weights", "shard_on_load"], owner: str, remedy: str) -> None:
        """Refuse an option that a module cannot use.

        Args:
            option: Name of the option.
            owner: Name of the module's class.
            remedy: What to do instead, for the error message.

        Raises:
            ValueError: If the option is set.
        """
        if getattr(self, option):
            raise ValueError(f"Expected argument `{option}` to be false for {owner}, but got True; {remedy}")


def load_tokenizer(
    name: str, trust_remote_code: bool = False, pad_token: str | None = None, argument: str = "model_name_or_path"
) -> Any:
    """Load a tokenizer.

    Args:
        name: Hugging Face name or local directory of the tokenizer or of its model.
        trust_remote_code: Run Python code that comes with it.
        pad_token: Token to pad with; by default the tokenizer's own, if it has one.
        argument: Name of the user's argument that `name` comes from, for error messages.

    Raises:
        ValueError: If there is no tokenizer, or `pad_token` is not in its vocabulary.
    """
    from transformers import AutoTokenizer

    with _explained_errors(name, "a model with its tokenizer", argument):
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=trust_remote_code)
    if pad_token is not None:
        # looked up in the vocabulary and not compared with the unknown token: GPT-2's is its end-of-text token
        if pad_token not in tokenizer.get_vocab():
            raise ValueError(
                f"Expected argument `pad_token` to be a token of the vocabulary, but got {pad_token!r}; "
                f"the end-of-sequence token {tokenizer.eos_token!r} is a usual choice"
            )
        tokenizer.pad_token = pad_token
    return tokenizer


def load_backbone(model_name_or_path: str, loading: LoadingOptions | None = None) -> nn.Module:
    """Load a causal language model, or an encoder with a new classification head, from safetensors files.

    Args:
        model_name_or_path: Hugging Face name or local directory.
        loading: How it is loaded; by default as `LoadingOptions()` says.

    Raises:
        ValueError: If it cannot be loaded, is not a model of the requested kind, or its files do not hold exactly its
            weights.
    """
    from transformers import AutoModel, AutoModelForCausalLM

    loading = loading or LoadingOptions()
    num_classes = loading.num_classes
    with _explained_errors(model_name_or_path, "a causal language model" if num_classes is None else "an encoder"):
        _refuse_adapters(Path(model_name_or_path))
        if loading.stream_weights:
            return load_streamed_model(
                Path(model_name_or_path), loading.torch_dtype, loading.attn_implementation, loading.trust_remote_code
            )
        config = load_config(model_name_or_path, loading.trust_remote_code)
        if num_classes is not None:
            _require_encoder(config)
        auto_class: Any = AutoModelForCausalLM if num_classes is None else AutoModel
        model, info = auto_class.from_pretrained(
            model_name_or_path,
            config=config,
            dtype=loading.torch_dtype,
            attn_implementation=loading.attn_implementation,
            trust_remote_code=loading.trust_remote_code,
            use_safetensors=True,
            # other shapes are refused below, by name
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
        if num_classes is not None:
            info["unexpected_keys"] = {name for name in info["unexpected_keys"] if not is_of_a_head(model, name)}
        pooler = getattr(model, "pooler", None) if num_classes is not None else None
        require_loaded(model, info, optional=[] if pooler is None else [pooler])
    return model if num_classes is None else EncoderClassifier(model, num_classes)


def stored_dtype(model_name_or_path: str) -> Literal["float32", "bfloat16", "float16"]:
    """Return the precision that a model is stored in, by its configuration; float32 if it does not say.

    Args:
        model_name_or_path: Hugging Face name or local directory.

    Raises:
        ValueError: If there is no configuration.
    """
    with _explained_errors(model_name_or_path, "a causal language model"):
        _refuse_adapters(Path(model_name_or_path))
        dtype = load_config(model_name_or_path, trust_remote_code=False).dtype
    return "bfloat16" if dtype == torch.bfloat16 else "float16" if dtype == torch.float16 else "float32"


def load_skeleton(model_name_or_path: str, loading: LoadingOptions) -> nn.Module:
    """Build a causal language model from its configuration, without memory for weights and without values.

    Args:
        model_name_or_path: Hugging Face name or local directory.
        loading: How the model is loaded.

    Raises:
        ValueError: If there is no configuration of a causal language model.
    """
    from transformers import AutoModelForCausalLM

    with _explained_errors(model_name_or_path, "a causal language model"), torch.device("meta"):
        config = load_config(model_name_or_path, loading.trust_remote_code)
        model: nn.Module = AutoModelForCausalLM.from_config(config, trust_remote_code=loading.trust_remote_code)
    return model


@contextmanager
def _explained_errors(name: str, kind: str, argument: str = "model_name_or_path") -> Iterator[None]:
    """Turn the errors of transformers into a `ValueError` that names the argument and the remedy."""
    uses_hub = True
    try:
        if _is_missing_directory(str(name)):
            # transformers would ask the hub for it, whose answer is misleading
            raise ValueError(f"there is no such directory; {_how_to_get(Path(name))}")
        with nullcontext(True) if Path(name).exists() else offline_without_hub() as uses_hub:
            yield
    except (OSError, ValueError, ImportError, SafetensorError) as error:
        first_line = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        if Path(name).is_dir() and not any((Path(name) / file).is_file() for file in _NEEDED_FILES):
            first_line = "this directory holds no model (config.json); choose the one that does"
        elif not uses_hub and isinstance(error, OSError):
            first_line = "it is no directory, the hub cannot be reached, and it is not in the cache of the hub"
        raise ValueError(
            f"Expected argument `{argument}` to be {kind}, a Hugging Face name or a directory "
            f"with config, tokenizer and safetensors, but got {str(name)!r}: {first_line}"
        ) from error


def _is_missing_directory(name: str) -> bool:
    """Whether a name cannot be one of the hub (`owner/model`) and no directory has it."""
    is_path = name.startswith((".", "/", "~", "runs/")) or name.count("/") > 1
    return is_path and not Path(name).exists()


def _how_to_get(directory: Path) -> str:
    """Return how a missing directory comes into being, for an error message."""
    folder, chosen = directory.parent.absolute(), os.environ.get("WANDAZETA_CACHE")
    is_chosen = chosen is not None and folder == Path(chosen).expanduser().absolute()
    if not is_chosen and folder.parts[-2:] != (".cache", "wandazeta"):
        return "write it first, or name another"
    # samples are fetched into this folder if it exists or the variable names it
    variable = "" if is_chosen or (chosen is None and folder.is_dir()) else f"WANDAZETA_CACHE={directory.parent} "
    return f"run `{variable}python -m wandazeta.data.samples {directory.name}` to fetch this sample"


def _refuse_adapters(directory: Path) -> None:
    """Refuse a directory with adapters alone, which transformers would load, with their model, if they are peft's."""
    if (directory / "config.json").is_file():
        return
    for name in ("adapters.json", "adapter_config.json"):
        if (directory / name).is_file():
            raise ValueError(
                f"it holds adapters ({name}) and no model; give the model that they were trained on, and load the "
                "adapters into it (see their README.md)"
            )


def _require_encoder(config: Any) -> None:
    """Refuse a causal model: the mean of its hidden states over the tokens does not represent the text."""
    from transformers import MODEL_FOR_MASKED_LM_MAPPING

    if type(config) not in MODEL_FOR_MASKED_LM_MAPPING or config.is_encoder_decoder:
        raise ValueError(
            f"a {config.model_type} model is not an encoder such as BERT, RoBERTa or MPNet; leave `num_classes` out to "
            "let it choose among answer options"
        )
