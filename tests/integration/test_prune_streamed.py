"""A model whose blocks stay in their files is pruned to the same bits as one in memory."""

import json

import pytest
import torch
from helpers.causal_lms import save_tiny_lm, tiny_lm
from helpers.pruning import callback, trainer
from helpers.tokenizer import byte_tokenizer
from lightning.pytorch import LightningDataModule
from safetensors.torch import load_file
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM

from wandazeta.cli.prune import prune_module
from wandazeta.models.loading import LoadingOptions
from wandazeta.models.streaming import is_file_backed
from wandazeta.modules import LanguageModel
from wandazeta.pruning.progress import folder as progress

pytestmark = pytest.mark.filterwarnings("ignore")


class Data(LightningDataModule):
    def calibration_dataloader(self):
        ids = torch.randint(3, 300, (8, 10), generator=torch.Generator().manual_seed(0))
        return DataLoader([{"input_ids": row, "attention_mask": torch.ones_like(row)} for row in ids], batch_size=4)


def save_sharded(directory, kind="llama", dtype=torch.float32, **changes):
    """A model whose blocks lie across several files."""
    tiny_lm(kind, **changes).to(dtype).save_pretrained(directory, max_shard_size="20KB")
    byte_tokenizer().save_pretrained(directory)
    assert len(list(directory.glob("*.safetensors"))) > 3
    return directory


def prune(model, folder, *, streamed, dtype="float32", **options):
    pruning = callback(folder / "progress", **options)
    module = LanguageModel(str(model), LoadingOptions(dtype=dtype, stream_weights=streamed))
    assert any(map(is_file_backed, module.parameters())) == streamed
    prune_module(trainer(pruning), module, Data(), pruning, folder / "out")
    return module, pruning


def weights_of(directory):
    return {name: t for path in directory.glob("*.safetensors") for name, t in load_file(path).items()}


def same_bytes(folder, other):
    """Everything but seconds and memory."""
    measured = ("report.json", ".cost.json")
    names = [path.name for path in other.iterdir() if not path.name.endswith(measured)]
    return all((folder / name).read_bytes() == (other / name).read_bytes() for name in names)


def assert_same_pruning(folder, reference):
    assert same_bytes(folder / "progress", reference / "progress")
    found, expected = weights_of(folder / "out"), weights_of(reference / "out")
    assert found.keys() == expected.keys()
    for name, weight in expected.items():
        assert weight.dtype == found[name].dtype
        assert torch.equal(weight.view(torch.uint8), found[name].view(torch.uint8)), name
    for name in ("config.json", "generation_config.json", "sparsity/masks.safetensors", "README.md"):
        assert (folder / "out" / name).read_bytes() == (reference / "out" / name).read_bytes(), name


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("method", ["wanda", "wanda++"])
def test_the_same_bits_as_in_memory(tmp_path, method, dtype):
    model = save_sharded(tmp_path / "model", dtype=getattr(torch, dtype))
    options = {"method": method, "learning_rate": 1e-3}
    prune(model, tmp_path / "memory", streamed=False, dtype=dtype, **options)
    module, pruning = prune(model, tmp_path / "streamed", streamed=True, dtype=dtype, **options)
    assert_same_pruning(tmp_path / "streamed", tmp_path / "memory")
    assert pruning.report.sparsity == pytest.approx(0.5)
    assert all(is_file_backed(parameter) for parameter in module.backbone.model.layers.parameters())
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path / "streamed" / "out", output_loading_info=True)
    assert not any(info.values())
    assert loaded.dtype == getattr(torch, dtype)


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("llama", {"tie_word_embeddings": True}),
        ("gpt2", {}),
        ("opt", {}),
        ("gemma2", {}),
        ("llama", {"dtype": "bfloat16"}),
    ],
)
def test_tied_embeddings_other_architectures_and_conversion(tmp_path, kind, changes):
    dtype = changes.pop("dtype", "float32")
    model = save_sharded(tmp_path / "model", kind, **changes)
    for streamed in (False, True):
        prune(model, tmp_path / str(streamed), streamed=streamed, dtype=dtype, method="wanda")
    assert_same_pruning(tmp_path / "True", tmp_path / "False")


