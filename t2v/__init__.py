"""Text to video: a prompt becomes the frames of a short video.

The story, from the top:

request    what was asked for, in the caller's units, valid in itself
job        a request resolved against a model: everything that is decided before the work
engine     prepare(request) -> job, run(job) -> frames; generate is both
model      one loaded model: networks, schedule, LoRA, recordings
budget     how much memory a pass takes, which plan fits, one more attempt when memory runs out
device     which device and dtype, how a CPU and a GPU differ, free memory, health
cli        the command line: t2v generate | serve | weights
resources  paths of the demo model and other files of the package
errors     what can go wrong, in sentences for the caller

The trades, each in its wing:

networks/     tensors only: prompt encoder, denoiser, autoencoder
sampling/     mathematics only: schedules, solvers, guidance, windows, recordings
checkpoints/  files only: a model's folder, checked, loaded, written, converted, downloaded; LoRAs
media/        video files <-> uint8 frames, no torch: encode, decode
serving/      for the HTTP server, no torch: worker, report, watchdog, schema

tests/test_architecture.py checks who may import whom; docs/architecture.md is the map in detail.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from t2v.errors import InvalidRequest, OutOfMemory, T2VError, VideoError, WeightsError
from t2v.request import Request

if TYPE_CHECKING:
    from t2v.engine import Engine

__version__ = "0.2.0"
__all__ = ["Engine", "InvalidRequest", "OutOfMemory", "Request", "T2VError", "VideoError", "WeightsError"]


def __getattr__(name: str) -> Any:
    """Import `Engine` on first use, because importing torch takes a second."""
    if name == "Engine":
        return import_module("t2v.engine").Engine
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
