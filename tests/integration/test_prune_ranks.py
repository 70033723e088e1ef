"""Ranks that share the samples out: all end with the same weights, close to those of one rank, and stop together."""

import json
import os
import signal
import socket
import subprocess
import sys
import textwrap

import pytest
import torch
from helpers.experts import Mixture, mixture_loader
from helpers.pruning import Tiny, callback, loader, trainer
from safetensors.torch import load_file

SCRIPT = """
    import json, os, signal, sys

    sys.path.insert(0, sys.argv[1])
    sys.path.insert(0, sys.argv[1] + "/../benchmarks")
    from scaling import CountBytes
    from helpers.experts import Mixture, mixture_loader
    from helpers.processes import leave_process_group
    from lightning.pytorch import Callback
    from helpers.pruning import Tiny, callback, loader, trainer
    from safetensors.torch import save_file
    from wandazeta.pruning.method.block import BlockPruner

    folder, case, options = sys.argv[2], sys.argv[3], json.loads(sys.argv[4])
    rank, size = os.environ["RANK"], int(os.environ["WORLD_SIZE"])
    if case == "stop" and rank == "0":
        finish = BlockPruner.finish

        def finishing(block, *args):
            if block.index == 1:
                os.kill(os.getpid(), signal.SIGTERM)
            return finish(block, *args)

        BlockPruner.finish = finishing
    counter = CountBytes()
    counter.counting = True

    class StopCounting(Callback):  # what DDP sends when it is set up is no matter of the pruning
        def setup(self, *args, **kwargs):
            counter.counting = False

    has_experts = case == "experts"
    module = Mixture(learning_rate=0.0) if has_experts else Tiny(seed=7 if case == "other model" and rank == "1" else 0)
    seen = []
    layers = module.model.model.layers if has_experts else module.layers
    data = mixture_loader() if has_experts else loader()
    layers[0].register_forward_hook(lambda block, args, output: seen.append(len(args[0])))
    # the other ranks need not see the folder
    pruning = callback(folder + ("/pruned" if rank == "0" else f"/elsewhere-{rank}"), **options)
    trainer(pruning, StopCounting(), strategy="ddp", devices=size, limit_train_batches=1).fit(module, data)
    save_file({k: v.contiguous() for k, v in module.state_dict().items()}, f"{folder}/{rank}.safetensors")
    record = pruning.report.blocks[0].to_dict()
    report = {"key": pruning.key, "rows": sum(seen), "samples": record["num_samples"], "loss": record["loss_after"]}
    report["bytes"], report["tokens"] = counter.bytes, [record["layers"][-1]["expert_tokens"], record["num_tokens"]]
    open(f"{folder}/{rank}.json", "w").write(json.dumps(report))
    leave_process_group()
"""


def run(repository, folder, case="prune", size=2, **options):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shared = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(size), "NODE_RANK": "0"}
    # as torchrun does it, so that each rank's exit code is seen
    shared["TORCHELASTIC_RUN_ID"] = "test"
    arguments = [str(repository / "tests"), str(folder), case, json.dumps(options)]
    command = [sys.executable, "-c", textwrap.dedent(SCRIPT), *arguments]
    ranks = []
    for rank in map(str, range(size)):
        env = {**shared, "RANK": rank, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": str(size), "GROUP_RANK": "0"}
        ranks.append(subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True))
    errors = [process.communicate(timeout=240)[1] for process in ranks]
    return [process.returncode for process in ranks], errors


