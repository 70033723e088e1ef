"""Files of a model that lack weights, have others, or state a quantization that their weights do not have."""

import json

import pytest
import torch
from helpers.causal_lms import save_tiny_lm, tiny_lm
from helpers.encoders import KINDS, SIZES, save_tiny_encoder
from helpers.tokenizer import byte_tokenizer
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM, AutoModelForSequenceClassification

from wandazeta.models.checkpoint import drop_stale_quantization
from wandazeta.models.loading import LoadingOptions, load_backbone

ENCODER = LoadingOptions(num_classes=2)
STREAMED = LoadingOptions(stream_weights=True)


def change(directory, drop=None, add=(), **replaced):
    """Change the tensors in the files of a model."""
    file = directory / "model.safetensors"
    tensors = {name: tensor for name, tensor in load_file(file).items() if drop is None or drop not in name}
    tensors |= {name: torch.ones(2) for name in add} | {
        name.replace("__", "."): value for name, value in replaced.items()
    }
    save_file(tensors, file, {"format": "pt"})
    return str(directory)


def renamed(directory):
    file = directory / "model.safetensors"
    save_file({name.replace("mlp.", "ffn."): value for name, value in load_file(file).items()}, file, {"format": "pt"})
    return str(directory)


@pytest.mark.parametrize("loading", [LoadingOptions(), STREAMED], ids=["loaded", "streamed"])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_weights_of_a_language_model(tmp_path, kind, loading):
    inner, width = {"llama": ("layers.1.mlp", "model__norm__weight"), "gpt2": ("h.1.mlp", "transformer__ln_f__weight")}[
        kind
    ]
    load_backbone(str(save_tiny_lm(tmp_path / "whole", kind)), loading)
    with pytest.raises(ValueError, match=rf"`[a-z.]*{inner}") as error:
        load_backbone(change(save_tiny_lm(tmp_path / "missing", kind), drop=inner), loading)
    assert "\n" not in str(error.value)
    extra = change(save_tiny_lm(tmp_path / "unexpected", kind), add=["model.extra.weight", "score.weight"])
    with pytest.raises(ValueError, match=r"have `model.extra.weight`, `score.weight` in addition"):
        load_backbone(extra, loading)
    shape = change(save_tiny_lm(tmp_path / "shape", kind), **{width: torch.ones(5)})
    with pytest.raises(ValueError, match=rf"`{width.replace('__', '.')}` in shape \(5,\), but .* \(32,\)"):
        load_backbone(shape, loading)
    with pytest.raises(ValueError, match=r"(lack|have no) .*mlp"):
        load_backbone(renamed(save_tiny_lm(tmp_path / "renamed", kind)), loading)


def test_many_names_are_counted(tmp_path):
    with pytest.raises(ValueError, match=r"they lack `model.layers.0.*` and \d+ more; are the weights renamed"):
        load_backbone(change(save_tiny_lm(tmp_path), drop="model.layers"))


@pytest.mark.parametrize("loading", [LoadingOptions(), STREAMED], ids=["loaded", "streamed"])
def test_a_tied_head_and_old_buffers_may_be_absent_or_there(tmp_path, loading):
    model = change(save_tiny_lm(tmp_path / "tied", tie_word_embeddings=True), drop="lm_head")
    loaded = load_backbone(model, loading)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    load_backbone(change(save_tiny_lm(tmp_path / "old"), add=["model.layers.0.self_attn.rotary_emb.inv_freq"]), loading)
    old = change(
        save_tiny_lm(tmp_path / "gpt2", "gpt2"), add=["transformer.h.0.attn.bias", "transformer.h.0.attn.masked_bias"]
    )
    load_backbone(old, loading)
    with pytest.raises(ValueError, match=r"lm_head.weight`"):
        load_backbone(change(save_tiny_lm(tmp_path / "untied"), drop="lm_head"), loading)


