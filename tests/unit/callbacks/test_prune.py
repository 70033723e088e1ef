import pytest
import torch
from helpers.pruning import Tiny, callback, fit, loader, same, trainer
from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import LightningArgumentParser
from torch import nn

from wandazeta.callbacks import WandaPPPruneCallback
from wandazeta.pruning import RO, RegionalOptimisation, SparseGPT, Wanda, WandaPP

# -- what pruning does ------------------------------------------------------------------------------------------------


def test_fit_prunes_linears_of_the_blocks_and_nothing_else(folder):
    pruning = callback(folder)
    module, dense = fit(pruning), Tiny()
    for name, weight in module.named_parameters():
        if name.startswith("layers.") and weight.ndim == 2:
            assert ((weight.view(weight.shape[0], -1, 4) != 0).sum(-1) == 2).all()
        else:
            assert torch.equal(weight, dense.get_parameter(name)), name
        assert weight.requires_grad
    assert all(part.training for part in module.modules())
    assert pruning.report.sparsity == 0.5
    assert [block.name for block in pruning.report.blocks] == ["layers.0", "layers.1", "layers.2"]
    assert (folder / "report.json").exists()


def test_a_run_that_prunes_and_one_that_loads_train_alike(folder, forbid_pruning, caplog):
    modules = []
    for _ in range(2):
        assert "it was complete" not in caplog.text
        torch.manual_seed(1)
        modules.append(fit(callback(folder), Tiny(learning_rate=0.1), loader(shuffle=True)))
        forbid_pruning()
    assert "it was complete" in caplog.text
    assert same(*modules)
    assert not same(modules[0], Tiny())


def test_pruning_leaves_the_random_numbers_alone(folder):
    draws = []
    for callbacks in ([], [callback(folder)]):
        module = Tiny()
        module.on_fit_start = lambda: draws.append(torch.rand(1))
        torch.manual_seed(1)
        trainer(*callbacks).fit(module, loader(shuffle=True))
    assert torch.equal(*draws)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"alpha": 5.0}, r"`alpha` \(100.0 there, 5.0 here\)"),
        ({"exclude_modules": ["up"]}, "`exclude_modules`"),
        ({"num_calibration_samples": 12}, r"differs in `num_calibration_samples` \(8 there, 12 here\);"),
        ({"module": Tiny(seed=1)}, "model tensors, first"),
        ({"module": Tiny(num_blocks=2)}, "model tensors, first"),
        ({"data": loader(seed=1)}, "differs in the calibration data;"),
        # reads other tensors, with other samples or none, which is no difference of its own
        ({"method": "magnitude"}, r"differs in (`\w+` \([^()]*\)(, )?)+;"),
        (
            {"seed": 1, "num_calibration_samples": 4},
            r"differs in `num_calibration_samples` \(8 there, 4 here\), `seed` \(0 there, 1 here\);",
        ),
        (
            {"seed": 1, "module": Tiny(seed=1)},
            r"differs in `seed` \(0 there, 1 here\), \d+ of \d+ model tensors, first",
        ),
    ],
)
def test_another_option_model_or_calibration_is_refused(folder, forbid_pruning, change, message):
    fit(callback(folder))
    forbid_pruning()
    module, data = change.pop("module", None), change.pop("data", None)
    with pytest.raises(ValueError, match=message):
        fit(callback(folder, **change), module, data)


def test_a_new_head_changes_nothing_but_an_embedding_does(folder, forbid_pruning):
    fit(callback(folder))
    forbid_pruning()
    module = Tiny()
    nn.init.ones_(module.head.weight)
    fit(callback(folder), module)
    module = Tiny()
    nn.init.ones_(module.embedding.weight)
    with pytest.raises(ValueError, match=r"1 of 20 model tensors, first `embedding\.weight`"):
        fit(callback(folder), module)


