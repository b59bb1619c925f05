"""Reads the configuration: command line > environment variables > YAML file > defaults.

A setting has the same dotted name everywhere: `train.steps` is `steps:` below `train:` in the file,
`ATROPOS_TRAINER_TRAIN__STEPS` in the environment, and `--train.steps 20` on the command line. A preset wins
over lower layers in all that it decides; in its own layer and above, a setting wins over the preset.
"""

from __future__ import annotations

import difflib
import fnmatch
import os
import re
import reprlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError
from pydantic_core import ErrorDetails

from trainer.config._fields import config_fields, option_fields
from trainer.config._layers import take_out
from trainer.config._tree import TrainerConfig
from trainer.errors import ConfigurationError
from trainer.extensions import closest_name

ENVIRONMENT_PREFIX = "ATROPOS_TRAINER_"
_NESTING = "__"
_LARGEST_FILE = 1 << 20  # bytes; a configuration has a few hundred

_SHORT = reprlib.Repr()
_SHORT.maxlevel, _SHORT.maxstring, _SHORT.maxother = 3, 200, 200

Tree = dict[str, Any]
Given = tuple[list[str], str, str]
"""The keys of a setting, its text, and where it was given, in words."""


def load_config(
    path: Path | None = None,
    overrides: Sequence[str] = (),
    *,
    environment: Mapping[str, str] | None = None,
) -> TrainerConfig:
    """Read, merge and check the configuration of a run.

    Args:
        path: YAML file with the sections as top-level keys, or None.
        overrides: Command-line words, e.g. `["--train.steps", "20", "--loss.name=ppo_clip"]`.
        environment: Environment variables; None reads the process's own.

    Raises:
        ConfigurationError: The file cannot be read, or a key or value is wrong. The message lists every
            wrong field and what is allowed there.
    """
    tree: Tree = _read_yaml(path) if path is not None else {}
    variables = os.environ if environment is None else environment
    sources: dict[tuple[str, ...], str] = {}
    replaced: dict[str, tuple[str, Any]] = {}
    for given in (_from_environment(variables), _from_command_line(overrides)):
        layer: Tree = {}
        layer_sources: dict[tuple[str, ...], str] = {}
        for keys, text, source in given:
            value = _parse_value(text, source=source)
            for key in reversed(keys):
                value = {key: value}
            _merge(layer, value)
            layer_sources[tuple(keys)] = source
        for name, lower in take_out(tree, layer).items():
            replaced[name] = (_closest_source(tuple(name.split(".")), sources) or "the file", lower)
        _merge(tree, layer)
        sources |= layer_sources
    tree.setdefault("model", {})  # so that a complaint names model.path, the one required setting
    try:
        config = TrainerConfig.model_validate(tree)
        config.note_replaced(replaced)
    except ValidationError as error:
        raise ConfigurationError(_describe(error, sources)) from error
    known = {field.name for field in config_fields()}
    for name in config.train.resume_changes:
        # A loss has options of its own; `*` stands for any text.
        if not (name.startswith("loss.") or fnmatch.filter(known, name)):
            raise ConfigurationError(
                f"train.resume_changes names {name!r}: there is no such setting{_hint(name)}"
            )
    return config


