"""The commands that are functions: `prune`, `evaluate`, `recover`, `export-adapters` and `bench`.

Options, defaults and help of `prune`, `evaluate` and `recover` come from the functions themselves.
"""

import ast
import inspect
import os
import re
import sys
from argparse import Action, RawDescriptionHelpFormatter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal, get_args, get_origin

import docstring_parser
from jsonargparse import ArgumentParser, Namespace
from jsonargparse.typing import register_type
from typing_extensions import override

from wandazeta.cli.help import COMMANDS

__all__ = ["main", "parse"]

_EXAMPLES = {
    "prune": "wandazeta prune path/or/name --text my.txt --sparsity 0.5 --method wanda --output_dir out\n"
    "  wandazeta prune -c preset:best -c my.yaml … has all options of Lightning (`--help all`)",
    "evaluate": "wandazeta evaluate out --baseline path/or/name --text my.txt",
    "recover": "wandazeta recover out --teacher path/or/name --text my.txt --output_dir recovered",
    "export-adapters": "wandazeta export-adapters runs/demo adapters",
    "bench": "wandazeta bench out --batch_sizes 1 32",
}
FUNCTIONS = {
    "prune": "wandazeta.api:prune",
    "evaluate": "wandazeta.api:evaluate",
    "recover": "wandazeta.cli.recover:recover",
}
"""Commands whose options are the arguments of a function."""


class Words(list[str]):
    """Strings separated by commas."""


register_type(Words, ",".join, lambda text: Words(filter(None, text.split(","))) if isinstance(text, str) else text)


class CommandParser(ArgumentParser):
    """Parser whose errors are `ValueError`s of one line."""

    @override
    def error(self, message: str, ex: Exception | None = None) -> Any:
        found = re.match(r'Parser key "(\w+)":', message)
        if found is None:
            raise ValueError(message)
        (action,) = (action for action in self._actions if action.dest == found[1])
        value = re.findall(r"(?:Got|Given) value: (.*)", message)[-1]
        raise ValueError(f"Expected argument `{found[1]}` to be {_words(action)}, but got {value!r}")


def main(args: Sequence[str]) -> None:
    """Run a command of this module and report errors in one line.

    Args:
        args: The arguments, from the command on.

    Raises:
        SystemExit: With code 2 for an argument that does not fit, with 130 if a signal stopped the command, and after
            `--help`.
    """
    try:
        options = parse(args)
    except ValueError as error:
        sys.stderr.write(f"error: {error}\n")
        raise SystemExit(2) from None
    # after the options: it takes seconds
    from wandazeta.cli.errors import reported_errors

    runs = {
        "prune": _prune,
        "evaluate": _evaluate,
        "recover": _recover,
        "export-adapters": _export_adapters,
        "bench": _bench,
    }
    with reported_errors():
        try:
            runs[args[0]](options)
        except KeyboardInterrupt as error:
            sys.stderr.write(f"{error or 'stopped'}\n")
            raise SystemExit(130) from None


def parse(args: Sequence[str]) -> Namespace:
    """Parse the arguments of a command of this module, without loading torch.

    Args:
        args: The arguments, from the command on.

    Raises:
        ValueError: If one is unknown or has another type.
        SystemExit: After `--help`.
    """
    command = args[0]
    what = COMMANDS[command]
    parser = CommandParser(
        prog=f"wandazeta {command}",
        usage="%(prog)s " + ("RUN OUTPUT_DIR [options]" if command == "export-adapters" else "MODEL [options]"),
        description=f"{what[0].upper()}{what[1:]}.\n\nexample:\n  {_EXAMPLES[command]}",
        formatter_class=RawDescriptionHelpFormatter,
    )
    if command == "export-adapters":
        parser.add_argument("run", type=str, help="Folder of the run (`run_dir`).")
        parser.add_argument("output_dir", type=str, help="Folder to write, new or empty.")
        parser.add_argument("--ckpt_path", type=str, default="last", help="Checkpoint of the run, by default the last.")
    elif command == "bench":
        parser.add_argument("model", type=str, help="Directory or Hugging Face name of a 2:4 model.")
        sizes = "Sequences in a batch. (default: 1 8 32)"
        parser.add_argument("--batch_sizes", type=int, nargs="+", default=[1, 8, 32], metavar="SIZE", help=sizes)
        parser.add_argument("--num_tokens", type=int, default=128, help="Tokens of a sequence. (default: 128)")
        dtype = "Precision of the weights, bfloat16 or float16. (default: bfloat16)"
        parser.add_argument("--dtype", type=Literal["bfloat16", "float16"], default="bfloat16", help=dtype)
    else:
        _add_function(parser, _stand_in(command))
    return _parsed(parser, args[1:])


