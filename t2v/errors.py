"""The errors a caller can meet. Their text reaches the caller, so it says what to change."""


class T2VError(Exception):
    """Base of all errors raised on purpose."""


class InvalidRequest(T2VError):
    """The caller's fault: an input is outside what is allowed."""


class WeightsError(T2VError):
    """The installation's fault: the weights folder is missing, incomplete or of another kind."""


class OutOfMemory(T2VError):
    """The request does not fit the device."""


class VideoError(T2VError):
    """The frames could not be written as a playable file."""
