"""llama.cpp as an oracle: its tokenizer, its logits, and its rendering of chat templates.

The wheel ``xllamacpp`` carries all of llama.cpp in one shared library, which exports the plain C interface of
``llama.h``; ctypes reaches it without a compiler. Parameters go by value there, so the two structs below must have the
layout of exactly the version that ``constraints.txt`` pins. They were read off that version's machine code and header
fields, and :func:`_library` compares every default with what is known, so that a new wheel with another layout fails
with one clear line and not with a wrong number.

What can be expected of the logits: where weights are quantised, llama.cpp quantises the activations as well (Q8_0 or
Q8_1, in blocks of 32) and computes in integers, so they are near those of the dequantised model and never equal. With
F32 weights they are the model's to about 1e-5. Keys and values are cached in F32 and attention is the plain one, so
that nothing else adds an error, unless a test asks for what llama.cpp's server computes.
"""

import ctypes
import json
import urllib.request
from collections.abc import Sequence
from ctypes import POINTER, Structure, c_bool, c_char_p, c_float, c_int8, c_int32, c_size_t, c_uint32, c_void_p
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import xllamacpp

_F32 = 0  # of enum ggml_type
_F16 = 1
_THREADS = 1  # two wait for each other at every operation, for seconds when other work holds a core


class _ModelParams(Structure):
    _fields_ = [
        ("devices", c_void_p),
        ("tensor_buft_overrides", c_void_p),
        ("n_gpu_layers", c_int32),
        ("split_mode", c_int32),
        ("load_mode", c_int32),
        ("lazy_mode", c_int32),
        ("main_gpu", c_int32),
        ("tensor_split", c_void_p),
        ("progress_callback", c_void_p),
        ("progress_callback_user_data", c_void_p),
        ("kv_overrides", c_void_p),
        ("vocab_only", c_bool),
        ("check_tensors", c_bool),
        ("use_extra_bufts", c_bool),
        ("no_host", c_bool),
        ("no_alloc", c_bool),
        ("load_mtp", c_bool),
    ]


class _ContextParams(Structure):
    _fields_ = [
        ("n_ctx", c_uint32),
        ("n_batch", c_uint32),
        ("n_ubatch", c_uint32),
        ("n_seq_max", c_uint32),
        ("n_rs_seq", c_uint32),
        ("n_outputs_max", c_uint32),
        ("n_outputs_max_per_seq", c_uint32),
        ("n_threads", c_int32),
        ("n_threads_batch", c_int32),
        ("ctx_type", c_int32),
        ("rope_scaling_type", c_int32),
        ("pooling_type", c_int32),
        ("attention_type", c_int32),
        ("flash_attn_type", c_int32),
        ("rope_freq_base", c_float),
        ("rope_freq_scale", c_float),
        ("yarn_ext_factor", c_float),
        ("yarn_attn_factor", c_float),
        ("yarn_beta_fast", c_float),
        ("yarn_beta_slow", c_float),
        ("yarn_orig_ctx", c_uint32),
        ("defrag_thold", c_float),
        ("cb_eval", c_void_p),
        ("cb_eval_user_data", c_void_p),
        ("type_k", c_int32),
        ("type_v", c_int32),
        ("abort_callback", c_void_p),
        ("abort_callback_data", c_void_p),
        ("unnamed", c_size_t),  # eight bytes that are zero by default and newer than any header at hand
        ("embeddings", c_bool),
        ("offload_kqv", c_bool),
        ("no_perf", c_bool),
        ("op_offload", c_bool),
        ("swa_full", c_bool),
        ("kv_unified", c_bool),
        ("samplers", c_void_p),
        ("n_samplers", c_size_t),
        ("ctx_other", c_void_p),
    ]


class _Batch(Structure):
    _fields_ = [
        ("n_tokens", c_int32),
        ("token", POINTER(c_int32)),
        ("embd", POINTER(c_float)),
        ("pos", POINTER(c_int32)),
        ("n_seq_id", POINTER(c_int32)),
        ("seq_id", POINTER(POINTER(c_int32))),
        ("logits", POINTER(c_int8)),
    ]


# Fields not named here are zero, False or null by default.
_MODEL_DEFAULTS = {"n_gpu_layers": -1, "split_mode": 1, "load_mode": -1, "lazy_mode": 1, "use_extra_bufts": True}
_CONTEXT_DEFAULTS = {
    **{"n_ctx": 512, "n_batch": 2048, "n_ubatch": 512, "n_seq_max": 1, "n_outputs_max_per_seq": 1},
    **{"n_threads": 4, "n_threads_batch": 4},
    **dict.fromkeys(["rope_scaling_type", "pooling_type", "attention_type", "flash_attn_type"], -1),
    **dict.fromkeys(["yarn_ext_factor", "yarn_attn_factor", "yarn_beta_fast", "yarn_beta_slow", "defrag_thold"], -1.0),
    **{"type_k": _F16, "type_v": _F16},
    **{"offload_kqv": True, "no_perf": True, "op_offload": True, "swa_full": True},
}

