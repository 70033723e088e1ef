"""How fast pruning is: Wanda and SparseGPT of this project and of llm-compressor, side by side, and Wanda++ on Wanda.

    make samples
    python benchmarks/prune.py

llm-compressor lives in an environment of its own, which the first run makes, or which you make and name:

    python -m venv .cache/llmcompressor
    .cache/llmcompressor/bin/python -m pip install -r benchmarks/prune_requirements.txt
    python benchmarks/prune.py --llmcompressor-python .cache/llmcompressor/bin/python

Every run is a fresh process with the same model, token ids and number of threads; the tools take turns, and every
second round goes the other way. Timed is the pruning with its calibration, not imports, loading, saving or the checks
before (`benchmarks/prune_worker.py` has the two calls). llm-compressor runs with batches of one sample, its default,
and with as many as this project puts together; ratios are to the faster. This project runs with its products in the
precision of the model and, as an option that the other tool has not, in bfloat16 beside float32 weights. One code
measures the perplexity of all the results. A run that is finished is not made again. Use the machine for nothing else
meanwhile.
"""

import argparse
import hashlib
import json
import math
import os
import statistics
import subprocess
import sys
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import torch
import yaml
from records import ROOT, describe, write
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from wandazeta.data.samples import sample_model
from wandazeta.datamodules import TextDataModule

RESULT = ROOT / "benchmarks" / "results" / "prune_speed.json"
SOURCE = "sample:wikipedia"
PERPLEXITY_WINDOW = 512
PATTERN = "2:4"
# so many tokens this project runs together
TOKENS_TOGETHER = 2048
METHODS = ("wanda", "sparsegpt", "wanda++")
COMPARED = ("wanda", "sparsegpt")
COMPUTE_DTYPES = ("model", "bfloat16")

console = Console()


