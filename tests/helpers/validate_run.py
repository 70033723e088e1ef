"""Validates and tests causal language models as a program of its own, or as several ranks."""

import json
import os
import sys
from pathlib import Path

import torch


def main():
    """Validate and test every kind of module as the JSON file given says; every rank writes its losses."""
    from helpers.cpu_deepspeed import CPUDeepSpeedStrategy
    from helpers.processes import leave_process_group
    from lightning.pytorch import Trainer

    from wandazeta.datamodules import TextDataModule
    from wandazeta.models.loading import LoadingOptions
    from wandazeta.modules import FirstOrderModule, LanguageModel, ZerothOrderModule

    settings = json.loads(Path(sys.argv[1]).read_text())
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    result = {}
    for kind in (LanguageModel, ZerothOrderModule, FirstOrderModule):
        strategy = CPUDeepSpeedStrategy(stage=settings["stage"]) if settings["stage"] else "auto"
        trainer = Trainer(accelerator="cpu", devices=settings["devices"], strategy=strategy, **quiet)
        loading = LoadingOptions(shard_on_load=settings["shard"] and kind is not FirstOrderModule)
        module = kind(settings["model_dir"], loading)
        data = TextDataModule(settings["text"], sequence_length=16, batch_size=2, eval_windows=8)
        losses = []
        for verb in (trainer.validate, trainer.test):
            (metrics,) = verb(module, data, verbose=False)
            losses += [value for name, value in sorted(metrics.items()) if name.endswith("/loss")]
        result[kind.__name__] = torch.tensor(losses)
        if kind is LanguageModel:
            result["whole_values"] = torch.tensor(sum(weight.numel() for weight in module.backbone.parameters()))
    torch.save(result, Path(settings["root"]) / f"result-{trainer.global_rank}.pt")
    leave_process_group()


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
