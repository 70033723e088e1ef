import copy
import shutil
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from helpers.causal_lms import CONFIGS, save_tiny_lm, tiny_lm
from helpers.tokenizer import byte_tokenizer
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM

from wandazeta.models.blocks import override_forward
from wandazeta.models.loading import LoadingOptions
from wandazeta.models.streaming import (
    StoredTensor,
    back_by_file,
    is_file_backed,
    load_during_forward,
    load_streamed_model,
    materialize,
    parameters_loaded,
    require_in_memory,
)
from wandazeta.modules import LanguageModel


@pytest.fixture
def file(tmp_path):
    save_file({"a": torch.arange(6.0).view(2, 3), "b": torch.arange(5, dtype=torch.bfloat16)}, tmp_path / "x")
    return tmp_path / "x"


def stored_block(file, **dtype):
    block = nn.Sequential(nn.Linear(3, 2, bias=False, device="meta", **dtype))
    back_by_file(block[0].weight, StoredTensor(file, "a"))
    return block


def test_read_gives_fresh_memory_placed_as_in_the_file(file):
    for name in "ab":
        with safe_open(file, framework="pt") as opened:
            mapped = opened.get_tensor(name)
            copied = StoredTensor(file, name).read()
            assert torch.equal(copied, mapped)
            assert copied.data_ptr() % 64 == mapped.data_ptr() % 64
            assert copied.data_ptr() != mapped.data_ptr()
    before = file.read_bytes()
    StoredTensor(file, "a").read().zero_()
    assert file.read_bytes() == before


def test_a_tensor_that_cannot_be_read_is_named(file, tmp_path):
    for stored in (StoredTensor(file, "c"), StoredTensor(tmp_path / "none", "a")):
        with pytest.raises(ValueError, match=f"to be a complete safetensors file that contains `{stored.name}`"):
            stored.read()


def test_materialize_reads_the_type_of_the_tensor_and_leaves_others_alone(file):
    tensor = back_by_file(torch.empty(2, 3, dtype=torch.float16, device="meta"), StoredTensor(file, "a"))
    assert is_file_backed(tensor)
    assert torch.equal(materialize(tensor), torch.arange(6.0).view(2, 3).half())
    for other in (torch.ones(2), torch.ones(2, device="meta")):
        assert not is_file_backed(other)
        assert materialize(other) is other


def test_parameters_of_a_block_are_loaded_temporarily(file):
    block = stored_block(file)
    parameter = block[0].weight.requires_grad_(False)
    with parameters_loaded(block):
        inside = block[0].weight
        assert torch.equal(inside, torch.arange(6.0).view(2, 3))
        assert not inside.requires_grad
        with parameters_loaded(block), torch.no_grad():
            assert block[0].weight is inside
            inside.zero_()
        assert block[0].weight is inside
    assert block[0].weight is parameter
    with parameters_loaded(block):
        assert block[0].weight.any()


def test_a_file_that_is_gone_leaves_the_block_as_it_was(file):
    block = nn.Sequential(stored_block(file)[0], nn.Linear(3, 2, bias=False, device="meta"))
    back_by_file(block[1].weight, StoredTensor(file, "none"))
    first = block[0].weight
    with pytest.raises(ValueError, match="contains `none`"), parameters_loaded(block):
        pass
    assert block[0].weight is first


def test_tied_parameters_are_read_once(file):
    block = nn.Sequential(stored_block(file)[0], nn.Linear(3, 2, bias=False, device="meta"))
    block[1].weight = block[0].weight
    with parameters_loaded(block):
        assert block[0].weight is block[1].weight


def test_a_forward_loads_the_parameters_and_a_skipped_one_does_not(file):
    block = stored_block(file)
    load_during_forward(block)
    assert torch.equal(block(torch.ones(1, 3)), torch.tensor([[3.0, 12.0]]))
    assert block[0].weight.is_meta
    file.unlink()
    with override_forward({block: lambda x: x}):
        assert torch.equal(block(torch.ones(1, 3)), torch.ones(1, 3))
    with pytest.raises(ValueError, match="complete safetensors file"):
        block(torch.ones(1, 3))


