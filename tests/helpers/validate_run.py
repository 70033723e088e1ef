"""Validates a causal language model as a program of its own, or as several ranks."""

import json
import os
import sys
from pathlib import Path

import torch


def main():
    """Validate as the JSON file given says; every rank writes its loss."""
    from helpers.causal_lms import step_loader, text_batch
    from helpers.cpu_deepspeed import CPUDeepSpeedStrategy
    from helpers.processes import leave_process_group
    from lightning.pytorch import Trainer

    from wandazeta.modules import LanguageModel

    settings = json.loads(Path(sys.argv[1]).read_text())
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    strategy = CPUDeepSpeedStrategy(stage=3) if settings["shard"] else "auto"
    trainer = Trainer(accelerator="cpu", devices=settings["devices"], strategy=strategy, **quiet)
    module = LanguageModel(settings["model_dir"], shard_on_load=settings["shard"])
    (metrics,) = trainer.validate(module, step_loader(text_batch(8), 4, trainer, 0), verbose=False)
    held = sum(parameter.numel() for parameter in module.backbone.parameters())
    result = {"loss": torch.tensor(metrics["val/loss"]), "whole_values": torch.tensor(held)}
    torch.save(result, Path(settings["root"]) / f"result-{trainer.global_rank}.pt")
    leave_process_group()


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
