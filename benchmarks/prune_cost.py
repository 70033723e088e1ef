"""Time and memory of a pruning: Wanda and SparseGPT beside llm-compressor, and models larger than memory.

    make samples
    python benchmarks/prune_cost.py speed
    python benchmarks/prune_cost.py memory --size 7b

A run whose record is in the result file is not made again.

`speed`: llm-compressor lives in an environment of its own. The first run creates it; or create and name it yourself:

    python -m venv .cache/llmcompressor
    .cache/llmcompressor/bin/python -m pip install -r benchmarks/prune_requirements.txt
    python benchmarks/prune_cost.py speed --llmcompressor-python .cache/llmcompressor/bin/python

Every run is a fresh process with the same model, token ids and number of threads. The tools alternate, and every second
round runs in reverse order. The timed part is the pruning with its calibration, without imports, loading, saving and
the checks before (`benchmarks/prune_worker.py` has the two calls). llm-compressor runs with batches of one sample, its
default, and with batches of the size that this project uses; ratios are to the faster. This project runs with products
in the precision of the model and, as an option that the other tool lacks, in bfloat16 with float32 weights. The same
code measures the perplexity of all results. Run nothing else on the machine meanwhile.

`memory`: writes a random model of the shape of LLaMA tensor by tensor, prunes it with streamed weights in a process of
its own whose peak resident memory (VmHWM) is sampled, and loads the result with transformers. The weights are random,
so the figures are about memory and time, not quality. A run that was stopped resumes: the peak is the highest of all
its starts, and the seconds are their sum. All files but the result file are removed at the end, unless `--keep` is set.
"""

import argparse
import hashlib
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import time
import zlib
from collections.abc import Iterator
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
import yaml
from records import RESULTS, ROOT, SMOLLM2, describe, finished, is_finished, prune_settings, write
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from wandazeta.data.samples import sample_model
from wandazeta.datamodules import TextDataModule
from wandazeta.models.safetensors_io import LazyTensor, write_streamed

SPEED_RESULT = RESULTS / "prune_speed.json"
SOURCE = "sample:wikipedia"
PERPLEXITY_WINDOW = 512
PATTERN = "2:4"
# tokens that this project runs in one batch
TOKENS_TOGETHER = 2048
METHODS = ("wanda", "sparsegpt", "wanda++")
COMPARED = ("wanda", "sparsegpt")
COMPUTE_DTYPES = ("model", "bfloat16")

MEMORY_RESULT = RESULTS / "prune_memory.json"
TOKENIZER = ROOT / SMOLLM2
LAYERS_PER_SHARD = 4
SIZES: dict[str, dict[str, int]] = {
    "tiny": {"width": 128, "layers": 6, "mlp": 352, "heads": 4, "vocabulary": 2000},
    "1b": {"width": 2048, "layers": 22, "mlp": 5632, "heads": 32, "vocabulary": 32000},
    "7b": {"width": 4096, "layers": 32, "mlp": 11008, "heads": 32, "vocabulary": 32000},
}
# loads the result with transformers alone, checks the last block, and runs every layer once
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


