"""A tiny model, data for it, and the configuration of `wandazeta fit` for them; and the command line as a process."""

import json
import os
import subprocess
import sys
from pathlib import Path

import yaml
from helpers.prune_options import method_arguments
from helpers.tiny_model import save_tiny_llama


def write_inputs(root, num_blocks=2):
    """Write `model/`, `reviews.jsonl` and `text.txt`."""
    rows = [{"text": f"{index} {'fine' if index % 2 else 'poor'}", "label": index % 2} for index in range(200)]
    (root / "reviews.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (root / "text.txt").write_text("\n\n".join(f"paragraph {index} " * 8 for index in range(60)))
    save_tiny_llama(root / "model", num_blocks=num_blocks)


def fit_settings(inputs, run_dir):
    """Settings of `wandazeta fit` that prune the model of one folder and fine-tune it for six steps in another."""
    calibration = {"source": f"{inputs}/text.txt", "sequence_length": 16, "num_calibration_samples": 6}
    return {
        "run_dir": run_dir,
        "checkpoint_every": 2,
        "prune": {"method": method_arguments(rounds=1, samples_per_round=4), "num_calibration_samples": 6},
        "model": {
            "class_path": "ZerothOrderModule",
            "init_args": {
                "model_name_or_path": f"{inputs}/model",
                "schedule": {"class_path": "wandazeta.zeroth_order.ConstantSchedule", "init_args": {"num_queries": 2}},
                "trainable": {"class_path": "TensorTrainAdapters", "init_args": {"bottleneck": 8}},
            },
        },
        "data": {
            "class_path": "PromptedClassificationDataModule",
            "init_args": {
                "source": f"{inputs}/reviews.jsonl",
                "template": "{text} is",
                "options": [" bad", " good"],
                "batch_size": 4,
                "num_train": 40,
                "num_val": 8,
                "num_test": 8,
                "calibration": {"class_path": "TextDataModule", "init_args": calibration},
            },
        },
        "trainer": {
            "accelerator": "cpu",
            "max_steps": 6,
            "max_epochs": -1,
            "log_every_n_steps": 1,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "callbacks": [],
        },
    }


def write_fit_config(root, **trainer):
    """Write the inputs and `config.yaml`, whose run has the folder `run`; to be run in root."""
    write_inputs(root)
    settings = fit_settings(".", "run")
    settings["trainer"] |= trainer
    path = root / "config.yaml"
    path.write_text(yaml.safe_dump(settings))
    return path


def wandazeta(folder, *arguments, timeout=300):
    """Run the command line in a folder, with the helpers at hand; it starts its other ranks itself."""
    ranks = ("WORLD_SIZE", "RANK", "LOCAL_RANK", "NODE_RANK", "MASTER_PORT", "MASTER_ADDR")
    environment = {name: value for name, value in os.environ.items() if name not in ranks}
    paths = [str(Path(__file__).parents[1]), *filter(None, [environment.get("PYTHONPATH")])]
    return subprocess.run(
        [sys.executable, "-m", "wandazeta", *arguments],
        env=environment | {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"},
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
