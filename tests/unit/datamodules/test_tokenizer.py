from types import SimpleNamespace

import pytest
from helpers.tokenizer import byte_tokenizer

from wandazeta.datamodules.tokenizer import find_tokenizer


def test_the_tokenizer_is_the_given_one_or_the_modules(tmp_path):
    own = byte_tokenizer()
    trainer = SimpleNamespace(lightning_module=SimpleNamespace(tokenizer=byte_tokenizer()))
    assert find_tokenizer(own, trainer) is own
    assert find_tokenizer(None, trainer) is trainer.lightning_module.tokenizer
    own.save_pretrained(tmp_path)
    assert find_tokenizer(str(tmp_path), trainer)("a")["input_ids"] == own("a")["input_ids"]


@pytest.mark.parametrize("trainer", [None, SimpleNamespace(lightning_module=SimpleNamespace())])
def test_no_tokenizer_is_an_error(trainer, tmp_path):
    with pytest.raises(ValueError, match="`tokenizer` to be given"):
        find_tokenizer(None, trainer)
    with pytest.raises(ValueError, match="Expected argument `tokenizer`"):
        find_tokenizer(str(tmp_path / "nowhere"), trainer)
