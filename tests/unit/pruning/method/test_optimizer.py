"""Fused steps and their kernels, on a GPU, or on a CPU in Triton's interpreter, which takes a process of its own."""

import itertools
import os
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from helpers.architectures import build, token_batches
from helpers.graphs import FailingGraphs, RecordedGraphs
from helpers.interpreter import run_interpreted
from helpers.prune_model import prune
from torch import nn

from wandazeta.pruning.method import optimizer, regional
from wandazeta.pruning.method.optimizer import (
    FusedBlockOptimizer,
    MasterWeights,
    TorchBlockOptimizer,
    load_kernels,
    make_optimizer,
)
from wandazeta.pruning.method.statistics import InputStatistics
from wandazeta.pruning.methods import RegionalOptimisation
from wandazeta.utilities.graphs import GraphedCall
from wandazeta.utilities.ranks import Ranks

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
needs_kernels = pytest.mark.skipif(
    not (INTERPRETED or torch.cuda.is_available()), reason="no CUDA device, and not in Triton's interpreter"
)


def test_kernels_in_the_interpreter():
    pytest.importorskip("triton")
    shown = run_interpreted("-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", __file__)
    assert "skipped" not in shown


def convert(values, source, target, rounding_mode):
    """Cast between float32 and bfloat16 to nearest, as GPUs do; the interpreter cuts digits off."""
    if target.is_bf16():
        return torch.from_numpy(values).bfloat16().view(torch.int16).numpy()
    return torch.from_numpy(values.view("int16")).view(torch.bfloat16).float().numpy()


@pytest.fixture
def use_kernels(monkeypatch):
    """Use the kernels on a CPU, too, as on a GPU."""

    def use():
        if INTERPRETED:
            from wandazeta.pruning.method import kernels

            monkeypatch.setattr("triton.runtime.interpreter._convert_float", convert)
            for module in (optimizer, regional):
                monkeypatch.setattr(module, "load_kernels", lambda weights: kernels)

    return use


def test_kernels_compile_for_a_gpu(tmp_path, monkeypatch):
    """The interpreter runs code that no compiler would take."""
    triton = pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from wandazeta.pruning.method import kernels

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    tensors = dict.fromkeys(("master", "square", "average", "rate", "schedule", "scale", "total"), "*fp32")
    tensors |= {"gradient": "*bf16", "weight": "*bf16", "mask": "*u8", "number": "*i32", "num_values": "i32"}
    constants = {"beta1": 0.9, "beta2": 0.999, "epsilon": 1e-8, "size": 4096}
    for kernel in (kernels._step, kernels._add_square):
        types = {name: tensors.get(name, "constexpr") for name in kernel.arg_names}
        values = {(at,): constants[name] for at, name in enumerate(kernel.arg_names) if name in constants}
        aligned = {(at,): [["tt.divisibility", 16]] for at, name in enumerate(kernel.arg_names) if name in tensors}
        source = ASTSource(kernel, types, values, aligned)
        compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 8})
        # 16 bytes at once
        assert "ld.global.v4.b32" in compiled.asm["ptx"]


@pytest.fixture
def device():
    return torch.device("cpu" if INTERPRETED else "cuda")


class TwoRanks(Ranks):
    """The first of two ranks, the other of which has the same gradients."""

    def __init__(self):
        super().__init__(0, 2)
        self.dtypes = set()

    def all_reduce_(self, tensors):
        self.dtypes |= {tensor.dtype for tensor in tensors}
        for tensor in tensors:
            tensor.mul_(2)


RATES = {"odd": 0.01, "large": 0.002}
NUM_STEPS = 5
FACTORS = [1 - number / NUM_STEPS for number in range(NUM_STEPS)]


def reference(start, gradients, algorithm, masks):
    """The steps by torch's optimizers on float32 weights, written out."""
    masters = {name: nn.Parameter(weight.float()) for name, weight in start.items()}
    groups = [{"params": [masters[name]], "lr": rate} for name, rate in RATES.items()]
    steps = torch.optim.RMSprop(groups) if algorithm == "rmsprop" else torch.optim.AdamW(groups, weight_decay=0.0)
    for number in range(NUM_STEPS):
        for group, rate in zip(steps.param_groups, RATES.values(), strict=True):
            group["lr"] = rate * FACTORS[number]
        for name, master in masters.items():
            gradient = gradients[number].get(name)
            master.grad = torch.zeros_like(master) if gradient is None else gradient.float()
        steps.step()
        with torch.no_grad():
            for name, master in masters.items():
                if masks is not None:
                    master.mul_(masks[name])
    return masters


