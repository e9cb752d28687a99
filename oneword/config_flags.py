"""Flags for the settings of a configuration: same names, same types, no defaults of their own.

A flag that is not given leaves the setting to the file, or to the default of the field.
"""

import argparse
import dataclasses
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple, Union, get_args, get_origin, get_type_hints

_DEST = "setting "  # dotted names are kept apart from what else a command is told


class Flag(NamedTuple):
    """How one setting is offered."""

    summary: str
    name: str = ""  # of the flag; else that of the field, with dashes
    value: Any = None  # what the flag stands for; None: it takes a value, or its opposite with no-


def add_config_flags(
    parser: argparse.ArgumentParser, kind: type, flags: Mapping[str, str | Flag]
) -> None:
    """A flag for each of the settings, by dotted name; those of nested tables in groups."""
    groups: dict[str, argparse._ActionsContainer] = {"": parser}
    for dotted, given in flags.items():
        flag = given if isinstance(given, Flag) else Flag(given)
        table, _, field_name = dotted.rpartition(".")
        if table not in groups:
            groups[table] = parser.add_argument_group(table)
        hint, field = _find(kind, dotted)
        _add(groups[table], flag.name or field_name.replace("_", "-"), dotted, hint, field, flag)


def given_settings(arguments: argparse.Namespace) -> dict[str, Any]:
    """The settings that were given as flags, by dotted name."""
    return {
        name.removeprefix(_DEST): tuple(value) if isinstance(value, list) else value
        for name, value in vars(arguments).items()
        if name.startswith(_DEST)
    }


def _add(
    group: argparse._ActionsContainer,
    name: str,
    dotted: str,
    hint: Any,
    field: "dataclasses.Field[Any]",
    flag: Flag,
) -> None:
    is_told = field.default not in (None, dataclasses.MISSING, True, False)
    options: dict[str, Any] = {
        "dest": _DEST + dotted,
        "default": argparse.SUPPRESS,
        "help": flag.summary + (f" (default: {field.default})" if is_told else ""),
    }
    origin = get_origin(hint)
    if flag.value is not None:
        options |= {"action": "store_const", "const": flag.value}
    elif hint is bool:
        options["action"] = argparse.BooleanOptionalAction
    elif origin is Literal:
        options["choices"] = get_args(hint)
    elif origin is tuple:
        options |= {"action": "append", "type": get_args(hint)[0], "metavar": "VALUE"}
    else:
        options |= {"type": hint, "metavar": "PATH" if hint is Path else name.upper()}
    group.add_argument(f"--{name}", **options)


def _find(kind: type, dotted: str) -> tuple[Any, "dataclasses.Field[Any]"]:
    """The type of a setting without None, and its field."""
    *tables, name = dotted.split(".")
    for table in tables:
        kind = get_type_hints(kind)[table]
    hint: Any = get_type_hints(kind)[name]
    if get_origin(hint) in (Union, types.UnionType):
        (hint,) = (argument for argument in get_args(hint) if argument is not type(None))
    return hint, {field.name: field for field in dataclasses.fields(kind)}[name]
