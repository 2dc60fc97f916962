"""Prompts -> context: CLIP's tokenizer and text encoder, with the token ids the original implementation makes.

The original tokenizes with open_clip. The tokenizers of CLIP's vocabulary that read this family's files as they stand
differ from it in two ways that change the picture: they turn every `!` into the padding id, and clean the text less. So
the text is cleaned and padded here, and the library does the byte-pair encoding in between.
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

# What CLIP encodes one by one: endings of English verbs and nouns, words, digits, and runs of anything else.
WORDS = r"'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+"

log = logging.getLogger(__name__)


class PromptEncoder:
    """Text encoder of the model.

    Args:
        tokenizer: see `load_tokenizer`.
        encoder: what it returns is the context. In this family the stored encoder already lacks CLIP's last layer, so
            this is the penultimate one's.
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

        A prompt of more than 75 tokens is cut there; a warning in the log says so. So does one for words in a script
        other than Latin, of which the model has seen hardly any.
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
    # A word in the way of these two is one of them, as in the original.
    tokenizer.add_special_tokens(
        [AddedToken(word, normalized=False, special=True) for word in ("<|startoftext|>", "<|endoftext|>")]
    )
    words = Split(Regex(WORDS), behavior="removed", invert=True)
    tokenizer.pre_tokenizer = Sequence([words, ByteLevel(add_prefix_space=False, use_regex=False)])
    return tokenizer


def clean(prompt: str) -> str:
    """Mend mis-decoded characters, resolve HTML entities, squeeze white space, lower case: open_clip's cleaning."""
    text = html.unescape(html.unescape(ftfy.fix_text(prompt)))
    return " ".join(text.split()).lower()
