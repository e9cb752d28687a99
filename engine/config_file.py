"""Settings from a TOML file into frozen dataclasses, and back.

Keys are the names of the fields, tables those of nested dataclasses. What is not a field is
refused, with the name that was probably meant; so is a value of another type. Nothing here knows a
setting: a field that is added to a dataclass can be set in the file.
"""

import dataclasses
import difflib
import math
import tomllib
import types
from collections.abc import Mapping
from enum import Enum
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from engine.errors import ConfigError, quoted

MAX_FILE_BYTES = 1 << 20
T = TypeVar("T")
_NAMES = {str: "a string", int: "a whole number", float: "a number", bool: "true or false"}


def read_config_file(path: Path) -> dict[str, Any]:
    """The tables of a TOML file, unchecked; raises `ConfigError`."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from error
    if len(content) > MAX_FILE_BYTES:
        raise ConfigError(f"{path} has {len(content)} bytes, more than {MAX_FILE_BYTES}")
    try:
        return tomllib.loads(content.decode())
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not TOML: {error}") from error


def build(
    kind: type[T],
    values: Mapping[str, Any],
    *,
    overrides: Mapping[str, Any] | None = None,
    folder: Path = Path(),
    source: str = "the configuration",
) -> T:
    """An instance of a dataclass from tables; raises `ConfigError`, which names `source`.

    `overrides` are values of fields by dotted name ("batcher.max_batch_rows"), already of the right
    type: they count instead of those in the tables. Relative paths in the tables are in `folder`.
    """
    return _Builder(folder, source, dict(overrides or {})).build(kind, values, "")


@dataclasses.dataclass(frozen=True, slots=True)
class _Builder:
    folder: Path
    source: str
    overrides: dict[str, Any]

    def build(self, kind: type[T], values: Mapping[str, Any], prefix: str) -> T:
        hints = get_type_hints(kind)
        fields = {field.name: field for field in dataclasses.fields(kind) if field.init}  # pyright: ignore[reportArgumentType]
        for key in values:
            if key not in fields:
                raise ConfigError(f"{self.source}: {_unknown(key, prefix, list(fields))}")
        settings = dict[str, Any]()
        for name, field in fields.items():
            dotted = f"{prefix}{name}"
            if dataclasses.is_dataclass(hints[name]):
                table = values.get(name, {})
                if not isinstance(table, Mapping):
                    raise self._wrong(dotted, table, f"a table: [{dotted}]")
                settings[name] = self.build(hints[name], table, f"{dotted}.")
            elif dotted in self.overrides:
                settings[name] = self.overrides[dotted]
            elif name in values:
                settings[name] = self.convert(values[name], hints[name], dotted)
            elif not _has_default(field):
                raise ConfigError(
                    f"{self.source}: {dotted} is missing; set it there, or give "
                    f"--{name.replace('_', '-')}"
                )
        return kind(**settings)

    def convert(self, value: Any, hint: Any, name: str) -> Any:
        """A value of a TOML file as the type of a field; TOML has no None, leave the key out."""
        origin, arguments = get_origin(hint), get_args(hint)
        if origin in (Union, types.UnionType):
            (hint,) = (argument for argument in arguments if argument is not type(None))
            return self.convert(value, hint, name)
        if origin is Literal:
            if value not in arguments or isinstance(value, bool):
                raise self._wrong(name, value, f"one of {', '.join(map(repr, arguments))}")
            return value
        if origin in (tuple, frozenset):
            if not isinstance(value, list):
                raise self._wrong(name, value, "a list: [...]")
            return origin(self.convert(item, arguments[0], name) for item in value)
        if isinstance(hint, type) and issubclass(hint, Enum):
            values = [member.value for member in hint]
            if value not in values:
                raise self._wrong(name, value, f"one of {', '.join(map(repr, values))}")
            return hint(value)
        return self._plain(value, hint, name)

    def _plain(self, value: Any, hint: Any, name: str) -> Any:
        if hint is Path:
            if not isinstance(value, str):
                raise self._wrong(name, value, "a path in quotes")
            return self.folder / Path(value).expanduser()
        if hint is float and isinstance(value, int) and not isinstance(value, bool):
            value = float(value)
        if type(value) is not hint:  # bool is an int, and 1.0 is none
            raise self._wrong(name, value, _NAMES[hint])
        if isinstance(value, float) and math.isnan(value):
            raise self._wrong(name, value, "a number")
        return value

    def _wrong(self, name: str, value: Any, expected: str) -> ConfigError:
        return ConfigError(
            f"{self.source}: {name} must be {expected}, got {quoted(str(value))}"
            f" ({type(value).__name__})"
        )


def _has_default(field: "dataclasses.Field[Any]") -> bool:
    return not (field.default is field.default_factory is dataclasses.MISSING)


def _unknown(key: str, prefix: str, names: list[str]) -> str:
    near = difflib.get_close_matches(key, names, 1)
    where = f" in [{prefix.rstrip('.')}]" if prefix else ""
    known = f"did you mean {near[0]}?" if near else f"known are {', '.join(sorted(names))}"
    return f"unknown key {quoted(key)}{where}; {known}"
