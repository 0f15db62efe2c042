"""Every private name of torch that this package uses, and what happens in a torch that lacks it.

| name in `torch._C` | used for | without it |
| --- | --- | --- |
| `_dispatch_tls_local_include_set` | notice tracers, modes and transforms | the fast path is off: every call goes through the dispatcher |
| `_AutoDispatchBelowAutograd` | call an operator without its derivative | eager calls take torch.library's way, about 20 us longer |
| `_get_tracing_state`, `_set_tracing_state` | hide checks from torch.jit.trace | the trace records them: TracerWarnings, the same results |
| `_are_functorch_transforms_active` | refuse torch.func's transforms | torch refuses them, in words of its own |
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch

_included_keys, _get_tracing_state, _set_tracing_state, _transforms_are_active = (
    getattr(torch._C, name, None)
    for name in (
        "_dispatch_tls_local_include_set",
        "_get_tracing_state",
        "_set_tracing_state",
        "_are_functorch_transforms_active",
    )
)

BelowAutograd = getattr(torch._C, "_AutoDispatchBelowAutograd", None)
"""A context in which operators are called without their derivatives; None where torch has none."""


def dispatch_is_plain() -> bool:
    """Return whether nothing watches or changes this thread's calls of operators: no tracer, mode or transform of torch's."""
    return _included_keys is not None and _included_keys().raw_repr() in (_plain_keys or _find_plain_keys())


_plain_keys: set[int] = set()


def _find_plain_keys() -> set[int]:
    """Return the dispatch keys that a new thread includes, with inference mode and without."""

    def look() -> None:
        outside = _included_keys().raw_repr()
        with torch.inference_mode():
            _plain_keys.update((outside, _included_keys().raw_repr()))

    thread = threading.Thread(target=look)
    thread.start()
    thread.join()
    return _plain_keys


def transforms_are_active() -> bool:
    """Return whether a transform of torch.func runs."""
    return _transforms_are_active is not None and _transforms_are_active()


@contextmanager
def untraced() -> Iterator[None]:
    """Hide what runs inside from torch.jit.trace: checks of arguments, whose look at shapes it would record.

    torch names the values of a graph by the variables that it finds them in, and takes two names for two graphs.
    """
    state = _get_tracing_state() if _get_tracing_state and _set_tracing_state else None
    if state is None:
        yield
        return
    _set_tracing_state(None)
    try:
        yield
    finally:
        _set_tracing_state(state)
