"""Settings of small prunings and trainings whose results are compared with recorded checksums.

`kind` names the function of `same_bits.py` that runs the case; that function's docstring describes the other settings.
An object is written as its class and its arguments, `["TwoSided", {"epsilon": 0.1}]`.
"""

from typing import Any

Settings = dict[str, Any]
Component = list[Any]


def optimisation(**changes: Any) -> Component:
    """Options of a short regional optimisation."""
    return ["RegionalOptimisation", {"rounds": 2, "samples_per_round": 4, "learning_rate": 1e-3} | changes]


def wandapp(alpha: float | str = 100.0, **changes: Any) -> Component:
    """Wanda++ with a short optimisation."""
    return ["WandaPP", {"alpha": alpha, "optimisation": optimisation(**changes)}]


def paper(**changes: Any) -> Component:
    """Wanda++ with the options of wandazeta/presets/paper.yaml, except for the number of samples."""
    options = {"rounds": 5, "samples_per_round": 8, "learning_rate": 3e-7}
    return wandapp(100.0, **(options | changes))


def prune(method: str | Component, pattern: str = "2:4", model: str = "llama", **settings: Any) -> Settings:
    """A pruning without Lightning."""
    chosen = METHODS[method] if isinstance(method, str) else method
    options = {"method": chosen, "pattern": PATTERNS[pattern]} | settings.pop("options", {})
    return {"kind": "prune", "model": model, "options": options} | settings


def zeroth(settings: Settings | None = None, **options: Any) -> Settings:
    """A training with forward passes alone."""
    return {"kind": "zeroth_order", "options": options} | (settings or {})


def first(settings: Settings | None = None, **options: Any) -> Settings:
    """A training by back-propagation."""
    return {"kind": "first_order", "options": options} | (settings or {})


PATTERNS: dict[str, Component] = {
    "2:4": ["SparsityPattern", {"sparsity_pattern": "2:4"}],
    "4:8": ["SparsityPattern", {"sparsity_pattern": "4:8"}],
    "half": ["SparsityPattern", {"sparsity_pattern": "unstructured", "sparsity": 0.5}],
    "slope": ["SparsityPattern", {"sparsity_pattern": "unstructured", "sparsity": 0.5, "sparsity_slope": 0.3}],
}
METHODS: dict[str, Component] = {
    "magnitude": ["Magnitude", {}],
    "wanda": ["Wanda", {}],
    "rgs": ["RGS", {}],
    "ro": ["RO", {"optimisation": optimisation()}],
    "wanda++": wandapp(),
    "sparsegpt": ["SparseGPT", {}],
}
IN_BFLOAT16 = {"compute_dtype": "bfloat16"}

TENSOR_TRAINS = ["TensorTrainAdapters", {"rank": 2, "bottleneck": 8, "identity_start": False}]
LAST = ["TensorTrainAdapters", {"rank": 2, "bottleneck": 8, "identity_start": False, "layers": "last:1"}]
SITES = [
    "TensorTrainAdapters",
    {"rank": 3, "bottleneck": 16, "sites": ["before:mlp.up_proj", "after:self_attn.o_proj"]},
]
LORA = ["LoRAAdapters", {"rank": 2}]
PEFT_LORA = ["PeftLoRA", {"rank": 2}]
WEIGHTS = ["Weights", {}]
ESTIMATORS = {"two_sided": "TwoSided", "one_sided": "OneSided", "forward_mode": "ForwardMode"}
MOMENTS = ["RAdaZOUpdate", {}]
SIGNS = {"directions": "rademacher"}
# the options of configs/finetune/best.yaml, except for the model's size and the budget
BEST_ZEROTH = {
    "head": ["TrainedHead", {"num_answers": 2, "gradient": "exact", "learning_rate": 1e-2}],
    "estimator": ["OneSided", SIGNS],
    "update": MOMENTS,
    "schedule": ["ConstantSchedule", {"num_queries": 1}],
    "learning_rate": 1e-3,
    "lr_scheduler": ["PolynomialLR", {"total_iters": 6}],
    "max_forwards": 12,
}
CLASSES = {"loading": ["LoadingOptions", {"num_classes": 3}]}
# the options of configs/finetune/encoder.yaml
BEST_ENCODER = CLASSES | {
    "head": ["TrainedHead", {"gradient": "exact"}],
    "estimator": ["OneSided", SIGNS | {"aggregation": "fzoo"}],
    "update": MOMENTS,
}
ENCODER = {"model": "bert", "batch": "labels"}
PRUNED = {"prune": {"method": wandapp(), "num_calibration_samples": 8}}
HELD = {"keep_sparsity": True} | PRUNED

