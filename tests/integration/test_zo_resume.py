import json
import signal
import time
from functools import partial

import pytest
import torch
from helpers.causal_lms import save_tiny_lm
from helpers.processes import run, start
from helpers.zo_run import train, trainable_of
from lightning.pytorch import Callback
from torch.optim.lr_scheduler import PolynomialLR

from wandazeta.adapters import LoRAAdapters, TensorTrainAdapters
from wandazeta.modules import zeroth_order
from wandazeta.zeroth_order import AdaZetaSchedule, RAdaZOUpdate, SGDUpdate, VarianceSchedule


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    return save_tiny_lm(tmp_path_factory.mktemp("model"))


def decay(optimizer):
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.9**step)


STATES = ("adapters.update_states", "adapters.schedule_states")
OPTIONS = {"schedule": AdaZetaSchedule(1.0, 1.0, 4), "lr_scheduler": decay, "update": SGDUpdate(weight_decay=0.1)}


@pytest.mark.parametrize("layers", ["last:1", "all"])
@pytest.mark.parametrize("stop", [5, 7, 3, 9], ids=["end of an epoch", "mid-epoch", "first epoch", "late"])
def test_resumed_equals_undisturbed(model_dir, tmp_path, stop, layers):
    options = OPTIONS | {"adapter_layers": layers}
    trainer, whole, steps = train(model_dir, tmp_path / "whole", steps=13, save_every=13, **options)
    train(model_dir, tmp_path / "parts", steps=stop, save_every=stop, **options)
    again, resumed, later = train(model_dir, tmp_path / "parts", steps=13, save_every=13, resume=True, **options)
    assert sorted(later.steps) == list(range(stop + 1, 14)), "it went on where it stopped"
    assert later.steps == {step: seen for step, seen in steps.steps.items() if step > stop}
    assert torch.equal(resumed.adapters.theta, whole.adapters.theta)
    assert again.optimizers[0].param_groups[0]["lr"] == trainer.optimizers[0].param_groups[0]["lr"]
    assert again.callback_metrics == trainer.callback_metrics


def test_moments_are_resumed_too(model_dir, tmp_path):
    options = OPTIONS | {"update": RAdaZOUpdate(weight_decay=0.1)}
    _, whole, _ = train(model_dir, tmp_path / "whole", steps=9, **options)
    train(model_dir, tmp_path / "parts", steps=4, save_every=4, **options)
    _, resumed, _ = train(model_dir, tmp_path / "parts", steps=9, save_every=4, resume=True, **options)
    assert torch.equal(resumed.adapters.theta, whole.adapters.theta)
    with pytest.raises(ValueError, match="`update`"):
        train(model_dir, tmp_path / "parts", steps=12, save_every=4, resume=True, **OPTIONS)


def test_another_device_for_the_directions_is_named_once(model_dir, tmp_path, monkeypatch, recwarn):
    monkeypatch.setattr(zeroth_order, "drawn_by", lambda device: "a GPU")
    train(model_dir, tmp_path, steps=2, save_every=2)
    train(model_dir, tmp_path, steps=4, save_every=4, resume=True)
    assert not [warning for warning in recwarn if "directions" in str(warning.message)]
    monkeypatch.undo()
    train(model_dir, tmp_path, steps=6, save_every=6, resume=True)
    (warning,) = [str(warning.message) for warning in recwarn if "directions" in str(warning.message)]
    assert "drawn by a GPU and new ones are drawn by cpu" in warning
    assert "\n" not in warning


def test_killed_and_started_again(model_dir, tmp_path):
    """SIGKILL at some instant of some step; what the last checkpoint missed is done again."""
    settings = {"model_dir": str(model_dir), "steps": 30, "save_every": 4, "queries": 2, "adapter_layers": "last:1"}
    (whole,) = run("zo_run", settings, tmp_path / "whole")
    root = tmp_path / "killed"
    process = start("zo_run", settings | {"sleep": 0.1}, root)
    deadline = time.monotonic() + 120
    while not (root / "step-step=8.ckpt").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (root / "result-0.pt").exists()
    (resumed,) = run("zo_run", settings | {"resume": True}, root)
    first = min(resumed["steps"])
    # killed between the writing of step 8 and of `last`, it goes on from step 4
    assert first in (5, 9, 13), "from the last checkpoint"
    assert torch.equal(resumed["theta"], whole["theta"])
    assert resumed["steps"] == {step: seen for step, seen in whole["steps"].items() if step >= first}
    assert resumed["metrics"] == whole["metrics"]


