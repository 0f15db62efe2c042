"""Reads pickles of plain values and uint8 arrays, and runs nothing that they name."""

import io
import pickle

import numpy as np

from ..registry import one_line

UINT8 = ("u1", "|u1", "uint8", b"u1", b"|u1", b"uint8")


def unpickle(raw: bytes) -> dict:
    """The dict in a pickle; strings of Python 2 are bytes.

    Admitted is what a pickle writes without a name, which in every protocol are None, booleans, integers, floats,
    strings, tuples, lists and dicts; and uint8 arrays as values of the dict itself. The names of NumPy's functions that
    arrays are made of stand for classes of this module, so that not even NumPy is run; any other name is refused.
    So arrays and bytes are read out of what Python 2 wrote, as the CIFAR archives are, and out of protocols 3 and 4 of
    Python 3: its protocols 0 to 2 name a codec for bytes, and protocol 5 another function of NumPy.

    Nothing that is read can run anything, but it can ask for more memory than there is: a caller checks the sum of the
    bytes first.

    Raises:
        ValueError: the pickle names anything else, is damaged, or is of something else than a dict; says what.
    """
    try:
        held = _Unpickler(io.BytesIO(raw), encoding="bytes").load()
        if not isinstance(held, dict):
            raise ValueError(f"it must be of a dict, got {type(held).__name__}")
        return {key: value.array if isinstance(value, _Array) else value for key, value in held.items()}
    except Exception as error:  # a pickle that makes no sense can raise anything
        raise ValueError(f"the pickle cannot be read: {one_line(error)}") from error


class _Type:
    """In the place of numpy.dtype."""

    __slots__ = ("code",)

    def __init__(self, code: object, align: object = False, copy: object = False):
        self.code = code

    def __setstate__(self, state: object) -> None:
        """Byte order and alignment, which uint8 has not."""


class _Array:
    """In the place of what numpy.core.multiarray._reconstruct makes."""

    __slots__ = ("array",)

    def __init__(self, subtype: object, shape: object, code: object):
        self.array = np.empty(0, dtype=np.uint8)

    def __setstate__(self, state: tuple) -> None:
        _, shape, kind, by_columns, raw = state
        if not isinstance(kind, _Type) or kind.code not in UINT8:
            raise ValueError(f"it holds an array of {getattr(kind, 'code', kind)!r}, only uint8 is read")
        self.array = np.frombuffer(raw, dtype=np.uint8).reshape(shape, order="F" if by_columns else "C")


# A class is called for REDUCE and has its own __setstate__ for BUILD, so that a pickle can change none of them.
STAND_INS = {
    ("numpy", "dtype"): _Type,
    ("numpy", "ndarray"): "numpy.ndarray",
    ("numpy.core.multiarray", "_reconstruct"): _Array,
    ("numpy._core.multiarray", "_reconstruct"): _Array,
}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> object:
        if (module, name) not in STAND_INS:
            raise ValueError(f"it names {module}.{name}, which is not admitted")
        return STAND_INS[module, name]
