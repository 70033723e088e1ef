"""Peak memory of `wandazeta prune` with streamed weights, on random models of the shape of LLaMA.

    python benchmarks/prune_memory.py --size 7b

Writes the model tensor by tensor, prunes it in a process of its own whose peak resident memory (VmHWM) is read while it
runs, and lets transformers load what came out. The weights are random, so the figures are of memory and time, not of
quality. A run that was stopped goes on where it was: then the peak is the highest of all its starts, the seconds are
those of all of them together. Everything but the result file is removed at the end, unless it is to be kept.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
import zlib
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml
from records import ROOT, describe, write
from rich.console import Console
from torch import Tensor

from wandazeta.models.safetensors_io import LazyTensor, write_streamed

RESULT = ROOT / "benchmarks" / "results" / "prune_memory.json"
TOKENIZER = ROOT / ".cache" / "wandazeta" / "smollm2-135m"
LAYERS_PER_SHARD = 4
SIZES: dict[str, dict[str, int]] = {
    "tiny": {"width": 128, "layers": 6, "mlp": 352, "heads": 4, "vocabulary": 2000},
    "1b": {"width": 2048, "layers": 22, "mlp": 5632, "heads": 32, "vocabulary": 32000},
    "7b": {"width": 4096, "layers": 32, "mlp": 11008, "heads": 32, "vocabulary": 32000},
}
# loads as anybody would, looks at the last block, and runs every layer once
CHECK = """
import sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
model, info = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype="auto", output_loading_info=True)
assert not any(info.values()), info
for weight in model.model.layers[-1].parameters():
    if weight.ndim == 2:
        assert ((weight.unflatten(1, (-1, 4)) == 0).sum(2) >= 2).all()
ids = AutoTokenizer.from_pretrained(sys.argv[1])("What is left", return_tensors="pt")["input_ids"]
with torch.no_grad():
    assert torch.isfinite(model(ids).logits).all()
