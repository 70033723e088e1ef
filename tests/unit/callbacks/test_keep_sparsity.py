import pytest
import torch
from helpers.masked import is_positive_zero, prunable, reference, sparse_tiny
from helpers.pruning import Tiny, callback, loader, same, trainer
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.strategies import FSDPStrategy
from safetensors.torch import save_file

from wandazeta.callbacks import KeepSparsity

OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.1),
    "nesterov": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1, amsgrad=True),
    "adam with coupled decay": lambda p: torch.optim.Adam(p, lr=0.01, weight_decay=0.1),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.01, momentum=0.9, centered=True),
}


def fit(module, make_optimizer, *callbacks, steps=6, keep=None, ckpt_path=None, data=None, **kwargs):
    module.configure_optimizers = lambda: make_optimizer(module.parameters())
    run = trainer(keep or KeepSparsity(), *callbacks, max_steps=steps, max_epochs=-1, **kwargs)
    run.fit(module, data or loader(), ckpt_path=ckpt_path)
    return run


def pruned_places(module=None):
    return {name: weight == 0 for name, weight in prunable(module or sparse_tiny()).items()}


def assert_held(module, optimizers, places=None):
    """Weights and every momentum are +0.0 where pruned, and something elsewhere."""
    for name, pruned in (places or pruned_places()).items():
        weight = module.get_parameter(name)
        assert is_positive_zero(weight[pruned]), name
        for optimizer in optimizers:
            for key, state in optimizer.state.get(weight, {}).items():
                if state.shape == weight.shape:
                    assert is_positive_zero(state[pruned]), (name, key)
                    assert bool(state[~pruned].any()), (name, key)


# -- against a plain loop ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_it_trains_what_a_plain_loop_with_masked_gradients_trains(kind):
    module, plain = sparse_tiny(), sparse_tiny()
    run = fit(module, OPTIMIZERS[kind])
    reference(plain, OPTIMIZERS[kind], 6)
    assert same(module, plain)
    assert not same(module, sparse_tiny())
    assert_held(module, run.optimizers)


def test_accumulated_gradients_and_a_norm_of_kept_weights_only():
    module, plain = sparse_tiny(), sparse_tiny()
    # far below the norm of the gradients: a step is as long as the clipping says
    run = fit(module, OPTIMIZERS["sgd"], steps=2, accumulate_grad_batches=2, gradient_clip_val=0.05)
    reference(plain, OPTIMIZERS["sgd"], 2, accumulate=2, clip=0.05)
    for name, weight in plain.named_parameters():
        torch.testing.assert_close(module.get_parameter(name), weight, atol=1e-7, rtol=1e-5)
    assert_held(module, run.optimizers)


class Langevin(torch.optim.SGD):
    """Writes to every weight, whatever its gradient."""

    @torch.no_grad()
    def step(self, closure=None):
        loss = super().step(closure)
        for group in self.param_groups:
            for weight in group["params"]:
                weight.add_(torch.randn_like(weight), alpha=1e-3)
                self.state[weight]["noise"] = torch.randn_like(weight)
        return loss


def test_an_optimizer_that_adds_noise():
    module = sparse_tiny()
    run = fit(module, lambda p: Langevin(p, lr=0.1))
    assert_held(module, run.optimizers)


class SeesGradients(Callback):
    """Looks at gradients as early as a callback can, and before each clipping."""

    def __init__(self):
        self.seen = 0

    def on_after_backward(self, trainer, module):
        for name, pruned in pruned_places().items():
            assert is_positive_zero(module.get_parameter(name).grad[pruned])
            self.seen += 1

    def on_before_optimizer_step(self, trainer, module, optimizer):
        self.on_after_backward(trainer, module)


def test_nobody_sees_a_gradient_of_a_pruned_weight():
    sees = SeesGradients()
    run = trainer(sees, KeepSparsity())
    run.fit(sparse_tiny(learning_rate=0.1), loader())
    assert sees.seen == 2 * 4 * 6


