"""Tasks of lm-evaluation-harness, on a model in memory."""

import importlib.util
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from wandazeta.utilities.arguments import closest_names
from wandazeta.utilities.rng import isolated_rng

__all__ = ["load_tasks", "run_tasks"]


def load_tasks(tasks: Sequence[str], folders: Sequence[str | Path] = ()) -> Any:
    """Find tasks by name, among those of the harness and of folders.

    Args:
        tasks: Names of tasks or groups.
        folders: Folders with YAML files of further tasks.

    Returns:
        The harness's manager of tasks.

    Raises:
        ValueError: If lm-evaluation-harness is not installed, there is no such folder, or a name is unknown.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise ValueError(
            "Expected lm-evaluation-harness to be installed for argument `tasks`; run `pip install 'wandazeta[eval]'`"
        )
    for folder in folders:
        if not Path(folder).is_dir():
            raise ValueError(f"Expected argument `include_path` to be a folder with tasks, but got '{folder}'")
    # as the harness sets it, before it forks
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from lm_eval.tasks import TaskManager

    # it tells every step of its own
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    manager = TaskManager(include_path=[str(folder) for folder in folders])
    for task in tasks:
        if not manager.match_tasks([task]):
            raise ValueError(
                f"Expected argument `tasks` to name tasks of lm-evaluation-harness, but got {task!r}; "
                f"{closest_names(task, manager.all_tasks)}"
            )
    return manager


def run_tasks(
    model: nn.Module,
    tokenizer: Any,
    tasks: Sequence[str],
    manager: Any,
    *,
    num_fewshot: int | None = None,
    limit: float | None = None,
    batch_size: int = 8,
) -> dict[str, dict[str, Any]]:
    """Run tasks as the harness's own command line does.

    Args:
        model: The model of transformers, on its device.
        tokenizer: Its tokenizer.
        tasks: Names of tasks or groups.
        manager: What `load_tasks` returned.
        num_fewshot: Examples in the context; by default those of the task.
        limit: Examples of each task, or a fraction of them; by default all.
        batch_size: Requests per batch.

    Returns:
        Metrics by task, under the harness's names, such as `acc,none` and `acc_stderr,none`.
    """
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    wrapped = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
    # it seeds the global generators
    with isolated_rng(0):
        found: Any = simple_evaluate(
            wrapped,
            tasks=list(tasks),
            num_fewshot=num_fewshot,
            batch_size=batch_size,
            limit=limit,
            log_samples=False,
            task_manager=manager,
        )
    results = {**found["results"], **found.get("groups", {})}
    # whole numbers of numpy are no JSON
    return {task: {name: _plain(value) for name, value in metrics.items()} for task, metrics in results.items()}


def _plain(value: Any) -> Any:
    return value.item() if hasattr(value, "item") else value