def test_the_streamed_model_computes_as_the_pruned_one(tmp_path):
    model = save_tiny_lm(tmp_path / "model")
    module, _ = prune(model, tmp_path, streamed=True, method="wanda")
    ids = torch.arange(3, 15)[None]
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    with torch.no_grad():
        torch.testing.assert_close(module.backbone(ids).logits, loaded(ids).logits)


def test_one_block_at_a_time_is_in_memory(tmp_path, monkeypatch):
    model = save_sharded(tmp_path / "model")
    save, seen = progress.ProgressFolder.save, []
    module = LanguageModel(str(model), LoadingOptions(stream_weights=True))

    def saving(folder, index, result):
        layers = module.backbone.model.layers
        seen.append([not any(is_file_backed(p) for p in layer.parameters()) for layer in layers])
        save(folder, index, result)

    monkeypatch.setattr(progress.ProgressFolder, "save", saving)
    during = []
    for layer in module.backbone.model.layers:
        layer.mlp.register_forward_hook(
            lambda *_: during.append(
                sum(not is_file_backed(layer.mlp.up_proj.weight) for layer in module.backbone.model.layers)
            )
        )
    pruning = callback(tmp_path / "progress", method="wanda")
    prune_module(trainer(pruning), module, Data(), pruning, tmp_path / "out")
    assert set(during) == {1}
    assert seen == [[False] * 3] * 3


def test_stopped_after_any_block_and_started_again(tmp_path, monkeypatch):
    model = save_sharded(tmp_path / "model")
    options = {"method": "wanda++", "learning_rate": 1e-3}
    prune(model, tmp_path / "whole", streamed=False, **options)
    save = progress.ProgressFolder.save

    class KilledError(BaseException):
        pass

    for stop in range(3):

        def saving(folder, index, result, stop=stop):
            save(folder, index, result)
            if index == stop:
                raise KilledError

        with monkeypatch.context() as patch:
            patch.setattr(progress.ProgressFolder, "save", saving)
            with pytest.raises(KilledError):
                prune(model, tmp_path / str(stop), streamed=True, **options)
        assert not (tmp_path / str(stop) / "out").exists()
        # begun streamed, it may go on in memory, and the other way round
        prune(model, tmp_path / str(stop), streamed=stop != 1, **options)
        assert_same_pruning(tmp_path / str(stop), tmp_path / "whole")


def test_a_complete_pruning_is_exported_again(tmp_path):
    model = save_sharded(tmp_path / "model")
    module, pruning = prune(model, tmp_path, streamed=True, method="wanda")
    first = weights_of(tmp_path / "out")
    for _ in range(2):  # by the callback that made it, and by another
        prune_module(trainer(pruning), module, Data(), pruning, tmp_path / "out")
        assert all(torch.equal(weight, first[name]) for name, weight in weights_of(tmp_path / "out").items())
        pruning = callback(tmp_path / "progress", method="wanda")
        module = LanguageModel(str(model), LoadingOptions(stream_weights=True))


def test_shards_have_an_index(tmp_path, monkeypatch):
    monkeypatch.setattr("wandazeta.pruning.export.pretrained._SHARD_SIZE", "20KB")
    prune(save_sharded(tmp_path / "model"), tmp_path, streamed=True, method="wanda")
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    weights = weights_of(tmp_path / "out")
    assert len(set(index["weight_map"].values())) > 3
    assert index["weight_map"].keys() == weights.keys()
    assert index["metadata"]["total_size"] == sum(weight.nbytes for weight in weights.values())
    _, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values())


@pytest.mark.parametrize("stage", ["fit", "validate", "test", "predict"])
@pytest.mark.parametrize("with_callback", [True, False])
def test_only_prune_takes_a_streamed_model(tmp_path, stage, with_callback):
    module = LanguageModel(str(save_tiny_lm(tmp_path / "model")), LoadingOptions(stream_weights=True))
    module.training_step = lambda batch, batch_idx: None
    module.configure_optimizers = lambda: None
    pruning = [callback(tmp_path / "progress")] if with_callback else []
    with pytest.raises(ValueError, match=r"weights are in memory, but .* leave out `stream_weights`"):
        getattr(trainer(*pruning), stage)(module, DataLoader([{"input_ids": torch.ones(4)}]))
    assert not (tmp_path / "progress").exists()
