"""Pickles read as data: a machine for the few opcodes that `torch.save` writes; it runs nothing.

Not `pickle.Unpickler` with an allow-list in `find_class`: there one name too many in the list is
code execution, REDUCE, NEWOBJ and BUILD act on real classes, and opcodes cannot be counted. Here a
global is a name and stays one. What REDUCE and NEWOBJ "call" is looked up in a table of our own
functions that make plain records, and any other name is an error. `pickletools` only splits the
bytes into opcodes; it builds and imports nothing.
"""

import pickletools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from io import BytesIO

from engine.errors import quoted

MAX_OPCODES = 100_000
_MAX_INTEGER_BITS = 128  # the magic number of PyTorch's older format has 81
Builder = Callable[[tuple[object, ...]], object]


@dataclass(frozen=True, slots=True)
class Global:
    """The name of something in a program, `module.name`; never looked up."""

    name: str


@dataclass(slots=True)
class Record:
    """Stands for an object of a class: its name, and the state that a pickle gave it."""

    class_name: str
    state: dict[object, object] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """What the pickles of a format may name, and what we make of it."""

    builders: Mapping[str, Builder]  # what may be called, and our stand-in: arguments -> value
    names: frozenset[str]  # what may be named and not called
    persistent: Builder  # persistent id -> value


def read_pickle(file: BytesIO, vocabulary: Vocabulary) -> object:
    """The value of the pickle that begins here; leaves `file` behind its end.

    Raises `ValueError` in words for whatever is not plain data and the names of `vocabulary`.
    """
    machine = _Machine(vocabulary)
    for count, (opcode, argument, _) in enumerate(pickletools.genops(file)):
        if count >= MAX_OPCODES:
            raise ValueError(f"it has more than {MAX_OPCODES} pickle opcodes; a concept has few")
        if opcode.name == "STOP":
            break
        machine.execute(opcode.name, argument)
    return machine.result()


