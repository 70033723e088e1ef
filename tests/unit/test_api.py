"""One call to prune a model and one to measure it."""

import json
import signal
from pathlib import Path

import pytest
import torch
from helpers.causal_lms import save_tiny_lm, tiny_lm
from helpers.tokenizer import byte_tokenizer
from safetensors.torch import load_file
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset
from transformers import AutoModelForCausalLM, AutoTokenizer

import wandazeta
from wandazeta import api
from wandazeta.pruning import Wanda, WandaPP
from wandazeta.pruning.export.masks import read_masks
from wandazeta.pruning.progress.folder import ProgressFolder

TEXTS = [f"document {index} says {'something ' * (index % 3 + 1)}" for index in range(40)]


def pruned_layers(model):
    return [weight for name, weight in model.named_parameters() if "layers" in name and weight.ndim == 2]


def test_a_model_in_memory_is_pruned_in_place():
    model = tiny_lm()
    report = wandazeta.prune(
        model, byte_tokenizer(), TEXTS, method="wanda", num_samples=8, sequence_length=16, device="cpu"
    )
    assert report.sparsity == 0.5
    assert report.num_samples == 8
    for weight in pruned_layers(model):
        groups = (weight.reshape(-1, 4) != 0).sum(1)
        assert bool((groups == 2).all())


def test_all_windows_are_used_where_the_texts_fill_fewer(caplog):
    report = wandazeta.prune(tiny_lm(), byte_tokenizer(), TEXTS[:3], sequence_length=16, method=WandaPP())
    assert 0 < report.num_samples < 128
    assert f"The texts hold {report.num_samples} samples, fewer than num_samples=128; all are used" in caplog.text


def weights_of(directory):
    return load_file(directory / "model.safetensors")


def written(directory):
    return {path: path.stat().st_mtime_ns for path in directory.rglob("*")}


def test_a_model_by_its_directory_is_written_pruned_and_a_second_call_loads_it(tmp_path):
    directory, out = str(save_tiny_lm(tmp_path / "model")), tmp_path / "out"
    options = {"method": Wanda(), "num_samples": 4, "sequence_length": 16, "output_dir": out}
    report = wandazeta.prune(directory, None, TEXTS, **options)
    assert not (out / "progress").exists()
    assert not list(out.glob(".*"))
    masks = read_masks(out)
    weights, dense = weights_of(out), weights_of(tmp_path / "model")
    assert weights.keys() == dense.keys()
    assert len(masks) == report.num_layers
    for name, weight in weights.items():
        assert torch.equal(weight, dense[name] * masks[name] if name in masks else dense[name])
    assert AutoTokenizer.from_pretrained(out)("a")["input_ids"]
    assert "2:4" in (out / "README.md").read_text()

    before, again = written(out), tiny_lm()
    assert wandazeta.prune(again, AutoTokenizer.from_pretrained(directory), iter(TEXTS), **options) == report
    assert written(out) == before
    assert all(torch.equal(weight, weights[name]) for name, weight in again.state_dict().items() if name in masks)

    wandazeta.prune(directory, None, TEXTS, **options, pack=True)
    assert (out / "sparsity/model.2of4.safetensors").exists()


def test_a_directory_with_something_else_is_refused_unchanged(tmp_path):
    directory, out = str(save_tiny_lm(tmp_path / "model")), tmp_path / "out"
    options = {"method": Wanda(), "num_samples": 4, "sequence_length": 16}
    wandazeta.prune(directory, None, TEXTS, **options, output_dir=out)
    before = written(tmp_path)
    with pytest.raises(ValueError, match=rf"'{out}' holds another one: it differs in `sparsity_pattern`"):
        wandazeta.prune(directory, None, TEXTS, **options, output_dir=out, pattern="1:4")
    with pytest.raises(ValueError, match=r"the calibration data"):
        wandazeta.prune(directory, None, TEXTS[::-1], **options, output_dir=out)
    with pytest.raises(ValueError, match="holds other files; choose another one"):
        wandazeta.prune(directory, None, TEXTS, **options, output_dir=tmp_path / "model")
    with pytest.raises(ValueError, match="`output_dir` to be a directory for a model given by name"):
        wandazeta.prune(directory, None, TEXTS, **options)
    assert written(tmp_path) == before
    (out / "sparsity/key.json").write_text("{}")
    with pytest.raises(ValueError, match="is damaged; delete the folder"):
        wandazeta.prune(directory, None, TEXTS, **options, output_dir=out)


def stopped_after_a_block(monkeypatch):
    """Ctrl+C while the first block is saved."""
    save = ProgressFolder.save

    def saving(self, index, result):
        save(self, index, result)
        if index == 0:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(ProgressFolder, "save", saving)


