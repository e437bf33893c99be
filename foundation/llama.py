"""llama.cpp as Samovar uses it: a thin binding to its low-level API, for one process and one thread.

    LlamaModel      a GGUF file: tokenizer, special ids, weights
    LlamaAdapter    a LoRA file beside a model; each context says which it adds, and how much of it
    LlamaContext    the memory of a conversation, or of many at once: logits, generation

Why not llama_cpp.Llama: that class serves one sequence at a time and keeps logits it need not. Here
many prompts run through one context (continuous batching) in such a way that each answer is the same
bit for bit as if its prompt had been alone there.

llama.cpp checks little and ends the process on a failed assertion. Everything that goes in is checked
here; a long-lived service should still run this in a child process. The structures belong to the
pinned version of llama-cpp-python. Source: llama.h of llama.cpp 0.5.0-dev.
"""

from __future__ import annotations

import codecs
import ctypes
import math
import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from foundation import gguf_header
from foundation.errors import InputError, ModelError

if TYPE_CHECKING:
    import numpy as np

CELLS = 256  # llama.cpp rounds the context of a sequence up to this many tokens
_OUTPUTS = 64  # positions whose logits are kept at once: their memory is this times V times 4 bytes
_VOCAB_NONE, _VOCAB_SPM = 0, 1  # enum llama_vocab_type
_BYTE_TOKEN = 32  # LLAMA_TOKEN_ATTR_BYTE
_SPECIAL_TOKEN = 1 | 8  # LLAMA_TOKEN_ATTR_UNKNOWN, LLAMA_TOKEN_ATTR_CONTROL: parsed only when asked to

_log: deque[str] = deque(maxlen=40)
_listeners: list[Callable[[str], None]] = []
_library: Any = None
_on_log: Any = None


def library() -> Any:
    """The llama_cpp module, its backend started and its log captured instead of printed."""
    global _library, _on_log
    if _library is None:
        import llama_cpp

        @llama_cpp.llama_log_callback  # type: ignore[untyped-decorator]
        def on_log(level: int, text: bytes, data: Any) -> None:
            _log.append(text.decode("utf-8", "replace"))
            for hear in _listeners:
                hear(_log[-1])

        _on_log = on_log  # the C side keeps only a pointer to it
        llama_cpp.llama_log_set(on_log, ctypes.c_void_p(0))
        llama_cpp.llama_backend_init()
        _library = llama_cpp
    return _library


def last_log(lines: int = 3) -> str:
    """The last lines that llama.cpp logged, for an error's text."""
    return " | ".join("".join(_log).strip().splitlines()[-lines:])


@contextmanager
def listening(hear: Callable[[str], None]) -> Iterator[None]:
    """Inside, `hear` is told every line that llama.cpp logs. It is called from C: what it raises is lost."""
    parts: list[str] = []

    def collect(text: str) -> None:  # a line comes in several parts
        parts.append(text)
        if "\n" in text:
            *lines, rest = "".join(parts).split("\n")
            parts[:] = [rest]
            for line in lines:
                hear(line)

    _listeners.append(collect)
    try:
        yield
    finally:
        _listeners.remove(collect)


def default_threads() -> int:
    """The cores that this process may use, less one: llama.cpp's threads spin, and crawl when one must wait."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)
    return max(1, cores - 1)


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn. temperature 0 takes the most likely one, and the rest has no effect."""

    temperature: float = 0.0
    top_p: float = 1.0  # keep the smallest set of tokens whose probability reaches this
    seed: int = 0

    def __post_init__(self) -> None:
        if self.temperature < 0 or not 0 < self.top_p <= 1 or not 0 <= self.seed < 2**32:
            raise InputError(f"{self}: temperature >= 0, 0 < top_p <= 1, 0 <= seed < 2**32 are allowed")


