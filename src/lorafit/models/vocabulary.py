"""A tokenizer of transformers as metadata of a GGUF file: the inverse of ``lorafit.models.tokenizer``.

What a file cannot say is not guessed. Byte-level BPE must cut words by expressions that have a name in llama.cpp
(``pretokenizers``). Of SentencePiece's BPE, tokenizer.json has an ordered list of merges and the file a score for each
token: a token's score is minus its place in the order in which the list makes tokens, and tokens whose merges are mixed
there have equal scores. The list must hold every way to put a token together, or there are no such scores.

Then the metadata are read again, and the tokens of some texts are compared. Where a plain text becomes other tokens,
the export is refused. Differences that are known to come of how llama.cpp works (it does not compose characters, adds
a space before text in its own way, takes marks for no letters, and has special tokens by name) are named.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from lorafit.errors import ModelError
from lorafit.models.pretokenizers import PreTokenizer, families_of
from lorafit.models.tokenizer import (
    BYTE,
    CONTROL,
    ENDINGS,
    NORMAL,
    SPACE,
    UNKNOWN,
    UNUSED,
    USER_DEFINED,
    all_merges,
    tokenizer_from_metadata,
)

_PLAIN = (
    "Hello, world! It's 12345 o'clock; I'll've 3.14159 THEY'RE.",
    "The miller's three sons\tand\ttabs,  two  spaces,    four \n\n\n lines\r\nof\r\n\r\ntext   \n",
    "x=1;y+=2\nif(a<b){return~a^b|c;}\n\t// ```code``` $PATH @user #tag a_b-c/d\\e 100% (x) [y] {z}",
    "héllo wörld, naïve café — „Zitat“, été; привет мир; שלום; العربية ١٢٣",
    "日本語のテキスト、中文，한국어。👍🏽 👩‍👩‍👧‍👦 ½ Ⅷ ²",
    "camelCaseWord snake_case CONSTANT_CASE HTTPServer2Go v1.2.3-rc4 2026-11-22T06:30:00Z",
)
_KNOWN_TO_DIFFER = (
    *("", " begins with a space", "e\u0301 a\u0308 not composed", "ÄÖÜ ÉCOLE Ünï: capitals", "नमस्ते ไทย: marks"),
)


@dataclass(frozen=True)
class Vocabulary:
    """A tokenizer as a file has it.

    Attributes:
        metadata: The ``tokenizer.*`` entries.
        swallows: Whether special tokens swallow white space behind them, which llama.cpp does where a model is called
            Phi-3.
        differences: Texts that become other tokens in llama.cpp than in transformers; plain texts never do.
    """

    metadata: dict[str, Any]
    swallows: bool
    differences: tuple[str, ...]


def vocabulary(tokenizer: PreTrainedTokenizerBase, size: int, where: str) -> Vocabulary:
    """The metadata for a tokenizer.

    Args:
        tokenizer: It.
        size: Rows of the embedding, which may have more than there are tokens.
        where: What messages start with.

    Raises:
        ModelError: GGUF or llama.cpp has no such tokenizer.
    """
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        kind = type(tokenizer).__name__
        raise ModelError(f"{where}: its tokenizer is a {kind}, without a tokenizer.json; lorafit exports BPE of those")
    writer = _Writer(tokenizer, size, where)
    metadata = writer.metadata()
    swallows = writer.swallows()
    named = {"general.name": "phi-3"} if swallows else {}
    again = tokenizer_from_metadata({**metadata, **named}, where)
    special = [f"a {token} \n b{token}c" for token in writer.special()]
    different = [
        text for text in (*_PLAIN, *_KNOWN_TO_DIFFER, *special) if again(text).input_ids != tokenizer(text).input_ids
    ]
    for text in _PLAIN:
        if text in different:
            raise ModelError(f"{where}: in llama.cpp its tokenizer would make other tokens of {text[:40]!r}")
    return Vocabulary(metadata, swallows, tuple(different))


class _Writer:
    """Writes the metadata of one tokenizer."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, size: int, where: str) -> None:
        self.tokenizer = tokenizer
        self.where = where
        self.parts: dict[str, Any] = json.loads(tokenizer.backend_tokenizer.to_str())
        self.model: dict[str, Any] = self.parts["model"]
        self.added: dict[str, Mapping[str, Any]] = {token["content"]: token for token in self.parts["added_tokens"]}
        self.ids: dict[str, int] = tokenizer.get_vocab()
        kind = self.model.get("type")
        if kind != "BPE" or any(
            self.model.get(option) for option in ("dropout", "continuing_subword_prefix", "end_of_word_suffix")
        ):
            raise ModelError(f"{where}: its tokenizer is of the kind {kind}, and lorafit exports plain BPE")
        outside = [token for token, i in self.ids.items() if i >= size]
        if outside:
            raise ModelError(f"{where}: the token {outside[0]!r} has no row in the embedding of {size} rows")
        self.tokens = [f"[PAD{i}]" for i in range(size)]
        self.types = np.full(size, UNUSED, np.int32)

    def metadata(self) -> dict[str, Any]:
        """All entries."""
        is_sentence_piece = bool(self.model.get("byte_fallback"))
        for token, i in self.ids.items():
            added = self.added.get(token)
            is_byte = is_sentence_piece and len(token) == 6 and token.startswith("<0x")
            kind = BYTE if is_byte else NORMAL
            if added is not None:
                kind = CONTROL if added["special"] else USER_DEFINED
            if is_sentence_piece and token == self.tokenizer.unk_token:
                kind = UNKNOWN
            # Before llama.cpp looks for tokens of the user's, spaces are still spaces.
            self.tokens[i] = token.replace(SPACE, " ") if kind == USER_DEFINED and is_sentence_piece else token
            self.types[i] = kind
        own = self.sentence_piece() if is_sentence_piece else self.byte_level()
        entries = {"model": own.pop("model"), **own, "tokens": self.tokens, "token_type": self.types}
        entries |= self.special_ids() | self.additions()
        return {f"tokenizer.ggml.{key}": value for key, value in entries.items()} | self.templates()

    def byte_level(self) -> dict[str, Any]:
        if not _is_nothing(self.parts["normalizer"]) and self.parts["normalizer"]["type"] != "NFC":
            raise self.unknown("normalizer")
        families = families_of(self.parts["pre_tokenizer"], self.model["vocab"], self.where)
        merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in self.model["merges"]]
        return {"model": "gpt2", "pre": self.family(families).names.split()[0], "merges": merges}

    def family(self, families: Sequence[PreTokenizer]) -> PreTokenizer:
        """The one that takes whole words as this tokenizer does; any, where merges lead to every token anyway."""
        wanted = bool(self.model.get("ignore_merges"))
        same = [family for family in families if family.ignore_merges == wanted]
        if same:
            return same[0]
        backend = type(self.tokenizer.backend_tokenizer).from_str(self.tokenizer.backend_tokenizer.to_str())
        backend.model.ignore_merges = False
        for token in self.model["vocab"]:
            if token not in self.added and len(backend.model.tokenize(token)) != 1:
                raise ModelError(
                    f"{self.where}: its tokenizer takes words like {token!r} "
                    f"{'whole' if wanted else 'by merges alone'} (ignore_merges), and llama.cpp's pre-tokeniser "
                    f"{families[0].names.split()[0]} does not"
                )
        return families[0]

    def sentence_piece(self) -> dict[str, Any]:
        return {"model": "llama", "pre": "default", "scores": self.scores(), "add_space_prefix": self.adds_space()}

    def adds_space(self) -> bool:
        """Whether a space is put before a text, told by the steps that turn spaces into U+2581."""
        to_blocks = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
        normalizer, step = self.parts["normalizer"], self.parts["pre_tokenizer"]
        prepend = {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": SPACE}, to_blocks]}
        after = {"type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious", "invert": False}
        if normalizer in (to_blocks, prepend):
            if step is not None and step != after:  # no space is left for it to split at
                raise self.unknown("pre_tokenizer")
            return bool(normalizer == prepend)
        if not _is_nothing(normalizer):
            raise self.unknown("normalizer")
        if not step or step["type"] != "Metaspace" or step["replacement"] != SPACE or step["split"]:
            raise self.unknown("pre_tokenizer")
        return bool(step["prepend_scheme"] != "never")

    def scores(self) -> np.ndarray:
        merges = [tuple(merge.split(" ")) if isinstance(merge, str) else tuple(merge) for merge in self.model["merges"]]
        made = [left + right for left, right in merges]
        normal = [token for token, kind in zip(self.tokens, self.types, strict=True) if kind == NORMAL]
        mergeable = set(normal)
        missing = set(all_merges(normal)).difference(merges)
        if missing:
            left, right = min(missing)
            raise ModelError(
                f"{self.where}: its tokenizer never merges {left!r} and {right!r}, of which llama.cpp would make a "
                "token; GGUF has no place for such a tokenizer"
            )
        last = {token: place for place, token in enumerate(made)}
        scores = np.zeros(len(self.tokens), np.float32)
        score, until = 0, -1
        for place, token in enumerate(made):
            if token not in mergeable:
                continue
            if place > until:  # no token that came before is made later
                score -= 1
            until = max(until, last[token])
            scores[self.ids[token]] = score
        return scores

    def special_ids(self) -> dict[str, Any]:
        names = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding", "eot": "eot", "eom": "eom"}
        found = {}
        for name, key in names.items():
            token = self.tokenizer.special_tokens_map.get(f"{name}_token")
            if token is not None:
                found[f"{key}_token_id"] = self.ids[str(token)]
        return found

    def additions(self) -> dict[str, Any]:
        """Whether a text gets a bos and an eos token, found out by trying."""
        tokens = self.tokenizer("a").input_ids
        inner = self.tokenizer("a", add_special_tokens=False).input_ids
        before, after = ([self.tokenizer.bos_token_id], [self.tokenizer.eos_token_id])
        for bos in (False, True):
            for eos in (False, True):
                if tokens == before * bos + inner + after * eos:
                    return {"add_bos_token": bos, "add_eos_token": eos}
        raise ModelError(f"{self.where}: its tokenizer puts more around a text than one bos and one eos token")

    def templates(self) -> dict[str, Any]:
        template = self.tokenizer.chat_template
        if not isinstance(template, dict):
            return {"tokenizer.chat_template": template} if template else {}
        others = {f"tokenizer.chat_template.{name}": text for name, text in template.items() if name != "default"}
        found: dict[str, Any] = {"tokenizer.chat_templates": [key.rpartition(".")[2] for key in others]}
        if "default" in template:
            found["tokenizer.chat_template"] = template["default"]
        return found | others

    def special(self) -> list[str]:
        """Some tokens that are found before anything else, and those that llama.cpp takes for such by their names."""
        named = [token for token in ENDINGS if token in self.ids and token not in self.added]
        return [token for token in self.added if not token.isspace()][:8] + named

    def swallows(self) -> bool:
        """Whether special tokens swallow white space as those of Phi-3 do, of which llama.cpp knows."""
        exempt = ("<unk>", "<s>", "<|endoftext|>")
        expected = {token for token in self.added if token not in exempt}
        return bool(expected) and expected == {token for token, added in self.added.items() if added["rstrip"]}

    def unknown(self, part: str) -> ModelError:
        return ModelError(
            f"{self.where}: llama.cpp has no tokenizer whose {part} is {str(self.parts[part])[:120]}, "
            "so lorafit does not export it as another one"
        )


def _is_nothing(step: Mapping[str, Any] | None) -> bool:
    return step is None or (step["type"] == "Sequence" and not step["normalizers"])
