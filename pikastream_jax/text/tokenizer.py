"""Words to numbers: a vocabulary of whole words with single letters for everything else."""

import collections
import re
from collections.abc import Iterable, Sequence

import numpy as np
from jaxtyping import Int

_WORD = re.compile(r"[a-z]+|[0-9]|[^\sa-z0-9]")
_LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789,.;:!?'-"
PAD, START, UNKNOWN = 0, 1, 2
_SPECIAL = ("<pad>", "<start>", "<unknown>")
COMMA = len(_SPECIAL) + _LETTERS.index(",")


class Tokenizer:
    """Splits lower-cased text into known words; an unknown word is spelled with letters."""

    def __init__(self, words: Sequence[str], length: int):
        """`words` are the learned whole words, `length` the tokens of a prompt."""
        self.words = tuple(words)
        self.length = length
        self._index = {piece: i for i, piece in enumerate((*_SPECIAL, *_LETTERS, *self.words))}

    @property
    def size(self) -> int:
        """Rows of the embedding that are used."""
        return len(self._index)

    @classmethod
    def learn(cls, texts: Iterable[str], size: int, length: int) -> "Tokenizer":
        """A vocabulary of at most `size` pieces from the most frequent words of `texts`."""
        counts = collections.Counter(word for text in texts for word in _WORD.findall(text.lower()) if len(word) > 1)
        room = size - len(_SPECIAL) - len(_LETTERS)
        if room < 1:
            raise ValueError(f"tokenizer: size {size} leaves no room for words; use more than {size - room}")
        return cls(sorted(sorted(counts, key=lambda w: (-counts[w], w))[:room]), length)

    def encode(self, text: str) -> tuple[Int[np.ndarray, "length"], int]:
        """Token numbers, padded, and how many count. Longer prompts are cut; the empty prompt is the start token alone."""
        tokens = [START]
        for word in _WORD.findall(text.lower()):
            known = self._index.get(word)
            tokens += [known] if known is not None else [self._index.get(letter, UNKNOWN) for letter in word]
        tokens = tokens[: self.length]
        return np.array(tokens + [PAD] * (self.length - len(tokens)), np.int32), len(tokens)

    def encode_batch(self, texts: Sequence[str]) -> tuple[Int[np.ndarray, "n length"], Int[np.ndarray, "n"]]:
        """`encode` of several texts."""
        encoded = [self.encode(text) for text in texts]
        return np.stack([tokens for tokens, _ in encoded]), np.array([count for _, count in encoded], np.int32)
