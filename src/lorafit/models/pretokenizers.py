"""Pre-tokenisers of byte-level BPE: which expressions a name in ``tokenizer.ggml.pre`` stands for, and back.

One table for both directions. From a name, the expressions that llama.cpp carries out under it. From a tokenizer of
transformers, the name: its steps are written out as expressions (``Digits`` and the expression within ``ByteLevel``,
too), and these must be the ones of a family as lorafit writes them, or as its models were published with. Anything
else is refused by what it says, because another expression means other tokens than the model learnt.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from tokenizers import pre_tokenizers

from lorafit.errors import ModelError


@dataclass(frozen=True)
class PreTokenizer:
    """Pre-tokenisers that cut words alike.

    Attributes:
        names: Their values of ``tokenizer.ggml.pre``.
        splits: Expressions applied one after the other, each within the pieces that the ones before left.
        add_bos: Whether a text starts with the bos token, when the file does not say.
        ignore_merges: Whether a word that is a token as it stands is taken whole.
        published: The expressions that models were published with, where llama.cpp departs from them.
    """

    names: str
    splits: tuple[str, ...]
    add_bos: bool = False
    ignore_merges: bool = False
    published: tuple[str, ...] = ()


_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_PUBLISHED_CONTRACTION = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_CONTRACTION = r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])"
_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_OTHER = rf" ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_SPACES}"
_OTHER_OR_SLASH = rf" ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_SPACES}"
_WORD = r"[^\r\n\p{L}\p{N}]?\p{L}+"
# A word in which capitals come before small letters; a letter outside ASCII counts as both.
_CAPITALS_FIRST, _CAPITALS_ONLY = (
    rf"[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}&&[^a-z]]{some}[\p{{L}}&&[^A-Z]]{more}" for some, more in (("*", "+"), ("+", "*"))
)
_PUBLISHED_FIRST, _PUBLISHED_ONLY = (
    rf"[^\r\n\p{{L}}\p{{N}}]?[\p{{Lu}}\p{{Lt}}\p{{Lm}}\p{{Lo}}\p{{M}}]{some}[\p{{Ll}}\p{{Lm}}\p{{Lo}}\p{{M}}]{more}"
    for some, more in (("*", "+"), ("+", "*"))
)

FAMILIES = (
    PreTokenizer("gpt-2 phi-2 mpt olmo jais trillion granite-docling exaone4 mellum gigachat a.x-4.0", (_GPT2,)),
    PreTokenizer("smollm starcoder refact command-r codeshell exaone minerva-7b", (r"\p{N}", _GPT2)),
    PreTokenizer("default", (r"[\p{P}$+<=>^~|]+", _GPT2, r"\p{N}+", r"[0-9][0-9][0-9]")),
    PreTokenizer(
        "llama-bpe llama3 llama-v3 falcon3 falcon-h1 pixtral midm-2.0 lfm2",
        (rf"{_CONTRACTION}|{_WORD}|\p{{N}}{{1,3}}|{_OTHER}",),
        add_bos=True,
        ignore_merges=True,
    ),
    PreTokenizer("dbrx smaug-bpe", (rf"{_CONTRACTION}|{_WORD}|\p{{N}}{{1,3}}|{_OTHER}",)),
    PreTokenizer(
        "qwen2 deepseek-r1-qwen stablelm2 hunyuan megrez",
        (rf"{_CONTRACTION}|{_WORD}|\p{{N}}|{_OTHER}",),
    ),
    PreTokenizer(
        "qwen35",
        (
            rf"{_CONTRACTION}|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|\p{{N}}"
            rf"| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*|{_SPACES}",
        ),
    ),
    PreTokenizer(
        "tekken",
        (rf"{_CAPITALS_FIRST}|{_CAPITALS_ONLY}|\p{{N}}|{_OTHER_OR_SLASH}",),
        add_bos=True,
        ignore_merges=True,
        published=(rf"{_PUBLISHED_FIRST}|{_PUBLISHED_ONLY}|\p{{N}}|{_OTHER_OR_SLASH}",),
    ),
    PreTokenizer(
        "gpt-4o llama4",
        (
            rf"{_CAPITALS_FIRST}{_CONTRACTION}?|{_CAPITALS_ONLY}{_CONTRACTION}?"
            rf"|\p{{N}}{{1,3}}|{_OTHER_OR_SLASH}",
        ),
        published=(
            rf"{_PUBLISHED_FIRST}{_CONTRACTION}?|{_PUBLISHED_ONLY}{_CONTRACTION}?"
            rf"|\p{{N}}{{1,3}}|{_OTHER_OR_SLASH}",
        ),
    ),
    PreTokenizer(
        "deepseek-coder",
        (r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", r"[一-龥ࠀ-一가-퟿&&\S]+", r"\p{N}"),
        published=(r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", r"[一-龥ࠀ-一가-퟿]+", r"\p{N}"),
    ),
)
FAMILY_BY_NAME = {name: family for family in FAMILIES for name in family.names.split()}


_ALPHABET = pre_tokenizers.ByteLevel.alphabet()


def missing_bytes(tokens: Iterable[str]) -> str | None:
    """An expression for the bytes that no token stands for; None if there are none."""
    missing = set(_ALPHABET).difference(tokens)
    return "|".join(map(re.escape, sorted(missing))) if missing else None


def families_of(step: Mapping[str, Any] | None, tokens: Iterable[str], where: str) -> list[PreTokenizer]:
    """The families that cut words as a tokenizer's ``pre_tokenizer`` does.

    Args:
        step: The pre-tokeniser, as it stands in tokenizer.json.
        tokens: The vocabulary.
        where: What messages start with.

    Raises:
        ModelError: There is no such family, or the tokenizer does not work on bytes.
    """
    splits: list[str] = []
    to_bytes = False
    for each in _flat(step):
        kind = each.get("type")
        if to_bytes:
            if kind != "Split" or each["pattern"] != {"Regex": missing_bytes(tokens)}:
                raise _unknown(each, where)
        elif kind == "Split" and _isolates(each):
            splits.append(each["pattern"]["Regex"].replace(_PUBLISHED_CONTRACTION, _CONTRACTION))
        elif kind == "Digits" and each["individual_digits"]:
            splits.append(r"\p{N}")
        elif kind == "ByteLevel" and not each["add_prefix_space"]:
            splits += [_GPT2] if each["use_regex"] else []
            to_bytes = True
        else:
            raise _unknown(each, where)
    found = [family for family in FAMILIES if tuple(splits) in (family.splits, family.published)]
    if not found or not to_bytes:
        raise _unknown(step, where)
    return found


def _flat(step: Mapping[str, Any] | None) -> list[Mapping[str, Any]]:
    if step is None:
        return []
    if step.get("type") == "Sequence":
        return [part for each in step["pretokenizers"] for part in _flat(each)]
    return [step]


def _isolates(split: Mapping[str, Any]) -> bool:
    """Whether what the expression finds becomes words, and what lies between, which in every family is nothing."""
    kept = (split["behavior"], split["invert"]) in (("Isolated", False), ("Removed", True))
    return kept and "Regex" in split["pattern"]


def _unknown(step: Mapping[str, Any] | None, where: str) -> ModelError:
    shown = str(step["pattern"].get("Regex") if step and "pattern" in step else step)
    return ModelError(
        f"{where}: llama.cpp's pre-tokenisers that lorafit knows ({', '.join(f.names.split()[0] for f in FAMILIES)}) "
        f"do not have {shown[:120]!r}; exporting it as another one would give other tokens"
    )
