"""Zeroth-order steps: seconds, peak memory, and the choice of epsilon.

    make samples
    python benchmarks/zo.py step
    python benchmarks/zo.py memory
    python benchmarks/zo.py epsilon

A setting whose record is in the result file is not measured again.

`step` compares, on the same batch of real prompts and in alternation within one process:

- `seconds_step`: a step of `ZerothOrderModule` with tensor-train adapters as the trainer runs it, with directions,
  forward passes and update. The prefix cache is filled by then, as it is from the second epoch on.
- `seconds_loop`: the same estimate as the released codes compute it: adapters with separate cores that are perturbed in
  place, one forward pass per side with one row per answer option, and logits of the whole vocabulary at every position.
- `seconds_forwards`: as many forward passes of the model without adapters as the step makes, scored at the option
  positions only, without gradients, at the batch size that is fastest per row.

The tables show ratios of the medians over the runs of a setting.

`memory` measures the peak memory of two training steps of each method beside inference (the validation of the
unchanged model by the same trainer). Each measurement runs in a process forked from one that has imported everything:
the figure is the peak of resident memory (VmHWM) less what is resident after the fork, that is weights, adapters,
gradients, optimizer states and activations.

`epsilon` runs `wandazeta diagnose` with the default adapters on the demo's prompts, for each precision and start.
"""

import argparse
import gc
import itertools
import json
import time
from collections.abc import Callable
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from typing import Any, Literal

import peft  # noqa: F401  (imported before the fork: its memory does not count as LoRA's)
import torch
from lightning.pytorch import Callback, Trainer, seed_everything
from records import RESULTS, ROOT, SMOLLM2, describe, finished, is_finished, quiet_trainer, write
from rich.console import Console
from rich.table import Table
from tables import STEP_HEADING, step_rows
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader
from transformers import LlamaForCausalLM  # noqa: F401  (imported before the fork)

from wandazeta.adapters import LoRAAdapters, PeftLoRA, TensorTrainAdapters, Weights
from wandazeta.adapters.tensor_train import TTLinear
from wandazeta.datamodules import PromptedClassificationDataModule
from wandazeta.models.loading import LoadingOptions
from wandazeta.modules import FirstOrderModule, LanguageModel, ZerothOrderModule
from wandazeta.modules.diagnose import EpsilonDiagnosis
from wandazeta.scoring.scorer import Scorer, option_losses
from wandazeta.zeroth_order import ConstantSchedule, TwoSided

MODEL = ROOT / SMOLLM2
EPSILON = 1e-3
LEARNING_RATE = 1e-6
BOTTLENECK = 64
# numbers of copies of the batch that a plain forward pass may hold
COPIES = (1, 2, 4, 8, 16)
# one perturbed copy at a time, nothing kept from step to step
FORWARD_ONLY = {"schedule": ConstantSchedule(1), "query_chunk_size": 1, "prefix_cache_gib": 0.0}
METHODS: dict[str, tuple[type, dict[str, Any]]] = {
    "inference": (LanguageModel, {}),
    "tensor_train": (ZerothOrderModule, FORWARD_ONLY | {"trainable": TensorTrainAdapters()}),
    "lora": (ZerothOrderModule, FORWARD_ONLY | {"trainable": LoRAAdapters()}),
    "mezo": (ZerothOrderModule, FORWARD_ONLY | {"trainable": Weights()}),
    "tensor_train_backprop": (FirstOrderModule, {"trainable": TensorTrainAdapters()}),
    "lora_backprop": (FirstOrderModule, {"trainable": PeftLoRA()}),
    "full_backprop": (FirstOrderModule, {"trainable": Weights()}),
}
EPSILON_BATCH = 4

Batch = dict[str, Tensor]
console = Console()


