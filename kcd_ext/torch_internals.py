"""Every private name of torch that this package uses, all in `torch._C`, and what happens in a torch that lacks it.

`_dispatch_tls_local_include_set` notices tracers, modes and transforms. Without it the fast path is closed: every call goes through
the dispatcher.

`_AutoDispatchBelowAutograd` calls an operator without its derivative. Without it torch.library ties derivatives to operators: eager
calls take some 20 us longer, and a compiled graph on a GPU without memory raises RuntimeError, not torch.OutOfMemoryError.

`_get_tracing_state` and `_set_tracing_state` hide checks of arguments from torch.jit.trace. Without them it records their looks at
shapes, with TracerWarnings, and may take two traces of one function for different ones: pass it check_trace=False.

`_are_functorch_transforms_active` refuses torch.func's transforms. Without it torch refuses them, in words of its own.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch

NAMES = (
    "_dispatch_tls_local_include_set",
    "_AutoDispatchBelowAutograd",
    "_get_tracing_state",
    "_set_tracing_state",
    "_are_functorch_transforms_active",
)

_included_keys, BelowAutograd, _get_tracing_state, _set_tracing_state, _transforms_are_active = (
    getattr(torch._C, name, None) for name in NAMES
)


def dispatch_is_plain() -> bool:
    """Return whether nothing watches or changes this thread's calls of operators: no tracer, mode or transform of torch's."""
    return _included_keys is not None and _included_keys().raw_repr() in (_plain_keys or _find_plain_keys())


_plain_keys: set[int] = set()


def _find_plain_keys() -> set[int]:
    """Return the dispatch keys that a new thread includes, with inference mode and without; none where no thread can start."""

    def look() -> None:
        outside = _included_keys().raw_repr()
        with torch.inference_mode():
            _plain_keys.update((outside, _included_keys().raw_repr()))

    thread = threading.Thread(target=look)
    try:
        thread.start()
    except RuntimeError:  # too many threads, or Python is shutting down
        return _plain_keys
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
