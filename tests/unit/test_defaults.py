"""Every argument is set alone to another sensible value: no default may contradict what a user gives."""

import inspect
import json
from functools import partial

import pytest
import torch
from helpers.causal_lms import save_tiny_lm
from helpers.tokenizer import byte_tokenizer
from torch.optim.lr_scheduler import LinearLR
from torchmetrics.classification import MulticlassAccuracy

from wandazeta.adapters import LoRAAdapters, PeftLoRA, TensorTrainAdapters, Weights
from wandazeta.callbacks import KeepSparsity, PredictionWriter, WandaPPPruneCallback
from wandazeta.data.sources import SourceOptions
from wandazeta.datamodules import ClassificationDataModule, PromptedClassificationDataModule, TextDataModule
from wandazeta.models.loading import LoadingOptions
from wandazeta.modules import FirstOrderModule, LanguageModel, ZerothOrderModule
from wandazeta.pruning import RGS, RO, RegionalOptimisation, SparseGPT, TunedRO, WandaPP
from wandazeta.pruning.options import PruneOptions
from wandazeta.pruning.pattern import SparsityPattern
from wandazeta.zeroth_order import (
    AdaZetaSchedule,
    ConstantSchedule,
    ForwardMode,
    OneSided,
    RAdaZOUpdate,
    SGDUpdate,
    TrainedHead,
    TwoSided,
    VarianceSchedule,
)

PATTERN = {"sparsity_pattern": ["1:4", "4:8", "unstructured"], "sparsity": [0.3, 0.9], "sparsity_slope": [0.2]}
SLOPES = {"directions": ["rademacher"], "aggregation": ["align", "fzoo"]}
# sizes of the model are arguments that have to be given
VALUES = {
    WandaPPPruneCallback: PATTERN
    | {
        "method": ["magnitude", "wanda", "rgs", "ro", "wanda++", "sparsegpt", RO(), WandaPP(alpha="auto"), TunedRO(2)],
        "compute_dtype": ["bfloat16"],
        "exclude_modules": [["down"]],
        "num_calibration_samples": [1, 8, 1000],
        "calibration": [TextDataModule()],
        "blocks": ["layers"],
        "device": ["cpu", "cuda:1"],
        "output_dir": ["elsewhere"],
        "seed": [3],
        "keep_sparsity": [False],
    },
    KeepSparsity: {"masks": ["pruned"], "blocks": ["layers"]},
    PredictionWriter: {"output_dir": ["elsewhere"]},
    PruneOptions: {
        "method": ["ro", SparseGPT()],
        "pattern": ["4:8", SparsityPattern(sparsity=0.7)],
        "exclude_modules": [("down",)],
        "compute_dtype": ["bfloat16"],
        "seed": [3],
    },
    SparsityPattern: PATTERN,
    RegionalOptimisation: {
        "rounds": [0, 30],
        "samples_per_round": [1, 128],
        "learning_rate": [1e-4],
    },
    RGS: {"alpha": [0.0, "auto"]},
    RO: {"optimisation": [RegionalOptimisation(rounds=1)]},
    TunedRO: {"rounds": [1, 12]},
    WandaPP: {"alpha": [0.0, "auto"], "optimisation": [RegionalOptimisation(rounds=1)]},
    LoadingOptions: {
        "dtype": ["bfloat16", "float16"],
        "attn_implementation": ["eager"],
        "trust_remote_code": [True],
        "pad_token": ["<pad>"],
        "num_classes": [7],
        "stream_weights": [True],
        "shard_on_load": [True],
    },
    TensorTrainAdapters: {
        "rank": [1, 20],
        "bottleneck": [1, 512],
        "sites": [["mlp"]],
        "layers": ["last:1"],
        "identity_start": [False],
    },
    LoRAAdapters: {"rank": [1, 64], "alpha": [1], "target_modules": [["q_proj"]], "layers": ["last:1"]},
    PeftLoRA: {"rank": [1, 64], "alpha": [1], "dropout": [0.5], "target_modules": [["q_proj"]]},
    Weights: {"parts": ["biases", "biases_and_head"]},
    TwoSided: {"epsilon": [1e-4, 0.5]} | SLOPES,
    OneSided: {"epsilon": [1e-4, 0.5]} | SLOPES,
    ForwardMode: SLOPES,
    TrainedHead: {"num_answers": [2, 9], "gradient": ["exact"], "learning_rate": [0.1]},
    ConstantSchedule: {"num_queries": [2, 64]},
    AdaZetaSchedule: {"alpha": [0.1, 40.0], "beta": [0.0, 2.0], "max_queries": [1, 64]},
    VarianceSchedule: {"min_queries": [1, 64], "max_queries": [1, 64], "window": [1]},
    SGDUpdate: {"weight_decay": [0.1]},
    RAdaZOUpdate: {"beta1": [0.0], "beta2": [0.999], "eps": [1e-4], "weight_decay": [0.1]},
    SourceOptions: {
        "text_column": ["review"],
        "label_column": ["stars"],
        "label_names": [["poor", "fair", "good"]],
        "dataset_config": ["english"],
        "max_documents": [10],
        "split_fractions": [(0.5, 0.25, 0.25)],
    },
}