class LoopedAdapter(nn.Module):
    """A tensor-train adapter whose cores are separate parameters, contracted at every call.

    Args:
        width: Number of input features.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.down, self.up = TTLinear(width, BOTTLENECK), TTLinear(BOTTLENECK, width)

    def forward(self, x: Tensor) -> Tensor:
        """Adapt features of shape `(…, D)`."""
        adapted: Tensor = x + self.up(self.down(x).relu())
        return adapted


class Loop:
    """The step of the released codes: perturb in place to either side, run a forward pass at each, and restore.

    Args:
        model_dir: Directory of a model of the LLaMA family.
        layers: Blocks with adapters, in the form that `TensorTrainAdapters` takes.
    """

    def __init__(self, model_dir: Path, layers: str) -> None:
        self.model = LanguageModel(str(model_dir)).backbone.requires_grad_(False).eval()
        blocks = self.model.model.layers
        for block in blocks if layers == "all" else blocks[-int(layers.removeprefix("last:")) :]:
            mlp, width = block.mlp, self.model.config.hidden_size
            mlp.gate_proj = nn.Sequential(LoopedAdapter(width), mlp.gate_proj)
            mlp.up_proj = nn.Sequential(LoopedAdapter(width), mlp.up_proj)
            mlp.down_proj = nn.Sequential(mlp.down_proj, LoopedAdapter(width))
        self.trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]

    def _perturb(self, seed: int, scale: float) -> None:
        generator = torch.Generator().manual_seed(seed)
        for parameter in self.trained:
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=scale)

    def _loss(self, batch: Batch) -> float:
        options = batch["option_ids"][:, 0]
        ids = batch["input_ids"].repeat_interleave(len(options), 0)
        mask = batch["attention_mask"].repeat_interleave(len(options), 0)
        logits = self.model(input_ids=ids, attention_mask=mask, use_cache=False).logits
        last = logits[torch.arange(len(ids)), mask.sum(1) - 1].log_softmax(-1)
        scores = last.gather(1, options.repeat(len(batch["label"]))[:, None]).view(-1, len(options))
        return float(F.cross_entropy(scores, batch["label"]))

    @torch.no_grad()
    def step(self, batch: Batch, num_queries: int) -> None:
        """Take one two-sided step of plain SGD."""
        slopes = []
        for query in range(num_queries):
            self._perturb(query, EPSILON)
            plus = self._loss(batch)
            self._perturb(query, -2 * EPSILON)
            minus = self._loss(batch)
            self._perturb(query, EPSILON)
            slopes.append((plus - minus) / (2 * EPSILON))
        for query, slope in enumerate(slopes):
            self._perturb(query, -LEARNING_RATE * slope / num_queries)


class Forwards:
    """Forward passes of the model without adapters, at the fastest batch size.

    Args:
        model_dir: Directory of the model.
        batch: The batch to score.
    """

    def __init__(self, model_dir: Path, batch: Batch) -> None:
        self.scorer = Scorer(LanguageModel(str(model_dir)).backbone.requires_grad_(False).eval())
        self.prepared = self.scorer.prepare(batch)
        # as many copies of the batch in one pass as are fastest per copy
        self.copies = min(COPIES, key=lambda copies: median(timed(lambda: self.run(copies), 3)) / copies)

    @torch.no_grad()
    def run(self, copies: int) -> None:
        """Run one forward pass of this many copies of the batch."""
        option_losses(self.scorer.option_scores(self.prepared, copies).values, self.prepared.labels)


class Clock(Callback):
    """Measure the seconds of every training step."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_train_batch_start(self, *_: Any) -> None:
        """Start the clock."""
        self.start = time.perf_counter()

    def on_train_batch_end(self, *_: Any) -> None:
        """Stop the clock."""
        self.seconds.append(time.perf_counter() - self.start)


def timed(run: Callable[[], object], times: int) -> list[float]:
    """Measure the seconds of a few runs, after a warm-up run."""
    seconds = []
    for _ in range(times + 1):
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    return seconds[1:]


def timed_steps(module: ZerothOrderModule, batch: Batch, steps: int) -> list[float]:
    """Measure the seconds of training steps, after two warm-up steps."""
    clock = Clock()
    trainer = Trainer(
        accelerator="cpu",
        devices=1,
        max_steps=steps + 2,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[clock],
    )
    trainer.fit(module, DataLoader([batch] * (steps + 2), batch_size=None))  # type: ignore[arg-type]
    return clock.seconds[2:]


