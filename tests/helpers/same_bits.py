"""Run the cases of `same_bits_cases.py`, and describe their results by checksums and by statistics.

Checksums are of all bits, which depend on the processor and on the versions of packages; statistics agree on others,
too, within a tolerance. Started as a program, this runs the cases of two ranks.
"""

import hashlib
import json
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

Groups = dict[str, dict[str, Tensor]]
"""Tensors by group, such as the weights, the masks or the losses, and by name."""

PACKAGES = ("torch", "transformers", "lightning", "peft", "torchmetrics")
"""Packages whose versions may change the bits."""


# -- running a case -----------------------------------------------------------------------------------------------


def run_case(settings: Mapping[str, Any], folder: Path, **trainer_options: Any) -> Groups:
    """Run one case on one thread; the result does not depend on what ran in this process before."""
    run = {"prune": prune, "prune_module": prune_module, "first_order": first_order, "zeroth_order": zeroth_order}
    with one_thread(), torch.random.fork_rng():
        torch.manual_seed(0)
        groups = run[settings["kind"]](settings, folder, **trainer_options)
    return {group: {name: t.detach().clone() for name, t in sorted(ts.items())} for group, ts in groups.items() if ts}


def run_rank_cases(folder: Path) -> dict[str, Groups]:
    """Run all cases of two ranks in one pair of processes."""
    from helpers.processes import run
    from helpers.same_bits_cases import RANK_CASES

    for index, settings in enumerate(RANK_CASES.values()):
        (folder / str(index)).mkdir(parents=True)
        if settings["kind"] != "prune_module":
            # before the processes start: they share the folder
            saved(settings, folder / str(index))
    ranks = run("same_bits", {}, folder)
    return {
        name: {f"{group} of rank {r}": found[name][group] for r, found in enumerate(ranks) for group in found[name]}
        for name in RANK_CASES
    }


def prune(settings: Mapping[str, Any], folder: Path, **_: Any) -> Groups:
    """Prune a model without Lightning.

    `options` are those of the pruning, `dtype` is the precision of the weights and `rows` the number of rows of a
    calibration batch; with `padded`, the samples have different lengths.
    """
    from helpers.causal_lms import prompts
    from helpers.prune_model import Memory

    from wandazeta.pruning import PruneOptions, prune_model

    model = build(settings).to(getattr(torch, settings.get("dtype", "float32")))
    ids, mask = prompts(8)
    if not settings.get("padded"):
        ids, mask = torch.randint(3, 300, ids.shape, generator=torch.Generator().manual_seed(1)), torch.ones_like(mask)
    rows = settings.get("rows", 2)
    batches = [{"input_ids": i, "attention_mask": m} for i, m in zip(ids.split(rows), mask.split(rows), strict=True)]
    memory = Memory()
    report = prune_model(
        model,
        lambda batch: model(**batch),
        batches,
        PruneOptions(**made(settings["options"])),
        token_mask=lambda batch: batch["attention_mask"].bool(),
        progress=memory,
    )
    masks = {f"{index}.{name}": m for index, result in memory.results.items() for name, m in result.masks.items()}
    return {"weights": dict(model.state_dict()), "masks": masks, "report": reported(report)}


def prune_module(settings: Mapping[str, Any], folder: Path, **trainer_options: Any) -> Groups:
    """Prune a LightningModule that is not one of this project with the callback, when `fit` begins."""
    from helpers.pruning import Tiny, loader, trainer

    from wandazeta.callbacks import WandaPPPruneCallback

    output_dir = str(folder / "pruning")
    callback = WandaPPPruneCallback(num_calibration_samples=8, output_dir=output_dir, **made(settings["options"]))
    module = Tiny(width=16)
    trainer(callback, limit_train_batches=1, **trainer_options).fit(module, loader())
    return {"weights": dict(module.state_dict()), "report": reported(callback.report)}


def first_order(settings: Mapping[str, Any], folder: Path, **trainer_options: Any) -> Groups:
    """Train by back-propagation; `options` are those of the module, `fit` describes the other settings."""
    from wandazeta.modules import FirstOrderModule

    options = {"learning_rate": 1e-2, "seed": 3} | settings["options"]
    module, found = fit(FirstOrderModule, settings, options, folder, trainer_options)
    trained = {name: weight for name, weight in module.backbone.named_parameters() if weight.requires_grad}
    if module.adapters is not None:
        trained["vector"] = module.adapters.theta
    return {"trained": trained} | found


