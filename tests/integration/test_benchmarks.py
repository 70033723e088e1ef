"""Run the benchmarks on tiny models; the measured values are not checked."""

import dataclasses
import json
import os
import statistics
import subprocess
import sys
from argparse import Namespace
from pathlib import Path
from pkgutil import resolve_name

import pytest
import torch
from helpers.architectures import build
from helpers.causal_lms import save_tiny_lm
from helpers.fit_config import write_fit_config, write_inputs
from helpers.prune_config import write_prune_config
from safetensors.torch import load_file, save_file
from torch.utils.flop_counter import FlopCounterMode

import wandazeta
from wandazeta.callbacks import WandaPPPruneCallback
from wandazeta.cli.main import main
from wandazeta.pruning import RegionalOptimisation

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
PHASES = {"rest", "capture", "measure", "optimise", "norms", "prune", "propagate", "total"}


@pytest.fixture
def benchmark(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    import prune_cost
    import prune_gpu
    import records

    return Namespace(prune=prune_cost, prune_gpu=prune_gpu, records=records)


def instantiated(arguments):
    """The arguments of the callback as the command line passes them."""
    method = arguments["method"]
    options = dict(method["init_args"])
    if "optimisation" in options:
        options["optimisation"] = RegionalOptimisation(**options["optimisation"])
    return arguments | {"method": resolve_name(method["class_path"])(**options)}


def test_best_has_a_slope_only_where_the_pattern_is_free_and_counts_by_its_options(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    import prune_quality

    best = prune_quality.options_of("best", "2:4", 1)
    assert (best["sparsity_pattern"], best["seed"]) == ("2:4", 1)
    assert "sparsity_slope" not in best
    free = prune_quality.options_of("best", "60%", 1)
    assert (free["sparsity"], free["sparsity_slope"]) == (0.6, prune_quality.SPARSITY_SLOPE)
    assert prune_quality.options_of("wanda", "60%", 0).keys() == {"method", "sparsity_pattern", "sparsity", "seed"}
    # the published figures are those of the file as it is
    import tables

    records = [r for r in prune_quality.finished(prune_quality.RESULT) if tables.settings_of(r) == "best"]
    assert records
    for record in records:
        wanted = prune_quality.options_of("best", record["pattern"], record["seed"])
        assert record["options"].items() >= wanted.items()
    # what the callback is given is what the record holds
    for method, pattern in (("best", "2:4"), ("best", "60%"), ("paper", "2:4"), ("sparsegpt", "60%")):
        wanted = prune_quality.options_of(method, pattern, 1)
        arguments = prune_quality.callback_arguments(wanted)
        assert WandaPPPruneCallback(**instantiated(arguments)).options.to_dict().items() >= wanted.items()


def test_the_control_of_bfloat16_moves_states_by_no_more_than_rounding_may(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    import prune_quality

    states = torch.rand(100, 64) + 1  # a power of two and what lies above it
    moved = prune_quality.jitter(torch.Generator().manual_seed(0), None, None, states)
    rounding = (states.bfloat16().float() - states).abs()
    assert 0 < (moved / states - 1).abs().max() <= 2**-9
    assert rounding.max() / 2 < (moved - states).abs().max() <= 2 * rounding.max()


def test_the_demo_looks_at_the_checkpoint_that_a_run_goes_on_from(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    import demo

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["wandazeta"])
    config, folder = write_fit_config(tmp_path), tmp_path / "run/checkpoints"
    assert demo.last_checkpoint(folder) is None
    main(["fit", "-c", str(config)])
    assert demo.last_checkpoint(folder) == folder / "last.ckpt"
    # anew, with other settings
    anew = ("--trainer.max_steps", "4", "--ckpt_path", "null")
    main(["fit", "-c", str(config), *anew])
    last = demo.last_checkpoint(folder)
    assert torch.load(last, weights_only=True)["global_step"] == 4
    # going on, it stays the last
    main(["fit", "-c", str(config), "--trainer.max_steps", "8"])
    assert demo.last_checkpoint(folder) == last
    assert torch.load(last, weights_only=True)["global_step"] == 8
    assert torch.load(folder / "last.ckpt", weights_only=True)["global_step"] == 6


def run(script, *arguments, environment=None):
    return subprocess.run(
        [sys.executable, BENCHMARKS / script, *map(str, arguments)],
        env=os.environ | (environment or {}),
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )


def test_prune_gpu_times_all_phases(tmp_path):
    result = tmp_path / "prune_gpu.json"
    arguments = ("--device", "cpu", "--shape", "tiny", "--rounds", 2, "--peak-tflops", 1, "--result", result)
    done = run("prune_gpu.py", *arguments)
    assert done.returncode == 0, done.stderr
    content = json.loads(result.read_text())
    assert "/" not in content["command"].removeprefix("python benchmarks/")
    without_rounds = PHASES - {"optimise", "norms"}
    for method, phases in (
        ("wanda", without_rounds),
        ("wanda++", PHASES),
        ("sparsegpt", without_rounds - {"prune"} | {"solve"}),
    ):
        records = {r["phase"]: r for r in content["records"] if (r["model"], r["method"]) == ("tiny", method)}
        assert records.keys() == phases
        total = records.pop("total")
        assert total["seconds"] == pytest.approx(sum(r["seconds"] for r in records.values()))
        assert all(r["seconds"] > 0 and r["peak_gib"] > 0 for r in records.values())
        assert 0 < total["mfu"] < 1
        assert len(total["block_peaks_gib"]) == 2
        # the result of the last block is on its way after it
        assert max(total["block_peaks_gib"]) == pytest.approx(total["peak_gib"], rel=0.05)


def test_zo_gpu_counts_tokens_and_their_share_of_the_peak(tmp_path):
    result = tmp_path / "zo_gpu.json"
    sizes = ("--batch", 2, "--tokens", 16, "--queries", 1, 3, "--chunk", 2, "--steps", 2)
    done = run("zo_gpu.py", "--device", "cpu", "--shape", "tiny", "--peak-tflops", 1, "--result", result, *sizes)
    assert done.returncode == 0, done.stderr
    records = json.loads(result.read_text())["records"]
    assert [r["num_queries"] for r in records] == [1, 3]
    for record in records:
        assert not record["sparse"]
        assert record["tokens_per_second"] == pytest.approx(
            2 * record["num_queries"] * 2 * 16 / statistics.median(record["seconds"])
        )
        assert 0 < record["peak_share"] < 1
        assert record["peak_gib"] > 0
        pairs = zip(record["seconds"], record["seconds_forwards"], strict=True)
        ratios = sorted(step / forwards for step, forwards in pairs)
        assert record["step_over_forwards"] == pytest.approx(statistics.median(ratios))
        assert record["step_over_forwards_range"] == pytest.approx([ratios[0], ratios[-1]])


def test_the_table_of_zeroth_order_steps_shows_their_ratio_to_forward_passes_when_there_is_one(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    import tables

    result = json.loads((BENCHMARKS / "results" / "zo_gpu.json").read_text())
    for record in result["records"]:
        record |= {"step_over_forwards": 1.0625, "step_over_forwards_range": [1.04, 1.25]}
    heading, _, first = tables.gpu_zo_table(result).splitlines()[:3]
    assert [cell.strip() for cell in heading.split("|")][4] == "step / forwards"
    assert [cell.strip() for cell in first.split("|")][4] == "1.06 (1.04 to 1.25)"
    del result["records"][0]["step_over_forwards_range"]
    assert "forwards" not in tables.gpu_zo_table(result)


def test_two_commits_are_compared_by_processor_time_or_by_their_own_forward_passes(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    from tables import revisions_table

    def record(workload, revision, repeat, **seconds):
        shared = {"model": "tiny", "num_samples": 4, "sequence_length": 8, "threads": 1}
        return shared | {
            "workload": workload,
            "revision": revision,
            "revision_commit": revision[0],
            "repeat": repeat,
            **seconds,
        }

    records = []
    for repeat, (before, after) in enumerate([(2.0, 1.0), (4.0, 3.0), (6.0, 9.0)]):
        # the clock of a pruning is not looked at
        records += [record("wanda", "before", repeat, seconds=90.0, cpu_seconds=before)]
        records += [record("wanda", "after", repeat, seconds=10.0, cpu_seconds=after)]
        records += [record("step", "before", repeat, seconds=before, seconds_forwards=before)]
        records += [record("step", "after", repeat, seconds=after, seconds_forwards=2 * after)]
    shown = revisions_table({"records": records, "hardware": {"cpu": "CPU"}})
    assert "| wanda, seconds | 4.00 (2.00 to 6.00) | 3.00 (1.00 to 9.00) | 0.75 |" in shown
    assert "| step, per bare forward passes | 1.00 (1.00 to 1.00) | 0.50 (0.50 to 0.50) | 0.50 |" in shown
    assert "before, `b`" in shown
    assert "medians of 3 runs" in shown


@pytest.mark.samples
def test_zo_step_measures_all_three_side_by_side(tmp_path):
    model, result = tmp_path / "model", tmp_path / "zo_step.json"
    save_tiny_lm(model)
    sizes = (
        "--batches",
        2,
        "--queries",
        1,
        2,
        "--layers",
        "all",
        "last:1",
        "--max-tokens",
        12,
        "--steps",
        2,
        "--options",
        " ",
        ".",
    )
    arguments = ("--model", model, "--repeats", 2, "--threads", 1, "--result", result, *sizes)
    arguments += ("--options", " ", ".")
    done = run("zo.py", "step", *arguments)
    assert done.returncode == 0, done.stderr
    records = json.loads(result.read_text())["records"]
    assert [(r["layers"], r["num_queries"], r["repeat"]) for r in records] == [
        (layers, queries, repeat) for layers in ("all", "last:1") for queries in (1, 2) for repeat in (0, 1)
    ]
    assert all(r[name] > 0 for r in records for name in ("seconds_step", "seconds_loop", "seconds_forwards"))
    before = result.read_bytes()
    assert run("zo.py", "step", *arguments).returncode == 0
    assert result.read_bytes() == before, "what is finished is not measured again"


@pytest.mark.samples
def test_the_loop_that_steps_are_compared_with_takes_the_same_slopes(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    import zo

    model_dir = tmp_path / "model"
    save_tiny_lm(model_dir)
    batch = zo.prompt_batch(model_dir, 2, 12, [" ", "."])
    loop = zo.Loop(model_dir, "all")
    plain = zo.Forwards(model_dir, batch)
    for adapter in loop.model.modules():
        if isinstance(adapter, zo.LoopedAdapter):
            adapter.up.cores[-1].data.zero_()  # changes nothing now
    scores = plain.scorer.option_scores(plain.prepared)
    loss = zo.option_losses(scores.values, batch["label"])
    with torch.no_grad():
        assert loop._loss(batch) == pytest.approx(float(loss), rel=1e-4)
    before = [parameter.detach().clone() for parameter in loop.trained]
    loop.step(batch, 2)
    assert all((a - b).abs().max() < 1e-3 for a, b in zip(before, loop.trained, strict=True))
    assert any(not torch.equal(a, b) for a, b in zip(before, loop.trained, strict=True))


@pytest.mark.parametrize("arguments", [(), ("--device", "cpu")])
def test_prune_gpu_asks_for_a_gpu_in_one_line(arguments):
    done = run("prune_gpu.py", *arguments, environment={"CUDA_VISIBLE_DEVICES": ""})
    assert done.returncode == 1
    assert done.stderr.startswith("error: Expected a CUDA device")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("method", ["wanda", "rgs", "wanda++"])
def test_the_formula_counts_what_is_multiplied(benchmark, monkeypatch, method):
    # samples that share no batch, and widths beside which the attention is little
    module, length, num_samples = benchmark.prune_gpu, 1100, 10
    shape = dataclasses.replace(module.SHAPES["tiny"], width=128, inner=256)
    monkeypatch.setitem(module.SHAPES, "tiny", shape)
    options = benchmark.records.used_options({"method": method, "rounds": 2, "samples_per_round": 3})
    cpu = torch.device("cpu")
    sizes = {"blocks": shape.blocks, "num_samples": num_samples, "sequence_length": length}
    arguments = Namespace(device=cpu, home=cpu, peak_tflops=None, without_graphs=False, **sizes)
    with FlopCounterMode(display=False) as counter:
        module.measure_method("tiny", options, arguments)
    found = sum(counter.get_flop_counts()["Global"].get(op, 0) for op in (torch.ops.aten.mm, torch.ops.aten.addmm))

    def counted(length):
        return sum(module.flops(shape, options, num_samples, length).values())

    linears = (4 * counted(length) - counted(2 * length)) / 2  # the rest is quadratic in the length
    # capture runs the real model once
    capture = sum(2 * length * rows * columns for rows, columns in shape.linears.values()) * shape.blocks
    assert found == pytest.approx(linears + capture, rel=0.03)


def test_the_worker_prunes_and_saves(tmp_path):
    model, _ = build("llama")
    model.save_pretrained(tmp_path / "model")
    save_file({"input_ids": torch.randint(32, (4, 8))}, tmp_path / "calibration.safetensors")
    task = {
        "tool": "wandazeta",
        "method": "wanda",
        "options": {},
        "sparsity_pattern": "2:4",
        "dtype": "float32",
        "threads": 1,
        "batch_size": 1,
        **{name: str(tmp_path / f"{name}.safetensors") for name in ("calibration", "weights")},
        "model": str(tmp_path / "model"),
        "measured": str(tmp_path / "measured.json"),
    }
    (tmp_path / "task.json").write_text(json.dumps(task))
    done = run("prune_worker.py", tmp_path / "task.json")
    assert done.returncode == 0, done.stderr
    weights = load_file(tmp_path / "weights.safetensors")
    assert len(weights) == 7 * len(model.model.layers)
    assert all(int((w.reshape(-1, 4) != 0).sum(1).max()) == 2 for w in weights.values())
    assert json.loads((tmp_path / "measured.json").read_text())["seconds"] > 0


def test_memory_is_measured_for_all_that_can_be_trained(tmp_path):
    pytest.importorskip("peft")
    result = tmp_path / "zo_memory.json"
    setting = ("--model", save_tiny_lm(tmp_path / "model"), "--batch", 2, "--tokens", 4, "--result", result)
    done = run("zo.py", "memory", *setting)
    assert done.returncode == 0, done.stderr
    content = json.loads(result.read_text())
    assert "/" not in content["command"].removeprefix("python benchmarks/")
    methods = [record["method"] for record in content["records"]]
    assert methods == ["tensor_train", "lora", "mezo", "tensor_train_backprop", "lora_backprop", "full_backprop"]
    assert all(record["peak_gib"] > 0 and record["inference_gib"] > 0 for record in content["records"])
    again = run("zo.py", "memory", *setting)
    assert (again.returncode, again.stdout) == (0, ""), "measured again"


def test_recovery_runs_every_rate_and_shows_the_one_that_validation_chose(tmp_path, monkeypatch):
    pytest.importorskip("peft")
    monkeypatch.syspath_prepend(BENCHMARKS)
    import recovery
    import tables

    write_prune_config(tmp_path)
    (tmp_path / "progress").mkdir()
    monkeypatch.chdir(tmp_path / "progress")
    monkeypatch.setattr("sys.argv", ["wandazeta"])
    main(["prune", "-c", "../config.yaml", "--output_dir", str(tmp_path / "pruned")])
    lines = (json.dumps({"text": f"{index} is not {index + 1}. " * 80}) + "\n" for index in range(60))
    (tmp_path / "text.jsonl").write_text("".join(lines))
    monkeypatch.setattr(recovery, "SOURCE", str(tmp_path / "text.jsonl"))
    monkeypatch.setattr(recovery, "RESULT", tmp_path / "recovery.json")
    setting = ["--models", str(tmp_path / "pruned"), "--steps", "2", "--batch-size", "2", "--eval-windows", "2"]
    monkeypatch.setattr("sys.argv", ["recovery.py", *setting, "--learning-rates", "1e-3", "1e1"])
    recovery.main()
    content = json.loads((tmp_path / "recovery.json").read_text())
    records = content["records"]
    assert [(r["method"], r["learning_rate"]) for r in records] == [
        (method, rate) for method in ("lora", "masked_full") for rate in (1e-3, 10.0)
    ]
    for r in records:
        assert (r["pruned_by"], r["pattern"], r["model"]) == ("wanda++", "2:4", "pruned")
        assert all(r["perplexity_before"][split] > 1 for split in ("val", "test"))
    good = [r for r in records if r["learning_rate"] == 1e-3]
    assert all(r["perplexity_after"]["val"] < r["perplexity_before"]["val"] for r in good)
    rows = tables.recovery_table(content).splitlines()[2:4]
    for row, r in zip(rows, good, strict=True):
        assert f"| {r['perplexity_before']['test']:.1f} | {r['perplexity_after']['test']:.1f} |" in row
        assert "| 0.001 | 2 |" in row

    monkeypatch.setattr(recovery, "recover", None)
    recovery.main()
    monkeypatch.setattr("sys.argv", ["recovery.py", "--models", str(tmp_path)])
    with pytest.raises(SystemExit, match="directories that `wandazeta prune` wrote"):
        recovery.main()


def test_distillation_is_measured_at_several_tokens_of_one_run(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    import recovery
    import tables

    write_inputs(tmp_path)
    text = str(tmp_path / "text.txt")
    texts = [(tmp_path / "text.txt").read_text()]
    options = {"num_samples": 8, "sequence_length": 16, "method": "wanda"}
    wandazeta.prune(str(tmp_path / "model"), None, texts, output_dir=tmp_path / "pruned", **options)
    for name, value in {"SOURCE": text, "DISTIL_RESULT": tmp_path / "distil.json", "RUNS": tmp_path / "runs"}.items():
        monkeypatch.setattr(recovery, name, value)
    monkeypatch.setattr(recovery, "PERPLEXITY_WINDOW", 16)
    setting = ["--models", tmp_path / "pruned", "--methods", "distil", "--tokens", "256", "128", "--text", text]
    setting += ["--distil-length", "16", "--teacher", tmp_path / "model", "--eval-windows", "2"]
    monkeypatch.setattr("sys.argv", ["recovery.py", *map(str, setting)])
    recovery.main()
    content = json.loads((tmp_path / "distil.json").read_text())
    records = content["records"]
    assert [(r["method"], r["tokens"]) for r in records] == [
        ("dense", 0),
        *(("distil", tokens) for tokens in (0, 128, 256)),
    ]
    assert str(tmp_path) not in json.dumps(records)
    assert 0 == records[1]["seconds"] < records[2]["seconds"] < records[3]["seconds"]
    assert len({r["perplexity"]["test"] for r in records}) == 4
    shown = tables.distil_table(content).splitlines()
    assert f"| 256 | {records[3]['perplexity']['val']:.1f} | {records[3]['perplexity']['test']:.1f} |" in shown[4]
    # what is finished is not run again
    monkeypatch.setattr(recovery, "FirstOrderModule", None)
    recovery.main()


def arguments(**changes):
    given = {"methods": ["wanda", "wanda++"], "repeats": 2, "dtypes": ["float32"], "threads": 1, "num_samples": 32}
    return Namespace(**given | {"sequence_length": 256, "eval_windows": 1} | changes)


def test_the_tools_take_turns_and_every_second_round_goes_the_other_way(benchmark):
    versions = {"wandazeta": "1", "llmcompressor": "2"}
    runs = list(benchmark.prune.speed_runs(arguments(), versions))
    order = [(run["method"], run["tool"], run["compute_dtype"], run["batch_size"]) for run in runs]
    kinds = [("wanda", "wandazeta", "model", 8), ("wanda", "wandazeta", "bfloat16", 8)]
    kinds += [("wanda", "llmcompressor", "model", size) for size in (1, 8)]
    kinds += [("wanda++", "wandazeta", "model", 8), ("wanda++", "wandazeta", "bfloat16", 8)]
    assert order == kinds + kinds[::-1]
    assert [run["repeat"] for run in runs] == [0] * 6 + [1] * 6
    assert runs[4]["options"]["samples_per_round"] == 8
    for run in runs:
        own = run["tool"] == "wandazeta"
        assert run["options"].get("compute_dtype") == (run["compute_dtype"] if own else None)


def test_ratios_are_to_the_faster_of_the_other_tool(benchmark):
    wanted = list(benchmark.prune.speed_runs(arguments(), {"wandazeta": "1", "llmcompressor": "2"}))
    seconds = {("wandazeta", 8): 2.0, ("llmcompressor", 1): 8.0, ("llmcompressor", 8): 5.0}

    def seconds_of(run):
        measured = 10.0 if run["method"] == "wanda++" else seconds[run["tool"], run["batch_size"]]
        return (measured + run["repeat"]) / (2 if run["compute_dtype"] == "bfloat16" else 1)

    agreement = {"model": 0.75, "bfloat16": 0.5}
    records = [
        run
        | {"seconds": seconds_of(run), "perplexity": 50.0}
        | ({"mask_agreement": agreement} if run["tool"] == "llmcompressor" else {})
        for run in wanted
    ]
    stale = records[0] | {"version": "0", "seconds": 100.0}
    summary = benchmark.prune.summarise([stale, *records], wanted)
    assert [row["compute_dtype"] for row in summary["compared"]] == ["model", "bfloat16"]
    for compared, speedup in zip(summary["compared"], (1, 2), strict=True):
        assert (compared["method"], compared["dtype"], compared["batch_size"]) == ("wanda", "float32", 8)
        assert compared["times_faster"] == speedup * 5.5 / 2.5
        assert compared["times_faster_at_least"] == speedup * 5.0 / 3.0
        assert (compared["perplexity_ratio"], compared["mask_agreement"]) == (1.0, agreement[compared["compute_dtype"]])
    assert [row["ratio"] for row in summary["wanda++_to_wanda"]] == [10.5 / 2.5] * 2


def test_masks_agree_where_both_or_neither_are_zero(benchmark):
    ours = {"a": torch.tensor([True, True, False, False])}
    assert benchmark.prune.agreement(ours, {"a": torch.tensor([1.0, 0.0, 0.0, 2.0])}) == 0.5


def test_a_command_names_no_path_of_one_machine(benchmark, monkeypatch):
    inside = str(benchmark.records.ROOT / "benchmarks" / "prune_cost.py")
    monkeypatch.setattr(sys, "argv", [inside, "--model=/somewhere/model", "--work", "/else/where", "--repeats", "3"])
    assert benchmark.records.command() == "python benchmarks/prune_cost.py --model=model --work where --repeats 3"
