"""Text to video: a prompt becomes the frames of a short video.

request      what the caller asked for, in the caller's units, already valid
engine       ties everything together: Engine.load(folder).generate(request) -> frames
errors       what can go wrong, in sentences for the caller
cli          the command line
resources    where the demo model and other files of the package are
media        files of video <-> frames
checkpoints  model folders on disk
serving      what the HTTP server needs besides the engine
text         prompt -> context; clip: the network for it
unet3d       noisy latents, timestep, context -> the network's prediction
timeline     long videos and loops as overlapping windows
sampler      schedules, update rules, guidance, the denoising loop
vae          latents -> uint8 frames, in chunks, and back; autoencoder: the network for it
convolution  convolution algorithms of the denoiser and the autoencoder
graph        a function of tensors as a recording: a CUDA graph, or a trace
memory       how much a device has left
networks     from a config to an empty network; config: what they have in common
lora         low-rank adaptations and few-step models, merged into the denoiser
convert      other people's weights -> a model's folder
pickles      their files, read without executing anything
weights      finds and loads a model's folder

tests/test_architecture.py says which module may import which.
"""

from typing import TYPE_CHECKING, Any

from t2v.errors import InvalidRequest, OutOfMemory, T2VError, VideoError, WeightsError
from t2v.request import Request

if TYPE_CHECKING:
    from t2v.engine import Engine

__version__ = "0.2.0"
__all__ = ["Engine", "InvalidRequest", "OutOfMemory", "Request", "T2VError", "VideoError", "WeightsError"]


def __getattr__(name: str) -> Any:
    """Load `Engine` on first use: it takes torch with it, which a command line's help should not wait for."""
    if name == "Engine":
        from t2v.engine import Engine

        return Engine
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
