"""What is converted gives the original implementation's own numbers, and bad files give a sentence and no folder."""

import json
import os
import pickle
import shutil
import subprocess
import sys
import types
import warnings
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import TextToVideoSDPipeline
from safetensors.torch import load_file

import original
from conftest import ROOT, clean_latents, first_noise
from t2v.checkpoints import convert as module
from t2v.checkpoints.convert import convert
from t2v.cli import MALLOC
from t2v.engine import Engine
from t2v.errors import WeightsError
from t2v.networks.build import parameter_shapes
from t2v.request import Request
from t2v.sampling.schedule import Schedule
from t2v.sampling.solvers import solver_steps

pytestmark = pytest.mark.slow  # writes models of the original format

UNET, VAE, CLIP = "text2video_pytorch_model.pth", "VQGAN_autoencoder.pth", "open_clip_pytorch_model.bin"


@pytest.fixture(scope="session")
def converted(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, Path]:
    """The plain checkpoint and the one with small residual streams, converted to float32."""
    folder = tmp_path_factory.mktemp("converted")
    for small in (False, True):
        source = original.write(folder / f"original {small}", small)
        convert(source, folder / f"model {small}", torch.float32, log=lambda line: None)
        shutil.rmtree(source)
    return {small: folder / f"model {small}" for small in (False, True)}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """An original checkpoint to spoil."""
    return original.write(tmp_path / "original")


def error(source: Path, out: Path, **how) -> str:
    with pytest.raises(WeightsError) as caught:
        convert(source, out, log=lambda line: None, **how)
    assert not out.exists() and not list(out.parent.glob(".*")), "half a folder is left"
    return str(caught.value)


def respoil(path: Path, change) -> None:
    state = torch.load(path, weights_only=True)
    change(state)
    torch.save(state, path)


def close(ours, expected: np.ndarray, tolerance: float) -> None:
    ours, expected = np.asarray(ours, np.float64), expected.astype(np.float64)
    assert ours.shape == expected.shape
    assert np.linalg.norm(ours - expected) / np.linalg.norm(expected) < tolerance


@pytest.mark.parametrize("small", [False, True])
@torch.inference_mode()
def test_the_originals_own_numbers(converted: dict[bool, Path], small: bool, monkeypatch: pytest.MonkeyPatch):
    golden = {key: value for key, value in np.load(original.GOLDEN).items() if key.startswith("small_") == small}
    golden = {key.removeprefix("small_"): value for key, value in golden.items()}
    engine = Engine.load(converted[small], device="cpu")
    assert (engine.text.tokenize(original.PROMPTS)[:, :16].numpy() == golden["tokens"]).all()
    context = engine.text.encode(original.PROMPTS)
    close(context[:, ::11], golden["context"], 3e-6)
    noise = torch.randn(1, 4, 3, 8, 8, generator=torch.Generator().manual_seed(7))
    close(engine.unet(noise, 500, context[1:]), golden["prediction"], 3e-5)
    images = noise[0].transpose(0, 1) / engine.vae.scale
    close(engine.vae.autoencoder.decode(images)[:, :, ::3, ::3], golden["decoded"], 3e-5)
    assert (engine.model.info.guidance_scale, engine.model.info.native_size) == (9, (256, 256))
    monkeypatch.setattr("t2v.model.noise_stream", lambda *_: iter([noise]))
    request = Request(original.PROMPTS[1], num_frames=3, num_inference_steps=50, scheduler="ddim")
    close(clean_latents(engine, request), golden["latents"], 2e-4)


@torch.inference_mode()
def test_the_small_streams_would_show_a_wrong_epsilon(converted: dict[bool, Path]):
    """The check above can fail: with epsilons ten times too small the prediction is off by percents."""
    engine = Engine.load(converted[True], device="cpu")
    golden = np.load(original.GOLDEN)["small_prediction"]
    for norm in engine.unet.modules():
        if isinstance(norm, torch.nn.GroupNorm):
            norm.eps /= 10
    noise = torch.randn(1, 4, 3, 8, 8, generator=torch.Generator().manual_seed(7))
    ours = engine.unet(noise, 500, engine.text.encode(original.PROMPTS)[1:]).numpy()
    assert np.linalg.norm(ours - golden) / np.linalg.norm(golden) > 0.02