"""

console = Console()


def shapes_of(size: dict[str, int]) -> list[dict[str, tuple[int, ...]]]:
    """Names and shapes of all tensors, one dictionary for each file."""
    width, mlp = size["width"], size["mlp"]
    square, up, down = (width, width), (mlp, width), (width, mlp)
    matrices = {f"self_attn.{name}_proj": square for name in "qkvo"}
    matrices |= {"mlp.gate_proj": up, "mlp.up_proj": up, "mlp.down_proj": down}
    vectors = {"input_layernorm": (width,), "post_attention_layernorm": (width,)}
    shards: list[dict[str, tuple[int, ...]]] = [{"model.embed_tokens.weight": (size["vocabulary"], width)}]
    for layer in range(size["layers"]):
        if layer % LAYERS_PER_SHARD == 0 and layer:
            shards.append({})
        shards[-1] |= {f"model.layers.{layer}.{name}.weight": shape for name, shape in (matrices | vectors).items()}
    shards[-1] |= {"model.norm.weight": (width,), "lm_head.weight": (size["vocabulary"], width)}
    return shards


def size_of(arguments: argparse.Namespace) -> dict[str, int]:
    """The shape that was asked for."""
    size = SIZES[arguments.size]
    return size | {"layers": arguments.layers or size["layers"]}


def bytes_of(size: dict[str, int]) -> int:
    """Bytes of all weights in bfloat16."""
    return sum(2 * torch.Size(shape).numel() for shard in shapes_of(size) for shape in shard.values())


def random_tensor(name: str, shape: tuple[int, ...]) -> Tensor:
    """What a freshly initialised LLaMA holds."""
    if len(shape) == 1:
        return torch.ones(shape, dtype=torch.bfloat16)
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    return torch.empty(shape, dtype=torch.bfloat16).normal_(std=0.02, generator=generator)


def make_model(size: dict[str, int], directory: Path) -> None:
    """Write the model in several files, with one tensor in memory; files that are there are left."""
    from transformers import LlamaConfig

    directory.mkdir(parents=True, exist_ok=True)
    shards = shapes_of(size)
    places = {}
    for number, shard in enumerate(shards, start=1):
        path = directory / f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        places |= dict.fromkeys(shard, path.name)
        if not path.exists():
            tensors = {n: LazyTensor("BF16", shape, partial(random_tensor, n, shape)) for n, shape in shard.items()}
            write_streamed(path, tensors, {"format": "pt"})
    index = {"metadata": {"total_size": bytes_of(size)}, "weight_map": places}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    config = LlamaConfig(
        vocab_size=size["vocabulary"],
        hidden_size=size["width"],
        intermediate_size=size["mlp"],
        num_hidden_layers=size["layers"],
        num_attention_heads=size["heads"],
        architectures=["LlamaForCausalLM"],
        dtype="bfloat16",
    )
    config.save_pretrained(directory)
    copy_tokenizer(size["vocabulary"], directory)


def copy_tokenizer(vocabulary: int, directory: Path) -> None:
    """The sample model's tokenizer, cut to its first tokens: merges come in the order in which they were learned."""
    for name in ("tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(TOKENIZER / name, directory)
    tokenizer = json.loads((TOKENIZER / "tokenizer.json").read_text())
    core = tokenizer["model"]
    core["vocab"] = {token: index for token, index in core["vocab"].items() if index < vocabulary}
    pairs = [merge.split(" ") if isinstance(merge, str) else merge for merge in core["merges"]]
    core["merges"] = [pair for pair in pairs if {*pair, "".join(pair)} <= core["vocab"].keys()]
    (directory / "tokenizer.json").write_text(json.dumps(tokenizer))


def config_of(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """What `wandazeta prune` is given."""
    callback = {
        "method": arguments.method,
        "sparsity_pattern": arguments.pattern,
        "num_calibration_samples": arguments.samples,
        "samples_per_round": min(arguments.samples, 32),
        "output_dir": str(folder / "progress"),
    }
    loading = {"dtype": "bfloat16", "stream_weights": not arguments.whole}
    model = {"model_name_or_path": str(folder / "model"), "loading": loading}
    data = {
        "source": "sample:wikipedia",
        "sequence_length": arguments.tokens,
        "num_calibration_samples": arguments.samples,
    }
    return {
        "model": {"class_path": "LanguageModel", "init_args": model},
        "data": {"class_path": "TextDataModule", "init_args": data},
        "trainer": {
            "accelerator": "cpu",
            "devices": 1,
            "logger": False,
            "callbacks": [{"class_path": "WandaPPPruneCallback", "init_args": callback}],
        },
        "output_dir": str(folder / "pruned"),
    }


def peak_bytes(pid: int) -> int:
    """Highest resident memory of a process so far, 0 if it is gone."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM")), 0)


def prune(arguments: argparse.Namespace, folder: Path) -> tuple[int, float, int]:
    """Run `wandazeta prune`; gives bytes, seconds and the number of starts, with those of stopped runs."""
    config = folder / "prune.yaml"
    config.write_text(yaml.safe_dump(config_of(arguments, folder)))
    starts = folder / "starts.json"
    earlier: list[list[float]] = json.loads(starts.read_text()) if starts.exists() else []
    environment = os.environ | {"OMP_NUM_THREADS": str(arguments.threads)}
    command = [sys.executable, "-m", "wandazeta.cli.main", "prune", "-c", str(config)]
    begin = time.perf_counter()
    peak, seconds = 0, 0.0
    with subprocess.Popen(command, cwd=ROOT, env=environment) as process:
        while process.poll() is None:
            peak, seconds = max(peak, peak_bytes(process.pid)), time.perf_counter() - begin
            starts.write_text(json.dumps([*earlier, [peak, seconds]]))
            time.sleep(1)
    if process.returncode:
        raise SystemExit(f"error: `wandazeta prune` ended with {process.returncode}; start again to go on")
    peaks, times = zip(*earlier, (peak, seconds), strict=True)
    return int(max(peaks)), sum(times), len(peaks)


def settings_of(arguments: argparse.Namespace) -> dict[str, Any]:
    """Everything that decides a record: two with equal settings are the same."""
    return {
        "model": f"random LLaMA, {arguments.size}",
        **size_of(arguments),
        "dtype": "bfloat16",
        "stream_weights": not arguments.whole,
        "method": arguments.method,
        "pattern": arguments.pattern,
        "samples": arguments.samples,
        "tokens": arguments.tokens,
        "threads": arguments.threads,
    }


def measure(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Make, prune and load the model."""
    size = size_of(arguments)
    folder.mkdir(parents=True, exist_ok=True)
    # the model, the progress with a mask of a byte a weight, what comes out, and its masks
    needed = 4 * bytes_of(size) - sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    if shutil.disk_usage(folder).free < needed:
        raise SystemExit(
            f"error: Expected argument `folder` to have {needed / 2**30:.0f} GiB of room, but got '{folder}' with "
            "less; choose another"
        )
    console.print(f"writing a model of {bytes_of(size) / 2**30:.1f} GiB")
    make_model(size, folder / "model")
    peak, seconds, num_starts = prune(arguments, folder)
    console.print("loading it by transformers alone")
    subprocess.run([sys.executable, "-c", CHECK, str(folder / "pruned")], check=True)
    return settings_of(arguments) | {
        "model_gib": round(bytes_of(size) / 2**30, 3),
        "num_files": len(shapes_of(size)),
        "peak_gib": round(peak / 2**30, 3),
        "seconds": round(seconds, 1),
        "starts": num_starts,
        "loaded_by_transformers": True,
    }


def main() -> None:
    """Make the record if it is missing, and write the result file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="7b")
    parser.add_argument("--layers", type=int, help="other than the size has")
    parser.add_argument("--method", default="wanda")
    parser.add_argument("--pattern", default="2:4")
    parser.add_argument("--samples", type=int, default=4, help="calibration samples")
    parser.add_argument("--tokens", type=int, default=64, help="tokens of a sample")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--whole", action="store_true", help="load the whole model, to compare")
    parser.add_argument("--folder", type=Path, default=ROOT / "runs" / "prune_memory", help="scratch space")
    parser.add_argument("--result", type=Path, default=RESULT, help="file to write")
    parser.add_argument("--keep", action="store_true", help="keep the model and what was made of it")
    parser.add_argument("--clean", action="store_true", help="only remove what an earlier run left")
    arguments = parser.parse_args()
    name = f"{arguments.size}-{size_of(arguments)['layers']}{'-whole' if arguments.whole else ''}"
    folder = arguments.folder.absolute() / name
    if not arguments.clean:
        records: list[dict[str, Any]] = (
            json.loads(arguments.result.read_text())["records"] if arguments.result.exists() else []
        )
        settings = settings_of(arguments)
        if not any(record.items() >= settings.items() for record in records):
            records.append(measure(arguments, folder))
            write(arguments.result, describe("prune_memory", records, source="sample:wikipedia"))
        console.print_json(data=next(record for record in records if record.items() >= settings.items()))
    if not arguments.keep:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