def test_require_in_memory(file):
    require_in_memory(nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"in memory, but `0\.weight` and others are streamed"):
        require_in_memory(stored_block(file))


def test_ordinary_blocks_are_left_alone():
    block = nn.Sequential(nn.Linear(2, 2))
    before = copy.deepcopy(block.state_dict())
    weight = block[0].weight
    with parameters_loaded(block):
        assert block[0].weight is weight
        weight.data.add_(1)
    assert torch.equal(weight, before["0.weight"] + 1)


# -- models ------------------------------------------------------------------------------------------------------------


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
        assert is_file_backed(parameter) == name.startswith("model.layers."), name
        assert torch.equal(materialize(parameter), wanted[name])
        assert parameter.dtype == torch.bfloat16
    ids = torch.arange(3, 15)[None]
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, expected(ids).logits)


@pytest.mark.parametrize("kind", CONFIGS)
def test_buffers_of_every_architecture_are_those_of_the_model_in_memory(tmp_path, kind):
    # written by the names of the parameters, which differ from those that `save_pretrained` writes for some
    directory = save_tiny_lm(tmp_path, kind)
    reference = AutoModelForCausalLM.from_pretrained(directory).eval()
    save_file(
        {name: value.clone() for name, value in reference.state_dict().items()},
        directory / "model.safetensors",
        metadata={"format": "pt"},
    )
    model = load_streamed_model(directory, torch.float32, None, trust_remote_code=False)
    buffers = dict(model.named_buffers())
    assert [name for name, _ in reference.named_buffers()] == list(buffers)
    for name, value in reference.named_buffers():
        assert not buffers[name].is_meta
        assert torch.equal(buffers[name], value), name
    ids = torch.arange(3, 15)[None]
    with torch.no_grad():
        assert torch.equal(model(ids).logits, reference(ids).logits)


def test_modules_that_are_built_afterwards_or_by_another_thread_are_ordinary(tmp_path, monkeypatch):
    directory = save_tiny_lm(tmp_path)
    build = AutoModelForCausalLM.from_config

    def build_beside_another(*args, **kwargs):
        with ThreadPoolExecutor(1) as pool:
            assert not pool.submit(torch.nn.Linear, 2, 2).result().weight.is_meta
        return build(*args, **kwargs)

    monkeypatch.setattr(AutoModelForCausalLM, "from_config", build_beside_another)
    assert any(map(is_file_backed, load_streamed_model(directory, torch.float32, None, False).parameters()))
    assert not torch.nn.Linear(2, 2).weight.is_meta


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


def test_refusals_are_one_line(tmp_path, monkeypatch):
    assert "to be a local directory, from which `stream_weights` reads" in refused(tmp_path / "nothing")

    # the files of this one have other names than its parameters
    assert "the files have no `lm_head.weight`" in refused(save_tiny_lm(tmp_path / "renamed", "gpt_neox"))

    directory = save_tiny_lm(tmp_path / "model")
    (tmp_path / "empty").mkdir()
    for path in directory.iterdir():
        if path.suffix != ".safetensors":
            shutil.copy(path, tmp_path / "empty")
    assert "no complete model.safetensors" in refused(tmp_path / "empty")

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
    assert "the files have no `model.layers.1.mlp.up_proj.weight`" in refused(directory)
    monkeypatch.setattr("transformers.LlamaForCausalLM._keep_in_fp32_modules_strict", ["norm"])
    assert "keeps some weights in float32" in refused(directory)


def test_tied_weights_with_different_values_are_refused(tmp_path):
    directory = save_tiny_lm(tmp_path, tie_word_embeddings=True)
    file = directory / "model.safetensors"
    weights = load_file(file)
    save_file(weights | {"lm_head.weight": weights["model.embed_tokens.weight"] + 1}, file, metadata={"format": "pt"})
    assert "different values of `model.embed_tokens.weight` and `lm_head.weight`" in refused(directory)
