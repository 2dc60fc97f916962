"""Token ids are those of the original implementation, which tokenized with open_clip."""

import logging
import random
from pathlib import Path

import pytest
import torch
from transformers import CLIPTextModel, CLIPTokenizer

from t2v.engine import Engine
from t2v.errors import WeightsError
from t2v.networks.prompt_encoder import clean

# Read off open_clip's tokenizer.
GOLDEN = {
    "An astronaut riding a horse": [550, 18376, 6765, 320, 4558],
    "": [],
    "hi! there!! wow!!!": [1883, 256, 997, 748, 2781, 995],
    "a red circle": [320, 736, 7117],
}


@pytest.mark.parametrize("prompt", GOLDEN)
def test_golden_ids_padded_with_zero(tiny: Engine, prompt: str):
    words = GOLDEN[prompt]
    expected = [49406, *words, 49407] + [0] * (75 - len(words))
    assert tiny.text.tokenize([prompt]).tolist() == [expected]


def test_words_are_split_as_the_library_of_the_reference_does(tiny: Engine, tiny_folder: Path):
    reference = CLIPTokenizer.from_pretrained(tiny_folder / "tokenizer", pad_token="<|endoftext|>")
    draw = random.Random(0)
    words = "it's they'd x_y -- 12 3.5 ½ ² !!! ' '' “ é ß α 日 😀 <|endoftext|> astronaut a\u0301 \u200b"
    parts = [" ", *words.split(" ")]
    for _ in range(300):
        prompt = clean("".join(draw.choices(parts, k=8)))
        assert tiny.text.tokenizer.encode(prompt).ids == reference.encode(prompt, add_special_tokens=False)


def test_files_that_are_no_vocabulary(broken_copy: Path):
    (broken_copy / "tokenizer" / "vocab.json").write_text("{}")
    with pytest.raises(WeightsError, match="holds no vocabulary.*download it again"):
        Engine.load(broken_copy, device="cpu")


@pytest.mark.parametrize(
    "written, read",
    [
        ("  A   RED\n\tcircle ", "a red circle"),
        ("caf&eacute; &amp;amp; bar", "café & bar"),
        ("&lt;b&gt;", "<b>"),
        ("schÃ¶n", "schön"),
        ("ﬁsh “quoted”", 'fish "quoted"'),
        ("日本 😀", "日本 😀"),
    ],
)
def test_cleaning(written: str, read: str):
    assert clean(written) == read
    assert clean(read) == read


def test_long_prompts_are_cut_and_the_log_says_what(tiny: Engine, caplog: pytest.LogCaptureFixture):
    with caplog.at_level(logging.WARNING):
        ids = tiny.text.tokenize(["a " * 75 + "lost words"])[0].tolist()
    assert ids == [49406] + [320] * 75 + [49407]
    assert "has 77 tokens; only the first 75 are used" in caplog.text and "lost" not in caplog.text
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        tiny.text.tokenize(["a " * 75])
    assert not caplog.records


@torch.inference_mode()
def test_context_is_the_encoders_last_normalised_state(tiny: Engine, tiny_folder: Path):
    context = tiny.text.encode(["", "a red circle"])
    assert context.shape == (2, 77, 16) and context.dtype == torch.float32
    reference = CLIPTextModel.from_pretrained(tiny_folder / "text_encoder")
    expected = reference(input_ids=tiny.text.tokenize(["", "a red circle"]), output_hidden_states=True)
    assert torch.allclose(context, expected.last_hidden_state, atol=1e-5)
    assert not torch.allclose(context, expected.hidden_states[-1])  # before the final layer norm


@torch.inference_mode()
def test_every_position_sees_only_what_came_before(tiny: Engine):
    a, b = tiny.text.encode(["a red circle", "a red square"])
    assert torch.allclose(a[:3], b[:3], atol=1e-6) and not torch.allclose(a[3], b[3], atol=1e-3)
    assert not torch.allclose(a[76], b[76], atol=1e-4)  # padding is attended to, as in the original
