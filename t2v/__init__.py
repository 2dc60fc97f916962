"""Text to video: a prompt becomes the frames of a short video.

request      what the caller asked for, in the caller's units, already valid
job          a request resolved against a model: every decision, before the work
engine       the story: prepare(request) -> job, run(job) -> frames
model        one loaded model
budget       how much memory a pass takes, which plan fits, one more attempt when memory runs out
device       which device and dtype, how CPU and GPU differ, free memory, health
errors       what can go wrong, in sentences for the caller
cli          the command line
resources    where the demo model and other files of the package are
media        files of video <-> frames
checkpoints  model folders on disk
serving      what the HTTP server needs besides the engine
text         prompt -> context; clip: the network for it
unet3d       noisy latents, timestep, context -> the network's prediction
timeline     long videos and loops as overlapping windows
sampler      schedules, solvers, guidance, the denoising loop; distilled: recipes of few-step models; noise: from a seed
denoiser     one step: the network, guidance, windows
vae          latents -> uint8 frames, in chunks, and back; autoencoder: the network for it
convolution  convolution algorithms of the denoiser and the autoencoder
recording    a function of tensors, recorded as a CUDA graph, or as a trace (trace)
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
