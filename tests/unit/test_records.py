"""Translation of settings to the spelling of records made before the restructuring."""

import json
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]


@pytest.fixture
def records(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import records

    return records


@pytest.mark.parametrize(
    ("settings", "old"),
    [
        (
            {"update": {"class_path": "wandazeta.zeroth_order.RAdaZOUpdate"}},
            {"update": {"class_path": "wandazeta.modules.zo.RAdaZOUpdate"}},
        ),
        (
            {"trainable": {"class_path": "wandazeta.adapters.LoRAAdapters", "init_args": {"rank": 5}}},
            {"trainable": {"class_path": "wandazeta.modules.adapters.LoRAAdapters", "init_args": {"rank": 5}}},
        ),
        (
            {"estimator": {"class_path": "wandazeta.zeroth_order.OneSided", "init_args": {"directions": "rademacher"}}},
            {"estimator": "one_sided", "directions": "rademacher"},
        ),
        (
            {"with_head": {"head": {"num_answers": 5, "gradient": "exact", "learning_rate": 1e-3}}},
            {"with_head": {"num_answers": 5, "head_gradient": "exact", "head_learning_rate": 1e-3}},
        ),
        ({"data": {"reading": {"split_fractions": [0.5]}}}, {"data": {"split_fractions": [0.5]}}),
        ({"loading": {"dtype": "bfloat16", "num_classes": 2}}, {"dtype": "bfloat16", "num_classes": 2}),
        (
            {
                "class_path": "wandazeta.modules.FirstOrderModule",
                "init_args": {
                    "trainable": {"class_path": "wandazeta.adapters.PeftLoRA", "init_args": {"rank": 8, "alpha": 16}},
                    "learning_rate": 1e-3,
                },
            },
            {
                "class_path": "wandazeta.modules.FirstOrderModule",
                "init_args": {"train": "lora", "lora_rank": 8, "lora_alpha": 16, "learning_rate": 1e-3},
            },
        ),
        (
            {
                "class_path": "wandazeta.modules.FirstOrderModule",
                "init_args": {"trainable": {"class_path": "wandazeta.adapters.Weights"}},
            },
            {"class_path": "wandazeta.modules.FirstOrderModule", "init_args": {"train": "full"}},
        ),
        (
            {
                "sparsity_pattern": "2:4",
                "method": {
                    "class_path": "wandazeta.pruning.WandaPP",
                    "init_args": {"alpha": "auto", "optimisation": {"rounds": 12, "learning_rate": 1e-4}},
                },
            },
            {"sparsity_pattern": "2:4", "method": "wanda++", "alpha": "auto", "rounds": 12, "learning_rate": 1e-4},
        ),
        ({"method": "wanda", "seed": 0}, {"method": "wanda", "seed": 0}),
    ],
    ids=lambda value: next(iter(value)),
)
def test_old_spelling(records, settings, old):
    assert records.old_spelling(settings) == old


def test_old_records_count_for_todays_settings_and_no_others_do(records):
    settings = {"options": {"estimator": {"class_path": "wandazeta.zeroth_order.OneSided"}}, "seed": 0}
    old = {"options": {"estimator": "one_sided"}, "seed": 0, "accuracy": 0.5}
    assert records.is_finished(settings, [old])
    assert records.is_finished(settings, [settings | {"accuracy": 0.5}])
    assert not records.is_finished(settings, [old | {"seed": 1}, old | {"options": {"estimator": "two_sided"}}])


def test_finished_runs_of_the_finetuning_are_not_run_again(records):
    """Every method that is in the records with today's settings is found there."""
    config = yaml.safe_load((ROOT / "benchmarks" / "finetune.yaml").read_text())
    content = json.loads((ROOT / "benchmarks" / "results" / "finetune.json").read_text())
    for name in {record["method"] for record in content["records"]}:
        method = config["methods"][name] or {}
        assert records.is_finished({"method": name, "options": method}, content["records"]), name
    for name in {record["task"] for record in content["records"]}:
        data = config["data"] | config["tasks"][name]
        assert records.is_finished({"task": name, "data": data}, content["records"]), name


def test_presets_and_arguments_of_the_callback_are_inverse(records):
    for name in ("best", "paper"):
        settings = records.prune_settings(name)
        flat = records.old_spelling(records.callback_arguments(settings))
        assert flat.items() >= settings.items()


def test_options_that_a_method_does_not_have_are_left_out(records):
    settings = records.prune_settings("best") | {"method": "wanda"}
    assert records.used_options(settings).to_dict().keys().isdisjoint({"alpha", "rounds"})


def test_records_with_options_that_were_removed_can_be_read(records):
    """Their other options are those of today, and a variant of the ablation that has a record is not measured again."""
    content = json.loads((ROOT / "benchmarks" / "results" / "ablation.json").read_text())
    found = [record["options"] for record in content["records"] if "mask_mode" in record["options"]]
    assert found
    for options in found:
        used = records.used_options(options).to_dict()
        assert "mask_mode" not in used
        assert {name: options[name] for name in used.keys() & options.keys()}.items() <= used.items()


def test_finished_variants_of_the_ablation_are_not_measured_again(records, monkeypatch):
    import ablation

    measured = []
    monkeypatch.setattr(ablation, "measure_variant", lambda options, arguments: measured.append(options))
    monkeypatch.setattr("sys.argv", ["ablation.py", "wanda", "sparsegpt", "rgs alpha 5", "rgs alpha 20"])
    ablation.main()
    assert measured == []
