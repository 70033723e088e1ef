import re
from pathlib import Path

import pytest
import torch
from helpers.causal_lms import prompts, save_tiny_lm
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from wandazeta.adapters import LoRAAdapters, TensorTrainAdapters
from wandazeta.adapters.files import load_adapters
from wandazeta.modules import ZerothOrderModule

KINDS = {"tensor_train": TensorTrainAdapters(rank=2, bottleneck=8), "lora": LoRAAdapters(rank=2)}


@pytest.fixture
def exported(request, tmp_path, monkeypatch):
    """A directory with adapters that do something, made from a model in `model`; and the module that they are from."""
    kind, model = getattr(request, "param", ("tensor_train", "llama"))
    monkeypatch.chdir(tmp_path)
    save_tiny_lm("model", model)
    module = ZerothOrderModule("model", trainable=KINDS[kind])
    module.setup("test")
    theta = module.adapters.theta
    theta.add_(0.1 * torch.randn(theta.shape, generator=torch.Generator().manual_seed(1)))
    module.save_adapters("exported")
    return module


def logits(model):
    ids, _ = prompts(2, width=6)
    with torch.no_grad():
        return model(input_ids=ids).logits


BOTH = pytest.mark.parametrize("exported", [(kind, "llama") for kind in KINDS], indirect=True, ids=KINDS)


@BOTH
def test_the_cards_code_loads_the_adapters(exported, tmp_path, monkeypatch):
    card = (tmp_path / "exported" / "README.md").read_text()
    code = re.search(r"```python\n(.*?)```", card, re.DOTALL)[1]
    scope = {}
    monkeypatch.chdir(tmp_path / "exported")
    exec(code, scope)
    assert torch.equal(logits(scope["model"]), logits(exported.backbone))
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert not torch.allclose(logits(plain), logits(scope["model"]), atol=1e-2)
    # moves with the model, and is not merged with its precision
    scope["model"].bfloat16()
    assert scope["model"].adapters.theta.dtype == torch.float32
    for fact in (exported.backbone_key, "| base model | `model` in float32 |", "| rank | 2 |"):
        assert fact in card
    assert card.startswith("---\nbase_model: model\n")


def test_the_card_says_where_the_base_model_was_pruned(exported):
    for key, said in ((None, False), ("pruned by key", True)):
        module = ZerothOrderModule("model")
        module.pruned_backbone_key = key
        module.setup("test")
        module.save_adapters("card")
        card = Path("card/README.md").read_text()
        assert ("name the pruned model's directory" in card) == said
        assert (key or module.backbone_key) in card


@pytest.mark.filterwarnings("ignore:fan_in_fan_out")
@pytest.mark.parametrize("exported", [("lora", kind) for kind in ("llama", "gpt2")], indirect=True, ids=str)
def test_peft_alone_loads_the_factors(exported):
    peft = pytest.importorskip("peft")
    loaded = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("model"), "exported")
    torch.testing.assert_close(logits(loaded), logits(exported.backbone), atol=1e-5, rtol=1e-5)
    assert {p.dtype for name, p in loaded.named_parameters() if "lora" in name} == {torch.float32}


@BOTH
def test_they_load_into_another_module(exported):
    kind = exported.adapters.description()["kind"]
    fresh = ZerothOrderModule("model", trainable=KINDS[kind], seed=3)
    fresh.load_adapters("exported")
    assert torch.equal(fresh.adapters.theta, exported.adapters.theta)
    other = ZerothOrderModule("model", trainable=KINDS["lora" if kind == "tensor_train" else "tensor_train"])
    with pytest.raises(ValueError, match="the kind of `trainable` differs"):
        other.load_adapters("exported")


@BOTH
def test_another_backbone_is_refused(exported, tmp_path):
    pruned = AutoModelForCausalLM.from_pretrained("model")
    with torch.no_grad():
        pruned.model.layers[1].mlp.up_proj.weight[:, ::2] = 0
    for model in (pruned, AutoModelForCausalLM.from_pretrained("model", dtype=torch.bfloat16)):
        before = logits(model)
        with pytest.raises(ValueError, match=r"the model that the adapters were trained on \(weights, pruning"):
            load_adapters(model, "exported")
        assert torch.equal(logits(model), before)
    with pytest.raises(ValueError, match="without adapters"):
        load_adapters(exported.backbone, "exported")
    for name in ("adapters.json", exported.adapters.file_name):
        (tmp_path / "exported" / name).rename(tmp_path / name)
        with pytest.raises(ValueError, match=f"{name} is missing"):
            load_adapters(AutoModelForCausalLM.from_pretrained("model"), "exported")
        (tmp_path / name).rename(tmp_path / "exported" / name)


@BOTH
def test_generation_with_a_cache_is_generation_without(exported):
    model, ids = exported.backbone, prompts(3, width=5)[0].clamp_min(3)
    options = {"max_new_tokens": 8, "do_sample": False, "return_dict_in_generate": True, "output_scores": True}
    cached, plain = (model.generate(ids, use_cache=use_cache, **options) for use_cache in (True, False))
    assert torch.equal(cached.sequences, plain.sequences)
    torch.testing.assert_close(torch.stack(cached.scores), torch.stack(plain.scores), atol=1e-4, rtol=1e-4)
    # token by token, one row too, against one forward over everything
    for rows in (ids, ids[:1]):
        cache, steps = None, []
        for position in range(rows.shape[1]):
            output = model(rows[:, position : position + 1], past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            steps.append(output.logits)
        torch.testing.assert_close(torch.cat(steps, 1), model(rows).logits, atol=1e-4, rtol=1e-4)
    exported.scorer.prefix = None
    assert not torch.equal(cached.sequences, AutoModelForCausalLM.from_pretrained("model").generate(ids, **options)[0])


@BOTH
@pytest.mark.parametrize("change", ["missing", "unexpected", "shape"])
def test_tensors_that_are_not_those_of_the_adapters_are_refused(exported, change):
    (file,) = Path("exported").glob("*.safetensors")
    saved = load_file(file)
    name = min(saved)
    if change == "missing":
        saved["other"] = saved.pop(name)
    elif change == "unexpected":
        saved["a.other"] = torch.ones(2)
    else:
        # would be broadcast
        saved[name] = saved[name].flatten()[:1].clone()
    save_file(saved, file, {"format": "pt"})
    message = r"in '.*' to have shape" if change == "shape" else r"to hold exactly the tensors of the adapters"
    with pytest.raises(ValueError, match=message):
        load_adapters(AutoModelForCausalLM.from_pretrained("model"), "exported")
