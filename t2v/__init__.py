"""Text-to-video: a prompt becomes the frames of a short video.

request    what the caller asked for, in the caller's units, already valid
text       prompt -> context; clip: the network for it
unet3d     noisy latents, timestep, context -> the network's prediction
job        a request resolved against a model: every decision, before the work
timeline   long videos and loops as overlapping windows
sampler    schedules, solvers, guidance, the denoising loop; distilled: recipes of few-step models; noise: from a seed
denoiser   one step: the network, guidance, windows
vae        latents -> uint8 frames, in chunks, and back; autoencoder: the network for it
source     a caller's picture or video -> frames
video      uint8 frames -> file, verified
convolution of maps in fewer products than it is written with; the denoiser and the autoencoder have it
recording  a function of tensors, recorded as a CUDA graph, or as a trace (trace)
device     which device and dtype, how CPU and GPU differ, free memory, health; thread, watchdog: for the server
budget     how much memory a pass takes, which plan fits, one more attempt when memory runs out
networks   from a config to an empty network; config: what they have in common
lora       low-rank adaptations and few-step models, merged into the denoiser
convert    other people's weights -> a model's folder
pickles    their files, read without executing anything
weights    finds and loads a model's folder
model      one loaded model
engine     the story: prepare(request) -> job, run(job) -> frames
errors     what can go wrong, in sentences for the caller

`engine` imports the others; who else may import whom is in tests/test_architecture.py.
"""
