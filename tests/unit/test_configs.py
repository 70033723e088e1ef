import itertools
import re
import shlex
from pathlib import Path

import pytest
import yaml

from wandazeta.cli.main import main

ROOT = Path(__file__).parents[2]
CONFIGS = sorted((ROOT / "configs").rglob("*.yaml"))


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


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: str(path.relative_to(ROOT / "configs")))
def test_every_config_opens_with_commands_that_parse(path, capsys):
    lines = launch_lines(path)
    assert len(lines) >= 2, "a launch line and an override"
    for line in lines:
        arguments = shlex.split(line)
        assert str(path.relative_to(ROOT)) in arguments
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
                    place = place[part]
                assert is_the_value(place, value), key


def merged(capsys, *arguments):
    with pytest.raises(SystemExit, match="0"):
        main([*arguments, "--print_config"])
    return yaml.safe_load(capsys.readouterr().out)


def callback(settings, name):
    (found,) = (c for c in settings["trainer"]["callbacks"] if c["class_path"].endswith(name))
    return found


@pytest.mark.parametrize(
    "name", ["finetune/adazeta_paper", "finetune/best", "finetune/encoder", "finetune/mezo", "recovery/lora"]
)
def test_variants_in_a_header_do_not_go_on_from_the_plain_runs_checkpoints(name, capsys):
    runs = [merged(capsys, *shlex.split(line)) for line in launch_lines(ROOT / f"configs/{name}.yaml")]
    folders = [callback(run, "ModelCheckpoint")["init_args"]["dirpath"] for run in runs]
    assert len(set(folders)) == len(folders) >= 2


def test_the_budget_shares_the_pruning_with_the_demo_and_nothing_else(capsys):
    demo, budget = (
        merged(capsys, "fit", "-c", "configs/demo.yaml", *more) for more in ((), ("-c", "configs/finetune/budget.yaml"))
    )
    checkpoint = callback(budget, "ModelCheckpoint")["init_args"]
    assert checkpoint == callback(demo, "ModelCheckpoint")["init_args"] | {"dirpath": "runs/budget/checkpoints"}
    assert budget["trainer"]["logger"]["init_args"]["save_dir"] == "runs/budget"
    assert budget["trainer"]["default_root_dir"] == "runs/budget"
    # the list of callbacks is the demo's, written out again
    own = callback(demo, "ModelCheckpoint")
    others = [c for c in demo["trainer"]["callbacks"] if c != own]
    assert [c for c in budget["trainer"]["callbacks"] if not c["class_path"].endswith("ModelCheckpoint")] == others


def test_the_papers_settings():
    prune = yaml.safe_load((ROOT / "configs/prune/paper.yaml").read_text())["trainer"]["callbacks"][0]["init_args"]
    expected = {
        "method": "wanda++",
        "alpha": 100,
        "rounds": 5,
        "samples_per_round": 32,
        "optimizer": "rmsprop",
        "learning_rate": 3e-7,
        "num_calibration_samples": 128,
    }
    assert prune.items() >= expected.items()
    adazeta = yaml.safe_load((ROOT / "configs/finetune/adazeta_paper.yaml").read_text())
    model = adazeta["model"]["init_args"]
    assert (model["learning_rate"], model["update"]["init_args"]["weight_decay"]) == (1e-4, 0.01)
    assert model["estimator"] == {"class_path": "wandazeta.zeroth_order.TwoSided", "init_args": {"epsilon": 1e-3}}
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
