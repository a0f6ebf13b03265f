"""`--methods sam:rho=0.1:start=0.5,…`: methods with their own options, which are parsed like the command line's."""

from __future__ import annotations

from collections.abc import Iterator
from typing import get_type_hints

from fsam_core import NAMES, UserError
from fsam_trainers.cli.options import Common, parse
from fsam_trainers.config import Settings
from fsam_trainers.models.vit_layout import ViTConfig

# The options in which the methods of one comparison may differ.
VARIED = (
    "learning_rate", "warmup", "learning_rate_schedule", "decay", "decay_shape", "final_learning_rate", "weight_decay",
    "b1", "b2", "eps", "clip_norm", "dropout", "ema", "rho", "rho_schedule", "norm", "norm_from", "second_moment",
    "savings", "correction_fraction", "form", "ascent", "ascent_fraction", "scope", "cut", "every", "start",
    "probability", "between", "cotangent", "label_smoothing", "z_loss",
)  # fmt: skip


def variants(options: Common, methods: str) -> dict[str, Settings]:
    """Each method of the list, as it was written, and its settings.

    Raises:
        UserError: for an unknown method or option.
    """
    names = dict.fromkeys(name.strip() for name in methods.split(",") if name.strip())
    unknown = [name for name in names if name.partition(":")[0] not in NAMES]
    if unknown or not names:
        raise UserError(f"--methods: {', '.join(unknown) or 'none given'}; use some of {', '.join(NAMES)}")
    return {name: variant(options, name, "--methods") for name in names}


def variant(options: Common, text: str, argument: str) -> Settings:
    """The settings of the command line followed by the method's own options.

    Raises:
        UserError: for an unknown option, naming `argument`.
    """
    method, *own = text.split(":")
    arguments = [*options.arguments, *(f"--{option}" for option in _joined(own) if _checked(option, text, argument))]
    return parse(type(options), arguments, "fsam compare").settings(method=method)


def _joined(parts: list[str]) -> Iterator[str]:
    """The options that were split at colons; the value of "scope=top:2" contains one."""
    while parts:
        option, *parts = parts
        while parts and "=" in option and "=" not in parts[0]:
            option, *parts = f"{option}:{parts[0]}", *parts[1:]
        yield option


def _checked(option: str, text: str, argument: str) -> bool:
    """True for a valid option=value; the message of `parsed` would not name `argument` and the method.

    Raises:
        UserError: for an unknown option and for text in place of a number.
    """
    name, equals, value = option.partition("=")
    name = name.replace("-", "_")
    if not equals or name not in VARIED:
        known = ", ".join(x.replace("_", "-") for x in VARIED)
        raise UserError(f"{argument}: {option!r} in {text!r} is no option=value; the options are {known}")
    number = get_type_hints(Settings, include_extras=True) | get_type_hints(ViTConfig)
    if (kind := number.get(name)) in (int, float):
        try:
            kind(value)
        except ValueError:
            raise UserError(f"{argument}: {name}={value} in {text!r} is no {kind.__name__}") from None
    return True
