"""Descriptions of values in error messages: short, one line, never the contents of a tensor or container."""

import enum
from pathlib import Path

import numpy as np
import pytest
import torch

from kcd_ext.describe import brief, describe


class Unwritable:
    def __repr__(self):
        raise RuntimeError("no")


class Colour(enum.Enum):
    RED = 1


@pytest.mark.parametrize(
    ("value", "described", "shown"),
    [
        (3, "int 3", "3"),
        (True, "bool True", "True"),
        (None, "NoneType None", "None"),
        ("a\x1b\n\u202e", "str 'a\\x1b\\n\\u202e'", "'a\\x1b\\n\\u202e'"),
        ("a" * 61, f"str '{'a' * 60}'... (61 characters)", f"'{'a' * 60}'... (61 characters)"),
        (torch.zeros(2, 3), *["a torch.float32 tensor of shape (2, 3)"] * 2),
        (torch.nn.Parameter(torch.zeros(())), *["a torch.float32 tensor of shape ()"] * 2),
        (torch.nn.parameter.UninitializedParameter(), *["UninitializedParameter"] * 2),
        (np.zeros((4, 0), np.int64), *["an int64 array of shape (4, 0)"] * 2),
        (np.float32(2), "float32 np.float32(2.0)", "np.float32(2.0)"),
        ([torch.zeros(1000)], *["list of length 1"] * 2),
        ({"a": 1}, *["dict of length 1"] * 2),
        (b"abc", *["bytes of length 3"] * 2),
        (torch.Tensor, "class Tensor", "Tensor"),
        (len, "builtin_function_or_method len", "len"),
        (torch.nn.Linear(2, 3, bias=False), *["Linear(in_features=2, out_features=3, bias=False)"] * 2),
        (torch.nn.Sequential(torch.nn.ReLU()), *["Sequential"] * 2),
        (Path("/a"), "PosixPath('/a')", "PosixPath('/a')"),
        (object(), *["object"] * 2),
        (Unwritable(), *["Unwritable"] * 2),
        (10**5000, *["int"] * 2),
        (Colour.RED, "Colour", "Colour"),
    ],
    ids=lambda value: value if isinstance(value, str) and value.isprintable() else type(value).__name__,
)
def test_value_is_described_in_one_line(value, described, shown):
    assert (describe(value), brief(value)) == (described, shown)
