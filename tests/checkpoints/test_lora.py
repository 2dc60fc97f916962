"""Every format gives W + scale * up @ down on the layers it names, and comes out again to the bit."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import UNet3DConditionModel
from safetensors.torch import load_file, save_file
from torch import nn

from conftest import TINY_UNET, clean_latents, first_pass, reference_unet
from t2v.checkpoints import loading
from t2v.checkpoints import lora as module
from t2v.checkpoints.lora import COND_PROJ, MergedLora, parse, read
from t2v.engine import Engine
from t2v.errors import InvalidRequest, WeightsError
from t2v.job import FAST_STEPS, Sampling
from t2v.networks.unet3d import UNet3D, UNet3DConfig
from t2v.request import Request
from t2v.sampling.distilled import MCM, TURBO

RANK = 2


@pytest.fixture
def unet() -> UNet3D:
    return network()


def network() -> UNet3D:
    reference = reference_unet(**TINY_UNET)
    ours = UNet3D(UNet3DConfig.from_dict(dict(reference.config)))
    ours.load_state_dict(reference.state_dict())
    return ours.eval().requires_grad_(False)


def factors(shape: tuple[int, ...], seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """(up, down) as trainers save them: of a convolution with its kernel in `down`."""
    generator = torch.Generator().manual_seed(seed + sum(shape))
    ones = (1,) * (len(shape) - 2)
    up = torch.randn(shape[0], RANK, *ones, generator=generator)
    return up * 0.1, torch.randn(RANK, *shape[1:], generator=generator) * 0.1


def product(up: torch.Tensor, down: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    return (up.flatten(1) @ down.flatten(1)).view(shape)


def peft(folder: Path, layers: dict[str, tuple[int, ...]], **config) -> Path:
    folder.mkdir()
    state = {}
    for name, shape in layers.items():
        up, down = factors(shape)
        state[f"base_model.model.{name}.lora_A.weight"] = down
        state[f"base_model.model.{name}.lora_B.weight"] = up
    save_file(state, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({"r": RANK, "lora_alpha": RANK} | config))
    return folder


def listed(path: Path, layers: dict[str, tuple[int, ...]]) -> Path:
    torch.save([tensor for shape in layers.values() for tensor in factors(shape)], path)
    return path


def some_layers(unet: UNet3D) -> dict[str, tuple[int, ...]]:
    """One of every kind: linear, 3x3, temporal."""
    shapes = module._layers(unet)
    names = ["mid_block.attentions.0.transformer_blocks.0.attn1.to_q", "down_blocks.0.resnets.0.conv1"]
    return {name: shapes[name] for name in [*names, "mid_block.temp_convs.0.conv4.3"]}


def check_merge(unet: UNet3D, path: Path, layers: dict[str, tuple[int, ...]], factor: float = 1.0, scale: float = 1.0):
    before = {key: value.clone() for key, value in unet.state_dict().items()}
    merged = MergedLora(unet, read(path, unet), scale)
    assert merged.active
    after = unet.state_dict()
    for name, shape in layers.items():
        expected = before[f"{name}.weight"] + scale * factor * product(*factors(shape), shape)
        torch.testing.assert_close(after[f"{name}.weight"], expected, rtol=0, atol=1e-6)
    for key, value in before.items():
        assert torch.equal(value, after[key]) == (key.removesuffix(".weight") not in layers)
    merged.remove()
    assert not merged.active and unet.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[key]) for key, value in unet.state_dict().items())


def test_layers_are_diffusers_in_its_order():
    """575 at full size with the guidance embedding: the order of the files that have no names."""
    with torch.device("meta"):
        ours, reference = UNet3D(), UNet3DConditionModel(time_cond_proj_dim=256)
    expected = {
        name: tuple(layer.weight.shape)
        for name, layer in reference.named_modules()
        if isinstance(layer, nn.Linear | nn.Conv2d | nn.Conv3d)
    }
    layers = module._layers(ours)
    assert list(layers.items()) == list(expected.items()) and len(layers) == 575
    assert len(module._mcm_layers(layers)) == 482
    assert layers["conv_in"] == (320, 4, 3, 3) and layers[COND_PROJ] == (320, 256)


@pytest.mark.parametrize("scale", [1.0, 0.3])
@pytest.mark.parametrize("rslora", [False, True])
def test_peft_folder(unet: UNet3D, tmp_path: Path, scale: float, rslora: bool):
    layers = some_layers(unet)
    path = peft(tmp_path / "peft", layers, lora_alpha=6, use_rslora=rslora)
    check_merge(unet, path, layers, 6 / (RANK**0.5 if rslora else RANK), scale)
    assert read(path, unet).family is None


def test_peft_patterns(unet: UNet3D, tmp_path: Path):
    layers = some_layers(unet)
    path = peft(tmp_path / "peft", layers, alpha_pattern={"attn1.to_q": 8.0})
    deltas = read(path, unet).deltas
    assert [delta[2] for name, delta in deltas.items() if name.endswith("to_q")] == [4.0]
    assert {delta[2] for name, delta in deltas.items() if not name.endswith("to_q")} == {1.0}


def test_list_without_names(unet: UNet3D, tmp_path: Path):
    layers = {name: shape for name, shape in module._layers(unet).items() if name != COND_PROJ}
    path = listed(tmp_path / "unet.pt", layers)
    check_merge(unet, path, layers)
    assert read(path, unet).family is None


def test_stable_lora(unet: UNet3D, tmp_path: Path):
    """By diffusers' names and by the original's; convolutions with the kernel's sides in both factors."""
    shapes = module._layers(unet)
    linear, conv, temporal = some_layers(unet)
    originals = {conv: "input_blocks.1.0.in_layers.2", temporal: "middle_block.0.temopral_conv.conv4.3"}
    for names in ({}, originals):
        state, expected = {}, {}
        for name in (linear, conv, temporal):
            shape = shapes[name]
            k = shape[2] if len(shape) > 2 else 1
            up, down = torch.randn(shape[0] * k, RANK), torch.randn(RANK, shape[1] * k)
            state[f"{names.get(name, name)}.lora_B"], state[f"{names.get(name, name)}.lora_A"] = up, down
            full = up @ down
            expected[name] = full.view(shape) if len(shape) < 5 else full.view(*shape[:3], k, 1).mean(-2, keepdim=True)
        path = tmp_path / f"stable{len(names)}.safetensors"
        save_file(state, path, metadata={"stable_lora_text_to_video": "v1"})
        lora = read(path, unet)
        assert lora.deltas.keys() == expected.keys()
        for name, value in expected.items():
            torch.testing.assert_close(lora.delta(name).view(value.shape), value)


