import pytest
from helpers.architectures import build
from torch import nn

from wandazeta.models.pretrained import find_pretrained


class Holder(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(2, 2)
        self.inner = nn.ModuleDict({"backbone": build("bert")[0]})


def test_the_model_is_found_wherever_it_is():
    holder = Holder()
    model = holder.inner["backbone"]
    assert find_pretrained(holder) == ("inner.backbone.", model)
    assert find_pretrained(model) == ("", model)
    with pytest.raises(ValueError, match="Embedding to hold a transformers model"):
        find_pretrained(holder.embedding)