def test_a_damaged_block_is_made_again(folder):
    expected = fit(callback(folder))
    content = (folder / "block_0001.safetensors").read_bytes()
    (folder / "block_0001.safetensors").write_bytes(content[:-5])
    assert same(fit(callback(folder)), expected)
    assert (folder / "block_0001.safetensors").read_bytes() == content


@pytest.mark.parametrize("method", ["magnitude", "wanda", "rgs", "ro", "wanda++"])
def test_every_method_comes_back_from_its_folder(folder, forbid_pruning, method):
    expected = fit(callback(folder, method=method))
    forbid_pruning()
    assert same(fit(callback(folder, method=method)), expected)


def test_magnitude_needs_no_calibration_data(folder):
    pruning = callback(folder, method="magnitude", num_calibration_samples=10**6)
    fit(pruning)
    assert pruning.report.sparsity == 0.5


# -- the other stages -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", ["validate", "test", "predict"])
def test_other_stages_load_the_pruning_or_refuse(folder, forbid_pruning, stage):
    with pytest.raises(ValueError, match="holds no pruning; run `fit` or `prune` first"):
        getattr(trainer(callback(folder)), stage)(Tiny(), loader())
    expected = fit(callback(folder))
    forbid_pruning()
    module, pruning = Tiny(), callback(folder)
    # other data than it was calibrated on, and none to train on
    getattr(trainer(pruning), stage)(module, loader(seed=5))
    assert same(module, expected)
    assert pruning.report.sparsity == 0.5
    with pytest.raises(ValueError, match=r"model tensors, first `embedding\.weight`"):
        getattr(trainer(callback(folder)), stage)(Tiny(seed=1), loader())
    with pytest.raises(ValueError, match="alpha"):
        getattr(trainer(callback(folder, alpha=1.0)), stage)(Tiny(), loader())
    (folder / "block_0002.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match="damaged; run `fit` or `prune` again"):
        getattr(trainer(callback(folder)), stage)(Tiny(), loader())
    (folder / "complete.json").unlink()
    with pytest.raises(ValueError, match="holds an unfinished pruning"):
        getattr(trainer(callback(folder)), stage)(Tiny(), loader())


def test_testing_after_fitting_keeps_what_was_trained(folder, forbid_pruning):
    runner = trainer(callback(folder))
    module = Tiny(learning_rate=0.1)
    runner.fit(module, loader())
    trained = {name: weight.clone() for name, weight in module.state_dict().items()}
    forbid_pruning()
    runner.test(module, loader())
    runner.fit_loop.max_epochs = 2
    runner.validate(module, loader())
    assert all(torch.equal(weight, trained[name]) for name, weight in module.state_dict().items())


def test_the_module_is_told_what_it_stands_on(folder):
    module = Tiny()
    module.pruned_backbone_key = None
    pruning = callback(folder)
    fit(pruning, module)
    assert module.pruned_backbone_key == pruning.key
    loaded = Tiny()
    loaded.pruned_backbone_key = None
    trainer(callback(folder)).validate(loaded, loader())
    assert loaded.pruned_backbone_key == pruning.key


def test_a_block_may_have_another_name_before_that_in_its_list(folder, forbid_pruning):
    class Aliased(Tiny):
        def __init__(self):
            super().__init__()
            layers = self.layers
            del self.layers
            self.first, self.layers = layers[0], layers

    module = fit(callback(folder), Aliased())
    loaded = Aliased()
    forbid_pruning()
    trainer(callback(folder)).validate(loaded, loader())
    assert same(loaded, module)


def test_training_goes_on_from_a_checkpoint_but_not_from_one_of_another_pruning(folder, tmp_path):
    saving = ModelCheckpoint(tmp_path / "checkpoints", save_last=True)
    module = Tiny(learning_rate=0.1)
    trainer(callback(folder), saving, enable_checkpointing=True).fit(module, loader())
    assert (module.layers[0].up.weight == 0).float().mean() == 0.5
    last = str(tmp_path / "checkpoints" / "last.ckpt")
    resumed = fit(callback(folder), Tiny(learning_rate=0.1), ckpt_path=last, max_epochs=2)
    assert not same(resumed, module)
    assert (resumed.layers[0].up.weight == 0).float().mean() == 0.5
    with pytest.raises(ValueError, match="this one was trained on another; give it the `output_dir`"):
        fit(callback(tmp_path / "other", alpha=1.0), Tiny(learning_rate=0.1), ckpt_path=last, max_epochs=2)


class Pair(Tiny):
    """Holds two lists of blocks that run one after another."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.upper = Tiny(seed=1, num_blocks=2).layers

    def forward(self, tokens):
        x = self.embedding(tokens)
        for layer in (*self.layers, *self.upper):
            x = layer(x)
        return self.head(self.dropout(x))


def pair(tmp_path, **kwargs):
    names = ("upper", "layers")
    return [callback(tmp_path / name, blocks=name, **kwargs) for name in names]


def test_of_two_lists_that_run_none_is_pruned_without_being_asked_for(folder):
    with pytest.raises(ValueError, match=r"found 2: `layers` \(3 blocks\), `upper` \(2 blocks\); set `blocks`"):
        fit(callback(folder), Pair())
    assert not list(folder.glob("block_*"))


def test_several_prunings_in_one_trainer_are_told_apart(tmp_path, forbid_pruning):
    saving = ModelCheckpoint(tmp_path / "checkpoints", save_last=True)
    module, prunings = Pair(learning_rate=0.0), pair(tmp_path)
    trainer(*prunings, saving, enable_checkpointing=True).fit(module, loader())
    for layer in (*module.layers, *module.upper):
        assert ((layer.up.weight != 0).view(-1, 4).sum(1) == 2).all()
    last = tmp_path / "checkpoints" / "last.ckpt"
    states = torch.load(last, weights_only=True)["callbacks"]
    assert {states[pruning.state_key]["key"] for pruning in prunings} == {pruning.key for pruning in prunings}
    assert len({pruning.key for pruning in prunings}) == 2
    forbid_pruning()
    again = Pair()
    trainer(*pair(tmp_path), max_epochs=2).fit(again, loader(), ckpt_path=str(last))
    assert same(again, module)
    validated = Pair()
    trainer(*pair(tmp_path)).validate(validated, loader())
    assert same(validated, module)


def test_a_checkpoint_of_other_prunings_is_refused_whichever_callback_reads_it(tmp_path):
    saving = ModelCheckpoint(tmp_path / "checkpoints", save_last=True)
    trainer(*pair(tmp_path), saving, enable_checkpointing=True).fit(Pair(), loader())
    last = str(tmp_path / "checkpoints" / "last.ckpt")
    changed = [pair(tmp_path)[0], callback(tmp_path / "other", blocks="layers", alpha=1.0)]
    with pytest.raises(ValueError, match="this one was trained on another"):
        trainer(*changed, max_epochs=2).fit(Pair(), loader(), ckpt_path=last)
    moved = [pair(tmp_path)[0], callback(tmp_path / "moved", blocks="layers")]
    (tmp_path / "layers").rename(tmp_path / "moved")
    trainer(*moved, max_epochs=2).fit(Pair(), loader(), ckpt_path=last)


@pytest.mark.parametrize("keys", [1, 2])
def test_the_module_is_told_of_all_prunings(tmp_path, keys):
    class Told(Pair):
        pruned_backbone_key = None

    modules = [Told(), Told()]
    for module in modules:
        trainer(*(pair(tmp_path) if keys == 2 else pair(tmp_path)[:1])).fit(module, loader())
    other = Told()
    trainer(pair(tmp_path)[0]).validate(other, loader())
    assert modules[0].pruned_backbone_key == modules[1].pruned_backbone_key
    assert (other.pruned_backbone_key == modules[0].pruned_backbone_key) == (keys == 1)


@pytest.mark.parametrize("options", [{}, {"method": "magnitude"}, {"method": "sparsegpt"}, {"rounds": 3}])
@pytest.mark.parametrize("batches", [True, 2])
def test_fast_dev_run_prunes_a_little_and_keeps_nothing(folder, caplog, batches, options):
    module, dense, pruning = Tiny(), Tiny(), callback(folder, **options)
    fit(pruning, module, fast_dev_run=batches)
    num_blocks = int(batches)
    assert f"Sparsity after the fit: 50.0% of {256 * num_blocks} weights" in caplog.text
    for index, (layer, before) in enumerate(zip(module.layers, dense.layers, strict=True)):
        assert bool((layer.up.weight == 0).any()) == (index < num_blocks)
        assert index < num_blocks or torch.equal(layer.up.weight, before.up.weight)
    assert len(pruning.report.blocks) == num_blocks
    assert not folder.exists()
    assert f"only the first {num_blocks} block" in caplog.text
    with pytest.raises(ValueError, match="build the module anew"):
        fit(pruning, module)
    assert fit(callback(folder, **options)).layers[2].up.weight.count_nonzero() < dense.layers[2].up.weight.numel()


def test_fast_dev_run_takes_a_complete_pruning_and_checks_the_options(folder, forbid_pruning):
    with pytest.raises(ValueError, match="does not divide"):
        fit(callback(folder, sparsity_pattern="5:10"), fast_dev_run=True)
    module = fit(callback(folder))
    forbid_pruning()
    assert same(fit(callback(folder), fast_dev_run=True), module)
    with pytest.raises(ValueError, match="differs in `sparsity_pattern`"):
        fit(callback(folder, sparsity_pattern="1:4"), fast_dev_run=True)


# -- how foreign modules are built and called -------------------------------------------------------------------------


class InConfigureModel(Tiny):
    def __init__(self, once):
        LightningModule.__init__(self)
        self.learning_rate, self.once = 0.0, once

    def configure_model(self):
        if not (self.once and hasattr(self, "layers")):
            for name, part in Tiny().named_children():
                setattr(self, name, part)


class InSetup(InConfigureModel):
    def configure_model(self):
        pass

    def setup(self, stage):
        super().configure_model()


def test_a_module_that_builds_in_configure_model_is_built_first(folder):
    pruning = callback(folder)
    module = fit(pruning, InConfigureModel(once=True))
    assert same(module, fit(callback(folder)))
    assert (module.layers[0].up.weight == 0).float().mean() == 0.5


def test_a_module_that_is_built_twice_is_refused(folder):
    with pytest.raises(ValueError, match="InConfigureModel built it anew afterwards; build the model once"):
        fit(callback(folder), InConfigureModel(once=False))


def test_a_module_that_builds_in_setup_is_refused(folder):
    with pytest.raises(ValueError, match="move what builds it from `setup` to `configure_model`"):
        fit(callback(folder), InSetup(once=True))


def test_weights_that_are_loaded_too_late_are_noticed(folder):
    class LoadsLate(Tiny):
        def setup(self, stage):
            self.load_state_dict(Tiny(seed=2).state_dict())

    with pytest.raises(ValueError, match="LoadsLate filled it with other values afterwards; load weights in"):
        fit(callback(folder), LoadsLate())


class StepOnly(Tiny):
    """A module whose forward is not its own, and that logs before it computes."""

    forward = LightningModule.forward

    def training_step(self, batch):
        self.log("rows", float(len(batch[0])))
        return Tiny.forward(self, batch[0]).mean()


class Special(Tiny):
    def forward(self, *args):
        raise AssertionError("not this one")

    def training_step(self, batch, batch_idx):
        return Tiny.forward(self, batch[0]).mean()

    def calibration_forward(self, batch):
        return Tiny.forward(self, batch[0])


@pytest.mark.parametrize("kind", [StepOnly, Special])
def test_modules_are_called_as_they_can_be(folder, kind):
    module = fit(callback(folder), kind())
    expected = fit(callback(folder.with_name("plain")))
    assert same(module, expected)
    assert "log" not in vars(module)


def test_a_module_like_no_other_is_called_by_an_override(folder):
    class Mine(WandaPPPruneCallback):
        def forward_batch(self, pl_module, batch):
            return pl_module(batch[0] % 4)

        def token_mask(self, batch):
            return batch[0] > 8

    pruning = Mine(method="wanda", num_calibration_samples=8, output_dir=str(folder))
    fit(pruning)
    counted = torch.cat([batch[0] for batch in loader()])[:8] > 8
    assert pruning.report.num_tokens == int(counted.sum())


def test_the_callback_is_written_in_yaml(tmp_path):
    parser = LightningArgumentParser()
    parser.add_subclass_arguments(WandaPPPruneCallback, "pruning")
    config = tmp_path / "config.yaml"
    config.write_text("""
class_path: wandazeta.callbacks.WandaPPPruneCallback
init_args:
  sparsity_pattern: "4:8"
  method:
    class_path: wandazeta.pruning.RO
    init_args: {optimisation: {rounds: 3}}
  exclude_modules: [o_proj, ".*down"]
  calibration:
    class_path: lightning.pytorch.demos.boring_classes.BoringDataModule
""")
    pruning = parser.instantiate_classes(parser.parse_args([f"--pruning={config}"]))
    assert pruning.pruning.options.pattern.group == (4, 8)
    assert pruning.pruning.options.method == RO(RegionalOptimisation(rounds=3))
    assert pruning.pruning.options.exclude_modules == ("o_proj", ".*down")
    assert type(pruning.pruning.calibration).__name__ == "BoringDataModule"


WRITTEN = "{class_path: wandazeta.pruning.WandaPP, init_args: {alpha: auto, optimisation: {rounds: 12}}}"


@pytest.mark.parametrize(
    ("method", "arguments", "expected"),
    [
        ("wanda", [], Wanda()),
        ("wanda++", [], WandaPP()),
        (WRITTEN, [], WandaPP("auto", RegionalOptimisation(rounds=12))),
        (
            WRITTEN,
            ["init_args.method.init_args.optimisation.rounds=3", "init_args.method.init_args.alpha=5"],
            WandaPP(5.0, RegionalOptimisation(rounds=3)),
        ),
        (WRITTEN, ["init_args.method=sparsegpt"], SparseGPT()),
        (
            "wanda",
            ["init_args.method=RO", "init_args.method.init_args.optimisation.samples_per_round=7"],
            RO(RegionalOptimisation(samples_per_round=7)),
        ),
    ],
)
def test_a_method_is_a_name_or_an_object(tmp_path, method, arguments, expected):
    parser = LightningArgumentParser()
    parser.add_subclass_arguments(WandaPPPruneCallback, "pruning")
    config = tmp_path / "config.yaml"
    config.write_text(f"class_path: wandazeta.callbacks.WandaPPPruneCallback\ninit_args: {{method: {method}}}")
    parsed = parser.parse_args([f"--pruning={config}", *(f"--pruning.{argument}" for argument in arguments)])
    assert parser.instantiate_classes(parsed).pruning.options.method == expected
    again = parser.parse_string(parser.dump(parsed))
    assert parser.instantiate_classes(again).pruning.options.method == expected


@pytest.mark.parametrize(
    ("method", "message"),
    [
        ("wander", "`method` to be one of magnitude, wanda"),
        ("{class_path: wandazeta.pruning.RGS, init_args: {alpha: -1}}", "`alpha` to be a number of at least 0"),
        ("{class_path: wandazeta.pruning.RGS, init_args: {rounds: 2}}", "'rounds' is not accepted"),
        ("{class_path: wandazeta.pruning.RO, init_args: {optimisation: {rounds: -1}}}", "`rounds` to be an integer of"),
    ],
)
def test_a_wrong_method_in_a_file_is_named(tmp_path, capsys, method, message):
    parser = LightningArgumentParser()
    parser.add_subclass_arguments(WandaPPPruneCallback, "pruning")
    config = tmp_path / "config.yaml"
    config.write_text(f"class_path: wandazeta.callbacks.WandaPPPruneCallback\ninit_args: {{method: {method}}}")
    with pytest.raises((ValueError, SystemExit)) as error:
        parser.instantiate_classes(parser.parse_args([f"--pruning={config}"]))
    assert message in f"{error.value}{capsys.readouterr().err}"


def test_padding_is_found_in_the_attention_mask():
    pruning = WandaPPPruneCallback()
    mask = torch.tensor([[1, 1, 0]])
    assert torch.equal(pruning.token_mask({"attention_mask": mask}), mask.bool())
    assert pruning.token_mask({"input_ids": mask}) is None
    assert pruning.token_mask([mask]) is None


@pytest.mark.parametrize("method", ["wanda", "wanda++"])
def test_by_default_all_samples_are_used_where_there_are_few(folder, forbid_pruning, method, caplog):
    def pruning():
        return WandaPPPruneCallback(method=method, output_dir=str(folder))

    first = pruning()
    expected = fit(first)
    assert first.report.num_samples == 16
    assert "Calibrating on all 16 samples of the data" in caplog.text
    forbid_pruning()
    assert same(fit(pruning()), expected)
    # known from the folder where no data are read
    trainer(pruning()).validate(Tiny(), loader())
    # the same pruning as by the number itself
    assert same(fit(WandaPPPruneCallback(method=method, num_calibration_samples=16, output_dir=str(folder))), expected)


def test_by_default_128_samples_are_used_where_there_are_more(folder, caplog):
    pruning = WandaPPPruneCallback(method="wanda", output_dir=str(folder))
    fit(pruning, data=loader(num_samples=140))
    assert pruning.report.num_samples == 128
    assert "Calibrating on all" not in caplog.text


# -- what a user gets wrong -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"sparsity_pattern": "4:2"}, "`sparsity_pattern`"),
        ({"sparsity_pattern": "2:4", "sparsity": 0.6}, "`sparsity`"),
        ({"method": "sparse"}, "`method`"),
        ({"num_calibration_samples": 0}, "`num_calibration_samples` to be an integer larger than 0"),
        (
            {"num_calibration_samples": 8, "method": RO(RegionalOptimisation(samples_per_round=9))},
            r"`samples_per_round` to be at most the number of calibration samples \(8\)",
        ),
        ({"device": "tpu-of-mine"}, "`device`"),
        ({"exclude_modules": "up"}, "`exclude_modules` to be a list"),
    ],
)
def test_options_are_checked_when_they_are_given(arguments, message):
    with pytest.raises(ValueError, match=message):
        WandaPPPruneCallback(**arguments)


@pytest.mark.parametrize(
    ("arguments", "data", "message"),
    [
        ({"sparsity_pattern": "2:3"}, None, "'2:3' does not divide the 8 inputs"),
        ({"exclude_modules": ["upp"]}, None, "did you mean `up`"),
        ({"blocks": "layer"}, None, "did you mean `layers`"),
        ({"num_calibration_samples": 17}, None, "`num_calibration_samples` to be at most 16"),
        ({}, [], "empty loader"),
        ({"output_dir": "/proc/pruned"}, None, "`output_dir` to be a folder that can be written to"),
    ],
)
def test_what_does_not_fit_is_said_before_any_work(folder, forbid_pruning, arguments, data, message):
    forbid_pruning()
    module = Tiny()
    with pytest.raises(ValueError, match=message) as error:
        fit(callback(arguments.pop("output_dir", folder), **arguments), module, data)
    assert "\n" not in str(error.value)
    assert same(module, Tiny())