class Manual(Tiny):
    """Two optimizers, one of them for the last block, that a module steps itself; gradients are clipped by hand."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False
        self.load_state_dict(sparse_tiny().state_dict())

    def training_step(self, batch, batch_idx):
        for optimizer in self.optimizers():
            optimizer.zero_grad()
            with optimizer.toggle_model():
                self.manual_backward(Tiny.training_step(self, batch, batch_idx))
                self.clip_gradients(optimizer, gradient_clip_val=0.05, gradient_clip_algorithm="norm")
                optimizer.step()

    def configure_optimizers(self):
        last = list(self.layers[2].parameters())
        others = [p for name, p in self.named_parameters() if not name.startswith("layers.2")]
        return [OPTIMIZERS["sgd"](others), OPTIMIZERS["adamw"](last)]


def test_manual_optimization_with_several_optimizers():
    module, plain = Manual(), Manual()
    for model in (module, plain):
        model.dropout.p = 0.0
    run = trainer(KeepSparsity())
    run.fit(module, loader())
    assert_held(module, run.optimizers)
    masks = {name: (~pruned).float() for name, pruned in pruned_places().items()}
    optimizers = plain.configure_optimizers()
    for (tokens,) in loader():
        for optimizer in optimizers:
            plain.zero_grad()
            Tiny.training_step(plain, (tokens,), 0).backward()
            for name, mask in masks.items():
                plain.get_parameter(name).grad.mul_(mask)
            torch.nn.utils.clip_grad_norm_([p for g in optimizer.param_groups for p in g["params"]], 0.05)
            optimizer.step()
    assert same(module, plain)


def test_weights_that_are_frozen_at_first():
    class Thaw(Callback):
        def on_fit_start(self, trainer, module):
            module.layers[0].requires_grad_(False)

        def on_train_batch_start(self, trainer, module, batch, batch_idx):
            assert batch_idx > 0 or not module.layers[0].up.weight.requires_grad
            if batch_idx == 2:
                module.layers[0].requires_grad_(True)

    module = sparse_tiny()
    run = fit(module, OPTIMIZERS["adamw"], Thaw(), steps=4)
    assert not torch.equal(module.layers[0].up.weight, sparse_tiny().layers[0].up.weight)
    assert_held(module, run.optimizers)


# -- precision --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["bf16-mixed", "bf16-true", "16-mixed with a scaler"])
def test_precision_plugins(kind):
    options = {"precision": kind}
    if "scaler" in kind:
        # Lightning itself puts bf16 in the place of fp16 on a CPU
        options = {"plugins": MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=2.0**8))}
    module = sparse_tiny()
    run = fit(module, OPTIMIZERS["adamw"], gradient_clip_val=0.05, **options)
    assert module.layers[0].up.weight.dtype == (torch.bfloat16 if kind == "bf16-true" else torch.float32)
    assert not torch.equal(module.layers[0].up.weight.float(), sparse_tiny().layers[0].up.weight)
    assert_held(module, run.optimizers)


# -- where the masks come from ----------------------------------------------------------------------------------------


def test_what_has_no_zeros_or_nothing_else_is_left_alone():
    module = sparse_tiny()
    dense = Tiny(seed=5).layers[0].up.weight.detach()
    with torch.no_grad():
        module.layers[0].up.weight.copy_(dense)
        module.layers[1].up.weight.zero_()
    keep = KeepSparsity()
    fit(module, OPTIMIZERS["sgd"], keep=keep)
    assert not keep.held.masks.keys() & {"layers.0.up.weight", "layers.1.up.weight"}
    assert len(keep.held.masks) == 4
    assert (module.layers[1].up.weight != 0).all(), "the new layer was trained"


def masks_file(directory):
    """Where `wandazeta prune` puts it."""
    (directory / "sparsity").mkdir(exist_ok=True)
    return directory / "sparsity" / "masks.safetensors"


def test_masks_from_a_file_or_a_directory(tmp_path):
    places = pruned_places()
    # two places more than the zeros say, which are zero by chance
    module = sparse_tiny()
    with torch.no_grad():
        module.layers[0].up.weight[0, :] = 0.0
    save_file({name: ~pruned for name, pruned in places.items()}, masks_file(tmp_path))
    for masks in (tmp_path, masks_file(tmp_path)):
        keep = KeepSparsity(masks=str(masks))
        trained = sparse_tiny()
        trained.load_state_dict(module.state_dict())
        fit(trained, OPTIMIZERS["sgd"], keep=keep)
        assert all(torch.equal(~keep.held.masks[name], pruned) for name, pruned in places.items())
        assert bool(trained.layers[0].up.weight[0][~places["layers.0.up.weight"][0]].all()), "kept, so trained"


def test_it_holds_what_the_pruning_callback_has_just_pruned(tmp_path):
    module = Tiny()
    # in either order
    run = fit(module, OPTIMIZERS["adamw"], callback(tmp_path / "pruned"))
    fresh = Tiny()
    trainer(callback(tmp_path / "pruned")).validate(fresh, loader(), verbose=False)
    assert_held(module, run.optimizers, pruned_places(fresh))
    assert sum(int(pruned.sum()) for pruned in pruned_places(fresh).values()) == 3 * 2 * 8 * 16 // 2


# -- checkpoints ------------------------------------------------------------------------------------------------------


def saved(tmp_path, keep=None):
    module = sparse_tiny()
    # a whole epoch
    saving = ModelCheckpoint(tmp_path, "first", every_n_train_steps=4)
    fit(module, OPTIMIZERS["adamw"], saving, steps=4, keep=keep, enable_checkpointing=True)
    return tmp_path / "first.ckpt"


def share_a_layer(module):
    module.layers[1].up = module.layers[0].up


def share_a_block(module):
    module.layers[2] = module.layers[0]


def name_a_block_first(module):
    layers = module.layers
    del module.layers
    module.first, module.layers = layers[0], layers


@pytest.mark.parametrize("change", [share_a_layer, share_a_block, name_a_block_first])
@pytest.mark.parametrize("source", ["zeros", "file", "checkpoint"])
def test_a_layer_with_several_names_is_held(tmp_path, change, source):
    module = sparse_tiny()
    change(module)
    sparse = {name: weight == 0 for name, weight in module.named_parameters(remove_duplicate=False) if weight.ndim == 2}
    sparse = {name: zeros for name, zeros in sparse.items() if bool(zeros.any())}
    assert len(sparse) > len({module.get_parameter(name) for name in sparse})
    masks = None
    if source == "file":
        masks = str(tmp_path / "masks.safetensors")
        save_file({name: ~zeros for name, zeros in sparse.items()}, masks)
    saving = ModelCheckpoint(tmp_path, save_last=True)
    fit(module, OPTIMIZERS["adamw"], saving, keep=KeepSparsity(masks=masks), enable_checkpointing=True)
    if source == "checkpoint":
        fit(module, OPTIMIZERS["adamw"], steps=9, ckpt_path=str(tmp_path / "last.ckpt"))
    for name, zeros in sparse.items():
        assert is_positive_zero(module.get_parameter(name)[zeros]), name
        assert bool((module.get_parameter(name)[~zeros] != 0).all()), name


def test_a_resumed_run_has_the_masks_of_the_first_and_no_other_state(tmp_path):
    path = saved(tmp_path)
    content = torch.load(path, weights_only=True)
    # a kept weight that has become zero is to be trained on, and a checkpoint's momenta may be anything
    name = "layers.1.down.weight"
    kept = tuple(int(index) for index in (~pruned_places()[name]).nonzero()[0])
    content["state_dict"][name][kept] = 0.0
    for state in content["optimizer_states"][0]["state"].values():
        state["exp_avg"] += 1.0
    torch.save(content, path)
    module = Tiny()
    run = fit(module, OPTIMIZERS["adamw"], steps=8, ckpt_path=path)
    assert_held(module, run.optimizers)
    assert module.get_parameter(name)[kept] != 0


def test_resuming_is_bit_identical(tmp_path):
    path = saved(tmp_path)
    resumed, whole = Tiny(), sparse_tiny()
    resumed.dropout.p = 0.0
    fit(resumed, OPTIMIZERS["adamw"], steps=8, ckpt_path=path)
    fit(whole, OPTIMIZERS["adamw"], steps=8)
    assert same(resumed, whole)


def test_a_finished_run_that_is_started_again_has_nothing_to_do(tmp_path):
    path = saved(tmp_path)
    fit(sparse_tiny(), OPTIMIZERS["adamw"], steps=4, ckpt_path=path)


def test_a_checkpoint_of_other_masks_is_refused(tmp_path):
    path = saved(tmp_path)
    others = {name: ~pruned for name, pruned in pruned_places(sparse_tiny(seed=1)).items()}
    save_file(others, tmp_path / "others.safetensors")
    with pytest.raises(ValueError, match="those that the checkpoint was trained with"):
        fit(
            sparse_tiny(),
            OPTIMIZERS["adamw"],
            keep=KeepSparsity(masks=str(tmp_path / "others.safetensors")),
            ckpt_path=path,
        )
    content = torch.load(path, weights_only=True)
    content["state_dict"]["layers.1.down.weight"] += 1.0
    torch.save(content, path)
    with pytest.raises(ValueError, match=r"\d+ of `layers.1.down.weight` are not"):
        fit(sparse_tiny(), OPTIMIZERS["adamw"], ckpt_path=path)


# -- what is refused --------------------------------------------------------------------------------------------------


def test_writing_to_pruned_weights_behind_its_back_is_noticed():
    class Average(Callback):
        def on_train_end(self, trainer, module):
            with torch.no_grad():
                module.layers[2].down.weight.add_(1e-8)

    with pytest.raises(ValueError, match=r"64 are not, in 1 weights, first 64 of `layers.2.down.weight`"):
        fit(sparse_tiny(), OPTIMIZERS["sgd"], Average())


def test_minus_zero_is_noticed():
    class Negate(Callback):
        def on_train_end(self, trainer, module):
            with torch.no_grad():
                module.layers[2].down.weight.neg_()

    with pytest.raises(ValueError, match=r"first 64 of `layers.2.down.weight`"):
        fit(sparse_tiny(), OPTIMIZERS["sgd"], Negate())


def test_a_dense_model_is_refused_before_training(tmp_path):
    with pytest.raises(ValueError, match="none of 6 holds both zeros and other values"):
        fit(Tiny(), OPTIMIZERS["sgd"])
    save_file({name: ~pruned for name, pruned in pruned_places().items()}, masks_file(tmp_path))
    with pytest.raises(ValueError, match=r"64 of `layers.0.down.weight` are not; load the pruned weights"):
        fit(Tiny(), OPTIMIZERS["sgd"], keep=KeepSparsity(masks=str(tmp_path)))


def test_files_that_are_no_masks(tmp_path):
    for content, message in (
        (None, "where there is none"),
        ({"layers.0.up.weight": torch.zeros(16, 8)}, "file of bool masks"),
        ({"layers.0.up.weight": torch.zeros(8, 16, dtype=torch.bool)}, r"bool mask of shape \(16, 8\)"),
        ({"layers.0.upp.weight": torch.zeros(16, 8, dtype=torch.bool)}, r"did you mean `layers\.0\.up\.weight`"),
    ):
        if content is not None:
            save_file(content, masks_file(tmp_path))
        with pytest.raises(ValueError, match=message):
            fit(sparse_tiny(), OPTIMIZERS["sgd"], keep=KeepSparsity(masks=str(tmp_path)))
    masks_file(tmp_path).write_bytes(b"nothing")
    with pytest.raises(ValueError, match="to be a safetensors file"):
        fit(sparse_tiny(), OPTIMIZERS["sgd"], keep=KeepSparsity(masks=str(tmp_path)))


def test_strategies_that_flatten_gradients_are_refused():
    keep, run = KeepSparsity(), trainer()
    run.strategy_ = FSDPStrategy()
    run._accelerator_connector.strategy = run.strategy_
    with pytest.raises(ValueError, match=r"does not flatten weights.* use FSDP2 \(`ModelParallelStrategy`"):
        keep.setup(run, sparse_tiny(), "fit")
    keep.setup(run, sparse_tiny(), "validate")


def test_sharded_weights_are_refused_whatever_the_strategy():
    module = sparse_tiny()
    module.layers[0].up.weight.data = torch.empty(0)
    with pytest.raises(ValueError, match=r"complete floating-point weights on every rank, but `layers\.0\.up\.weight`"):
        KeepSparsity().on_train_start(None, module)


def test_a_file_and_blocks_contradict_each_other():
    with pytest.raises(ValueError, match="`blocks` to be left out"):
        KeepSparsity(masks="masks.safetensors", blocks="layers")


def test_nothing_is_held_after_the_fit():
    module = sparse_tiny()
    run = fit(module, OPTIMIZERS["sgd"], data=loader())
    module.training_step(next(iter(loader())), 0).backward()
    pruned = pruned_places()["layers.0.up.weight"]
    assert module.layers[0].up.weight.grad[pruned].any()
    run.optimizers[0].step()
    assert module.layers[0].up.weight[pruned].any()


def test_nothing_is_held_after_a_failed_fit():
    class Fail(Callback):
        def on_train_batch_end(self, *_):
            raise RuntimeError("of the test")

    module = sparse_tiny()
    with pytest.raises(RuntimeError, match="of the test"):
        fit(module, OPTIMIZERS["sgd"], Fail())
    module.training_step(next(iter(loader())), 0).backward()
    assert module.layers[0].up.weight.grad[pruned_places()["layers.0.up.weight"]].any()


def test_the_callback_is_written_in_yaml():
    from lightning.pytorch.cli import LightningArgumentParser

    parser = LightningArgumentParser()
    parser.add_subclass_arguments(KeepSparsity, "keep")
    made = parser.instantiate_classes(
        parser.parse_args(
            ["--keep=wandazeta.callbacks.KeepSparsity", "--keep.init_args.masks=runs/pruned/masks.safetensors"]
        )
    )
    assert made.keep.masks == "runs/pruned/masks.safetensors"
