import io

import pytest
from helpers.causal_lms import tiny_lm
from rich.console import Console

from wandazeta.scoring.evaluation import Evaluation, SampleText, block_sparsity, evaluation_table

TASKS = {
    "a_task_with_a_rather_long_name": {"alias": "x", "acc,none": 0.25, "acc_stderr,none": 0.01, "sample_len": 3},
    "math": {"exact_match,strict-match": 0.5, "exact_match_stderr,strict-match": "N/A", "perplexity,none": 1234567.8},
}


def shown(evaluation):
    console = Console(width=80, file=io.StringIO())
    console.print(evaluation_table(evaluation))
    return console.file.getvalue()


def test_all_figures_fit_into_80_columns():
    name = "an-organisation-with-a-long-name/a-model-with-an-even-longer-name-70b-instruct"
    sample = SampleText("It was a dark and stormy night", " and a line\n of the text that the model made of it" * 4)
    text = {"perplexity": 12.345, "num_tokens": 100_000, "sample": sample, "tasks": TASKS}
    dense = Evaluation(name, 70_553_706_496, 0.0, 141_107_412_992, **text)
    pruned = Evaluation(f"{name}-2of4", 70_553_706_496, 0.5, 141_107_412_992, baseline=dense, **text)
    lines = shown(pruned).splitlines()
    assert max(map(len, lines)) <= 80
    for figure in ("12.35", "70,553,706,496", "131.42 GiB", "50.0%", "0.25 ± 0.01", "0.5", "1.235e+06"):
        assert any(figure in line for line in lines), figure
    assert "…" not in "".join(lines)
    assert "alias" not in "".join(lines)


def test_a_model_alone_without_text_has_no_perplexity():
    table = shown(Evaluation("model", 1000, 0.25))
    assert "25.0%" in table
    assert "perplexity" not in table
    assert "continued" not in table


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_the_sparsity_is_that_of_the_blocks(kind):
    model = tiny_lm(kind)
    assert block_sparsity(model) == 0
    blocks = model.model.layers if kind == "llama" else model.transformer.h
    matrices = [weight for weight in blocks.parameters() if weight.ndim == 2]
    for weight in matrices:
        weight.data[:, ::4] = 0
    assert block_sparsity(model) == pytest.approx(0.25)
