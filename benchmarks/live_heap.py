"""How much of its memory a process lives in."""

import ctypes


class _Mallinfo2(ctypes.Structure):
    """`struct mallinfo2` of glibc 2.33 and later; all arenas together."""

    _fields_ = [
        (name, ctypes.c_size_t)
        for name in ("arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks",
                     "uordblks", "fordblks", "keepcost")
    ]  # fmt: skip


def live_heap_bytes() -> int | None:
    """Bytes that malloc has given out and not got back, in this process (mallinfo2(3)).

    With PYTHONMALLOC=malloc Python's own objects are among them. None where the C library does not
    tell.
    """
    try:
        mallinfo2 = ctypes.CDLL(None).mallinfo2
    except AttributeError:
        return None
    mallinfo2.restype = _Mallinfo2
    found = mallinfo2()
    return found.uordblks + found.hblkhd
