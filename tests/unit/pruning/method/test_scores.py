import torch

from wandazeta.pruning.method.scores import magnitude_score, regional_score


def test_scores_follow_the_formula():
    weight, gradient, norm = torch.randn(3, 4), torch.rand(3, 4), torch.rand(4)
    torch.testing.assert_close(regional_score(weight, norm, gradient, 7.0), (7 * gradient + norm[None]) * weight.abs())
    assert torch.equal(regional_score(weight, norm), weight.abs() * norm)
    assert torch.equal(regional_score(weight, norm, gradient, 0.0), weight.abs() * norm)
    assert torch.equal(magnitude_score(weight), weight.abs())


def test_the_automatic_alpha_gives_the_gradient_a_tenth_of_the_norms_weight_at_any_scale():
    weight, gradient, norm = torch.randn(3, 4), torch.rand(3, 4), torch.rand(4)
    for scale in (1e-6, 1.0, 1e6):
        score = regional_score(weight, norm, gradient * scale, "auto")
        expected = norm + 0.1 * norm.mean() / gradient.mean() * gradient
        torch.testing.assert_close(score, expected * weight.abs())
    # a layer that the output does not depend on
    assert torch.equal(regional_score(weight, norm, torch.zeros(3, 4), "auto"), weight.abs() * norm)


def test_scores_are_float32_and_leave_the_weight():
    weight = torch.randn(3, 4).bfloat16()
    before = weight.clone()
    assert regional_score(weight, torch.rand(4)).dtype == magnitude_score(weight).dtype == torch.float32
    assert torch.equal(weight, before)


def test_a_gradient_of_zero_leaves_the_norms_alone():
    weight, norm = torch.randn(4, 8), torch.rand(8) * 1e3
    score = regional_score(weight, norm, torch.zeros(4, 8), alpha="auto")
    assert torch.equal(score, regional_score(weight, norm))
