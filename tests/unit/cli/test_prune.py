import copy
import json
import sys

import pytest
import torch
from helpers.pruning import Tiny, callback, trainer
from lightning.pytorch import LightningDataModule, LightningModule
from safetensors.torch import load_file
from torch.utils.data import DataLoader
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BertConfig,
    GPT2Config,
    LlamaConfig,
    PreTrainedTokenizerFast,
)

from wandazeta.cli.lightning_cli import _started_devices
from wandazeta.cli.prune import prune_module
from wandazeta.pruning.records import PruneReport

LLAMA = LlamaConfig(
    vocab_size=64,
    hidden_size=16,
    intermediate_size=32,
    num_hidden_layers=2,
    num_attention_heads=2,
    tie_word_embeddings=True,
)
GPT2 = GPT2Config(vocab_size=64, n_embd=16, n_layer=2, n_head=2, n_positions=32)
BERT = BertConfig(
    vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, pad_token_id=0
)
KINDS = {
    "llama": (AutoModelForCausalLM, LLAMA),
    "gpt2": (AutoModelForCausalLM, GPT2),
    "bert": (AutoModelForSequenceClassification, BERT),
}


class Module(LightningModule):
    """Holds a transformers model one level down."""

    def __init__(self, kind="llama", dtype=torch.float32):
        super().__init__()
        auto, config = KINDS[kind]
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.backbone = auto.from_config(copy.deepcopy(config)).to(dtype)

    def forward(self, input_ids, attention_mask=None):
        return self.backbone(input_ids=input_ids, attention_mask=attention_mask).logits


class Data(LightningDataModule):
    def __init__(self, tokenizer=None):
        super().__init__()
        self.tokenizer = tokenizer

    def setup(self, stage):
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(1, 64, (8, 6), generator=generator)
        self.rows = [{"input_ids": row, "attention_mask": torch.ones_like(row)} for row in ids]

    def calibration_dataloader(self):
        return DataLoader(self.rows, batch_size=4)


def word_tokenizer():
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel

    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel({"a": 0, "b": 1}, unk_token="a")))


def export(tmp_path, kind="llama", dtype=torch.float32, tokenizer=None, **kwargs):
    module = Module(kind, dtype)
    pruning = callback(tmp_path / "progress", **kwargs)
    prune_module(trainer(pruning), module, Data(tokenizer), pruning, tmp_path / "out")
    return module, pruning


@pytest.mark.parametrize("kind", list(KINDS))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_transformers_alone_gives_the_same_logits(tmp_path, kind, dtype):
    module, _ = export(tmp_path, kind, dtype)
    loaded = KINDS[kind][0].from_pretrained(tmp_path / "out").eval()
    assert loaded.dtype == dtype
    ids = torch.arange(1, 13).view(2, 6)
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, module.backbone.eval()(ids).logits)


@pytest.mark.parametrize("kind", list(KINDS))
def test_masks_match_the_zeros_by_the_names_on_disk(tmp_path, kind):
    _, pruning = export(tmp_path, kind)
    weights = load_file(tmp_path / "out" / "model.safetensors")
    masks = load_file(tmp_path / "out" / "sparsity/masks.safetensors")
    assert len(masks) == sum(len(block.layers) for block in pruning.report.blocks)
    dense = {key: weight for key, weight in Module(kind).backbone.state_dict().items() if key in weights}
    for name, mask in masks.items():
        assert mask.dtype == torch.bool
        assert torch.equal(weights[name] == 0, ~mask)
        assert not weights[name][~mask].signbit().any()
        assert mask.float().mean() == 0.5
    for name in weights.keys() - masks.keys():
        assert torch.equal(weights[name], dense[name]), name