def options_of(method: str, num_samples: int, compute_dtype: str) -> dict[str, Any]:
    """Return the options of this project's methods; Wanda++ has those of the preset `paper`."""
    if method in COMPARED:
        return {"compute_dtype": compute_dtype}
    chosen = prune_settings("paper")
    # M = 32 of N = 128 samples, whatever N is here
    return {name: chosen[name] for name in ("alpha", "learning_rate", "rounds")} | {
        "samples_per_round": max(1, num_samples // 4),
        "compute_dtype": compute_dtype,
    }


def speed_runs(arguments: argparse.Namespace, versions: dict[str, str]) -> Iterator[dict[str, Any]]:
    """Yield the settings of all runs in their order."""
    together = max(1, min(TOKENS_TOGETHER // arguments.sequence_length, arguments.num_samples))
    for repeat in range(arguments.repeats):
        runs = []
        for dtype, method in product(arguments.dtypes, arguments.methods):
            compute_dtypes = COMPUTE_DTYPES if dtype == "float32" else ("model",)
            tools = [("wandazeta", together, compute_dtype) for compute_dtype in compute_dtypes]
            if method in COMPARED:
                tools += [("llmcompressor", size, "model") for size in sorted({1, together})]
            for tool, batch_size, compute_dtype in tools:
                run = {"tool": tool, "version": versions[tool], "method": method, "dtype": dtype}
                run |= {"compute_dtype": compute_dtype, "threads": arguments.threads}
                run |= {"sparsity_pattern": PATTERN, "batch_size": batch_size}
                run |= {"num_samples": arguments.num_samples, "sequence_length": arguments.sequence_length}
                own = tool == "wandazeta"
                run["options"] = options_of(method, arguments.num_samples, compute_dtype) if own else {}
                runs.append(run | {"eval_windows": arguments.eval_windows, "repeat": repeat})
        yield from runs if repeat % 2 == 0 else reversed(runs)


def llmcompressor_version(python: Path) -> str:
    """Return the version of llm-compressor in an environment, which is created if it does not exist."""
    if not python.exists():
        console.print(f"creating {python.parents[1]} with the tested versions of llm-compressor")
        subprocess.run([sys.executable, "-m", "venv", python.parents[1]], check=True)
        requirements = Path(__file__).with_name("prune_requirements.txt")
        subprocess.run([python, "-m", "pip", "install", "--quiet", "-r", requirements], check=True)
    code = "from importlib.metadata import version; print(version('llmcompressor'))"
    found = subprocess.run([python, "-c", code], capture_output=True, text=True)
    if found.returncode:
        raise SystemExit(
            f"error: Expected argument `llmcompressor-python` to have llmcompressor, but '{python}' does not; "
            "`pip install -r benchmarks/prune_requirements.txt` there"
        )
    return found.stdout.strip()


def run_once(run: dict[str, Any], python: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """Prune in a fresh process and return its measurements."""
    folder = arguments.work
    name = f"{run['tool']}-{run['method']}-{run['compute_dtype']}-{run['batch_size']}"
    task = run | {"model": str(arguments.model), "calibration": str(folder / "calibration.safetensors")}
    task |= {"weights": str(folder / "weights.safetensors"), "measured": str(folder / "measured.json")}
    (folder / "task.json").write_text(json.dumps(task))
    threads = str(run["threads"])
    environment = os.environ | {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads, "CUDA_VISIBLE_DEVICES": ""}
    environment |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    worker = Path(__file__).with_name("prune_worker.py").absolute()
    with (folder / f"{name}.log").open("w") as log:
        done = subprocess.run(
            [python, worker, folder / "task.json"], cwd=folder, env=environment, stdout=log, stderr=log
        )
    if done.returncode:
        tail = (folder / f"{name}.log").read_text().strip().splitlines()[-12:]
        raise SystemExit("\n".join([f"error: {run['tool']} {run['method']} failed:", *tail]))
    measured: dict[str, Any] = json.loads((folder / "measured.json").read_text())
    return measured


@torch.no_grad()
def perplexity(model: PreTrainedModel, windows: list[torch.Tensor]) -> float:
    """Return the perplexity over windows that do not overlap."""
    losses = [float(model(input_ids=window[None], labels=window[None], use_cache=False).loss) for window in windows]
    return math.exp(statistics.fmean(losses))


class Judge:
    """Measure the perplexity of pruned weights, once for equal weights.

    Args:
        model: Directory of the dense model.
        windows: Test windows.
    """

    def __init__(self, model: Path, windows: list[torch.Tensor]) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
        self.windows = windows
        self.known: dict[str, float] = {}
        self.dense = perplexity(self.model, windows)

    @torch.no_grad()
    def __call__(self, weights: dict[str, torch.Tensor]) -> dict[str, Any]:
        """Return the perplexity with these weights, their sparsity and a digest of them."""
        digest = hashlib.sha256()
        layers = {n: m for n, m in self.model.model.layers.named_modules() if isinstance(m, nn.Linear)}
        if layers.keys() != weights.keys():
            raise SystemExit("error: Expected both tools to prune the same layers, but their layers differ")
        for name, layer in layers.items():
            layer.weight.copy_(weights[name])
            digest.update(weights[name].contiguous().view(torch.uint8).numpy().data)
        key = digest.hexdigest()[:32]
        if key not in self.known:
            self.known[key] = perplexity(self.model, self.windows)
        zeros = sum(int((weight == 0).sum()) for weight in weights.values())
        sparsity = zeros / sum(weight.numel() for weight in weights.values())
        return {"perplexity": self.known[key], "sparsity": sparsity, "weights": key}


def agreement(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> float:
    """Return the fraction of weights that are zero in both or in neither."""
    same = sum(int((ours[name] == (weight != 0)).sum()) for name, weight in theirs.items())
    return same / sum(weight.numel() for weight in theirs.values())


def spread(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Return median and range of the seconds, and the perplexity."""
    seconds = [run["seconds"] for run in runs]
    figures = {"runs": len(runs), "median": statistics.median(seconds), "min": min(seconds), "max": max(seconds)}
    return figures | {"perplexity": statistics.median(run["perplexity"] for run in runs)}


def summarise(records: list[dict[str, Any]], wanted: list[dict[str, Any]]) -> dict[str, Any]:
    """Return medians and ratios of the finished runs among those wanted."""
    done = [record for record in records if any(is_finished(run, [record]) for run in wanted)]
    names = ("dtype", "compute_dtype", "method", "tool", "batch_size")
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for record in done:
        groups.setdefault(tuple(record[name] for name in names), []).append(record)
    rows = [dict(zip(names, key, strict=True)) | spread(runs) for key, runs in groups.items()]
    kinds = ("dtype", "compute_dtype", "method")
    ours = {tuple(row[name] for name in kinds): row for row in rows if row["tool"] == "wandazeta"}
    theirs = [row for row in rows if row["tool"] != "wandazeta"]
    compared = []
    for (dtype, compute_dtype, method), own in ours.items():
        others = [row for row in theirs if (row["dtype"], row["method"]) == (dtype, method)]
        if not others:
            continue
        fastest = min(others, key=lambda row: row["median"])
        runs = groups[tuple(fastest[name] for name in names)]
        same = [run["mask_agreement"][compute_dtype] for run in runs if compute_dtype in run["mask_agreement"]]
        compared.append(
            {
                "dtype": dtype,
                "compute_dtype": compute_dtype,
                "method": method,
                "batch_size": fastest["batch_size"],
                "times_faster": fastest["median"] / own["median"],
                "times_faster_at_least": fastest["min"] / own["max"],
                "perplexity_ratio": own["perplexity"] / fastest["perplexity"],
                "mask_agreement": min(same, default=None),
            }
        )
    ratios = [
        {"dtype": dtype, "compute_dtype": compute_dtype, "ratio": row["median"] / wanda["median"]}
        for (dtype, compute_dtype, method), row in ours.items()
        if method == "wanda++" and (wanda := ours.get((dtype, compute_dtype, "wanda"))) is not None
    ]
    return {"rows": rows, "compared": compared, "wanda++_to_wanda": ratios}


def show_speed(summary: dict[str, Any], dense: float) -> None:
    """Print the summary."""
    table = Table(title=f"{PATTERN}; perplexity of the dense model {dense:.2f}")
    texts = ("dtype", "products in", "method", "tool")
    for name in (*texts, "batch", "runs", "seconds", "least", "most", "perplexity"):
        table.add_column(name, justify="left" if name in texts else "right", overflow="fold")
    for row in summary["rows"]:
        figures = [f"{row[name]:.2f}" for name in ("median", "min", "max", "perplexity")]
        names = ("dtype", "compute_dtype", "method", "tool")
        table.add_row(*(row[name] for name in names), str(row["batch_size"]), str(row["runs"]), *figures)
    console.print(table)
    for figures in summary["compared"]:
        agrees = "" if figures["mask_agreement"] is None else f", masks agree at {figures['mask_agreement']:.4%}"
        console.print(
            f"{figures['method']}, {figures['dtype']}, products in {figures['compute_dtype']}: "
            f"{figures['times_faster']:.2f} times as fast as llm-compressor, "
            f"{figures['perplexity_ratio']:.4f} times its perplexity{agrees}"
        )
    for row in summary["wanda++_to_wanda"]:
        kind = f"{row['dtype']}, products in {row['compute_dtype']}"
        console.print(f"wanda++, {kind}: {row['ratio']:.2f} times as long as wanda")


def shapes_of(size: dict[str, int]) -> list[dict[str, tuple[int, ...]]]:
    """Return names and shapes of all tensors, one dictionary per file."""
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
    """Return the sizes of the requested model."""
    size = SIZES[arguments.size]
    return size | {"layers": arguments.layers or size["layers"]}


def bytes_of(size: dict[str, int]) -> int:
    """Return the bytes of all weights in bfloat16."""
    return sum(2 * torch.Size(shape).numel() for shard in shapes_of(size) for shape in shard.values())


def random_tensor(name: str, shape: tuple[int, ...]) -> Tensor:
    """Return a tensor with the values of a freshly initialised LLaMA."""
    if len(shape) == 1:
        return torch.ones(shape, dtype=torch.bfloat16)
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    return torch.empty(shape, dtype=torch.bfloat16).normal_(std=0.02, generator=generator)


def make_model(size: dict[str, int], directory: Path) -> None:
    """Write the model to several files with one tensor in memory at a time; existing files are kept."""
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
    """Write the sample model's tokenizer with its first tokens only; merges are in the order of learning."""
    for name in ("tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(TOKENIZER / name, directory)
    tokenizer = json.loads((TOKENIZER / "tokenizer.json").read_text())
    core = tokenizer["model"]
    core["vocab"] = {token: index for token, index in core["vocab"].items() if index < vocabulary}
    pairs = [merge.split(" ") if isinstance(merge, str) else merge for merge in core["merges"]]
    core["merges"] = [pair for pair in pairs if {*pair, "".join(pair)} <= core["vocab"].keys()]
    (directory / "tokenizer.json").write_text(json.dumps(tokenizer))


def memory_config(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Return the config of `wandazeta prune`."""
    callback = {
        "method": arguments.method,
        "sparsity_pattern": arguments.pattern,
        "num_calibration_samples": arguments.samples,
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
    """Return the peak resident memory of a process so far, or 0 if it has ended."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM")), 0)


def prune_watched(arguments: argparse.Namespace, folder: Path) -> tuple[int, float, int]:
    """Run `wandazeta prune`; returns peak bytes, seconds and number of starts, including runs that were stopped."""
    config = folder / "prune.yaml"
    config.write_text(yaml.safe_dump(memory_config(arguments, folder)))
    starts = folder / "starts.json"
    earlier: list[list[float]] = json.loads(starts.read_text()) if starts.exists() else []
    environment = os.environ | {"OMP_NUM_THREADS": str(arguments.threads)}
    command = [sys.executable, "-m", "wandazeta", "prune", "-c", str(config)]
    begin = time.perf_counter()
    peak, seconds = 0, 0.0
    with subprocess.Popen(command, cwd=ROOT, env=environment) as process:
        while process.poll() is None:
            peak, seconds = max(peak, peak_bytes(process.pid)), time.perf_counter() - begin
            starts.write_text(json.dumps([*earlier, [peak, seconds]]))
            time.sleep(1)
    if process.returncode:
        raise SystemExit(f"error: `wandazeta prune` ended with {process.returncode}; start again to resume")
    peaks, times = zip(*earlier, (peak, seconds), strict=True)
    return int(max(peaks)), sum(times), len(peaks)


def memory_settings(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return everything that decides a record: records with equal settings are the same."""
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


def measure_memory(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Write, prune and load the model."""
    size = size_of(arguments)
    folder.mkdir(parents=True, exist_ok=True)
    # the model, the progress with a mask of one byte per weight, the pruned model, and its masks
    needed = 4 * bytes_of(size) - sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    if shutil.disk_usage(folder).free < needed:
        raise SystemExit(
            f"error: Expected argument `folder` to have {needed / 2**30:.0f} GiB of free space, but '{folder}' has "
            "less; choose another"
        )
    console.print(f"writing a model of {bytes_of(size) / 2**30:.1f} GiB")
    make_model(size, folder / "model")
    peak, seconds, num_starts = prune_watched(arguments, folder)
    console.print("loading the result with transformers alone")
    subprocess.run([sys.executable, "-c", CHECK, str(folder / "pruned")], check=True)
    return memory_settings(arguments) | {
        "model_gib": round(bytes_of(size) / 2**30, 3),
        "num_files": len(shapes_of(size)),
        "peak_gib": round(peak / 2**30, 3),
        "seconds": round(seconds, 1),
        "starts": num_starts,
        "loaded_by_transformers": True,
    }


def run_speed(arguments: argparse.Namespace) -> None:
    """Make the missing runs; the result file is written after each of them."""
    for name in ("num_samples", "sequence_length", "threads", "repeats", "eval_windows"):
        if getattr(arguments, name) < 1:
            raise SystemExit(f"error: Expected argument `{name}` to be at least 1, but got {getattr(arguments, name)}")
    arguments.model = (arguments.model or sample_model()).absolute()
    # links are not resolved: the link is what makes this Python that of its environment
    arguments.llmcompressor_python = arguments.llmcompressor_python.absolute()
    arguments.work = folder = arguments.work.absolute()
    torch.set_num_threads(arguments.threads)
    pythons = {"wandazeta": Path(sys.executable), "llmcompressor": arguments.llmcompressor_python}
    versions = {"wandazeta": describe("", [])["versions"]["wandazeta"]}
    versions["llmcompressor"] = llmcompressor_version(pythons["llmcompressor"])
    folder.mkdir(parents=True, exist_ok=True)
    text = {"source": SOURCE, "tokenizer": str(arguments.model)}
    calibration = TextDataModule(
        **text, sequence_length=arguments.sequence_length, num_calibration_samples=arguments.num_samples
    )
    windows = torch.cat([batch["input_ids"] for batch in calibration.calibration_dataloader()])
    save_file({"input_ids": windows}, folder / "calibration.safetensors")
    test = TextDataModule(**text, sequence_length=PERPLEXITY_WINDOW).windows("test")
    judge = Judge(arguments.model, test[: arguments.eval_windows])

    records = finished(arguments.result)
    wanted = [{"model": arguments.model.name} | run for run in speed_runs(arguments, versions)]
    for run in wanted:
        if is_finished(run, records):
            continue
        what = f"{run['method']} by {run['tool']}, {run['dtype']}, products in {run['compute_dtype']}"
        what += f", batches of {run['batch_size']}"
        console.print(f"{what}, run {run['repeat'] + 1}")
        measured = run_once(run, pythons[run["tool"]], arguments)
        weights = load_file(folder / "weights.safetensors")
        record = run | measured | judge(weights)
        masks = {name: folder / f"mask-{run['method']}-{run['dtype']}-{name}.safetensors" for name in COMPUTE_DTYPES}
        if run["tool"] == "wandazeta":
            save_file({name: weight != 0 for name, weight in weights.items()}, masks[run["compute_dtype"]])
        else:
            there = {name: file for name, file in masks.items() if file.exists()}
            record["mask_agreement"] = {name: agreement(load_file(file), weights) for name, file in there.items()}
        records.append(record)
        more = {"source": SOURCE, "perplexity_window": PERPLEXITY_WINDOW, "dense": judge.dense}
        more["summary"] = summarise(records, wanted)
        write(arguments.result, describe(arguments.result.stem, records, **more))
    show_speed(summarise(records, wanted), judge.dense)


def run_memory(arguments: argparse.Namespace) -> None:
    """Make the record if it is missing, and write the result file."""
    name = f"{arguments.size}-{size_of(arguments)['layers']}{'-whole' if arguments.whole else ''}"
    folder = arguments.folder.absolute() / name
    if not arguments.clean:
        records = finished(arguments.result)
        settings = memory_settings(arguments)
        if not is_finished(settings, records):
            records.append(measure_memory(arguments, folder))
            write(arguments.result, describe("prune_memory", records, source=SOURCE))
        console.print_json(data=next(record for record in records if is_finished(settings, [record])))
    if not arguments.keep:
        shutil.rmtree(folder, ignore_errors=True)


def main() -> None:
    """Run the benchmark that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    speed = commands.add_parser("speed", help="seconds beside llm-compressor")
    speed.add_argument("--model", type=Path, help="directory of a model of the LLaMA family; the sample by default")
    speed.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    speed.add_argument(
        "--llmcompressor-python",
        type=Path,
        default=ROOT / ".cache" / "llmcompressor" / "bin" / "python",
        help="Python of the environment with llm-compressor; created if it does not exist",
    )
    speed.add_argument("--num-samples", type=int, default=32, help="calibration samples")
    speed.add_argument("--sequence-length", type=int, default=256, help="tokens of a calibration sample")
    speed.add_argument("--threads", type=int, default=os.cpu_count(), help="threads of each run")
    speed.add_argument(
        "--dtypes", nargs="+", choices=("float32", "bfloat16"), default=["float32"], help="types of the model"
    )
    speed.add_argument("--repeats", type=int, default=3, help="runs of each kind")
    speed.add_argument("--eval-windows", type=int, default=24, help=f"test windows of {PERPLEXITY_WINDOW} tokens")
    speed.add_argument("--work", type=Path, default=ROOT / "runs" / "prune_speed", help="folder of temporary files")
    speed.add_argument("--result", type=Path, default=SPEED_RESULT, help="the result file")
    memory = commands.add_parser("memory", help="peak memory with streamed weights")
    memory.add_argument("--size", choices=SIZES, default="7b")
    memory.add_argument("--layers", type=int, help="number of blocks; by default that of the size")
    memory.add_argument("--method", default="wanda")
    memory.add_argument("--pattern", default="2:4")
    memory.add_argument("--samples", type=int, default=4, help="calibration samples")
    memory.add_argument("--tokens", type=int, default=64, help="tokens of a sample")
    memory.add_argument("--threads", type=int, default=2)
    memory.add_argument("--whole", action="store_true", help="load the whole model, for comparison")
    memory.add_argument("--folder", type=Path, default=ROOT / "runs" / "prune_memory", help="folder of temporary files")
    memory.add_argument("--result", type=Path, default=MEMORY_RESULT, help="the result file")
    memory.add_argument("--keep", action="store_true", help="keep the model and the pruned model")
    memory.add_argument("--clean", action="store_true", help="only remove the files of an earlier run")
    arguments = parser.parse_args()
    {"speed": run_speed, "memory": run_memory}[arguments.command](arguments)


if __name__ == "__main__":
    main()
