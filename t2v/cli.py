"""The command line: t2v generate | serve | weights download | convert | verify.

torch is imported inside the commands, so that help and refusals do not wait for it.
"""

import contextlib
import dataclasses
import inspect
import os
import re
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from t2v import __version__
from t2v.errors import T2VError
from t2v.request import INIT_VIDEO, INPUTS, InputSpec, Request
from t2v.resources import DEMO, MANIFESTS, PREDICTOR, ROOT

# glibc's malloc reads these when a process starts: one heap for all threads, which keeps 256 MB of freed memory for the
# next tensors instead of returning it to the kernel, which would clear every page again.
MALLOC = {
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_TRIM_THRESHOLD_": "268435456",
    "MALLOC_MMAP_THRESHOLD_": "33554432",
}
PATH_VARIABLES = ("T2V_WEIGHTS", "T2V_UPSCALER", "T2V_LORA")

app = typer.Typer(
    help="Text to video: a prompt becomes a short video.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
weights_app = typer.Typer(help="Download, convert or verify a model's weights.", no_args_is_help=True)
app.add_typer(weights_app, name="weights")


def main() -> None:
    """Run the command line; an error is one line and exit code 1. Restarts the process if `MALLOC` is not yet set."""
    if not MALLOC.keys() <= os.environ.keys():
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], MALLOC | os.environ)
    try:
        app(prog_name="t2v")
    except T2VError as error:
        sys.exit(f"t2v: {error}")


@app.command()
def version() -> None:
    """Print the version."""
    print(__version__)


def generate(
    init_video: Path | None,
    out: Path | None,
    weights: Path,
    upscaler: Path | None,
    lora: str | None,
    device: str,
    dtype: str,
    **inputs: Any,
) -> None:
    """Make a video and print its path."""
    request = Request(**inputs)  # an invalid request is refused before torch is loaded, which takes seconds
    slug = re.sub(r"[^a-z0-9]+", "-", request.prompt.lower()).strip("-")[:60] or "video"
    path = out or Path("outputs") / f"{slug}-{request.seed}.{request.output_format}"
    if path.suffix != f".{request.output_format}":
        raise typer.BadParameter(f"{path} does not end in .{request.output_format}.", param_hint="--out")

    from t2v.engine import Engine
    from t2v.media.decode import read_frames
    from t2v.media.encode import write_video

    engine = Engine.load(weights, device, dtype, lora=lora, upscaler=upscaler)
    print(f"Model: {engine.describe()}")
    path.parent.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()
    job = engine.prepare(request, has_init_video=init_video is not None)
    init_frames = None
    if init_video:
        init_frames = read_frames(init_video, job.passes[0].num_frames, job.passes[0].size, request.fps)
    with progress_display() as on_progress:
        frames = engine.run(job, init_frames, on_progress)
        info = write_video(path, frames, request.fps, {**job.metadata, "t2v": __version__}, request.quality)
    seconds = time.perf_counter() - started
    print(f"{info.frames} frames of {info.width}x{info.height} in {seconds:.1f} s, seed {request.seed}")
    print(path)


def _input_option(name: str, spec: InputSpec, default: Any) -> inspect.Parameter:
    """The option of an input, as a parameter that typer understands. `Request` checks the value."""
    kinds: dict[str, Any] = {"text": str, "integer": int, "number": float, "boolean": bool}
    kind = kinds[spec.kind]
    metavar = "|".join(spec.choices) or (None if spec.low is None else f"{spec.low}..{spec.high}")
    flag, help = f"--{name.replace('_', '-')}", f"{spec.description}."
    option = typer.Option(flag, help=help, metavar=metavar, rich_help_panel="Inputs")
    return _parameter(name, kind | None if spec.optional else kind, option, default)


def _parameter(name: str, kind: Any, info: Any, default: Any = inspect.Parameter.empty) -> inspect.Parameter:
    keyword = inspect.Parameter.KEYWORD_ONLY
    return inspect.Parameter(name, keyword, default=default, annotation=Annotated[kind, info])


def _generate_parameters() -> Iterator[inspect.Parameter]:
    """The parameters of `generate`: the inputs first, from the fields of `Request`."""
    option = typer.Option
    yield _parameter("prompt", str, typer.Argument(help=f"{INPUTS['prompt'].description}."))
    for field in dataclasses.fields(Request):
        if field.name != "prompt":
            yield _input_option(field.name, INPUTS[field.name], field.default)
    video = option(help=f"{INIT_VIDEO.description}.", exists=True, dir_okay=False, rich_help_panel="Inputs")
    yield _parameter("init_video", Path | None, video, None)
    yield _parameter("out", Path | None, option(help="File to write. Default: outputs/PROMPT-SEED.FORMAT"), None)
    folder = option(help="Model folder. Default: the demo model", envvar="T2V_WEIGHTS", show_default=False)
    yield _parameter("weights", Path, folder, DEMO)
    upscaler = option(help="Folder of another model for the second pass of --upscale 2.", envvar="T2V_UPSCALER")
    yield _parameter("upscaler", Path | None, upscaler, None)
    lora = option(help="LoRA or few-step model, PATH[:SCALE].", envvar="T2V_LORA")
    yield _parameter("lora", str | None, lora, None)
    yield _parameter("device", str, option(help="auto, cpu, cuda or cuda:N.", envvar="T2V_DEVICE"), "auto")
    yield _parameter("dtype", str, option(help="auto, float32, float16 or bfloat16.", envvar="T2V_DTYPE"), "auto")


