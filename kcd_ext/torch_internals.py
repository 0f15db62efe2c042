"""The private names of torch that this package uses, all in `torch._C`, and what changes if a torch lacks them.

- `_dispatch_tls_local_include_set` detects tracers, modes and transforms. Without it there is no fast path: every call goes through
  the dispatcher.
- `_AutoDispatchBelowAutograd` calls an operator without its derivative. Without it torch.library registers the derivatives: eager
  calls take about 20 us longer, and a compiled graph that runs out of GPU memory raises RuntimeError instead of
  torch.OutOfMemoryError.
- `_get_tracing_state` and `_set_tracing_state` hide argument checks from torch.jit.trace. Without them it records the checks, with
  TracerWarnings, and may mistake two traces of one function for different ones: pass it `check_trace=False`.
- `_are_functorch_transforms_active` detects torch.func transforms, so that this package can refuse them. Without it torch refuses
  them, with its own message.
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
    """Return whether this thread calls operators directly, without any tracer, mode or transform of torch."""
    return _included_keys is not None and _included_keys().raw_repr() in (_plain_keys or _find_plain_keys())


_plain_keys: set[int] = set()


def _find_plain_keys() -> set[int]:
    """Return the dispatch keys of a new thread, with and without inference mode. Empty if no thread can start."""

    def record() -> None:
        normal = _included_keys().raw_repr()
        with torch.inference_mode():
            _plain_keys.update((normal, _included_keys().raw_repr()))

    thread = threading.Thread(target=record)
    try:
        thread.start()
    except RuntimeError:  # too many threads, or the interpreter is shutting down
        return _plain_keys
    thread.join()
    return _plain_keys


def transforms_are_active() -> bool:
    """Return whether a torch.func transform is active."""
    return _transforms_are_active is not None and _transforms_are_active()


@contextmanager
def untraced() -> Iterator[None]:
    """Hide the code inside from torch.jit.trace, which would record the shapes that argument checks read.

    torch names a graph's values after the variables that hold them, and treats graphs with different names as different.
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