DTYPES = [torch.bfloat16, torch.float16, torch.float32]
ALGORITHMS = [("rmsprop", False), ("adamw", True)]
STEPS = [(*algorithm, dtype, Ranks) for algorithm, dtype in itertools.product(ALGORITHMS, DTYPES)]
STEPS += [("adamw", True, torch.bfloat16, TwoRanks), ("rmsprop", False, torch.float32, TwoRanks)]


@pytest.mark.gpu
@needs_kernels
@pytest.mark.parametrize(("algorithm", "masked", "dtype", "ranks"), STEPS)
def test_a_fused_step_equals_torch_optimizers_with_masks_and_a_cast(
    algorithm, masked, dtype, ranks, device, use_kernels
):
    use_kernels()
    check_steps(FusedBlockOptimizer, algorithm, masked, dtype, ranks(), device)


@pytest.mark.parametrize(("algorithm", "masked", "dtype", "ranks"), STEPS)
def test_a_step_of_torch_is_masked_and_cast(algorithm, masked, dtype, ranks):
    check_steps(TorchBlockOptimizer, algorithm, masked, dtype, ranks(), torch.device("cpu"))


def check_steps(kind, algorithm, masked, dtype, ranks, device):
    torch.manual_seed(0)
    # the second takes more than one program, and no multiple of what a thread reads
    layers = {"odd": nn.Linear(7, 13), "large": nn.Linear(67, 65)}
    layers = {name: layer.to(device, dtype) for name, layer in layers.items()}
    start = {name: layer.weight.detach().clone() for name, layer in layers.items()}
    masks = {name: torch.rand_like(weight.float()) < 0.5 for name, weight in start.items()} if masked else None
    gradients = [{name: 0.1 * torch.randn_like(weight) for name, weight in start.items()} for _ in range(NUM_STEPS)]
    # in one step no token reaches a layer
    del gradients[2]["odd"]

    master = MasterWeights(layers)
    steps = make_optimizer(master, algorithm, list(RATES.values()), FACTORS, ranks, masks)
    assert type(steps) is kind
    addresses = set()
    for number in range(NUM_STEPS):
        losses = [(layers[name].weight.float() * gradient).sum() for name, gradient in gradients[number].items()]
        # another factor in float16 each time, as a constant one would cancel
        num_values = 2 ** (6 + number)
        (sum(losses) * master.loss_scale(num_values)).backward()
        steps.take_gradients([layer.weight.grad for layer in layers.values()], num_values)
        steps.step()
        assert all(parameter.grad is None for parameter in (*master.weights.values(), *master.masters.values()))
        state = [*master.weights.values(), *master.masters.values(), *steps._masks.values()]
        if kind is FusedBlockOptimizer:
            state += [t for layer in steps._layers.values() for t in vars(layer).values() if t is not None]
        addresses.add(tuple(tensor.data_ptr() for tensor in state))
    assert len(addresses) == 1

    if ranks.size == 2:
        assert ranks.dtypes == {torch.float32}
        gradients = [{name: 2 * gradient.float() for name, gradient in step.items()} for step in gradients]
    masters = reference(start, gradients, algorithm, masks)
    for name, layer in layers.items():
        # some roundings of numbers below one, and of steps of up to a tenth
        torch.testing.assert_close(master.masters[name], masters[name], rtol=0, atol=1e-6)
        rounded = master.masters[name].to(dtype)
        if masked:
            rounded = torch.where(masks[name], rounded, 0.0)
        assert layer.weight.dtype == dtype
        # the bits, so that zeros are positive
        assert torch.equal(layer.weight.detach().view(torch.uint8), rounded.detach().view(torch.uint8))


