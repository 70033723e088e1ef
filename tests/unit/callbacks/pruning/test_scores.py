import torch

from wandazeta.callbacks.pruning.scores import magnitude_score, regional_score


def test_scores_follow_the_formula():
    weight, gradient, norm = torch.randn(3, 4), torch.rand(3, 4), torch.rand(4)
    torch.testing.assert_close(regional_score(weight, norm, gradient, 7.0), (7 * gradient + norm[None]) * weight.abs())
    assert torch.equal(regional_score(weight, norm), weight.abs() * norm)
    assert torch.equal(regional_score(weight, norm, gradient, 0.0), weight.abs() * norm)
    assert torch.equal(magnitude_score(weight), weight.abs())


def test_scores_are_float32_and_leave_the_weight():
    weight = torch.randn(3, 4).bfloat16()
    before = weight.clone()
    assert regional_score(weight, torch.rand(4)).dtype == magnitude_score(weight).dtype == torch.float32
    assert torch.equal(weight, before)
