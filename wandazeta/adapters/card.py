"""Model card of saved adapters."""

import json
from pathlib import Path
from typing import Any

_KINDS = {"tensor_train": "Tensor-train adapters", "lora": "LoRA adapters"}


def adapter_card(description: dict[str, Any]) -> str:
    """Return the model card: kind and size of the adapters, their base model, and how to load them.

    Args:
        description: Content of `adapters.json`.
    """
    kind, base = description["kind"], description["base_model"]
    name = _short(base)
    facts = {
        "base model": f"`{name}` in {description['dtype']}",
        "key of the backbone": f"`{description['backbone_key']}`",
        "fingerprint of its weights": f"`{description['backbone_fingerprint']}`",
        "trained values": f"{description['num_parameters']:,}",
        "rank": description["rank"],
    }
    for setting in ("bottleneck", "alpha"):
        if setting in description:
            facts[setting] = description[setting]
    if description["linears"]:
        linears = (text.split(":") for text in description["linears"])
        facts["trained in full"] = ", ".join(f"`{name}` ({i} to {o})" for name, i, o in linears)
    sites = _summary(kind, description["sites"])
    rows = "\n".join(f"| {what} | {value} |" for what, value in facts.items())
    return f"""---
base_model: {name}
library_name: {"peft" if kind == "lora" else "wandazeta"}
tags: [{kind.replace("_", "-")}, wandazeta]
---

# {_KINDS[kind]} for {name}

| | |
| --- | --- |
{rows}
| sites | {sites} |

They fit the weights that they were trained on, with the same pruning; other weights are refused.
{_PRUNED if description["backbone_key"] != description["backbone_fingerprint"] else ""}
{_here(description)}

```python
{_usage(description)}
```
{_PEFT if kind == "lora" else ""}"""


def peft_card(backbone: dict[str, Any], num_classes: int | None) -> str:
    """Return the model card of adapters in the format of peft alone.

    Args:
        backbone: Description of the base model.
        num_classes: Number of classes of an encoder's head; None for a causal language model.
    """
    name = _short(backbone["base_model"])
    imports, model = _model(backbone, num_classes)
    lines = [
        *sorted(["from peft import PeftModel", *imports]),
        "",
        model,
        'model = PeftModel.from_pretrained(model, ".")',
    ]
    code = "\n".join(lines)
    return f"""---
base_model: {name}
library_name: peft
tags: [lora, wandazeta]
---

# LoRA adapters for {name}

{_here(backbone)}

```python
{code}
```
"""


_PRUNED = """The base model was pruned before they were trained, so name the pruned model's directory instead;
`wandazeta export-adapters` writes it beside the adapters.
"""

_PEFT = """
peft reads these files (without a check of the weights): `PeftModel.from_pretrained(model, ".")`.
"""


def _short(base: str) -> str:
    # a path of this machine is of no use elsewhere
    return Path(base).name if Path(base).is_absolute() else base


def _here(description: dict[str, Any]) -> str:
    written = (
        "" if "backbone" not in description else f"`{description['backbone']}/` is the base model as it was pruned. "
    )
    return f"{written}In this directory:"


def _location(description: dict[str, Any]) -> str:
    """Return what loads the base model, seen from the directory of the adapters."""
    base = str(description.get("backbone", description["base_model"]))
    # a relative path is one of the working directory
    return str(Path(base).absolute()) if "backbone" not in description and Path(base).is_dir() else base


def _usage(description: dict[str, Any]) -> str:
    """Return the lines that load the base model and the adapters; an encoder gets a new head."""
    linear, *_, outputs = (description["linears"] or [":"])[0].split(":")
    if linear == "answers":
        return f"""from wandazeta.adapters import TensorTrainAdapters
from wandazeta.models.loading import LoadingOptions
from wandazeta.modules import ZerothOrderModule
from wandazeta.zeroth_order import TrainedHead

model = ZerothOrderModule(
    "{_location(description)}",
    LoadingOptions(dtype="{description["dtype"]}"),
    trainable={_tensor_trains(description)},
    head=TrainedHead(num_answers={outputs}),
)
model.load_adapters(".")"""
    imports, model = _model(description, int(outputs) if linear else None)
    lines = [*sorted([*imports, "from wandazeta import load_adapters"]), "", model, 'load_adapters(model, ".")']
    return "\n".join(lines)


def _model(description: dict[str, Any], num_classes: int | None) -> tuple[list[str], str]:
    """Return the imports and the line that load the base model."""
    load = f'from_pretrained("{_location(description)}", dtype="{description["dtype"]}")'
    if num_classes is None:
        return ["from transformers import AutoModelForCausalLM"], f"model = AutoModelForCausalLM.{load}"
    imports = ["from transformers import AutoModel", "from wandazeta.models.encoder import EncoderClassifier"]
    return imports, f"model = EncoderClassifier(AutoModel.{load}, {num_classes})"


def _tensor_trains(description: dict[str, Any]) -> str:
    """Return the expression that makes the same adapters."""
    parts = [site.split(":") for site in description["sites"]]
    places = list(dict.fromkeys(f"{position}:{name}" for _, position, name, _ in parts))
    blocks = sorted({int(block) for block, *_ in parts})
    layers = "all" if blocks[0] == 0 else f"last:{len(blocks)}"
    sizes = f"rank={description['rank']}, bottleneck={description['bottleneck']}"
    return f'TensorTrainAdapters({sizes}, sites={json.dumps(places)}, layers="{layers}")'


def _summary(kind: str, sites: list[str]) -> str:
    """Return the sites, each once, and the number of blocks or modules that have them."""
    if kind == "tensor_train":
        parts = [site.split(":") for site in sites]
        places = dict.fromkeys(f"`{position}:{name}`" for _, position, name, _ in parts)
        blocks = sorted({int(block) for block, *_ in parts})
        return f"{', '.join(places)} in {len(blocks)} blocks ({blocks[0]} to {blocks[-1]})"
    names = dict.fromkeys(f"`{site.split(':')[0].rpartition('.')[2]}`" for site in sites)
    return f"{', '.join(names)}: {len(sites)} modules"
