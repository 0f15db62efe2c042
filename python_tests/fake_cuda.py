"""A simulated GPU, for tests of programs that need one.

Tensors "on cuda" are CPU tensors whose storage is registered as the GPU's. They report the device cuda:0, and operators that mix
them with CPU tensors fail, as on a GPU. The CPU computes everything immediately. Streams, events, graphs and allocator statistics
exist as far as the tested programs use them. `install()` cannot be undone within the process.
"""

import contextlib
import time
import types

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

DEVICE = torch.device("cuda", 0)
GPU = types.SimpleNamespace(
    name="Fake GPU", major=9, minor=0, multi_processor_count=2, total_memory=2**37, L2_cache_size=10_000, uuid="0"
)
SYNCHRONIZING = {
    Tensor.item,
    Tensor.tolist,
    Tensor.cpu,
    Tensor.nonzero,
    Tensor.__bool__,
    Tensor.__float__,
    Tensor.__int__,
}
# Functions that accept tensors of both devices.
MIXED_DEVICE = {Tensor.copy_, Tensor.__getitem__, Tensor.__setitem__, Tensor.type_as, Tensor.data.__set__}
MIXED_DEVICE |= {torch._has_compatible_shallow_copy_type}


class Device:
    """The state of the simulated GPU."""

    memory: dict[int, StorageWeakRef] = {}  # noqa: RUF012 - shared; a weak reference keeps the key from being reused
    busy_until = skipped = 0.0
    forbids_sync = False

    @classmethod
    def now(cls) -> float:
        """Return the time in seconds; synchronising skips forward instead of sleeping."""
        return time.monotonic() + cls.skipped

    @classmethod
    def owns(cls, x: object) -> bool:
        """Return whether a tensor's storage is on the GPU."""
        try:
            reference = cls.memory.get(x.untyped_storage()._cdata)
        except (NotImplementedError, RuntimeError):  # a tensor subclass without storage
            return False
        return reference is not None and not reference.expired()

    @classmethod
    def register(cls, x: Tensor) -> Tensor:
        """Register a tensor's storage as the GPU's, and return the tensor."""
        with contextlib.suppress(NotImplementedError, RuntimeError):
            storage = x.untyped_storage()
            cls.memory[storage._cdata] = StorageWeakRef(storage)
        return x


def _is_cuda(device: object) -> bool:
    return device is not None and torch.device(device).type == "cuda"


class _DeviceMode(TorchFunctionMode):
    """A mode that intercepts every call of a torch function."""

    def __torch_function__(self, function, kinds, arguments=(), options=None):
        options = dict(options or {})
        if function in _GETTERS:
            return _GETTERS[function](*arguments) if Device.owns(arguments[0]) else function(*arguments)
        if function is Tensor.cuda:
            function, arguments = Tensor.to, (*arguments[:1], DEVICE)
        if function is Tensor.numpy and Device.owns(arguments[0]):
            raise TypeError("can't convert cuda:0 device type tensor to numpy")
        tensors = [x for x in tree_leaves((arguments, options)) if isinstance(x, Tensor)]
        on_gpu = [x for x in tensors if Device.owns(x)]
        if on_gpu and Device.forbids_sync and function in SYNCHRONIZING:
            raise RuntimeError("called a synchronizing CUDA operation")
        target = _target_device(function, arguments, options)
        if target is not None:
            return self._run_with_device(function, arguments, options, _is_cuda(target))
        on_cpu = [x for x in tensors if x.dim() and x.numel() and not Device.owns(x)]
        if on_gpu and on_cpu and function not in MIXED_DEVICE:
            raise RuntimeError(
                f"Expected all tensors to be on the same device, but {function.__name__} got cuda:0 and cpu"
            )
        result = function(*arguments, **options)
        if (on_gpu and function is not Tensor.__getitem__) or (on_gpu and Device.owns(arguments[0])):
            tree_map(lambda x: Device.register(x) if isinstance(x, Tensor) else x, result)
        return result

    def _run_with_device(self, function, arguments, options, to_cuda):
        """Run a call that names a device."""

        def replace_device(x):
            return (
                torch.device("cpu") if isinstance(x, torch.device) or (isinstance(x, str) and _is_device_name(x)) else x
            )

        result = function(*map(replace_device, arguments), **{name: replace_device(x) for name, x in options.items()})
        if isinstance(result, Tensor) and to_cuda != Device.owns(result):
            if any(
                result.untyped_storage()._cdata == x.untyped_storage()._cdata
                for x in arguments
                if isinstance(x, Tensor)
            ):
                result = result.clone()
            if to_cuda:
                Device.register(result)
        return result


