"""Recordings on a CPU: TorchScript traces.

A trace saves the Python and the dispatch of a small network, a fifth of the demo model's step. The 1.7B model gains
nothing from it. torch.jit.trace is deprecated since torch 2.13; its warning is left visible on purpose. When torch
removes it, delete this file and let `RecordedFunction` record on GPUs alone. torch.export does not replace it: it keeps
the dispatch that the trace saves.
"""

import warnings
from collections.abc import Callable

import torch
from torch import Tensor


class Trace:
    """A recording on the CPU.

    Args:
        inputs: of the first call. Tracing computes the result of that call too, and it is kept for it.
    """

    def __init__(self, function: Callable[..., tuple[Tensor, ...]], inputs: tuple[Tensor, ...]):
        self.first: tuple[Tensor, ...] = ()

        def keep_result(*inputs: Tensor) -> tuple[Tensor, ...]:
            self.first = function(*inputs)
            return self.first

        with warnings.catch_warnings():
            warnings.simplefilter("ignore", torch.jit.TracerWarning)  # shapes become constants, which is intended
            self.trace: Callable[..., tuple[Tensor, ...]] = torch.jit.trace(keep_result, inputs, check_trace=False)

    def __call__(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        outputs, self.first = self.first, ()
        if outputs:
            return outputs
        with torch.jit.optimized_execution(False):  # optimizing takes seconds and gains nothing here
            return self.trace(*inputs)
