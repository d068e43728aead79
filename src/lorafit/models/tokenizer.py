"""A tokenizer from the metadata of a GGUF file, giving the tokens that llama.cpp gives.

A file names its algorithm in ``tokenizer.ggml.model``:

- ``gpt2``: byte-level BPE. Text is first cut into words by regular expressions, then pairs merge within a word, in the
  order of the file's list. The expressions are not in the file. ``tokenizer.ggml.pre`` only names them, so a wrong
  table here would go unnoticed: the text comes back whole, merely in other tokens than the model learnt. Therefore a
  name that is not in ``_FAMILIES`` is refused, and every one that is there is tested against llama.cpp. Where llama.cpp
  departs from the expression that a model was published with (tekken's and gpt-4o's capitals outside ASCII), its
  reading is followed, because it is what runs the result. Only letters so new that one of the two libraries does not
  know them yet can be cut otherwise.
- ``llama``: SentencePiece's BPE. There are no words and no list: any two neighbours whose concatenation is a token may
  merge, the best score first. Such pairs are listed here in the order of their scores, which gives ordinary BPE. A
  space is written as U+2581, one more is put before the text and behind every special token, and a character without a
  token becomes its UTF-8 bytes.

Special tokens (control, unknown, user-defined, by ``tokenizer.ggml.token_type``) are found before anything else. Of a
model that is called Phi-3, they swallow the white space behind them: the file cannot say so, and llama.cpp goes by the
name. (It means the white space of ASCII; here, other white space directly behind a special token goes, too.)
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from lorafit.containers.gguf import GGUFFile
from lorafit.errors import ModelError
from lorafit.models.pretokenizers import FAMILY_BY_NAME, missing_bytes

# Values of tokenizer.ggml.token_type.
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6

SPACE = "\N{LOWER ONE EIGHTH BLOCK}"

# Tokens that end a turn or a text in the model families of today. llama.cpp stops at them by name, whatever the file
# says of their type, and so they count as special here too.
ENDINGS = (
    "<|eot_id|>",
    "<|eom_id|>",
    "<|im_end|>",
    "<|end|>",
    "<end_of_turn>",
    "<end_of_utterance>",
    "<|endoftext|>",
    "<|end_of_text|>",
    "<EOT>",
    "_<EOT>",
    "[EOT]",
    "[EOS]",
    "</s>",
    "<eos>",
    "<｜end▁of▁sentence｜>",
)


def tokenizer_from_gguf(gguf: GGUFFile) -> PreTrainedTokenizerFast:
    """Build the tokenizer that a GGUF file describes.

    Args:
        gguf: The open file.

    Returns:
        A tokenizer with the file's special tokens and, when the file has one, its chat template. Called on a text, it
        adds the bos and eos tokens where llama.cpp does.

    Raises:
        ModelError: The file has no tokenizer, a broken one, or one whose algorithm or pre-tokeniser is not supported.
    """
    return tokenizer_from_metadata(gguf.metadata, str(gguf.path))


def tokenizer_from_metadata(metadata: Mapping[str, Any], where: str) -> PreTrainedTokenizerFast:
    """The same of a file that is not there yet.

    Args:
        metadata: What it says.
        where: What messages start with.

    Raises:
        ModelError: As :func:`tokenizer_from_gguf`.
    """
    return _Reader(metadata, where).tokenizer()


def all_merges(tokens: Iterable[str]) -> list[tuple[str, str]]:
    """Every way to put a token together from two others, or from characters that are none, in the order of tokens."""
    tokens = list(tokens)
    parts = set(tokens).union(*tokens)
    return [
        (left, right)
        for token in tokens
        for cut in range(1, len(token))
        if (left := token[:cut]) in parts and (right := token[cut:]) in parts
    ]


def end_of_turn_ids(tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """The tokens that end an assistant's turn: eos, and those in the vocabulary that are known to by their name.

    These are llama.cpp's end-of-generation tokens, but for the ones that it takes from fill-in-the-middle training.

    Args:
        tokenizer: Any tokenizer of transformers, from a GGUF file or not.
    """
    named = [*ENDINGS, *(tokenizer.special_tokens_map.get(name) for name in ("eot_token", "eom_token"))]
    found = {token: tokenizer.convert_tokens_to_ids(token) for token in named if token}
    # A token that is not there has the id of the unknown one, or none.
    ids = {i for token, i in found.items() if i is not None and tokenizer.convert_ids_to_tokens(i) == token}
    return frozenset(ids if tokenizer.eos_token_id is None else {*ids, tokenizer.eos_token_id})


class _Reader:
    """Reads the ``tokenizer.*`` metadata of one file."""

    def __init__(self, metadata: Mapping[str, Any], where: str) -> None:
        self.path = where
        self.metadata = metadata
        name = str(metadata.get("general.name", "")).lower()
        self.is_phi3 = "phi-3" in name or "phi3" in name
        self.tokens: list[str] = self.needed("tokens", list)
        self.types = self.token_types()

    def tokenizer(self) -> PreTrainedTokenizerFast:
        model = self.needed("model", str)
        if model == "gpt2":
            backend, add_bos = self.byte_level()
            bos, eos, unknown = None, None, None
        elif model == "llama":
            backend, add_bos = self.sentence_piece(), True
            bos, eos, unknown = 1, 2, 0
        else:
            raise ModelError(f"{self.path}: its tokenizer is of the kind {model!r}; lorafit reads gpt2 and llama")
        backend.add_special_tokens([self.added(i) for i in self.of_type(CONTROL, UNKNOWN)])
        backend.add_tokens([self.added(i) for i in self.of_type(USER_DEFINED)])
        named = {
            "bos_token": self.token("bos_token_id", bos),
            "eos_token": self.token("eos_token_id", eos),
            "unk_token": self.token("unknown_token_id", unknown),
            "pad_token": self.token("padding_token_id", None),
        }
        more = {name: self.token(f"{name}_id", None) for name in ("eot_token", "eom_token")}
        adds = {
            "add_bos_token": self.optional("add_bos_token", bool, add_bos),
            "add_eos_token": self.optional("add_eos_token", bool, False),
        }
        for add, name in (("add_bos_token", "bos_token"), ("add_eos_token", "eos_token")):
            if adds[add] and named[name] is None:
                raise ModelError(f"{self.path}: tokenizer.ggml.{add} is true, but the file names no {name}")
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=backend,
            extra_special_tokens={name: token for name, token in more.items() if token},
            clean_up_tokenization_spaces=False,
            **named,
            **adds,
        )
        tokenizer.chat_template = self.metadata.get("tokenizer.chat_template")
        return tokenizer

    def byte_level(self) -> tuple[Tokenizer, bool]:
        """GPT-2's kind; also whether its texts start with bos by default."""
        name = self.needed("pre", str)
        family = FAMILY_BY_NAME.get(name)
        if family is None:
            known = ", ".join(sorted(FAMILY_BY_NAME))
            raise ModelError(f"{self.path}: unknown pre-tokeniser {name!r}; supported are {known}")
        merges = [_pair(merge) for merge in self.needed("merges", list)]
        backend = Tokenizer(self.bpe(merges, ignore_merges=family.ignore_merges))
        splits = [pre_tokenizers.Split(Regex(split), "isolated") for split in family.splits]
        to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        steps = [*splits, to_bytes]
        # A byte without a token is dropped, but what stood on its two sides does not merge.
        if missing := missing_bytes(self.tokens):
            steps.append(pre_tokenizers.Split(Regex(missing), "removed"))
        backend.pre_tokenizer = pre_tokenizers.Sequence(steps)
        backend.decoder = decoders.ByteLevel()
        return backend, family.add_bos

    def sentence_piece(self) -> Tokenizer:
        scores = self.needed("scores", np.ndarray)
        if len(scores) != len(self.tokens):
            raise ModelError(f"{self.path}: {len(scores)} tokenizer scores for {len(self.tokens)} tokens")
        unknown = self.token("unknown_token_id", 0)
        backend = Tokenizer(
            self.bpe(self.merges_by_score(scores), unk_token=unknown, fuse_unk=True, byte_fallback=True)
        )
        to_blocks = normalizers.Replace(" ", SPACE)
        to_text = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
        if self.optional("add_space_prefix", bool, True):
            backend.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), to_blocks])
            to_text.append(decoders.Strip(" ", 1, 0))
        else:
            backend.normalizer = to_blocks
        backend.decoder = decoders.Sequence(to_text)
        return backend

    def merges_by_score(self, scores: np.ndarray) -> list[tuple[str, str]]:
        """Every way to put a token together from two others, best score first."""
        mergeable = sorted(self.of_type(NORMAL, UNUSED), key=lambda i: -scores[i])
        tokens = [self.tokens[i] for i in mergeable]
        known, merges = set(tokens), all_merges(tokens)
        for left, right in merges:
            if left not in known or right not in known:  # llama.cpp merges such characters, BPE cannot
                missing = left if left not in known else right
                raise ModelError(
                    f"{self.path}: the token {left + right!r} is made of {missing!r}, which is not in the vocabulary; "
                    "such a tokenizer is not supported"
                )
        return merges

    def bpe(self, merges: list[tuple[str, str]], **options: Any) -> BPE:
        vocabulary = {token: i for i, token in enumerate(self.tokens)}
        if len(vocabulary) != len(self.tokens):
            twice = next(token for i, token in enumerate(self.tokens) if vocabulary[token] != i)
            raise ModelError(f"{self.path}: the token {twice!r} stands twice in the vocabulary")
        try:
            return BPE(vocabulary, merges, **options)
        except Exception as error:  # tokenizers raises bare Exceptions
            raise ModelError(f"{self.path}: the vocabulary and the merges do not fit together: {error}") from None

    def token_types(self) -> list[int]:
        types = self.metadata.get("tokenizer.ggml.token_type")
        types = [NORMAL] * len(self.tokens) if types is None else types.tolist()
        if len(types) != len(self.tokens):
            raise ModelError(f"{self.path}: {len(types)} token types for {len(self.tokens)} tokens")
        endings = set(ENDINGS)
        return [CONTROL if token in endings else kind for token, kind in zip(self.tokens, types, strict=True)]

    def of_type(self, *wanted: int) -> list[int]:
        return [i for i, kind in enumerate(self.types) if kind in wanted]

    def added(self, i: int) -> AddedToken:
        token = self.tokens[i]
        swallows = self.is_phi3 and token not in ("<unk>", "<s>", "<|endoftext|>")
        return AddedToken(token, normalized=False, special=self.types[i] != USER_DEFINED, rstrip=swallows)

    def token(self, name: str, default: int | None) -> str | None:
        """The token that an entry such as ``bos_token_id`` points to."""
        i = self.optional(name, int, default)
        if i is not None and not 0 <= i < len(self.tokens):
            raise ModelError(f"{self.path}: tokenizer.ggml.{name} is {i}, but there are {len(self.tokens)} tokens")
        return None if i is None else self.tokens[i]

    def needed(self, name: str, kind: type) -> Any:
        value = self.optional(name, kind, None)
        if value is None:
            raise ModelError(f"{self.path}: no tokenizer.ggml.{name} in its metadata; fetch or convert the model again")
        return value

    def optional(self, name: str, kind: type, default: Any) -> Any:
        value = self.metadata.get(f"tokenizer.ggml.{name}")
        if value is not None and not isinstance(value, kind):
            raise ModelError(f"{self.path}: tokenizer.ggml.{name} is a {type(value).__name__}, not a {kind.__name__}")
        return default if value is None else value


def _pair(merge: str) -> tuple[str, str]:
    """The two sides of a merge, parted by its first space that does not begin it."""
    at = merge.find(" ", 1)
    return merge[:at], merge[at + 1 :]
