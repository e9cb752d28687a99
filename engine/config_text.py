"""A configuration as TOML that `engine.config_file` reads back: with the comments of its fields.

The comments are those that stand beside the fields in the source, so that there is one place to
write what a setting does.
"""

import ast
import dataclasses
import inspect
import io
import json
import re
import textwrap
import tokenize
from collections.abc import Iterator
from enum import Enum
from pathlib import Path, PurePosixPath
from typing import Any

from engine.errors import ConfigError

_WIDTH = 96
_EXAMPLE = """\
# Settings of `oneword serve --config FILE`, with their defaults. Flags of the same names overrule
# them; relative paths are relative to this file; a key that is not here is refused.
# `oneword serve --print-config` prints what counts, `--example-config` prints this."""


def to_toml(config: Any) -> str:
    """All settings of a configuration. One that is None is left out, with a comment saying so.

    Paths become absolute: the text means the same wherever it is kept. A field with `repr=False`
    is a secret and is not written.
    """
    return "\n".join(_table(config, "", template=False)).strip() + "\n"


def example(config: Any) -> str:
    """The same to edit: what has a default is commented out. `config` has the defaults."""
    return "\n".join([_EXAMPLE, *_table(config, "", template=True)]).strip() + "\n"


def _table(config: Any, name: str, *, template: bool) -> Iterator[str]:
    comments = field_comments(type(config))
    nested = list[tuple[str, Any]]()
    if name:
        yield from ("", f"[{name}]")
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            nested.append((field.name, value))
            continue
        yield ""
        comment = re.sub(r"\bNone\b", "not set", comments.get(field.name, ""))
        for line in textwrap.wrap(comment, _WIDTH - 2):
            yield f"# {line}"
        yield _setting(field, value, template=template)
    for key, value in nested:
        yield from _table(value, f"{name}.{key}" if name else key, template=template)


def _setting(field: "dataclasses.Field[Any]", value: Any, *, template: bool) -> str:
    if not field.repr:
        return f"# {field.name} = ... (a secret)"
    if value is None:
        if field.default is not None:
            raise ConfigError(f"{field.name} is None, which TOML cannot say")
        return f"# {field.name} = (not set)"
    if template and isinstance(value, Path):
        value = PurePosixPath(value)  # not absolute: it is no path of this machine
    has_default = not (field.default is field.default_factory is dataclasses.MISSING)
    return f"{'# ' if template and has_default else ''}{field.name} = {_value(value)}"


def _value(value: Any) -> str:
    match value:
        case Enum():
            return _value(value.value)
        case bool():
            return "true" if value else "false"
        case int() | float():
            return repr(value)  # TOML knows inf, too
        case PurePosixPath() if not isinstance(value, Path):
            return _string(str(value))
        case Path():
            return _string(str(value.absolute()))
        case str():
            return _string(value)
        case tuple():
            return f"[{', '.join(map(_value, value))}]"
        case frozenset():
            return f"[{', '.join(sorted(map(_value, value)))}]"
        case _:
            raise ConfigError(f"a setting of the type {type(value).__name__} cannot be written")


def _string(text: str) -> str:
    """A basic string: JSON's escapes are TOML's, but for DEL and surrogate pairs."""
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")


def field_comments(kind: type) -> dict[str, str]:
    """What the source says beside and above each field of a dataclass; nothing without a source."""
    try:
        source = textwrap.dedent(inspect.getsource(kind))
    except OSError:
        return {}
    by_line, whole = _comments(source)
    (definition,) = ast.parse(source).body
    assert isinstance(definition, ast.ClassDef)
    found = dict[str, str]()
    for node in definition.body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            above, line = list[str](), node.lineno - 1
            while line in whole:
                above.insert(0, by_line[line])
                line -= 1
            beside = by_line.get(node.end_lineno or node.lineno, "")
            found[node.target.id] = " ".join([beside, *above] if beside else above)
    return found


def _comments(source: str) -> tuple[dict[int, str], set[int]]:
    """The comment of each line, and the lines that are nothing else."""
    by_line, whole = dict[int, str](), set[int]()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            line = token.start[0]
            by_line[line] = token.string.lstrip("#").strip()
            if token.line.lstrip().startswith("#"):
                whole.add(line)
    return by_line, whole
