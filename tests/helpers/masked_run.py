"""Masked training as a program of its own, to be spread over processes."""

import json
import os
import sys
from pathlib import Path

import torch


def main():
    """Train as the JSON file given says; every rank writes its weights and the state of its optimizer."""
    from helpers.masked import prunable, sparse_tiny
    from helpers.processes import leave_process_group
    from helpers.pruning import Tiny, callback, loader, trainer

    from wandazeta.callbacks import KeepSparsity

    settings = json.loads(Path(sys.argv[1]).read_text())
    # every rank its own data
    rank = int(os.environ.get("LOCAL_RANK", "0"))
    if settings.get("prune"):
        keep, module = callback(Path(settings["root"]) / "pruned", method="magnitude"), Tiny()
        module.dropout.p = 0.0
    else:
        # rank 1 starts from other weights, and has rank 0's when DDP has set up
        keep, module = KeepSparsity(), sparse_tiny(seed=rank)
    module.configure_optimizers = lambda: torch.optim.AdamW(module.parameters(), lr=0.01, weight_decay=0.1)
    options = {"strategy": "ddp", "devices": 2, "use_distributed_sampler": False, "gradient_clip_val": 0.05}
    run = trainer(keep, max_steps=settings["steps"], max_epochs=-1, **options)
    run.fit(module, loader(seed=rank))
    state = run.optimizers[0].state
    result = {
        "weights": {name: weight.detach().clone() for name, weight in module.named_parameters()},
        "moments": {name: state[weight]["exp_avg"] for name, weight in prunable(module).items()},
    }
    torch.save(result, Path(settings["root"]) / f"result-{run.global_rank}.pt")
    leave_process_group()


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))
    main()