def test_killed_ten_times_in_a_row(model_dir, tmp_path):
    """SIGKILL at random instants, of steps and of writing checkpoints; shuffled data, epochs of five steps."""
    settings = {
        "model_dir": str(model_dir),
        "steps": 60,
        "save_every": 2,
        "adapter_layers": "last:1",
        "estimator": ["OneSided", {}],
        "update": ["RAdaZOUpdate", {"weight_decay": 0.1}],
        "schedule": ["VarianceSchedule", {"min_queries": 2, "max_queries": 6, "window": 4}],
        "kills": 10,
        "kill_seed": 0,
    }
    process = start("zo_kills", settings, tmp_path)
    try:
        code = process.wait(300)
    finally:
        process.kill()
    assert code == 0, (tmp_path / "log.txt").read_text()[-4000:]
    told = json.loads((tmp_path / "kills.json").read_text())
    assert told["kills"] == 10
    whole, killed = (torch.load(tmp_path / name / "result-0.pt", weights_only=True) for name in ("whole", "killed"))
    for name in ("theta", "update_states", "schedule_states", "progress"):
        assert torch.equal(killed[name], whole[name]), name
    assert killed["metrics"] == whole["metrics"]
    # in the middle of epochs, with numbers of queries that the schedule had found by then
    assert any(begun[0] % 5 for begun in told["steps"][1:])
    assert len({seen["queries"] for seen in whole["steps"].values()}) > 1


class SaveInside(Callback):
    """Writes a checkpoint at a point inside a step, as a signal handler would."""

    def __init__(self, path, step, where):
        self.path, self.step, self.where = path, step, where

    def on_train_start(self, trainer, module):
        def wrap(owner, name, after):
            original = getattr(owner, name)

            def wrapped(*args, **kwargs):
                result = original(*args, **kwargs) if after else None
                if trainer.global_step == self.step and not self.path.exists():
                    trainer.save_checkpoint(self.path)
                return result if after else original(*args, **kwargs)

            setattr(owner, name, wrapped)

        if self.where == "in the loss":
            wrap(module, "losses", after=True)
        elif self.where == "adapters moved, step not counted":
            wrap(module, "_update_adapters", after=True)
        else:  # the optimizer has stepped, the scheduler has not
            self.step += 1
            wrap(module, "_advance_scheduler", after=False)


@pytest.mark.parametrize(
    "where", ["in the loss", "adapters moved, step not counted", "step counted, rate not advanced"]
)
def test_checkpoint_from_inside_a_step(model_dir, tmp_path, where):
    inside = SaveInside(tmp_path / "inside.ckpt", 6, where)
    _, whole, _ = train(model_dir, tmp_path / "whole", steps=12, callbacks=[inside], **OPTIONS)
    assert inside.path.exists()
    (tmp_path / "parts").mkdir()
    inside.path.rename(tmp_path / "parts" / "last.ckpt")
    _, resumed, _ = train(model_dir, tmp_path / "parts", steps=12, save_every=99, resume=True, **OPTIONS)
    assert torch.equal(resumed.adapters.theta, whole.adapters.theta)
    assert torch.equal(resumed.progress, whole.progress)


@pytest.mark.parametrize("kind", [TensorTrainAdapters, LoRAAdapters])
def test_checkpoint_is_small_and_plain(model_dir, tmp_path, kind):
    _, module, _ = train(model_dir, tmp_path, steps=2, save_every=2, trainable=kind())
    file = tmp_path / "last.ckpt"
    assert file.stat().st_size <= 4 * (module.adapters.num_parameters + 1) + 64 * 1024
    checkpoint = torch.load(file, weights_only=True)
    assert set(checkpoint["state_dict"]) == {"anchor", "progress", "adapters.theta", *STATES}
    assert torch.equal(checkpoint["state_dict"]["adapters.theta"], module.adapters.theta)
    assert checkpoint["zeroth_order"]["backbone_key"] == module.backbone_key


