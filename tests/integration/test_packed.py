import json
import struct
import subprocess
import sys

import pytest
import torch
from helpers.experts import Mixture
from helpers.pruning import callback, trainer
from lightning.pytorch import LightningModule
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BertConfig,
    GPT2Config,
    LlamaConfig,
)

from wandazeta.cli.prune import prune_module
from wandazeta.pruning.export.packed import load_packed, write_packed

BERT = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
KINDS = {
    "llama": (AutoModelForCausalLM, LlamaConfig(vocab_size=64, tie_word_embeddings=True, **BERT), 14),
    "gpt2": (AutoModelForCausalLM, GPT2Config(vocab_size=64, n_embd=16, n_layer=2, n_head=2, n_positions=32), 8),
    "bert": (AutoModelForSequenceClassification, BertConfig(vocab_size=64, pad_token_id=0, **BERT), 12),
}


class Module(LightningModule):
    def __init__(self, kind, dtype):
        super().__init__()
        auto, config, _ = KINDS[kind]
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.backbone = auto.from_config(config).to(dtype)


def export(tmp_path, kind, dtype, pack=True, **kwargs):
    module = Module(kind, dtype)
    pruning = callback(tmp_path / "progress", method="magnitude", **kwargs)
    prune_module(trainer(pruning), module, None, pruning, tmp_path / "out", pack=pack)
    return module.backbone.eval()


def payload(path):
    """Bytes of a safetensors file behind its header."""
    with path.open("rb") as file:
        return path.stat().st_size - 8 - struct.unpack("<Q", file.read(8))[0]


def equal_tensors(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert (a[name].dtype, a[name].shape) == (b[name].dtype, b[name].shape), name
        assert torch.equal(a[name].view(torch.uint8), b[name].view(torch.uint8)), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", list(KINDS))
def test_packed_shipped_and_restored(tmp_path, kind, dtype):
    auto, _, num_layers = KINDS[kind]
    # left dense, it is stored dense
    excluded = {"llama": "up_proj", "gpt2": "c_fc", "bert": "intermediate.dense"}[kind]
    model = export(tmp_path, kind, dtype, exclude_modules=[excluded])
    out, plain = tmp_path / "out", load_file(tmp_path / "out" / "model.safetensors")
    masks = load_file(out / "sparsity/masks.safetensors")
    assert len(masks) == num_layers - 2
    assert not any(excluded in name for name in masks)

    # 2 of 4 values and 4 bits: 9/16 of the size in 16-bit precision, 17/32 in 32-bit; the rest is unchanged
    packed_file = out / "sparsity/model.2of4.safetensors"
    pruned = sum(plain[name].nbytes for name in masks)
    dense = sum(tensor.nbytes for name, tensor in plain.items() if name not in masks)
    ratio = {4: 17 / 32, 2: 9 / 16}[dtype.itemsize]
    assert payload(packed_file) == dense + ratio * pruned
    assert payload(out / "model.safetensors") == dense + pruned
    with safe_open(packed_file, framework="pt") as file:
        note = json.loads(file.metadata()["wandazeta"])
        shapes = {name: file.get_slice(f"{name}.values").get_shape() for name in masks}
    assert (note["version"], note["pattern"]) == (1, "2:4")
    # GPT-2's Conv1D weights are (in, out); what is packed is (out, in / 2), whatever the layout
    assert {layout["transposed"] for layout in note["weights"].values()} == {kind == "gpt2"}
    for name, shape in shapes.items():
        num_inputs, num_outputs = plain[name].shape if kind == "gpt2" else reversed(plain[name].shape)
        assert shape == [num_outputs, num_inputs // 2]
        groups = plain[name].t() if kind == "gpt2" else plain[name]
        assert ((groups.reshape(-1, 4) != 0).sum(1) == 2).all()
    equal_tensors(load_packed(out), plain)

    # ship the packed file alone
    (out / "model.safetensors").unlink()
    (out / "sparsity/masks.safetensors").unlink()
    command = [sys.executable, "-m", "wandazeta.pruning.export.packed", "out", "restored"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=300)
    assert (done.returncode, done.stderr) == (0, "")
    assert not (tmp_path / "restored" / "sparsity/model.2of4.safetensors").exists()
    equal_tensors(load_file(tmp_path / "restored" / "model.safetensors"), plain)
    loaded = auto.from_pretrained(tmp_path / "restored").eval()
    assert loaded.dtype == dtype
    ids = torch.arange(1, 13).view(2, 6)
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, model(ids).logits)


@pytest.mark.parametrize("kind", ["mixtral", "gpt_oss"])
def test_experts_are_packed(tmp_path, kind):
    module, pruning = Mixture(kind), callback(tmp_path / "progress", method="magnitude")
    prune_module(trainer(pruning), module, None, pruning, tmp_path / "out", pack=True)
    plain = load_file(tmp_path / "out" / "model.safetensors")
    masks = load_file(tmp_path / "out" / "sparsity/masks.safetensors")
    # one file of each expert's weights, or all in one
    assert sum(".experts." in name for name in masks) == {"mixtral": 3 * 4 * 3, "gpt_oss": 3 * 2}[kind]
    assert payload(tmp_path / "out" / "sparsity/model.2of4.safetensors") == sum(
        tensor.nbytes * 17 // 32 if name in masks else tensor.nbytes for name, tensor in plain.items()
    )
    equal_tensors(load_packed(tmp_path / "out"), plain)


def test_shards_are_packed_into_one_file(tmp_path):
    model = export(tmp_path, "llama", torch.bfloat16, pack=False)
    out = tmp_path / "out"
    whole = load_file(out / "model.safetensors")
    (out / "model.safetensors").unlink()
    model.save_pretrained(out, max_shard_size="4KB")
    assert len(list(out.glob("model-*-of-*.safetensors"))) > 2
    write_packed(out)
    equal_tensors(load_packed(out), whole)


def test_a_finished_pruning_is_packed_later_and_the_card_says_so(tmp_path):
    export(tmp_path, "llama", torch.bfloat16, pack=False)
    assert not (tmp_path / "out" / "sparsity/model.2of4.safetensors").exists()
    assert "`sparsity/model.2of4.safetensors`:" not in (tmp_path / "out" / "README.md").read_text()
    blocks = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "progress").glob("block*.safetensors")}
    export(tmp_path, "llama", torch.bfloat16)
    assert {path.name: path.stat().st_mtime_ns for path in (tmp_path / "progress").glob("block*.safetensors")} == blocks
    card = (tmp_path / "out" / "README.md").read_text()
    for piece in ("neither smaller nor faster", "0.56", "`sparsity/model.2of4.safetensors`:", "Ampere", "SRC DST"):
        assert piece in card
    assert len({path.stat().st_mode for path in (tmp_path / "out").rglob("*") if path.is_file()}) == 1


@pytest.mark.parametrize(
    "options", [{"sparsity_pattern": "4:8"}, {"sparsity_pattern": "unstructured", "sparsity": 0.5}]
)
def test_other_patterns_are_refused_before_pruning(tmp_path, options):
    with pytest.raises(ValueError, match=f"sparsity_pattern='2:4', .* got '{options['sparsity_pattern']}'; prune 2:4"):
        export(tmp_path, "llama", torch.bfloat16, **options)
    assert not (tmp_path / "progress").exists()
    assert not (tmp_path / "out").exists()