_PRUNE = {
    **{f"magnitude {pattern}": prune("magnitude", pattern) for pattern in PATTERNS},
    **{f"wanda {pattern}": prune("wanda", pattern) for pattern in PATTERNS},
    **{f"wanda++ {pattern}": prune("wanda++", pattern) for pattern in PATTERNS},
    # wider than a group of columns that SparseGPT prunes before it adjusts the others
    **{f"sparsegpt {pattern}": prune("sparsegpt", pattern, "wide llama") for pattern in PATTERNS},
    **{f"{method} {pattern}": prune(method, pattern) for method in ("rgs", "ro") for pattern in ("2:4", "slope")},
    "paper": prune(paper()),
    "paper with a large rate": prune(paper(learning_rate=1e-3)),
    "alpha auto": prune(wandapp("auto")),
    "no rounds": prune(wandapp(rounds=0)),
    "seed 5": prune("wanda++", options={"seed": 5}),
    "one row at a time": prune("wanda++", rows=1),
    **{f"{m}, products in bfloat16": prune(m, options=IN_BFLOAT16) for m in ("wanda++", "sparsegpt")},
    **{f"{m}, bfloat16 weights": prune(m, dtype="bfloat16") for m in ("wanda", "wanda++", "sparsegpt")},
    **{f"{m}, padded": prune(m, padded=True) for m in ("wanda", "rgs", "wanda++", "sparsegpt")},
    "excluded modules": prune("wanda++", options={"exclude_modules": ["q_proj", "layers.1"]}),
    **{f"{m}, bert": prune(m, model="bert", padded=True) for m in ("wanda++", "sparsegpt")},
    **{f"{m}, gpt2": prune(m, model="gpt2") for m in ("magnitude", "wanda++", "sparsegpt")},
}
_CALLBACK = {
    "any module": {"kind": "prune_module", "options": {"method": wandapp()}},
}
_ZEROTH = {
    **{
        f"{name}, {estimator}": zeroth(trainable=trainable, estimator=[ESTIMATORS[estimator], {}])
        for name, trainable in (("tensor trains", TENSOR_TRAINS), ("lora", LORA))
        for estimator in ("two_sided", "one_sided", "forward_mode")
    },
    **{
        f"weights, {estimator}": zeroth(trainable=WEIGHTS, estimator=[ESTIMATORS[estimator], {}], learning_rate=1e-4)
        for estimator in ("two_sided", "one_sided")
    },
    "weights, fzoo, decay": zeroth(
        trainable=WEIGHTS,
        estimator=["TwoSided", {"aggregation": "fzoo"}],
        update=["SGDUpdate", {"weight_decay": 0.1}],
        learning_rate=1e-4,
    ),
    "weights, biases and head": zeroth({"model": "gpt2"}, trainable=["Weights", {"parts": "biases_and_head"}]),
    "rademacher": zeroth(estimator=["TwoSided", SIGNS]),
    "align": zeroth(estimator=["TwoSided", {"aggregation": "align"}]),
    "align, rademacher, one_sided": zeroth(estimator=["OneSided", SIGNS | {"aggregation": "align"}]),
    "fzoo": zeroth(estimator=["TwoSided", {"aggregation": "fzoo"}]),
    "moments": zeroth(update=["RAdaZOUpdate", {"weight_decay": 0.1}]),
    "lora, fzoo, moments": zeroth(
        trainable=LORA, estimator=["TwoSided", SIGNS | {"aggregation": "fzoo"}], update=MOMENTS
    ),
    "best": zeroth({"steps": 8}, **BEST_ZEROTH),
    "answers, estimated": zeroth({"validate": True}, head=["TrainedHead", {"num_answers": 2, "learning_rate": 1e-2}]),
    "answers, exact, last block": zeroth(
        head=["TrainedHead", {"num_answers": 2, "gradient": "exact"}],
        estimator=["OneSided", {}],
        trainable=LAST,
        query_chunk_size=8,
    ),
    "encoder": zeroth(ENCODER | {"validate": True}, **CLASSES),
    "encoder, best": zeroth(ENCODER, **BEST_ENCODER),
    "encoder, lora": zeroth(ENCODER, **CLASSES, trainable=LORA),
    "encoder, weights": zeroth(ENCODER, **CLASSES, trainable=WEIGHTS, learning_rate=1e-4),
    "more queries by the epoch": zeroth({"steps": 12}, schedule=["AdaZetaSchedule", {"alpha": 1.5, "max_queries": 4}]),
    "more queries by the slopes": zeroth(
        {"steps": 10}, schedule=["VarianceSchedule", {"min_queries": 2, "max_queries": 6, "window": 2}]
    ),
    "without prefix": zeroth(trainable=LAST, prefix_cache_gib=0),
    "with prefix": zeroth({"steps": 7}, trainable=LAST),
    "named sites": zeroth(trainable=SITES, estimator=["OneSided", {}], learning_rate=1e-2),
    "chunks": zeroth(query_chunk_size=4),
    "text": zeroth({"batch": "text", "validate": True}),
    "long options": zeroth({"batch": "long options", "validate": True}),
    "accuracy": zeroth(objective=["MulticlassAccuracy", {"num_classes": 2}], estimator=["TwoSided", {"epsilon": 0.1}]),
    "generated text": zeroth(
        {"steps": 2},
        objective=["GeneratedText", {"max_new_tokens": 2, "metric": ["CharErrorRate", {}]}],
        estimator=["TwoSided", {"epsilon": 0.1}],
    ),
    "bfloat16": zeroth(loading=["LoadingOptions", {"dtype": "bfloat16"}]),
    "gemma2": zeroth({"model": "gemma2"}, seed=3),
    "gpt2, lora": zeroth({"model": "gpt2"}, trainable=["LoRAAdapters", {"rank": 2, "layers": "last:2"}]),
    "pruned": zeroth(PRUNED | {"validate": True}),
    "pruned, weights": zeroth(PRUNED, trainable=WEIGHTS, learning_rate=1e-4),
}
_FIRST = {
    "lora": first({"validate": True}, trainable=PEFT_LORA),
    "lora with dropout": first(
        trainable=["PeftLoRA", {"rank": 2, "dropout": 0.2, "target_modules": ["q_proj", "down_proj"]}]
    ),
    "lora, encoder": first(ENCODER, **CLASSES, trainable=PEFT_LORA),
    "tensor trains": first(trainable=TENSOR_TRAINS),
    "tensor trains, encoder": first(ENCODER, **CLASSES, trainable=TENSOR_TRAINS),
    "full": first(
        trainable=WEIGHTS, weight_decay=0.1, lr_scheduler=["LinearLR", {"end_factor": 0.5, "total_iters": 4}]
    ),
    "full, text": first({"batch": "text", "validate": True}, trainable=WEIGHTS),
    "full, encoder": first(ENCODER | {"validate": True}, **CLASSES, trainable=WEIGHTS),
    "pruned, lora": first(PRUNED, trainable=PEFT_LORA),
    "pruned, held": first(HELD, trainable=WEIGHTS, weight_decay=0.1),
}
_RANKS = {
    **{
        method: {"kind": "prune_module", "options": {"method": METHODS[method]}}
        for method in ("wanda", "wanda++", "sparsegpt")
    },
    "queries": zeroth(),
    "queries, best": zeroth({"steps": 8}, **BEST_ZEROTH),
    "queries, weights": zeroth(trainable=WEIGHTS, learning_rate=1e-4),
    "data": zeroth({"batch_size": 2}, parallel="data"),
    "data, encoder": zeroth(ENCODER | {"batch_size": 2}, parallel="data", **BEST_ENCODER),
    "pruned": zeroth(PRUNED),
}

CASES: dict[str, Settings] = {
    f"{group}: {name}": settings
    for group, cases in (("prune", _PRUNE), ("callback", _CALLBACK), ("zeroth", _ZEROTH), ("first", _FIRST))
    for name, settings in cases.items()
}
RANK_CASES: dict[str, Settings] = {f"two ranks: {name}": settings for name, settings in _RANKS.items()}
