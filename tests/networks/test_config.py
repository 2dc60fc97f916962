"""A config file's content becomes hyper-parameters, or the error says which key stands in the way."""

from dataclasses import dataclass

import pytest

import published
from t2v.errors import WeightsError
from t2v.networks.autoencoder import AutoencoderConfig
from t2v.networks.clip import CLIPTextConfig
from t2v.networks.config import Config
from t2v.networks.unet3d import UNet3DConfig


@dataclass(frozen=True)
class Strict(Config):
    FOLDER = "house"
    REQUIRED_VALUES = {"roof": "flat", "cellar": None}
    IGNORED_KEYS = frozenset({"street"})

    rooms: tuple[int, ...] = (1, 2)
    doors: int = 1


class Lenient(Strict):
    IGNORED_KEYS = None


def test_fields_are_read_and_what_is_left_out_keeps_its_default():
    read = {"rooms": [3, 4], "roof": "flat", "cellar": None, "street": "any", "_class_name": "House"}
    assert Strict.from_dict(read) == Strict(rooms=(3, 4), doors=1)
    assert Strict.from_dict({}) == Strict()


def test_a_variant_that_is_not_implemented():
    with pytest.raises(WeightsError, match=r"house/config.json: roof = 'steep' is not supported, only 'flat'"):
        Strict.from_dict({"roof": "steep"})
    with pytest.raises(WeightsError, match="cellar = 'deep' is not supported, only None"):
        Lenient.from_dict({"cellar": "deep"})


def test_a_stranger_is_an_error_only_where_others_are_named():
    with pytest.raises(WeightsError, match="house/config.json: unknown key 'garden'"):
        Strict.from_dict({"garden": True})
    assert Lenient.from_dict({"garden": True, "doors": 2}).doors == 2


@pytest.mark.parametrize(
    "config, published",
    [(UNet3DConfig, published.UNET), (AutoencoderConfig, published.VAE), (CLIPTextConfig, published.TEXT)],
)
def test_defaults_are_the_published_model_and_survive_the_file(config: type[Config], published: dict):
    assert config.from_dict(published) == config() == config.from_dict(config().to_dict())
    assert {key: config().to_dict().get(key) for key in published if key != "sample_size"} == {
        key: value for key, value in published.items() if key != "sample_size"
    }
