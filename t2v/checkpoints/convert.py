"""Converts other people's weights to a model folder in diffusers' layout, with safetensors only.

Reads ModelScope's original checkpoint (configuration.json, the denoiser, a VQGAN file, an open_clip file) and folders
in diffusers' layout whose weights are still pickles (`.bin`). Runs once.

For the original, a table says where each tensor goes. A prefix stands for all names under it. A name that no
prefix covers is an error unless `DROPPED` names it, and so is a parameter of the network that nothing fills. Values
change in two places only: layers that are convolutions of kernel size 1 there and linear here lose the trailing ones of
their shape, and the stacked query, key and value weights of the text encoder come apart.
"""

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from t2v.checkpoints import pickles
from t2v.checkpoints.folder import (
    CONFIGS,
    NETWORKS,
    NetworkFiles,
    check,
    find,
    read_json,
    summary,
    write_manifest,
    write_model,
    write_network,
)
from t2v.checkpoints.tensors import canonical_name, is_finite, read_tensors
from t2v.errors import WeightsError
from t2v.networks.autoencoder import AutoencoderConfig
from t2v.networks.build import parameter_shapes
from t2v.networks.clip import CLIPTextConfig
from t2v.networks.unet3d import TRANSFORMER_IN_HEADS, UNet3DConfig
from t2v.resources import DEMO

Table = dict[str, str | tuple[str, ...]]

# Values that the original keeps in its code and not in its files.
SCHEDULER = {
    "_class_name": "DDIMScheduler",
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "prediction_type": "epsilon",
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
    "thresholding": False,
}
TOKENIZER = DEMO / "tokenizer"  # CLIP's vocabulary, which all models share
NATIVE_SIZE = 256  # pixels
CLIP_HEAD = 64  # channels of one attention head of the text encoder