def test_the_directory_holds_report_card_and_tokenizer(tmp_path):
    _, pruning = export(tmp_path, tokenizer=word_tokenizer())
    out = tmp_path / "out"
    report = json.loads((out / "prune_report.json").read_text())
    assert report.pop("key") == pruning.key
    assert PruneReport.from_dict(report) == pruning.report
    card = (out / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: transformers\n")
    for piece in ("50.00%", "`wanda++`", "`2:4`", "neither smaller nor faster", "LlamaForCausalLM.from_pretrained"):
        assert piece in card
    assert "- `prune_report.html`" in card
    page = (out / "prune_report.html").read_text()
    assert "50.0% of the weights in 14 layers are zero" in page
    assert "<title>LlamaForCausalLM, pruned</title>" in page
    assert (out / "tokenizer.json").exists()
    assert not list(tmp_path.glob(".*"))
    assert len({path.stat().st_mode for path in out.rglob("*") if path.is_file()}) == 1


def test_without_matplotlib_all_but_the_page_is_written(tmp_path, monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    export(tmp_path)
    assert (tmp_path / "out" / "prune_report.json").exists()
    assert not (tmp_path / "out" / "prune_report.html").exists()
    assert "prune_report.html" not in (tmp_path / "out" / "README.md").read_text()
    notes = [note.getMessage() for note in caplog.records if note.name.endswith("pruning.export.pretrained")]
    assert len(notes) == 1
    assert notes[0].startswith("Skipped prune_report.html: ")
    assert "wandazeta[report]" in notes[0]


def test_a_second_export_replaces_the_first_and_others_are_refused(tmp_path):
    export(tmp_path)
    first = (tmp_path / "out" / "model.safetensors").read_bytes()
    (tmp_path / "out" / "README.md").write_text("mine")
    export(tmp_path)
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == first
    assert (tmp_path / "out" / "README.md").read_text() != "mine"
    pruning = callback(tmp_path / "elsewhere", alpha=1.0)
    with pytest.raises(ValueError, match="holds another pruned model; choose another"):
        prune_module(trainer(pruning), Module(), Data(), pruning, tmp_path / "out")
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "a.txt").write_text("")
    with pytest.raises(ValueError, match="holds other files; choose another"):
        prune_module(trainer(pruning), Module(), Data(), pruning, tmp_path / "notes")
    assert not (tmp_path / "elsewhere").exists()


def test_what_does_not_fit_is_said_before_any_work(tmp_path):
    pruning = callback(tmp_path / "progress")
    for output in (tmp_path, tmp_path / "progress", tmp_path / "progress" / "out"):
        with pytest.raises(ValueError, match="`output_dir` to be a folder outside the callback's"):
            prune_module(trainer(pruning), Module(), Data(), pruning, output)
    with pytest.raises(ValueError, match="Tiny to hold a transformers model"):
        prune_module(trainer(pruning), Tiny(), None, pruning, tmp_path / "out")
    with pytest.raises(ValueError, match="to be a folder that can be written to"):
        prune_module(trainer(pruning), Module(), Data(), pruning, "/proc/out/model")
    assert not (tmp_path / "progress").exists()


class Unwritable:
    pad_token_id = 0

    def save_pretrained(self, directory):
        raise TypeError("no JSON")


def test_what_cannot_be_exported_is_refused_before_any_work(tmp_path):
    module, pruning = Module(), callback(tmp_path / "progress")
    module.backbone.generation_config.temperature = 0.5
    with pytest.raises(ValueError, match=r"(?s)a model that can be saved.*temperature"):
        prune_module(trainer(pruning), module, Data(), pruning, tmp_path / "out")
    with pytest.raises(ValueError, match=r"a tokenizer that can be saved.*no JSON"):
        prune_module(trainer(pruning), Module(), Data(Unwritable()), pruning, tmp_path / "out")
    with pytest.raises(ValueError, match="`fast_dev_run` to be False"):
        prune_module(trainer(pruning, fast_dev_run=True), Module(), Data(), pruning, tmp_path / "out")
    assert not list((tmp_path / "progress").glob("block_*"))
    assert not (tmp_path / "out").exists()


def test_fitting_after_pruning_takes_what_was_pruned(tmp_path):
    module, pruning = export(tmp_path)
    fresh = Module()
    again = callback(tmp_path / "progress")
    runner = trainer(again)
    runner.strategy.connect(fresh)
    again.setup(runner, fresh, "validate")
    assert again.key == pruning.key
    assert torch.equal(
        fresh.backbone.model.layers[1].mlp.up_proj.weight, module.backbone.model.layers[1].mlp.up_proj.weight
    )


TORCHRUN = {"TORCHELASTIC_RUN_ID": "1", "WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "4"}
SRUN = {"SLURM_NTASKS": "8", "SLURM_STEP_NUM_TASKS": "8", "SLURM_STEP_NUM_NODES": "2", "SLURM_JOB_NAME": "prune"}


@pytest.mark.parametrize("launcher", [TORCHRUN, SRUN])
def test_processes_that_were_started_are_the_ranks_whatever_the_configuration_says(monkeypatch, launcher):
    for name in TORCHRUN | SRUN:
        monkeypatch.delenv(name, raising=False)
    assert _started_devices(1) == {}
    for name, value in launcher.items():
        monkeypatch.setenv(name, value)
    assert _started_devices(1) == _started_devices("auto") == {"devices": 4, "num_nodes": 2}
    # which GPUs, one for each process
    assert _started_devices([4, 5, 6, 7]) == {}


def test_processes_that_differ_between_nodes_are_refused(monkeypatch):
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    for name, value in (SRUN | {"SLURM_STEP_NUM_TASKS": "7"}).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match="as many processes on every node, but got 7 on 2 nodes"):
        _started_devices(1)