def options_of(method: str, num_samples: int, compute_dtype: str) -> dict[str, Any]:
    """Options of this project's methods: for Wanda++ those of the sample model, with the paper's share of samples."""
    if method in COMPARED:
        return {"compute_dtype": compute_dtype}
    config = yaml.safe_load((ROOT / "configs" / "prune" / "best.yaml").read_text())
    chosen = config["trainer"]["callbacks"][0]["init_args"]
    kept = ("alpha", "optimizer", "learning_rate", "lr_schedule", "target", "mask_mode")
    options = {name: chosen[name] for name in kept}
    # K = 5 rounds of M = 32 of N = 128 samples
    return options | {"rounds": 5, "samples_per_round": max(1, num_samples // 4), "compute_dtype": compute_dtype}


def settings(arguments: argparse.Namespace, versions: dict[str, str]) -> Iterator[dict[str, Any]]:
    """The runs in their order; a record with equal settings is that run."""
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
    """The version in an environment, which is made if it is not there."""
    if not python.exists():
        console.print(f"making {python.parents[1]}: a copy of llm-compressor's tested versions")
        subprocess.run([sys.executable, "-m", "venv", python.parents[1]], check=True)
        requirements = Path(__file__).with_name("prune_requirements.txt")
        subprocess.run([python, "-m", "pip", "install", "--quiet", "-r", requirements], check=True)
    code = "from importlib.metadata import version; print(version('llmcompressor'))"
    found = subprocess.run([python, "-c", code], capture_output=True, text=True)
    if found.returncode:
        raise SystemExit(
            f"error: Expected argument `llmcompressor-python` to have llmcompressor, but '{python}' has not; "
            "`pip install -r benchmarks/prune_requirements.txt` there"
        )
    return found.stdout.strip()


def run_once(run: dict[str, Any], python: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """Prune in a fresh process; what it measured."""
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
    """Perplexity: mean negative log-likelihood of the tokens of windows that do not overlap."""
    losses = [float(model(input_ids=window[None], labels=window[None], use_cache=False).loss) for window in windows]
    return math.exp(statistics.fmean(losses))


class Judge:
    """Measures what was pruned, the same weights once only.

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
        """Perplexity with these weights, their sparsity and a digest of them."""
        digest = hashlib.sha256()
        layers = {n: m for n, m in self.model.model.layers.named_modules() if isinstance(m, nn.Linear)}
        if layers.keys() != weights.keys():
            raise SystemExit("error: Expected both tools to prune the same layers, but they did not")
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
    """Share of places that are zero in both or in neither."""
    same = sum(int((ours[name] == (weight != 0)).sum()) for name, weight in theirs.items())
    return same / sum(weight.numel() for weight in theirs.values())


def spread(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Median and range of the seconds, and the perplexity."""
    seconds = [run["seconds"] for run in runs]
    figures = {"runs": len(runs), "median": statistics.median(seconds), "min": min(seconds), "max": max(seconds)}
    return figures | {"perplexity": statistics.median(run["perplexity"] for run in runs)}


def summarise(records: list[dict[str, Any]], wanted: list[dict[str, Any]]) -> dict[str, Any]:
    """Medians of the wanted runs that are finished, and ratios."""
    done = [record for record in records if any(record.items() >= run.items() for run in wanted)]
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


def show(summary: dict[str, Any], dense: float) -> None:
    """The summary for the terminal."""
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


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="directory of a model of the LLaMA family; the sample by default")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument(
        "--llmcompressor-python",
        type=Path,
        default=ROOT / ".cache" / "llmcompressor" / "bin" / "python",
        help="Python of the environment with llm-compressor; made where there is none",
    )
    parser.add_argument("--num-samples", type=int, default=32, help="calibration samples")
    parser.add_argument("--sequence-length", type=int, default=256, help="tokens of a calibration sample")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="threads of each run")
    parser.add_argument(
        "--dtypes", nargs="+", choices=("float32", "bfloat16"), default=["float32"], help="types of the model"
    )
    parser.add_argument("--repeats", type=int, default=3, help="runs of each kind")
    parser.add_argument("--eval-windows", type=int, default=24, help=f"test windows of {PERPLEXITY_WINDOW} tokens")
    parser.add_argument("--work", type=Path, default=ROOT / "runs" / "prune_speed", help="folder of what passes by")
    parser.add_argument("--result", type=Path, default=RESULT, help="the result file")
    arguments = parser.parse_args()
    for name in ("num_samples", "sequence_length", "threads", "repeats", "eval_windows"):
        if getattr(arguments, name) < 1:
            raise SystemExit(f"error: Expected argument `{name}` to be at least 1, but got {getattr(arguments, name)}")
    arguments.model = (arguments.model or sample_model()).absolute()
    # a link is kept: it is what makes a Python that of its environment
    arguments.llmcompressor_python = arguments.llmcompressor_python.absolute()
    arguments.work = arguments.work.absolute()
    return arguments


def main() -> None:
    """Make the runs that are missing and write the result file after each."""
    arguments = parse()
    torch.set_num_threads(arguments.threads)
    pythons = {"wandazeta": Path(sys.executable), "llmcompressor": arguments.llmcompressor_python}
    versions = {"wandazeta": describe("", [])["versions"]["wandazeta"]}
    versions["llmcompressor"] = llmcompressor_version(pythons["llmcompressor"])
    folder = arguments.work
    folder.mkdir(parents=True, exist_ok=True)
    text = {"source": SOURCE, "tokenizer": str(arguments.model)}
    calibration = TextDataModule(
        **text, sequence_length=arguments.sequence_length, num_calibration_samples=arguments.num_samples
    )
    windows = torch.cat([batch["input_ids"] for batch in calibration.calibration_dataloader()])
    save_file({"input_ids": windows}, folder / "calibration.safetensors")
    test = TextDataModule(**text, sequence_length=PERPLEXITY_WINDOW).windows("test")
    judge = Judge(arguments.model, test[: arguments.eval_windows])

    records: list[dict[str, Any]] = (
        json.loads(arguments.result.read_text())["records"] if arguments.result.exists() else []
    )
    wanted = [{"model": arguments.model.name} | run for run in settings(arguments, versions)]
    for run in wanted:
        if any(record.items() >= run.items() for record in records):
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
        summary = summarise(records, wanted)
        content = describe(
            arguments.result.stem,
            records,
            source=SOURCE,
            perplexity_window=PERPLEXITY_WINDOW,
            dense=judge.dense,
            summary=summary,
        )
        write(arguments.result, content)
    show(summarise(records, wanted), judge.dense)


if __name__ == "__main__":
    main()
