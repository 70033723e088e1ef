"""Parser of the command line, whose errors name the option, what was given and the closest known name."""

import ast
import os
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from difflib import get_close_matches
from inspect import signature
from pathlib import Path
from pkgutil import resolve_name
from typing import Any, NoReturn

import yaml
from jsonargparse import ActionConfigFile
from lightning.pytorch import Callback, LightningDataModule, LightningModule
from lightning.pytorch.cli import LightningArgumentParser
from typing_extensions import override

from wandazeta import presets
from wandazeta.callbacks import WandaPPPruneCallback
from wandazeta.cli.help import PAGES
from wandazeta.utilities.arguments import closest_names

__all__ = ["ConfigOrPreset", "Parser", "command_first"]

PRESET = "preset:"
COMMANDS = tuple(PAGES)
_CONFIG_OPTIONS = ("-c", "--config")
# the start of a message, which may begin with the key or with another attempt to read the value
_UNION = (
    r"(?:Parser key [^\n]*:\s*)?(?:(?:- )?Expected a path [^\n]*\s*- )?"
    r"Does not validate against any of the Union subtypes\s+Subtypes: \[([^\n]*)\]\n"
)
_WORDS = {"int": "an integer", "float": "a number", "bool": "true or false", "str": "text", "NoneType": "null"}
# without a `class_path`, jsonargparse takes options for those of the base class
_BASES = {
    LightningModule: "--model LanguageModel",
    LightningDataModule: "--data TextDataModule",
    Callback: "class_path: KeepSparsity",
}


class ConfigOrPreset(ActionConfigFile):
    """Option that reads a configuration file, or a preset of the package as `preset:NAME`."""

    @override
    def __call__(self, parser: Any, cfg: Any, values: Any, option_string: str | None = None) -> None:
        if isinstance(values, str) and values.startswith(PRESET):
            values = str(presets.path(values.removeprefix(PRESET)))
        content = _read(str(values))
        _root(parser).configs[str(values)] = content
        known = {action.dest.partition(".")[0] for action in parser._actions}
        for key in content:
            # jsonargparse ignores unknown groups that are empty
            if key not in known and not content[key]:
                raise ValueError(f"Expected options by name in '{values}', but got `{key}`; {_closest(key, known)}")
        super().__call__(parser, cfg, values, option_string)