class LlamaModel:
    """A GGUF file opened by llama.cpp. A context manager; `close` frees it, after its contexts.

    `gpu_layers`: layers held by the GPU; 0 computes on the CPU, the reference; -1 offloads all.
    Raises ModelError: no such file, not a GGUF, or refused by gguf_header or by llama.cpp (its last words
    are quoted).
    """

    def __init__(self, path: Path | str, *, vocab_only: bool = False, gpu_layers: int = 0) -> None:
        self.path = Path(path)
        self.vocab_only = vocab_only
        self._model: Any = None
        _check_magic(self.path)
        gguf_header.check(self.path)
        llama = library()
        params = llama.llama_model_default_params()
        params.vocab_only = vocab_only
        params.n_gpu_layers = gpu_layers
        _log.clear()
        self._model = llama.llama_model_load_from_file(os.fsencode(self.path), params)
        if not self._model:
            raise ModelError(f"llama.cpp refused {self.path}: {last_log()}")
        self._vocab = llama.llama_model_get_vocab(self._model)
        self._check_vocabulary()

    def _check_vocabulary(self) -> None:
        """Refuse vocabularies with which llama.cpp would end the process later."""
        llama = library()
        kind = llama.llama_vocab_type(self._vocab)
        if kind == _VOCAB_NONE:
            self._refuse("holds no tokenizer")
        if llama.llama_vocab_get_add_bos(self._vocab) and self.bos is None:
            self._refuse("asks for a beginning token and names none")
        attributes = (llama.llama_vocab_get_attr(self._vocab, i) for i in range(self.vocab_size))
        if kind == _VOCAB_SPM and sum(bool(a & _BYTE_TOKEN) for a in attributes) < 256:
            self._refuse("has a SentencePiece vocabulary without the 256 byte tokens")

    def _refuse(self, why: str) -> None:
        self.close()
        raise ModelError(f"{self.path} {why}; llama.cpp can not tokenise with it safely")

    def __enter__(self) -> LlamaModel:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Free the model and its adapters. Its contexts must be closed before."""
        if self._model:
            library().llama_model_free(self._model)
            self._model = None

    @cached_property
    def vocab_size(self) -> int:
        """V, the number of token ids."""
        return int(library().llama_vocab_n_tokens(self._vocab))

    @cached_property
    def trained_context(self) -> int:
        """Tokens that the model was made for; unknown (0) when only the vocabulary is loaded."""
        return 0 if self.vocab_only else int(library().llama_model_n_ctx_train(self._model))

    @property
    def bos(self) -> int | None:
        return _id(library().llama_vocab_bos(self._vocab))

    @property
    def eos(self) -> int | None:
        return _id(library().llama_vocab_eos(self._vocab))

    @property
    def adds_bos(self) -> bool:
        """True when tokenize(add_special=True) puts `bos` first."""
        return bool(library().llama_vocab_get_add_bos(self._vocab))

    @property
    def adds_eos(self) -> bool:
        """True when tokenize(add_special=True) puts `eos` last."""
        return bool(library().llama_vocab_get_add_eos(self._vocab))

    @cached_property
    def eog(self) -> frozenset[int]:
        """Ids that end a generation. llama.cpp adds some that it knows by their text, such as </s>."""
        llama = library()
        return frozenset(i for i in range(self.vocab_size) if llama.llama_vocab_is_eog(self._vocab, i))

    def metadata(self, key: str) -> str | None:
        """A metadata value as text, or None when the file has no such key."""
        llama = library()
        name = key.encode()
        size = llama.llama_model_meta_val_str(self._model, name, None, 0)
        if size < 0:
            return None
        buffer = ctypes.create_string_buffer(size + 1)
        llama.llama_model_meta_val_str(self._model, name, buffer, size + 1)
        return buffer.value.decode("utf-8", "replace")

    def tokenize(self, text: str, *, add_special: bool = False, parse_special: bool = True) -> list[int]:
        """Ids of `text`. parse_special=False treats control tokens in the text as plain letters."""
        try:
            data = text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise InputError(f"text with half a surrogate pair can not be tokenised: {error}") from error
        llama = library()
        size = len(data) + 8
        while True:
            ids = (llama.llama_token * size)()
            n = llama.llama_tokenize(self._vocab, data, len(data), ids, size, add_special, parse_special)
            if n >= 0:
                return list(ids[:n])
            size = -n  # what it would have taken

    def encode(self, text: str) -> list[int]:
        """Ids of `text`, in which special tokens are plain characters."""
        return self.tokenize(text, parse_special=False)

    def encode_marked(self, text: str) -> list[int]:
        """Ids of a rendered template: special tokens written in it become their ids."""
        return self.tokenize(text, parse_special=True)

    @cached_property
    def special_tokens(self) -> dict[str, int]:
        """Spelling -> id of the tokens that `encode` reads as plain text."""
        llama, vocab = library(), self._vocab
        ids = [i for i in range(self.vocab_size) if llama.llama_vocab_get_attr(vocab, i) & _SPECIAL_TOKEN]
        return {llama.llama_vocab_get_text(vocab, i).decode("utf-8", "replace"): i for i in ids}

    def piece(self, token: int, *, special: bool = True) -> bytes:
        """Bytes that a token stands for. Control tokens give their name, or nothing if not `special`."""
        self._check_ids([token])
        llama = library()
        size = 64
        while True:
            buffer = ctypes.create_string_buffer(size)
            n = llama.llama_token_to_piece(self._vocab, token, buffer, size, 0, special)
            if n >= 0:
                return buffer.raw[:n]
            size = -n

    def detokenize(self, ids: Sequence[int], *, special: bool = True) -> str:
        """Text of the pieces in a row, bad UTF-8 replaced; the space that a tokenizer put first is kept."""
        return b"".join(self.piece(i, special=special) for i in ids).decode("utf-8", "replace")

    def context(self, tokens: int, **options: Any) -> LlamaContext:
        """Memory for sequences of `tokens` tokens each; `options` are those of LlamaContext."""
        return LlamaContext(self, tokens, **options)

    def adapter(self, path: Path | str) -> LlamaAdapter:
        """A LoRA file made for this model. Raises ModelError: made for another one, or damaged."""
        return LlamaAdapter(self, path)

    def _check_ids(self, ids: Sequence[int]) -> None:
        bad = [i for i in ids if not 0 <= i < self.vocab_size]
        if bad:
            raise InputError(f"token id {bad[0]} is outside this vocabulary of {self.vocab_size}")


def _id(value: int) -> int | None:
    """llama.cpp writes "no such token" as -1."""
    return None if value < 0 else int(value)


def _check_magic(path: Path) -> None:
    if not path.is_file():
        raise ModelError(f"no GGUF file at {path}")
    with path.open("rb") as file:
        magic = file.read(4)
    if magic != b"GGUF":
        raise ModelError(f"{path} is not a GGUF file: it begins with {magic!r}")


class LlamaAdapter:
    """A GGUF adapter (LoRA) in memory, beside an open model; nothing is added before a context asks for it.

    llama.cpp frees it with its model: a context may compute with it as long as both are open.
    Raises ModelError: no such file, no adapter, one for another model, or refused by gguf_header.
    """

    def __init__(self, model: LlamaModel, path: Path | str) -> None:
        self.model, self.path = model, Path(path)
        _check_magic(self.path)
        if model.vocab_only or not model._model:
            raise ModelError(f"{model.path.name} was opened for its vocabulary only, or is closed")
        gguf_header.check_adapter(self.path, model.path)
        _log.clear()
        self._adapter = library().llama_adapter_lora_init(model._model, os.fsencode(self.path))
        if not self._adapter:
            raise ModelError(
                f"llama.cpp refused {self.path} beside {model.path}: {last_log()}",
                hint="an adapter goes with the model that it was trained on, and with no other",
            )


class LlamaContext:
    """KV memory for `slots` sequences of at least `tokens` tokens EACH (llama.cpp divides; this does not).

    `batch_tokens` go through the network at once. `threads`: None takes all cores but one.
    `cache`: number type of the KV memory; f32 is for comparing with other implementations.
    KV is split, flash attention off, every step has the same shape: an answer depends on its prompt and
    on the number of slots (by rounding), never on who else is served.
    `adapters`: (adapter, scale) of this context, for good: what is remembered was computed with them. Scale 1
    is the adapter as it was trained, 0 leaves it out.
    Raises ModelError: vocabulary only, more than the trained context, or no memory for it.
    """

    def __init__(
        self,
        model: LlamaModel,
        tokens: int,
        *,
        slots: int = 1,
        batch_tokens: int = 512,
        threads: int | None = None,
        cache: Literal["f16", "f32"] = "f16",
        adapters: Sequence[tuple[LlamaAdapter, float]] = (),
    ) -> None:
        self._context: Any = None
        if model.vocab_only:
            raise ModelError(f"{model.path.name} was opened for its vocabulary only")
        if not 0 < tokens <= model.trained_context:
            raise ModelError(
                f"{tokens} tokens of context asked, {model.path.name} has 1..{model.trained_context}"
            )
        _check_adapters(model, adapters)
        if min(slots, batch_tokens) < 1 or (threads is not None and threads < 1):
            raise InputError(f"slots {slots}, batch_tokens {batch_tokens}, threads {threads}: 1 or more each")
        llama = library()
        if slots > llama.llama_max_parallel_sequences():
            raise InputError(f"{slots} slots asked, llama.cpp takes {llama.llama_max_parallel_sequences()}")
        self.model, self.tokens, self.slots = model, tokens, slots
        batch_tokens = max(batch_tokens, slots, _OUTPUTS)  # one step holds a token of every slot
        params = llama.llama_context_default_params()
        params.n_ctx = -(-tokens // CELLS) * CELLS * slots
        params.n_seq_max = slots
        params.n_batch = params.n_ubatch = batch_tokens
        params.kv_unified = False
        params.flash_attn_type = llama.LLAMA_FLASH_ATTN_TYPE_DISABLED
        params.n_outputs_max = max(slots, _OUTPUTS)  # fewer than the slots ends the process
        params.type_k = params.type_v = llama.GGML_TYPE_F32 if cache == "f32" else llama.GGML_TYPE_F16
        params.swa_full = False
        params.no_perf = True
        params.n_threads = params.n_threads_batch = threads or default_threads()
        self._context = llama.llama_init_from_model(model._model, params)
        if not self._context:
            raise ModelError(f"llama.cpp made no context of {slots} x {tokens} tokens: {last_log()}")
        handles = [adapter._adapter for adapter, _ in adapters]
        llama.llama_set_adapters_lora(
            self._context,
            (llama.llama_adapter_lora_p_ctypes * len(adapters))(*handles),
            len(adapters),
            (ctypes.c_float * len(adapters))(*(scale for _, scale in adapters)),
        )
        self._memory = llama.llama_get_memory(self._context)
        self._batch = _Batch(batch_tokens)

    def __enter__(self) -> LlamaContext:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Free the memory."""
        if self._context:
            library().llama_free(self._context)
            self._context = None

    def logits(self, ids: Sequence[int]) -> np.ndarray:
        """Next-token logits at every position, float32.  # [T, V]"""
        import numpy as np

        out = np.empty((len(ids), self.model.vocab_size), np.float32)  # [T, V]
        for row, logits in zip(out, self.logit_rows(ids), strict=True):
            row[:] = logits
        return out

    def logit_rows(self, ids: Sequence[int], first: int = 0) -> Iterator[np.ndarray]:
        """`logits` of the positions from `first` on, one after the other: of 262,144 tokens a thousand would
        take a gigabyte. Each is a view, good until the next is asked for.  # [V]
        """
        self._check_prompt(ids, 0)
        self._forget(0)
        start = 0
        while start < len(ids):
            end = min(start + _OUTPUTS, len(ids)) if start >= first else min(start + self._batch.size, first)
            outputs = end - start if start >= first else 0
            self._batch.clear()
            self._batch.add(ids[start:end], start, slot=0, outputs=outputs)
            self._decode()
            for i in range(outputs):
                yield self._row(i)
            start = end

    def generate_many(
        self,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int,
        *,
        sampling: Sequence[Sampling] | None = None,
        on_done: Callable[[int, int], None] | None = None,
    ) -> list[list[int]]:
        """Continuations of all `prompts`, in their order, without the end token; greedy without `sampling`.

        As many run side by side as there are slots; a free slot takes the next prompt. `sampling` holds one
        entry for each prompt; its draws are the prompt's own, whoever runs beside it. `on_done(done, total)`
        is called at each finished one. Raises InputError when a prompt and its answer do not fit.
        """
        for prompt in prompts:
            self._check_prompt(prompt, max_new_tokens)
        if sampling is not None and len(sampling) != len(prompts):
            raise InputError(f"{len(prompts)} prompts and {len(sampling)} samplings")
        with ExitStack() as stack:
            samplers = [stack.enter_context(_Sampler(one)) for one in sampling or ()]
            return self._side_by_side(prompts, max_new_tokens, samplers, on_done)

    def _side_by_side(
        self,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int,
        samplers: Sequence[_Sampler],
        on_done: Callable[[int, int], None] | None,
    ) -> list[list[int]]:
        waiting = deque(enumerate(prompts))
        running: dict[int, _Running] = {}  # slot -> the sequence in it
        answers: list[list[int]] = [[] for _ in prompts]
        done = 0
        while waiting or running:
            for slot in range(self.slots):  # the lowest free slot first
                if waiting and slot not in running:
                    index, prompt = waiting.popleft()
                    sampler = samplers[index] if samplers else None
                    token = self._pick(self._prefill(prompt, slot), sampler)
                    running[slot] = _Running(index, len(prompt), token, sampler)
            for slot, it in list(running.items()):
                answer = answers[it.index]
                ended = it.token in self.model.eog or len(answer) == max_new_tokens
                if not ended:
                    answer.append(it.token)
                if ended or len(answer) == max_new_tokens:
                    del running[slot]
                    done += 1
                    if on_done:
                        on_done(done, len(prompts))
            self._step(running)
        return answers

    def generate_stream(
        self, prompt: Sequence[int], max_new_tokens: int, sampling: Sampling | None = None
    ) -> Iterator[str]:
        """Text of one continuation, piece by piece, up to the end token; letters are never cut in two.

        Greedy without `sampling`. Raises InputError when the prompt and the answer do not fit.
        """
        self._check_prompt(prompt, max_new_tokens)
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        with _Sampler(sampling or Sampling()) as sampler:
            at = self._prefill(prompt, 0)
            for position in range(len(prompt), len(prompt) + max_new_tokens):
                token = sampler.sample(self._context, at)
                if token in self.model.eog:
                    break
                if text := decoder.decode(self.model.piece(token, special=False)):
                    yield text
                if position + 1 < len(prompt) + max_new_tokens:
                    self._batch.clear()
                    at = self._batch.add([token], position, slot=0, outputs=1)
                    self._decode()
        if text := decoder.decode(b"", final=True):
            yield text

    def _check_prompt(self, ids: Sequence[int], max_new_tokens: int) -> None:
        self.model._check_ids(ids)
        if not ids or max_new_tokens < 0:
            raise InputError(f"{len(ids)} prompt tokens and {max_new_tokens} new ones: 1 or more, 0 or more")
        if len(ids) + max_new_tokens > self.tokens:
            raise InputError(
                f"{len(ids)} prompt tokens and {max_new_tokens} new ones do not fit a slot of {self.tokens}",
                hint="ask for a longer context, shorten the prompt or allow fewer new tokens",
            )

    def _prefill(self, ids: Sequence[int], slot: int) -> int:
        """Read a prompt into a slot, alone, so that its numbers do not depend on others; its output's index."""
        self._forget(slot)
        at = 0
        for start in range(0, len(ids), self._batch.size):
            chunk = ids[start : start + self._batch.size]
            self._batch.clear()
            at = self._batch.add(chunk, start, slot=slot, outputs=int(start + len(chunk) == len(ids)))
            self._decode()
        return at

    def _step(self, running: dict[int, _Running]) -> None:
        """One more token for every running sequence.

        Every slot takes part, an idle one with a filler: the kernels round otherwise for another batch
        size, so the numbers of a sequence would depend on how many others there are. Slots ascend,
        because llama.cpp splits the batch where they do not.
        """
        if not running:
            return
        self._batch.clear()
        places = {}
        for slot in range(self.slots):
            it = running.get(slot)
            if it is None:
                self._forget(slot)
            token, position = (it.token, it.position) if it else (0, 0)
            places[slot] = self._batch.add([token], position, slot=slot, outputs=1)
        self._decode()
        for slot, it in running.items():
            it.token = self._pick(places[slot], it.sampler)
            it.position += 1

    def _forget(self, slot: int) -> None:
        library().llama_memory_seq_rm(self._memory, slot, -1, -1)

    def _decode(self) -> None:
        code = library().llama_decode(self._context, self._batch.struct)
        if code:
            raise ModelError(f"llama.cpp could not compute a batch (code {code}): {last_log()}")

    def _row(self, index: int) -> np.ndarray:
        """Logits of the batch's entry `index`: a view, good until the next decode.  # [V]"""
        import numpy as np

        pointer = library().llama_get_logits_ith(self._context, index)
        return np.ctypeslib.as_array(pointer, shape=(self.model.vocab_size,))

    def _pick(self, index: int, sampler: _Sampler | None) -> int:
        return sampler.sample(self._context, index) if sampler else int(self._row(index).argmax())


