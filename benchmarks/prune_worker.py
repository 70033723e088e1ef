"""One timed pruning in a process of its own, for `benchmarks/prune_cost.py speed`; runs in either tool's environment.

    python benchmarks/prune_worker.py TASK.json

The timed part is one call: `prune_model` of this project or an `Oneshot` of llm-compressor, each with the loaded model
and the token ids in memory. Both calibrate, choose masks and set weights; neither saves anything within that time.
Imports, loading the model and what `Oneshot` checks and unties before are not timed. This file imports nothing of
wandazeta at the top, because llm-compressor's environment does not have it.
"""

import json
import resource
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM

# the embeddings are tied to the head, and llm-compressor would prune both
_IGNORED = ["re:.*lm_head.*", "re:.*embed.*"]


def wandazeta(model: nn.Module, windows: torch.Tensor, task: dict[str, Any]) -> Callable[[], object]:
    """Return the pruning by this project."""
    from wandazeta.pruning import PruneOptions, prune_model

    names = ("method", "sparsity_pattern")
    options = PruneOptions.from_dict({name: task[name] for name in names} | task["options"])
    batches = [{"input_ids": window} for window in windows.split(task["batch_size"])]
    return lambda: prune_model(model, lambda batch: model(**batch, use_cache=False), batches, options)


def llmcompressor(model: nn.Module, windows: torch.Tensor, task: dict[str, Any]) -> Callable[[], object]:
    """Return the pruning by llm-compressor, as in its examples."""
    from llmcompressor.entrypoints.oneshot import Oneshot
    from llmcompressor.modifiers.pruning import SparseGPTModifier, WandaPruningModifier
    from torch.utils.data import DataLoader

    kinds = {"wanda": WandaPruningModifier, "sparsegpt": SparseGPTModifier}
    modifier = kinds[task["method"]](sparsity=0.5, mask_structure=task["sparsity_pattern"], ignore=_IGNORED)
    loader = DataLoader([{"input_ids": window} for window in windows], batch_size=task["batch_size"])
    return Oneshot(model=model, recipe=[modifier], dataset=loader)


def main() -> None:
    """Load, prune, and save the pruned weights and the measurements."""
    task: dict[str, Any] = json.loads(Path(sys.argv[1]).read_text())
    torch.set_num_threads(task["threads"])
    model = AutoModelForCausalLM.from_pretrained(task["model"], dtype=getattr(torch, task["dtype"])).eval()
    windows = load_file(task["calibration"])["input_ids"]
    prune = {"wandazeta": wandazeta, "llmcompressor": llmcompressor}[task["tool"]](model, windows, task)
    start, cpu_start = time.perf_counter(), time.process_time()
    prune()
    seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu_start
    layers = model.model.layers
    weights = {n: m.weight.detach().contiguous() for n, m in layers.named_modules() if isinstance(m, nn.Linear)}
    save_file(weights, task["weights"])
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # Linux counts in KiB
    versions = {name: version(name) for name in (task["tool"], "torch", "transformers")}
    # compared with the wall-clock time, this shows whether something else used the machine
    measured = {"seconds": seconds, "cpu_seconds": cpu_seconds, "peak_gib": peak, "versions": versions}
    Path(task["measured"]).write_text(json.dumps(measured))


if __name__ == "__main__":
    main()
