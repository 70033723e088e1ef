"""Result files under `benchmarks/results/`, and the helpers that several benchmarks share."""

import json
import os
import subprocess
import sys
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import yaml
from lightning.pytorch import Callback

from wandazeta import presets
from wandazeta.cli.main import PruningTrainer
from wandazeta.pruning import PruneOptions, make_method
from wandazeta.utilities.environment import command, commit, hardware, versions

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
SMOLLM2 = ".cache/wandazeta/smollm2-135m"
# decoders of the offline samples: name in records -> directory
MODELS = {"SmolLM2-135M": SMOLLM2, "Qwen2.5-Coder-0.5B": ".cache/wandazeta/qwen2.5-coder-0.5b"}

# Names in the code -> names in records made before the package was restructured (commit b27f25d and earlier).
OLD_CLASS_PATHS = {
    "wandazeta.adapters.": "wandazeta.modules.adapters.",
    "wandazeta.zeroth_order.": "wandazeta.modules.zo.",
}
OLD_NAMES = {
    # pruning methods
    "Magnitude": "magnitude",
    "Wanda": "wanda",
    "RGS": "rgs",
    "RO": "ro",
    "WandaPP": "wanda++",
    "SparseGPT": "sparsegpt",
    "TunedRO": "tuned-ro",
    # estimators
    "TwoSided": "two_sided",
    "OneSided": "one_sided",
    "ForwardMode": "forward_mode",
}
# Components whose options were flat arguments, by argument: prefix of the old arguments.
OLD_PREFIXES = {"method": "", "optimisation": "", "estimator": "", "loading": "", "reading": "", "head": "head_"}
OLD_FIRST_ORDER = {"PeftLoRA": "lora", "TensorTrainAdapters": "tensor_train", "Weights": "full"}


def describe(name: str, records: Any, **more: Any) -> dict[str, Any]:
    """Return the content of a result file: the records, and what is needed to reproduce them."""
    return {
        "name": name,
        "command": command(),
        "commit": commit() or _carried_commit(),
        "date": datetime.now(UTC).date().isoformat(),
        "versions": versions(),
        "hardware": hardware(),
        **more,
        "records": records,
    }


def _carried_commit() -> str | None:
    """Return the commit of a checkout that benchmarks/gpu/bundle.sh has carried to another machine, without git."""
    path = ROOT / "COMMIT"
    return path.read_text().strip() if path.exists() else None


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

    Records are never rewritten. A benchmark or a test that compares today's settings with them translates its own side:
    class paths have moved, and options of components (methods, estimators, heads, loading) were flat arguments. Reports
    of prunings have kept the flat spelling.

    Args:
        settings: Settings of a module, of a pruning or of a benchmark: nested dictionaries, lists and plain values.
    """
    if isinstance(settings, list):
        return [old_spelling(value) for value in settings]
    if isinstance(settings, str):
        for new, old in OLD_CLASS_PATHS.items():
            if settings.startswith(new):
                return old + settings.removeprefix(new)
        return settings
    if not isinstance(settings, dict):
        return settings
    is_first_order = str(settings.get("class_path", "")).endswith("FirstOrderModule")
    flat: dict[str, Any] = {}
    for name, value in settings.items():
        if name in OLD_PREFIXES and isinstance(value, dict):
            flat |= _flat_component(name, value)
        elif name == "init_args" and is_first_order and "trainable" in value:
            others = {key: other for key, other in value.items() if key != "trainable"}
            flat[name] = _flat_trainable(value["trainable"]) | old_spelling(others)
        else:
            flat[name] = old_spelling(value)
    return flat


def _flat_component(name: str, component: dict[str, Any]) -> dict[str, Any]:
    """Translate a component, given as class path and arguments or as arguments alone, to flat arguments."""
    flat: dict[str, Any] = {}
    if "class_path" in component:
        class_name = component["class_path"].rpartition(".")[2]
        flat = {name: OLD_NAMES[class_name]} if class_name in OLD_NAMES else {}
        component = component.get("init_args", {})
    prefix = OLD_PREFIXES[name]
    # the one option of a head whose name has no prefix
    return flat | {key if key == "num_answers" else prefix + key: old for key, old in old_spelling(component).items()}


def _flat_trainable(component: dict[str, Any]) -> dict[str, Any]:
    """Translate the `trainable` of a FirstOrderModule to its old arguments `train` and `lora_…` or `tensor_train`."""
    train = OLD_FIRST_ORDER[component["class_path"].rpartition(".")[2]]
    options = component.get("init_args", {})
    if train == "lora":
        return {"train": train} | {f"lora_{name}": value for name, value in options.items()}
    return {"train": train} | ({train: old_spelling(component)} if options else {})


def prune_settings(name: str) -> dict[str, Any]:
    """Return the settings of a preset that decide a pruning, in the flat spelling of reports and records.

    Args:
        name: Name of a preset, `best` or `paper`.
    """
    settings = yaml.safe_load(presets.path(name).read_text())["prune"]
    settings = old_spelling(settings.get("init_args", settings))
    return {key: value for key, value in settings.items() if key not in ("num_calibration_samples", "output_dir")}


def callback_arguments(settings: dict[str, Any]) -> dict[str, Any]:
    """Translate flat settings of a pruning to arguments of the callback, for a config.

    Args:
        settings: Settings in the flat spelling; options that the method does not have are left out.
    """
    options = used_options(settings)
    method = {"class_path": f"wandazeta.pruning.{type(options.method).__name__}", "init_args": asdict(options.method)}
    others = {"exclude_modules": list(options.exclude_modules), "compute_dtype": options.compute_dtype}
    return {"method": method, **options.pattern.to_dict(), **others, "seed": options.seed}


def used_options(settings: dict[str, Any]) -> PruneOptions:
    """Return the options of a pruning without those that its method does not have.

    Args:
        settings: Settings in the flat spelling.
    """
    method = make_method(settings["method"])
    known = {*method.to_dict(), "sparsity_pattern", "sparsity", "sparsity_slope"}
    known |= {"exclude_modules", "compute_dtype", "seed"}
    return PruneOptions.from_dict({name: value for name, value in settings.items() if name in known})


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