def _add_function(parser: CommandParser, function: Callable[..., Any]) -> None:
    parser.add_argument("model", type=str, help="Hugging Face name or directory of the model.")
    sources = "Texts: .txt, .jsonl, .json, .csv or .parquet files, folders, hub datasets or `sample:wikipedia`."
    parser.add_argument("--text", type=str, nargs="+", default=[], metavar="FILE", help=sources)
    help_of = {entry.arg_name: entry.description for entry in docstring_parser.parse(function.__doc__ or "").params}
    for name, parameter in inspect.signature(function).parameters.items():
        if name in ("model", "tokenizer", "texts"):
            continue
        is_required = parameter.default is inspect.Parameter.empty
        has_default = not (is_required or parameter.default in (None, ()) or parameter.default is False)
        default = f" (default: {parameter.default})" if has_default else ""
        parser.add_argument(
            f"--{name}",
            type=parameter.annotation,
            default=None if is_required else parameter.default,
            required=is_required,
            metavar=name.rpartition("_")[2].upper(),
            help=f"{help_of[name]}{default}",
        )
    column = "Column with the text, in all files other than .txt. (default: text)"
    parser.add_argument("--text_column", type=str, default="text", metavar="NAME", help=column)


def _parsed(parser: CommandParser, args: Sequence[str]) -> Namespace:
    known = [name for action in parser._actions for name in action.option_strings if name.startswith("--")]
    for arg in args:
        name = arg.partition("=")[0]
        if name.startswith("--") and name not in known:
            from wandazeta.utilities.arguments import closest_names

            raise ValueError(f"Expected an option of `{parser.prog}`, but got `{name}`; {closest_names(name, known)}")
    return parser.parse_args(list(args))


def _words(action: Action) -> str:
    """Describe the values that an option takes."""
    kind = getattr(action, "_typehint", action.type)
    if get_origin(kind) is Literal:
        return f"one of {', '.join(get_args(kind))}"
    names = [option.__name__ for option in get_args(kind) or (kind,) if option is not type(None)]
    return " or ".join({"int": "a whole number", "float": "a number", "bool": "true or false"}.get(n, n) for n in names)


def _stand_in(function: str) -> Callable[..., Any]:
    """Return a stand-in for the function of a command, with its signature and docstring.

    It is made from the source, because importing the function takes seconds, which `--help` must not. Where the
    function takes an object or its name, the command takes the name.
    """
    spec = find_spec(FUNCTIONS[function].partition(":")[0])
    assert spec is not None
    assert spec.origin is not None
    tree = ast.parse(Path(spec.origin).read_text(encoding="utf-8"))
    (found,) = (node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == function)
    found.body, found.returns = found.body[:1], None
    scope: dict[str, Any] = {
        "Any": Any,
        "Literal": Literal,
        "Iterable": _Lists,
        "Path": str,
        "Sequence": _Lists,
        "PruningMethod": str,
        "nn": SimpleNamespace(Module=str),
        "torch": SimpleNamespace(device=str),
    }
    exec(compile(ast.Module([found], []), spec.origin, "exec"), scope)
    stand_in: Callable[..., Any] = scope[function]
    return stand_in


class _Lists:
    """Stand-in for `Iterable` and `Sequence` in a signature."""

    def __class_getitem__(cls, item: Any) -> type[Words]:
        return Words


# -- the commands -----------------------------------------------------------------------------------------------------


