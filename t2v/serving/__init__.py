"""What the HTTP server needs besides the engine. No torch.

worker    one thread for all work, and cooperative stopping
report    the log lines and timings of a prediction
watchdog  ends a server whose worker process has died
schema    the OpenAPI document of a predictor, as `cog build` writes it
"""
