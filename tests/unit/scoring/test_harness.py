import json
import sys

import pytest
import torch
from helpers.causal_lms import tiny_lm
from helpers.tokenizer import byte_tokenizer

import wandazeta
from wandazeta.scoring.harness import load_tasks

TASK = """
task: short_sums
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
output_type: multiple_choice
test_split: test
doc_to_text: "{{{{sum}}}} ="
doc_to_choice: ["1", "2", "3"]
doc_to_target: answer
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    pytest.importorskip("lm_eval")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    rows = [{"sum": f"{a} + {b}", "answer": a + b - 1} for a in (0, 1) for b in (1, 2)]
    (tmp_path / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "sums.yaml").write_text(TASK.format(file=tmp_path / "sums.jsonl"))
    return tmp_path


def accuracy(model, tokenizer):
    """The share of sums whose right answer has the largest log-likelihood."""
    right = 0
    for a, b in ((0, 1), (0, 2), (1, 1), (1, 2)):
        scores = []
        for answer in ("1", "2", "3"):
            ids = torch.tensor([tokenizer(f"{a} + {b} = {answer}")["input_ids"]])
            with torch.no_grad():
                logs = model(ids).logits.log_softmax(-1)
            # two tokens: the space and the figure
            scores.append(sum(float(logs[0, place - 1, ids[0, place]]) for place in (-2, -1)))
        right += scores.index(max(scores)) == a + b - 1
    return right / 4


@pytest.mark.filterwarnings("ignore")
def test_tasks_of_a_folder_run_on_the_model_in_memory(folder):
    model, tokenizer = tiny_lm(), byte_tokenizer()
    state = torch.get_rng_state()
    dense = tiny_lm(seed=1)
    found = wandazeta.evaluate(model, tokenizer, tasks=["short_sums"], include_path=folder, baseline=dense)
    assert torch.equal(torch.get_rng_state(), state)
    assert found.tasks["short_sums"]["acc,none"] == accuracy(model, tokenizer)
    assert found.baseline.tasks["short_sums"]["acc,none"] == accuracy(dense, tokenizer)
    assert found.perplexity is None
    limited = wandazeta.evaluate(model, tokenizer, tasks=["short_sums"], include_path=folder, limit=2)
    assert limited.tasks["short_sums"]["sample_len"] == 2


def test_an_unknown_task_or_folder_is_refused_before_the_model_is_loaded(folder):
    with pytest.raises(ValueError, match=r"but got 'short_sum'; did you mean `short_sums`"):
        wandazeta.evaluate("nowhere/at/all", tasks=["short_sum"], include_path=folder)
    with pytest.raises(ValueError, match="`include_path` to be a folder with tasks"):
        wandazeta.evaluate("nowhere/at/all", tasks=["short_sums"], include_path=folder / "none")


def test_without_the_harness_its_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install 'wandazeta\[eval\]'"):
        load_tasks(["hellaswag"])