def test_chunk_size_that_fits_is_remembered(model_dir, tmp_path):
    class Small(Callback):
        def on_fit_start(self, trainer, module):
            losses = module.losses

            def small(theta_pd, prepared):
                if len(theta_pd) > 4:
                    raise torch.OutOfMemoryError("out of memory")
                return losses(theta_pd, prepared)

            module.losses = small

    options = {"queries": 4, "query_chunk_size": 8}
    _, module, _ = train(model_dir, tmp_path, steps=2, save_every=2, callbacks=[Small()], **options)
    assert module.query_chunk_size == 4
    _, resumed, _ = train(model_dir, tmp_path, steps=3, save_every=2, resume=True, **options)
    assert resumed.query_chunk_size == 4


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"adapter_layers": "last:1"}, "`layers`"),
        ({"adapter_rank": 3}, "`rank` differs"),
        ({"schedule": VarianceSchedule()}, "schedule"),
        ({"learning_rate": 1.0}, r"`learning_rate` differs: saved \S+, here 1.0"),
        ({"lr_scheduler": partial(PolynomialLR, total_iters=8)}, r"`lr_scheduler` .*PolynomialLR\(total_iters=8"),
        ({"other_model": True}, "backbone"),
        ({"other_model": True, "trainable": LoRAAdapters(2)}, "backbone"),
        ({"trainable": LoRAAdapters(2)}, "the kind of `trainable` differs: saved tensor_train, here lora"),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_refused(model_dir, tmp_path, changes, message):
    train(model_dir, tmp_path, steps=1, save_every=1, trainable=changes["trainable"] if len(changes) == 2 else None)
    if changes.pop("other_model", False):
        model_dir = save_tiny_lm(tmp_path / "other", seed=1)
    with pytest.raises(ValueError, match=message):
        train(model_dir, tmp_path, steps=2, save_every=1, resume=True, **changes)


def test_missing_and_unexpected_keys_are_refused(model_dir, tmp_path):
    train(model_dir, tmp_path, steps=1, save_every=1)
    checkpoint = torch.load(tmp_path / "last.ckpt", weights_only=True)
    checkpoint["state_dict"]["adapters.theta2"] = checkpoint["state_dict"].pop("adapters.theta")
    torch.save(checkpoint, tmp_path / "last.ckpt")
    with pytest.raises(ValueError, match=r"lacks \['adapters\.theta'\].*theta2"):
        train(model_dir, tmp_path, steps=2, save_every=1, resume=True)


def test_checkpoint_of_another_pruning_is_refused(model_dir, tmp_path):
    class Key(Callback):
        def __init__(self, key):
            self.key = key

        def setup(self, trainer, module, stage):
            module.pruned_backbone_key = self.key

    train(model_dir, tmp_path, steps=1, save_every=1, callbacks=[Key("one")])
    train(model_dir, tmp_path, steps=2, save_every=1, resume=True, callbacks=[Key("one")])
    with pytest.raises(ValueError, match="saved one, here two"):
        train(model_dir, tmp_path, steps=3, save_every=1, resume=True, callbacks=[Key("two")])


def test_validation_in_between_changes_nothing(model_dir, tmp_path):
    from helpers.causal_lms import classification_batch, collate, rows_of, step_loader
    from lightning.pytorch import Trainer
    from torch.utils.data import DataLoader

    from wandazeta.modules import ZerothOrderModule

    thetas = []
    for validate in (False, True):
        module = ZerothOrderModule(
            str(model_dir), trainable=trainable_of({"adapter_layers": "last:1"}), learning_rate=1e-3
        )
        trainer = Trainer(
            accelerator="cpu", max_steps=6, logger=False, enable_checkpointing=False, enable_progress_bar=False,
            val_check_interval=2, limit_val_batches=2 if validate else 0,
        )  # fmt: skip
        train_batches = step_loader(classification_batch(20), 4, trainer)
        val_batches = DataLoader(rows_of(classification_batch(8, seed=3)), batch_size=4, collate_fn=collate)
        trainer.fit(module, train_batches, val_batches)
        thetas.append(module.adapters.theta)
    assert torch.equal(*thetas)
