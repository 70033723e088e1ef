"""Model card of a pruned model."""

from pathlib import Path
from typing import Any

from wandazeta.models.peft_layers import adapter_modules
from wandazeta.pruning.export.masks import MASKS_FILE
from wandazeta.pruning.export.packed import PACKED_FILE
from wandazeta.pruning.records import PruneReport

__all__ = ["ADAPTERS_FOLDER", "PAGE_FILE", "REPORT_FILE", "hub_name", "model_card"]

REPORT_FILE = "prune_report.json"
PAGE_FILE = "prune_report.html"
ADAPTERS_FOLDER = "adapters"

_PACKED_ENTRY = (
    f"- `{PACKED_FILE}`: the same weights in the 2:4 packed form; ship it in place of `model*.safetensors`, and "
    "`python -m wandazeta.pruning.export.packed SRC DST` restores the plain file bit for bit"
)
_ADAPTERS_ENTRY = (
    f"- `{ADAPTERS_FOLDER}/`: the adapters that the model was pruned with, dense, one directory each; put them back by "
    "`PeftModel.from_pretrained`"
)


def hub_name(model: Any) -> str | None:
    """Name of the model on the Hugging Face hub that this one was loaded from, or None if it came from elsewhere.

    Args:
        model: A transformers model.
    """
    base = getattr(model.config, "_name_or_path", "") or ""
    is_hub_name = base.count("/") == 1 and not base.startswith((".", "/", "~")) and not Path(base).exists()
    return base if is_hub_name else None


def model_card(
    model: Any, report: PruneReport, *, has_tokenizer: bool = False, has_page: bool = False, is_packed: bool = False
) -> str:
    """Write the model card of a pruned model, the `README.md` of its directory.

    Args:
        model: The pruned transformers model.
        report: The report of the pruning.
        has_tokenizer: Whether the directory holds the tokenizer.
        has_page: Whether it holds the report as an HTML page.
        is_packed: Whether it holds the 2:4 packed file.

    Returns:
        The card in Markdown, with the metadata that the hub reads at its top.
    """
    base, kind = hub_name(model), type(model).__name__
    calibration = f"Calibrated on {report.num_samples} samples with {report.num_tokens} tokens in total."
    lines = [
        "---",
        "library_name: transformers",
        "tags: [pruned, sparse, wandazeta]",
        *([f"base_model: {base}"] if base else []),
        "---",
        "",
        f"# {base or kind}, pruned",
        "",
        f"{report.sparsity:.2%} of the weights in {report.num_layers} Linear layers of {len(report.blocks)} blocks are "
        f"zero (method `{report.method_name}`, pattern `{report.sparsity_pattern}`). Embeddings, norms and head are "
        f"unchanged. {calibration if report.num_samples else 'No calibration data were used.'}",
        "",
        *([report.unreached_words, ""] if report.unreached_words else []),
        report.gain,
        "",
        "```python",
        f"from transformers import {'AutoTokenizer, ' if has_tokenizer else ''}{kind}",
        "",
        f'model = {kind}.from_pretrained("path/to/this/directory")',
        *(['tokenizer = AutoTokenizer.from_pretrained("path/to/this/directory")'] if has_tokenizer else []),
        "```",
        "",
        "- `model*.safetensors`: the weights; pruned ones are zeros",
        f"- `{MASKS_FILE}`: masks, true where a weight is kept, one byte per weight; not needed to run the model",
        *([_PACKED_ENTRY] if is_packed else []),
        *([_ADAPTERS_ENTRY] if adapter_modules(model) else []),
        f"- `{REPORT_FILE}`: what was done to every layer",
        *([f"- `{PAGE_FILE}`: the same report with charts, for a browser"] if has_page else []),
        "",
        "| option | value |",
        "|---|---|",
        *(f"| `{name}` | `{value}` |" for name, value in report.options.items()),
        "",
    ]
    return "\n".join(lines)
