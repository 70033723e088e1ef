"""What bfloat16 compute changes in a pruning: masks and perplexity of every method, against float32.

    python benchmarks/prune_bf16.py
    python benchmarks/prune_bf16.py --num-blocks 4 --num-samples 16 --sequence-length 64 --eval-windows 4

Settings are those of `configs/prune/best.yaml`, but for what the options say. Blocks after the first `--num-blocks`
stay dense. Weights are float32 in both, and so is the model that perplexity is measured with. A record that is finished
is not made again.

What to expect: for `wanda` and `rgs` fewer than 1% of the mask places, and a perplexity that moves by some percent, as
it does after any change of that size. The control shows it: everything in float32, but every block's output is
multiplied by 1 + u, u drawn evenly from half a unit of bfloat16 to both sides. `sparsegpt`, which decides column by
column by an inverse Gram matrix, changes more places for it.
"""

import argparse
import time
from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, get_args

import torch
import yaml
from demo import quiet_trainer
from records import ROOT, describe, finished, is_finished, write
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from wandazeta.datamodules import TextDataModule
from wandazeta.models.blocks import find_blocks
from wandazeta.modules import LanguageModel
from wandazeta.pruning import BlockResult, PruningInterrupted, prune_model
from wandazeta.pruning.options import Method, PruneOptions

RESULT = ROOT / "benchmarks" / "results" / "prune_bf16.json"
CONFIG = ROOT / "configs" / "prune" / "best.yaml"
SOURCE = "sample:wikipedia"
METHODS: tuple[str, ...] = get_args(Method)
# names in the records, and the option's values
DTYPES = {"fp32": "model", "bf16": "bfloat16", "jittered": "model"}
# of rounding to bfloat16, which keeps eight bits; where it is smallest beside the number
HALF_UNIT = 2.0**-9

console = Console()


class Masks:
    """Keeps the masks of finished blocks; the `Progress` of `prune_model`."""

    def __init__(self) -> None:
        self.kept: list[Tensor] = []

    def load(self, block_index: int) -> BlockResult | None:
        """Nothing is finished."""

    def save(self, block_index: int, result: BlockResult) -> None:
        """Keep the masks."""
        self.kept.append(torch.cat([mask.flatten() for mask in result.masks.values()]))

    def load_texts(self) -> list[Tensor] | None:
        """Nothing is written."""

    def save_texts(self, texts: Sequence[Tensor]) -> None:
        """Not kept."""