def zeroth_order(settings: Mapping[str, Any], folder: Path, **trainer_options: Any) -> Groups:
    """Train with forward passes alone; `options` are those of the module, `fit` describes the other settings."""
    from helpers.same_bits_cases import TENSOR_TRAINS
    from helpers.zo_run import trained_vector

    from wandazeta.modules import ZerothOrderModule

    schedule = ["ConstantSchedule", {"num_queries": 3}]
    defaults = {"learning_rate": 3e-3, "query_chunk_size": 1, "schedule": schedule, "trainable": TENSOR_TRAINS}
    module, found = fit(ZerothOrderModule, settings, defaults | settings["options"], folder, trainer_options)
    vector = module.adapters
    states = {"update": vector.update_states, "schedule": vector.schedule_states, "progress": module.progress}
    return {"trained": {"vector": trained_vector(module)}, "states": states} | found


def fit(
    cls: Callable[..., Any],
    settings: Mapping[str, Any],
    options: Mapping[str, Any],
    folder: Path,
    trainer_options: Mapping[str, Any],
) -> tuple[Any, Groups]:
    """Train for some `steps`, and with `validate` evaluate afterwards.

    `batch` is the kind of data: answer `options` of one token each, `long options`, `text`, or `labels` of an encoder;
    `batch_size` is its size. `prune` holds arguments of the callback that prunes the model first; with `keep_sparsity`,
    pruned weights stay zero.
    """
    from helpers.causal_lms import classification_batch, step_loader, text_batch
    from helpers.encoders import labelled_batch
    from helpers.pruning import trainer
    from lightning.pytorch import Callback
    from torch.utils.data import DataLoader

    from wandazeta.callbacks import KeepSparsity, WandaPPPruneCallback

    losses: list[float] = []

    class RecordLosses(Callback):
        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            losses.append(float(trainer.callback_metrics["train/loss"]))

    batch: Callable[..., dict[str, Tensor]] = {
        "options": classification_batch,
        "long options": lambda *args: classification_batch(*args, ((7, 8), (9,))),
        "text": text_batch,
        "labels": labelled_batch,
    }[settings.get("batch", "options")]
    callbacks: list[Any] = [RecordLosses()]
    if "prune" in settings:
        data = batch(8)
        rows = [
            {name: data[name][i : i + 1, :length] for name in ("input_ids", "attention_mask")}
            for i, length in enumerate(data["attention_mask"].sum(1).tolist())
        ]
        calibration = DataLoader(rows, batch_size=None)
        arguments = made(settings["prune"])
        callbacks.append(WandaPPPruneCallback(calibration=calibration, output_dir=str(folder / "pruning"), **arguments))
    if settings.get("keep_sparsity"):
        callbacks.append(KeepSparsity())
    options = dict(options)
    if "lr_scheduler" in options:
        kind, arguments = options["lr_scheduler"]
        options["lr_scheduler"] = partial(getattr(torch.optim.lr_scheduler, kind), **arguments)
    module = cls(saved(settings, folder), **made(options))
    run = trainer(
        *callbacks, max_steps=settings.get("steps", 4), max_epochs=-1, default_root_dir=folder, **trainer_options
    )
    run.fit(module, step_loader(batch(20), settings.get("batch_size", 4), run))
    found: Groups = {"losses": {"train": torch.tensor(losses, dtype=torch.float64)}}
    if "prune" in settings:
        found["report"] = reported(callbacks[1].report)
        weights = module.backbone.named_parameters()
        found["backbone"] = {name: weight for name, weight in weights if not weight.requires_grad}
    if settings.get("validate"):
        (scores,) = run.validate(module, DataLoader([batch(10)], batch_size=None), verbose=False)
        # how long the texts are and how they start was not logged when the checksums were recorded
        measured = {name: score for name, score in scores.items() if name not in ("val/sequence_length", "val/bos")}
        found["validated"] = {name: torch.tensor(score).double() for name, score in measured.items()}
    return module, found


def build(settings: Mapping[str, Any]) -> Any:
    """Build a tiny random `model`: a causal language model (`wide llama` has width 64), or the encoder `bert`."""
    from helpers.causal_lms import tiny_lm
    from helpers.encoders import tiny_encoder

    kind = settings.get("model", "llama")
    if kind == "bert":
        return tiny_encoder(kind)
    return tiny_lm("llama", hidden_size=64, intermediate_size=160) if kind == "wide llama" else tiny_lm(kind)


