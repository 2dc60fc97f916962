"""A function of tensors, recorded once for every set of shapes, then played back without Python.

A step of the denoiser is some thousand operations. On a GPU, launching them one by one keeps the host busier than the
GPU: there a recording is a CUDA graph. On a CPU, with a small network, Python and torch's dispatch take a fifth of the
time: there a recording is a TorchScript trace.
"""

import logging
import warnings
from collections import Counter, OrderedDict, deque
from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor

from t2v import memory

Function = Callable[..., tuple[Tensor, ...]]

# Runs before a CUDA graph is recorded: the libraries choose their algorithms and allocate their workspaces in them.
WARM_UPS = 2

log = logging.getLogger(__name__)


class Trace:
    """A recording on the CPU.

    Args:
        inputs: of the first call, whose result is what was computed while they were traced.
    """

    def __init__(self, function: Function, inputs: tuple[Tensor, ...]):
        self.first: tuple[Tensor, ...] = ()

        def computed(*inputs: Tensor) -> tuple[Tensor, ...]:
            self.first = function(*inputs)
            return self.first

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that shapes become constants, as is meant
            self.trace: Function = torch.jit.trace(computed, inputs, check_trace=False)

    def __call__(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        outputs, self.first = self.first, ()
        if outputs:
            return outputs
        with torch.jit.optimized_execution(False):  # to optimize takes seconds, and gains nothing here
            return self.trace(*inputs)


class Graph:
    """A recording on a GPU, the tensors it reads and those it writes.

    Args:
        inputs: for shapes and dtypes; they are copied.
        sibling: a recording to share memory with.
    """

    def __init__(self, function: Function, inputs: tuple[Tensor, ...], sibling: "Graph | None" = None):
        self.inputs = [x.clone() for x in inputs]
        # Memory is shared between what runs in one stream only.
        self.stream: torch.cuda.Stream = sibling.stream if sibling else torch.cuda.Stream()
        usual = torch.cuda.current_stream()
        self.stream.wait_stream(usual)
        with torch.cuda.stream(self.stream):
            for _ in range(WARM_UPS):
                function(*self.inputs)
        usual.wait_stream(self.stream)
        self.graph = torch.cuda.CUDAGraph()
        pool = sibling.graph.pool() if sibling else None
        try:
            with torch.cuda.graph(self.graph, pool, self.stream, capture_error_mode="thread_local"):
                self.outputs = function(*self.inputs)
        except BaseException:
            torch.cuda.set_stream(usual)  # where the capture cannot be ended, torch stays in its stream
            raise

    def __call__(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        for own, given in zip(self.inputs, inputs, strict=True):
            own.copy_(given)
        self.graph.replay()
        return tuple(y.clone() for y in self.outputs)


class Pace:
    """Holds the host back, which could issue all steps at once: what it tells of them would not have happened yet, and
    nobody could stop them.

    Args:
        ahead: steps issued that the GPU has not done; with two it never waits for the host.
    """

    def __init__(self, device: torch.device, ahead: int = 2):
        self.device = device
        self.ahead = ahead
        self.issued: deque[torch.cuda.Event] = deque()

    def keep(self) -> None:
        """To be called when a step was issued. On a CPU it has been done by then."""
        if self.device.type == "cuda":
            self.issued.append(torch.cuda.Event(blocking=True))  # the thread sleeps while it waits
            self.issued[-1].record(torch.cuda.current_stream(self.device))
            if len(self.issued) > self.ahead:
                self.issued.popleft().synchronize()


class Graphs:
    """Calls `function` by playing back a recording of it with these shapes.

    Graphs share one memory pool: they never run at the same time, and what they return is copied out. A function that
    cannot be recorded is called as it is from then on, and the log says why.

    Args:
        function: of tensors alone, all on one device; what it does depends on their shapes, not on their values.
        keep: recordings kept; the one unused for longest goes first.
        after: so few calls with the same shapes are not worth a recording.

    Attributes:
        expected: calls with the shapes of the next one that are known to come, that one included.
    """

    def __init__(self, function: Function, keep: int = 4, after: int = 0):
        self.function = function
        self.keep = keep
        self.after = after
        self.expected = 1
        self.calls: Counter[tuple] = Counter()
        self.recordings: OrderedDict[tuple, Trace | Graph] = OrderedDict()
        self.records = True

    def __call__(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        key = tuple((x.shape, x.dtype) for x in inputs)
        if key not in self.recordings:
            worth = self.calls[key] + max(1, self.expected) > self.after
            self.calls[key] += 1
            self.expected -= 1
            if not (self.records and worth):
                return self.function(*inputs)
            while len(self.recordings) >= self.keep:
                self.recordings.popitem(last=False)
            try:
                self.recordings[key] = self._record(inputs)
            except (RuntimeError, MemoryError) as error:
                others = bool(self.recordings)
                self.clear()
                if not memory.exhausted(error):
                    log.warning("Runs without recordings, slower: %s", error)
                    self.records = False
                elif not others:
                    raise
            if key not in self.recordings:  # here, where the error no longer holds on to tensors
                return self(*inputs)
        self.recordings.move_to_end(key)
        return self.recordings[key](*inputs)

    def clear(self) -> None:
        """Give up all recordings and their memory."""
        self.recordings.clear()

    def forget(self) -> None:
        """To be called when the function's weights have changed: a trace may hold copies of them. A CUDA graph reads
        them where they are."""
        for key in [key for key, recording in self.recordings.items() if isinstance(recording, Trace)]:
            del self.recordings[key], self.calls[key]

    def _record(self, inputs: tuple[Tensor, ...]) -> Trace | Graph:
        if not inputs[0].is_cuda:
            return Trace(self.function, inputs)
        return Graph(self.function, inputs, cast(Graph | None, next(iter(self.recordings.values()), None)))