def given_alone(values):
    return [
        pytest.param(kind, name, value, id=f"{kind.__name__}-{name}-{value}"[:60])
        for kind, arguments in values.items()
        for name, choices in arguments.items()
        for value in choices
    ]


@pytest.mark.parametrize(("kind", "name", "value"), given_alone(VALUES))
def test_an_argument_may_be_given_alone(kind, name, value):
    kind(**{name: value})


@pytest.mark.parametrize("kind", VALUES, ids=lambda kind: kind.__name__)
def test_no_argument_is_left_out_of_the_table(kind):
    assert set(inspect.signature(kind).parameters) == VALUES[kind].keys()


def test_what_the_defaults_become():
    assert SparsityPattern().label == "2:4"
    assert SparsityPattern(sparsity=0.7).label == "70%"
    assert SparsityPattern("unstructured").label == SparsityPattern(sparsity_slope=0.2).label == "50%"
    assert SparsityPattern(sparsity_slope=0.2).of_block(0, 2).label == "40%"
    with pytest.raises(ValueError, match="`sparsity` to be left out"):
        SparsityPattern("2:4", sparsity=0.7)
    for options, expected in (
        ({}, (4, 16)),
        ({"min_queries": 2}, (2, 16)),
        ({"min_queries": 20}, (20, 20)),
        ({"max_queries": 2}, (2, 2)),
    ):
        schedule = VarianceSchedule(**options)
        assert (schedule.min_queries, schedule.max_queries) == expected


# -- modules ----------------------------------------------------------------------------------------------------------

FIRST = {
    "loading": [LoadingOptions(dtype="bfloat16"), LoadingOptions(pad_token="!")],
    "trainable": [TensorTrainAdapters(), Weights()],
    "learning_rate": [0.1],
    "lr_scheduler": [partial(LinearLR, total_iters=3)],
    "seed": [3],
}
# stands for the directory of the model
ITSELF = "the model"
MODULES = {
    LanguageModel: {"loading": [*FIRST["loading"], LoadingOptions(stream_weights=True)]},
    FirstOrderModule: FIRST | {"weight_decay": [0.1], "teacher": [ITSELF]},
    ZerothOrderModule: FIRST
    | {
        "trainable": [LoRAAdapters(), Weights()],
        "head": [TrainedHead(num_answers=2), TrainedHead(num_answers=2, gradient="exact")],
        "objective": [MulticlassAccuracy(num_classes=2)],
        "estimator": [OneSided(), ForwardMode(), TwoSided(aggregation="fzoo"), TwoSided(aggregation="align")],
        "schedule": [AdaZetaSchedule(), VarianceSchedule(), ConstantSchedule(1)],
        "update": [RAdaZOUpdate(), SGDUpdate(weight_decay=0.1)],
        "query_chunk_size": [1, 100],
        "prefix_cache_gib": [0.0],
        "parallel": ["data"],
        "max_forwards": [1000],
    },
}


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    return str(save_tiny_lm(tmp_path_factory.mktemp("tiny") / "model"))


