"""One run of `benchmarks/finetune.py`, in a process of its own.

    python benchmarks/finetune_run.py RUN.json

Prints what was measured as one line of JSON.
"""

import json
import logging
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from jsonargparse import ArgumentParser
from lightning.pytorch import Callback, Trainer, seed_everything
from records import ROOT
from torch.utils.data import DataLoader
from typing_extensions import override

from wandazeta import zeroth_order
from wandazeta.datamodules import ClassificationDataModule, PromptedClassificationDataModule
from wandazeta.models.modes import evaluation_mode
from wandazeta.modules import LanguageModel
from wandazeta.modules.zeroth_order import NonFiniteLossError

TWO_SIDED: dict[str, Any] = {"class_path": "wandazeta.zeroth_order.TwoSided", "init_args": {}}


class Curve(Callback):
    """Notes the validation accuracy at equal distances of forwards and at the end, before the step that exceeds them.

    Args:
        batches: The validation batches.
        budget: Forwards of a batch to spend.
        num_points: Points of the curve, the last one included.
        forwards_per_step: What a step costs where the module does not count its forwards itself and end in time.
    """

    def __init__(self, batches: list[Any], budget: int, num_points: int, forwards_per_step: int | None) -> None:
        self.batches = batches
        self.budget = budget
        self.num_points = num_points
        self.forwards_per_step = forwards_per_step
        self.points: list[tuple[int, float]] = []

    @property
    def forwards(self) -> int:
        """Forwards spent."""
        return self.points[-1][0] if self.points else 0

    @override
    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *_: Any) -> None:
        per_step = self.forwards_per_step
        if per_step is None:
            spent = int(pl_module.progress[1])
        else:
            spent = trainer.global_step * per_step
            trainer.should_stop |= spent + per_step > self.budget
        if trainer.should_stop or spent * self.num_points >= (len(self.points) + 1) * self.budget:
            self.points.append((spent, accuracy(pl_module, self.batches)))


def accuracy(module: Any, batches: list[Any]) -> float:
    """Share of the examples that are classified rightly."""
    right, total = 0, 0
    with torch.no_grad(), evaluation_mode(list(module.modules())):
        for index, batch in enumerate(batches):
            batch = {name: values.to(module.device) for name, values in batch.items()}
            right += int((module.predict_step(batch, index)["prediction"] == batch["label"]).sum())
            total += len(batch["label"])
    return right / total


def data_of(run: dict[str, Any]) -> ClassificationDataModule:
    """The task's examples for a model: text for a head, else prompts, `shots` examples of each class before them."""
    settings = run["data"] | {"tokenizer": str(ROOT / run["path"]), "seed": run["seed"]}
    template, options = settings.pop("template"), settings.pop("options")
    data: ClassificationDataModule
    if run["head"]:
        data = ClassificationDataModule(num_classes=len(options), **settings)
    else:
        data = PromptedClassificationDataModule(template=template, options=options, **settings)
    data.setup()
    shots = run["method"].get("shots", 0)
    if shots == 0:
        return data
    tokenizer: Any = data.tokenizer
    shown: list[list[str]] = [[] for _ in options]
    for example in data.examples("train"):
        prompt = tokenizer.decode(example.input_ids, skip_special_tokens=True)
        shown[example.label].append(f"{prompt}{options[example.label]}\n\n")
    before = "".join(text for group in list(zip(*shown, strict=True))[:shots] for text in group)
    # the text in question keeps its length
    settings["max_length"] += len(tokenizer(before)["input_ids"])
    data = PromptedClassificationDataModule(template=before + template, options=options, **settings)
    data.setup()
    return data


def module_parser() -> ArgumentParser:
    """Makes modules of classes and options, as the command line does."""
    parser = ArgumentParser()
    parser.add_subclass_arguments(LanguageModel, "module")
    return parser


def forwards_per_step(method: dict[str, Any]) -> int:
    """What a step costs; of zeroth order for as many queries in every step."""
    if "forwards_per_step" in method:
        return int(method["forwards_per_step"])
    options = method["init_args"]
    class_path = options.get("estimator", TWO_SIDED)["class_path"]
    estimator = getattr(zeroth_order, class_path.rpartition(".")[2])()
    return estimator.num_forwards(options["schedule"]["init_args"]["num_queries"])