@pytest.mark.parametrize("kind", KINDS)
def test_weights_of_an_encoder(tmp_path, kind):
    load_backbone(str(save_tiny_encoder(tmp_path / "whole", kind)), ENCODER)
    with pytest.raises(ValueError, match=r"they lack `encoder.layer.1"):
        load_backbone(change(save_tiny_encoder(tmp_path / "missing", kind), drop="layer.1."), ENCODER)
    with pytest.raises(ValueError, match=r"have `encoder.layer.7.extra.weight` in addition"):
        load_backbone(change(save_tiny_encoder(tmp_path / "more", kind), add=["encoder.layer.7.extra.weight"]), ENCODER)
    with pytest.raises(ValueError, match=r"have `head.weight` in addition"):
        load_backbone(change(save_tiny_encoder(tmp_path / "head", kind), add=["head.weight"]), ENCODER)
    shape = change(save_tiny_encoder(tmp_path / "shape", kind), embeddings__LayerNorm__bias=torch.ones(5))
    with pytest.raises(ValueError, match=r"`embeddings.LayerNorm.bias` in shape \(5,\)"):
        load_backbone(shape, ENCODER)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("head", [AutoModelForMaskedLM, AutoModelForSequenceClassification])
def test_an_encoder_that_was_saved_with_a_head(tmp_path, kind, head):
    head.from_config(AutoConfig.for_model(kind, **SIZES)).save_pretrained(tmp_path)
    # another head, position ids, and no pooler: two loads give the same model all the same
    change(tmp_path, drop="pooler", add=[f"{kind}.embeddings.position_ids"])
    first, second = (load_backbone(str(tmp_path), ENCODER).state_dict() for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)
    with pytest.raises(ValueError, match=rf"have `{kind}.encoder.extra` in addition|have `encoder.extra` in addition"):
        load_backbone(change(tmp_path, add=[f"{kind}.encoder.extra"]), ENCODER)


def quantized(directory, **entry):
    config = json.loads((directory / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "compressed-tensors"} | entry
    (directory / "config.json").write_text(json.dumps(config))
    return str(directory)


DENSE = {
    "format": "dense",
    "quantization_status": "frozen",
    "sparsity_config": {"format": "dense", "sparsity_structure": "2:4", "targets": ["Linear"], "ignore": ["lm_head"]},
}


@pytest.mark.parametrize("loading", [LoadingOptions(), STREAMED, LoadingOptions("bfloat16")])
@pytest.mark.parametrize("entry", [DENSE, {"sparsity_config": {}}, {"format": "pack-quantized"}])
def test_a_quantization_that_the_weights_do_not_have_is_dropped(tmp_path, loading, entry):
    model = load_backbone(quantized(save_tiny_lm(tmp_path / "model"), **entry), loading)
    assert getattr(model.config, "quantization_config", None) is None
    if loading is not STREAMED:
        assert torch.equal(model.lm_head.weight, tiny_lm().lm_head.weight.to(model.dtype))
        model.save_pretrained(tmp_path / "export")
        assert "quantization_config" not in json.loads((tmp_path / "export/config.json").read_text())


@pytest.mark.parametrize("loading", [LoadingOptions(), STREAMED])
def test_weights_that_are_quantized_are_refused(tmp_path, loading):
    packed = save_tiny_lm(tmp_path / "packed")
    change(packed, model__norm__weight=torch.ones(32, dtype=torch.int8))
    with pytest.raises(ValueError, match=r"compressed-tensors|quantized"):
        load_backbone(quantized(packed, **DENSE), loading)
    change(save_tiny_lm(tmp_path / "scaled"), add=["model.layers.0.mlp.up_proj.weight_scale"])
    with pytest.raises(ValueError, match=r"`model.layers.0.mlp.up_proj.weight_scale` in addition"):
        load_backbone(quantized(tmp_path / "scaled", **DENSE), loading)


def test_a_written_model_does_not_state_a_quantization(tmp_path):
    model = tiny_lm()
    model.config.quantization_config = {"quant_method": "compressed-tensors", **DENSE}
    model.save_pretrained(tmp_path)
    assert "quantization_config" in json.loads((tmp_path / "config.json").read_text())
    drop_stale_quantization(tmp_path)
    assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path).lm_head.weight, model.lm_head.weight)


@pytest.mark.parametrize("name", ["adapters.json", "adapter_config.json"])
def test_adapters_are_no_model(tmp_path, name):
    byte_tokenizer().save_pretrained(tmp_path)
    (tmp_path / name).write_text("{}")
    with pytest.raises(ValueError, match=rf"it holds adapters \({name}\) and no model"):
        load_backbone(str(tmp_path))