def _prune(options: Namespace) -> None:
    with _process_group() as is_first:
        import wandazeta
        from wandazeta.pruning.report.table import report_table

        _hide_bars()
        texts = _read_texts(options)
        report = wandazeta.prune(options.pop("model"), None, texts, **vars(options))
        if is_first:
            _print(report_table(report))
            sys.stdout.write(f"pruned model: {Path(options.output_dir).absolute()}\n")


def _evaluate(options: Namespace) -> None:
    import wandazeta
    from wandazeta.scoring.evaluation import evaluation_table

    _hide_bars()
    texts = _read_texts(options)
    found = wandazeta.evaluate(options.pop("model"), None, texts, **vars(options))
    _print(evaluation_table(found))


def _recover(options: Namespace) -> None:
    from wandazeta.cli.main import hide_known_noise
    from wandazeta.cli.recover import recover

    hide_known_noise()
    texts = _read_texts(options)
    record = recover(options.pop("model"), texts=texts, **vars(options))
    sparsity = "" if record["sparsity"] is None else f", sparsity of the blocks {record['sparsity']:.1%}"
    sys.stdout.write(
        f"perplexity on {record['held_out_tokens']:,} tokens of the text: {record['perplexity_before']:.2f} before, "
        f"{record['perplexity_after']:.2f} after, teacher {record['perplexity_teacher']:.2f}{sparsity}\n"
        f"{'recovered model' if record['settings']['lora_rank'] is None else 'adapters'}: "
        f"{Path(options.output_dir).absolute()}\n"
    )


def _export_adapters(options: Namespace) -> None:
    from wandazeta.cli.export_adapters import export_adapters

    _hide_bars()
    export_adapters(options.run, options.output_dir, ckpt_path=options.ckpt_path)
    sys.stdout.write(f"adapters: {Path(options.output_dir).absolute()}\n")


def _bench(options: Namespace) -> None:
    from wandazeta.cli.bench import run

    _hide_bars()
    run(options.model, options.batch_sizes, options.num_tokens, options.dtype)


def _read_texts(options: Namespace) -> list[str]:
    from wandazeta.data.sources import SourceOptions, read_documents

    reading = SourceOptions(text_column=options.pop("text_column"))
    sources = options.pop("text")
    return [document.text for source in sources for document in read_documents(source, reading, argument="text")]


def _hide_bars() -> None:
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()


def _print(table: Any) -> None:
    from rich import get_console

    console = get_console()
    console.print(table, width=console.width if console.is_terminal else 120)


@contextmanager
def _process_group() -> Iterator[bool]:
    """Join the processes that torchrun or srun started, if it did; yields whether this one is the first."""
    rank, size = _rank_and_size()
    if size == 1:
        yield True
        return
    import torch
    import torch.distributed as dist

    from wandazeta.utilities.ranks import prepare_to_join

    device = None
    if torch.cuda.is_available():
        # SLURM may show each process its own GPU only
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
        torch.cuda.set_device(device)
    prepare_to_join()
    # the others wait while rank 0 writes a large model
    dist.init_process_group("nccl" if device else "gloo", timeout=timedelta(days=1), device_id=device)
    try:
        yield rank == 0
    finally:
        dist.destroy_process_group()


def _rank_and_size() -> tuple[int, int]:
    """Return rank and number of the processes that were started together, whose variables are then torchrun's."""
    slurm = {name.removeprefix("SLURM_"): value for name, value in os.environ.items() if name.startswith("SLURM_")}
    if "RANK" not in os.environ and int(slurm.get("STEP_NUM_TASKS", "1")) > 1:
        from lightning.fabric.plugins.environments import SLURMEnvironment

        os.environ |= {"RANK": slurm["PROCID"], "WORLD_SIZE": slurm["STEP_NUM_TASKS"], "LOCAL_RANK": slurm["LOCALID"]}
        first = SLURMEnvironment.resolve_root_node_address(slurm["STEP_NODELIST"])
        os.environ.setdefault("MASTER_ADDR", first)
        # one for each step of each job, below the ports that the system gives away
        port = 12000 + (64 * int(slurm["JOB_ID"]) + int(slurm["STEP_ID"])) % 20000
        os.environ.setdefault("MASTER_PORT", str(port))
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
