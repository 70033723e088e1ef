"""Result files under `benchmarks/results/`, and the helpers that several benchmarks share."""

import json
import os
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import yaml
from lightning.pytorch import Callback

from wandazeta.cli.main import PruningTrainer
from wandazeta.utilities.environment import command, commit, hardware, versions

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
SMOLLM2 = ".cache/wandazeta/smollm2-135m"

# names in the code -> names in the records made before the package was restructured (commit b27f25d and earlier)
OLD_CLASS_PATHS = {
    "wandazeta.adapters.": "wandazeta.modules.adapters.",
    "wandazeta.zeroth_order.": "wandazeta.modules.zo.",
}


def describe(name: str, records: Any, **more: Any) -> dict[str, Any]:
    """Return the content of a result file: the records, and what is needed to reproduce them."""
    return {
        "name": name,
        "command": command(),
        "commit": commit(),
        "date": datetime.now(UTC).date().isoformat(),
        "versions": versions(),
        "hardware": hardware(),
        **more,
        "records": records,
    }


def finished(path: Path) -> list[dict[str, Any]]:
    """Return the records of a result file, or an empty list if the file does not exist."""
    records: list[dict[str, Any]] = json.loads(path.read_text())["records"] if path.exists() else []
    return records


def is_finished(settings: dict[str, Any], records: list[dict[str, Any]]) -> bool:
    """Return whether a record was made with these settings, in today's spelling or in the old one."""
    old = old_spelling(settings)
    return any(record.items() >= settings.items() or record.items() >= old.items() for record in records)


def write(path: Path, content: dict[str, Any]) -> None:
    """Write a result file atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".new")
    temporary.write_text(json.dumps(content, indent=2) + "\n")
    temporary.replace(path)


def old_spelling(settings: Any) -> Any:
    """Translate settings to the spelling of records made before the package was restructured.

    Records are never rewritten. A benchmark or a test that compares today's settings with them translates its own side.

    Args:
        settings: Settings of a benchmark: nested dictionaries, lists and plain values.
    """
    if isinstance(settings, dict):
        return {name: old_spelling(value) for name, value in settings.items()}
    if isinstance(settings, list):
        return [old_spelling(value) for value in settings]
    if isinstance(settings, str):
        for new, old in OLD_CLASS_PATHS.items():
            if settings.startswith(new):
                return old + settings.removeprefix(new)
    return settings


def prune_settings(config: Path) -> dict[str, Any]:
    """Return the arguments of the pruning callback in a config, without those that do not decide the result."""
    callback = yaml.safe_load(config.read_text())["trainer"]["callbacks"][0]
    settings: dict[str, Any] = dict(callback["init_args"])
    del settings["num_calibration_samples"], settings["output_dir"]
    return settings


def quiet_trainer(*callbacks: Callback, **options: Any) -> PruningTrainer:
    """Return a trainer on one device that writes neither logs nor checkpoints."""
    fixed = {"accelerator": "auto", "devices": 1, "logger": False, "enable_checkpointing": False}
    return PruningTrainer(callbacks=list(callbacks), **fixed | options)


def measure_in_process(script: str, *arguments: str) -> dict[str, Any]:
    """Run a script with one thread in a process of its own; returns the JSON object in its last line of output.

    Raises:
        RuntimeError: If the script fails; the message is its last line of errors.
    """
    done = subprocess.run(
        [sys.executable, script, *arguments],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(done.stderr.strip().splitlines()[-1])
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def run_wandazeta(*arguments: str | Path) -> None:
    """Run the command line in a process of its own, from the checkout."""
    subprocess.run([sys.executable, "-m", "wandazeta", *arguments], cwd=ROOT, check=True)


def tfidf_accuracy(train: tuple[list[str], list[int]], test: tuple[list[str], list[int]]) -> float:
    """Measure the accuracy of TF-IDF with logistic regression.

    Args:
        train: Texts and labels to fit on.
        test: Texts and labels to classify.
    """
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline

    classifier = make_pipeline(TfidfVectorizer(ngram_range=(1, 2)), LogisticRegression(C=10.0, max_iter=1000))
    return float(classifier.fit(*train).score(*test))
