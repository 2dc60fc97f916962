"""A function of tensors, recorded once for every set of shapes, then played back without Python.

A step of the denoiser is some thousand operations. On a GPU, launching them one by one keeps the host busier than the
GPU: there a recording is a CUDA graph. On a CPU, with a small network, Python and torch's dispatch take a fifth of the
time: there a recording is a TorchScript trace.
"""

import logging
import warnings
from collections import Counter, OrderedDict
from collections.abc import Callable

import torch
from torch import Tensor

Function = Callable[..., tuple[Tensor, ...]]

# Runs before a CUDA graph is recorded: the libraries choose their algorithms and allocate their workspaces in them.
WARM_UPS = 2

log = logging.getLogger(__name__)


class Graphs:
    """Calls `function` by playing back a recording of it with these shapes.

    The recordings share one memory pool: they never run at the same time, and what they return is copied out. A
    function that cannot be recorded is called as it is from then on, and the log says why.

    Args:
        function: of tensors alone, all on one device; what it does depends on their shapes, not on their values.
        keep: recordings kept; the one unused for longest goes first.
        after: calls with the same shapes before they are recorded.
    """

    def __init__(self, function: Function, keep: int = 4, after: int = 0):
        self.function = function
        self.keep = keep
        self.after = after
        self.calls: Counter[tuple] = Counter()
        self.recordings: OrderedDict[tuple, Recording] = OrderedDict()
        self.records = True

    def __call__(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        key = tuple((x.shape, x.dtype) for x in inputs)
        self.calls[key] += 1
        if not self.records or self.calls[key] <= self.after:
            return self.function(*inputs)
        if key not in self.recordings:
            while len(self.recordings) >= self.keep:
                self.recordings.popitem(last=False)
            try:
                self.recordings[key] = Recording(self.function, inputs, next(iter(self.recordings.values()), None))
            except torch.OutOfMemoryError:
                self.clear()
                raise
            except RuntimeError as error:
                log.warning("Runs without recordings, slower: %s", error)
                self.records = False
                self.recordings.clear()
                return self.function(*inputs)
        self.recordings.move_to_end(key)
        return self.recordings[key](*inputs)

    def clear(self) -> None:
        """Give up all recordings and their memory."""
        self.recordings.clear()

    def forget(self) -> None:
        """To be called when the function's weights have changed: a trace may hold copies of them. A CUDA graph reads
        them where they are."""
        for key in [key for key, recording in self.recordings.items() if recording.graph is None]:
            del self.recordings[key]


class Recording:
    """One recording, the tensors it reads and those it writes.

    Args:
        inputs: for shapes and dtypes; they are copied.
        sibling: a recording to share memory with.
    """

    def __init__(self, function: Function, inputs: tuple[Tensor, ...], sibling: "Recording | None" = None):
        self.inputs = [x.clone() for x in inputs]
        self.graph = torch.cuda.CUDAGraph() if self.inputs[0].is_cuda else None
        if self.graph is None:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # that shapes become constants, as is meant
                self.trace: Function = torch.jit.trace(function, tuple(self.inputs), check_trace=False)
            return
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARM_UPS):
                function(*self.inputs)
        torch.cuda.current_stream().wait_stream(stream)
        pool = sibling.graph.pool() if sibling is not None and sibling.graph is not None else None
        with torch.cuda.graph(self.graph, pool=pool, stream=stream):
            self.outputs = function(*self.inputs)

    def __call__(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        for own, given in zip(self.inputs, inputs, strict=True):
            own.copy_(given)
        if self.graph is None:
            self.outputs = self.trace(*self.inputs)
        else:
            self.graph.replay()
        return tuple(y.clone() for y in self.outputs)