def saved(settings: Mapping[str, Any], folder: Path) -> str:
    """Save the model and a tokenizer to a directory, unless it exists."""
    from helpers.tokenizer import byte_tokenizer

    directory = folder / "model"
    if not directory.exists():
        build(settings).save_pretrained(directory)
        byte_tokenizer().save_pretrained(directory)
    return str(directory)


def made(value: Any) -> Any:
    """Make the objects in settings, each written as its class and its arguments."""
    import torchmetrics

    from wandazeta import adapters, pruning, zeroth_order
    from wandazeta.models import loading
    from wandazeta.scoring import objectives

    if isinstance(value, dict):
        return {name: made(item) for name, item in value.items()}
    match value:
        case [str(name), dict(arguments)]:
            own = (adapters, pruning, zeroth_order, loading, objectives)
            modules = (*own, torchmetrics.classification, torchmetrics.text)
            return next(getattr(module, name) for module in modules if hasattr(module, name))(**made(arguments))
    return value


def reported(report: Any) -> dict[str, Tensor]:
    """Return the numbers of a pruning's report, except for times and memory."""
    numbers = {}
    for block in report.blocks:
        losses = (block.loss_before, block.loss_after)
        scores = [(layer.sparsity, layer.score_mean, layer.score_std) for layer in block.layers]
        numbers[f"{block.index}.losses"] = torch.tensor([loss for loss in losses if loss is not None]).double()
        numbers[f"{block.index}.scores"] = torch.tensor(scores, dtype=torch.float64)
        numbers[f"{block.index}.counts"] = torch.tensor([block.num_samples, block.num_tokens])
    return numbers


@contextmanager
def one_thread() -> Iterator[None]:
    """Use one thread: several threads sum in another order."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


# -- describing the result ----------------------------------------------------------------------------------------


def processor() -> str:
    """Return what the bits of matrix products depend on: the processor's instructions and versions of packages."""
    flags = torch.cpu.get_capabilities()
    extensions = [name for name in ("avx512_f", "avx512_bf16", "avx512_fp16", "amx_bf16") if flags.get(name)]
    parts = [flags.get("cpu_name", "unknown"), torch.backends.cpu.get_cpu_capability(), *extensions]
    return ", ".join([*map(str, parts), *(f"{package} {version(package)}" for package in PACKAGES)])


def checksum(tensors: Mapping[str, Tensor]) -> str:
    """Return the SHA-256 of names, shapes, data types and bytes."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def statistics(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Return statistics in float64 that agree on other processors within a tolerance."""
    values = torch.cat([tensors[name].detach().double().reshape(-1) for name in sorted(tensors)])
    count = len(values)
    places = [round(share * (count - 1)) for share in (0.2, 0.5, 0.9)] if count else []
    return {
        "count": count,
        "zeros": int((values == 0).sum()),
        "abs": float(values.abs().sum()),
        "norm": float(values.square().sum().sqrt()),
        # depends on signs and on the order, unlike the sums of absolute values and squares
        "wave": float(values @ torch.arange(count).double().cos()),
        "samples": values[places].tolist(),
    }


def distances(expected: Mapping[str, Any], found: Mapping[str, Any]) -> dict[str, float]:
    """Return the distance of each statistic from the expected one, relative to its usual size."""
    if expected["count"] != found["count"]:
        return {"count": float("inf")}
    count, norm = max(expected["count"], 1), expected["norm"] or 1.0
    usual = norm / count**0.5  # of a single value
    scales = {"zeros": count, "abs": usual * count, "norm": norm, "wave": norm}
    far = {name: abs(expected[name] - found[name]) / scale for name, scale in scales.items()}
    pairs = zip(expected["samples"], found["samples"], strict=True)
    return far | {"samples": max((abs(a - b) / max(usual, abs(a)) for a, b in pairs), default=0.0)}


def main() -> None:
    """Run the cases of two ranks; each rank writes its results."""
    import torch.distributed as dist
    from helpers.processes import leave_process_group
    from helpers.same_bits_cases import RANK_CASES

    root = Path(json.loads(Path(sys.argv[1]).read_text())["root"])
    results = {}
    # the first case that trains starts the other rank, which runs this program, too
    for index, (name, settings) in enumerate(RANK_CASES.items()):
        results[name] = run_case(settings, root / str(index), strategy="ddp", devices=2)
    torch.save(results, root / f"result-{dist.get_rank()}.pt")
    leave_process_group()


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))
    main()
