"""The configuration's fields by their dotted names: for help texts, documentation and hints."""

from __future__ import annotations

import types
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from trainer.config._tree import TrainerConfig
from trainer.extensions import AdvantageEstimator, Loss
from trainer.options import ESTIMATOR_OPTIONS, LOSS_OPTIONS


@dataclass(frozen=True, kw_only=True)
class ConfigField:
    """One setting as a reader sees it."""

    name: str
    """Dotted name, e.g. `train.steps`."""
    type_name: str
    """Type, or the allowed values separated by `|`."""
    default: str
    """Default as it would be written in YAML; `required` where there is none."""
    help: str
    """Its meaning, with unit and special values."""

    @property
    def section(self) -> str:
        """The first part of its name."""
        return self.name.partition(".")[0]


def config_fields(model: type[BaseModel] = TrainerConfig, prefix: str = "") -> Iterator[ConfigField]:
    """Yield every setting below `model`, sections first to last, depth first."""
    for name, info in model.model_fields.items():
        section = _section_of(info.annotation)
        if section is not None:
            yield from config_fields(section, f"{prefix}{name}.")
        else:
            yield ConfigField(
                name=prefix + name,
                type_name=_type_name(info.annotation),
                default=_default_text(info),
                help=" ".join((info.description or "").split()),
            )


def fields_by_section(options: Iterable[ConfigField]) -> Iterator[tuple[str, str, list[ConfigField]]]:
    """Yield each section with its description and settings, the `options` that stand there last."""
    of_section: dict[str, list[ConfigField]] = {}
    for field in (*config_fields(), *options):
        of_section.setdefault(field.section, []).append(field)
    for section, fields in of_section.items():
        yield section, TrainerConfig.model_fields[section].description or "", fields


def option_fields(losses: Iterable[str] = (), estimators: Iterable[str] = ()) -> list[ConfigField]:
    """Return the options of losses and advantage estimators, each with those that have it.

    Args:
        losses: Further ones than ours.
        estimators: Further ones than ours.

    Raises:
        ConfigurationError: One of them cannot be loaded.
    """
    having: dict[ConfigField, list[str]] = {}
    for kind, prefix, ours, others in (
        (Loss, "loss.", LOSS_OPTIONS, losses),
        (AdvantageEstimator, "data.advantage_options.", ESTIMATOR_OPTIONS, estimators),
    ):
        for name in dict.fromkeys((*ours, *others)):
            for field in config_fields(ours.get(name) or kind.find(name).options, prefix):
                having.setdefault(field, []).append(name)
    return [
        replace(field, help=f"{_those_that_have_it(names)}: {field.help}") for field, names in having.items()
    ]


def _those_that_have_it(names: list[str]) -> str:
    if set(LOSS_OPTIONS) <= set(names):
        names = ["every built-in loss", *(name for name in names if name not in LOSS_OPTIONS)]
    return ", ".join(names)


def _section_of(annotation: Any) -> type[BaseModel] | None:
    """The section class in `Section` or `Section | None`, if that is what `annotation` is."""
    for candidate in (annotation, *get_args(annotation)):
        if isinstance(candidate, type) and issubclass(candidate, BaseModel):
            return candidate
    return None


def _type_name(annotation: Any) -> str:
    origin = get_origin(annotation)
    if origin is Literal:
        return "|".join(str(value) for value in get_args(annotation))
    if origin in (Union, types.UnionType):
        return "|".join(_type_name(part) for part in get_args(annotation) if part is not type(None))
    if origin is not None and origin.__name__ == "Annotated":
        return _type_name(get_args(annotation)[0])
    if origin is not None:
        return f"{origin.__name__}[{', '.join(_type_name(part) for part in get_args(annotation))}]"
    name = str(annotation.__name__)
    return {"SecretStr": "secret", "Path": "path"}.get(name, name)


def _default_text(info: FieldInfo) -> str:
    if info.default_factory is not None:
        value = info.get_default(call_default_factory=True, validated_data={})
    else:
        value = info.default
    if value is PydanticUndefined:
        return "required"
    if value is None:
        return "none"
    return str(value).lower() if isinstance(value, bool) else str(value)