def test_an_interrupted_call_goes_on_at_the_next_block(tmp_path, monkeypatch):
    options = {"method": "wanda", "num_samples": 4, "sequence_length": 16}
    wandazeta.prune(tiny_lm(), byte_tokenizer(), TEXTS, **options, output_dir=tmp_path / "whole")
    options["output_dir"] = out = tmp_path / "out"
    with monkeypatch.context() as patch:
        stopped_after_a_block(patch)
        with pytest.raises(KeyboardInterrupt, match=f"finished blocks are in '{out}'"):
            wandazeta.prune(tiny_lm(), byte_tokenizer(), TEXTS, **options)
    assert [path.name for path in out.iterdir()] == ["progress"]
    first = (out / "progress/block_0000.safetensors").stat().st_mtime_ns
    with pytest.raises(ValueError, match="it differs in `sparsity_pattern`"):
        wandazeta.prune(tiny_lm(), byte_tokenizer(), TEXTS, **options, pattern="4:8")

    monkeypatch.setattr("wandazeta.pruning.export.output.shutil.rmtree", lambda *args, **kwargs: None)
    wandazeta.prune(tiny_lm(), byte_tokenizer(), TEXTS, **options)
    assert (out / ".progress.old/block_0000.safetensors").stat().st_mtime_ns == first
    assert (out / "model.safetensors").read_bytes() == (tmp_path / "whole/model.safetensors").read_bytes()
    monkeypatch.undo()
    # left by a process that was killed while it removed the progress
    wandazeta.prune(tiny_lm(), byte_tokenizer(), TEXTS, **options)
    assert not (out / ".progress.old").exists()


@pytest.mark.parametrize("stage", ["model.safetensors", "sparsity", "config.json"])
def test_an_interrupted_export_is_made_again(tmp_path, monkeypatch, stage):
    options = {"method": "magnitude", "output_dir": tmp_path / "out"}
    replace = Path.replace

    def failing(self, target):
        if Path(target) == tmp_path / "out" / stage:
            raise OSError(28, "No space left on device")
        return replace(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", failing)
        with pytest.raises(OSError, match="No space"):
            wandazeta.prune(tiny_lm(), byte_tokenizer(), **options)
    assert not (tmp_path / "out/config.json").exists()
    (tmp_path / "out/notes.txt").write_text("mine")
    wandazeta.prune(tiny_lm(), byte_tokenizer(), **options)
    assert (tmp_path / "out/notes.txt").read_text() == "mine"
    pruned = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert all(float((weight == 0).float().mean()) == 0.5 for weight in pruned_layers(pruned))


def test_a_model_keeps_the_precision_of_its_files(tmp_path):
    tiny_lm().bfloat16().save_pretrained(tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    wandazeta.prune(str(tmp_path / "model"), method="magnitude", output_dir=tmp_path / "out")
    assert {weight.dtype for weight in weights_of(tmp_path / "out").values()} == {torch.bfloat16}


def test_products_are_in_bfloat16_where_a_gpu_has_it(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: True)
    gpu, cpu = torch.device("cuda"), torch.device("cpu")
    for dtype, place, expected in (
        (torch.float32, gpu, "bfloat16"),
        (torch.bfloat16, gpu, "model"),
        (torch.float32, cpu, "model"),
    ):
        assert api._automatic_dtype(tiny_lm().to(dtype), place) == expected


@pytest.mark.parametrize("kind", ["tensors", "lists", "batch", "dicts", "tuples"])
def test_token_ids_and_loaders_are_samples_as_they_are(kind):
    ids = torch.randint(3, 300, (6, 10), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    rows = [{"input_ids": i, "attention_mask": m, "label": 0} for i, m in zip(ids, mask, strict=True)]
    texts = {
        "tensors": list(ids),
        "lists": ids.tolist(),
        "batch": [ids],
        "dicts": DataLoader(rows, 3),
        "tuples": DataLoader(TensorDataset(ids), 4),
    }[kind]
    model, expected = tiny_lm(), tiny_lm()
    report = wandazeta.prune(model, None, texts, method="wanda", num_samples=4)
    assert report.num_samples == 4
    assert report.num_tokens == 40
    wandazeta.prune(expected, None, [ids[:4]], method="wanda")
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), expected.parameters(), strict=True))


def test_a_loader_that_shuffles_yields_the_same_samples_and_padding_does_not_count(tmp_path):
    ids = torch.randint(3, 300, (6, 10), generator=torch.Generator().manual_seed(0))
    mask = (torch.arange(10) < 7).long().expand_as(ids)
    rows = [{"input_ids": i, "attention_mask": m} for i, m in zip(ids, mask, strict=True)]
    for _ in range(2):
        loader = DataLoader(rows, 2, shuffle=True)
        report = wandazeta.prune(tiny_lm(), None, loader, method="wanda", num_samples=4, output_dir=tmp_path / "out")
    assert report.num_tokens == 4 * 7


@pytest.mark.parametrize(("options", "sparsity"), [({"sparsity": 0.25}, 0.25), ({}, 0.5), ({"pattern": "1:4"}, 0.75)])
def test_a_sparsity_alone_is_unstructured(options, sparsity):
    report = wandazeta.prune(tiny_lm(), byte_tokenizer(), method="magnitude", **options)
    assert report.sparsity_pattern == ("unstructured" if "sparsity" in options else options.get("pattern", "2:4"))
    assert abs(report.sparsity - sparsity) < 0.01