def _check_adapters(model: LlamaModel, adapters: Sequence[tuple[LlamaAdapter, float]]) -> None:
    """Refuse what llama.cpp would take in silence or not survive."""
    for adapter, scale in adapters:
        if adapter.model is not model:
            raise InputError(f"{adapter.path.name} was loaded beside another model than {model.path.name}")
        if not math.isfinite(scale):
            raise InputError(f"{adapter.path.name} is asked for {scale} times: a finite scale is needed")
    if len({id(adapter) for adapter, _ in adapters}) < len(adapters):
        raise InputError("an adapter is named twice: give it once, with the sum of its scales")


@dataclass
class _Running:
    """A sequence in a slot: which prompt it answers, its length so far, its next token, and how it draws."""

    index: int
    position: int
    token: int
    sampler: _Sampler | None = None


class _Batch:
    """A llama_batch whose arrays numpy owns: filling it costs no ctypes write per token."""

    def __init__(self, size: int) -> None:
        import numpy as np

        self.size = size
        self.tokens, self.positions, self.slots = (np.zeros(size, np.int32) for _ in range(3))
        self.counts, self.outputs = np.ones(size, np.int32), np.zeros(size, np.int8)
        self.slot_pointers = (self.slots.ctypes.data + 4 * np.arange(size)).astype(np.uint64)
        self.struct = library().llama_batch(
            0,
            self.tokens.ctypes.data_as(ctypes.POINTER(ctypes.c_int32)),
            None,
            self.positions.ctypes.data_as(ctypes.POINTER(ctypes.c_int32)),
            self.counts.ctypes.data_as(ctypes.POINTER(ctypes.c_int32)),
            self.slot_pointers.ctypes.data_as(ctypes.POINTER(ctypes.POINTER(ctypes.c_int32))),
            self.outputs.ctypes.data_as(ctypes.POINTER(ctypes.c_int8)),
        )

    def clear(self) -> None:
        self.struct.n_tokens = 0

    def add(self, ids: Sequence[int], position: int, *, slot: int, outputs: int) -> int:
        """Append `ids` of one slot; logits are kept for the last `outputs` of them. Index of the last."""
        start, end = self.struct.n_tokens, self.struct.n_tokens + len(ids)
        self.tokens[start:end] = ids
        self.positions[start:end] = range(position, position + len(ids))
        self.slots[start:end] = slot
        self.outputs[start:end] = 0
        self.outputs[end - outputs : end] = 1
        self.struct.n_tokens = end
        return end - 1


class _Sampler:
    """llama.cpp's sampler chain for one answer; a context manager."""

    def __init__(self, sampling: Sampling) -> None:
        llama = library()
        self._chain = llama.llama_sampler_chain_init(llama.llama_sampler_chain_default_params())
        if sampling.temperature == 0:
            parts = [llama.llama_sampler_init_greedy()]
        else:
            parts = [
                llama.llama_sampler_init_top_p(sampling.top_p, 1),
                llama.llama_sampler_init_temp(sampling.temperature),
                llama.llama_sampler_init_dist(sampling.seed),
            ]
        for part in parts:
            llama.llama_sampler_chain_add(self._chain, part)

    def __enter__(self) -> _Sampler:
        return self

    def __exit__(self, *exception: object) -> None:
        library().llama_sampler_free(self._chain)

    def sample(self, context: Any, index: int) -> int:
        return int(library().llama_sampler_sample(self._chain, context, index))
