import itertools
import re
import shlex
from pathlib import Path

import pytest
import yaml

from wandazeta import presets
from wandazeta.cli.main import main

ROOT = Path(__file__).parents[2]
CONFIGS = sorted((ROOT / "configs").rglob("*.yaml"))
PRESETS = [presets.path(name) for name in presets.names()]


def launch_lines(path):
    """The commands in a config's opening comment."""
    comment = re.match(r"(#.*\n)+", path.read_text())
    assert comment, f"{path} does not open with a comment"
    return re.findall(r"^#   wandazeta (.*)$", comment.group(), flags=re.MULTILINE)


def is_the_value(parsed, given):
    """Whether an option on a command line has arrived in the configuration."""
    if isinstance(parsed, dict):
        return parsed["class_path"].endswith(given)
    if parsed is None:
        return yaml.safe_load(given) is None
    return float(given) == parsed if isinstance(parsed, float) else yaml.safe_load(str(parsed)) == yaml.safe_load(given)


@pytest.fixture(autouse=True)
def checkout(monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr("sys.argv", ["wandazeta"])


def named(path):
    """What a configuration is called on a command line."""
    return f"preset:{path.stem}" if path in PRESETS else str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", CONFIGS + PRESETS, ids=named)
def test_every_config_opens_with_commands_that_parse(path, capsys):
    lines = launch_lines(path)
    assert len(lines) >= 2, "a launch line and an override"
    for line in lines:
        arguments = shlex.split(line)
        assert named(path) in arguments
        with pytest.raises(SystemExit) as exit_info:
            main([*arguments, "--print_config"])
        captured = capsys.readouterr()
        assert exit_info.value.code == 0, captured.err
        printed = yaml.safe_load(captured.out)
        assert {"model", "data", "trainer"} <= set(printed)
        for key, value in itertools.pairwise(arguments):
            if key.startswith("--") and "callbacks" not in key:
                place = printed
                for part in key[2:].split("."):
                    place = place[part] if part in place else place["init_args"][part]
                assert is_the_value(place, value), key


def merged(capsys, *arguments):
    with pytest.raises(SystemExit, match="0"):
        main([*arguments, "--print_config"])
    return yaml.safe_load(capsys.readouterr().out)


@pytest.mark.parametrize(
    "name", ["finetune/adazeta_paper", "finetune/best", "finetune/encoder", "finetune/mezo", "recovery/lora"]
)
def test_variants_in_a_header_do_not_resume_the_plain_run(name, capsys):
    runs = [merged(capsys, *shlex.split(line)) for line in launch_lines(ROOT / f"configs/{name}.yaml")]
    folders = [run["run_dir"] for run in runs]
    assert len(set(folders)) == len(folders) >= 2


def test_no_config_names_a_logger_or_a_checkpoint():
    for path in CONFIGS:
        settings = yaml.safe_load(path.read_text())
        assert "logger" not in settings.get("trainer", {}), path
        assert "ModelCheckpoint" not in path.read_text(), path
        own_model = "model_name_or_path" in settings.get("model", {}).get("init_args", {})
        assert ("run_dir" in settings) >= own_model, path


def test_every_run_has_a_folder_of_its_own():
    folders = [found for path in CONFIGS if (found := yaml.safe_load(path.read_text()).get("run_dir"))]
    assert len(set(folders)) == len(folders)


def test_the_budget_shares_the_pruning_with_the_demo_and_nothing_else(capsys):
    demo, budget = (
        merged(capsys, "fit", "-c", "configs/demo.yaml", *more) for more in ((), ("-c", "configs/finetune/budget.yaml"))
    )
    assert (demo["run_dir"], budget["run_dir"]) == ("runs/demo", "runs/budget")
    assert budget["prune"]["init_args"] == demo["prune"]["init_args"] | {"output_dir": "runs/demo/pruning"}
    assert budget["trainer"] == demo["trainer"]
    assert budget["data"] == demo["data"]


def test_configs_of_models_do_not_repeat_presets():
    for path in (ROOT / "configs/prune").glob("*.yaml"):
        assert "prune" not in yaml.safe_load(path.read_text()), path


def test_the_papers_settings():
    prune = yaml.safe_load(presets.path("paper").read_text())["prune"]
    method = prune["method"]
    assert method["class_path"] == "wandazeta.pruning.WandaPP"
    assert method["init_args"]["alpha"] == 100
    assert method["init_args"]["optimisation"] == {"rounds": 5, "samples_per_round": 32, "learning_rate": 3e-7}
    assert prune["num_calibration_samples"] == 128
    adazeta = yaml.safe_load((ROOT / "configs/finetune/adazeta_paper.yaml").read_text())
    model = adazeta["model"]["init_args"]
    assert model["learning_rate"] == 1e-4
    assert model["estimator"]["init_args"] == {"epsilon": 1e-3}
    assert model["update"]["init_args"] == {"weight_decay": 0.01}
    assert model["trainable"]["init_args"].items() >= {"rank": 5, "bottleneck": 64, "identity_start": False}.items()
    assert adazeta["data"]["init_args"]["batch_size"] == 16
    assert adazeta["trainer"]["max_steps"] == 10_000


def test_the_schedule_of_the_paper_is_the_released_codes():
    from wandazeta.zeroth_order import AdaZetaSchedule

    adazeta = yaml.safe_load((ROOT / "configs/finetune/adazeta_paper.yaml").read_text())
    ours = AdaZetaSchedule(**adazeta["model"]["init_args"]["schedule"]["init_args"])
    theirs = AdaZetaSchedule.from_target(final_queries=20, num_epochs=160)
    assert [ours.num_queries(epoch) for epoch in range(161)] == [theirs.num_queries(epoch) for epoch in range(161)]


@pytest.mark.parametrize("path", sorted((ROOT / "benchmarks").glob("*.py")), ids=lambda path: path.stem)
def test_benchmarks_read_configs_that_exist(path):
    text = path.read_text().replace('" / "', "/")
    for name in re.findall(r"configs/[\w/]+\.yaml", text):
        assert (ROOT / name).exists(), name
