import dataclasses
import json

import pytest
import torch
from torch import nn

from wandazeta.pruning.progress.folder import ProgressFolder
from wandazeta.pruning.progress.key import PruneKey
from wandazeta.pruning.pruner import BlockResult
from wandazeta.pruning.records import BlockRecord, LayerRecord, PruneReport

KEY = PruneKey(
    options={"alpha": 100.0, "sparsity_pattern": "2:4", "exclude_modules": ()},
    model={"layers.0.weight": "aa", "embedding.weight": "bb"},
    calibration={"num_samples": 8, "contents": "cc"},
    environment={"torch": "2.13.0"},
)


def block(index, value=1.0):
    layer = LayerRecord("0.weight", (4, 8), "2:4", 0.5, 0.1, 0.2)
    record = BlockRecord(index, f"layers.{index}", (layer,), 0.3, 0.1, seconds=1.5 + index, peak_memory=7)
    mask = torch.tensor([True, True, False, False] * 2).expand(4, 8).clone()
    return BlockResult({"0.weight": value * torch.arange(32.0).view(4, 8) * mask}, {"0.weight": mask}, record)


def filled(directory, num_blocks=3, key=KEY):
    folder = ProgressFolder(directory)
    folder.open(key)
    for index in range(num_blocks):
        folder.save(index, block(index))
    return folder


def finished(directory, num_blocks=3):
    folder = filled(directory, num_blocks)
    records = tuple(block(index).record for index in range(num_blocks))
    folder.finish(PruneReport({}, "layers", records))
    return folder


def reopened(directory, key=KEY):
    folder = ProgressFolder(directory)
    folder.open(key)
    return folder


def blocks(num_blocks=3):
    return nn.ModuleList(nn.Sequential(nn.Linear(8, 4, bias=False)) for _ in range(num_blocks))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_block_comes_back_as_it_was(tmp_path, dtype):
    folder = filled(tmp_path, 0)
    result = block(0)
    result.weights["0.weight"] = result.weights["0.weight"].to(dtype)
    folder.save(0, result)
    loaded = reopened(tmp_path).load(0)
    assert torch.equal(loaded.weights["0.weight"], result.weights["0.weight"])
    assert loaded.weights["0.weight"].dtype == dtype
    assert torch.equal(loaded.masks["0.weight"], result.masks["0.weight"])
    assert loaded.record == result.record
    assert reopened(tmp_path).load(1) is None


def test_the_bytes_of_a_block_do_not_depend_on_how_long_it_took(tmp_path):
    for name, seconds in (("a", 1.0), ("b", 2.0)):
        folder = filled(tmp_path / name, 0)
        result = block(0)
        folder.save(0, dataclasses.replace(result, record=dataclasses.replace(result.record, seconds=seconds)))
    files = [(tmp_path / name / "block_0000.safetensors").read_bytes() for name in "ab"]
    assert files[0] == files[1]


@pytest.mark.parametrize("length", [0, 1, 7, 8, 100, -1, -40])
def test_a_truncated_block_is_redone(tmp_path, length):
    filled(tmp_path)
    path = tmp_path / "block_0001.safetensors"
    path.write_bytes(path.read_bytes()[:length])
    folder = reopened(tmp_path)
    assert folder.load(0) is not None
    assert folder.load(1) is None


def test_a_block_with_any_byte_changed_is_redone(tmp_path):
    filled(tmp_path, 1)
    path = tmp_path / "block_0000.safetensors"
    content = path.read_bytes()
    for position in range(0, len(content), 11):
        damaged = bytearray(content)
        damaged[position] ^= 1
        path.write_bytes(damaged)
        loaded = reopened(tmp_path).load(0)
        # padding behind the header is the one place that means nothing
        assert loaded is None or content[position] == ord(" ")


def test_blocks_made_after_another_block_are_redone(tmp_path):
    filled(tmp_path)
    folder = reopened(tmp_path)
    folder.save(0, block(0, value=2.0))
    assert folder.load(1) is None
    folder.save(0, block(0))
    assert folder.load(1) is not None


