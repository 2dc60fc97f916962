"""A function of tensors, recorded once for each set of shapes, then replayed without Python.

A step of the denoiser is about a thousand operations. On a GPU, launching them one by one keeps the host busier than
the GPU; a recording is a CUDA graph there. On a CPU, with a small network, Python and torch's dispatch take a fifth of
the time; a recording is a trace there (`t2v.sampling.trace`).
"""

import logging
from collections import Counter, OrderedDict, deque
from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor

from t2v.errors import is_out_of_memory
from t2v.sampling.trace import Trace

Function = Callable[..., tuple[Tensor, ...]]
Key = tuple[tuple[torch.Size, torch.dtype], ...]

# Number of runs before a CUDA graph is recorded, in which the libraries choose algorithms and allocate workspaces.
WARM_UPS = 2

log = logging.getLogger(__name__)


class CudaGraph:
    """A recording on a GPU, with the tensors that it reads and writes.

    Args:
        inputs: their shapes and dtypes are recorded; the values are copied.
        pool_of: another recording to share memory with. Both must never run at the same time.
    """

    def __init__(self, function: Function, inputs: tuple[Tensor, ...], pool_of: "CudaGraph | None" = None):
        self.device = inputs[0].device
        self.inputs = [x.clone() for x in inputs]
        with torch.cuda.device(self.device):
            # Recordings can share memory only if they run in one stream.
            self.stream: torch.cuda.Stream = pool_of.stream if pool_of else torch.cuda.Stream()
            caller = torch.cuda.current_stream()
            self.stream.wait_stream(caller)
            with torch.cuda.stream(self.stream):
                for _ in range(WARM_UPS):
                    function(*self.inputs)
            caller.wait_stream(self.stream)
            self.graph = torch.cuda.CUDAGraph()
            pool = pool_of.graph.pool() if pool_of else None
            try:
                with torch.cuda.graph(self.graph, pool, self.stream, capture_error_mode="thread_local"):
                    self.outputs = function(*self.inputs)
            except BaseException:
                torch.cuda.set_stream(caller)  # if the capture cannot be ended, torch stays in its stream
                raise

    def __call__(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        for own, given in zip(self.inputs, inputs, strict=True):
            own.copy_(given)
        with torch.cuda.device(self.device):
            self.graph.replay()
        return tuple(y.clone() for y in self.outputs)


class LaunchThrottle:
    """Limits how many steps the host enqueues ahead of a GPU.

    Progress is then true, and cancelling takes effect within `ahead` steps. On a CPU it does nothing.

    Args:
        ahead: maximum number of enqueued steps that the GPU has not finished. With two, the GPU never waits for the
            host.
    """

    def __init__(self, device: torch.device, ahead: int = 2):
        self.device = device
        self.ahead = ahead
        self.issued: deque[torch.cuda.Event] = deque()

    def step_issued(self) -> None:
        """Call it after each step is enqueued."""
        if self.device.type == "cuda":
            self.issued.append(torch.cuda.Event(blocking=True))  # the thread sleeps while it waits
            self.issued[-1].record(torch.cuda.current_stream(self.device))
            if len(self.issued) > self.ahead:
                self.issued.popleft().synchronize()


class RecordedFunction:
    """Calls `function` by replaying a recording of it for the same shapes.

    CUDA graphs share one memory pool: they never run at the same time, and their results are copied out. A function
    that cannot be recorded is called directly from then on, and the log says why.

    Args:
        function: takes tensors only, all on one device; what it does depends on their shapes, not on their values.
        max_recordings: number of recordings to keep; the least recently used one is dropped first.
        min_calls: number of calls with the same shapes from which a recording pays off.

    Attributes:
        upcoming_calls: number of calls with the same shapes that are still to come, including the next one.
    """

    def __init__(self, function: Function, max_recordings: int = 4, min_calls: int = 0):
        self.function = function
        self.max_recordings = max_recordings
        self.min_calls = min_calls
        self.upcoming_calls = 1
        self.num_calls: Counter[Key] = Counter()
        self.recordings: OrderedDict[Key, Trace | CudaGraph] = OrderedDict()
        self.can_record = True

    def __call__(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        key = tuple((x.shape, x.dtype) for x in inputs)
        if key not in self.recordings:
            pays = self.num_calls[key] + max(1, self.upcoming_calls) > self.min_calls
            self.num_calls[key] += 1
            self.upcoming_calls -= 1
            if not (self.can_record and pays and self._record(key, inputs)):
                return self.function(*inputs)
        self.recordings.move_to_end(key)
        return self.recordings[key](*inputs)

    def clear(self) -> None:
        """Drop all recordings and their memory."""
        self.recordings.clear()

    def invalidate(self) -> None:
        """Drop the recordings that may hold copies of the weights. Call it when the weights have changed.

        A trace may hold copies; a CUDA graph reads the weights in place.
        """
        for key in [key for key, recording in self.recordings.items() if isinstance(recording, Trace)]:
            del self.recordings[key], self.num_calls[key]

    def _record(self, key: Key, inputs: tuple[Tensor, ...]) -> bool:
        """Record the function; returns whether that succeeded. An error that memory ran out is raised."""
        while len(self.recordings) >= self.max_recordings:
            self.recordings.popitem(last=False)
        try:
            if inputs[0].is_cuda:
                sibling = cast(CudaGraph | None, next(iter(self.recordings.values()), None))
                self.recordings[key] = CudaGraph(self.function, inputs, sibling)
            else:
                self.recordings[key] = Trace(self.function, inputs)
            return True
        except RuntimeError as error:
            if is_out_of_memory(error):
                raise
            log.warning("Recording failed; the work runs without recordings, slower: %s", error)
            self.clear()
            self.can_record = False
            return False
