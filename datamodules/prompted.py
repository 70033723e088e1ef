"""LightningDataModule with labelled text as prompts: a template, and one answer option per class."""

from typing import Any

from transformers import PreTrainedTokenizerBase
from typing_extensions import override

from wandazeta.data.prompts import encode_options, encode_prompt
from wandazeta.datamodules.classification import Batch, ClassificationDataModule, Example
from wandazeta.datamodules.tokenizer import find_tokenizer


class PromptedClassificationDataModule(ClassificationDataModule):
    """Balanced splits of labelled text as prompts with answer options.

    A batch of B prompts for C classes holds `input_ids` and `attention_mask` `(B, T)`, padded on the right, `label`
    `(B)`, `example_id` `(B)`, `option_ids` `(C, L)`, all int64, and `option_mask` `(C, L)`, True where an option has a
    token.

    Args:
        source: Labelled text: "sample:rotten-tomatoes", "sample:imdb", "sample:bbc-news", "sample:brown-genres", a
            file, folder or glob of .jsonl, .json, .csv or .parquet files, or a hub dataset.
        template: The prompt, in which {text} stands for the text. It should not end with a space.
        options: The answers in the order of the classes; for most tokenizers each has to start with a space.
        tokenizer: Model directory or hub name of the tokenizer; by default that of the module. It needs a pad token.
        **kwargs: All other arguments of `ClassificationDataModule`; prompts are limited by the
                positions that the model has learned, and not by the tokenizer's `model_max_length`.

    Raises:
        ValueError: If an argument is out of range; in `setup`, if the source has too few examples, a prompt is too
            long, an option has no token of its own, or there is no pad token.
    """

    def __init__(
        self,
        source: str = "sample:rotten-tomatoes",
        template: str = "{text} All in all, the movie was",
        options: list[str] = [" bad", " good"],  # noqa: B006  (read only; YAML needs the literal default)
        tokenizer: str | PreTrainedTokenizerBase | None = None,
        **kwargs: Any,
    ) -> None:
        if "{text}" not in template:
            raise ValueError(f"Expected argument `template` to contain {{text}}, but got {template!r}")
        if len(options) < 2 or len(set(options)) < len(options):
            raise ValueError(f"Expected argument `options` to be two or more different answers, but got {options}")
        super().__init__(source, num_classes=len(options), tokenizer=tokenizer, **kwargs)
        self.template = template
        self.options = list(options)

    @override
    def setup(self, stage: str | None = None) -> None:
        self.tokenizer = find_tokenizer(self.tokenizer, self.trainer)
        self._option_ids, self._option_mask = encode_options(self.tokenizer, self.template, self.options)
        # the model runs all tokens of an option but the last
        self._spare = self._option_ids.shape[1] - 1
        super().setup(stage)

    @override
    def encode(self, tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
        return encode_prompt(tokenizer, self.template, text, self._limit, self.truncate)

    @override
    def collate(self, examples: list[Example], to_longest: bool = False) -> Batch:
        options = {"option_ids": self._option_ids, "option_mask": self._option_mask}
        return super().collate(examples, to_longest) | options
