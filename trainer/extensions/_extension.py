"""A function that a setting names, with options: the common part of losses and estimators, and losses."""

from __future__ import annotations

import importlib
import sys
import traceback
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar, Generic, Self, TypeVar

from pydantic import ValidationError
from pydantic_core import InitErrorDetails, PydanticCustomError

from trainer.errors import ConfigurationError, TrainerError
from trainer.extensions._closest import closest_name, same_name
from trainer.options import LOSS_OPTIONS, KlOptions
from trainer.options import Options as Options

if TYPE_CHECKING:
    from torch import Tensor

    LossInputs = Any
    """`trainer.losses.LossInputs`, which stands on a higher floor."""
    LossResult = tuple[Tensor, dict[str, Tensor]]
    """The loss, 0-dim with gradient; and sums over trained tokens for the metrics, 0-dim and detached."""

BUILT_IN_LOSSES: Mapping[str, str] = MappingProxyType(
    {name: f"trainer.losses:{name}" for name in LOSS_OPTIONS}
)

_Result = TypeVar("_Result")
O = TypeVar("O", bound=Options)  # noqa: E741
Need = bool | Callable[[O], bool]
"""A need: always or never, or depending on the options."""


class Extension(Generic[O]):
    """A function with options, that a setting names.

    Args:
        function: Called with the inputs and the options.
        options: The model of its options.
    """

    noun: ClassVar[str]
    """Its kind, in messages."""
    setting: ClassVar[str]
    """The setting that names it."""
    decorator: ClassVar[str]
    built_in: ClassVar[Mapping[str, str]]
    """Ours: from their names to where they are."""
    names_elsewhere: ClassVar[Mapping[str, str]] = MappingProxyType({})
    """From what others call one of ours to our name."""

    def __init__(self, function: Callable[[Any, O], Any], options: type[O]) -> None:
        self.function = function
        self.options = options
        self.__name__ = function.__name__
        self.__doc__ = function.__doc__

    @classmethod
    def find(cls, name: str) -> Self:
        """Look up one of ours, or import one of the user's.

        Raises:
            ConfigurationError: There is none of that name, or it cannot be imported, or is something else.
        """
        module_name, colon, attribute = cls.built_in.get(name, name).partition(":")
        if not (colon and attribute.isidentifier() and all(map(str.isidentifier, module_name.split(".")))):
            elsewhere = same_name(name, cls.names_elsewhere)
            close = cls.names_elsewhere[elsewhere] if elsewhere else closest_name(name, cls.built_in)
            hint = f" (did you mean {close}?)" if close else ""
            raise ConfigurationError(
                f"there is no {cls.noun} {name!r}{hint}: ours are {', '.join(cls.built_in)}; name one of "
                "your own as module:function"
            )
        found = getattr(_import(module_name, name), attribute, None)
        if isinstance(found, cls):
            return found
        if found is None:
            raise ConfigurationError(f"{name}: the module {module_name} has no {attribute}")
        raise ConfigurationError(
            f"{name} is no {cls.noun}, its type is {type(found).__name__}: put @{cls.decorator} above the "
            "function"
        )

    def read_options(self, values: Mapping[str, Any], also: Collection[str] = ()) -> O:
        """Check option values.

        Args:
            values: By name.
            also: Other names that may have been meant.

        Raises:
            pydantic.ValidationError: There is no such option, or its value is not allowed.
        """
        known = list(self.options.model_fields)
        unknown = [
            InitErrorDetails(
                type=PydanticCustomError(
                    "no_such_option", "{reason}", {"reason": self._no_option(name, also)}
                ),
                loc=(name,),
                input=value,
            )
            for name, value in values.items()
            if name not in known
        ]
        if unknown:
            raise ValidationError.from_exception_data(self.__name__, unknown)
        return self.options.model_validate(dict(values))

    def _no_option(self, name: str, also: Collection[str]) -> str:
        known = list(self.options.model_fields)
        close = closest_name(name, [*known, *also])
        hint = f" (did you mean {close}?)" if close else ""
        options = f"its options are {', '.join(known)}" if known else "it has none"
        return f"{self.noun} {self.__name__} has no option {name}{hint}: {options}"

    def called_options(self, values: Mapping[str, Any]) -> O:
        """Check option values given in Python.

        Raises:
            ConfigurationError: There is no such option, or its value is not allowed.
        """
        try:
            return self.read_options(values)
        except ValidationError as error:
            wrong = "; ".join(
                f"{'.'.join(map(str, each['loc']))} is {each['input']!r}: {each['msg']}"
                if each["loc"]
                else each["msg"].removeprefix("Value error, ")
                for each in error.errors()
            )
            raise ConfigurationError(f"{self.noun} {self.__name__}: {wrong}") from error


