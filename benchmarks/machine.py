"""Measure time, memory and the matrix rate of this machine. Imports torch only inside functions, so --help is fast.

The *matrix rate* of a device and dtype is the GFLOP/s of the fastest of several large operations of the base model:
linear layers 3600×1024→4096 and 3600×4096→1024, and 1×1 and 3×3 convolutions of 512 channels at 120×120, with batch 1
on a CPU and 16 on a GPU. Linear layers are tried with plain weights and, on a CPU, with weights packed by oneDNN;
convolutions in both memory formats. Each operation runs once to warm up and twice for its time, and the one with the
highest rate is chosen. While a benchmark runs, the chosen operation is timed again before each repeat (median of three
calls). The share of a row is the median over its repeats of GFLOP/s divided by the rate measured before the repeat.
Other load on the machine slows both down, so the share is more reproducible than the time.
"""

import itertools
import math
import multiprocessing
import platform
import resource
import statistics
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from importlib.metadata import version
from typing import TYPE_CHECKING, Any, NamedTuple

from lib.threads import keep_freed_memory

if TYPE_CHECKING:
    import torch

LINEAR_ROWS, LINEAR_SIZES = 3600, ((1024, 4096), (4096, 1024))  # positions; channels in and out
CONV_CHANNELS, CONV_SIZE = 512, 120
GPU_BATCH = 16
RATE_SECONDS = 2  # how long a measured rate is used
WARM_UP_SECONDS, REPEAT_SECONDS = 1.0, 0.2
DTYPES = {"off": "float32", "bf16": "bfloat16", "fp16": "float16"}  # of matrix products, by --amp


class Kernel(NamedTuple):
    """A large operation. ``build()`` allocates its tensors and returns the function that computes it."""

    name: str
    gflop: float
    build: Callable[[], Callable[[], object]]


class Timing(NamedTuple):
    """Measured values of a row, one for each repeat."""

    seconds: list[float]
    rates: list[float]  # matrix rate in GFLOP/s before the repeat; empty if it is not measured


def machine(device: "torch.device") -> str:
    """Return a description of the hardware and the versions of Python and the libraries."""
    import torch

    if device.type == "cuda":
        hardware = torch.cuda.get_device_name(device)
    else:
        threads = torch.get_num_threads()
        capability = torch.backends.cpu.get_cpu_capability()
        hardware = f"{cpu_name()}, {capability}, {threads} thread{'s' if threads > 1 else ''}"
    return (
        f"{hardware}; Python {platform.python_version()}, torch {torch.__version__}, timm {version('timm')}, "
        f"transformers {version('transformers')}"
    )


