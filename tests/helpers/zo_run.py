"""A short zeroth-order training that tests run in the process, or as a program of its own to kill or to spread out."""

import json
import os
import sys
from pathlib import Path

import torch


class Recorder:
    """What a run leaves behind: per step the loss, the batch and the number of queries; at the end the adapters."""

    def __init__(self):
        from lightning.pytorch import Callback

        recorder = self
        self.steps = {}

        class _Record(Callback):
            def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
                recorder.steps[trainer.global_step] = {
                    "loss": float(trainer.callback_metrics.get("train/loss", torch.nan)),
                    "batch": batch["input_ids"].flatten().tolist(),
                    "queries": int(trainer.callback_metrics.get("zo/queries", 0)),
                }

        self.callback = _Record()


def count_bytes():
    """Count the bytes of the collectives from the first step to the last; returns the counter and its callback."""
    sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
    from lightning.pytorch import Callback
    from scaling import CountBytes

    counter = CountBytes()

    class Count(Callback):
        def on_train_start(self, *_):
            counter.counting = True

        def on_train_end(self, *_):
            counter.counting = False

    return counter, Count()


def trainable_of(options):
    """Take what is trained out of options that a JSON file can hold: tensor trains with settings of their own."""
    from wandazeta import adapters

    names = ("rank", "bottleneck", "sites", "layers")
    settings = {name: options.pop(f"adapter_{name}") for name in names if f"adapter_{name}" in options}
    if "identity_start" in options:
        settings["identity_start"] = options.pop("identity_start")
    chosen = options.pop("trainable", None)
    if isinstance(chosen, str):
        return getattr(adapters, chosen)()
    return chosen or adapters.TensorTrainAdapters(**{"rank": 2, "bottleneck": 8, "identity_start": False} | settings)


def components(options):
    """Turn the JSON form of components, such as `["OneSided", {"epsilon": 0.1}]`, into the components."""
    from wandazeta import zeroth_order as zo
    from wandazeta.models.loading import LoadingOptions

    options = dict(options)
    for name in options.keys() & {"estimator", "schedule", "update"}:
        if isinstance(options[name], list):
            kind, arguments = options[name]
            options[name] = getattr(zo, kind)(**arguments)
    for name, kind in (("loading", LoadingOptions), ("head", zo.TrainedHead)):
        if isinstance(options.get(name), dict):
            options[name] = kind(**options[name])
    options["trainable"] = trainable_of(options)
    return options


def train(
    model_dir,
    root,
    *,
    steps=12,
    num_examples=20,
    batch_size=4,
    save_every=0,
    resume=False,
    strategy="auto",
    devices=1,
    queries=3,
    text=False,
    batch=None,
    sleep=0.0,
    callbacks=(),
    trainer_options=None,
    corrupt_rank=None,
    shuffle_per_rank=False,
    step_pipe=None,
    **options,
):
    """Train; return the trainer, the module and the recorder."""
    from helpers.causal_lms import classification_batch, step_loader, text_batch
    from helpers.encoders import labelled_batch
    from lightning.pytorch import Callback, Trainer
    from lightning.pytorch.callbacks import ModelCheckpoint

    from wandazeta.modules import ZerothOrderModule
    from wandazeta.zeroth_order import ConstantSchedule

    root = Path(root)
    if isinstance(strategy, dict):
        from helpers.strategies import make_strategy

        strategy = make_strategy(strategy, devices)

    class Slow(Callback):
        def on_train_batch_start(self, *_):
            import time

            time.sleep(sleep)

    class Corrupt(Callback):
        def on_train_batch_start(self, trainer, module, *_):
            if trainer.global_rank == corrupt_rank and trainer.global_step == 3:
                module.adapters.theta[5] += 1e-3

    class Tell(Callback):
        def on_train_batch_start(self, trainer, *_):
            os.write(step_pipe, trainer.global_step.to_bytes(4, "little"))

    recorder = Recorder()
    every = [Corrupt(), recorder.callback, *callbacks, *([Tell()] if step_pipe else []), *([Slow()] if sleep else [])]
    if save_every:
        every.append(
            ModelCheckpoint(root, "step-{step}", save_top_k=-1, every_n_train_steps=save_every, save_last=True)
        )
    options = {"learning_rate": 3e-3, "query_chunk_size": 1, "schedule": ConstantSchedule(queries)} | options
    options = components(options)
    module = ZerothOrderModule(str(model_dir), **options)
    trainer = Trainer(
        accelerator="cpu",
        strategy=strategy,
        devices=devices,
        max_steps=steps,
        logger=False,
        enable_checkpointing=bool(save_every),
        enable_progress_bar=False,
        enable_model_summary=False,
        log_every_n_steps=1,
        default_root_dir=root,
        callbacks=every,
        **(trainer_options or {}),
    )
    if batch is None and module.loading.num_classes is not None:
        batch = labelled_batch(num_examples, module.loading.num_classes)
    if batch is None:
        batch = text_batch(num_examples) if text else classification_batch(num_examples)
    seed = trainer.global_rank if shuffle_per_rank else 0
    trainer.fit(module, step_loader(batch, batch_size, trainer, seed), ckpt_path="last" if resume else None)
    return trainer, module, recorder


def trained_vector(module):
    """Everything that was trained, in one vector."""
    vector = module.adapters
    if vector.folds_queries:
        return vector.theta.clone()
    return torch.cat([weight.detach().flatten() for weight in vector.weights()])


def main():
    """Train as the JSON file given says; every rank writes what it ended with."""
    settings = json.loads(Path(sys.argv[1]).read_text())
    counter = None
    if settings.pop("count_bytes", False):
        counter, counting = count_bytes()
        settings["callbacks"] = [counting]
    folder = settings.pop("prune", None)
    if folder:
        from wandazeta.callbacks import WandaPPPruneCallback

        pruning = WandaPPPruneCallback(method="wanda", num_calibration_samples=8, output_dir=folder)
        settings["callbacks"] = [*settings.get("callbacks", ()), pruning]
    gathers = None
    if settings.pop("watch_gathers", False):
        from helpers.gathers import WatchGathers

        gathers = WatchGathers()
        settings["callbacks"] = [gathers]
    from wandazeta.models.sharded import local_shard

    trainer, module, recorder = train(**settings)
    result = {
        "theta": trained_vector(module),
        "backbone_key": module.backbone_key,
        "steps": recorder.steps,
        "metrics": {name: float(value) for name, value in trainer.callback_metrics.items()},
        "update_states": module.adapters.update_states.clone(),
        "schedule_states": module.adapters.schedule_states.clone(),
        "progress": module.progress.clone(),
        "updates": int(module.progress[0]),
        "global_step": trainer.global_step,
        # ZeRO-3 and FSDP2 leave a share of each weight
        "sharded": any(
            getattr(p, "ds_tensor", local_shard(p)).numel() < getattr(p, "ds_numel", p.numel())
            for p in module.backbone.parameters()
        ),
    }
    if gathers:
        result["gathers"] = gathers.result()
    if counter:
        result["bytes_per_step"] = counter.bytes / settings["steps"]
    torch.save(result, Path(settings["root"]) / f"result-{trainer.global_rank}.pt")
    from helpers.processes import leave_process_group

    leave_process_group()


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