class Loss(Extension[O]):
    """A loss function; see `loss`."""

    noun = "loss"
    setting = "loss.name"
    decorator = "trainer.extensions.loss()"
    built_in = BUILT_IN_LOSSES

    def _no_option(self, name: str, also: Collection[str]) -> str:
        if name not in ("reduction", "constant_length"):
            return super()._no_option(name, also)
        return (
            f"{self.noun} {self.__name__} has no option {name}: pass the number to divide by as "
            "LossInputs.denominator, see Reductions in docs/objectives.md; loss.reduction is a run's setting"
        )

    def __init__(
        self,
        function: Callable[[LossInputs, O], LossResult],
        options: type[O],
        *,
        needs_inference_logprobs: Need[O] | None,
        needs_ref_logprobs: Need[O] | None,
        trains_without_advantage: Need[O] | None,
        step_statistics: Callable[[LossInputs, O], Any] | None,
    ) -> None:
        super().__init__(function, options)
        self._step_statistics = step_statistics
        self._needs_inference_logprobs = needs_inference_logprobs
        self._needs_ref_logprobs = needs_ref_logprobs
        self._trains_without_advantage = trains_without_advantage

    def __call__(self, inputs: LossInputs, **options: Any) -> LossResult:
        """Compute it with options by name, for direct use.

        Raises:
            ConfigurationError: An option or its value is not allowed.
        """
        result: LossResult = self.function(inputs, self.called_options(options))
        return result

    def bind(self, options: O) -> BoundLoss:
        """Give it its options."""
        said = options if isinstance(options, KlOptions) else KlOptions()
        needs_ref_logprobs = _applies(self._needs_ref_logprobs, options, said.has_penalty())
        without = needs_ref_logprobs or said.trains_without_advantage()
        return BoundLoss(
            name=self.__name__,
            function=self.function,
            options=options,
            needs_inference_logprobs=_applies(self._needs_inference_logprobs, options, said.needs_sampler()),
            needs_ref_logprobs=needs_ref_logprobs,
            trains_without_advantage=_applies(self._trains_without_advantage, options, without),
            step_statistics=self._step_statistics,
        )


@dataclass(frozen=True, kw_only=True)
class BoundLoss:
    """A loss with its options, and what it needs of a batch; call it with `LossInputs`."""

    name: str
    function: Callable[[LossInputs, Any], LossResult]
    options: Options
    needs_inference_logprobs: bool
    """Groups without the sampler's log-probs are set aside, and logits are divided by the temperature."""
    needs_ref_logprobs: bool
    """Groups without a reference model's log-probs are set aside."""
    trains_without_advantage: bool
    """Sequences whose advantages are all 0 are computed too, because they have a gradient all the same."""
    step_statistics: Callable[[LossInputs, Any], Any] | None = None
    """See `loss`."""

    def __call__(self, inputs: LossInputs) -> LossResult:
        """Return the loss (0-dim) and the metric sums.

        Raises:
            ConfigurationError: The function returned something else, or, if it is a user's own, raised.
        """
        result = called(f"loss.name {self._full_name}", self.function, inputs, self.options)
        if not _is_loss_result(result):
            raise ConfigurationError(
                f"loss.name {self._full_name} returned {_shown(result)}; a loss returns a pair: a "
                "tensor without dimensions, and a dict of such tensors, the sums for the metrics"
            )
        return result

    @property
    def _full_name(self) -> str:
        """As the setting has it."""
        module = self.function.__module__
        return self.name if module.startswith("trainer.") else f"{module}:{self.name}"


