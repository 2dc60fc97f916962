"""Text-to-video: a prompt becomes the frames of a short video.

request    what the caller asked for, in the caller's units, already valid
text       prompt -> context; clip: the network for it
unet3d     noisy latents, timestep, context -> the network's prediction
timeline   long videos and loops as overlapping windows
sampler    schedules, update rules, guidance, the denoising loop
vae        latents -> uint8 frames, in chunks, and back; autoencoder: the network for it
source     a caller's picture or video -> frames
video      uint8 frames -> file, verified
convolution of maps in fewer products than it is written with; the denoiser and the autoencoder have it
fused      what stands between convolutions and products: on CUDA in triton_kernels, else in torch
graph      a function of tensors as a recording: a CUDA graph, or a trace
memory     how much a device has left; thread, watchdog: for the server's sake
networks   from a config to an empty network; config: what they have in common
lora       low-rank adaptations and few-step models, merged into the denoiser
convert    other people's weights -> a model's folder
pickles    their files, read without executing anything
weights    finds and loads a model's folder
engine     ties them together: Engine.load(folder).generate(request) -> frames
errors     what can go wrong, in sentences for the caller

`engine` imports the others; who else may import whom is in tests/test_architecture.py.
"""