def test_excluded_layers_stay_dense():
    model = tiny_lm()
    wandazeta.prune(model, byte_tokenizer(), TEXTS, method="magnitude", exclude_modules=["mlp.down_proj"])
    dense = [weight for name, weight in model.named_parameters() if "down_proj" in name]
    assert all(bool((weight != 0).all()) for weight in dense)


@pytest.mark.parametrize("batch_size", [1, 5])
def test_the_perplexity_is_that_of_the_models_own_logits(batch_size):
    model, tokenizer = tiny_lm(), byte_tokenizer()
    tokens = torch.tensor(tokenizer("".join(text + "\n\n" for text in TEXTS), add_special_tokens=False)["input_ids"])
    windows = tokens[: len(tokens) // 16 * 16].view(-1, 16)
    with torch.no_grad():
        logits = model(windows).logits[:, :-1].double()
    expected = F.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten()).exp()
    found = wandazeta.evaluate(model, tokenizer, TEXTS, sequence_length=16, batch_size=batch_size, device="cpu")
    assert found.perplexity == pytest.approx(float(expected), rel=1e-5)
    assert (found.num_tokens, found.sequence_length) == (windows[:, 1:].numel(), 16)
    assert not found.starts_with_bos
    assert wandazeta.evaluate(model, byte_tokenizer(bos=True), TEXTS, sequence_length=16).starts_with_bos


def test_a_pruned_model_is_measured_beside_the_dense_one(tmp_path):
    dense, out = str(save_tiny_lm(tmp_path / "model")), tmp_path / "out"
    wandazeta.prune(dense, method="magnitude", output_dir=out)
    found = wandazeta.evaluate(str(out), None, TEXTS, baseline=dense, sequence_length=32, batch_size=4)
    assert found.baseline is not None
    assert (found.sparsity, found.baseline.sparsity) == (0.5, 0.0)
    size = (out / "model.safetensors").stat().st_size
    assert (found.num_bytes, found.baseline.num_bytes) == (size, size)
    assert found.num_parameters == sum(weight.numel() for weight in tiny_lm().parameters())
    alone = wandazeta.evaluate(dense, None, TEXTS, sequence_length=32, output_file=tmp_path / "dense.json")
    assert alone.perplexity == pytest.approx(found.baseline.perplexity)
    assert json.loads((out / "evaluation.json").read_text()) == found.to_dict()
    assert json.loads((tmp_path / "dense.json").read_text()) == alone.to_dict()
    assert not (tmp_path / "model/evaluation.json").exists()
    # the directory is still the model's
    report = wandazeta.prune(dense, method="magnitude", output_dir=out)
    assert report.sparsity == 0.5


def test_the_sample_text_is_the_most_probable_one():
    model, tokenizer = tiny_lm(), byte_tokenizer()
    # an end would come at a random place
    model.generation_config.eos_token_id = None
    sample = wandazeta.evaluate(model, tokenizer, TEXTS, sequence_length=32).sample
    ids = tokenizer("".join(text + "\n\n" for text in TEXTS), add_special_tokens=False)["input_ids"][:24]
    prompt = len(ids)
    with torch.no_grad():
        for _ in range(40):
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    assert sample.prompt == tokenizer.decode(ids[:prompt])
    assert sample.continuation == tokenizer.decode(ids[prompt:], skip_special_tokens=True)


def test_evaluation_leaves_the_model_in_its_mode():
    model = tiny_lm().train()
    wandazeta.evaluate(model, byte_tokenizer(), TEXTS, sequence_length=16)
    assert all(module.training for module in model.modules())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "wander"}, "`method`"),
        ({"pattern": "4:2"}, "`pattern`"),
        ({"pattern": "2:4", "sparsity": 0.7}, "`sparsity` to be left out with pattern='2:4'"),
        ({"pattern": "4:8", "pack": True}, "`pack`"),
        ({"compute_dtype": "float8"}, "`compute_dtype`"),
        ({"texts": "my.txt"}, "`texts` to be a list of texts"),
        ({"texts": []}, "Expected calibration texts, but got none"),
        ({"texts": [1.5]}, "but got float"),
        ({"num_samples": 0}, "`num_samples`"),
        ({"device": "tpu:7"}, "`device`"),
        ({"sequence_length": 10**6}, "`sequence_length`"),
    ],
)
def test_bad_arguments_are_named_before_any_work(options, message):
    model = tiny_lm()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        wandazeta.prune(model, byte_tokenizer(), **{"texts": TEXTS, "sequence_length": 16} | options)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_model_without_a_name_needs_a_tokenizer():
    for function in (wandazeta.prune, wandazeta.evaluate):
        with pytest.raises(ValueError, match="`tokenizer`"):
            function(tiny_lm(), None, TEXTS)


def test_a_baseline_that_is_missing_is_refused_before_anything_is_measured(tmp_path, monkeypatch):
    monkeypatch.setattr("wandazeta.api.mean_nll", lambda *_: pytest.fail("the model was measured first"))
    with pytest.raises(ValueError, match="nowhere"):
        wandazeta.evaluate(tiny_lm(), byte_tokenizer(), TEXTS, baseline=str(tmp_path / "nowhere"), sequence_length=32)