class _Machine:
    """The stack machine of PEP 3154 and before, cut down to data."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._vocabulary = vocabulary
        self._stack: list[object] = []
        self._marks: list[int] = []
        self._memo: dict[int, object] = {}

    def execute(self, opcode: str, argument: object) -> None:
        """One opcode. The constants carry their value as `argument`."""
        if opcode in _VALUES:
            self._stack.append(_checked_value(argument))
        elif opcode in _CONSTANTS:
            self._stack.append(_CONSTANTS[opcode]())
        elif opcode in _ACTIONS:
            _ACTIONS[opcode](self, argument)
        elif opcode not in ("PROTO", "FRAME"):
            raise ValueError(f"it uses the pickle opcode {opcode}, which no PyTorch file needs")

    def result(self) -> object:
        value = self._pop()
        if self._stack or self._marks:
            raise ValueError("its pickle ends with values left over")
        return value

    def _pop(self) -> object:
        floor = self._marks[-1] if self._marks else 0
        if len(self._stack) <= floor:
            raise ValueError("its pickle takes a value that is not there")
        return self._stack.pop()

    def _pop_many(self, count: int) -> tuple[object, ...]:
        return tuple(reversed([self._pop() for _ in range(count)]))

    def _pop_to_mark(self) -> list[object]:
        if not self._marks:
            raise ValueError("its pickle closes a list that was not opened")
        start = self._marks.pop()
        items = self._stack[start:]
        del self._stack[start:]
        return items

    def _top(self) -> object:
        value = self._pop()
        self._stack.append(value)
        return value

    def mark(self, _: object) -> None:
        self._marks.append(len(self._stack))

    def make_tuple(self, _: object) -> None:
        self._stack.append(tuple(self._pop_to_mark()))

    def make_short_tuple(self, length: int) -> None:
        self._stack.append(self._pop_many(length))

    def extend(self, items: list[object]) -> None:
        target = self._top()
        if not isinstance(target, list):
            raise ValueError("its pickle appends to what is not a list")
        target.extend(items)

    def set_items(self, items: list[object]) -> None:
        target = self._top()
        if not isinstance(target, dict) or len(items) % 2:
            raise ValueError("its pickle sets items of what is not a dictionary")
        for key, value in zip(items[::2], items[1::2], strict=True):
            # No tuples: hashing deep ones exhausts the C stack.
            if not isinstance(key, (str, int)):
                raise ValueError("its pickle has a dictionary key that is neither text nor number")
            if key in target:
                raise ValueError(f"its pickle has the key {quoted(str(key))} twice")
            target[key] = value

    def remember(self, slot: object) -> None:
        index = len(self._memo) if slot is None else slot
        assert isinstance(index, int)
        self._memo[index] = self._top()

    def recall(self, slot: object) -> None:
        if slot not in self._memo:
            raise ValueError("its pickle refers to a value that is not there")
        assert isinstance(slot, int)
        self._stack.append(self._memo[slot])

    def name_global(self, module: object, name: object) -> None:
        if not isinstance(module, str) or not isinstance(name, str):
            raise ValueError("its pickle names something by what is not text")
        full_name = f"{module}.{name}"
        known = full_name in self._vocabulary.builders or full_name in self._vocabulary.names
        if not known:
            raise ValueError(
                f"it asks for {quoted(full_name)}, and only tensors are read: a file of learned "
                "words needs no code; do not load it with other tools unless you trust its origin"
            )
        self._stack.append(Global(full_name))

    def call(self) -> None:
        function, arguments = self._pop_many(2)
        name = function.name if isinstance(function, Global) else ""
        if name not in self._vocabulary.builders or not isinstance(arguments, tuple):
            raise ValueError("its pickle calls what is not a function")
        self._stack.append(self._vocabulary.builders[name](arguments))

    def build(self) -> None:
        target, state = self._pop_many(2)
        if not isinstance(target, Record) or not isinstance(state, dict):
            raise ValueError("its pickle sets the state of what has none")
        target.state = state
        self._stack.append(target)

    def load_persistent(self) -> None:
        identity = self._pop()
        if not isinstance(identity, tuple):
            raise ValueError("its pickle refers to a storage in an unknown way")
        self._stack.append(self._vocabulary.persistent(identity))


def _checked_value(value: object) -> object:
    # Python refuses to print integers of more than 4300 digits, and no field of ours is that long.
    if isinstance(value, int) and value.bit_length() > _MAX_INTEGER_BITS:
        raise ValueError(f"it holds an integer of {value.bit_length()} bits")
    return value


_VALUES = {
    *("BININT", "BININT1", "BININT2", "LONG1", "LONG4", "BINFLOAT"),
    *("BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8"),
}
_CONSTANTS: dict[str, Callable[[], object]] = {
    "NONE": lambda: None,
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
    "EMPTY_DICT": dict,
    "EMPTY_LIST": list,
    "EMPTY_TUPLE": tuple,
    "EMPTY_SET": lambda: Record("builtins.set"),
}
_ACTIONS: dict[str, Callable[[_Machine, object], None]] = {
    "MARK": _Machine.mark,
    "TUPLE": _Machine.make_tuple,
    "TUPLE1": lambda machine, _: machine.make_short_tuple(1),
    "TUPLE2": lambda machine, _: machine.make_short_tuple(2),
    "TUPLE3": lambda machine, _: machine.make_short_tuple(3),
    "APPEND": lambda machine, _: machine.extend([machine._pop()]),
    "APPENDS": lambda machine, _: machine.extend(machine._pop_to_mark()),
    "SETITEM": lambda machine, _: machine.set_items([*machine._pop_many(2)]),
    "SETITEMS": lambda machine, _: machine.set_items(machine._pop_to_mark()),
    "BINPUT": _Machine.remember,
    "LONG_BINPUT": _Machine.remember,
    "MEMOIZE": _Machine.remember,
    "BINGET": _Machine.recall,
    "LONG_BINGET": _Machine.recall,
    "GLOBAL": lambda machine, names: machine.name_global(*str(names).split(" ", 1)),
    "STACK_GLOBAL": lambda machine, _: machine.name_global(*machine._pop_many(2)),
    "REDUCE": lambda machine, _: machine.call(),
    "NEWOBJ": lambda machine, _: machine.call(),
    "BUILD": lambda machine, _: machine.build(),
    "BINPERSID": lambda machine, _: machine.load_persistent(),
}
