"""Short help of the command line, printed without importing anything else.

Every command has a `Page` with its important options; `wandazeta COMMAND --help all` prints all of them. A test gives
each example and each option of the pages to the parsers.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from textwrap import fill, wrap

from wandazeta.version import __version__

__all__ = ["COMMANDS", "PAGES", "Page", "is_function", "short_help", "without_all"]

_HELP = ("-h", "--help")
_WIDTH = 80
_OPTION_WIDTH = 32


@dataclass(frozen=True)
class Page:
    """Short help of one command.

    Args:
        summary: What the command does.
        example: A command line that works as it stands, for paths of one's own; its lines end with a backslash.
        options: The important options, each with a value and an explanation.
    """

    summary: str
    example: str
    options: tuple[tuple[str, str], ...]


COMMANDS = {
    "prune": "prune a model by its name or directory: a Hugging Face directory comes out",
    "evaluate": "measure a model, and another one beside it: perplexity, sample text, tasks",
    "recover": "train a pruned model on the predictions of the dense one, and keep its zeros",
    "export-adapters": "write the adapters of a run for `wandazeta.load_adapters`",
    "bench": "measure the speed of a 2:4 model on a GPU, dense and on sparse kernels",
}
"""The commands that are functions (`wandazeta.cli.functions`), and what each does."""

_LIGHTNING = ("-c", "--config", "--model", "--data", "--trainer", "--prune", "--print_config")

_CONFIG = ("-c run.yaml", "Settings in YAML, or preset:best, preset:paper; later files and options override.")
_MODEL = ("--model.model_name_or_path NAME", "Directory or Hugging Face name of the model.")
_DATA = ("--data TextDataModule", "Data module: TextDataModule or PromptedClassificationDataModule.")
_SOURCE = ("--data.source my_text.jsonl", "Text: .txt, .jsonl, .csv or .parquet files, a folder, or a dataset.")
_RUN_DIR = ("--run_dir runs/first", "Folder of the run: logs, checkpoints, progress; a second start goes on there.")
_DEVICES = ("--trainer.devices 1", "Number of GPUs, or of processes on a CPU.")


def _evaluation(summary: str, command: str, *others: tuple[str, str]) -> Page:
    return Page(
        summary,
        f"wandazeta {command} --model LanguageModel --model.model_name_or_path NAME \\\n"
        "  --data TextDataModule --data.source my_text.jsonl",
        (
            _CONFIG,
            ("--model LanguageModel", "Module: LanguageModel evaluates a model, others what `fit` has trained."),
            _MODEL,
            ("--model.loading.dtype bfloat16", "Precision that the weights are loaded in."),
            _DATA,
            _SOURCE,
            ("--data.batch_size 8", "Texts in a batch."),
            ("--run_dir runs/first", "Folder of the `fit`, whose last checkpoint is used."),
            ("--ckpt_path null", "Another checkpoint, or null for the model without its training."),
            *others,
        ),
    )


PAGES = {
    "fit": Page(
        "Fine-tune a model, with forward passes alone or by back-propagation; `--prune` prunes it first.",
        "wandazeta fit --model ZerothOrderModule --model.model_name_or_path NAME \\\n"
        "  --data TextDataModule --data.source my_text.jsonl \\\n"
        "  --trainer.max_steps 1000 --run_dir runs/first",
        (
            _CONFIG,
            ("--model ZerothOrderModule", "Module: ZerothOrderModule (forward passes alone) or FirstOrderModule."),
            _MODEL,
            ("--model.trainable LoRAAdapters", "What is trained: TensorTrainAdapters, LoRAAdapters or Weights."),
            ("--model.learning_rate 1e-4", "Learning rate."),
            _DATA,
            _SOURCE,
            ("--prune.sparsity_pattern 2:4", "Prune the model before it is fitted, and keep it sparse."),
            ("--trainer.max_steps 1000", "Training steps."),
            _RUN_DIR,
        ),
    ),
    "validate": _evaluation("Measure on the validation split.", "validate", _DEVICES),
    "test": _evaluation("Measure on the test split.", "test", _DEVICES),
    "predict": _evaluation("Write predictions of the test split to predictions.jsonl in the run's folder.", "predict"),
    "prune": Page(
        "Prune a model by a configuration and write it as a directory that transformers loads.",
        "wandazeta prune -c preset:best --model LanguageModel \\\n"
        "  --model.model_name_or_path NAME --data TextDataModule \\\n"
        "  --data.source my_text.jsonl --run_dir runs/prune --output_dir runs/pruned",
        (
            _CONFIG,
            _MODEL,
            _SOURCE,
            ("--data.sequence_length 512", "Tokens of a calibration sample."),
            ("--prune.num_calibration_samples 64", "Calibration samples; by default 128, or all if there are fewer."),
            ("--prune.method wanda", "Method: tuned-ro (default), magnitude, wanda, rgs, ro, wanda++ or sparsegpt."),
            ("--prune.sparsity_pattern 2:4", "N:M (N of M weights are kept) or unstructured."),
            ("--prune.sparsity 0.5", "Fraction of zeros, for the pattern unstructured."),
            _RUN_DIR,
            ("--output_dir runs/pruned", "Directory to write."),
        ),
    ),
    "diagnose": Page(
        "Find the epsilon that suits a ZerothOrderModule and its data, without training.",
        "wandazeta diagnose --model ZerothOrderModule --model.model_name_or_path NAME \\\n"
        "  --data TextDataModule --data.source my_text.jsonl --output_dir runs/epsilon",
        (
            _CONFIG,
            _MODEL,
            ("--model.trainable LoRAAdapters", "What is trained: TensorTrainAdapters, LoRAAdapters or Weights."),
            ("--model.loading.dtype bfloat16", "Precision that the weights are loaded in."),
            _DATA,
            _SOURCE,
            ("--num_batches 2", "Training batches to measure on."),
            ("--num_queries 16", "Directions per batch."),
            ("--epsilons [1e-3,1e-2]", "Values to try."),
            ("--output_dir runs/diagnosis", "Directory to write."),
        ),
    ),
}


def is_function(arguments: Sequence[str]) -> bool:
    """Whether the command is one of `wandazeta.cli.functions`; `prune` with a configuration is one of LightningCLI.

    Args:
        arguments: The arguments of the command line.
    """
    if not arguments or arguments[0] not in COMMANDS:
        return False
    names = (argument.partition("=")[0].partition(".")[0] for argument in arguments[1:])
    return arguments[0] != "prune" or not any(name in _LIGHTNING for name in names)


def short_help(arguments: Sequence[str]) -> str | None:
    """Answer a request for help or for the version.

    Args:
        arguments: The arguments of the command line.

    Returns:
        The text to print, or None if the arguments ask for something else, or for all options of a command.
    """
    if list(arguments[:1]) == ["--version"]:
        return f"wandazeta {__version__}"
    if not arguments or without_all(arguments) != list(arguments) or not any(name in _HELP for name in arguments):
        return None
    if arguments[0] in PAGES:
        return _page(arguments[0], PAGES[arguments[0]])
    return _overview() if arguments[0] in _HELP else None


def without_all(arguments: Sequence[str]) -> list[str]:
    """Turn `--help all` into the `--help` of the parser, which prints all options."""
    kept: list[str] = []
    for argument in arguments:
        if not (argument == "all" and kept and kept[-1] in _HELP):
            kept.append(argument)
    return kept


def _overview() -> str:
    lines = ["Prune language models with Wanda++; fine-tune them with forward passes alone.", ""]
    lines += ["usage: wandazeta COMMAND [options]", ""]
    summaries = {name: f"{what[0].upper()}{what[1:]}." for name, what in COMMANDS.items()}
    for name, summary in (summaries | {name: page.summary for name, page in PAGES.items() if name != "prune"}).items():
        lines.append(fill(summary, _WIDTH, initial_indent=f"  {name:17}", subsequent_indent=" " * 19))
    lines += ["", "  wandazeta COMMAND --help      important options of a command, with an example"]
    lines += ["  wandazeta COMMAND --help all  all of its options", "  wandazeta --version           the version"]
    return "\n".join(lines)


def _page(command: str, page: Page) -> str:
    lines = [fill(page.summary, _WIDTH), "", f"usage: wandazeta {command} [options]", "", "example:"]
    lines += [f"  {line}" for line in page.example.splitlines()] + ["", "important options:"]
    for option, text in page.options:
        first, *others = wrap(text, _WIDTH - _OPTION_WIDTH - 4)
        if len(option) > _OPTION_WIDTH:
            lines.append(f"  {option}")
            lines.append(" " * (_OPTION_WIDTH + 4) + first)
        else:
            lines.append(f"  {option:{_OPTION_WIDTH}}  {first}")
        lines += [" " * (_OPTION_WIDTH + 4) + line for line in others]
    every = (
        f"`wandazeta {command} --help all` prints all options, `--model.help=CLASS` and `--data.help=CLASS` those of"
    )
    lines += ["", fill(f"{every} a class.", _WIDTH, break_on_hyphens=False)]
    return "\n".join(lines)
