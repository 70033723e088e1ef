"""Seconds of a zeroth-order step beside a plain loop over perturbed copies and beside the frozen model's own forwards.

    make samples
    python benchmarks/zo_step.py

Per step and on the same batch of real prompts, in turns within one process:

- `seconds_step`: a step of `ZerothOrderModule` with tensor-train adapters as the trainer runs it, directions, forwards,
  update and all. The frozen prefix is cached by then, as it is from the second epoch on.
- `seconds_loop`: the same estimate as the released codes make it: adapters of separate cores that are perturbed in
  place, one forward for each side with a row for each answer option and logits of the whole vocabulary everywhere.
- `seconds_forwards`: as many forwards of the model without adapters as the step makes, scored at the option positions
  only, without gradients, in batches of the size that is fastest by the row.

What counts is the ratio of the medians of one setting's runs. A setting that is finished is not measured again.
"""

import argparse
import gc
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from demo import quiet_trainer
from lightning.pytorch import Callback, Trainer, seed_everything
from records import ROOT, describe, finished, is_finished, write
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader
from zo_tables import STEP_HEADING, step_rows

from wandazeta.adapters import TensorTrainAdapters
from wandazeta.adapters.tensor_train import TTLinear
from wandazeta.datamodules import PromptedClassificationDataModule
from wandazeta.modules import LanguageModel, ZerothOrderModule
from wandazeta.scoring.scorer import Scorer, option_losses
from wandazeta.zeroth_order import ConstantSchedule, TwoSided

RESULT = ROOT / "benchmarks" / "results" / "zo_step.json"
MODEL = ROOT / ".cache" / "wandazeta" / "smollm2-135m"
EPSILON = 1e-3
LEARNING_RATE = 1e-6
BOTTLENECK = 64
# how many copies of the batch a plain forward may hold
COPIES = (1, 2, 4, 8, 16)

Batch = dict[str, Tensor]
console = Console()


class LoopedAdapter(nn.Module):
    """A tensor-train adapter of cores that are parameters of their own, contracted at every call.

    Args:
        width: Features of its input.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.down, self.up = TTLinear(width, BOTTLENECK), TTLinear(BOTTLENECK, width)

    def forward(self, x: Tensor) -> Tensor:
        """Adapt features `(…, D)`."""
        adapted: Tensor = x + self.up(self.down(x).relu())
        return adapted


class Loop:
    """The step of the released codes: perturb in place, forward, perturb to the other side, forward, go back.

    Args:
        model_dir: Directory of a LLaMA-like model.
        layers: Blocks with adapters, as `TensorTrainAdapters` reads it.
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
        """One two-sided step of plain SGD."""
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
    """The model without adapters at its fastest.

    Args:
        model_dir: Directory of the model.
        batch: The batch.
    """

    def __init__(self, model_dir: Path, batch: Batch) -> None:
        self.scorer = Scorer(LanguageModel(str(model_dir)).backbone.requires_grad_(False).eval())
        self.prepared = self.scorer.prepare(batch)
        # a copy of the batch for each of so many perturbed adapters, but that there are none
        self.copies = min(COPIES, key=lambda copies: median(timed(lambda: self.run(copies), 3)) / copies)

    @torch.no_grad()
    def run(self, copies: int) -> None:
        """One forward of so many copies of the batch."""
        option_losses(self.scorer.option_scores(self.prepared, copies).values, self.prepared.labels)


class Clock(Callback):
    """Seconds of every training step."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_train_batch_start(self, *_: Any) -> None:
        """Start."""
        self.start = time.perf_counter()

    def on_train_batch_end(self, *_: Any) -> None:
        """Stop."""
        self.seconds.append(time.perf_counter() - self.start)


def timed(run: Callable[[], object], times: int) -> list[float]:
    """Seconds of a few runs, after one that does not count."""
    seconds = []
    for _ in range(times + 1):
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    return seconds[1:]


def timed_steps(module: ZerothOrderModule, batch: Batch, steps: int) -> list[float]:
    """Seconds of training steps, after two that do not count."""
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


def make_batch(model_dir: Path, size: int, max_tokens: int, options: list[str]) -> Batch:
    """The first prompts of the training split with their padding."""
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
        raise SystemExit(f"error: Expected argument `options` to be single tokens of the model, but got {options}")
    return batch


def measure(setting: dict[str, Any], arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """All runs of one setting, in turns."""
    seed_everything(0, verbose=False)
    batch = make_batch(arguments.model, setting["batch"], setting["max_tokens"], arguments.options)
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


def table(records: list[dict[str, Any]]) -> Table:
    """The records for the terminal."""
    result = Table(title="seconds of a zeroth-order step")
    for name in STEP_HEADING:
        result.add_column(name, justify="right", overflow="fold")
    for row in step_rows(records):
        result.add_row(*row)
    return result


def main() -> None:
    """Measure what is missing and write the result file after each setting."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=MODEL, help="directory of a LLaMA-like model")
    parser.add_argument("--batches", type=int, nargs="+", default=[2, 4], help="examples of a batch")
    parser.add_argument("--queries", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--layers", nargs="+", default=["all", "last:10"], help="blocks with adapters")
    parser.add_argument("--options", nargs=2, default=[" bad", " good"], help="answers of one token each")
    parser.add_argument("--max-tokens", type=int, default=32, help="longest prompt")
    parser.add_argument("--chunk", type=int, default=16, help="perturbed copies in one forward of the step")
    parser.add_argument("--steps", type=int, default=5, help="steps of a run, of which the median counts")
    parser.add_argument("--repeats", type=int, default=3, help="runs of each, in turns")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--result", type=Path, default=RESULT, help="the result file")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    records = finished(arguments.result)
    for layers in arguments.layers:
        for batch in arguments.batches:
            for num_queries in arguments.queries:
                setting = {"model": arguments.model.name, "layers": layers, "batch": batch, "num_queries": num_queries}
                setting |= {"max_tokens": arguments.max_tokens, "query_chunk_size": arguments.chunk}
                setting |= {"threads": arguments.threads}
                if not is_finished(setting, records):
                    records += measure(setting, arguments)
                    write(arguments.result, describe("zo_step", records))
                    gc.collect()
    console.print(table(records))


if __name__ == "__main__":
    main()