def test_a_block_of_another_pruning_is_redone(tmp_path):
    filled(tmp_path / "a")
    other = dataclasses.replace(KEY, options={"alpha": 1.0})
    filled(tmp_path / "b", key=other)
    (tmp_path / "b" / "block_0000.safetensors").write_bytes((tmp_path / "a" / "block_0000.safetensors").read_bytes())
    assert reopened(tmp_path / "b", other).load(0) is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"options": {**KEY.options, "alpha": 5.0}}, r"differs in `alpha` \(100.0 there, 5.0 here\)"),
        ({"model": {**KEY.model, "embedding.weight": "x"}}, "1 of 2 model tensors, first `embedding.weight`"),
        ({"calibration": {"num_samples": 8, "contents": "x"}}, "the calibration data;"),
        ({"environment": {"torch": "3.0"}}, r"`torch` \(2.13.0 there, 3.0 here\)"),
    ],
)
def test_another_key_is_refused_and_named(tmp_path, change, message):
    filled(tmp_path)
    with pytest.raises(ValueError, match=message):
        reopened(tmp_path, dataclasses.replace(KEY, **change))


def test_the_software_may_change_once_the_pruning_is_finished(tmp_path):
    finished(tmp_path)
    folder = reopened(tmp_path, dataclasses.replace(KEY, environment={"torch": "3.0"}))
    assert folder.key_digest == KEY.digest
    assert folder.load_into(blocks())


def test_a_finished_pruning_is_opened_by_model_and_options_alone(tmp_path):
    finished(tmp_path)
    ProgressFolder(tmp_path).open_finished(PruneKey(KEY.options, KEY.model))
    with pytest.raises(ValueError, match="alpha"):
        ProgressFolder(tmp_path).open_finished(PruneKey({**KEY.options, "alpha": 1}, KEY.model))
    with pytest.raises(ValueError, match="holds no pruning; run `fit` or `prune` first"):
        ProgressFolder(tmp_path / "none").open_finished(KEY)
    filled(tmp_path / "begun")
    with pytest.raises(ValueError, match="an unfinished pruning; run"):
        ProgressFolder(tmp_path / "begun").open_finished(KEY)


def test_a_finished_pruning_is_put_into_the_model(tmp_path):
    finished(tmp_path)
    model = blocks()
    assert reopened(tmp_path).load_into(model)
    for index, part in enumerate(model):
        assert torch.equal(part[0].weight, block(index).weights["0.weight"])


@pytest.mark.parametrize("damage", ["truncate", "remove", "marker", "blocks"])
def test_a_damaged_pruning_leaves_the_model_alone(tmp_path, damage):
    finished(tmp_path)
    model = blocks(4 if damage == "blocks" else 3)
    before = [part[0].weight.clone() for part in model]
    path = tmp_path / "block_0002.safetensors"
    if damage == "truncate":
        path.write_bytes(path.read_bytes()[:-3])
    elif damage == "remove":
        path.unlink()
    elif damage == "marker":
        marker = json.loads((tmp_path / "complete.json").read_bytes())
        (tmp_path / "complete.json").write_text(json.dumps({**marker, "last": "x"}))
    assert not reopened(tmp_path).load_into(model)
    assert all(torch.equal(part[0].weight, weight) for part, weight in zip(model, before, strict=True))


def test_leftovers_of_a_killed_process_are_removed(tmp_path):
    filled(tmp_path)
    (tmp_path / ".writing.tmp").write_bytes(b"half")
    (tmp_path / ".mine.tmp").write_text("somebody else's")
    (tmp_path / ".folder.tmp").mkdir()
    reopened(tmp_path)
    assert {path.name for path in tmp_path.glob(".*")} == {".mine.tmp", ".folder.tmp"}


def test_block_files_without_a_key_are_not_taken_for_ours(tmp_path):
    filled(tmp_path)
    (tmp_path / "key.json").unlink()
    with pytest.raises(ValueError, match=r"no key\.json"):
        reopened(tmp_path)
    (tmp_path / "key.json").write_text("{")
    with pytest.raises(ValueError, match="cannot be read"):
        reopened(tmp_path)