def loss(
    options: type[O] = Options,  # type: ignore[assignment]
    *,
    needs_inference_logprobs: Need[O] | None = None,
    needs_ref_logprobs: Need[O] | None = None,
    trains_without_advantage: Need[O] | None = None,
    step_statistics: Callable[[LossInputs, O], Any] | None = None,
) -> Callable[[Callable[[LossInputs, O], LossResult]], Loss[O]]:
    """Make a loss of a function of `trainer.losses.LossInputs` and its options.

    The function is pure: it does not run the model, log, or keep state. It always returns metrics of the same
    names. Each need may be a function of the options, which answers for them. None: what options that are
    `KlOptions` say of themselves; others need nothing.

    Args:
        options: The model of its options.
        needs_inference_logprobs: It uses the sampler's log-probs.
        needs_ref_logprobs: It uses a reference model's log-probs.
        trains_without_advantage: A sequence without any advantage has a gradient all the same, because of a
            KL penalty or an entropy bonus, say. None: also if `needs_ref_logprobs`.
        step_statistics: Computes what a token's term needs of the whole step's tokens: called once a step,
            before any is computed, with the sampler's log-probs in the place of the trainer's; what it
            returns is `LossInputs.statistics`.
    """
    return lambda function: Loss(
        function,
        options,
        needs_inference_logprobs=needs_inference_logprobs,
        needs_ref_logprobs=needs_ref_logprobs,
        trains_without_advantage=trains_without_advantage,
        step_statistics=step_statistics,
    )


def _applies(need: Need[O] | None, options: O, by_default: bool) -> bool:
    if need is None:
        return by_default
    return need if isinstance(need, bool) else bool(need(options))


def _import(module_name: str, name: str) -> Any:
    try:
        with _current_directory_last():
            return importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise ConfigurationError(
                f"{name}: {module_name} imports {error.name}, which is not installed"
            ) from error
        raise ConfigurationError(
            f"{name}: there is no module {error.name}, neither installed nor in the current directory; start "
            "where it lies, or add its directory to PYTHONPATH"
        ) from error
    except (Exception, SystemExit) as error:  # whatever a user's module does when it is imported
        raise ConfigurationError(
            f"{name}: importing {module_name} failed: {type(error).__name__}: {error}"
        ) from error


@contextmanager
def _current_directory_last() -> Iterator[None]:
    """Find modules in the current directory too, behind all others, and only for now.

    A directory `wandb` there must not pass for the package later.
    """
    directory = str(Path.cwd())
    sys.path.append(directory)
    importlib.invalidate_caches()
    try:
        yield
    finally:
        for place in reversed(range(len(sys.path))):
            if sys.path[place] == directory:
                del sys.path[place]
                break


def called(what: str, function: Callable[..., _Result], *arguments: Any) -> _Result:
    """Call a loss or an estimator; of what a user's own one raises, say that it is theirs, and where."""
    try:
        return function(*arguments)
    except Exception as error:
        if isinstance(error, TrainerError) or function.__module__.startswith("trainer."):
            raise
        place = traceback.extract_tb(error.__traceback__)[-1]
        raise ConfigurationError(
            f"{what} raised {type(error).__name__}: {error} ({place.filename}, line {place.lineno})"
        ) from error


def _is_loss_result(result: Any) -> bool:
    if not (isinstance(result, tuple) and len(result) == 2 and isinstance(result[1], dict)):
        return False
    return all(getattr(value, "ndim", None) == 0 for value in (result[0], *result[1].values()))


def _shown(result: Any) -> str:
    """A few words on what was returned."""
    if isinstance(result, tuple):
        return f"({', '.join(_shown(each) for each in result)})"
    if isinstance(result, dict):
        return "{" + ", ".join(f"{name}: {_shown(value)}" for name, value in result.items()) + "}"
    shape = getattr(result, "shape", None)
    return type(result).__name__ + ("" if shape is None else f" {list(shape)}")
