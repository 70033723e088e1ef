import weakref

import pytest
import torch
from helpers.causal_lms import tiny_lm
from safetensors.torch import save_file
from torch import nn
from torch.sparse._semi_structured_conversions import (
    sparse_semi_structured_from_dense_cutlass,
    sparse_semi_structured_to_dense_cutlass,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM, GPT2Config

from wandazeta.pruning.export import semi_structured
from wandazeta.pruning.export.packed import restore_plain, write_packed
from wandazeta.pruning.export.semi_structured import load_semi_structured
from wandazeta.pruning.method.masks import group_mask

CUTLASS = torch.sparse.SparseSemiStructuredTensorCUTLASS


def export(folder, model, names):
    """Prune weights 2:4 and write the model with its packed file alone; returns its dense tensors."""
    masks = {}
    with torch.no_grad():
        for name in names:
            weight = model.get_parameter(name)
            rows = weight.t() if "gpt2" in type(model).__name__.lower() else weight
            mask = group_mask(rows.abs().float().contiguous(), 2, 4)
            masks[name] = (mask.t() if rows is not weight else mask).contiguous()
            weight.mul_(masks[name])
            weight[~masks[name]] = 0.0
    model.save_pretrained(folder)
    (folder / "sparsity").mkdir()
    save_file(masks, folder / "sparsity" / "masks.safetensors")
    write_packed(folder)
    (folder / "model.safetensors").unlink()
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


@pytest.fixture
def llama(tmp_path):
    """Directory of a LLaMA in bfloat16 with a tied head, its dense tensors and the names of its pruned weights."""
    model = tiny_lm(
        hidden_size=64, intermediate_size=128, num_key_value_heads=4, vocab_size=32, tie_word_embeddings=True
    ).to(torch.bfloat16)
    names = [name for name, _ in model.named_parameters() if "proj" in name and "layers.1.mlp.up" not in name]
    return tmp_path / "model", model, export(tmp_path / "model", model, names), names


class LiveBytes(TorchDispatchMode):
    """Bytes of the tensors in memory that were made inside this context, now and at most."""

    def __init__(self):
        super().__init__()
        self.live, self.peak, self._known = 0, 0, set()

    def _free(self, key, num_bytes):
        self._known.discard(key)
        self.live -= num_bytes

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and not isinstance(tensor, CUTLASS) and not tensor.is_meta:
                storage = tensor.untyped_storage()
                key, num_bytes = storage._cdata, storage.nbytes()
                if key not in self._known:
                    self._known.add(key)
                    self.live += num_bytes
                    self.peak = max(self.peak, self.live)
                    weakref.finalize(storage, self._free, key, num_bytes)
        return result


def test_no_packed_linear_is_unpacked(llama, monkeypatch):
    folder, model, tensors, pruned = llama
    monkeypatch.setattr(semi_structured, "_device_obstacle", lambda device: None)
    monkeypatch.setattr("wandazeta.pruning.export.packed.unpack_2of4", None)
    with LiveBytes() as memory:
        loaded = load_semi_structured(folder, "cpu")
    found = dict(loaded.named_parameters())
    assert [name for name, weight in found.items() if isinstance(weight.data, CUTLASS)] == pruned
    # torch's own conversions make the same of the dense weights, and lead back to them
    for name in pruned:
        values, positions = sparse_semi_structured_from_dense_cutlass(tensors[name])
        assert torch.equal(found[name].packed, values)
        assert torch.equal(found[name].meta, positions)
        assert torch.equal(sparse_semi_structured_to_dense_cutlass(values, positions), tensors[name])
    others = [name for name in found if name not in pruned]
    assert all(torch.equal(found[name], tensors[name]) for name in others)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    # beside what is kept there is never more than one dense weight
    dense = {name: parameter.nbytes for name, parameter in model.named_parameters()}
    kept = sum(dense[name] * 9 // 16 if name in pruned else dense[name] for name in dense)
    assert 0 < memory.peak - kept <= 1.1 * max(dense.values())
    assert kept < 0.6 * sum(dense.values())


def test_where_there_are_no_kernels_the_model_is_the_dense_one(llama):
    folder, _, tensors, _ = llama
    loaded = load_semi_structured(folder, "cpu")
    assert not loaded.training
    assert loaded.state_dict().keys() == tensors.keys()
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in loaded.state_dict().items())
    # its buffers, which are in no file, are those of a dense model, too
    restore_plain(folder, folder.parent / "plain")
    dense = AutoModelForCausalLM.from_pretrained(folder.parent / "plain", dtype=torch.bfloat16)
    ids = torch.arange(8)[None]
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids).logits, dense(ids).logits)
    in_float32 = load_semi_structured(folder, "cpu", torch.float32)
    assert torch.equal(in_float32.model.embed_tokens.weight, tensors["model.embed_tokens.weight"].float())


def test_layers_that_are_no_linears_are_unpacked(tmp_path, monkeypatch):
    monkeypatch.setattr(semi_structured, "_device_obstacle", lambda device: None)
    config = GPT2Config(vocab_size=64, n_embd=64, n_layer=2, n_head=2, n_positions=32)
    model = AutoModelForCausalLM.from_config(config).to(torch.bfloat16)
    tensors = export(tmp_path, model, ["transformer.h.0.mlp.c_fc.weight", "transformer.h.1.attn.c_attn.weight"])
    loaded = load_semi_structured(tmp_path, "cpu")
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in loaded.state_dict().items())


def test_files_of_another_model_are_refused(llama):
    folder, *_ = llama
    config = folder / "config.json"
    config.write_text(config.read_text().replace('"intermediate_size": 128', '"intermediate_size": 96'))
    with pytest.raises(ValueError, match=r"`directory` to hold .* in shape \(.*restore the plain directory"):
        load_semi_structured(folder, "cpu")
    with pytest.raises(ValueError, match=r"model\.2of4\.safetensors' to be a file that can be read"):
        load_semi_structured(folder / "sparsity", "cpu")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_on_a_gpu_it_computes_the_same_in_less_memory(tmp_path):
    model = tiny_lm(hidden_size=512, intermediate_size=1024, num_key_value_heads=4, vocab_size=32).to(torch.bfloat16)
    export(tmp_path / "model", model, [name for name, _ in model.named_parameters() if "proj" in name])
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    loaded = load_semi_structured(tmp_path / "model")
    dense_bytes = sum(parameter.nbytes for parameter in model.parameters())
    assert torch.cuda.max_memory_allocated() - before < 0.7 * dense_bytes
    assert any(isinstance(module, nn.Linear) and isinstance(module.weight.data, CUTLASS) for module in loaded.modules())
    restore_plain(tmp_path / "model", tmp_path / "plain")
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "plain", dtype=torch.bfloat16).cuda()
    ids = torch.arange(32, device="cuda")[None]
    with torch.no_grad():
        found, expected = loaded(ids).logits.float(), dense(ids).logits.float()
    assert (found - expected).norm() < 2e-2 * expected.norm()
