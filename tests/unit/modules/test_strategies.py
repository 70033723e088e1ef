"""Sharded loading is refused before anything is loaded if the strategy cannot do it; memory that DeepSpeed may use."""

import pytest
from helpers.causal_lms import save_tiny_lm, tiny_lm
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import ModelParallelStrategy

from wandazeta.models.loading import LoadingOptions
from wandazeta.modules import LanguageModel, ZerothOrderModule
from wandazeta.modules.strategies import limit_gathered_weights, loading_sharded_by


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    return str(save_tiny_lm(tmp_path_factory.mktemp("model")))


def deepspeed(**options):
    pytest.importorskip("deepspeed")
    from helpers.cpu_deepspeed import CPUDeepSpeedStrategy

    return CPUDeepSpeedStrategy(**options)


@pytest.mark.parametrize("kind", [LanguageModel, ZerothOrderModule])
def test_other_strategies_are_refused(model_dir, kind, tmp_path):
    module = kind(model_dir, LoadingOptions(shard_on_load=True))
    trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, default_root_dir=tmp_path)
    with pytest.raises(ValueError, match="DeepSpeed with stage 3 for `shard_on_load`, but got SingleDeviceStrategy"):
        trainer.validate(module, [], verbose=False)


def test_other_stages_and_precisions_are_refused():
    with pytest.raises(ValueError, match="stage 3"), loading_sharded_by(deepspeed(stage=2), "float32"):
        pass
    refused = pytest.raises(ValueError, match="float32 for `shard_on_load` with `precision: 32-true`, but got")
    with refused, loading_sharded_by(deepspeed(stage=3), "bfloat16"):
        pass


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_classes": 2}, "`num_classes` to be null with `shard_on_load`, but got 2"),
        ({"stream_weights": True}, "one of `stream_weights` and `shard_on_load`"),
    ],
)
def test_options_that_do_not_go_together_are_refused_first(options, message):
    with pytest.raises(ValueError, match=message):
        LoadingOptions(shard_on_load=True, **options)


def test_deepspeed_holds_two_blocks_unless_told_otherwise():
    model = tiny_lm()
    block = sum(parameter.numel() for parameter in model.model.layers[0].parameters())
    strategy = deepspeed(stage=3)
    limit_gathered_weights(strategy, model)
    assert strategy.config["zero_optimization"]["stage3_max_live_parameters"] == 2 * block
    assert strategy.config["zero_optimization"]["stage3_prefetch_bucket_size"] == block
    options = {"stage": 3, "stage3_max_live_parameters": 7}
    chosen = deepspeed(stage=3, config={"zero_optimization": options})
    limit_gathered_weights(chosen, model)
    assert chosen.config["zero_optimization"]["stage3_max_live_parameters"] == 7
    other = deepspeed(stage=2)
    before = dict(other.config["zero_optimization"])
    limit_gathered_weights(other, model)
    assert other.config["zero_optimization"] == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "`tensor_parallel_size` of ModelParallelStrategy to be 1, but got 2"),
        (
            {"data_parallel_size": 2, "tensor_parallel_size": 1},
            "`save_distributed_checkpoint` of ModelParallelStrategy",
        ),
    ],
)
def test_options_of_fsdp2_are_refused_before_the_ranks_are_connected(model_dir, options, message, tmp_path):
    strategy = ModelParallelStrategy(**options)
    quiet = {"logger": False, "enable_checkpointing": False, "default_root_dir": tmp_path}
    trainer = Trainer(accelerator="cpu", devices=2, strategy=strategy, **quiet)
    # this process is one of two
    strategy._launcher = None
    with pytest.raises(ValueError, match=message):
        trainer.fit(ZerothOrderModule(model_dir), [])