# name: (result, arguments), as in llama.h
_PROTOTYPES: dict[str, tuple[Any, list[Any]]] = {
    "llama_backend_init": (None, []),
    "llama_log_set": (None, [c_void_p, c_void_p]),
    "llama_model_default_params": (_ModelParams, []),
    "llama_context_default_params": (_ContextParams, []),
    "llama_model_load_from_file": (c_void_p, [c_char_p, _ModelParams]),
    "llama_model_free": (None, [c_void_p]),
    "llama_model_get_vocab": (c_void_p, [c_void_p]),
    "llama_init_from_model": (c_void_p, [c_void_p, _ContextParams]),
    "llama_free": (None, [c_void_p]),
    "llama_batch_init": (_Batch, [c_int32, c_int32, c_int32]),
    "llama_batch_free": (None, [_Batch]),
    "llama_decode": (c_int32, [c_void_p, _Batch]),
    "llama_get_logits": (POINTER(c_float), [c_void_p]),
    "llama_vocab_n_tokens": (c_int32, [c_void_p]),
    "llama_vocab_bos": (c_int32, [c_void_p]),
    "llama_vocab_eos": (c_int32, [c_void_p]),
    "llama_vocab_get_add_bos": (c_bool, [c_void_p]),
    "llama_vocab_is_eog": (c_bool, [c_void_p, c_int32]),
    "llama_tokenize": (c_int32, [c_void_p, c_char_p, c_int32, POINTER(c_int32), c_int32, c_bool, c_bool]),
    "llama_detokenize": (c_int32, [c_void_p, POINTER(c_int32), c_int32, c_char_p, c_int32, c_bool, c_bool]),
    "llama_token_to_piece": (c_int32, [c_void_p, c_int32, c_char_p, c_int32, c_int32, c_bool]),
    "llama_adapter_lora_init": (c_void_p, [c_void_p, c_char_p]),
    "llama_set_adapters_lora": (c_int32, [c_void_p, POINTER(c_void_p), c_size_t, POINTER(c_float)]),
}


@cache
def _library() -> ctypes.CDLL:
    """The shared library with its prototypes declared, its layout checked and its log silenced."""
    lib = ctypes.CDLL(xllamacpp.xllamacpp.__file__)
    for name, (result, arguments) in _PROTOTYPES.items():
        function = getattr(lib, name)
        function.restype, function.argtypes = result, arguments
    _check_layout(lib.llama_model_default_params(), _MODEL_DEFAULTS)
    _check_layout(lib.llama_context_default_params(), _CONTEXT_DEFAULTS)
    lib.llama_backend_init()
    return lib


def _check_layout(params: Structure, expected: dict[str, Any]) -> None:
    for name, *_ in params._fields_:
        value, default = getattr(params, name), expected.get(name, 0)
        if (value or 0) != default:
            raise RuntimeError(
                f"xllamacpp {xllamacpp.__version__}: default of {type(params).__name__[1:]}.{name} reads {value}, "
                f"expected {default}; the struct layout in tests/oracles/llamacpp.py is another version's"
            )


def _silence(lib: ctypes.CDLL) -> None:
    """Send llama.cpp's log nowhere; to be repeated, since a Server of xllamacpp puts its own logger there.

    The callback is a C function that has no effect and ignores its arguments: a Python one would still be called when
    models are freed at exit, after the interpreter is gone.
    """
    lib.llama_log_set(ctypes.cast(lib.llama_supports_mmap, c_void_p), None)