def options_of(method: str, seed: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """The configuration's options, with the method and no more samples a round than there are."""
    config = yaml.safe_load(CONFIG.read_text())
    found: dict[str, Any] = dict(config["trainer"]["callbacks"][0]["init_args"])
    del found["num_calibration_samples"], found["output_dir"]
    per_round = min(found["samples_per_round"], arguments.num_samples)
    return found | {"method": method, "samples_per_round": per_round, "seed": seed}


def settings_of(method: str, seed: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """Everything that decides a record: two with equal settings are the same."""
    options = PruneOptions(**options_of(method, seed, arguments))
    settings = options.to_dict()
    del settings["compute_dtype"]
    return {
        # from the checkout, or the bare name: no path of one machine
        "model": arguments.model.name if arguments.model.is_absolute() else str(arguments.model),
        "method": method,
        "pattern": options.pattern_label,
        "seed": seed,
        "options": settings,
        "num_blocks": arguments.num_blocks,
        "num_samples": arguments.num_samples,
        "sequence_length": arguments.sequence_length,
        "eval_windows": arguments.eval_windows,
        "eval_sequence_length": arguments.eval_sequence_length,
    }


def jitter(generator: torch.Generator, block: nn.Module, inputs: Any, output: Tensor) -> Tensor:
    """A forward hook that moves states, of any shape, as rounding to bfloat16 may."""
    return output * (1 + HALF_UNIT * (2 * torch.rand(output.shape, generator=generator) - 1))


def prune(
    model: LanguageModel, method: str, compute_dtype: str, seed: int, arguments: argparse.Namespace
) -> list[Tensor]:
    """Prune the first blocks; returns the masks of each."""
    text = TextDataModule(
        SOURCE,
        tokenizer=str(arguments.model),
        sequence_length=arguments.sequence_length,
        num_calibration_samples=arguments.num_samples,
        seed=seed,
    )
    batches = list(text.calibration_dataloader())
    options = PruneOptions(**options_of(method, seed, arguments) | {"compute_dtype": compute_dtype})
    masks = Masks()

    def is_enough() -> bool:
        return len(masks.kept) >= arguments.num_blocks

    with suppress(PruningInterrupted):  # the rest stays dense
        prune_model(model, model.calibration_forward, batches, options, progress=masks, should_stop=is_enough)
    return masks.kept


def perplexity(model: LanguageModel, arguments: argparse.Namespace) -> float:
    """Perplexity on the test documents."""
    text = TextDataModule(
        SOURCE, sequence_length=arguments.eval_sequence_length, eval_windows=arguments.eval_windows, batch_size=1
    )
    return quiet_trainer().test(model, text, verbose=False)[0]["test/perplexity"]


def measure(method: str, seed: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """Prune in both precisions, measure both."""
    masks: dict[str, list[Tensor]] = {}
    perplexities: dict[str, float] = {}
    seconds: dict[str, float] = {}
    for name, compute_dtype in DTYPES.items():
        model = LanguageModel(str(arguments.model))
        hooks = []
        if name == "jittered":
            hook = partial(jitter, torch.Generator().manual_seed(seed))
            hooks = [block.register_forward_hook(hook) for block in find_blocks(model)[1]]
        start = time.perf_counter()
        masks[name] = prune(model, method, compute_dtype, seed, arguments)
        seconds[name] = time.perf_counter() - start
        for handle in hooks:
            handle.remove()
        perplexities[name] = perplexity(model, arguments)
    differing = [(a != b).double().mean().item() for a, b in zip(masks["fp32"], masks["bf16"], strict=True)]
    return settings_of(method, seed, arguments) | {
        "num_blocks_pruned": len(differing),
        "perplexity": perplexities,
        "perplexity_change": perplexities["bf16"] / perplexities["fp32"] - 1,
        "differing_mask_share": sum(differing) / len(differing),
        "differing_mask_share_by_block": differing,
        "seconds": seconds,
    }


def table(records: list[dict[str, Any]]) -> Table:
    """The records for the terminal."""
    result = Table(title="bfloat16 compute against float32")
    for name in ("method", "pattern", "seed", "blocks", "samples", "fp32", "bf16", "change", "masks that differ"):
        result.add_column(name, justify="left" if name in ("method", "pattern") else "right")
    for r in records:
        size = (str(r["num_blocks_pruned"]), f"{r['num_samples']} of {r['sequence_length']}")
        figures = (f"{r['perplexity']['fp32']:,.3f}", f"{r['perplexity']['bf16']:,.3f}")
        changes = (f"{r['perplexity_change']:+.2%}", f"{r['differing_mask_share']:.3%}")
        result.add_row(r["method"], r["pattern"], str(r["seed"]), *size, *figures, *changes)
    return result


def main() -> None:
    """Make what is missing and write the result file after each record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=Path(".cache/wandazeta/smollm2-135m"), help="model directory")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="of the calibration windows")
    parser.add_argument("--num-blocks", type=int, default=30, help="blocks to prune, from the first")
    parser.add_argument("--num-samples", type=int, default=32, help="calibration windows")
    parser.add_argument("--sequence-length", type=int, default=128, help="tokens of a calibration window")
    parser.add_argument("--eval-windows", type=int, default=16, help="test windows")
    parser.add_argument("--eval-sequence-length", type=int, default=512, help="tokens of a test window")
    arguments = parser.parse_args()
    records = finished(RESULT)
    for seed, method in product(arguments.seeds, arguments.methods):
        if not is_finished(settings_of(method, seed, arguments), records):
            records.append(measure(method, seed, arguments))
            write(RESULT, describe("prune_bf16", records, source=SOURCE, split="test"))
    console.print(table(records))


if __name__ == "__main__":
    main()