@pytest.mark.gpu
@needs_kernels
@pytest.mark.parametrize("dtype", DTYPES)
def test_squares_of_gradients_are_summed_without_a_copy(dtype, device, use_kernels):
    torch.manual_seed(0)
    layer = nn.Linear(67, 65).to(device, dtype)
    hidden = [torch.randn(1, tokens, 67).to(device, dtype) for tokens in (3, 5)]
    # before the kernels are used
    squares = []
    for states in hidden:
        norm = layer(states).float().norm() * (1024 if dtype == torch.float16 else 1)
        squares.append(torch.autograd.grad(norm, layer.weight)[0].float().square())
    use_kernels()
    found = regional.regional_gradients(
        lambda batch, states: layer(states), {"up": layer}, hidden, [None] * 2, InputStatistics({"up": layer}),
        lambda output: None, Ranks(),
    )  # fmt: skip
    expected = (sum(squares) / 2).sqrt() / (1024 if dtype == torch.float16 else 1)
    torch.testing.assert_close(found["up"], expected, rtol=1e-6, atol=0)


@pytest.mark.gpu
@needs_kernels
@pytest.mark.parametrize(
    "options",
    [
        {"method": "wanda++"},
        {"method": "tuned-ro", "rounds": 2},
    ],
)
def test_a_pruning_with_kernels_is_that_without(options, device, use_kernels, monkeypatch):
    reports, weights, fused_steps = [], [], []
    step = FusedBlockOptimizer.step
    monkeypatch.setattr(FusedBlockOptimizer, "step", lambda self: fused_steps.append(step(self)))
    for fused in (False, True):
        with pytest.MonkeyPatch.context() as patch:
            if fused:
                use_kernels()
            else:
                for module in (optimizer, regional):
                    patch.setattr(module, "load_kernels", lambda weights: None)
            model, blocks = build("llama")
            run = {"block_name": blocks, "device": device}
            reports.append(prune(model.to(device), token_batches(4), run=run, **options))
        weights.append(torch.cat([p.detach().flatten() for p in model.get_submodule(blocks).parameters()]))
        assert bool(fused_steps) == fused
    plain, found = weights
    assert ((plain == 0) == (found == 0)).float().mean() > 0.999
    assert (plain - found).norm() < 1e-3 * plain.norm()
    assert reports[1].blocks[-1].loss_after == pytest.approx(reports[0].blocks[-1].loss_after, rel=1e-3)


def test_other_devices_and_precisions_take_torch():
    layer = nn.Linear(4, 4)
    assert load_kernels([layer.weight]) is None
    if torch.cuda.is_available():
        assert load_kernels([layer.double().cuda().weight]) is None


class TorchKernels:
    """RMSprop by operations that change tensors at fixed addresses, as the kernels do."""

    LayerState = SimpleNamespace

    def __init__(self):
        self.num_steps = 0

    def step(self, layer, gradient, mask, schedule, number, scale, betas, epsilon):
        self.num_steps += 1
        gradient = gradient / scale
        layer.square.mul_(betas[1]).addcmul_(gradient, gradient, value=1 - betas[1])
        factor = layer.rate * schedule.index_select(0, number.view(1).long())[0, 0]
        layer.master.sub_(factor * gradient / (layer.square.sqrt() + epsilon))


def test_a_graph_contains_the_steps(monkeypatch):
    weights = []
    for backend in (None, FailingGraphs(), RecordedGraphs()):
        kernels = TorchKernels()
        monkeypatch.setattr(optimizer, "load_kernels", lambda weights, kernels=kernels: kernels)
        torch.manual_seed(0)
        layers = {"up": nn.Linear(4, 3)}
        master, mask = MasterWeights(layers), torch.rand_like(layers["up"].weight) < 0.5
        hidden = list(torch.randn(6, 1, 2, 4))
        regional.optimise_block(
            lambda batch, states, layers=layers: layers["up"](states),
            master,
            partial(master.apply_masks, {"up": mask}),
            hidden,
            [torch.ones(1, 2, 3)] * 6,
            [None] * 6,
            InputStatistics(layers),
            RegionalOptimisation(rounds=2, samples_per_round=5, learning_rate=0.1),
            torch.Generator().manual_seed(0),
            Ranks(),
            partial(GraphedCall, keys=["a"] * 6, backend=backend),
        )
        weights.append(layers["up"].weight)
    assert torch.equal(weights[0], weights[1])
    assert torch.equal(weights[0], weights[2])
    # one as usual, one in the capture, and all others in replays
    assert kernels.num_steps == 2
    assert backend.num_replays == 9