def module_of(run: dict[str, Any], data: ClassificationDataModule) -> LanguageModel:
    """The module of a method, `LanguageModel` where nothing is trained."""
    method = run["method"]
    options = dict(method.get("init_args", {}))
    if "with_head" in method:
        options["head"] = method["with_head"] | ({} if run["head"] else {"num_answers": data.num_classes})
    loading = {"num_classes": data.num_classes if run["head"] else None}
    options |= {"model_name_or_path": str(ROOT / run["path"]), "loading": options.get("loading", {}) | loading}
    if "class_path" in method:
        options |= {"seed": run["seed"]} | {name: run[name] for name in ("learning_rate",) if name in run}
        # a grid names an epsilon for methods that have one
        if "epsilon" in run:
            estimator = options.get("estimator", TWO_SIDED)
            options["estimator"] = estimator | {"init_args": estimator["init_args"] | {"epsilon": run["epsilon"]}}
        if "forwards_per_step" not in method:
            options["max_forwards"] = run["forwards"]
        if method.get("decay", False):
            steps = {"total_iters": run["forwards"] // forwards_per_step(method)}
            options["lr_scheduler"] = {"class_path": "torch.optim.lr_scheduler.PolynomialLR", "init_args": steps}
    parser = module_parser()
    class_path = method.get("class_path", "wandazeta.modules.LanguageModel")
    if run["name"] == "linear_probe" and not run["head"]:
        # notes the states that answers begin at; adapters that change nothing are left as they are
        class_path = "wandazeta.modules.ZerothOrderModule"
        options["head"] = {"num_answers": data.num_classes}
    config = parser.parse_object({"module": {"class_path": class_path, "init_args": options}})
    module: LanguageModel = parser.instantiate_classes(config).module
    return module


def text_baseline(data: ClassificationDataModule) -> float:
    """Test accuracy of TF-IDF with logistic regression on the words that the model reads, too."""
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline

    tokenizer: Any = data.tokenizer

    def read(split: Any) -> tuple[list[str], list[int]]:
        examples = data.examples(split)
        texts = [tokenizer.decode(example.input_ids, skip_special_tokens=True) for example in examples]
        return texts, [example.label for example in examples]

    classifier = make_pipeline(TfidfVectorizer(ngram_range=(1, 2)), LogisticRegression(C=10.0, max_iter=1000))
    classifier.fit(*read("train"))
    return float(classifier.score(*read("test")))


def linear_probe(module: LanguageModel, data: ClassificationDataModule) -> tuple[float, int]:
    """Test accuracy of logistic regression on what the frozen model gives a head or answers, and the forwards spent."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    def read(split: Any) -> tuple[Any, Any, int]:
        features, labels = [], []
        with torch.no_grad(), evaluation_mode(list(module.modules())):
            for batch in DataLoader(data.examples(split), data.batch_size, collate_fn=data.collate):  # type: ignore[arg-type]
                features.append(module.scorer.option_scores(module.scorer.prepare(batch)).features)
                labels.append(batch["label"])
        return torch.cat(features).numpy(), torch.cat(labels).numpy(), len(features)

    classifier = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=1000))
    module.setup("predict")
    train_features, train_labels, forwards = read("train")
    classifier.fit(train_features, train_labels)
    return float(classifier.score(*read("test")[:2])), forwards


def measure(run: dict[str, Any]) -> dict[str, Any]:
    """Train if there is something to train, and take the accuracy on the split that is asked for."""
    seed_everything(run["seed"], verbose=False)
    start = time.perf_counter()
    data = data_of(run)
    if run["name"] == "tfidf":
        return {"forwards": 0, "accuracy": text_baseline(data), "curve": [], "seconds": time.perf_counter() - start}
    module = module_of(run, data)
    if run["name"] == "linear_probe":
        found, forwards = linear_probe(module.eval(), data)
        return {"forwards": forwards, "accuracy": found, "curve": [], "seconds": time.perf_counter() - start}
    diverged = False
    curve = Curve(list(data.val_dataloader()), run["forwards"], run["points"], run["method"].get("forwards_per_step"))
    if "class_path" in run["method"]:
        trainer = Trainer(
            accelerator="auto",
            devices=1,
            max_epochs=-1,
            limit_val_batches=0,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            callbacks=[curve],
        )
        try:
            trainer.fit(module, datamodule=data)
        except NonFiniteLossError:
            # rates of a grid may be too large; what became of the module is measured like any other
            diverged = True
    loader = data.val_dataloader() if run["split"] == "val" else data.test_dataloader()
    found = accuracy(module.eval(), list(loader))
    return {
        "forwards": curve.forwards,
        "accuracy": found,
        "curve": curve.points,
        "diverged": diverged,
        "seconds": time.perf_counter() - start,
    }


def main() -> None:
    """Measure what the file given says."""
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    print(json.dumps(measure(json.loads(Path(sys.argv[1]).read_text()))))


if __name__ == "__main__":
    main()
