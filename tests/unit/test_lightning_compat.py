"""Private names of Lightning and torch that wandazeta depends on: a version that lacks one fails here first."""

import inspect
import re
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.demos.boring_classes import BoringModel
from lightning.pytorch.plugins.environments import SLURMEnvironment
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.strategies.launchers.subprocess_script import _SubprocessScriptLauncher
from torch.nn.parallel import DistributedDataParallel

from wandazeta import lightning_compat

ROOT = Path(__file__).parents[2]
FOLDERS = ("callbacks", "datamodules", "modules", "wandazeta")
PRIVATE = re.compile(
    r"_checkpoint_connector|_accelerator_connector|_data_source|_should_accumulate|\.procs\b|_get_default_store"
    r"|\b_trainer\b|\._average_model|\._use_buffers|_ddp_params_and_buffers_to_ignore|\._update_metrics"
    r"|\.inference_mode = |\._save_distributed_checkpoint|\._tensor_parallel_size"
)


def quiet_trainer(**options):
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    return Trainer(**{"accelerator": "cpu", "enable_checkpointing": "callbacks" in options} | quiet | options)


def test_private_names_are_used_in_one_file_only():
    for folder in FOLDERS:
        for path in (ROOT / folder).rglob("*.py"):
            if path.name != "lightning_compat.py":
                assert not PRIVATE.search(path.read_text()), path


def test_the_trainer_of_a_module_is_found_and_a_module_may_have_none():
    module, trainer = BoringModel(), quiet_trainer(fast_dev_run=True)
    assert lightning_compat.attached_trainer(module) is None
    trainer.fit(module)
    assert lightning_compat.attached_trainer(module) is trainer


def test_last_is_the_file_that_a_checkpoint_callback_wrote(tmp_path):
    checkpoint = ModelCheckpoint(tmp_path, save_last=True)
    trainer = quiet_trainer(max_steps=1, callbacks=[checkpoint], limit_val_batches=0)
    assert lightning_compat.checkpoint_path(trainer, "last") is None
    trainer.fit(BoringModel())
    assert lightning_compat.checkpoint_path(trainer, "last") == str(tmp_path / "last.ckpt")


def test_options_of_fsdp2_are_found():
    strategy = ModelParallelStrategy()
    assert lightning_compat.saves_shards(strategy)
    strategy.parallel_devices = [torch.device("cpu")] * 3
    assert lightning_compat.tensor_parallel_size(strategy) == 3
    strategy = ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1, save_distributed_checkpoint=False)
    assert not lightning_compat.saves_shards(strategy)
    assert lightning_compat.tensor_parallel_size(strategy) == 1


def test_no_evaluation_runs_in_inference_mode_where_that_is_avoided(tmp_path):
    class Watch(Callback):
        def on_validation_batch_start(self, *_):
            modes.append(torch.is_inference_mode_enabled())

        on_test_batch_start = on_predict_batch_start = on_validation_batch_start

    for avoid in (False, True):
        modes = []
        trainer = quiet_trainer(fast_dev_run=True, callbacks=[Watch()], default_root_dir=tmp_path)
        if avoid:
            lightning_compat.avoid_inference_mode(trainer)
        for stage in ("fit", "validate", "test", "predict"):
            getattr(trainer, stage)(BoringModel())
        assert modes == [False, not avoid, not avoid, not avoid]


def test_averages_and_their_options_are_found(tmp_path):
    callback = EMAWeightAveraging()
    trainer = quiet_trainer(max_steps=1, callbacks=[callback], limit_val_batches=0, default_root_dir=tmp_path)
    assert lightning_compat.averaged_modules(trainer) == []
    trainer.fit(BoringModel())
    (copy,) = lightning_compat.averaged_modules(trainer)
    assert isinstance(copy, BoringModel)
    assert lightning_compat.averages_buffers(callback)
    assert not lightning_compat.averages_buffers(EMAWeightAveraging(use_buffers=False))
    assert lightning_compat.copies_module(callback)
    assert not lightning_compat.copies_module(trainer.checkpoint_callback or ModelCheckpoint(tmp_path))


@pytest.mark.parametrize(("interval", "steps"), [(0, []), (1, [0, 1, 2, 3]), (2, [1, 3])])
def test_logging_steps_are_those_of_the_interval(interval, steps):
    trainer = quiet_trainer(log_every_n_steps=interval)
    assert [step for step in range(4) if lightning_compat.is_logging_step(trainer, step)] == steps
    assert not lightning_compat.is_fitting(trainer)


def test_the_checkpoint_of_a_requeued_job_is_in_the_folder_of_the_run(tmp_path):
    trainer = quiet_trainer(default_root_dir=tmp_path)
    assert lightning_compat.requeue_checkpoint(trainer) is None
    path = tmp_path / "hpc_ckpt_1.ckpt"
    path.touch()
    assert lightning_compat.requeue_checkpoint(trainer) == str(path)


def test_the_requeue_signal_is_that_of_the_slurm_environment(monkeypatch):
    assert lightning_compat.requeue_signal(quiet_trainer()) is None
    for name, value in {"SLURM_NTASKS": "1", "SLURM_JOB_NAME": "job", "SLURM_JOB_ID": "1", "SLURM_PROCID": "0"}.items():
        monkeypatch.setenv(name, value)
    for name in ("SLURM_LOCALID", "SLURM_NODEID"):
        monkeypatch.setenv(name, "0")
    monkeypatch.setenv("SLURM_NODELIST", "localhost")
    for auto_requeue in (True, False):
        environment = SLURMEnvironment(auto_requeue=auto_requeue)
        trainer = quiet_trainer(plugins=[environment], devices=1)
        expected = environment.requeue_signal if auto_requeue else None
        assert lightning_compat.requeue_signal(trainer) == expected


def test_training_data_and_accumulation_are_known_inside_a_fit():
    seen = []

    class Module(BoringModel):
        def setup(self, stage):
            seen.append(lightning_compat.training_data(self.trainer))

        def on_train_batch_end(self, *_):
            seen.append(lightning_compat.is_accumulating(self.trainer))

    module = Module()
    trainer = quiet_trainer(max_epochs=1, limit_train_batches=3, limit_val_batches=0, accumulate_grad_batches=2)
    trainer.fit(module)
    assert seen == [module, True, False, False]
    loader = BoringModel().train_dataloader()
    trainer.fit(module, loader)
    assert seen[4] is loader


def test_the_processes_of_lightnings_launcher_are_known():
    trainer = quiet_trainer()
    assert lightning_compat.launched_processes(trainer) == []
    assert "self.procs" in inspect.getsource(_SubprocessScriptLauncher)


def test_the_default_store_is_that_of_the_process_group(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        lightning_compat.default_store().set("key", "value")
        assert lightning_compat.default_store().clone().get("key") == b"value"
    finally:
        dist.destroy_process_group()


def test_ddp_leaves_the_named_tensors_alone():
    module = BoringModel()
    lightning_compat.exclude_from_ddp(module, ["layer.weight"])
    assert '"_ddp_params_and_buffers_to_ignore"' in inspect.getsource(DistributedDataParallel.__init__)
    assert module._ddp_params_and_buffers_to_ignore == ["layer.weight"]


@pytest.mark.parametrize("name", ["_get", "_parse_ckpt_path", "_prepare_subcommand_parser"])
def test_the_methods_of_the_command_line_that_ours_overrides_or_calls_exist(name):
    assert callable(getattr(LightningCLI, name))
