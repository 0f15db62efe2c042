"""A GPU that is not there: for tests of programs that need one.

Tensors "on cuda" are the CPU's tensors whose memory is noted as the GPU's. They say so, and meet no tensor of the CPU in an
operator, as on a GPU; what they compute the CPU computes at once. Streams, events, graphs and the allocator's figures are there as
far as these programs use them. `install()` lasts as long as the process.
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
WAITING = {Tensor.item, Tensor.tolist, Tensor.cpu, Tensor.nonzero, Tensor.__bool__, Tensor.__float__, Tensor.__int__}
# Take tensors of both devices.
MEETING = {Tensor.copy_, Tensor.__getitem__, Tensor.__setitem__, Tensor.type_as, Tensor.data.__set__}
MEETING |= {torch._has_compatible_shallow_copy_type}


class Device:
    """The state of the one GPU."""

    memory: dict[int, StorageWeakRef] = {}  # noqa: RUF012 - of the process; a weak reference keeps the number from being used again
    busy_until = skipped = 0.0
    refuses_waits = False

    @classmethod
    def now(cls) -> float:
        """Return the time in seconds, of which whoever waits for the device skips some."""
        return time.monotonic() + cls.skipped

    @classmethod
    def holds(cls, x: object) -> bool:
        """Return whether a tensor's memory is the GPU's."""
        try:
            reference = cls.memory.get(x.untyped_storage()._cdata)
        except (NotImplementedError, RuntimeError):  # a tensor of torch's own kinds, without memory
            return False
        return reference is not None and not reference.expired()

    @classmethod
    def take(cls, x: Tensor) -> Tensor:
        """Note a tensor's memory as the GPU's."""
        with contextlib.suppress(NotImplementedError, RuntimeError):
            storage = x.untyped_storage()
            cls.memory[storage._cdata] = StorageWeakRef(storage)
        return x


def _is_cuda(device: object) -> bool:
    return device is not None and torch.device(device).type == "cuda"


class _Tensors(TorchFunctionMode):
    """Sees every call of torch's functions."""

    def __torch_function__(self, function, kinds, arguments=(), options=None):
        options = dict(options or {})
        if function in _GETTERS:
            return _GETTERS[function](*arguments) if Device.holds(arguments[0]) else function(*arguments)
        if function is Tensor.cuda:
            function, arguments = Tensor.to, (*arguments[:1], DEVICE)
        if function is Tensor.numpy and Device.holds(arguments[0]):
            raise TypeError("can't convert cuda:0 device type tensor to numpy")
        tensors = [x for x in tree_leaves((arguments, options)) if isinstance(x, Tensor)]
        there = [x for x in tensors if Device.holds(x)]
        if there and Device.refuses_waits and function in WAITING:
            raise RuntimeError("called a synchronizing CUDA operation")
        target = _target(function, arguments, options)
        if target is not None:
            return self._moved(function, arguments, options, _is_cuda(target), there)
        here = [x for x in tensors if x.dim() and x.numel() and not Device.holds(x)]
        if there and here and function not in MEETING:
            raise RuntimeError(
                f"Expected all tensors to be on the same device, but {function.__name__} got cuda:0 and cpu"
            )
        result = function(*arguments, **options)
        if (there and function is not Tensor.__getitem__) or (there and Device.holds(arguments[0])):
            tree_map(lambda x: Device.take(x) if isinstance(x, Tensor) else x, result)
        return result

    def _moved(self, function, arguments, options, to_cuda, there):
        """A call that names a device."""

        def on_cpu(x):
            return torch.device("cpu") if isinstance(x, torch.device) or (isinstance(x, str) and _named(x)) else x

        result = function(*map(on_cpu, arguments), **{name: on_cpu(x) for name, x in options.items()})
        if isinstance(result, Tensor) and to_cuda != Device.holds(result):
            if any(
                result.untyped_storage()._cdata == x.untyped_storage()._cdata
                for x in arguments
                if isinstance(x, Tensor)
            ):
                result = result.clone()
            if to_cuda:
                Device.take(result)
        return result


def _named(text: str) -> bool:
    return text in ("cpu", "meta") or text.startswith("cuda")


def _target(function, arguments, options):
    """The device that a call names; None for none."""
    if function is Tensor.cpu:
        return "cpu"
    if options.get("device") is not None and str(options["device"]) != "meta":
        return options["device"]
    if function is Tensor.to:
        for x in arguments[1:]:
            if isinstance(x, Tensor):
                return DEVICE if Device.holds(x) else "cpu"
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
    """A point in the device's time."""

    def __init__(self, enable_timing: bool = False) -> None:
        self.at = self.done = 0.0

    def record(self, stream: object = None) -> "Event":
        """Now, or when the device has done what is queued."""
        self.at, self.done = time.perf_counter(), Device.busy_until
        return self

    def query(self) -> bool:
        """Whether the device is there already."""
        return Device.now() >= self.done

    def elapsed_time(self, end: "Event") -> float:
        """Milliseconds."""
        return 1e3 * (end.at - self.at)


class Stream:
    """A stream: everything is done at once."""

    def wait_event(self, event: Event) -> None:
        """Nothing to wait for."""

    def wait_stream(self, stream: "Stream") -> None:
        """Nothing to wait for."""

    def record_event(self, event: Event | None = None) -> Event:
        """Of this point."""
        return Event().record()


class CUDAGraph:
    """Calls of operators, made again on the same memory."""

    def __init__(self) -> None:
        self.calls: list[tuple] = []

    @torch.no_grad()
    def replay(self) -> None:
        """All of them; what they return goes where it went."""
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


def _refuse_waits(mode: str) -> None:
    Device.refuses_waits = mode == "error"


def install() -> None:
    """Let torch and kcd_ext have a GPU, in this process and in those that are forked from it."""
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
        "set_sync_debug_mode": _refuse_waits,
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
    ops.HAS_FAST_PATH = False  # it looks at the memory itself
    ops.build_info["cuda_architectures"] = ["sm_90"]
    _Tensors().__enter__()
