import shutil

import pytest
import torch
from helpers.causal_lms import save_tiny_lm, tiny_lm
from helpers.tokenizer import byte_tokenizer
from safetensors.torch import load_file, save_file

from wandazeta.models.loading import LoadingOptions
from wandazeta.models.streaming import is_stored, whole
from wandazeta.modules import LanguageModel


def test_the_same_model_with_its_blocks_left_in_the_file(tmp_path):
    directory = str(save_tiny_lm(tmp_path))
    expected = LanguageModel(directory, LoadingOptions("bfloat16")).backbone
    model = LanguageModel(directory, LoadingOptions("bfloat16", stream_weights=True)).backbone
    assert not model.training
    assert model.generation_config == expected.generation_config
    assert model.config.to_dict() == expected.config.to_dict()
    found, wanted = dict(model.named_parameters()), dict(expected.named_parameters())
    assert list(found) == list(wanted)
    for name, parameter in found.items():
        assert is_stored(parameter) == name.startswith("model.layers."), name
        assert torch.equal(whole(parameter), wanted[name])
        assert parameter.dtype == torch.bfloat16
    for (name, buffer), (other, value) in zip(model.named_buffers(), expected.named_buffers(), strict=True):
        assert name == other
        assert torch.equal(buffer, value)
    ids = torch.arange(3, 15)[None]
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, expected(ids).logits)


def test_tied_weights_stay_tied(tmp_path):
    model = LanguageModel(
        str(save_tiny_lm(tmp_path, tie_word_embeddings=True)), LoadingOptions(stream_weights=True)
    ).backbone
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert not model.lm_head.weight.is_meta


def refused(directory):
    with pytest.raises(ValueError, match="`model_name_or_path`") as error:
        LanguageModel(str(directory), LoadingOptions(stream_weights=True))
    assert "\n" not in str(error.value)
    return str(error.value)


def test_what_cannot_be_streamed_is_one_line(tmp_path, monkeypatch):
    assert "to be a local directory, from which `stream_weights` reads" in refused(tmp_path / "nothing")

    # the files of this one have other names than its parameters
    assert "the files hold no `lm_head.weight`" in refused(save_tiny_lm(tmp_path / "renamed", "gpt_neox"))

    directory = save_tiny_lm(tmp_path / "model")
    (tmp_path / "empty").mkdir()
    for path in directory.iterdir():
        if path.suffix != ".safetensors":
            shutil.copy(path, tmp_path / "empty")
    assert "no whole model.safetensors" in refused(tmp_path / "empty")

    (tmp_path / "quantized").mkdir()
    model = tiny_lm()
    model.config.quantization_config = {"quant_method": "bitsandbytes"}
    model.config.save_pretrained(tmp_path / "quantized")
    byte_tokenizer().save_pretrained(tmp_path / "quantized")
    shutil.copy(directory / "model.safetensors", tmp_path / "quantized")
    assert "it is quantized" in refused(tmp_path / "quantized")

    file = directory / "model.safetensors"
    weights = load_file(file)
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, file, metadata={"format": "pt"})
    assert "the files hold no `model.layers.1.mlp.up_proj.weight`" in refused(directory)
    monkeypatch.setattr("transformers.LlamaForCausalLM._keep_in_fp32_modules_strict", ["norm"])
    assert "keeps some weights in float32" in refused(directory)


def test_tied_weights_with_different_values_are_refused(tmp_path):
    directory = save_tiny_lm(tmp_path, tie_word_embeddings=True)
    file = directory / "model.safetensors"
    weights = load_file(file)
    save_file(weights | {"lm_head.weight": weights["model.embed_tokens.weight"] + 1}, file, metadata={"format": "pt"})
    assert "different values of `model.embed_tokens.weight` and `lm_head.weight`" in refused(directory)