def test_diffusers_loads_it_and_agrees(converted: dict[bool, Path]):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pipeline = TextToVideoSDPipeline.from_pretrained(converted[False], torch_dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    engine = Engine.load(converted[False], device="cpu")
    request = Request("a boat", num_frames=2, num_inference_steps=4, width=32, height=32, seed=1, scheduler="ddim")
    expected = pipeline(
        "a boat", 32, 32, 2, 4, guidance_scale=9.0, latents=first_noise(engine, request), output_type="latent"
    ).frames
    close(clean_latents(engine, request), expected.numpy(), 1e-4)
    assert type(pipeline.scheduler).__name__ == "DDIMScheduler"
    assert all(key.startswith("text_model.") for key in load_file(converted[False] / "text_encoder/model.safetensors"))
    assert [s.t for s in solver_steps(Schedule.from_config(pipeline.scheduler.config), "ddim", 50)] == [
        *range(981, 0, -20)
    ]


@pytest.mark.parametrize("network", ["unet", "vae"])
def test_values_pass_untouched(converted: dict[bool, Path], network: str):
    """Renamed and reshaped: in float32 the same bytes, each tensor once."""
    made = original.tensors(original.names()[network], small=False)
    written = load_file(next((converted[False] / network).glob("*.safetensors")))
    assert sorted(v.numpy().tobytes() for v in written.values()) == sorted(v.numpy().tobytes() for v in made.values())


def test_the_tables_are_total_at_full_size():
    """Every parameter of the 1.7B networks is named once; the denoiser's 1,480 come from as many."""
    model = original.CONFIGURATION["model"]["model_cfg"] | {
        "unet_dim": 320,
        "unet_context_dim": 1024,
        "unet_dim_mult": [1, 2, 4, 4],
        "unet_head_dim": 64,
        "unet_res_blocks": 2,
        "unet_attn_scales": [1, 0.5, 0.25],
    }
    config = module._unet_config(model)
    targets = set(parameter_shapes("unet", config.to_dict()))
    table = module.unet_table(config.down_block_types, config.layers_per_block)
    assert len(set(table.values())) == len(table)
    assert all(any(t == new or t.startswith(f"{new}.") for new in table.values()) for t in targets)
    assert len(targets) == 1480


def test_twice_the_same_bytes(source: Path, tmp_path: Path):
    for name in ("a", "b"):
        convert(source, tmp_path / name, log=lambda line: None)
    files = sorted(p.relative_to(tmp_path / "a") for p in (tmp_path / "a").rglob("*") if p.is_file())
    assert len(files) == 14
    for file in files:
        if file.name != ".verified.json":  # times of change
            assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
    assert {t.dtype for t in load_file(next((tmp_path / "a" / "unet").glob("*.safetensors"))).values()} == {
        torch.float16
    }


def test_half_precision_text_only_and_old_files(tmp_path: Path):
    """What pruned redistributions look like: float16, no image half, the autoencoder alone, torch's format of before
    1.6; storages tagged as a GPU's."""
    source = original.write(tmp_path / "original", dtype=torch.float16)
    whole = torch.load(source / CLIP, weights_only=True)
    torch.save({k: v for k, v in whole.items() if not k.startswith(("visual", "logit"))}, source / CLIP)
    state = torch.load(source / VAE, weights_only=True)["state_dict"]
    vae = {k: v for k, v in state.items() if k.startswith("first_stage_model")}
    torch.save(vae, source / VAE, _use_new_zipfile_serialization=False)
    tag_as_cuda(source / UNET)
    convert(source, tmp_path / "out", torch.float32, log=lambda line: None)
    engine = Engine.load(tmp_path / "out", device="cpu")
    expected = original.tensors(original.names()["unet"], small=False)["input_blocks.0.0.weight"]
    torch.testing.assert_close(engine.unet.conv_in.weight, expected.half().float())


def tag_as_cuda(path: Path) -> None:
    """Rewrite a checkpoint as if its tensors had been saved from a GPU."""
    tagged = path.with_suffix(".cuda")
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(tagged, "w", zipfile.ZIP_STORED) as new:
        for info in old.infolist():
            data = old.read(info)
            if info.filename.endswith("data.pkl"):
                assert b"X\x03\x00\x00\x00cpu" in data
                data = data.replace(b"X\x03\x00\x00\x00cpu", b"X\x06\x00\x00\x00cuda:0")
            new.writestr(info, data)
    os.replace(tagged, path)


def test_pickled_diffusers_folders_are_converted(tiny_folder: Path, tmp_path: Path, tiny: Engine):
    """Relatives that come as `.bin` only, the autoencoder with old names."""
    folder = Path(shutil.copytree(tiny_folder, tmp_path / "bins"))
    for path in list(folder.glob("*/*.safetensors")):
        state = load_file(path)
        if "vae" in str(path):
            state = {key.replace(".to_q.", ".query."): value for key, value in state.items()}
        name = "pytorch_model.bin" if "text_encoder" in str(path) else "diffusion_pytorch_model.bin"
        torch.save(state, path.with_name(name))
        path.unlink()
    with pytest.raises(WeightsError, match=r"pickles.*t2v weights convert"):
        Engine.load(folder, device="cpu")
    convert(folder, tmp_path / "out", torch.float32, log=lambda line: None)
    engine = Engine.load(tmp_path / "out", device="cpu")
    request = Request("a circle", num_frames=2, num_inference_steps=2, seed=0)
    assert torch.equal(clean_latents(engine, request), clean_latents(tiny, request))
    assert engine.model.info.native_size == tiny.model.info.native_size


class Hostile:
    """Runs a command when a careless reader takes it from a pickle."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self):
        return os.system, (f"touch '{self.mark}'",)


@pytest.mark.parametrize("zipped", [True, False])
def test_pickles_are_never_executed(source: Path, tmp_path: Path, zipped: bool):
    mark = tmp_path / "executed"
    state = torch.load(source / VAE, weights_only=True) | {"callbacks": Hostile(mark)}
    torch.save(state, source / VAE, _use_new_zipfile_serialization=zipped)
    message = error(source, tmp_path / "out")
    assert VAE in message and "posix.system" in message and "weights_only" not in message
    assert not mark.exists()
    pickle.loads(pickle.dumps(Hostile(mark)))
    assert mark.exists(), "the trap itself works"


def test_classes_of_other_packages_are_inert(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """As in a file that a trainer wrote, whose package is not installed here."""
    with monkeypatch.context() as patch:
        trainer = types.ModuleType("trainer")
        exec("class ModelCheckpoint:\n    best = 'epoch 3'", trainer.__dict__)
        patch.setitem(sys.modules, "trainer", trainer)
        checkpoint = trainer.ModelCheckpoint()
        checkpoint.monitor = "loss"
        state = torch.load(source / VAE, weights_only=True) | {"callbacks": {type(checkpoint): checkpoint}}
        torch.save(state, source / VAE)
    convert(source, tmp_path / "out", log=lambda line: None)


def test_something_else_in_place_of_a_tensor(source: Path, tmp_path: Path):
    respoil(source / UNET, lambda state: state.update({"out.2.bias": "0.5"}))
    assert "nothing fills conv_out.bias" in error(source, tmp_path / "out")


@pytest.mark.parametrize(
    "file, change, sentence",
    [
        (UNET, lambda s: s.pop("out.0.bias"), "nothing fills conv_norm_out.bias"),
        (UNET, lambda s: s.update(stranger=torch.ones(1)), "stranger is unknown"),
        (UNET, lambda s: s.update({"out.2.bias": torch.ones(5)}), r"conv_out.bias has shape \(5,\), not \(4,\)"),
        (UNET, lambda s: s.update({"out.2.bias": torch.full((4,), 1e6)}), "overflows float16; convert to float32"),
        (UNET, lambda s: s.update({"out.2.bias": torch.full((4,), torch.nan)}), "conv_out.bias is not finite"),
        (VAE, lambda s: s["state_dict"].pop("first_stage_model.quant_conv.bias"), "nothing fills quant_conv.bias"),
        (VAE, lambda s: s.update(state_dict={"model.x": torch.ones(1)}), "holds no autoencoder"),
        (CLIP, lambda s: s.pop("ln_final.bias"), "final_layer_norm.bias"),
        (CLIP, lambda s: s.update({"extra": torch.ones(1)}), "extra is unknown"),
        (CLIP, lambda s: s.pop("token_embedding.weight"), "holds no text encoder"),
    ],
)
def test_what_does_not_fit_is_named(source: Path, tmp_path: Path, file: str, change, sentence: str):
    respoil(source / file, change)
    message = error(source, tmp_path / "out")
    assert file in message
    with pytest.raises(AssertionError, match=sentence):
        raise AssertionError(message)


def test_missing_cut_and_foreign_files(source: Path, tmp_path: Path):
    out = tmp_path / "out"
    assert "no folder" in error(tmp_path / "absent", out)
    data = (source / CLIP).read_bytes()
    (source / CLIP).write_bytes(data[: len(data) // 2])
    assert CLIP in error(source, out)
    (source / CLIP).write_text("<html>404</html>")
    assert CLIP in error(source, out)
    (source / CLIP).unlink()
    (source / VAE).unlink()
    assert f"lacks: {VAE}, {CLIP}" in error(source, out)
    configuration = json.loads((source / "configuration.json").read_text())
    del configuration["model"]["model_cfg"]["unet_dim"]
    (source / "configuration.json").write_text(json.dumps(configuration))
    assert "unet_dim" in error(source, out)
    (source / "configuration.json").unlink()
    assert "neither ModelScope's folder nor diffusers'" in error(source, out)


def test_an_existing_folder_is_left_alone(source: Path, tmp_path: Path):
    (tmp_path / "out").mkdir()
    with pytest.raises(WeightsError, match="exists already"):
        convert(source, tmp_path / "out")
    assert not list((tmp_path / "out").iterdir())


def test_a_full_disk(source: Path, tmp_path: Path):
    """With a limit on the size of a file, which the text encoder's vocabulary passes."""
    code = (
        "import resource, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN);"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (2**21, 2**21));"
        "from t2v.cli import main; main()"
    )
    command = [sys.executable, "-c", code, "weights", "convert", source, tmp_path / "out"]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | MALLOC, capture_output=True, text=True)
    assert done.returncode == 1 and "Is the disk full?" in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".*"))


def test_the_command(source: Path, tmp_path: Path):
    command = [sys.executable, "-m", "t2v", "weights", "convert", source, tmp_path / "out", "--dtype", "float32"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0 and "T2V_WEIGHTS" in done.stdout, done.stderr
    again = subprocess.run(command, capture_output=True, text=True)
    assert again.returncode == 1 and "exists already" in again.stderr and "Traceback" not in again.stderr
    assert Engine.load(tmp_path / "out", device="cpu", verify=True).model.info.native_size == (256, 256)
