"""Wanda and SparseGPT beside llm-compressor on one GPU: the same random model and token ids, 2:4.

    python benchmarks/gpu/peer.py --blocks 2
    python benchmarks/gpu/peer.py --device cpu --shape tiny

The timed part is one call, as in `benchmarks/prune_worker.py`. llm-compressor runs as it does by default, with the
model and its activations in CPU memory, and with all of it on the GPU. Where it is not installed, only this project
runs. Every setting is pruned once with two samples before, which loads and chooses kernels.
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1]))

from prune_gpu import SHAPES, Shape, random_model
from records import RESULTS, describe, write

from wandazeta.pruning import PruneOptions, prune_model
from wandazeta.utilities.memory import peak_memory

METHODS = ("wanda", "sparsegpt")
# where llm-compressor keeps its model and activations
PLACES = ("cpu", "cuda")


def wandazeta(
    model: nn.Module, windows: torch.Tensor, method: str, offload: str | None, device: torch.device
) -> Callable[[], object]:
    """Return the pruning by this project."""
    options = PruneOptions.from_dict({"method": method, "sparsity_pattern": "2:4"})
    batches = [{"input_ids": window.to(device)} for window in windows.split(1)]
    return lambda: prune_model(model, lambda batch: model(**batch, use_cache=False), batches, options, device=device)


def llmcompressor(
    model: Any, windows: torch.Tensor, method: str, offload: str | None, device: torch.device
) -> Callable[[], object]:
    """Return the pruning by llm-compressor."""
    from llmcompressor.entrypoints.oneshot import Oneshot
    from llmcompressor.modifiers.pruning import SparseGPTModifier, WandaPruningModifier
    from torch.utils.data import DataLoader

    kinds = {"wanda": WandaPruningModifier, "sparsegpt": SparseGPTModifier}
    modifier = kinds[method](sparsity=0.5, mask_structure="2:4", ignore=["re:.*lm_head.*", "re:.*embed.*"])
    loader = DataLoader([{"input_ids": window} for window in windows], batch_size=1)
    return Oneshot(
        model=model, processor=_tokenizer(), recipe=[modifier], dataset=loader, sequential_offload_device=offload
    )


def _tokenizer() -> Any:
    """Return a tokenizer; it is asked for and has nothing to do, as the samples are token ids."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0}, unk_token="a")), pad_token="a")


TOOLS: dict[str, Callable[..., Callable[[], object]]] = {"wandazeta": wandazeta, "llmcompressor": llmcompressor}


def measure(tool: str, method: str, offload: str | None, shape: Shape, arguments: argparse.Namespace) -> dict[str, Any]:
    """Prune a new model and return its record."""
    device = arguments.device
    record: dict[str, Any] = {"tool": tool, "method": method, "blocks": shape.blocks, "samples": arguments.num_samples}
    record |= {"tokens": arguments.sequence_length, "offload": offload}
    for count in (2, arguments.num_samples):
        torch.manual_seed(0)
        model = random_model(shape, device, device if offload is None else torch.device(offload))
        windows = torch.randint(shape.vocabulary, (count, arguments.sequence_length))
        with tempfile.TemporaryDirectory() as folder:
            # llm-compressor reads the configuration by the model's name
            model.config.save_pretrained(folder)
            model.name_or_path = model.config._name_or_path = folder
            prune = TOOLS[tool](model, windows, method, offload, device)
            _synchronize(device)
            if device.type == "cuda":
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()
            start = time.perf_counter()
            prune()
            _synchronize(device)
            seconds = time.perf_counter() - start
    zeros = [float((m.weight == 0).double().mean()) for m in model.model.layers.modules() if isinstance(m, nn.Linear)]
    record |= {"seconds": seconds, "seconds_per_block": seconds / shape.blocks, "peak_gib": peak_memory(device) / 2**30}
    return record | {"sparsity": sum(zeros) / len(zeros)}


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def main() -> None:
    """Measure; the result file is written after each pruning."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", type=torch.device, default=torch.device("cuda"))
    parser.add_argument("--shape", choices=SHAPES, default="llama-7b")
    parser.add_argument("--blocks", type=int, default=2)
    parser.add_argument("--num-samples", type=int, help="calibration samples; 128, and 4 for the tiny shape")
    parser.add_argument("--sequence-length", type=int, help="tokens of a sample; 2048, and 16 for the tiny shape")
    parser.add_argument("--result", type=Path, help="the result file; none is written for a CPU unless it is named")
    arguments = parser.parse_args()
    is_tiny = arguments.shape == "tiny"
    arguments.num_samples = arguments.num_samples or (4 if is_tiny else 128)
    arguments.sequence_length = arguments.sequence_length or (16 if is_tiny else 2048)
    if arguments.result is None and arguments.device.type == "cuda":
        arguments.result = RESULTS / "peer_gpu.json"
    shape = replace(SHAPES[arguments.shape], blocks=arguments.blocks)
    has_peer = find_spec("llmcompressor") is not None
    places = [place for place in PLACES if has_peer and (place == "cpu" or arguments.device.type == "cuda")]
    records = []
    for method in METHODS:
        for tool, offload in (("wandazeta", None), *(("llmcompressor", place) for place in places)):
            records.append(measure(tool, method, offload, shape, arguments))
            print(records[-1], flush=True)
            if arguments.result is not None:
                content = describe(arguments.result.stem, records)
                if has_peer:
                    from importlib.metadata import version

                    content["versions"]["llmcompressor"] = version("llmcompressor")
                write(arguments.result, content)
    if not has_peer:
        print("llm-compressor is not installed; benchmarks/prune_requirements.txt has its versions")


if __name__ == "__main__":
    main()
