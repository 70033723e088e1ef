import pytest
import torch
from helpers.causal_lms import CONFIGS, classification_batch, text_batch, tiny_lm
from torch.nn import functional as F

from wandazeta.scoring.objectives import objective_losses
from wandazeta.scoring.scorer import Scorer, option_losses, option_rows

LONG = ((7, 11), (9,), (13, 17, 19))


def reference_scores(model, batch):
    """Length-normalised log-probability of every option, one option and one example at a time, full vocabulary."""
    scores = torch.zeros(len(batch["input_ids"]), len(batch["option_ids"]), dtype=torch.float64)
    for b, (ids, mask) in enumerate(zip(batch["input_ids"], batch["attention_mask"], strict=True)):
        prompt = ids[mask.bool()].tolist()
        for c, (option, option_mask) in enumerate(zip(batch["option_ids"], batch["option_mask"], strict=True)):
            tokens = option[option_mask].tolist()
            with torch.no_grad():
                logprobs = model(torch.tensor([prompt + tokens])).logits[0].double().log_softmax(-1)
            terms = [logprobs[len(prompt) - 1 + i, token] for i, token in enumerate(tokens)]
            scores[b, c] = sum(terms) / len(terms)
    return scores


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("options", [((7,), (9,), (11,)), LONG], ids=["single", "several"])
def test_option_scores_equal_one_option_at_a_time(kind, options):
    model, batch = tiny_lm(kind), classification_batch(options=options)
    scorer = Scorer(model)
    with torch.no_grad():
        scores = scorer.option_scores(scorer.prepare(batch)).values[0]
    expected = reference_scores(model, batch)
    # equal up to what cancels in the cross-entropy
    torch.testing.assert_close(scores.log_softmax(-1), expected.log_softmax(-1), atol=2e-5, rtol=0)
    torch.testing.assert_close(
        option_losses(scores[None], batch["label"])[0], F.cross_entropy(expected, batch["label"]), atol=2e-5, rtol=0
    )


def test_several_token_scores_are_log_probabilities():
    model, batch = tiny_lm(), classification_batch(options=LONG)
    scorer = Scorer(model)
    with torch.no_grad():
        scores = scorer.option_scores(scorer.prepare(batch)).values[0]
    torch.testing.assert_close(scores, reference_scores(model, batch), atol=2e-5, rtol=0)


@pytest.mark.parametrize("options", [((7,), (9,)), LONG], ids=["single", "several"])
def test_features_are_the_inputs_of_the_head_where_the_answer_begins(options):
    model, batch = tiny_lm(), classification_batch(options=options)
    scorer = Scorer(model)
    with torch.no_grad():
        scores = scorer.option_scores(scorer.prepare(batch))
        hidden = model.model(batch["input_ids"], attention_mask=batch["attention_mask"]).last_hidden_state
    ends = batch["attention_mask"].sum(1) - 1
    torch.testing.assert_close(scores.features, hidden[torch.arange(len(ends)), ends], atol=1e-5, rtol=1e-5)


def test_answers_add_to_the_scores_and_callers_see_them():
    model, batch = tiny_lm(), classification_batch()
    scorer, seen = Scorer(model), []
    prepared = scorer.prepare(batch)
    with torch.no_grad():
        plain = scorer.option_scores(prepared)
        weight = torch.randn(2, plain.features.shape[-1], generator=torch.Generator().manual_seed(0))
        scorer.adapt(answers=lambda features: features @ weight.T)
        loss = objective_losses(None, scorer, prepared, on_scores=seen.append)
    (scores,) = seen
    assert torch.equal(scores.features, plain.features)
    torch.testing.assert_close(scores.values, plain.values + (plain.features @ weight.T).double())
    assert torch.equal(loss, option_losses(scores.values, batch["label"]))


def test_rows_of_several_token_options():
    batch = {
        "input_ids": torch.tensor([[5, 6, 0]]),
        "attention_mask": torch.tensor([[1, 1, 0]]),
        "option_ids": torch.tensor([[7, 8, 9], [4, 0, 0]]),
        "option_mask": torch.tensor([[True, True, True], [True, False, False]]),
    }
    rows = option_rows(batch)
    assert rows.input_ids.tolist() == [[5, 6, 7, 8, 0], [5, 6, 0, 0, 0]]
    assert rows.attention_mask.tolist() == [[1, 1, 1, 1, 0], [1, 1, 0, 0, 0]]
    assert rows.positions.tolist() == [[1, 2, 3], [1, 1, 1]]


def test_text_loss_is_the_models_own():
    model, batch = tiny_lm(), text_batch()
    scorer = Scorer(model)
    with torch.no_grad():
        nll = scorer.token_nll(scorer.prepare(batch))[0]
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        expected = model(**batch, labels=labels).loss
    torch.testing.assert_close(nll.sum() / batch["attention_mask"][:, 1:].sum(), expected)


def test_16_bit_scores_are_not_rounded_to_16_bits():
    model = tiny_lm().bfloat16()
    scorer = Scorer(model)
    with torch.no_grad():
        scores = scorer.option_scores(scorer.prepare(classification_batch())).values
    assert not torch.equal(scores, scores.bfloat16().double())


def test_padding_on_the_left_is_refused():
    batch = classification_batch()
    batch["attention_mask"] = batch["attention_mask"].flip(1)
    with pytest.raises(ValueError, match="right"):
        Scorer(tiny_lm()).prepare(batch)


def test_missing_and_empty_options_are_refused():
    scorer, batch = Scorer(tiny_lm()), classification_batch()
    with pytest.raises(ValueError, match="option_ids"):
        scorer.prepare({k: v for k, v in batch.items() if k != "option_ids"})
    with pytest.raises(ValueError, match="every answer option"):
        scorer.prepare({**batch, "option_mask": torch.tensor([[True], [False]])})
