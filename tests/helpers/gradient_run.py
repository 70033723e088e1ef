"""Short trainings by back-propagation, one after another, as a program that a strategy starts on several ranks."""

import json
import os
import sys
from pathlib import Path

import torch


class Noise(torch.optim.SGD):
    """An optimizer that changes every value, whatever its gradient."""

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for weight in group["params"]:
                weight.add_(torch.ones_like(weight), alpha=1e-3)


def whole_weights(module):
    """Copies of all weights by name, gathered if the strategy shards them."""
    from wandazeta.models.sharded import whole
    from wandazeta.models.zero3 import gathered

    weights = {}
    for name, weight in module.named_parameters():
        with gathered([weight]):
            weights[name] = whole(weight.detach()).clone()
    return weights


def watch(found):
    """Callback that records the weights at the start, what is sharded, and the losses of validations."""
    from lightning.pytorch import Callback

    from wandazeta.models.sharded import local_shard

    class Watch(Callback):
        def on_train_start(self, trainer, module):
            found["start"] = whole_weights(module)

        def on_validation_end(self, trainer, module):
            found.setdefault("val", []).append(float(trainer.callback_metrics["val/option_loss"]))

        def on_train_batch_end(self, trainer, module, *_):
            found["steps"] = [*found.get("steps", []), trainer.global_step]

        def on_train_end(self, trainer, module):
            weights = list(module.parameters())
            # ZeRO-3 and FSDP2 leave a share of each weight
            shares = [
                (getattr(w, "ds_tensor", local_shard(w)).numel(), getattr(w, "ds_numel", w.numel())) for w in weights
            ]
            found["sharded"] = any(share < numel for share, numel in shares)
            found["trained"] = sum(getattr(w, "ds_numel", w.numel()) for w in weights if w.requires_grad)
            # an optimizer of torch, or what DeepSpeed has made of one
            optimizer = getattr(trainer.optimizers[0], "optimizer", trainer.optimizers[0])
            moments = [state["exp_avg"] for state in optimizer.state.values() if "exp_avg" in state]
            found["moments"] = sum(local_shard(moment).numel() for moment in moments)

    return Watch()


def calibrated(directory):
    """A pruning callback with data of its own."""
    from helpers.causal_lms import rows_of, text_batch
    from torch.utils.data import DataLoader

    from wandazeta.callbacks import WandaPPPruneCallback

    prune = WandaPPPruneCallback(method="wanda", num_calibration_samples=8, output_dir=str(directory))
    lengths = [(row, int(row["attention_mask"].sum())) for row in rows_of(text_batch(8))]
    rows = [{name: value[None, :length] for name, value in row.items()} for row, length in lengths]
    prune.calibration = DataLoader(rows, batch_size=None)
    return prune


def train(
    model_dir,
    root,
    *,
    steps=6,
    strategy=None,
    devices=1,
    keep_sparsity=False,
    masks=None,
    prune=None,
    save_every=0,
    resume=False,
    validate=False,
    evaluate=False,
    save_adapters=False,
    noise=False,
    trainer_options=None,
    **options,
):
    """Train; return the results of this rank."""
    from helpers.causal_lms import classification_batch, step_loader
    from helpers.strategies import make_strategy
    from lightning.pytorch import Trainer
    from lightning.pytorch.callbacks import ModelCheckpoint
    from torch.utils.data import DataLoader

    from wandazeta import adapters
    from wandazeta.callbacks import AtomicCheckpointIO, KeepSparsity
    from wandazeta.modules import FirstOrderModule

    found = {}
    held_out = DataLoader([classification_batch(8, seed=1)], batch_size=None)
    options["lr_scheduler"] = lambda optimizer: torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.5, 6)
    trainable = getattr(adapters, options.pop("trainable"))()
    module = FirstOrderModule(str(model_dir), trainable=trainable, **options)
    if noise:
        module.configure_optimizers = lambda: Noise(module.parameters())
    callbacks = [watch(found)]
    if keep_sparsity:
        callbacks.append(KeepSparsity(masks))
    if prune:
        callbacks.append(calibrated(prune))
    if save_every:
        callbacks.append(ModelCheckpoint(root, every_n_train_steps=save_every, save_top_k=0, save_last=True))
    trainer = Trainer(
        accelerator="cpu",
        strategy=make_strategy(strategy, devices),
        devices=devices,
        plugins=[AtomicCheckpointIO()],
        max_steps=steps,
        logger=False,
        enable_checkpointing=bool(save_every),
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        val_check_interval=3,
        default_root_dir=root,
        callbacks=callbacks,
        **(trainer_options or {}),
    )
    # four rows in each step, whatever the ranks
    loader = step_loader(classification_batch(40), 4 // devices, trainer)
    if evaluate:
        (scores,) = trainer.validate(module, held_out, ckpt_path=Path(root) / "last.ckpt", verbose=False)
        return scores
    try:
        trainer.fit(module, loader, held_out if validate else None, ckpt_path="last" if resume else None)
    except ValueError as error:
        return found | {"error": str(error)}
    found["weights"] = whole_weights(module)
    if save_adapters:
        module.save_adapters(Path(root) / "adapter")
        try:
            module.merge(keep_mask=True)
        except ValueError as error:
            found["error"] = str(error)
    return found


def main():
    """Train as each entry of the JSON file's `runs` says; every rank writes its results."""
    from helpers.processes import leave_process_group

    settings = json.loads(Path(sys.argv[1]).read_text())
    root = Path(settings.pop("root"))
    runs = settings.pop("runs")
    # the first training starts the other ranks, which run this program, too
    results = {name: train(**{"root": root / name} | settings | run) for name, run in runs.items()}
    torch.save(results, root / f"result-{os.environ.get('LOCAL_RANK', 0)}.pt")
    leave_process_group()


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