def cpu_name() -> str:
    """Return the CPU's name, or the architecture if the system does not report a name."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            return next(line.split(":")[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def matrix_kernels(device: "torch.device", dtype: "torch.dtype") -> Iterator[Kernel]:
    """Yield the operations that define the matrix rate."""
    import torch
    import torch.nn.functional as F

    from lib.kernels import has_onednn

    batch, prefix = GPU_BATCH if device.type == "cuda" else 1, str(dtype).removeprefix("torch.")
    random = partial(torch.randn, device=device, dtype=dtype)

    def linear(in_channels: int, out_channels: int, packed: bool) -> Callable[[], object]:
        x, weight = random(batch * LINEAR_ROWS, in_channels), random(out_channels, in_channels)
        if packed:
            weight = torch.ops.mkldnn._reorder_linear_weight(weight, len(x))
            return lambda: torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")
        return lambda: F.linear(x, weight)

    def convolution(side: int, memory_format: torch.memory_format) -> Callable[[], object]:
        x = random(batch, CONV_CHANNELS, CONV_SIZE, CONV_SIZE).to(memory_format=memory_format)
        weight = random(CONV_CHANNELS, CONV_CHANNELS, side, side).to(memory_format=memory_format)
        return lambda: F.conv2d(x, weight, padding=side // 2)

    for sizes in LINEAR_SIZES:
        gflop = 2 * batch * LINEAR_ROWS * math.prod(sizes) / 1e9
        for packed in (False, True) if has_onednn(device, dtype) else (False,):
            name = f"{prefix} linear {sizes[0]}→{sizes[1]}{', packed' if packed else ''}"
            yield Kernel(name, gflop, partial(linear, *sizes, packed))
    for side, (name, memory_format) in itertools.product(
        (1, 3), {"contiguous": torch.contiguous_format, "channels last": torch.channels_last}.items()
    ):
        gflop = 2 * batch * (CONV_SIZE * CONV_CHANNELS * side) ** 2 / 1e9
        yield Kernel(f"{prefix} {side}×{side} convolution, {name}", gflop, partial(convolution, side, memory_format))


class MatrixRate:
    """The matrix rate of a device, measured repeatedly with one operation.

    Args:
        device: a CPU or GPU.
        amp: ``off``, ``bf16`` or ``fp16``.
        kernel: name of the operation (default: the fastest, which is found by trying all of them).

    Attributes:
        kernel: name of the operation.
    """

    def __init__(self, device: "torch.device", amp: str, kernel: str = "") -> None:
        import torch

        self.device, self.measured_at, self.latest, best = device, -math.inf, 0.0, 0.0
        for candidate in matrix_kernels(device, getattr(torch, DTYPES[amp])):
            if kernel in ("", candidate.name):
                run = candidate.build()
                rate = candidate.gflop / min(self._times(run, 3)[1:])
                if rate > best:
                    best, self.kernel, self.gflop, self.run = rate, candidate.name, candidate.gflop, run

    def __call__(self) -> float:
        """Return the current rate in GFLOP/s."""
        if time.perf_counter() - self.measured_at > RATE_SECONDS:
            self.latest = self.gflop / statistics.median(self._times(self.run, 3))
            self.measured_at = time.perf_counter()
        return self.latest

    def _times(self, run: Callable[[], object], calls: int) -> list[float]:
        import torch

        with torch.inference_mode():
            return [time_calls(run, self.device) for _ in range(calls)]


def time_calls(run: Callable[[], object], device: "torch.device", calls: int = 1) -> float:
    """Return the mean seconds of consecutive calls. A GPU is synchronized before and after them."""
    synchronize(device)
    started = time.perf_counter()
    for _ in range(calls):
        run()
    synchronize(device)
    return (time.perf_counter() - started) / calls


def time_repeats(
    run: Callable[[], object], device: "torch.device", *, repeats: int, rate: MatrixRate | None = None
) -> Timing:
    """Time a function after calls that warm up for a second, one at least.

    Args:
        run: the function.
        device: where it computes.
        repeats: number of times. A repeat is the mean of as many calls as take a fifth of a second.
        rate: measured before each repeat.
    """
    started = time.perf_counter()
    while True:
        seconds = time_calls(run, device)
        if time.perf_counter() - started > WARM_UP_SECONDS:
            break
    calls, timing = math.ceil(REPEAT_SECONDS / seconds), Timing([], [])
    for _ in range(repeats):
        if rate is not None:
            timing.rates.append(rate())
        timing.seconds.append(time_calls(run, device, calls))
    return timing


def synchronize(device: "torch.device") -> None:
    """Wait until a GPU has computed everything."""
    if device.type == "cuda":
        import torch

        torch.cuda.synchronize(device)


def peak_memory(device: "torch.device") -> int:
    """Return the highest use of memory so far in bytes: of the GPU's tensors, or of this process."""
    if device.type == "cuda":
        import torch

        return torch.cuda.max_memory_allocated(device)
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def run_in_process(function: Callable[..., Any], *args: Any) -> Any:
    """Return the result of a function that runs in a new process, so that it has its own peak memory.

    None if the process was killed, as by the system when memory is too small.
    """
    # run_command has set this process's allocator; a new process inherits only environment variables.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context, initializer=keep_freed_memory) as pool:
        try:
            return pool.submit(function, *args).result()
        except BrokenProcessPool:
            return None
