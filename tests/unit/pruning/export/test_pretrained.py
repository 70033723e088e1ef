import json

import pytest
import torch
from helpers.causal_lms import tiny_lm
from helpers.reports import made_up, with_unreached_expert
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from wandazeta.pruning.export.pretrained import check_exportable, export_pretrained
from wandazeta.pruning.records import PruneReport

NAME = "model.layers.0.mlp.up_proj.weight"


def pruned_lm():
    model = tiny_lm()
    mask = torch.tensor([True, False, False, True] * 8).expand(48, 32).clone()
    with torch.no_grad():
        model.get_parameter(NAME).masked_fill_(~mask, 0.0)
    return model, {NAME: mask}


def test_a_model_pruned_by_anything_is_written(tmp_path):
    model, masks = pruned_lm()
    export_pretrained(model, None, tmp_path / "out", made_up(), masks, key="0123", pack=True)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), loaded.parameters(), strict=True))
    assert torch.equal(load_file(tmp_path / "out" / "sparsity" / "masks.safetensors")[NAME], masks[NAME])
    assert json.loads((tmp_path / "out" / "prune_report.json").read_text())["key"] == "0123"
    card = (tmp_path / "out" / "README.md").read_text()
    for piece in ("AutoTokenizer", "base_model"):
        assert piece not in card
    for piece in ("25.00% of the weights in 6 Linear layers", "`sparsity/model.2of4.safetensors`:", "| `seed` | `0` |"):
        assert piece in card
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_the_card_says_when_no_data_were_used(tmp_path):
    report = made_up(num_samples=0, num_tokens=0, options={"method": "magnitude", "sparsity_pattern": "4:8"})
    export_pretrained(*pruned_lm()[:1], None, tmp_path / "out", report, {})
    card = (tmp_path / "out" / "README.md").read_text()
    assert "method `magnitude`, pattern `4:8`" in card
    assert "No calibration data were used." in card
    assert "model.2of4" not in card


def test_the_card_names_experts_that_no_token_reached(tmp_path):
    export_pretrained(tiny_lm(), None, tmp_path / "out", with_unreached_expert(made_up()), {})
    assert "`model.layers.0.mlp.experts` 2." in (tmp_path / "out" / "README.md").read_text()


def test_a_mask_that_does_not_belong_is_refused(tmp_path):
    model = tiny_lm()
    report = PruneReport({}, "model.layers")
    with pytest.raises(ValueError, match="a pruned weight is not zero"):
        export_pretrained(model, None, tmp_path / "out", report, {NAME: torch.zeros(48, 32, dtype=torch.bool)})
    with pytest.raises(ValueError, match=r"there is none for `layer\.weight`"):
        export_pretrained(model, None, tmp_path / "out", report, {"layer.weight": torch.ones(1, dtype=torch.bool)})
    assert list(tmp_path.iterdir()) == []


def test_an_export_that_fails_leaves_the_one_before(tmp_path):
    model, masks = pruned_lm()
    export_pretrained(model, None, tmp_path / "out", made_up(), masks)
    before = {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()}
    with pytest.raises(ValueError, match="a pruned weight is not zero"):
        export_pretrained(tiny_lm(), None, tmp_path / "out", made_up(), masks)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def tied_by_hand(model):
    model.lm_head.weight = model.model.embed_tokens.weight


def tied_inside(model):
    model.model.layers[2].input_layernorm.weight = model.model.layers[0].input_layernorm.weight


def tied_thrice(model):
    tied_by_hand(model)
    model.model.norm.weight = model.model.layers[0].input_layernorm.weight
    tied_inside(model)


def shared_block(model):
    model.model.layers[2].self_attn.q_proj = model.model.layers[1].self_attn.q_proj


@pytest.mark.parametrize("config", [{}, {"tie_word_embeddings": True}], ids=["untied", "tied"])
@pytest.mark.parametrize("tie", [tied_by_hand, tied_inside, tied_thrice, shared_block, None])
def test_every_name_of_a_tensor_that_is_tied_by_hand_is_written(tmp_path, tie, config):
    model = tiny_lm(**config)
    if tie is not None:
        tie(model)
    with torch.no_grad():
        # the ties of `tiny_lm` are those of its configuration; values that differ from any initial ones
        for parameter in model.parameters():
            parameter.add_(0.125)
    export_pretrained(model, None, tmp_path / "out", made_up(), {})
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    expected, found = model.state_dict(), loaded.state_dict()
    assert expected.keys() == found.keys()
    for name, tensor in expected.items():
        assert torch.equal(tensor, found[name]), name
    names = load_file(tmp_path / "out" / "model.safetensors").keys()
    assert ("lm_head.weight" in names) == (not config)


def test_a_head_that_is_untied_by_hand_is_written(tmp_path):
    model = tiny_lm(tie_word_embeddings=True)
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach() + 1)
    export_pretrained(model, None, tmp_path / "out", made_up(), {})
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(loaded.lm_head.weight, model.lm_head.weight)
    assert torch.equal(loaded.model.embed_tokens.weight, model.model.embed_tokens.weight)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.pop("model.norm.weight"), r"they lack `model\.norm\.weight`"),
        (lambda state: state["model.norm.weight"].add_(1), r"other values of `model\.norm\.weight`"),
        (lambda state: state.update(extra=torch.zeros(1)), "they hold `extra`"),
    ],
    ids=["missing", "changed", "more"],
)
def test_files_that_are_not_the_model_are_refused(tmp_path, monkeypatch, change, message):
    model = tiny_lm()
    save = type(model).save_pretrained

    def spoiled(self, directory, state_dict):
        state_dict = {name: tensor.clone() for name, tensor in state_dict.items()}
        change(state_dict)
        save(self, directory, state_dict=state_dict)

    monkeypatch.setattr(type(model), "save_pretrained", spoiled)
    with pytest.raises(ValueError, match=message):
        export_pretrained(model, None, tmp_path / "out", made_up(), {})
    assert list(tmp_path.iterdir()) == []


class Unwritable:
    def save_pretrained(self, directory):
        raise TypeError("no JSON")


def test_what_an_export_writes_is_tried():
    check_exportable(tiny_lm(), None)
    with pytest.raises(ValueError, match="a tokenizer that can be saved, but saving Unwritable fails: no JSON"):
        check_exportable(tiny_lm(), Unwritable())
    model = tiny_lm()
    model.generation_config.temperature = 0.5
    with pytest.raises(ValueError, match=r"(?s)a model that can be saved, but saving LlamaForCausalLM.*temperature"):
        check_exportable(model, None)
    model = tiny_lm()
    model.config.note = torch.zeros(1)
    with pytest.raises(ValueError, match="a model that can be saved"):
        check_exportable(model, None)
