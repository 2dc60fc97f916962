"""Prompts to context: CLIP's tokenizer and text encoder, with the token ids of the original implementation.

The original tokenizes with open_clip. Other tokenizers that read this family's files differ from it in two ways that
change the picture: they turn every `!` into the padding id, and they clean the text less. Here the text is cleaned and
padded as in open_clip; the library does the byte-pair encoding in between.
"""

import html
import logging
import unicodedata
from pathlib import Path

import ftfy
import torch
from tokenizers import AddedToken, Regex, Tokenizer
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel, Sequence, Split
from torch import Tensor

from t2v.errors import WeightsError
from t2v.networks.clip import CLIPText

MAX_TOKENS = 77
BOS, EOS, PAD = 49406, 49407, 0

# The units that CLIP encodes: English endings, words, single digits, and runs of anything else.
WORDS = r"'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+"

log = logging.getLogger(__name__)


class PromptEncoder:
    """Prompts to context: tokenizer and text encoder of the model.

    Args:
        tokenizer: see `load_tokenizer`.
        encoder: its output is the context. In this family the stored encoder lacks CLIP's last layer, so this is the
            output of the penultimate one.
    """

    def __init__(self, tokenizer: Tokenizer, encoder: CLIPText):
        self.tokenizer = tokenizer
        self.encoder = encoder.eval()

    @property
    def device(self) -> torch.device:
        return self.encoder.final_layer_norm.weight.device

    def encode(self, prompts: list[str]) -> Tensor:
        """(n, 77, D) context of n prompts, on the encoder's device in its dtype."""
        return self.encoder(self.tokenize(prompts).to(self.device))

    def tokenize(self, prompts: list[str]) -> Tensor:
        """(n, 77) int64 token ids: start, words, end, zeros.

        A prompt of more than 75 tokens is cut, with a warning in the log. Letters of other scripts than Latin, which
        the model has hardly seen, are logged too.
        """
        rows = torch.full((len(prompts), MAX_TOKENS), PAD, dtype=torch.int64)
        for row, prompt in zip(rows, prompts):
            words = self.tokenizer.encode(clean(prompt)).ids
            if len(words) > MAX_TOKENS - 2:
                log.warning("The prompt has %d tokens; only the first %d are used.", len(words), MAX_TOKENS - 2)
                words = words[: MAX_TOKENS - 2]
            if any(c.isalpha() and not unicodedata.name(c, "").startswith("LATIN") for c in prompt):
                log.warning("The prompt has letters that are not Latin; the model understands English only.")
            ids = [BOS, *words, EOS]
            row[: len(ids)] = torch.tensor(ids)
        return rows


def load_tokenizer(folder: str | Path) -> Tokenizer:
    """CLIP's byte-pair encoder from a folder with vocab.json and merges.txt.

    Raises:
        WeightsError: the files are not such a vocabulary.
    """
    files = str(Path(folder) / "vocab.json"), str(Path(folder) / "merges.txt")
    try:
        tokenizer = Tokenizer(BPE.from_file(*files, unk_token="<|endoftext|>", end_of_word_suffix="</w>"))
    except Exception as error:  # the library raises nothing narrower
        raise WeightsError(f"{folder} holds no vocabulary: {error}; download it again.") from error
    # A word of the prompt that is spelled like one of these is that token, as in the original.
    tokenizer.add_special_tokens(
        [AddedToken(word, normalized=False, special=True) for word in ("<|startoftext|>", "<|endoftext|>")]
    )
    words = Split(Regex(WORDS), behavior="removed", invert=True)
    tokenizer.pre_tokenizer = Sequence([words, ByteLevel(add_prefix_space=False, use_regex=False)])
    return tokenizer


def clean(prompt: str) -> str:
    """open_clip's cleaning: repair mis-decoded characters, resolve HTML entities, collapse white space, lower case."""
    text = html.unescape(html.unescape(ftfy.fix_text(prompt)))
    return " ".join(text.split()).lower()
