import re

import pytest

from wandazeta.models.loading import LoadingOptions, load_backbone, load_tokenizer
from wandazeta.modules import FirstOrderModule, ZerothOrderModule


def refusal(model_name_or_path):
    """What both say of a model that is not there."""
    with pytest.raises(ValueError, match=f"but got {re.escape(repr(model_name_or_path))}: ") as tokenizer:
        load_tokenizer(model_name_or_path)
    with pytest.raises(ValueError, match=f"but got {re.escape(repr(model_name_or_path))}: ") as model:
        load_backbone(model_name_or_path)
    reasons = [str(error.value).split(f"{model_name_or_path!r}: ")[1] for error in (tokenizer, model)]
    assert reasons[0] == reasons[1]
    return reasons[0]


@pytest.fixture(autouse=True)
def own_folder(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("WANDAZETA_CACHE", raising=False)


@pytest.mark.parametrize("name", ["runs/pruned", "./model", "../model", "/nowhere/model", "some/where/model"])
def test_a_directory_that_is_not_there_is_no_name_of_the_hub(name):
    assert refusal(name) == "there is no such directory; write it first, or name another"


def test_a_name_of_the_hub_has_the_hubs_answer():
    assert "no such directory" not in refusal("owner/model")


def test_a_directory_that_is_there_has_its_own_reason(tmp_path):
    (tmp_path / "runs/pruned").mkdir(parents=True)
    with pytest.raises(ValueError, match="but got 'runs/pruned': ") as error:
        load_backbone("runs/pruned")
    assert "no such directory" not in str(error.value)


def test_a_sample_that_is_not_there_comes_with_its_command(tmp_path, monkeypatch):
    command = "python -m wandazeta.data.samples minilm-l6"
    fetching = "there is no such directory; run `{}` to fetch this sample"
    # nobody has made the folder that the configs name: without it samples go to the home directory
    name = ".cache/wandazeta/minilm-l6"
    assert refusal(name) == fetching.format(f"WANDAZETA_CACHE=.cache/wandazeta {command}")
    (tmp_path / ".cache/wandazeta").mkdir(parents=True)
    assert refusal(name) == fetching.format(command)
    monkeypatch.setenv("WANDAZETA_CACHE", str(tmp_path / "samples"))
    assert refusal(name) == fetching.format(f"WANDAZETA_CACHE=.cache/wandazeta {command}")
    assert refusal(str(tmp_path / "samples/minilm-l6")) == fetching.format(command)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "int8"}, "`dtype` to be float32, bfloat16 or float16, but got 'int8'"),
        ({"num_classes": 1}, "`num_classes` to be at least 2, but got 1"),
        ({"stream_weights": True, "shard_on_load": True}, "at most one of `stream_weights` and `shard_on_load`"),
        ({"num_classes": 2, "stream_weights": True}, "`num_classes` to be null with `stream_weights`, but got 2"),
        ({"num_classes": 2, "shard_on_load": True}, "`num_classes` to be null with `shard_on_load`, but got 2"),
    ],
)
def test_options_are_checked_when_they_are_given(options, message):
    with pytest.raises(ValueError, match=message):
        LoadingOptions(**options)


@pytest.mark.parametrize("option", ["stream_weights", "shard_on_load"])
def test_modules_refuse_options_that_they_cannot_use(option):
    options = LoadingOptions(**{option: True})
    with pytest.raises(ValueError, match=f"`{option}` to be false for FirstOrderModule, but got True"):
        FirstOrderModule("nowhere/at/all", options)
    if option == "stream_weights":
        with pytest.raises(ValueError, match=f"`{option}` to be false for ZerothOrderModule"):
            ZerothOrderModule("nowhere/at/all", options)
