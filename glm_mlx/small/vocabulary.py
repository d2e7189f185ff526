"""The small model's vocabulary: byte-level BPE, trained with the `tokenizers` library on the corpus.

Two things differ from plain training, so that a tiny model can do arithmetic and copy words it never saw:
- Digits never merge. Then a number is the row of its digits, every sum uses the same ten tokens, and the working of an
  addition takes its columns one token at a time.
- Merges do not cross from a space, quote or underscore into a word, so a word has the same tokens after a space, in
  JSON, in a name and at the start of a value. Only common words that name nothing ("the", "together") get a token of
  their own with the space, and these merges come last: any other word is a space and then its usual tokens. A word of
  the lists in `words` is copied from requests into calls, which is harder where the two differ.
"""

import json
import re
from collections import Counter
from itertools import islice
from typing import Any

import tokenizers
from tokenizers import models, pre_tokenizers, trainers

from glm_mlx.small.corpus import conversations, segments
from glm_mlx.small.words import CITIES, EVERY_WORD, FIRST_NAMES
from glm_mlx.tiny_vocab import CONTROL, TAGS, vocabulary_metadata
from glm_mlx.tokenizer import BYTE_CHARS

_CONVERSATIONS = 8_000  # about 4 MB of text
_SPACED_SHARE = 0.35  # of the merges at most, those that join a space and a common word
_COMMON = 20  # uses in these conversations, at least, for that
_NAMING = {*EVERY_WORD, *FIRST_NAMES, *CITIES}
_PIECE = re.compile(r"'[a-z]+|[^\W\d_]+| ?(?:[^\w\s]|_)+[\r\n]*|\s*[\r\n]+")
_SPACE = "Ġ"


def train_vocabulary(seed: int, size: int = 2048) -> dict[str, Any]:
    """The `tokenizer.*` metadata of a file, as plain Python values. The same seed and size give the same ids."""
    pieces: Counter[str] = Counter()
    spaced: Counter[str] = Counter()
    for conversation in islice(conversations(seed), _CONVERSATIONS):
        for text, special, _ in segments(conversation):
            if not special:
                pieces.update(_PIECE.findall(text))
                spaced.update(re.findall(r"(?<= )[^\W\d_]+", text))
    count = size - len(BYTE_CHARS) - len(CONTROL) - len(TAGS)
    return vocabulary_metadata(_with_spaces(_learn(pieces, count), spaced, count))


def _with_spaces(merges: list[tuple[str, str]], words: Counter[str], count: int) -> list[tuple[str, str]]:
    """`count` merges: the first of those given, then a space with each of the commonest words that these make."""
    able = {word for word, uses in words.items() if uses >= _COMMON} - _NAMING
    for kept in range(count - int(count * _SPACED_SHARE), count + 1):
        known = {left + right for left, right in merges[:kept]} | set(BYTE_CHARS)
        common = sorted(known & able, key=lambda word: (-words[word], word))
        if kept + len(common) >= count:
            break
    return merges[:kept] + [(_SPACE, word) for word in common[: count - kept]]


def _learn(pieces: Counter[str], count: int) -> list[tuple[str, str]]:
    """The library's merges for pieces of text that are already cut."""
    bpe = tokenizers.Tokenizer(models.BPE())
    # The pieces come in whole, separated by a tab, which none of them holds.
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split("\t", "removed"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=len(BYTE_CHARS) + count, initial_alphabet=list(BYTE_CHARS), show_progress=False
    )
    bpe.train_from_iterator(("\t".join([piece] * uses) for piece, uses in sorted(pieces.items())), trainer)
    merges = json.loads(bpe.to_str())["model"]["merges"]
    return [(left, right) for left, right in merges]
