"""The errors a caller can meet. Their text reaches the caller, so it says what to change."""

# Parts of the messages that say that memory ran out: of torch; of oneDNN and the C++ library on the CPU; of CUDA,
# cuBLAS and cuDNN for their own allocations.
OUT_OF_MEMORY_MESSAGES = (
    "out of memory",
    "can't allocate memory",
    "bad_alloc",
    "not enough memory",
    "could not create a",
    "could not execute a",
    "ALLOC_FAILED",
)


class T2VError(Exception):
    """Base class of all errors raised on purpose."""


class InvalidRequest(T2VError):
    """The caller's fault: an input is outside the allowed range."""


class WeightsError(T2VError):
    """The installation's fault: the weights folder is missing, incomplete or of another kind."""


class OutOfMemory(T2VError):
    """The request does not fit into the device's memory."""


class VideoError(T2VError):
    """The frames could not be written as a playable file."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a library's error means that a device's memory ran out."""
    if isinstance(error, MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(message in str(error) for message in OUT_OF_MEMORY_MESSAGES)