@torch.inference_mode()
def test_guidance_as_an_input_equals_diffusers(tmp_path: Path):
    """T2V-Turbo-MS: the list with one layer more, whose base is zero; w embedded as its authors do."""
    ours = network()
    layers = module._layers(ours)
    merged = MergedLora(ours, read(listed(tmp_path / "unet_lora.pt", layers), ours))
    assert merged.lora.family == TURBO.name
    reference = reference_unet(**TINY_UNET, time_cond_proj_dim=256)
    state = reference_unet(**TINY_UNET).state_dict() | {f"{COND_PROJ}.weight": torch.zeros(layers[COND_PROJ])}
    for name, shape in layers.items():
        state[f"{name}.weight"] = state[f"{name}.weight"] + product(*factors(shape), shape)
    reference.load_state_dict(state)
    x, context = torch.randn(1, 4, 3, 4, 4), torch.randn(1, 77, 16)
    for w in (2.0, 7.5):
        angles = w * 1000 * torch.exp(torch.arange(128) * -(np.log(10000.0) / 127))
        embedding = torch.cat([angles.sin(), angles.cos()])[None].float()
        expected = reference(x, 500, context, timestep_cond=embedding).sample
        moment = ours.project_timesteps(torch.tensor([500]), w)
        torch.testing.assert_close(
            ours.forward_projected(x, moment, ours.project_text(context)), expected, rtol=1e-3, atol=1e-4
        )
    assert (
        float(
            (ours.project_timesteps(torch.tensor([500]), 2.0) - ours.project_timesteps(torch.tensor([500]), 7.5))
            .abs()
            .max()
        )
        > 1e-3
    )


def test_what_does_not_fit_is_named(unet: UNet3D, tmp_path: Path):
    layers = some_layers(unet)
    wrong = layers | {"down_blocks.7.conv1": (4, 4), "conv_in": (16, 5, 3, 3)}
    with pytest.raises(WeightsError, match=r"down_blocks\.7\.conv1 is no layer.*conv_in has factors \(16, 2\)"):
        read(peft(tmp_path / "peft", wrong), unet)
    with pytest.raises(
        WeightsError, match=f"list of 6 items; for this model it must be {2 * (len(module._layers(unet)) - 1)} "
    ):
        read(listed(tmp_path / "short.pt", layers), unet)
    save_file({"conv_in.lora_A": torch.ones(2, 36), "lora_te_x.weight": torch.ones(1)}, tmp_path / "half.safetensors")
    with pytest.raises(WeightsError, match=r"one of its two factors only.*lora_te_x.weight is no part of a LoRA"):
        read(tmp_path / "half.safetensors", unet)
    up, down = factors((16, 4, 3, 3))
    save_file({"conv_in.lora_A": down * torch.nan, "conv_in.lora_B": up}, tmp_path / "nan.safetensors")
    with pytest.raises(WeightsError, match="conv_in holds values that are not finite"):
        read(tmp_path / "nan.safetensors", unet)
    with pytest.raises(WeightsError, match="There is no LoRA"):
        read(tmp_path / "absent", unet)
    with pytest.raises(WeightsError, match="use_dora"):
        read(peft(tmp_path / "dora", layers, use_dora=True), unet)


