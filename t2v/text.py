"""Prompts -> context: CLIP's tokenizer and text encoder, with the token ids the original implementation makes.

The original tokenizes with open_clip. transformers' tokenizer differs from it in two ways that change the picture: with
this family's files it turns every `!` into the padding id, and it cleans the text less. So the text is cleaned here and
padded here, and transformers only does the byte-pair encoding in between.

transformers takes seconds to import, so that it is imported where it is used.
"""

from __future__ import annotations

import html
import logging
import unicodedata
from typing import TYPE_CHECKING, Any, cast

import ftfy
import torch
from torch import Tensor

if TYPE_CHECKING:
    from transformers import CLIPTextModel, CLIPTokenizer

LENGTH = 77
START, END, PAD = 49406, 49407, 0

log = logging.getLogger(__name__)


class Text:
    """Text encoder of the model.

    Args:
        tokenizer: byte-pair encoder whose padding token is not `!` (see `load_tokenizer`).
        encoder: its last hidden state, final layer norm applied, is the context. In this family the stored encoder
            already lacks CLIP's last layer, so this is the penultimate one.
    """

    def __init__(self, tokenizer: CLIPTokenizer, encoder: CLIPTextModel):
        self.tokenizer = tokenizer
        self.encoder = encoder.eval()

    def encode(self, prompts: list[str]) -> Tensor:
        """(n, 77, D) context of n prompts, on the encoder's device in its dtype."""
        ids = self.tokenize(prompts).to(self.encoder.device)
        return self.encoder(input_ids=ids).last_hidden_state

    def tokenize(self, prompts: list[str]) -> Tensor:
        """(n, 77) int64 token ids: start, words, end, zeros.

        A prompt of more than 75 tokens is cut there; a warning in the log says so. So does one for words in a script
        other than Latin, of which the model has seen hardly any.
        """
        rows = torch.full((len(prompts), LENGTH), PAD, dtype=torch.int64)
        for row, prompt in zip(rows, prompts):
            words = cast(list[int], self.tokenizer.encode(clean(prompt), add_special_tokens=False))
            if len(words) > LENGTH - 2:
                log.warning("The prompt has %d tokens; only the first %d are used.", len(words), LENGTH - 2)
                words = words[: LENGTH - 2]
            if any(c.isalpha() and not unicodedata.name(c, "").startswith("LATIN") for c in prompt):
                log.warning("The prompt has letters that are not Latin; the model understands English only.")
            ids = [START, *words, END]
            row[: len(ids)] = torch.tensor(ids)
        return rows


def build(config: dict[str, Any]) -> CLIPTextModel:
    """The network of a transformers `text_encoder/config.json`."""
    from transformers import CLIPTextConfig, CLIPTextModel

    return CLIPTextModel(CLIPTextConfig.from_dict(config))


def load_tokenizer(folder: str) -> CLIPTokenizer:
    """CLIP's tokenizer from a folder with vocab.json and merges.txt.

    The padding token is set to the end token: the files of this family name `!`, and a padding token is always encoded
    as itself, so that every `!` of a prompt would vanish. Padding is done by `Text.tokenize`.
    """
    from transformers import CLIPTokenizer

    # Without a length of its own it does not warn about long prompts; `Text.tokenize` does, and says what was cut.
    return CLIPTokenizer.from_pretrained(folder, pad_token="<|endoftext|>", model_max_length=10**9)


def clean(prompt: str) -> str:
    """Mend mis-decoded characters, resolve HTML entities, squeeze white space, lower case: open_clip's cleaning."""
    text = html.unescape(html.unescape(ftfy.fix_text(prompt)))
    return " ".join(text.split()).lower()
