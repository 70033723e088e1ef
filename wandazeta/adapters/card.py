"""Model card of saved adapters."""

from pathlib import Path
from typing import Any

_KINDS = {"tensor_train": "Tensor-train adapters", "lora": "LoRA adapters"}


def adapter_card(description: dict[str, Any]) -> str:
    """Return the model card: kind and size of the adapters, their base model, and how to load them.

    Args:
        description: Content of `adapters.json`.
    """
    kind = description["kind"]
    # a path of this machine is of no use elsewhere
    base = description["base_model"]
    name = Path(base).name if Path(base).is_absolute() else base
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
```python
{_usage(name, description)}
```
{_PEFT if kind == "lora" else ""}"""


_PRUNED = """The base model was pruned before they were trained, so name the pruned model's directory instead.
"""

_PEFT = """
peft reads these files (without a check of the weights): `PeftModel.from_pretrained(model, "path/to/this/directory")`.
"""


def _usage(name: str, description: dict[str, Any]) -> str:
    """Return the lines that load the base model and the adapters; an encoder gets a new head."""
    directory = '"path/to/this/directory"'
    linear, *_, outputs = (description["linears"] or [":"])[0].split(":")
    if linear == "answers":
        return f"""from wandazeta.models.loading import LoadingOptions
from wandazeta.modules import ZerothOrderModule
from wandazeta.zeroth_order import TrainedHead

loading = LoadingOptions(dtype="{description["dtype"]}")
model = ZerothOrderModule("{name}", loading, head=TrainedHead(num_answers={outputs}))
model.load_adapters({directory})"""
    return f"""{_model(name, description)}
load_adapters(model, {directory})"""


def _model(name: str, description: dict[str, Any]) -> str:
    load = f'from_pretrained("{name}", dtype="{description["dtype"]}")'
    if not description["linears"]:
        return f"""from transformers import AutoModelForCausalLM
from wandazeta import load_adapters

model = AutoModelForCausalLM.{load}"""
    num_classes = description["linears"][0].split(":")[2]
    return f"""from transformers import AutoModel
from wandazeta import load_adapters
from wandazeta.models.encoder import EncoderClassifier

model = EncoderClassifier(AutoModel.{load}, {num_classes})"""


def _summary(kind: str, sites: list[str]) -> str:
    """Return the sites, each once, and the number of blocks or modules that have them."""
    if kind == "tensor_train":
        parts = [site.split(":") for site in sites]
        places = dict.fromkeys(f"`{position}:{name}`" for _, position, name, _ in parts)
        blocks = sorted({int(block) for block, *_ in parts})
        return f"{', '.join(places)} in {len(blocks)} blocks ({blocks[0]} to {blocks[-1]})"
    names = dict.fromkeys(f"`{site.split(':')[0].rpartition('.')[2]}`" for site in sites)
    return f"{', '.join(names)}: {len(sites)} modules"