_parameters = list(_generate_parameters())
generate.__signature__ = inspect.Signature(_parameters)  # type: ignore[attr-defined]
generate.__annotations__ = {parameter.name: parameter.annotation for parameter in _parameters}
app.command()(generate)


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def serve(
    context: typer.Context,
    stream: Annotated[bool, typer.Option("--stream", help="Send previews while a video is made.")] = False,
    port: Annotated[int, typer.Option(help="Port of the server.", envvar="PORT")] = 5000,
) -> None:
    """Start Cog's HTTP server on 127.0.0.1, without Docker. Other arguments, such as --upload-url, are passed to it."""
    from t2v.serving.schema import write_schema

    predictor = "StreamingPredictor" if stream else "Predictor"
    # Cog's server reads both files from the current folder; without the schema it would check no input.
    write_schema(PREDICTOR, predictor, ROOT / ".cog" / "openapi_schema.json")
    paths = {name: os.path.abspath(value) for name in PATH_VARIABLES if (value := os.environ.get(name))}
    environment = os.environ | paths | {"COG_PREDICT_TYPE_STUB": f"{PREDICTOR.name}:{predictor}", "PORT": str(port)}
    # Cog starts its worker as the `python` that PATH finds.
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    os.chdir(ROOT)
    command = [sys.executable, "-m", "cog.server.http", "--host", "127.0.0.1", *context.args]
    os.execve(sys.executable, command, environment)


@weights_app.command()
def download(
    folder: Annotated[Path | None, typer.Argument(help="Folder to fill. Default: weights/MODEL")] = None,
    model: Annotated[str, typer.Option(help="ms-1.7b, original, or a manifest file.")] = "ms-1.7b",
    source: Annotated[Path | None, typer.Option("--from", help="Folder to copy from, instead of the Hub.")] = None,
) -> None:
    """Download a model, or repair its folder: only missing and damaged files are fetched.

    An interrupted download continues where it stopped; its files wait in FOLDER.partial. HF_ENDPOINT names a
    server other than huggingface.co, HF_TOKEN an access token.
    """
    from t2v.checkpoints.download import download
    from t2v.checkpoints.folder import read_json

    shipped = MANIFESTS / f"{model}.json"
    manifest = shipped if shipped.is_file() else Path(model)
    folder = folder or Path("weights") / manifest.stem
    try:
        download(read_json(manifest), folder.resolve(), source)
    except OSError as error:
        raise T2VError(str(error)) from error
    if model == "original":
        print(f"Next: t2v weights convert {folder} weights/ms-1.7b")
    else:
        print(f"{folder} is complete. To use it: T2V_WEIGHTS={folder}. Research use only: the licence is CC-BY-NC 4.0.")


@weights_app.command()
def convert(
    source: Annotated[Path, typer.Argument(help="Folder with configuration.json, or with model_index.json.")],
    out: Annotated[Path, typer.Argument(help="Folder to write; must not exist yet.")],
    dtype: Annotated[Literal["float16", "float32"], typer.Option(help="dtype of the written weights.")] = "float16",
) -> None:
    """Convert weights to a folder that t2v and diffusers load.

    The source is ModelScope's original checkpoint, or a folder in diffusers' layout with pickled weights (.bin).
    """
    import torch

    from t2v.checkpoints.convert import convert

    started = time.perf_counter()
    convert(source, out, getattr(torch, dtype))
    print(f"Wrote {out} in {time.perf_counter() - started:.0f} s. To use it: T2V_WEIGHTS={out}")


@weights_app.command()
def verify(folder: Annotated[Path, typer.Argument(help="Model folder.")]) -> None:
    """Compare a model folder with its manifest, byte for byte."""
    from t2v.checkpoints.folder import MANIFEST, check

    check(folder, verify=True)
    if (folder / MANIFEST).is_file():
        print(f"{folder} is complete and undamaged.")
    else:
        print(f"{folder} is complete. It has no manifest to compare its bytes with.")


@contextlib.contextmanager
def progress_display() -> Iterator[Callable[[str, int, int], None]]:
    """A callback for the engine that shows bars with the time left; lines of text if stdout is no terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console()
    labels = {"denoise": "Denoising steps", "decode": "Decoded frames"}
    if not console.is_terminal:
        yield _print_tenths(labels)
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console) as progress:
        tasks = {stage: progress.add_task(label, total=None, visible=False) for stage, label in labels.items()}

        def on_progress(stage: str, done: int, total: int) -> None:
            if stage in tasks:
                task = tasks[stage]
                if done <= progress.tasks[task].completed:  # the second pass of upscale
                    progress.reset(task)
                progress.update(task, completed=done, total=total, visible=True)

        yield on_progress


def _print_tenths(labels: dict[str, str]) -> Callable[[str, int, int], None]:
    """Prints a line at each tenth of the denoising."""
    started = time.perf_counter()

    def on_progress(stage: str, done: int, total: int) -> None:
        nonlocal started
        if done == 1:
            started = time.perf_counter()
        elif stage == "denoise" and done * 10 // total > (done - 1) * 10 // total:
            left = (time.perf_counter() - started) / (done - 1) * (total - done)
            print(f"{labels[stage]}: {done}/{total}, {left:.0f} s left", flush=True)

    return on_progress