class LlamaCppOracle:
    """A GGUF file opened by llama.cpp.

    Args:
        path: The GGUF file.
        vocab_only: Load the tokenizer alone; then there are no logits.
        lora: A GGUF-LoRA to compute with.

    Raises:
        RuntimeError: llama.cpp cannot load a file.
    """

    def __init__(self, path: Path | str, vocab_only: bool = False, lora: Path | str | None = None) -> None:
        self._model: int | None = None
        self._lib = _library()
        _silence(self._lib)
        params = self._lib.llama_model_default_params()
        params.vocab_only = vocab_only
        params.n_gpu_layers = 0
        self._model = self._lib.llama_model_load_from_file(str(path).encode(), params)
        if not self._model:
            raise RuntimeError(f"llama.cpp cannot load {path}")
        # It is the model's, and is freed with it.
        self._lora = self._lib.llama_adapter_lora_init(self._model, str(lora).encode()) if lora else None
        if lora and not self._lora:
            raise RuntimeError(f"llama.cpp cannot load {lora} onto {path}")
        self._vocab_only = vocab_only
        self._vocab = self._lib.llama_model_get_vocab(self._model)
        self.n_vocab: int = self._lib.llama_vocab_n_tokens(self._vocab)
        self.bos: int = self._lib.llama_vocab_bos(self._vocab)
        self.eos: int = self._lib.llama_vocab_eos(self._vocab)
        self.add_bos: bool = self._lib.llama_vocab_get_add_bos(self._vocab)

    def __del__(self) -> None:
        if self._model:
            self._lib.llama_model_free(self._model)

    def eog_ids(self) -> frozenset[int]:
        """Tokens that end a generation."""
        return frozenset(i for i in range(self.n_vocab) if self._lib.llama_vocab_is_eog(self._vocab, i))

    def tokenize(self, text: str, add_special: bool, parse_special: bool) -> list[int]:
        """Token ids of a text; ``parse_special`` reads <|im_start|> and its like as the special tokens they name."""
        data = text.encode()
        room = len(data) + 8
        tokens = (c_int32 * room)()
        count = self._lib.llama_tokenize(self._vocab, data, len(data), tokens, room, add_special, parse_special)
        assert count >= 0, f"{-count} tokens from {len(data)} bytes"
        return list(tokens[:count])

    def detokenize(self, tokens: Sequence[int]) -> bytes:
        """The text of tokens, special ones written out; bytes, because a token may end within a character."""
        return b"".join(map(self.piece, tokens))

    def piece(self, token: int) -> bytes:
        """The bytes of one token."""
        text = ctypes.create_string_buffer(512)
        count = self._lib.llama_token_to_piece(self._vocab, token, text, len(text), 0, True)
        assert count >= 0, f"a piece of {-count} bytes"
        return text.raw[:count]

    def logits(self, tokens: Sequence[int], *, as_served: bool = False, lora_scale: float = 1.0) -> np.ndarray:
        """Logits after each token of one sequence that starts at position 0: float32 [T, vocab].

        Args:
            tokens: The sequence.
            as_served: Keep keys and values in F16 and use flash attention, as llama.cpp's server does by default.
            lora_scale: What the GGUF-LoRA is multiplied by, if there is one.

        Raises:
            RuntimeError: llama.cpp refuses the tokens, or the model was opened with ``vocab_only``.
        """
        if self._vocab_only:
            raise RuntimeError("logits need the weights: open the model without vocab_only")
        count = len(tokens)
        params = self._lib.llama_context_default_params()
        params.n_ctx = params.n_batch = params.n_ubatch = params.n_outputs_max = params.n_outputs_max_per_seq = count
        params.n_threads = params.n_threads_batch = _THREADS
        if not as_served:
            params.type_k = params.type_v = _F32
            params.flash_attn_type = 0
        context = self._lib.llama_init_from_model(self._model, params)
        if not context:
            raise RuntimeError(f"llama.cpp makes no context for {count} tokens")
        if self._lora:
            adapters, scales = (c_void_p * 1)(self._lora), (c_float * 1)(lora_scale)
            if self._lib.llama_set_adapters_lora(context, adapters, 1, scales) != 0:
                raise RuntimeError("llama.cpp does not take the LoRA")
        batch = self._lib.llama_batch_init(count, 0, 1)
        try:
            batch.n_tokens = count
            for i, token in enumerate(tokens):
                batch.token[i], batch.pos[i], batch.logits[i] = token, i, 1
                batch.n_seq_id[i], batch.seq_id[i][0] = 1, 0
            status = self._lib.llama_decode(context, batch)
            if status != 0:
                raise RuntimeError(f"llama_decode returned {status} for {count} tokens")
            return np.ctypeslib.as_array(self._lib.llama_get_logits(context), (count, self.n_vocab)).copy()
        finally:
            self._lib.llama_batch_free(batch)
            self._lib.llama_free(context)


@lru_cache(maxsize=1)  # one open file at a time is enough for a test that renders many chats
def _server(path: str) -> xllamacpp.Server:
    params = xllamacpp.CommonParams()
    params.model.path = path
    params.n_ctx = 256
    params.n_parallel = 1
    params.warmup = False
    params.prefill_assistant = False  # else a last message of the assistant is left open, to be continued
    params.verbosity = -1
    server = xllamacpp.Server(params)
    # A server that is closed before its loop has begun waits for ever; after an answer the loop has begun.
    server.handle_completions({"prompt": [0], "n_predict": 1})
    return server


def render_chat(path: Path | str, messages: Sequence[dict[str, str]], add_generation_prompt: bool) -> str:
    """The prompt that llama.cpp's own Jinja engine makes of messages by the template in the file."""
    request = urllib.request.Request(
        _server(str(path)).listening_address + "/apply-template",
        json.dumps({"messages": list(messages), "add_generation_prompt": add_generation_prompt}).encode(),
        {"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=20) as reply:
        return json.load(reply)["prompt"]