class _TextLoader(yaml.SafeLoader):
    """Reads scalars as the text that is written, for a field's own type to read; refuses repeated keys.

    YAML 1.1 would make false of `no`, 83 of a token 0123, and of a section written twice its second half.
    """

    # Left are null and the merge key.
    yaml_implicit_resolvers = {  # noqa: RUF012 - declared by the base class
        first: [(tag, pattern) for tag, pattern in resolvers if tag.endswith((":null", ":merge"))]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        """Read a mapping whose keys differ."""
        node = super().compose_mapping_node(anchor)
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen:
                    raise yaml.composer.ComposerError(
                        None, None, f"the key {key.value!r} is written twice", key.start_mark
                    )
                seen.add(key.value)
        return node


def read_yaml(text: str) -> Any:
    """Read YAML as the configuration means it; see `_TextLoader`.

    Raises:
        yaml.YAMLError: It is not valid, or a mapping has a key twice.
    """
    loader = _TextLoader(text)
    try:
        return loader.get_single_data()
    finally:
        loader.dispose()


def _read_yaml(path: Path) -> Tree:
    try:
        with path.open("rb") as file:
            text = file.read(_LARGEST_FILE + 1)
        if len(text) > _LARGEST_FILE:
            raise ConfigurationError(
                f"{path} has more than {_LARGEST_FILE} bytes: it is no configuration file"
            )
        loaded = read_yaml(text.decode("utf-8"))
    except RecursionError as error:
        raise ConfigurationError(f"{path} is nested too deeply to be a configuration file") from error
    except OSError as error:
        raise ConfigurationError(f"cannot read the configuration file {path}: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        # Not what YAML says about it: that quotes the line, and a token may stand there.
        raise ConfigurationError(f"{path} is not valid YAML{_where(error)}") from None
    if loaded is None:
        return {}
    if not isinstance(loaded, dict):
        raise ConfigurationError(
            f"{path} must hold sections such as 'train:', found a {type(loaded).__name__}"
        )
    return loaded


def _where(error: Exception) -> str:
    if isinstance(error, UnicodeDecodeError):
        return f": its byte {error.start} is not UTF-8"
    if not isinstance(error, yaml.MarkedYAMLError) or error.problem_mark is None:
        return ""
    mark = error.problem_mark
    return f": {error.problem} in line {mark.line + 1}, column {mark.column + 1}"


def _from_environment(environment: Mapping[str, str]) -> Iterator[Given]:
    """Yield the environment variables that name a setting, or try to.

    Others may begin like ours: Kubernetes sets PORT=tcp://..., SERVICE_HOST and more with the name of each
    service before them.
    """
    meant = {field.name.replace(".", "_"): field.name for field in config_fields()}
    for name, text in environment.items():
        key = name.removeprefix(ENVIRONMENT_PREFIX).lower()
        if key == name.lower():
            continue
        if key in meant and "://" not in text:
            right = ENVIRONMENT_PREFIX + meant[key].replace(".", _NESTING).upper()
            raise ConfigurationError(f"environment variable {name}: there is no such setting; use {right}")
        if _NESTING in key or key in TrainerConfig.model_fields:
            yield key.split(_NESTING), text, f"environment variable {name}"


def _from_command_line(words: Sequence[str]) -> Iterator[Given]:
    remaining = iter(words)
    for word in remaining:
        if not word.startswith("--") or word == "--":
            raise ConfigurationError(
                f"unexpected argument {word!r}; settings are given as --section.key value"
            )
        name, equals, text = word[2:].partition("=")
        value = text if equals else next(remaining, None)
        if value is None:
            raise ConfigurationError(f"{word} needs a value, e.g. {word} VALUE")
        yield name.split("."), value, f"argument --{name}"


def _parse_value(text: str, *, source: str) -> Any:
    """Lists, mappings and null are read as YAML; all else stays text, for the field's own type to read.

    Reading plain words as YAML would mangle them: a token 0123 would become the number 83.
    """
    if text.strip().lower() == "null":  # "none" is a value of some settings: a field's own type reads it
        return None
    if text.lstrip().startswith(("[", "{")):
        try:
            return read_yaml(text)
        except (yaml.YAMLError, RecursionError):
            # Neither the text nor the parser's complaint, which quotes it: it may hold a header's secret.
            raise ConfigurationError(f"{source} is not a valid list or mapping") from None
    return text


def _merge(lower: Tree, higher: Tree) -> None:
    """Lay `higher` over `lower`, in place; mappings are merged, everything else is replaced.

    But what stands where a section belongs stays, to be refused, whatever is set below that section.
    """
    for key, value in higher.items():
        below = lower.get(key)
        if isinstance(value, dict) and isinstance(below, dict):
            _merge(below, value)
        elif not isinstance(value, dict) or below is None:
            lower[key] = value


def _describe(error: ValidationError, sources: Mapping[tuple[str, ...], str]) -> str:
    lines = ["the configuration is wrong:"]
    for problem in error.errors(include_url=False):
        name = ".".join(str(part) for part in problem["loc"])
        where = (name or "settings together") + _source(problem, sources)
        if problem["type"] == "extra_forbidden":
            lines.append(f"  {where}: there is no such setting{_hint(name)}")
        elif problem["type"] == "missing":
            lines.append(f"  {where}: required, but not given (--{name} VALUE)")
        elif problem["type"] in ("model_type", "dict_type"):
            lines.append(f"  {where}: it must hold settings below it{_found(name, problem)}")
        else:
            said = problem["msg"].removeprefix("Value error, ")
            if name and said.startswith(f"{name}."):  # a fault of a section that names the setting itself
                lines.append(f"  {said}{_source(problem, sources)}")
                continue
            lines.append(f"  {where}: {said}{_found(name, problem)}{_value_hint(problem)}")
    lines.append("`atropos-train run --help` lists every setting.")
    return "\n".join(lines)


def _source(problem: ErrorDetails, sources: Mapping[tuple[str, ...], str]) -> str:
    """Name the environment variable that what is wrong came from; nothing if it came from elsewhere."""
    keys = tuple(map(str, problem["loc"]))
    source = _closest_source(keys, sources)
    if not source and problem["type"] == "extra_forbidden":  # a section that there is not
        below = [each for each in sources if each[: len(keys)] == keys]
        source = sources[max(below, key=len)] if below else ""
    return f" ({source})" if source.startswith("environment") else ""


def _closest_source(keys: tuple[str, ...], sources: Mapping[tuple[str, ...], str]) -> str:
    """Return where a setting, or the section that it is in, was given; empty for the file."""
    given = [each for each in sources if keys[: len(each)] == each]
    return sources[max(given, key=len)] if given else ""


def _found(name: str, problem: ErrorDetails) -> str:
    """Quote what was found in place of a value; nothing where it may be secret.

    Bounded in depth and length: a few lines of YAML with aliases stand for more text than any memory holds.
    """
    found = problem["input"]
    # A URL may hold a password, and a section a token.
    secret = any(word in name for word in ("token", "header", "url", "servers")) or isinstance(found, dict)
    return "" if secret else f" (found {_SHORT.repr(found)})"


def _value_hint(problem: ErrorDetails) -> str:
    """Name the value that was meant, where a setting has a few."""
    if problem["type"] != "literal_error" or not isinstance(problem["input"], str):
        return ""
    close = closest_name(problem["input"], re.findall(r"'([^']+)'", problem["ctx"]["expected"]))
    return f"; did you mean {close}?" if close else ""


def _hint(name: str) -> str:
    """Name the setting that was meant, or those beside it; first compared with those of its own section."""
    known = [field.name for field in (*config_fields(), *option_fields())]
    section, _, word = name.rpartition(".")
    siblings = [field.rpartition(".")[2] for field in known if field.rpartition(".")[0] == section]
    close = closest_name(word, siblings)
    if close is not None and section:
        return f"; did you mean {section}.{close}?"
    if "." not in section or not siblings:
        elsewhere = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
        if elsewhere:
            return f"; did you mean {elsewhere[0]}?"
    if siblings:
        return f"; {section} has: {', '.join(dict.fromkeys(siblings))}"
    sections = list(TrainerConfig.model_fields)
    close = closest_name(name, sections)
    return f"; did you mean {close}?" if close else f"; the sections are: {', '.join(sections)}"
