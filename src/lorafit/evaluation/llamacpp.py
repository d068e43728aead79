"""The model as its users run it: a GGUF file in llama.cpp.

A certificate needs two things from the engine that the file is made for: text that it generates, and how likely it
finds given answers. The package ``xllamacpp`` embeds llama.cpp's server and takes its requests as function calls. That
server scores no prompts. What it does report is the log-probability of the token that it sampled, taken from the raw
logits; and a bias that is added to one token's logit steers the sampling without touching what is reported. So an
answer of n tokens is scored by n requests for one token each, in which the answer's next token is forced: after the
prompt, after the prompt and the answer's first token, and so on. The key-value cache keeps what they share, and each
costs one decoding step.

One kind of token is not reported when sampled: a piece that ends within a character, since the server waits for the
rest of it. Then a harmless letter is forced and the token looked up among the likeliest, if need be in a list of the
whole vocabulary, which takes some twenty decoding steps' time to write down.

What llama.cpp computes is not what lorafit computes: it quantises activations where weights are quantised, and keeps
keys and values in half precision. A likely token's figure moves by hundredths, an unlikely one's by tenths. The figures
belong beside lorafit's, not under one tolerance with them.
"""

from __future__ import annotations

import math
import os
import secrets
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from lorafit.errors import DependencyError, MissingFileError, ModelError

_LIKELIEST = 256
_WHOLE_VOCABULARY = 2**31 - 1  # more than there are: llama.cpp lists what it has
_FORCED = 1e9  # far above any logit
_HARMLESS = "a"
# The server takes the logarithm of a float32 probability. One too small for that counts as the smallest there is.
_LEAST_LOG_PROBABILITY = math.log(2.0**-149)
_MOST_THREADS = 8  # more gain nothing on the small models that fit a certificate's patience


def available() -> bool:
    """Whether the optional package that brings llama.cpp is installed."""
    return find_spec("xllamacpp") is not None


class LlamaCpp:
    """A GGUF file opened in llama.cpp; a context manager, to be closed because it holds the model and its threads.

    While it is open, llama.cpp's server also listens on a free port of the loopback interface, which cannot be switched
    off; it answers nobody there, because it asks for a key that is random and told to no one.

    Args:
        path: The GGUF file.
        n_ctx: Context length in tokens: prompt and answer together.
        lora: A GGUF-LoRA to compute with.
        threads: Threads to compute with; by default one per processor but one, at most 8. llama.cpp's threads wait for
            one another spinning, so one that lost its core holds up all of them: with a core taken, two threads
            on two cores are nearly three times slower than one (benchmarks/NOTES.md).

    Raises:
        DependencyError: The package ``xllamacpp`` is not installed.
        MissingFileError: No such file.
        ModelError: llama.cpp cannot load the file, or not with this LoRA.
    """

    def __init__(
        self, path: str | Path, *, n_ctx: int = 2048, lora: str | Path | None = None, threads: int | None = None
    ) -> None:
        self.path = Path(path)
        self._server: Any = None
        if not available():
            raise DependencyError("llama.cpp is not installed: pip install 'lorafit[llamacpp]'")
        for needed in (self.path, *([lora] if lora else [])):
            if not Path(needed).is_file():
                raise MissingFileError(f"{needed}: no such file")
        import xllamacpp

        params = xllamacpp.CommonParams()
        params.model.path = str(path)
        if lora:
            params.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(str(lora), 1.0)]
        params.n_ctx = n_ctx
        params.n_parallel = 1
        threads = threads or min(max((os.cpu_count() or 1) - 1, 1), _MOST_THREADS)
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
        params.cache_ram_mib = 0  # else every prompt's cache is kept, up to 8 GiB
        params.prefill_assistant = False  # a last message of the assistant is a finished one
        params.reasoning_format = xllamacpp.common_reasoning_format.COMMON_REASONING_FORMAT_NONE
        params.force_pure_content_parser = True  # all that the model says is its answer
        params.api_keys = [secrets.token_hex(16)]
        params.warmup = False
        params.verbosity = -1
        try:
            self._server = xllamacpp.Server(params)
        except RuntimeError as error:
            both = f" with {lora}" if lora else ""
            raise ModelError(
                f"{path}: llama.cpp cannot load it{both}: damaged, of a kind that xllamacpp {xllamacpp.__version__} "
                f"does not know, or too large for memory with a context of {n_ctx} tokens"
            ) from error
        # Besides proving that the model computes: a server closed before its loop has begun would wait for ever.
        self._next_tokens([0], _HARMLESS, 1)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Free the model and end its threads; harmless when repeated."""
        self._server = None

    def generate(self, messages: Sequence[Mapping[str, str]], *, max_tokens: int = 256) -> str:
        """The model's answer to a conversation, by the chat template in the file, the likeliest token each time.

        Args:
            messages: Turns of ``role`` and ``content``; the answer follows the last one.
            max_tokens: Longest answer.

        Raises:
            ModelError: llama.cpp refuses the request, for instance because the conversation exceeds the context.
        """
        turns = [dict(message) for message in messages]
        request = {"messages": turns, "max_tokens": max_tokens, "temperature": 0.0}
        reply = self._checked(self._open().handle_chat_completions(request))
        return str(reply["choices"][0]["message"]["content"])

    def answer_loss(self, prompt_tokens: Sequence[int], answer_tokens: Sequence[int]) -> float:
        """Mean negative log-probability of an answer's tokens after a prompt, in nats.

        Args:
            prompt_tokens: At least one token; taken as they are, nothing is put before them.
            answer_tokens: At least one token, the end-of-turn token included where it should count.

        Raises:
            ModelError: llama.cpp refuses the tokens, for instance because they exceed the context.
        """
        assert answer_tokens, "an answer without tokens has no loss"
        context, total = list(prompt_tokens), 0.0
        for token in answer_tokens:
            total -= self._log_probability(context, token)
            context.append(token)
        return total / len(answer_tokens)

    def _log_probability(self, context: list[int], token: int) -> float:
        for forced, n_probs in ((token, 1), (_HARMLESS, _LIKELIEST), (_HARMLESS, _WHOLE_VOCABULARY)):
            for candidate in self._next_tokens(context, forced, n_probs):
                if candidate["id"] == token:
                    return max(candidate["logprob"], _LEAST_LOG_PROBABILITY)
        raise ModelError(f"{self.path}: token {token} is not in its vocabulary; was it tokenised for another model?")

    def _next_tokens(self, context: list[int], forced: int | str, n_probs: int) -> list[dict[str, Any]]:
        """The ``n_probs`` likeliest tokens after a context, and the forced one: each with ``id`` and ``logprob``."""
        request = {"prompt": context, "n_predict": 1, "n_probs": n_probs, "temperature": 0.0, "cache_prompt": True}
        reply = self._checked(self._open().handle_completions({**request, "logit_bias": [[forced, _FORCED]]}))
        reported = reply["choices"][0]["logprobs"]
        if reported is None:  # the forced token ends within a character
            return []
        sampled = reported["content"][0]
        return [sampled, *sampled["top_logprobs"]]

    def _open(self) -> Any:
        assert self._server is not None, "used after close()"
        return self._server

    def _checked(self, reply: dict[str, Any]) -> dict[str, Any]:
        if "choices" not in reply:
            reason = reply.get("error", reply).get("message", reply)
            raise ModelError(f"{self.path}: llama.cpp refuses: {reason}")
        return reply