@pytest.mark.slow
@pytest.mark.parametrize(
    ("size", "options"),
    [
        (2, {"method": "wanda++", "rounds": 2, "learning_rate": 1e-3}),
        (2, {"method": "sparsegpt"}),
        (2, {"method": "tuned-ro", "rounds": 2, "num_calibration_samples": 16}),
        (4, {"method": "wanda", "num_calibration_samples": 6}),
    ],
    ids=["a step by one rank", "gram matrices", "held-out errors", "uneven shares"],
)
def test_ranks_share_the_samples_and_end_with_the_same_weights(repository, tmp_path, size, options):
    codes, errors = run(repository, tmp_path, size=size, **options)
    assert codes == [0] * size, errors
    states = [load_file(tmp_path / f"{rank}.safetensors") for rank in range(size)]
    reports = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(size)]
    assert all(torch.equal(state[name], states[0][name]) for state in states for name in state)
    assert all(report["key"] == reports[0]["key"] for report in reports)
    assert not list(tmp_path.glob("elsewhere-*")), "rank 0 alone writes"

    single, alone, seen = Tiny(), callback(tmp_path / "single", **options), []
    single.layers[0].register_forward_hook(lambda block, args, output: seen.append(len(args[0])))
    trainer(alone, limit_train_batches=1).fit(single, loader())
    assert all(report["rows"] < 0.8 * sum(seen) for report in reports), "each rank runs its own samples"
    total = alone.report.blocks[0].num_samples
    assert all(report["samples"] == total for report in reports)
    for name, weight in single.state_dict().items():
        # sums over ranks round otherwise: the last digits differ, and no mask
        torch.testing.assert_close(states[0][name], weight, rtol=1e-3, atol=1e-4, msg=name)
        assert torch.equal(states[0][name] == 0, weight == 0), name
    assert reports[0]["loss"] == pytest.approx(alone.report.blocks[0].loss_after, rel=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("options", [{"method": "wanda++"}, {"method": "sparsegpt"}])
def test_ranks_sum_the_tokens_of_every_expert(repository, tmp_path, options):
    options = {"learning_rate": 1e-4, "rounds": 2, **options}
    codes, errors = run(repository, tmp_path, "experts", **options)
    assert codes == [0, 0], errors
    states = [load_file(tmp_path / f"{rank}.safetensors") for rank in range(2)]
    assert all(torch.equal(states[1][name], weight) for name, weight in states[0].items())
    single, alone = Mixture(learning_rate=0.0), callback(tmp_path / "single", **options)
    trainer(alone, limit_train_batches=1).fit(single, mixture_loader())
    for name, weight in single.state_dict().items():
        torch.testing.assert_close(states[0][name], weight, rtol=1e-3, atol=1e-4, msg=name)
    # the tokens of both ranks, of which each has two experts
    (tokens, num_tokens) = json.loads((tmp_path / "0.json").read_text())["tokens"]
    assert sum(tokens) == 2 * num_tokens


@pytest.mark.slow
def test_statistics_and_weights_go_over_the_wire_once_a_block(repository, tmp_path):
    sent = {}
    for num_samples in (8, 16):
        folder = tmp_path / str(num_samples)
        folder.mkdir()
        codes, errors = run(repository, folder, method="wanda", num_calibration_samples=num_samples)
        assert codes == [0, 0], errors
        sent[num_samples] = json.loads((folder / "1.json").read_text())["bytes"]
    assert sent[8] == sent[16], "however many samples there are"
    # of three blocks: squares of the inputs in fp64, weights in fp32, and some numbers of 8 bytes
    tensors = 3 * (8 * (8 + 16) + 4 * 2 * 8 * 16)
    assert tensors < sent[8] < tensors + 3 * 200


@pytest.mark.slow
def test_another_number_of_ranks_loads_what_is_finished(repository, tmp_path):
    options = {"method": "wanda"}
    (tmp_path / "pruned").mkdir()
    single = Tiny()
    trainer(callback(tmp_path / "pruned", **options), limit_train_batches=1).fit(single, loader())
    codes, errors = run(repository, tmp_path, **options)
    assert codes == [0, 0], errors
    for rank in range(2):
        state = load_file(tmp_path / f"{rank}.safetensors")
        assert all(torch.equal(state[name], weight) for name, weight in single.state_dict().items())


@pytest.mark.slow
def test_stopped_and_started_again_the_same_bytes_come_out(repository, tmp_path):
    undisturbed, stopped = tmp_path / "undisturbed", tmp_path / "stopped"
    undisturbed.mkdir()
    stopped.mkdir()
    options = {"method": "tuned-ro", "rounds": 2}
    codes, errors = run(repository, undisturbed, **options)
    assert codes == [0, 0], errors
    codes, errors = run(repository, stopped, "stop", **options)
    assert codes[0] == 128 + signal.SIGTERM
    assert codes[1] != 0
    assert "Stopped by SIGTERM while pruning" in errors[0]
    assert len(list((stopped / "pruned").glob("block_*.safetensors"))) == 2
    codes, errors = run(repository, stopped, **options)
    assert codes == [0, 0], errors
    for path in (undisturbed / "pruned").glob("*.safetensors"):
        assert (stopped / "pruned" / path.name).read_bytes() == path.read_bytes()
    for rank in range(2):
        assert (stopped / f"{rank}.safetensors").read_bytes() == (undisturbed / f"{rank}.safetensors").read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("case", "options", "messages"),
    [
        ("prune", {"exclude_modules": ["upp"]}, ("did you mean `up`", "did you mean `up`")),
        ("other model", {}, ("Failed on rank 1: Expected every rank to prune the same model", "model tensors")),
    ],
)
def test_what_does_not_fit_on_one_rank_ends_all(repository, tmp_path, case, options, messages):
    codes, errors = run(repository, tmp_path, case, **options)
    assert codes == [1, 1]
    assert all(message in error for message, error in zip(messages, errors, strict=True)), errors
    assert not list((tmp_path / "pruned").glob("block_*.safetensors"))