def _is_device_name(text: str) -> bool:
    return text in ("cpu", "meta") or text.startswith("cuda")


def _target_device(function, arguments, options):
    """Return the device that a call names, or None."""
    if function is Tensor.cpu:
        return "cpu"
    if options.get("device") is not None and str(options["device"]) != "meta":
        return options["device"]
    if function is Tensor.to:
        for x in arguments[1:]:
            if isinstance(x, Tensor):
                return DEVICE if Device.owns(x) else "cpu"
            if isinstance(x, (torch.device, str)) and str(x) != "meta":
                return x
    return None


_GETTERS = {
    Tensor.device.__get__: lambda x: DEVICE,
    Tensor.is_cuda.__get__: lambda x: True,
    Tensor.is_cpu.__get__: lambda x: False,
    Tensor.get_device: lambda x: 0,
}


# ---- torch.cuda


class Event:
    """A CUDA event."""

    def __init__(self, enable_timing: bool = False) -> None:
        self.at = self.done = 0.0

    def record(self, stream: object = None) -> "Event":
        """Record the event after all queued work."""
        self.at, self.done = time.perf_counter(), Device.busy_until
        return self

    def query(self) -> bool:
        """Return whether the device has reached the event."""
        return Device.now() >= self.done

    def elapsed_time(self, end: "Event") -> float:
        """Return the milliseconds between two events."""
        return 1e3 * (end.at - self.at)


class Stream:
    """A stream, whose work is done immediately."""

    def wait_event(self, event: Event) -> None:
        """Do nothing, because all work is done."""

    def wait_stream(self, stream: "Stream") -> None:
        """Do nothing, because all work is done."""

    def record_event(self, event: Event | None = None) -> Event:
        """Return an event at this point."""
        return Event().record()


class CUDAGraph:
    """A graph, as a list of operator calls that are repeated on the same memory."""

    def __init__(self) -> None:
        self.calls: list[tuple] = []

    @torch.no_grad()
    def replay(self) -> None:
        """Repeat the calls, and copy their results to the captured results."""
        with torch._C.DisableTorchFunction():
            for function, arguments, options, results in self.calls:
                again = function(*arguments, **options)
                for old, new in zip(tree_leaves(results), tree_leaves(again), strict=True):
                    if isinstance(old, Tensor) and old.data_ptr() != new.data_ptr():
                        old.copy_(new)


class _Capture(TorchDispatchMode):
    def __init__(self, graph: CUDAGraph) -> None:
        super().__init__()
        self.graph = graph

    def __torch_dispatch__(self, function, kinds, arguments=(), options=None):
        result = function(*arguments, **(options or {}))
        self.graph.calls.append((function, arguments, options or {}, result))
        return result


@contextlib.contextmanager
def _capturing(graph: CUDAGraph, stream: Stream | None = None):
    with _Capture(graph):
        yield


def _synchronize(device: object = None) -> None:
    Device.skipped += max(0.0, Device.busy_until - Device.now())


def _sleep(cycles: int) -> None:
    Device.busy_until = Device.now() + cycles / 2e9


def _set_sync_debug_mode(mode: str) -> None:
    Device.forbids_sync = mode == "error"


def install() -> None:
    """Give torch and kcd_ext a simulated GPU, in this process and its forks."""
    from kcd_ext import ops

    fakes = {
        "is_available": lambda: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "set_device": lambda device: None,
        "get_device_properties": lambda device=0: GPU,
        "get_device_capability": lambda device=None: (GPU.major, GPU.minor),
        "mem_get_info": lambda: (2**22, 2**22),
        "memory_allocated": lambda: 1000,
        "max_memory_allocated": lambda: 1234,
        "reset_peak_memory_stats": lambda: None,
        "empty_cache": lambda: None,
        "synchronize": _synchronize,
        "set_sync_debug_mode": _set_sync_debug_mode,
        "Event": Event,
        "Stream": Stream,
        "stream": lambda stream: contextlib.nullcontext(),
        "current_stream": lambda device=None: Stream(),
        "CUDAGraph": CUDAGraph,
        "graph": _capturing,
        "_sleep": _sleep,
        "default_generators": (torch.Generator(),),
        "get_rng_state": lambda device=None: torch.get_rng_state(),
        "set_rng_state": lambda state, device=None: torch.set_rng_state(state),
    }
    for name, fake in fakes.items():
        setattr(torch.cuda, name, fake)
    ops._WITH_CUDA = True
    ops.HAS_FAST_PATH = False  # it reads the memory directly
    ops.build_info["cuda_architectures"] = ["sm_90"]
    _DeviceMode().__enter__()