class Parser(LightningArgumentParser):
    """LightningArgumentParser whose errors are short: without usage, and without all types that a value may have.

    With the environment variable `WANDAZETA_DEBUG` errors are those of jsonargparse.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.configs: dict[str, dict[str, Any]] = {}
        """Contents of the configuration files that were read, on the parser of all commands."""

    @override
    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        # errors of parsers for the options of one class end up in that of the command's parser
        if not self.exit_on_error or os.environ.get("WANDAZETA_DEBUG"):
            super().error(message, ex)
        sys.stderr.write(f"error: {_explain(self, message, ex)}\n")
        self.exit(2)


def command_first(arguments: Sequence[str]) -> list[str]:
    """Move configuration files that are given before the command behind it, where their options are known.

    Args:
        arguments: The arguments of the command line.

    Examples:
        >>> command_first(["-c", "run.yaml", "fit", "--run_dir", "here"])
        ['fit', '-c', 'run.yaml', '--run_dir', 'here']
    """
    start = 0
    while start < len(arguments):
        name, has_value, _ = arguments[start].partition("=")
        if name not in _CONFIG_OPTIONS:
            break
        start += 1 if has_value else 2
    if start < len(arguments) and arguments[start] in COMMANDS:
        return [arguments[start], *arguments[:start], *arguments[start + 1 :]]
    return list(arguments)


def _closest(name: str, known: Iterable[str]) -> str:
    """Suggest the one known name that is nearly the same, or else a few."""
    known = list(known)
    close = get_close_matches(name, known, n=1, cutoff=0.75)
    return f"did you mean `{close[0]}`?" if close else closest_names(name, known)


def _root(parser: Any) -> Parser:
    while hasattr(parser, "parent_parser"):
        parser = parser.parent_parser
    return parser


def _read(given: str) -> dict[str, Any]:
    """Read a configuration, to refuse what is none and to find the file of a wrong option.

    Raises:
        ValueError: If it is no YAML with options by name.
    """
    path = Path(given)
    is_file = "\n" not in given and path.is_file()
    try:
        content = yaml.safe_load(path.read_text() if is_file else given)
    except UnicodeDecodeError as error:
        raise ValueError(
            f"Expected argument `config` to be a YAML file, but got '{given}', which is not text"
        ) from error
    except yaml.YAMLError as error:
        mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None)
        place = f"in line {mark.line + 1}, column {mark.column + 1}: " if mark is not None else ""
        raise ValueError(
            f"Expected argument `config` to be YAML, but got '{given}' with an error {place}"
            f"{problem or str(error).splitlines()[0]}; check the indentation there"
        ) from error
    if is_file and content is None:
        return {}
    if not isinstance(content, dict):
        known = ", ".join(f"{PRESET}{name}" for name in presets.names())
        reason = "which holds no options by name" if is_file else "which is a folder"
        reason = reason if path.exists() else "which does not exist"
        files = [str(file) for file in path.parent.glob("*.y*ml")] if not is_file and path.parent.is_dir() else []
        close = get_close_matches(given, files, n=1, cutoff=0.8)
        hint = f"; did you mean `{close[0]}`?" if close else ""
        raise ValueError(
            f"Expected argument `config` to be a YAML file or one of {known}, but got '{given}', {reason}{hint}"
        )
    return content


# -- what is wrong -----------------------------------------------------------------------------------------------------


def _explain(parser: Parser, message: str, error: Exception | None) -> str:
    """Return the message of an error in one line."""
    command = parser.prog.split()[-1]
    if found := re.match(r"unrecognized arguments: (.*)", message):
        tokens = found[1].split()
        option = next((token for token in tokens if token.startswith("-")), tokens[0]).partition("=")[0]
        return f"Expected an option of `{command}`, but got `{option}`; {_similar_option(parser, option)}"
    if found := re.search(r"argument subcommand: invalid choice: '(.*?)' ", message):
        close = get_close_matches(found[1], COMMANDS, n=1)
        remedy = f"did you mean `{close[0]}`?" if close else "the command comes first"
        return f"Expected a command, one of {', '.join(COMMANDS)}, but got '{found[1]}'; {remedy}"
    if 'expected "subcommand"' in message:
        return f"Expected a command, one of {', '.join(COMMANDS)}, but got none; `wandazeta --help` explains them"
    if found := re.match(r"the following arguments are required: (.*)", message):
        # at this level, names start with the command
        return _missing([name.partition(".")[2] or name for name in found[1].split(", ")])
    if found := re.match(r"argument (\S+): expected (\w+) argument", message):
        option = found[1].rpartition("/")[2]
        return f"Expected a value for `{option}`, but got none; write `{option} VALUE`"
    if found := re.match(r"(?:Subcommand|Group) '(.*?)' does not accept option '(.*)'", message):
        key = found[2] if message.startswith("Subcommand") else f"{found[1]}.{found[2]}"
        known = [action.dest for action in parser._actions]
        if message.startswith("Subcommand"):
            known = [action.dest for action in getattr(error, "subcommand_parser", parser)._actions]
        where = _where(parser, key.split("."))
        return (
            f"Expected an option of `{command if command != 'wandazeta' else found[1]}`, but got `{key}`{where}; "
            + (_closest(key, known))
        )
    return _explain_value(parser, list(_causes(error)) or [message])


def _explain_value(parser: Parser, messages: list[str]) -> str:
    """Explain why a value does not fit, from the messages of nested errors, the outermost first."""
    keys, owner, expected, base = [], "", "", None
    for text in messages:
        head = text.strip().removeprefix("- ")
        if found := re.match(r'Parser key "(.+?)"', head):
            keys.append(found[1])
            expected, base = "", None
        elif found := re.match(r"Problem with given class_path '(.+?)'", head):
            owner = found[1]
        if found := re.match(_UNION, head):
            # that of the innermost key
            expected, base = _in_words(found[1]), _class_in(found[1])
    last = messages[-1].strip()
    path = [part for key in keys for part in key.split(".")]
    argument = ".".join(path)
    if found := re.match(r"Option '(.+?)' is not accepted", last):
        kind = resolve_name(owner) if owner else None
        if kind in _BASES:
            where = _where(parser, path)
            return (
                f"Expected argument `{argument}` to name a class (`class_path`), but got only its option "
                f"`{found[1]}`{where}; for example `{_BASES[kind]}`"
            )
        known = [name for name in signature(kind).parameters if name != "self"] if kind is not None else []
        name = owner.rpartition(".")[2]
        inner = found[1].rpartition(".")[2]
        where = _where(parser, [*path, *found[1].split(".")])
        return f"Expected an option of {name} in `{argument}`, but got `{found[1]}`{where}; {_closest(inner, known)}"
    if found := re.match(r"the following arguments are required: (.*)", last):
        return _missing([f"{argument}.{name}" for name in found[1].split(", ")])
    value = _given(messages)
    where = _where(parser, path, value)
    if found := re.match(r"Expected a dot import path string: (.*)", last):
        return (
            f"Expected argument `{argument}` to be the name of a class, but got '{found[1]}'"
            f"{_where(parser, path, found[1])}; {_closest(found[1], _class_names(base))}"
        )
    if found := re.match(r"Expected an? (.*?)\. Got value: ", last, re.DOTALL):
        expected = expected or _in_words(found[1])
        choices = [str(choice) for choice in _literals(found[1] if not base else "")] or expected.split(" or ")
        choices = [choice for part in choices for choice in part.removeprefix("one of ").split(", ")]
        close = get_close_matches(value, choices, n=1, cutoff=0.5)
        hint = f"; did you mean `{close[0]}`?" if close else ""
        return f"Expected argument `{argument}` to be {expected}, but got '{value}'{where}{hint}"
    line = next((line.strip() for line in last.splitlines() if line.strip()), "it cannot be read")
    return f"Expected another value of `{argument}`{where}: {line}" if argument else line


def _causes(error: BaseException | None) -> Iterator[str]:
    previous = ""
    while error is not None:
        # nested parsers raise the error of a value again
        if str(error) != previous:
            previous = str(error)
            yield previous
        error = error.__cause__


def _given(messages: list[str]) -> str:
    """Return the value that does not fit, as the innermost message that has it gives it."""
    for text in reversed(messages):
        if found := re.search(r"Got value: (.*)", text) or re.search(r"Given value: (.*)\Z", text.strip()):
            nested = re.match(r"NestedArg\(key='.*?', val='(.*)'\)", found[1])
            return nested[1] if nested else found[1].strip()
    return ""


def _in_words(types: str) -> str:
    """Say which values a list of types accepts."""
    choices = [str(choice) for choice in _literals(types)]
    rest = re.sub(r"typing\.Literal\[.*?\]", "", types)
    rest = re.sub(r"<class '(?:[\w.]+\.)?(\w+)'>", lambda found: _WORDS.get(found[1], found[1]), rest)
    rest = re.sub(r"[\w.]+\.(\w+)", r"\1", rest)
    words = [word.strip() for word in rest.split(", ") if word.strip()]
    unique = list(dict.fromkeys(choices))
    return " or ".join([*([f"one of {', '.join(unique)}"] if unique else []), *words])


def _literals(types: str) -> list[Any]:
    return [value for found in re.findall(r"Literal(\[.*?\])", types) for value in ast.literal_eval(found)]


def _class_in(types: str) -> type | None:
    """Return the first class of the field in a list of types."""
    for name in re.findall(r"[\w]+(?:\.[\w]+)+", types):
        kind = resolve_name(name) if not name.startswith("typing.") else None
        if isinstance(kind, type):
            return kind
    return None


def _class_names(base: type | None) -> list[str]:
    """List the names of a class and of its subclasses, this package's first."""
    found: list[type] = [] if base is None else [base]
    for kind in found:
        children: list[type] = kind.__subclasses__()
        # also those of the classes that are added here
        found += [child for child in children if child not in found]
    found.sort(key=lambda kind: not kind.__module__.startswith("wandazeta"))
    return [kind.__name__ for kind in found if not kind.__name__.startswith("_")]