def test_a_hostile_list_is_refused(unet: UNet3D, tmp_path: Path):
    class Hostile:
        def __reduce__(self):
            return os.system, (f"touch '{tmp_path}/executed'",)

    torch.save([Hostile()], tmp_path / "lora.pt")
    with pytest.raises(WeightsError, match="wants code to run"):
        read(tmp_path / "lora.pt", unet)
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize(
    "text, path, scale", [("a/b.pt", "a/b.pt", 1), ("a:0.5", "a", 0.5), ("c:/d", "c:/d", 1), ("a:b:2", "a:b", 2)]
)
def test_parse(text: str, path: str, scale: float):
    assert parse(text) == (Path(path), scale)


def sampling(engine: Engine, request: Request) -> Sampling:
    return first_pass(engine, request).sampling


@pytest.fixture(scope="module")
def mcm_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    shapes = module._layers(network())
    layers = {name: shapes[name] for name in shapes if name in module._mcm_layers(shapes)}
    return peft(tmp_path_factory.mktemp("lora") / "mcm", layers)


def test_turbo_is_the_default_where_it_is_installed_and_quality_takes_it_out(
    tiny_folder: Path, tiny: Engine, mcm_folder: Path
):
    engine = Engine.load(tiny_folder, device="cpu", lora=str(mcm_folder))
    turbo = Request("a circle", num_frames=2, seed=1)
    resolved = sampling(engine, turbo)
    assert (resolved.distilled, resolved.num_steps, resolved.guidance_scale) == (MCM, 4, 1)
    first = clean_latents(engine, turbo)
    assert engine.model.lora is not None and engine.model.lora.active
    assert (
        engine.prepare(turbo).metadata["lora"] == "mcm:1" and engine.prepare(turbo).metadata["num_inference_steps"] == 4
    )
    quality = Request("a circle", num_frames=2, seed=1, preset="quality", num_inference_steps=3)
    assert torch.equal(clean_latents(engine, quality), clean_latents(tiny, quality))
    assert not engine.model.lora.active and "lora" not in engine.prepare(quality).metadata
    assert torch.equal(clean_latents(engine, turbo), first)
    engine.model.step.min_calls = 0  # and through recordings
    for request, expected in ((turbo, first), (quality, clean_latents(tiny, quality)), (turbo, first)):
        torch.testing.assert_close(clean_latents(engine, request), expected, rtol=1e-3, atol=1e-4)
    assert not torch.equal(first, clean_latents(tiny, Request("a circle", num_frames=2, seed=1, num_inference_steps=4)))


def test_distilleds_use_fresh_noise_from_the_seed(tiny_folder: Path, mcm_folder: Path):
    engine = Engine.load(tiny_folder, device="cpu", lora=f"{mcm_folder}:0.5")
    same = [clean_latents(engine, Request("x", num_frames=1, seed=3, num_inference_steps=n)) for n in (4, 4, 5)]
    assert torch.equal(same[0], same[1]) and not torch.equal(same[0], same[2])


def test_a_second_pass_is_made_in_distilleds_only_where_the_adaptation_is(
    tiny_folder: Path, tiny: Engine, mcm_folder: Path
):
    engine = Engine.load(tiny_folder, device="cpu", lora=str(mcm_folder))
    request = Request("a circle", num_frames=2, seed=1, upscale=2)
    told: list[str] = []
    (video,) = engine.generate(request, on_progress=lambda stage, done, total: told.append(f"{stage} {total}"))
    assert video.shape == (2, 64, 64, 3) and told.count("denoise 4") == 4 and told.count("denoise 3") == 3
    engine.upscaler = tiny.model
    told.clear()
    list(engine.generate(request, on_progress=lambda stage, done, total: told.append(f"{stage} {total}")))
    assert told.count("denoise 4") == 4 and told.count("denoise 12") == 12


@pytest.mark.parametrize("asked, steps", [(1, 1), (8, 8), (9, 4), (50, 4)])
def test_steps_of_turbo(tiny_folder: Path, mcm_folder: Path, asked: int, steps: int):
    engine = Engine.load(tiny_folder, device="cpu", lora=str(mcm_folder))
    assert sampling(engine, Request(num_inference_steps=asked)).num_steps == steps


