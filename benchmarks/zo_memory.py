"""Peak memory of a training step beside that of inference on the same batch, for each thing that can be trained.

    python benchmarks/zo_memory.py

Every method runs two steps of its own module (optimizer states are there in the second), inference is the validation of
the model as it is, by the same trainer; each in a fresh process, forked from one that has imported everything and holds
nothing. Taken is the peak of resident memory (VmHWM) less what is resident after the fork: weights, adapters,
gradients, states, activations. Methods that the result file holds are not run again.
"""

import argparse
import json
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import peft  # noqa: F401  (imported here, or it would count as LoRA's)
import torch
from lightning.pytorch import Trainer
from records import ROOT, describe, finished, is_finished, write
from rich.console import Console
from torch.utils.data import DataLoader
from transformers import LlamaForCausalLM  # noqa: F401  (the same for every method's model)

from wandazeta.adapters import LoRAAdapters, PeftLoRA, TensorTrainAdapters, Weights
from wandazeta.modules import FirstOrderModule, LanguageModel, ZerothOrderModule
from wandazeta.zeroth_order import ConstantSchedule

RESULT = ROOT / "benchmarks" / "results" / "zo_memory.json"
MODEL = ROOT / ".cache" / "wandazeta" / "smollm2-135m"
# one perturbed copy at a time, nothing kept from step to step
FORWARD_ONLY = {"schedule": ConstantSchedule(1), "query_chunk_size": 1, "prefix_cache_gib": 0}
METHODS: dict[str, tuple[type, dict[str, Any]]] = {
    "inference": (LanguageModel, {}),
    "tensor_train": (ZerothOrderModule, FORWARD_ONLY | {"trainable": TensorTrainAdapters()}),
    "lora": (ZerothOrderModule, FORWARD_ONLY | {"trainable": LoRAAdapters()}),
    "mezo": (ZerothOrderModule, FORWARD_ONLY | {"trainable": Weights()}),
    "tensor_train_backprop": (FirstOrderModule, {"trainable": TensorTrainAdapters()}),
    "lora_backprop": (FirstOrderModule, {"trainable": PeftLoRA()}),
    "full_backprop": (FirstOrderModule, {"trainable": Weights()}),
}

console = Console()


def resident(field: str) -> int:
    """Bytes of this process: `VmRSS` now, `VmHWM` at the peak."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def make_batch(model_dir: Path, size: int, num_tokens: int) -> dict[str, torch.Tensor]:
    """Prompts of random tokens with two answers of one token each."""
    vocabulary = json.loads((model_dir / "config.json").read_text())["vocab_size"]
    ids = torch.randint(vocabulary, (size, num_tokens), generator=torch.Generator().manual_seed(0))
    options = torch.tensor([[vocabulary // 3], [vocabulary // 2]])
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "label": torch.arange(size) % 2,
        "option_ids": options,
        "option_mask": options >= 0,
    }


def measure(model_dir: Path, method: str, size: int, num_tokens: int, threads: int) -> int:
    """Bytes that a method takes in this process."""
    torch.set_num_threads(threads)
    before = resident("VmRSS")
    kind, options = METHODS[method]
    module, batch = kind(str(model_dir), **options), make_batch(model_dir, size, num_tokens)
    for parameter in module.parameters():
        parameter.detach().sum()  # weights count whether or not the batch needs the page of the file that they are in
    # loading has peaks of its own
    Path("/proc/self/clear_refs").write_text("5")
    trainer = Trainer(
        accelerator="cpu",
        devices=1,
        max_steps=2,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    run = trainer.validate if method == "inference" else trainer.fit
    run(module, DataLoader([batch, batch], batch_size=None))
    return resident("VmHWM") - before


def measure_apart(arguments: argparse.Namespace, method: str) -> float:
    """GiB that a method takes, measured in a process of its own."""
    given = (arguments.model, method, arguments.batch, arguments.tokens, arguments.threads)
    with get_context("fork").Pool(1) as pool:
        return round(pool.apply(measure, given) / 2**30, 4)


def main() -> None:
    """Make the records that are missing and write the result file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=MODEL, help="directory of a causal language model")
    parser.add_argument("--batch", type=int, default=4, help="examples of a batch")
    parser.add_argument("--tokens", type=int, default=64, help="tokens of an example")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--result", type=Path, default=RESULT, help="file to write")
    arguments = parser.parse_args()
    records = finished(arguments.result)
    setting = {"model": arguments.model.name, "batch": arguments.batch, "tokens": arguments.tokens}
    setting |= {"dtype": "float32", "threads": arguments.threads}
    todo = [m for m in METHODS if m != "inference" and not is_finished(setting | {"method": m}, records)]
    inference = measure_apart(arguments, "inference") if todo else 0.0
    for method in todo:
        peak = measure_apart(arguments, method)
        records.append(setting | {"method": method, "peak_gib": peak, "inference_gib": inference})
        write(arguments.result, describe("zo_memory", records))
        console.print(f"{method}: {peak:.3f} GiB, {peak / inference:.2f} x inference")


if __name__ == "__main__":
    main()