def prompt_batch(model_dir: Path, size: int, max_tokens: int, options: list[str]) -> Batch:
    """Return the first prompts of the training split as a padded batch."""
    data = PromptedClassificationDataModule(
        tokenizer=str(model_dir),
        template="{text} It was",
        options=options,
        batch_size=size,
        num_train=64,
        max_length=max_tokens,
        truncate=True,
    )
    data.trainer = quiet_trainer()
    data.setup("fit")
    batch: Batch = next(iter(data.train_dataloader()))
    if batch["option_ids"].shape[1] > 1:
        raise SystemExit(
            f"error: Expected argument `options` to be single tokens of the model, but got {options}; choose others"
        )
    return batch


def measure_step(setting: dict[str, Any], arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Measure all runs of one setting, in alternation."""
    seed_everything(0, verbose=False)
    batch = prompt_batch(arguments.model, setting["batch"], setting["max_tokens"], arguments.options)
    num_queries, layers = setting["num_queries"], setting["layers"]
    module = ZerothOrderModule(
        str(arguments.model),
        schedule=ConstantSchedule(num_queries),
        estimator=TwoSided(EPSILON),
        learning_rate=LEARNING_RATE,
        query_chunk_size=arguments.chunk,
        trainable=TensorTrainAdapters(bottleneck=BOTTLENECK, layers=layers, identity_start=False),
    )
    loop, forwards = Loop(arguments.model, layers), Forwards(arguments.model, batch)
    counted = max(1, 2 * num_queries // forwards.copies)
    records = []
    for repeat in range(arguments.repeats):
        plain = median(timed(lambda: forwards.run(forwards.copies), counted)) / forwards.copies
        step = median(timed_steps(module, batch, arguments.steps))
        looped = median(timed(lambda: loop.step(batch, num_queries), 1))
        seconds = {"seconds_step": step, "seconds_loop": looped, "seconds_forwards": plain * 2 * num_queries}
        shape = {"prompt_tokens": batch["input_ids"].shape[1], "forward_rows": forwards.copies * setting["batch"]}
        records.append(setting | shape | {"repeat": repeat} | seconds)
    return records


def step_table(records: list[dict[str, Any]]) -> Table:
    """Return the records as a table for the terminal."""
    result = Table(title="seconds of a zeroth-order step")
    for name in STEP_HEADING:
        result.add_column(name, justify="right", overflow="fold")
    for row in step_rows(records):
        result.add_row(*row)
    return result


def run_step(arguments: argparse.Namespace) -> None:
    """Measure the missing settings; the result file is written after each of them."""
    torch.set_num_threads(arguments.threads)
    result = arguments.result or RESULTS / "zo_step.json"
    records = finished(result)
    for layers, batch, num_queries in itertools.product(arguments.layers, arguments.batches, arguments.queries):
        setting = {"model": arguments.model.name, "layers": layers, "batch": batch, "num_queries": num_queries}
        setting |= {"max_tokens": arguments.max_tokens, "query_chunk_size": arguments.chunk}
        setting |= {"threads": arguments.threads}
        if not is_finished(setting, records):
            records += measure_step(setting, arguments)
            write(result, describe("zo_step", records))
            gc.collect()
    console.print(step_table(records))


def resident(field: str) -> int:
    """Return the resident bytes of this process: field `VmRSS` now, field `VmHWM` at the peak."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def random_batch(model_dir: Path, size: int, num_tokens: int) -> dict[str, torch.Tensor]:
    """Return prompts of random tokens with two answers of one token each."""
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


def measure_memory(model_dir: Path, method: str, size: int, num_tokens: int, threads: int) -> int:
    """Measure the bytes that a method takes in this process."""
    torch.set_num_threads(threads)
    before = resident("VmRSS")
    kind, options = METHODS[method]
    module, batch = kind(str(model_dir), **options), random_batch(model_dir, size, num_tokens)
    for parameter in module.parameters():
        parameter.detach().sum()  # reads every page of the weight file, so that all weights are resident
    # reset the peak, which loading may have raised
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


def measure_forked(arguments: argparse.Namespace, method: str) -> float:
    """Measure the GiB that a method takes in a process of its own."""
    given = (arguments.model, method, arguments.batch, arguments.tokens, arguments.threads)
    with get_context("fork").Pool(1) as pool:
        return round(pool.apply(measure_memory, given) / 2**30, 4)


def run_memory(arguments: argparse.Namespace) -> None:
    """Measure the missing methods; the result file is written after each of them."""
    result = arguments.result or RESULTS / "zo_memory.json"
    records = finished(result)
    setting = {"model": arguments.model.name, "batch": arguments.batch, "tokens": arguments.tokens}
    setting |= {"dtype": "float32", "threads": arguments.threads}
    missing = [m for m in METHODS if m != "inference" and not is_finished(setting | {"method": m}, records)]
    inference = measure_forked(arguments, "inference") if missing else 0.0
    for method in missing:
        peak = measure_forked(arguments, method)
        records.append(setting | {"method": method, "peak_gib": peak, "inference_gib": inference})
        write(result, describe("zo_memory", records))
        console.print(f"{method}: {peak:.3f} GiB, {peak / inference:.2f} x inference")


def measure_epsilon(dtype: Literal["bfloat16", "float32"], identity_start: bool) -> EpsilonDiagnosis:
    """Diagnose one precision and start of the adapters."""
    seed_everything(0)
    model = ZerothOrderModule(
        str(MODEL),
        LoadingOptions(dtype),
        trainable=TensorTrainAdapters(identity_start=identity_start),
        query_chunk_size=8,
    )
    data = PromptedClassificationDataModule(
        "sample:rotten-tomatoes",
        "{text} In summary, the movie is",
        [" bad", " good"],
        batch_size=EPSILON_BATCH,
        num_train=64,
        num_val=10,
        num_test=10,
    )
    diagnosis = EpsilonDiagnosis(num_batches=2, num_queries=16)
    quiet_trainer(diagnosis, accelerator="cpu", num_sanity_val_steps=0).fit(model, data)
    return diagnosis


def run_epsilon(arguments: argparse.Namespace) -> None:
    """Diagnose the missing settings; the result file is written after each of them."""
    result = arguments.result or RESULTS / "epsilon.json"
    records = finished(result)
    dtypes: tuple[Literal["bfloat16", "float32"], ...] = ("bfloat16", "float32")
    for identity_start, dtype in itertools.product((True, False), dtypes):
        settings = {"model": SMOLLM2, "dtype": dtype, "batch": EPSILON_BATCH, "identity_start": identity_start}
        if not is_finished(settings, records):
            records.append(settings | measure_epsilon(dtype, identity_start).to_dict())
            write(result, describe("epsilon", records))
        print(settings, records[-1]["recommended"])


def main() -> None:
    """Run the benchmark that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument("--model", type=Path, default=MODEL, help="directory of a model of the LLaMA family")
    shared.add_argument("--result", type=Path, help="the result file")
    step = commands.add_parser("step", parents=[shared], help="seconds of a step")
    step.add_argument("--batches", type=int, nargs="+", default=[2, 4], help="examples per batch")
    step.add_argument("--queries", type=int, nargs="+", default=[1, 4, 16])
    step.add_argument("--layers", nargs="+", default=["all", "last:10"], help="blocks with adapters")
    step.add_argument("--options", nargs=2, default=[" bad", " good"], help="answers of one token each")
    step.add_argument("--max-tokens", type=int, default=32, help="longest prompt")
    step.add_argument("--chunk", type=int, default=16, help="perturbed copies in one forward pass of the step")
    step.add_argument("--steps", type=int, default=5, help="steps of a run; the median counts")
    step.add_argument("--repeats", type=int, default=3, help="runs of each setting")
    step.add_argument("--threads", type=int, default=2)
    memory = commands.add_parser("memory", parents=[shared], help="peak memory of a step")
    memory.add_argument("--batch", type=int, default=4, help="examples per batch")
    memory.add_argument("--tokens", type=int, default=64, help="tokens per example")
    memory.add_argument("--threads", type=int, default=1)
    epsilon = commands.add_parser("epsilon", help="diagnosis of epsilon")
    epsilon.add_argument("--result", type=Path, help="the result file")
    arguments = parser.parse_args()
    {"step": run_step, "memory": run_memory, "epsilon": run_epsilon}[arguments.command](arguments)


if __name__ == "__main__":
    main()
