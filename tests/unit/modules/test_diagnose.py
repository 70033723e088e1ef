import json
import sys

import pytest
from helpers.causal_lms import save_tiny_lm
from helpers.zo_run import train
from lightning.pytorch import LightningModule, Trainer

from wandazeta.cli.main import main
from wandazeta.modules.diagnose import EpsilonDiagnosis
from wandazeta.zeroth_order.diagnosis import EpsilonRow


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    return save_tiny_lm(tmp_path_factory.mktemp("model"))


def test_measures_in_a_fit_that_trains_nothing(model_dir, tmp_path):
    diagnosis = EpsilonDiagnosis(num_queries=6, epsilons=(1e-7, 1e-3))
    trainer, module, _ = train(model_dir, tmp_path, callbacks=[diagnosis], query_chunk_size=4, seed=3)
    assert trainer.global_step == 0
    assert module.progress.tolist() == [0, 0, 0]
    found = {(row.estimator, row.epsilon): row.correlation for row in diagnosis.rows}
    assert found["two_sided", 1e-3] > 0.99
    assert found["one_sided", 1e-3] > 0.99
    assert found["two_sided", 1e-7] < 0.9
    assert diagnosis.to_dict()["recommended"] == {"two_sided": 1e-3, "one_sided": 1e-3}


def test_sees_the_precision_of_the_trainer(model_dir, tmp_path):
    correlations = []
    for precision in ("32-true", "bf16-true"):
        diagnosis = EpsilonDiagnosis(num_batches=1, num_queries=6, epsilons=(1e-4,))
        train(model_dir, tmp_path, callbacks=[diagnosis], trainer_options={"precision": precision})
        correlations.append(diagnosis.rows[0].correlation)
    assert diagnosis.to_dict()["dtype"] == "bfloat16"
    assert correlations[0] > 0.9 > correlations[1]


def test_report(tmp_path, capsys):
    diagnosis = EpsilonDiagnosis()
    diagnosis.rows = [
        EpsilonRow(name, epsilon, correlation)
        for name, correlations in (("two_sided", (0.2, 0.99)), ("one_sided", (0.5, 0.1)))
        for epsilon, correlation in zip((1e-3, 1e-2), correlations, strict=True)
    ]
    diagnosis.write_report(tmp_path / "new")
    shown = capsys.readouterr().out
    assert "0.990*" in shown
    assert "two_sided: epsilon=0.01 (correlation 0.990; the default is 0.001)" in shown
    assert "one_sided: epsilon=0.001 (correlation 0.500; the default is 0.001); no distance measures well" in shown
    written = json.loads((tmp_path / "new" / "epsilon.json").read_text())
    assert written["rows"][1] == {"estimator": "two_sided", "epsilon": 0.01, "correlation": 0.99}
    assert written["recommended"] == {"two_sided": 0.01, "one_sided": 0.001}
    assert (tmp_path / "new" / "epsilon.svg").read_text().count("<svg") == 1


def test_report_without_matplotlib(tmp_path, capsys, monkeypatch):
    diagnosis = EpsilonDiagnosis()
    diagnosis.rows = [EpsilonRow(name, 1e-2, 0.99) for name in ("two_sided", "one_sided")]
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    diagnosis.write_report(tmp_path)
    assert "pip install" in capsys.readouterr().out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["epsilon.json"]


@pytest.mark.parametrize(("name", "value"), [("num_batches", 0), ("num_queries", 1), ("epsilons", [0.0, 1e-3])])
def test_bad_arguments(name, value):
    with pytest.raises(ValueError, match=f"`{name}`"):
        EpsilonDiagnosis(**{name: value})


def test_only_a_zeroth_order_module_in_one_process(model_dir, tmp_path):
    with pytest.raises(ValueError, match="ZerothOrderModule to diagnose, but got LightningModule"):
        EpsilonDiagnosis().setup(Trainer(accelerator="cpu", logger=False), LightningModule(), "fit")


def test_from_the_command_line(model_dir, tmp_path, monkeypatch, capsys):
    text = tmp_path / "text.txt"
    text.write_text("\n\n".join(f"paragraph {n} has a few words of its own" for n in range(40)))
    monkeypatch.chdir(tmp_path)
    main(
        [
            *("diagnose", "--model", "ZerothOrderModule", "--model.model_name_or_path", str(model_dir)),
            *("--model.trainable", "TensorTrainAdapters", "--model.trainable.rank", "2"),
            *("--model.trainable.bottleneck", "8", "--model.trainable.identity_start", "false"),
            *("--data", "TextDataModule", "--data.source", str(text), "--data.sequence_length", "16"),
            *("--data.batch_size", "2", "--trainer.accelerator", "cpu", "--trainer.logger", "false"),
            *("--trainer.enable_checkpointing", "false", "--output_dir", "out"),
            *("--num_queries", "4", "--epsilons", "[1e-6, 1e-3]"),
        ]
    )
    shown, written = capsys.readouterr().out, json.loads((tmp_path / "out" / "epsilon.json").read_text())
    assert written["num_queries"] == 4
    assert f"two_sided: epsilon={written['recommended']['two_sided']:g}" in shown
