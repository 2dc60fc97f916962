"""A function of tensors as CUDA graphs: recorded once for every set of shapes, then played back without Python.

A step of the denoiser is some thousand kernels; launched one by one they keep the host busier than the GPU.
"""

import logging
from collections import OrderedDict
from collections.abc import Callable

import torch
from torch import Tensor

Function = Callable[..., tuple[Tensor, ...]]

# Runs before a recording: the libraries choose their algorithms and allocate their workspaces in them.
WARM_UPS = 2

log = logging.getLogger(__name__)


class Graphs:
    """Calls `function` by playing back a recording of it, which the first call with these shapes makes.

    The recordings share one memory pool: they never run at the same time, and what they return is copied out. A
    function that cannot be recorded is called as it is from then on, and the log says why.

    Args:
        function: of tensors alone, all on one device; its kernels depend on their shapes, not on their values.
        keep: recordings kept; the one unused for longest goes first.
    """

    def __init__(self, function: Function, keep: int = 4):
        self.function = function
        self.keep = keep
        self.recordings: OrderedDict[tuple, Recording] = OrderedDict()
        self.records = True

    def __call__(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        if not self.records:
            return self.function(*inputs)
        key = tuple((x.shape, x.dtype) for x in inputs)
        if key not in self.recordings:
            while len(self.recordings) >= self.keep:
                self.recordings.popitem(last=False)
            try:
                self.recordings[key] = Recording(self.function, inputs, next(iter(self.recordings.values()), None))
            except torch.OutOfMemoryError:
                self.recordings.clear()
                raise
            except RuntimeError as error:
                log.warning("Runs without CUDA graphs, slower: %s", error)
                self.records = False
                self.recordings.clear()
                return self.function(*inputs)
        self.recordings.move_to_end(key)
        return self.recordings[key](*inputs)


class Recording:
    """One graph, the tensors it reads and the tensors it writes.

    Where there is no CUDA nothing can be recorded: the function itself runs on the same tensors instead.

    Args:
        inputs: for shapes and dtypes; they are copied.
        sibling: a recording to share memory with.
    """

    def __init__(self, function: Function, inputs: tuple[Tensor, ...], sibling: "Recording | None" = None):
        self.inputs = [x.clone() for x in inputs]
        self.graph = torch.cuda.CUDAGraph() if self.inputs[0].is_cuda else None
        if self.graph is None:
            self.function = function
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
            self.outputs = self.function(*self.inputs)
        else:
            self.graph.replay()
        return tuple(y.clone() for y in self.outputs)
