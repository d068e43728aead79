"""Tokenizers as metadata of a GGUF file: llama.cpp makes the tokens that transformers made, or they are refused.

Vocabularies come from files that gguf-py wrote; read, saved as Hugging Face saves them, loaded by transformers and
written again, they give llama.cpp the same tokens as the file that they came from.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from lorafit.containers.gguf import GGUFFile
from lorafit.containers.gguf_new import write_gguf
from lorafit.errors import ModelError
from lorafit.models.pretokenizers import FAMILIES
from lorafit.models.vocabulary import vocabulary
from tests.models import test_tokenizer as vocabularies
from tests.models.test_tokenizer import CHATS, NASTY, SPECIAL, build, random_texts, write_byte_level
from tests.oracles.llamacpp import LlamaCppOracle


def through_transformers(path: Path, folder: Path) -> PreTrainedTokenizerFast:
    build(path).save_pretrained(folder)
    return AutoTokenizer.from_pretrained(folder)


def changed(tokenizer: PreTrainedTokenizerFast, **parts: Any) -> PreTrainedTokenizerFast:
    """The same with other entries in tokenizer.json; those of ``model`` are added to what is there."""
    document = json.loads(tokenizer.backend_tokenizer.to_str())
    document["model"] |= parts.pop("model", {})
    backend = type(tokenizer.backend_tokenizer).from_str(json.dumps(document | parts))
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<|bos|>", eos_token="<|stop|>")


def write(path: Path, metadata: dict[str, Any], like: Path) -> Path:
    """A file with these tokenizer entries, and those of another one for the rest."""
    rest = {key: value for key, value in GGUFFile.open(like).metadata.items() if not key.startswith("tokenizer.")}
    write_gguf(path, rest | metadata, {})
    return path


BYTE_LEVEL = [family.names.split()[0] for family in FAMILIES]
SENTENCE_PIECE = {
    "sentencepiece": (vocabularies.write_sentence_piece, vocabularies.TestSentencePiece.TEXTS),
    "gemma": (vocabularies.write_gemma, vocabularies.TestGemma.TEXTS),
    "phi3": (vocabularies.write_phi3, (*vocabularies.TestPhi3.TEXTS, *NASTY)),
}


@pytest.mark.parametrize("kind", [*BYTE_LEVEL, *SENTENCE_PIECE])
def test_llama_cpp_makes_the_same_tokens_of_what_is_written_again(tmp_path: Path, kind: str) -> None:
    path, texts = tmp_path / "original.gguf", [*NASTY, *CHATS, *random_texts(100)]
    if kind in SENTENCE_PIECE:
        write_original, texts = SENTENCE_PIECE[kind]
        write_original(path)
    else:
        write_byte_level(path, kind, add_eos_token=True)
    tokenizer = through_transformers(path, tmp_path / "tokenizer")
    size = len(tokenizer) + 3  # an embedding with more rows than there are tokens
    found = vocabulary(tokenizer, size, "here")
    assert not found.differences
    assert found.swallows == (kind == "phi3")
    again = write(tmp_path / "again.gguf", found.metadata, path)
    one, other = (LlamaCppOracle(each, vocab_only=True) for each in (path, again))
    for text in texts:
        tokens = one.tokenize(text, add_special=True, parse_special=True)
        assert tokens == other.tokenize(text, add_special=True, parse_special=True), ascii(text)
    assert (one.bos, one.eos, one.add_bos, one.eog_ids()) == (other.bos, other.eos, other.add_bos, other.eog_ids())
    assert other.n_vocab == size
    expected, written = GGUFFile.open(path).metadata, GGUFFile.open(again).metadata
    for key in ("tokens", "merges", "model", "pre", "unknown_token_id", "padding_token_id"):
        value, was = written.get(f"tokenizer.ggml.{key}"), expected.get(f"tokenizer.ggml.{key}")
        assert value == (was + [f"[PAD{i}]" for i in range(len(tokenizer), size)] if key == "tokens" else was) or (
            was is None and (key, value) in (("pre", "default"), ("unknown_token_id", 0))
        )
    kinds = written["tokenizer.ggml.token_type"]
    assert set(kinds[-3:]) == {5}
    before = expected["tokenizer.ggml.token_type"]
    same = kinds[:-3] == before
    # Unused tokens merge as normal ones do, and names that end a turn are special whatever the file says.
    assert all(same | (before == 5) | np.isin(expected["tokenizer.ggml.tokens"], ["<|eot_id|>", "</s>", "<|im_end|>"]))


PUBLISHED = {
    "gpt-2": [{"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}],
    "smollm": [
        {"type": "Digits", "individual_digits": True},
        {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
    ],
    "qwen2": [
        {
            "type": "Split",
            "pattern": {
                "Regex": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
                r"|\s*[\r\n]+|\s+(?!\S)|\s+"
            },
            "behavior": "Isolated",
            "invert": False,
        },
        {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False},
    ],
    "gpt-4o": [
        {
            "type": "Split",
            "pattern": {
                "Regex": r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
                r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+"
                r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*"
                r"|\s*[\r\n]+|\s+(?!\S)|\s+"
            },
            "behavior": "Removed",
            "invert": True,
        },
        {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False},
    ],
}


@pytest.mark.parametrize("pre", PUBLISHED)
def test_pre_tokenisers_are_recognised_as_they_were_published(tmp_path: Path, pre: str) -> None:
    path = write_byte_level(tmp_path / "original.gguf", pre)
    tokenizer = changed(build(path), pre_tokenizer={"type": "Sequence", "pretokenizers": PUBLISHED[pre]})
    found = vocabulary(tokenizer, len(tokenizer), "here")
    assert found.metadata["tokenizer.ggml.pre"] == pre
    oracle = LlamaCppOracle(write(tmp_path / "again.gguf", found.metadata, path), vocab_only=True)
    for text in (
        "Hello, world! It's 12345 o'clock; 'tis   the \n\n x=1;",
        "naïve 3 cafés — été\tabc123DEF\n",
        *SPECIAL,
    ):
        assert oracle.tokenize(text, add_special=True, parse_special=True) == tokenizer(text).input_ids, ascii(text)


def test_what_comes_of_known_differences_is_named(tmp_path: Path) -> None:
    """llama.cpp composes no characters, and what transformers composes becomes other tokens there."""
    tokenizer = build(write_byte_level(tmp_path / "original.gguf", "qwen2"))
    tokenizer = changed(tokenizer, normalizer={"type": "NFC"})
    found = vocabulary(tokenizer, len(tokenizer), "here")
    assert found.differences == ("e\u0301 a\u0308 not composed",)


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"pre_tokenizer": {"type": "Whitespace"}}, "do not have .*Whitespace"),
        ({"pre_tokenizer": None}, "do not have 'None'"),
        ({"pre_tokenizer": PUBLISHED["gpt-2"][0] | {"add_prefix_space": True}}, "do not have .*add_prefix_space"),
        (
            {
                "pre_tokenizer": {
                    "type": "Sequence",
                    "pretokenizers": [
                        {"type": "Split", "pattern": {"Regex": r"\w+"}, "behavior": "Isolated", "invert": False},
                        PUBLISHED["qwen2"][1],
                    ],
                }
            },
            r"do not have .*\\w",
        ),
        ({"normalizer": {"type": "Lowercase"}}, "no tokenizer whose normalizer is .*Lowercase"),
        ({"model": {"ignore_merges": True}}, "takes words like 'zzzz' whole"),
        ({"model": {"end_of_word_suffix": "</w>"}}, "lorafit exports plain BPE"),
    ],
)
def test_a_tokenizer_that_llama_cpp_does_not_have_is_refused(
    tmp_path: Path, parts: dict[str, Any], message: str
) -> None:
    tokenizer = changed(build(write_byte_level(tmp_path / "original.gguf", "gpt-2")), **parts)
    with pytest.raises(ModelError, match=message) as caught:
        vocabulary(tokenizer, len(tokenizer), "here")
    assert str(caught.value).startswith("here: ")


def test_merges_that_no_scores_give_are_refused(tmp_path: Path) -> None:
    tokenizer = build(vocabularies.write_sentence_piece(tmp_path / "original.gguf"))
    merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    fewer = changed(tokenizer, model={"merges": [merge for merge in merges if merge != ["a", "a"]]})
    with pytest.raises(ModelError, match=r"never merges 'a' and 'a', of which llama.cpp would make a token"):
        vocabulary(fewer, 400, "here")


def test_a_token_without_a_row_is_refused(tmp_path: Path) -> None:
    tokenizer = build(write_byte_level(tmp_path / "original.gguf", "gpt-2"))
    with pytest.raises(ModelError, match=r"'<\|unused\|>' has no row in the embedding"):
        vocabulary(tokenizer, len(tokenizer) - 1, "here")
