import torch

from wandazeta.pruning.progress.key import digest_batches, digest_model


def test_digests_tell_values_types_and_shapes_apart():
    zeros = torch.zeros(2, 3)
    variants = [zeros, zeros.view(3, 2), zeros.half(), zeros.int(), zeros - 0.0, torch.zeros(0), torch.tensor(0.0)]
    variants.append(torch.full((2, 3), -0.0))
    digests = [digest_model({"x": tensor})["x"] for tensor in variants]
    assert digests[0] == digests[4]
    assert len(set(digests)) == len(digests) - 1
    assert digest_model({"x": torch.arange(6.0).view(2, 3).t()}) == digest_model(
        {"x": torch.tensor([[0.0, 3], [1, 4], [2, 5]])}
    )


def test_digests_see_contents_order_and_padding():
    a, b = [torch.tensor([1, 2])], [torch.tensor([3, 4])]
    digests = [digest_batches(batches, lambda _: None) for batches in ([a, b], [b, a], [a], [a, b, a])]
    digests.append(digest_batches([a, b], lambda batch: batch[0] > 1))
    assert len(set(digests)) == 5
