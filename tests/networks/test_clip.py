"""The text encoder is transformers' CLIPTextModel, number for number."""

import pytest
import torch
from transformers import CLIPTextConfig as Reference
from transformers import CLIPTextModel

from conftest import randomise
from published import TEXT
from t2v.errors import WeightsError
from t2v.networks.clip import CLIPText, CLIPTextConfig

SMALL = {
    "vocab_size": 100,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "layer_norm_eps": 1e-3,
}


@pytest.mark.parametrize("activation", ["gelu", "quick_gelu"])
@pytest.mark.parametrize("length", [77, 5, 1])
@torch.inference_mode()
def test_equals_the_reference(activation: str, length: int):
    config = SMALL | {"hidden_act": activation}
    reference = randomise(CLIPTextModel(Reference(**config)).double())
    ours = CLIPText(CLIPTextConfig.from_dict(config)).double().eval()
    ours.load_state_dict(reference.state_dict(), strict=True)
    ids = torch.randint(100, (2, length))
    expected = reference(input_ids=ids).last_hidden_state
    assert float((ours(ids) - expected).norm() / expected.norm()) < 1e-12  # measured 3e-16


def test_full_size_names_and_shapes():
    """The defaults are the 1.7B model's, which are those of its config."""
    with torch.device("meta"):
        ours, reference = CLIPText(), CLIPTextModel(Reference(**TEXT))
    assert ours.config == CLIPTextConfig.from_dict(TEXT)
    assert {k: v.shape for k, v in ours.state_dict().items()} == {k: v.shape for k, v in reference.state_dict().items()}


def test_another_activation_is_refused():
    with pytest.raises(WeightsError, match="text_encoder/config.json: hidden_act 'relu' is not supported"):
        CLIPTextConfig.from_dict(SMALL | {"hidden_act": "relu"})
