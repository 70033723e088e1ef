import pytest
import torch
from helpers.causal_lms import classification_batch, text_batch, tiny_lm

from wandazeta.scoring import distillation
from wandazeta.scoring.distillation import TeacherTargets, divergence, teacher_loss
from wandazeta.scoring.scorer import Scorer


@pytest.fixture(autouse=True)
def few_top(monkeypatch):
    """Fewer than the tiny vocabulary has, and chunks that do not divide the positions."""
    monkeypatch.setattr(distillation, "NUM_TOP", 5)
    monkeypatch.setattr(distillation, "_CHUNK", 4)


def outcomes(logits, top):
    """Probabilities of some tokens and of all others together, written out token by token."""
    probabilities = logits.double().softmax(-1)
    rows = []
    for row, chosen in zip(probabilities, top.tolist(), strict=True):
        others = [float(p) for token, p in enumerate(row) if token not in chosen]
        rows.append([*(float(row[token]) for token in chosen), sum(others)])
    return torch.tensor(rows, dtype=torch.float64)


def plain_divergence(logits, top, teacher):
    probabilities = logits.double().softmax(-1)
    kept = probabilities.gather(1, top)
    student = torch.cat([kept, 1 - kept.sum(1, keepdim=True)], 1)
    return (teacher * (teacher / student).log()).sum(1)


def test_divergence_and_its_gradient_are_those_of_the_definition():
    torch.manual_seed(0)
    teacher_logits, student_logits = torch.randn(6, 30), torch.randn(6, 30, requires_grad=True)
    top = teacher_logits.topk(5).indices
    teacher = outcomes(teacher_logits, top)
    weights = torch.rand(6)
    found = divergence(student_logits, top, teacher.log().float())
    (gradient,) = torch.autograd.grad((found * weights).sum(), student_logits)
    expected = plain_divergence(student_logits, top, teacher)
    (expected_gradient,) = torch.autograd.grad((expected * weights).sum(), student_logits)
    torch.testing.assert_close(found, expected.float())
    torch.testing.assert_close(gradient, expected_gradient)
    # none at the teacher itself, and no more than over the whole vocabulary
    assert divergence(teacher_logits, top, teacher.log().float()).abs().max() < 1e-6
    p, q = teacher_logits.double().softmax(-1), student_logits.double().softmax(-1)
    assert bool((found < (p * (p / q).log()).sum(1)).all())


def test_logits_of_16_bits_and_certain_predictions_give_finite_values():
    logits = torch.zeros(2, 30)
    logits[:, 3] = 1000.0
    top = torch.tensor([[3, 1, 2, 4, 5]] * 2)
    teacher = torch.tensor([[0.0, *[-65504.0] * 5]] * 2)
    student = torch.randn(2, 30).bfloat16().requires_grad_()
    loss = divergence(student, top, teacher)
    loss.sum().backward()
    assert loss.dtype == torch.float32
    assert student.grad.dtype == torch.bfloat16
    assert bool(loss.isfinite().all() & student.grad.isfinite().all())
    assert float(divergence(logits, top, teacher).abs().max()) == 0.0


def test_the_loss_leaves_padding_out_and_targets_do_not_depend_on_the_batch(tmp_path):
    teacher, student, batch = tiny_lm(seed=1), tiny_lm(seed=2), text_batch(3)
    scorer = Scorer(student)
    targets = TeacherTargets(teacher, tmp_path, "key", 300)
    loss = teacher_loss(scorer, scorer.prepare(batch), targets)
    # reference: every text alone and without its padding
    total, count = 0.0, 0
    for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True):
        ids = ids[None, : int(mask.sum())]
        with torch.no_grad():
            teacher_logits, student_logits = teacher(input_ids=ids).logits[0], student(input_ids=ids).logits[0]
        top = teacher_logits.topk(5).indices
        total += float(plain_divergence(student_logits, top, outcomes(teacher_logits, top)).sum())
        count += ids.shape[1]
    # targets have 16 bits
    assert float(loss.detach()) == pytest.approx(total / count, rel=2e-3)
    together = targets.of(batch["input_ids"], batch["attention_mask"])
    for row in range(3):
        alone = TeacherTargets(teacher, tmp_path / "alone", "key", 300).of(
            batch["input_ids"][row : row + 1], batch["attention_mask"][row : row + 1]
        )
        assert all(torch.equal(a[row : row + 1], b) for a, b in zip(together, alone, strict=True))


def test_targets_are_computed_once_and_damaged_ones_anew(tmp_path):
    batch, more = text_batch(3), text_batch(2, seed=1)
    first = TeacherTargets(tiny_lm(), tmp_path, "key", 300)
    expected = first.of(batch["input_ids"], batch["attention_mask"])
    assert first.num_computed == 3
    (path,) = tmp_path.iterdir()
    content = path.read_bytes()

    def read(num_computed, key="key"):
        later = TeacherTargets(tiny_lm(), tmp_path, key, 300)
        found = later.of(batch["input_ids"].flip(0), batch["attention_mask"].flip(0))
        assert later.num_computed == num_computed
        assert all(torch.equal(a, b.flip(0)) for a, b in zip(expected, found, strict=True))
        return later

    read(0)
    read(3, key="of another teacher")
    # a process that was killed while it wrote the last one; and a disk that lost a part of the first one
    path.write_bytes(content[:-7])
    read(1).of(more["input_ids"], more["attention_mask"])
    damaged = bytearray(path.read_bytes())
    damaged[100:200] = bytes(100)
    path.write_bytes(damaged)
    read(1)
    read(0)
    assert len(path.read_bytes()) == len(content) // 3 * 5


def test_a_batch_to_classify_is_refused(tmp_path):
    scorer = Scorer(tiny_lm())
    with pytest.raises(ValueError, match="Expected a batch of running text for `teacher`, but got one with `label`"):
        teacher_loss(scorer, scorer.prepare(classification_batch()), TeacherTargets(tiny_lm(), tmp_path, "key", 300))
