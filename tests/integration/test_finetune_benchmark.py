"""Run the fine-tuning benchmark on tiny models: which runs it makes, and which it does not repeat."""

import json
import shutil
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import pytest
import yaml
from helpers.causal_lms import save_tiny_lm
from helpers.encoders import save_tiny_encoder

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
ZEROTH = {
    "class_path": "wandazeta.modules.ZerothOrderModule",
    "init_args": {
        "schedule": {"class_path": "wandazeta.zeroth_order.ConstantSchedule", "init_args": {"num_queries": 2}},
        "trainable": {
            "class_path": "wandazeta.adapters.TensorTrainAdapters",
            "init_args": {"rank": 2, "bottleneck": 8},
        },
    },
}
LORA = {
    "class_path": "wandazeta.modules.FirstOrderModule",
    "init_args": {"trainable": {"class_path": "wandazeta.adapters.PeftLoRA", "init_args": {"rank": 2}}},
    "forwards_per_step": 3,
}


@pytest.fixture
def config(tmp_path):
    rows = [{"id": str(i), "text": f"{'good' if i % 2 else 'bad'} {i}", "label": i % 2} for i in range(200)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = {"source": str(tmp_path / "rows.jsonl"), "template": "{text} It is", "options": [" a", " b"]}
    data = {"batch_size": 4, "eval_batch_size": 8, "num_train": 20, "num_val": 8, "num_test": 8}
    return {
        "data": data | {"truncate": True, "max_length": 24},
        "tasks": {"words": task},
        "models": {
            "encoder": {"path": str(save_tiny_encoder(tmp_path / "encoder")), "head": True},
            "decoder": {"path": str(save_tiny_lm(tmp_path / "decoder", max_position_embeddings=512)), "head": False},
        },
        "grid": {"learning_rate": [1e-3, 1e-2], "epsilon": [1e-3]},
        "methods": {
            "tfidf": {},
            "linear_probe": {},
            "zero_shot": {"only": "prompts"},
            "in_context": {"only": "prompts", "shots": 1},
            "adazeta": ZEROTH,
            "lora": LORA,
        },
    }


@pytest.fixture
def benchmark(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    import finetune
    import render

    # the settings as a process would get them, without starting one
    monkeypatch.setattr(finetune, "in_a_process", lambda run: json.loads(json.dumps(finetune.measure_run(run))))
    return Namespace(finetune=finetune, render=render)


def arguments_of(tmp_path, config, *more):
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    files = ["--config", tmp_path / "config.yaml", "--result", tmp_path / "result.json"]
    budgets = ["--forwards", "14", "--grid-forwards", "6", "--points", "2", "--seeds", "0", "1"]
    return [str(argument) for argument in (*files, *budgets, *more)]


def test_every_method_is_measured_once(tmp_path, config, benchmark, capsys):
    pytest.importorskip("peft")
    pytest.importorskip("sklearn")

    def run():
        benchmark.finetune.main(arguments_of(tmp_path, config))
        return json.loads((tmp_path / "result.json").read_text())["records"]

    records = run()
    final = [r for r in records if r["phase"] == "final"]
    found = sorted((r["model"], r["pattern"], r["method"], r["seed"]) for r in final)
    trained = [("encoder", "dense", m, s) for m in ("adazeta", "linear_probe", "lora") for s in (0, 1)]
    methods = ("adazeta", "in_context", "linear_probe", "lora", "zero_shot")
    prompted = [("decoder", "dense", m, s) for m in methods for s in (0, 1)]
    assert found == sorted([*trained, *prompted, ("none", "none", "tfidf", 0), ("none", "none", "tfidf", 1)])
    for record in final:
        assert {"task", "forwards", "accuracy", "curve", "seconds", "commit", "options"} <= record.keys()
        assert 0 <= record["accuracy"] <= 1
        # four forwards a step of two queries, three of back-propagation; one more step would exceed the 14
        spent = {"adazeta": [8, 12], "lora": [9, 12]}.get(record["method"], [])
        assert [forwards for forwards, _ in record["curve"]] == spent
        probed = 5 if record["method"] == "linear_probe" else 0
        assert record["forwards"] == (spent[-1] if spent else probed)
    # words tell these classes apart
    assert all(r["accuracy"] == 1 for r in final if r["method"] == "tfidf")

    grid = [r for r in records if r["phase"] == "grid"]
    assert len(grid) == 2 * 2 * 2
    for record in final:
        tried = [r for r in grid if (r["model"], r["method"]) == (record["model"], record["method"])]
        if tried:
            best = max(r["accuracy"] for r in tried)
            assert record["learning_rate"] == next(r["learning_rate"] for r in tried if r["accuracy"] == best)

    # what is finished stays as it is; another setting of one method makes that method anew
    assert "encoder dense lora 1 final" in capsys.readouterr().err
    assert run() == records
    assert capsys.readouterr().err == ""
    config["methods"]["zero_shot"] |= {"init_args": {"loading": {"dtype": "bfloat16"}}}
    more = run()
    kept = [r for r in records if r["method"] != "zero_shot"]
    assert more[: len(kept)] == kept
    assert [(r["method"], r["seed"]) for r in more[len(kept) :]] == [("zero_shot", 0), ("zero_shot", 1)]


def test_a_run_of_its_own(tmp_path, config):
    command = [sys.executable, BENCHMARKS / "finetune.py", *arguments_of(tmp_path, config, "--methods", "zero_shot")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    assert len(json.loads((tmp_path / "result.json").read_text())["records"]) == 2


def test_shots_come_before_the_prompt(tmp_path, config, benchmark):
    task = config["data"] | config["tasks"]["words"]
    run = {"path": config["models"]["decoder"]["path"], "head": False, "data": task, "seed": 0}
    plain = benchmark.finetune.data_of(run | {"method": {}})
    shown = benchmark.finetune.data_of(run | {"method": {"shots": 2}})
    decode = plain.tokenizer.decode
    train = [decode(e.input_ids) + task["options"][e.label] for e in plain.examples("train")]
    for one, other in zip(plain.examples("test"), shown.examples("test"), strict=True):
        *before, prompt = decode(other.input_ids).split("\n\n")
        assert prompt == decode(one.input_ids)
        assert [text[-1] for text in before] == ["a", "b", "a", "b"]
        assert set(before) <= set(train)


def test_a_pattern_is_pruned_once(tmp_path, benchmark, monkeypatch):
    monkeypatch.setattr(benchmark.finetune, "FOLDER", benchmark.finetune.ROOT / "runs" / tmp_path.name)
    commands = []

    def prune(command, **_):
        commands.append(command)
        target = Path(command[-1])
        target.mkdir(parents=True)
        (target / "prune_report.json").write_text("{}")

    monkeypatch.setattr("subprocess.run", prune)
    try:
        paths = [benchmark.finetune.pruned("models/tiny", True, "50%") for _ in range(2)]
        assert paths == [f"runs/{tmp_path.name}/tiny-50pc"] * 2
        assert benchmark.finetune.pruned("models/tiny", True, "dense") == "models/tiny"
        (command,) = commands
        written = yaml.safe_load(Path(command[command.index("-c") + 1]).read_text())
        options = written["trainer"]["callbacks"][0]["init_args"]
        chosen = ("sparsity_pattern", "sparsity", "sparsity_slope", "num_calibration_samples")
        assert options["method"]["class_path"] == "wandazeta.pruning.TunedRO"
        assert [options[name] for name in chosen] == ["unstructured", 0.5, 0.2, 64]
        assert written["model"]["init_args"] == {"model_name_or_path": "models/tiny", "loading": {"num_classes": 2}}
    finally:
        shutil.rmtree(benchmark.finetune.FOLDER)


def test_unknown_names_are_one_line(tmp_path, config, benchmark):
    with pytest.raises(SystemExit, match=r"Expected `--methods` out of .*tfidf, zero_shot, but got nothing"):
        benchmark.finetune.main(arguments_of(tmp_path, config, "--methods", "nothing"))


def test_the_table_and_the_curves(tmp_path, benchmark):
    pytest.importorskip("matplotlib")
    render = benchmark.render
    options = {"data": {"options": [" a", " b"]}}
    same = {"task": "topics", "pattern": "dense", "phase": "final", **options}
    curve = {"forwards": 12, "curve": [[6, 0.5], [12, 0.75]]}
    records = [
        {**same, "model": "none", "pattern": "none", "method": "tfidf", "seed": 0, "accuracy": 0.9, "forwards": 0},
        {**same, **curve, "model": "minilm-l6", "method": "adazeta", "seed": 0, "accuracy": 0.7},
        {**same, **curve, "model": "minilm-l6", "method": "adazeta", "seed": 1, "accuracy": 0.8},
        {**same, **curve, "model": "minilm-l6", "method": "adazeta", "seed": 0, "accuracy": 0.1, "phase": "grid"},
    ]
    records[0]["curve"] = []
    assert render.finetune_table({"records": records}).splitlines() == [
        "### minilm-l6, dense",
        "",
        "|  | topics | forwards | seeds |",
        "| --- | ---: | ---: | ---: |",
        "| `adazeta` | 0.750 (0.700 to 0.800) | 12 | 2 |",
        "| `tfidf` | 0.900 | 0 | 1 |",
    ]
    render.finetune_curves({"records": records}, tmp_path / "curves.svg")
    assert (tmp_path / "curves.svg").read_text().count("AdaZeta") > 0


def test_the_committed_methods_can_be_built(benchmark):
    config = yaml.safe_load((BENCHMARKS / "finetune.yaml").read_text())
    for name, method in config["methods"].items():
        if "class_path" in method:
            options = method["init_args"] | {"model_name_or_path": "a", "learning_rate": 1e-3}
            parsed = benchmark.finetune.module_parser().parse_object(
                {"module": {"class_path": method["class_path"], "init_args": options}}
            )
            assert parsed.module.class_path == method["class_path"], name
    for task in config["tasks"].values():
        sizes = config["data"] | task
        assert all(sizes[f"num_{split}"] % len(task["options"]) == 0 for split in ("train", "val", "test"))
        assert "{text}" in task["template"]


def test_a_rate_that_is_too_large_is_a_result_and_no_end(tmp_path, config, benchmark):
    config["grid"] = {"learning_rate": [1e-3, 1e30], "epsilon": [1e-3]}
    arguments = arguments_of(tmp_path, config, "--methods", "adazeta", "--models", "encoder")
    arguments[arguments.index("6")] = "200"
    benchmark.finetune.main(arguments)
    records = json.loads((tmp_path / "result.json").read_text())["records"]
    assert [r["diverged"] for r in records if r["phase"] == "grid"] == [False, True]
    assert {r["learning_rate"] for r in records if r["phase"] == "final"} == {1e-3}


def test_a_rate_that_falls_is_zero_after_the_budgets_last_step(tmp_path, config, benchmark, monkeypatch):
    pytest.importorskip("peft")
    rates, original = [], benchmark.finetune.Curve.on_train_batch_end

    def noted(curve, trainer, module, *more):
        original(curve, trainer, module, *more)
        rates.append(trainer.optimizers[0].param_groups[0]["lr"] / module.learning_rate)

    monkeypatch.setattr(benchmark.finetune.Curve, "on_train_batch_end", noted)
    for name, steps in (("adazeta", 3), ("lora", 4)):
        config["methods"][name] = config["methods"][name] | {"decay": True}
        more = ("--methods", name, "--models", "decoder", "--seeds", "0")
        benchmark.finetune.main(arguments_of(tmp_path, config, *more))
        # the run of the whole budget is the last
        assert rates[-steps:] == pytest.approx([1 - (step + 1) / steps for step in range(steps)])


def test_what_is_in_closed_form_is_a_new_head_or_the_prompts_answers(tmp_path, config, benchmark, monkeypatch):
    trained, original = [], benchmark.finetune.module_of

    def noted(run, data):
        module = original(run, data)
        trained.append((run["head"], module.head.num_answers, module.head.gradient))
        return module

    monkeypatch.setattr(benchmark.finetune, "module_of", noted)
    config["methods"]["adazeta"]["init_args"] |= {"estimator": {"class_path": "wandazeta.zeroth_order.OneSided"}}
    config["methods"]["adazeta"]["with_head"] = {"head": {"gradient": "exact"}}
    benchmark.finetune.main(arguments_of(tmp_path, config, "--methods", "adazeta"))
    records = json.loads((tmp_path / "result.json").read_text())["records"]
    assert {r["model"] for r in records if r["phase"] == "final"} == {"encoder", "decoder"}
    assert set(trained) == {(True, None, "exact"), (False, 2, "exact")}