# Names in the original's residual blocks -> names in a diffusers block; {j} is the layer.
RESIDUAL = {
    "in_layers.0": "resnets.{j}.norm1",
    "in_layers.2": "resnets.{j}.conv1",
    "emb_layers.1": "resnets.{j}.time_emb_proj",
    "out_layers.0": "resnets.{j}.norm2",
    "out_layers.3": "resnets.{j}.conv2",
    "skip_connection": "resnets.{j}.conv_shortcut",
    "temopral_conv": "temp_convs.{j}",  # the original's spelling
}
# The same for the autoencoder's residual blocks,
BLOCK = {"norm1": "norm1", "conv1": "conv1", "norm2": "norm2", "conv2": "conv2", "nin_shortcut": "conv_shortcut"}
# for its only attention,
ATTENTION = {"norm": "group_norm", "q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}
# and for the layers of the text encoder.
LAYER: Table = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "attn.in_proj_weight": ("self_attn.q_proj.weight", "self_attn.k_proj.weight", "self_attn.v_proj.weight"),
    "attn.in_proj_bias": ("self_attn.q_proj.bias", "self_attn.k_proj.bias", "self_attn.v_proj.bias"),
    "attn.out_proj": "self_attn.out_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}
# Prefixes of tensors in the original's files that belong to no network here. The text encoder's last layer, which the
# model does not use, is added when its number is known.
DROPPED: dict[str, tuple[str, ...]] = {
    "unet": (),
    "vae": (),
    "text_encoder": ("visual", "text_projection", "logit_scale", "attn_mask"),
}


def convert(source: Path, out: Path, dtype: torch.dtype = torch.float16, log: Callable[[str], None] = print) -> None:
    """Write the model in `source` as the new folder `out`. Afterwards the folder is complete, or does not exist.

    Args:
        source: a folder of the original, or one in diffusers' layout.
        out: must not exist yet.
        dtype: of the written weights.
        log: called with one line for each network.

    Raises:
        WeightsError: the files are not a complete model of this family, hold unknown tensors, or `out` exists.
    """
    if not source.is_dir():
        raise WeightsError(f"There is no folder {source}.")
    if out.exists():
        raise WeightsError(f"{out} exists already; name a new folder, or remove it first.")
    reader = _original if (source / "configuration.json").is_file() else _diffusers
    out.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
    try:
        reader(source, scratch, dtype, log)
        write_manifest(scratch, f"t2v weights convert {source} NEW_FOLDER")
        check(scratch)
        scratch.chmod(0o755)
        os.replace(scratch, out)
    except OSError as error:
        raise WeightsError(f"{out} could not be written: {error.strerror or error}. Is the disk full?") from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _original(source: Path, out: Path, dtype: torch.dtype, log: Callable[[str], None]) -> None:
    configuration = read_json(source / "configuration.json")
    try:
        names, model = configuration["model"]["model_args"], configuration["model"]["model_cfg"]
        paths = {
            "unet": source / names["ckpt_unet"],
            "vae": source / names["ckpt_autoencoder"],
            "text_encoder": source / names["ckpt_clip"],
        }
        unet = _unet_config(model)
    except (KeyError, TypeError) as error:
        raise WeightsError(f"{source}/configuration.json has no {error}; is it ModelScope's?") from error
    missing = [path.name for path in paths.values() if not path.is_file()]
    if missing:
        raise WeightsError(f"{source} lacks: {', '.join(missing)}.")

    def networks() -> Iterator[NetworkFiles]:
        """One after the other: the file of each is open only while it is written."""
        state = _under(pickles.tensors(paths["vae"]), "first_stage_model.")
        if "encoder.conv_in.weight" not in state:
            raise WeightsError(f"{paths['vae']} holds no autoencoder: no first_stage_model.encoder.conv_in.weight.")
        vae = _vae_config(state)
        table = vae_table(len(vae.block_out_channels), vae.layers_per_block)
        yield _renamed("vae", vae.to_dict() | {"sample_size": NATIVE_SIZE}, state, table, paths["vae"], dtype, log)

        state = pickles.tensors(paths["unet"])
        table = unet_table(unet.down_block_types, unet.layers_per_block)
        size = NATIVE_SIZE // 2 ** (len(vae.block_out_channels) - 1)
        yield _renamed("unet", unet.to_dict() | {"sample_size": size}, state, table, paths["unet"], dtype, log)

        state = pickles.tensors(paths["text_encoder"])
        if "token_embedding.weight" not in state:
            raise WeightsError(f"{paths['text_encoder']} holds no text encoder: no token_embedding.weight.")
        blocks = (int(key.split(".")[2]) for key in state if key.startswith("transformer.resblocks."))
        layers = 1 + max(blocks, default=0)
        unused = (f"transformer.resblocks.{layers - 1}",)
        config, table, path = _text_config(state, layers), text_table(layers - 1), paths["text_encoder"]
        yield _renamed("text_encoder", config, state, table, path, dtype, log, unused)

    write_model(out, networks(), SCHEDULER, TOKENIZER, dtype=dtype, infix=_infix(dtype))


def _diffusers(source: Path, out: Path, dtype: torch.dtype, log: Callable[[str], None]) -> None:
    missing = [name for name in CONFIGS if not (source / name).is_file()]
    files = {network: find(source, network, pickles=True) for network in NETWORKS}
    missing += [f"the weights of {network}" for network, path in files.items() if path is None]
    if missing:
        raise WeightsError(f"{source} is neither ModelScope's folder nor diffusers': it lacks {', '.join(missing)}.")
    for network, path in files.items():
        assert path is not None
        state = pickles.tensors(path) if path.suffix == ".bin" else read_tensors(path)
        config = read_json(source / network / "config.json")
        kept = {key: value for key, value in state.items() if not key.endswith(".position_ids")}
        expected = {canonical_name(key): key for key in parameter_shapes(network, config)}
        table: Table = {key: expected.get(canonical_name(key), key) for key in kept}
        write_network(out, _renamed(network, config, kept, table, path, dtype, log), dtype, _infix(dtype))
    for name in CONFIGS:
        if not (out / name).exists():
            (out / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(source / name, out / name)
    for name in ("tokenizer/tokenizer_config.json", "tokenizer/special_tokens_map.json"):
        if (source / name).is_file():
            shutil.copyfile(source / name, out / name)


def unet_table(down_block_types: Sequence[str], blocks: int) -> Table:
    """Prefixes of the original denoiser -> diffusers'.

    Args:
        down_block_types: of diffusers' config, highest resolution first.
        blocks: residual blocks of a level on the way down; one more on the way up.
    """
    levels = len(down_block_types)
    attention = [kind.startswith("CrossAttn") for kind in down_block_types]
    table: Table = {
        "time_embed.0": "time_embedding.linear_1",
        "time_embed.2": "time_embedding.linear_2",
        "input_blocks.0.0": "conv_in",
        "input_blocks.0.1": "transformer_in",
        "out.0": "conv_norm_out",
        "out.2": "conv_out",
    }

    def slots(old: str, new: str, j: int, transformers: bool) -> None:
        for name, target in RESIDUAL.items():
            table[f"{old}.0.{name}"] = f"{new}.{target.format(j=j)}"
        if transformers:
            table[f"{old}.1"] = f"{new}.attentions.{j}"
            table[f"{old}.2"] = f"{new}.temp_attentions.{j}"

    n = 1
    for level in range(levels):
        for j in range(blocks):
            slots(f"input_blocks.{n}", f"down_blocks.{level}", j, attention[level])
            n += 1
        if level < levels - 1:
            table[f"input_blocks.{n}.op"] = f"down_blocks.{level}.downsamplers.0.conv"
            n += 1

    slots("middle_block", "mid_block", 0, True)
    for name, target in RESIDUAL.items():
        table[f"middle_block.3.{name}"] = f"mid_block.{target.format(j=1)}"

    n = 0
    for level in range(levels):
        transformers = attention[levels - 1 - level]
        for j in range(blocks + 1):
            slots(f"output_blocks.{n}", f"up_blocks.{level}", j, transformers)
            n += 1
        if level < levels - 1:
            slot = 3 if transformers else 1
            table[f"output_blocks.{n - 1}.{slot}.conv"] = f"up_blocks.{level}.upsamplers.0.conv"
    return table


def vae_table(levels: int, blocks: int) -> Table:
    """Prefixes of the original autoencoder -> diffusers'; `levels` resolutions, `blocks` as in `unet_table`."""
    table: Table = {"quant_conv": "quant_conv", "post_quant_conv": "post_quant_conv"}
    for half in ("encoder", "decoder"):
        table |= {f"{half}.{name}": f"{half}.{name}" for name in ("conv_in", "conv_out")}
        table[f"{half}.norm_out"] = f"{half}.conv_norm_out"
        for name, target in BLOCK.items():
            for j in range(2):
                table[f"{half}.mid.block_{j + 1}.{name}"] = f"{half}.mid_block.resnets.{j}.{target}"
        for name, target in ATTENTION.items():
            table[f"{half}.mid.attn_1.{name}"] = f"{half}.mid_block.attentions.0.{target}"
    for level in range(levels):
        mirrored = levels - 1 - level  # the original counts the way up from its end
        for name, target in BLOCK.items():
            for j in range(blocks):
                table[f"encoder.down.{level}.block.{j}.{name}"] = f"encoder.down_blocks.{level}.resnets.{j}.{target}"
            for j in range(blocks + 1):
                table[f"decoder.up.{level}.block.{j}.{name}"] = f"decoder.up_blocks.{mirrored}.resnets.{j}.{target}"
        table[f"encoder.down.{level}.downsample.conv"] = f"encoder.down_blocks.{level}.downsamplers.0.conv"
        table[f"decoder.up.{level}.upsample.conv"] = f"decoder.up_blocks.{mirrored}.upsamplers.0.conv"
    return table


def text_table(layers: int) -> Table:
    """Prefixes of an open_clip text encoder -> transformers', for the layers that are used."""
    table: Table = {
        "token_embedding": "embeddings.token_embedding",
        "positional_embedding": "embeddings.position_embedding.weight",
        "ln_final": "final_layer_norm",
    }
    for n in range(layers):
        for name, target in LAYER.items():
            new = f"encoder.layers.{n}."
            table[f"transformer.resblocks.{n}.{name}"] = (
                new + target if isinstance(target, str) else tuple(new + part for part in target)
            )
    return table


def renamed(key: str, table: Table) -> tuple[str, ...]:
    """New names of a tensor, by the longest prefix of its name in the table; () if there is none."""
    parts = key.split(".")
    for n in range(len(parts), 0, -1):
        found = table.get(".".join(parts[:n]))
        if found is not None:
            rest = "".join("." + part for part in parts[n:])
            return (found + rest,) if isinstance(found, str) else tuple(name + rest for name in found)
    return ()


def _unet_config(model: Mapping[str, Any]) -> UNet3DConfig:
    """The denoiser that configuration.json's model_cfg describes."""
    if str(model["temporal_attention"]) != "True" or model["unet_num_heads"] != TRANSFORMER_IN_HEADS:
        raise WeightsError(
            f"configuration.json: only temporal_attention True and unet_num_heads {TRANSFORMER_IN_HEADS} are supported."
        )
    multipliers, scales = model["unet_dim_mult"], model["unet_attn_scales"]
    attention = [1 / 2**level in scales for level in range(len(multipliers))]
    return UNet3DConfig(
        in_channels=model["unet_in_dim"],
        out_channels=model["unet_out_dim"],
        block_out_channels=tuple(model["unet_dim"] * m for m in multipliers),
        down_block_types=tuple("CrossAttnDownBlock3D" if a else "DownBlock3D" for a in attention),
        up_block_types=tuple("CrossAttnUpBlock3D" if a else "UpBlock3D" for a in reversed(attention)),
        layers_per_block=model["unet_res_blocks"],
        cross_attention_dim=model["unet_context_dim"],
        attention_head_dim=model["unet_head_dim"],
    )


def _vae_config(state: Mapping[str, Tensor]) -> AutoencoderConfig:
    """An autoencoder, from the shapes of its tensors."""
    levels = 1 + max(int(key.split(".")[2]) for key in state if key.startswith("encoder.down."))
    return AutoencoderConfig(
        in_channels=state["encoder.conv_in.weight"].shape[1],
        out_channels=state["decoder.conv_out.weight"].shape[0],
        latent_channels=state["post_quant_conv.weight"].shape[0],
        block_out_channels=tuple(state[f"encoder.down.{i}.block.0.conv1.weight"].shape[0] for i in range(levels)),
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        layers_per_block=1 + max(int(key.split(".")[4]) for key in state if key.startswith("encoder.down.0.block.")),
    )


def _text_config(state: Mapping[str, Tensor], layers: int) -> dict[str, Any]:
    """The config of an open_clip text encoder of `layers` layers, without the last."""
    vocabulary, width = state["token_embedding.weight"].shape
    config = CLIPTextConfig(
        vocab_size=vocabulary,
        max_position_embeddings=state["positional_embedding"].shape[0],
        hidden_size=width,
        intermediate_size=state["transformer.resblocks.0.mlp.c_fc.weight"].shape[0],
        num_hidden_layers=layers - 1,
        num_attention_heads=width // CLIP_HEAD,
    )
    projected = state["text_projection"].shape[1] if "text_projection" in state else width
    return config.to_dict() | {"projection_dim": projected}


def _renamed(
    network: str,
    config: dict[str, Any],
    state: Mapping[str, Tensor],
    table: Table,
    source: Path,
    dtype: torch.dtype,
    log: Callable[[str], None],
    unused: tuple[str, ...] = (),
) -> NetworkFiles:
    """A network whose tensors have other names in its source."""
    shapes = parameter_shapes(network, config)
    sources: dict[str, Callable[[], Tensor]] = {}
    wrong: list[str] = []
    for key in state:
        targets = renamed(key, table)
        if not targets:
            if not _covered(key, DROPPED[network] + unused):
                wrong.append(f"{key} is unknown")
            continue
        for i, target in enumerate(targets):
            if target in sources:
                wrong.append(f"{key} occurs twice, also under another name")
            sources[target] = lambda key=key, i=i, n=len(targets): state[key].chunk(n)[i]  # type: ignore[misc]
    wrong += [f"nothing fills {target}" for target in shapes if target not in sources]
    wrong += [f"{target} is no parameter" for target in sources if target not in shapes]
    for target in shapes.keys() & sources.keys():
        found = tuple(sources[target]().shape)
        if found != shapes[target] and _squeezed(found, len(shapes[target])) != shapes[target]:
            wrong.append(f"{target} has shape {found}, not {shapes[target]}")
    if wrong:
        raise WeightsError(f"{source} does not fit the {network}: {summary(wrong)}.")

    def tensor(target: str) -> Tensor:
        value = sources[target]().reshape(shapes[target]).to(dtype)
        if not is_finite(value):
            known = is_finite(sources[target]())
            why = f"overflows {str(dtype).removeprefix('torch.')}; convert to float32" if known else "is not finite"
            raise WeightsError(f"{source}: {target} {why}.")
        return value

    count = sum(torch.Size(shape).numel() for shape in shapes.values())
    log(f"{network}: {len(shapes)} tensors, {count:,} parameters, from {source.name}")
    return NetworkFiles(network, config, shapes, tensor)


def _covered(key: str, prefixes: tuple[str, ...]) -> bool:
    return any(key == prefix or key.startswith(prefix + ".") for prefix in prefixes)


def _squeezed(shape: tuple[int, ...], n: int) -> tuple[int, ...]:
    """The first n sizes, if the rest are ones."""
    return shape[:n] if all(size == 1 for size in shape[n:]) else shape


def _under(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors under a prefix, without it. The rest of such a file belongs to other models."""
    return {key.split(prefix, 1)[1]: value for key, value in state.items() if prefix in key}


def _infix(dtype: torch.dtype) -> str:
    return ".fp16" if dtype == torch.float16 else ""
