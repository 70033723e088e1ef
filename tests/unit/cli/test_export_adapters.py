"""Adapters of a run as files, without Python code; the code of their card is executed."""

import json
import re

import pytest
import torch
import yaml
from helpers.causal_lms import prompts
from helpers.fit_config import write_fit_config

from wandazeta import __main__
from wandazeta.cli.main import command_line, main
from wandazeta.models.pretrained import find_pretrained

TRAINED = {
    "tensor trains": {},
    "lora": {"trainable": {"class_path": "LoRAAdapters", "init_args": {"rank": 2}}, "learning_rate": 0.01},
    "answers": {
        "head": {"num_answers": 2, "gradient": "exact"},
        "trainable": {"class_path": "TensorTrainAdapters", "init_args": {"bottleneck": 8, "layers": "last:1"}},
    },
    "peft": {"class_path": "FirstOrderModule", "trainable": {"class_path": "PeftLoRA", "init_args": {"rank": 2}}},
}


@pytest.fixture
def config(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["wandazeta"])
    return write_fit_config(tmp_path, max_steps=2)


def change(config, model=None, **settings):
    content = yaml.safe_load(config.read_text()) | settings
    if model is not None:
        kind = model.get("class_path", "ZerothOrderModule")
        own = content["model"]["init_args"] if kind == "ZerothOrderModule" else {"model_name_or_path": "./model"}
        options = {name: value for name, value in model.items() if name != "class_path"}
        content["model"] = {"class_path": kind, "init_args": {**own, **options}}
    config.write_text(yaml.safe_dump(content))


def export(monkeypatch, *args):
    monkeypatch.setattr("sys.argv", ["wandazeta", "export-adapters", *map(str, args)])
    __main__.main()


def run_card(folder, monkeypatch):
    code = re.search(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)[1]
    scope = {}
    with monkeypatch.context() as patch:
        patch.chdir(folder)
        exec(code, scope)
    return scope["model"]


def logits(model):
    ids, _ = prompts(2, width=6, vocabulary=250)
    with torch.no_grad():
        return getattr(model, "backbone", model).eval()(input_ids=ids).logits


@pytest.mark.parametrize("is_pruned", [True, False], ids=["pruned", "dense"])
@pytest.mark.parametrize("trained", TRAINED)
def test_the_cards_code_gives_the_model_of_the_run(config, tmp_path, monkeypatch, capsys, trained, is_pruned):
    change(config, TRAINED[trained], **({} if is_pruned else {"prune": None}))
    module = command_line(["fit", "-c", str(config)]).model
    metrics = (tmp_path / "run/log/metrics.csv").read_text()
    capsys.readouterr()
    export(monkeypatch, "run", "exported")
    assert capsys.readouterr().out == f"adapters: {tmp_path}/exported\n"
    assert (tmp_path / "run/log/metrics.csv").read_text() == metrics
    model = run_card(tmp_path / "exported", monkeypatch)
    assert torch.equal(logits(model), logits(module))
    if trained == "answers":
        assert torch.equal(model.adapters.theta, module.adapters.theta)
    assert (tmp_path / "exported/backbone").is_dir() == is_pruned
    card = (tmp_path / "exported/README.md").read_text()
    assert ("`backbone/` is the base model as it was pruned" in card) == is_pruned
    _, backbone = find_pretrained(model)
    # without what the adapters add, it is sparse
    zeros = [float((weight == 0).float().mean()) for name, weight in backbone.named_parameters() if "up_proj" in name]
    assert (0.5 in zeros) == is_pruned


def test_an_earlier_checkpoint_and_a_run_that_was_moved(config, tmp_path, monkeypatch):
    kept = {"dirpath": "run/kept", "every_n_train_steps": 1, "save_top_k": -1, "filename": "{step}", "save_last": True}
    content = yaml.safe_load(config.read_text())
    callbacks = [{"class_path": "ModelCheckpoint", "init_args": kept}, {"class_path": "LearningRateMonitor"}]
    change(config, trainer=content["trainer"] | {"callbacks": callbacks, "precision": "bf16-mixed"})
    main(["fit", "-c", str(config)])
    (first,) = (tmp_path / "run/kept").glob("step=1.ckpt")
    export(monkeypatch, "run", "first", "--ckpt_path", first)
    export(monkeypatch, "run", "last")
    found = {name: (tmp_path / name / "adapters.safetensors").read_bytes() for name in ("first", "last")}
    assert found["first"] != found["last"]
    description = json.loads((tmp_path / "last/adapters.json").read_text())
    assert description["backbone_key"] == description["backbone_fingerprint"]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ("model exported", "`run` to be the folder of a run of `wandazeta fit`, with log/config.yaml"),
        ("run model", "`output_dir` to be a new or empty folder, but got 'model'"),
        ("run exported --ckpt_path nowhere.ckpt", "`ckpt_path` to be a checkpoint of the run, but got 'nowhere.ckpt'"),
        ("run exported --ckpt_path model", "`ckpt_path` to be a file, but got 'model'"),
    ],
)
def test_wrong_usage_is_told_in_one_line(config, tmp_path, monkeypatch, capsys, args, message):
    change(config, prune=None)
    main(["fit", "-c", str(config)])
    capsys.readouterr()
    with pytest.raises(SystemExit, match="2"):
        export(monkeypatch, *args.split())
    assert message in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "exported").exists()


def test_a_run_without_adapters_is_refused(config, tmp_path, monkeypatch, capsys):
    change(config, {"trainable": {"class_path": "Weights"}}, prune=None)
    main(["fit", "-c", str(config)])
    capsys.readouterr()
    with pytest.raises(SystemExit, match="2"):
        export(monkeypatch, "run", "exported")
    assert "`run` to be a run that trains adapters, but 'run' is of ZerothOrderModule with `Weights`" in (
        capsys.readouterr().err
    )