def _missing(names: Iterable[str]) -> str:
    examples = {"model": "--model LanguageModel --model.model_name_or_path NAME", "data": "--data TextDataModule"}
    first, *others = names
    if others:
        return f"Expected the arguments {', '.join(f'`{name}`' for name in (first, *others))}, but they are missing"
    return f"Expected argument `{first}`, but it is missing; for example `{examples.get(first, f'--{first} VALUE')}`"


def _similar_option(parser: Parser, option: str) -> str:
    """Suggest an option of the command for an unknown one."""
    known = [name for action in parser._actions for name in action.option_strings if name.startswith("--")]
    nested = [f"--prune.{name}" for name in signature(WandaPPPruneCallback).parameters]
    head, dot, tail = option.replace("-", "_").replace("__", "--", 1).partition(".")
    if f"{head}{dot}{tail}" in known:
        return f"did you mean `{head}{dot}{tail}`?"
    for name in nested:
        if not dot and name.rpartition(".")[2] == head.removeprefix("--"):
            return f"did you mean `{name}`?"
    groups = sorted({name.partition(".")[0] for name in known})
    if dot and head not in groups:
        close = get_close_matches(head, groups, n=1, cutoff=0.5)
        if close:
            return f"did you mean `{close[0]}.{tail}`?"
    close = get_close_matches(option, [*known, *nested], n=1, cutoff=0.6)
    command = parser.prog.split()[-1]
    hint = f"`wandazeta {command} --help` names the important ones"
    return f"did you mean `{close[0]}`?" if close else hint


def _where(parser: Parser, path: list[str], value: str | None = None) -> str:
    """Return " in 'FILE'" for the last configuration file that has an option, and this value of it if one is given."""
    for file, content in reversed(_root(parser).configs.items()):
        if any(value is None or _mentions(found, value) for found in _at(content, path)):
            return f" in '{file}'" if "\n" not in file and Path(file).is_file() else ""
    return ""


def _mentions(found: Any, value: str) -> bool:
    return str(found) == value or value in re.findall(r"[^\s{}\[\]'\",:]+", str(found))


def _at(content: Any, path: list[str]) -> Iterator[Any]:
    """Yield what a configuration has under a dotted name, whose `init_args` may be left out."""
    if isinstance(content, list):
        for item in content:
            yield from _at(item, path)
        return
    if not path:
        yield content
        return
    if isinstance(content, dict):
        if path[0] in content:
            yield from _at(content[path[0]], path[1:])
        if "init_args" in content and path[0] != "init_args":
            yield from _at(content["init_args"], path)