def test_rules_of_the_presets(tiny: Engine, tiny_folder: Path, mcm_folder: Path, tmp_path: Path):
    assert sampling(tiny, Request()).num_steps == 50
    assert sampling(tiny, Request(preset="fast")).num_steps == FAST_STEPS
    assert sampling(tiny, Request(preset="fast", num_inference_steps=5)).num_steps == 5
    with pytest.raises(InvalidRequest, match="T2V_LORA"):
        clean_latents(tiny, Request(preset="turbo"))
    mcm = Engine.load(tiny_folder, device="cpu", lora=str(mcm_folder))
    with pytest.raises(InvalidRequest, match="takes no guidance_scale"):
        sampling(mcm, Request(guidance_scale=7))
    assert sampling(mcm, Request(guidance_scale=7, preset="quality")).guidance_scale == 7
    turbo = Engine.load(tiny_folder, "cpu", lora=str(listed(tmp_path / "unet_lora.pt", module._layers(network()))))
    assert sampling(turbo, Request()).embedded_guidance == 7.5
    with pytest.raises(InvalidRequest, match="2 to 14"):
        sampling(turbo, Request(guidance_scale=15))
    a, b = (clean_latents(turbo, Request("x", num_frames=1, seed=0, guidance_scale=w)) for w in (2, 14))
    assert not torch.equal(a, b)


def test_weights_that_were_kept_in_half_precision_are_adapted_in_full(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    folder = Path(shutil.copytree(tiny_folder, tmp_path / "half"))
    for path in folder.glob("*/*.safetensors"):
        save_file({key: value.half() for key, value in load_file(path).items()}, path)
    style = peft(tmp_path / "style", some_layers(network()))
    x, context = torch.randn(1, 4, 2, 4, 4), torch.randn(1, 77, TINY_UNET["cross_attention_dim"])
    made = []
    for kept in (range(0), range(1, 2**62)):
        monkeypatch.setattr(loading, "KEEP_HALF_SIZES", kept)
        engine = Engine.load(folder, "cpu", lora=str(style))
        assert engine.model.lora is not None
        made.append(engine.unet(x, 500, context))
        engine.model.lora.remove()
        made.append(engine.unet(x, 500, context))
    adapted, plain = made[:2]
    assert torch.equal(made[2], adapted) and torch.equal(made[3], plain) and not torch.equal(adapted, plain)


def test_a_plain_lora_stays_in(tiny_folder: Path, tiny: Engine, tmp_path: Path):
    layers = some_layers(network())
    engine = Engine.load(tiny_folder, "cpu", lora=str(peft(tmp_path / "style", layers)))
    request = Request("x", num_frames=1, num_inference_steps=2, seed=0)
    assert not torch.equal(clean_latents(engine, request), clean_latents(tiny, request))
    assert engine.prepare(request).metadata["lora"] == "style:1" and sampling(engine, request).preset == "quality"


def test_weights_are_restored_when_applying_a_lora_fails(unet: UNet3D, tmp_path: Path):
    """Memory may run out in the middle of it. The weights must not stay half changed."""
    layers = some_layers(unet)
    lora = read(peft(tmp_path / "style", layers), unet)
    before = {key: value.clone() for key, value in unet.state_dict().items()}
    last = list(lora.deltas)[-1]
    up, down, factor = lora.deltas[last]
    lora.deltas[last] = (up, down[:, :-1], factor)
    with pytest.raises(RuntimeError):
        MergedLora(unet, lora)
    assert all(torch.equal(value, before[key]) for key, value in unet.state_dict().items())


def test_the_lora_stays_as_it_is_while_requests_are_cancelled(tiny_folder: Path, mcm_folder: Path):
    engine = Engine.load(tiny_folder, device="cpu", lora=str(mcm_folder))
    quick = {"num_frames": 1, "num_inference_steps": 2, "seed": 0}
    requests = [Request(preset=preset, **quick) for preset in ("turbo", "quality")]
    expected = [clean_latents(engine, request) for request in requests]

    class Cancelled(BaseException):
        pass

    def cancel(*_: object) -> None:
        raise Cancelled

    for request in (*requests, *reversed(requests)):
        with pytest.raises(Cancelled):
            engine.generate(request, on_progress=cancel)
        assert all(torch.equal(clean_latents(engine, r), e) for r, e in zip(requests, expected))


@pytest.mark.parametrize("scale", ["nan", "inf", "-inf"])
def test_a_scale_that_is_not_finite_is_refused(scale: str):
    with pytest.raises(WeightsError, match="must be a finite number"):
        parse(f"lora.safetensors:{scale}")