@pytest.mark.parametrize(("kind", "name", "value"), given_alone(MODULES))
def test_an_argument_of_a_module_may_be_given_alone(model_dir, kind, name, value):
    assert set(inspect.signature(kind).parameters) == {"model_name_or_path"} | MODULES[kind].keys()
    kind(model_dir, **{name: model_dir if value is ITSELF else value})


def test_the_estimator_fits_the_head_and_the_objective_by_default(model_dir):
    assert type(ZerothOrderModule(model_dir).estimator) is TwoSided
    assert ZerothOrderModule(model_dir).estimator.epsilon is None
    exact = TrainedHead(num_answers=2, gradient="exact")
    assert type(ZerothOrderModule(model_dir, head=exact).estimator) is OneSided
    assert ZerothOrderModule(model_dir, objective=MulticlassAccuracy(num_classes=2)).estimator.epsilon == 0.1


# -- data modules -----------------------------------------------------------------------------------------------------

CLASSES = {
    "tokenizer": [byte_tokenizer()],
    "batch_size": [1, 64],
    "eval_batch_size": [1],
    "num_train": [None, 30],
    "num_val": [None, 6],
    "num_test": [None, 6],
    "max_length": [64],
    "truncate": [True],
    "padding": ["batch"],
    "calibration": [TextDataModule()],
    "seed": [3],
}
DATA = {
    TextDataModule: {
        "tokenizer": [byte_tokenizer()],
        "sequence_length": [4, 64],
        "batch_size": [1],
        "eval_windows": [1],
        "num_calibration_samples": [1],
        "calibration_batch_size": [4],
        "add_bos": [False],
        "reading": [SourceOptions(max_documents=500), SourceOptions(split_fractions=(0.5, 0.25, 0.25))],
        "seed": [3],
    },
    ClassificationDataModule: CLASSES
    | {"num_classes": [2, 3, 7], "reading": [SourceOptions(label_names=["0", "1", "2"], label_column="name")]},
    PromptedClassificationDataModule: CLASSES
    | {
        "template": ["{text}, so"],
        "options": [[" no", " yes"], [" a", " b", " c"]],
        "reading": [SourceOptions(split_fractions=(0.5, 0.25, 0.25))],
    },
}


@pytest.mark.parametrize(("kind", "name", "value"), given_alone(DATA))
def test_an_argument_of_a_data_module_may_be_given_alone(tmp_path, kind, name, value):
    num_classes = len(value) if name == "options" else value if name == "num_classes" else 3 if name == "reading" else 2
    # fewer examples than the default sizes
    rows = [{"text": f"{i} {'x' * (i % 9)}", "label": i % num_classes, "name": str(i % 3)} for i in range(400)]
    if kind is PromptedClassificationDataModule and name == "reading":
        rows = [row | {"label": index % 2} for index, row in enumerate(rows)]
    source = tmp_path / "rows.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    known = set(inspect.signature(kind).parameters) | set(inspect.signature(ClassificationDataModule).parameters)
    if kind is not PromptedClassificationDataModule:
        known = set(inspect.signature(kind).parameters)
    else:
        known -= {"kwargs", "num_classes"}
    assert known == {"source"} | DATA[kind].keys()
    if name == "calibration":
        value.source = str(source)
    small = {"sequence_length": 64} if kind is TextDataModule else {}
    data = kind(str(source), **{"tokenizer": byte_tokenizer()} | small | {name: value})
    data.prepare_data()
    data.setup("fit")
    for loader in (data.val_dataloader(), data.test_dataloader()):
        assert isinstance(next(iter(loader))["input_ids"], torch.Tensor)
