"""The one owner of llama.cpp: a model file, and a context that turns rows of tokens into rows of logits.

Only the low-level C API is used: llama-cpp-python's `Llama` allocates n_ctx x vocab logits and keeps caches of its own.
Every sequence has its own stream of the KV cache (`kv_unified` off): its cells lie in order of position whatever the
other sequences do, so a row's logits do not depend on who shares the pass. Nothing here is thread-safe: one owner per
model and context. Knows nothing of sessions, drafts or sampling; `llama_sequences.py` builds on it.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

from pilotfish.cache.chat_template import render_chat
from pilotfish.cache.llama_library import check_magic, last_error, library, model_digest, reason
from pilotfish.cache.state_memory import allocate
from pilotfish.protocol.errors import EngineError, ModelError

Logits = NDArray[np.float32]
KV_TYPES = {"f32": 0, "f16": 1}  # ggml_type
_TWO_ROWS = {0, 1, 2, 3, 7, 8, 25, 32}  # llama_ftype: F32 F16 Q4_0 Q4_1 Q8_0 Q5_0 IQ4_NL BF16
_GUESSED = 1024  # the flag of a file that does not name its kind


class Row(NamedTuple):
    """One position to compute: `token` at `position` of `sequence`; `wanted` rows yield logits."""

    token: int
    position: int
    sequence: int
    wanted: bool


class LlamaModel:
    """A GGUF file. `vocab_only` loads the tokenizer and no weights.

    Raises ModelError, with the sentence for a person, if the file is missing, is no GGUF or cannot be loaded.
    """

    def __init__(self, path: Path, *, vocab_only: bool = False) -> None:
        check_magic(path)
        self._lib = library()
        last_error.clear()
        params = self._lib.llama_model_default_params()
        params.vocab_only = vocab_only
        params.use_extra_bufts = False  # AMX and repacked kernels: other bits per row count, and AMX crashed in a VM
        self.path = path
        self.handle = self._lib.llama_model_load_from_file(str(path).encode(), params)
        if not self.handle:
            raise ModelError(
                f"{path} cannot be loaded: damaged, cut short or of an unknown kind{reason()}. Fetch it again."
            )
        self._vocab = self._lib.llama_model_get_vocab(self.handle)
        self.vocab_size: int = self._lib.llama_vocab_n_tokens(self._vocab)

    # --- what the file says --------------------------------------------------------------------------------------

    def metadata(self, key: str) -> str | None:
        """One value of the file's metadata as text, None if absent."""
        size = self._lib.llama_model_meta_val_str(self.handle, key.encode(), None, 0)
        if size < 0:
            return None
        buffer = ctypes.create_string_buffer(size + 1)
        self._lib.llama_model_meta_val_str(self.handle, key.encode(), buffer, size + 1)
        return buffer.value.decode("utf-8", "replace")

    @property
    def architecture(self) -> str:
        """qwen3, llama ..."""
        return self.metadata("general.architecture") or "unknown"

    @property
    def name(self) -> str:
        """The model's own name, else the file's."""
        return self.metadata("general.name") or self.path.stem

    @property
    def n_ctx_train(self) -> int:
        """The longest context the model was trained for, in tokens."""
        return int(self._lib.llama_model_n_ctx_train(self.handle))

    @property
    def rolls_back(self) -> bool:
        """False for recurrent and hybrid models: their state cannot forget its last tokens."""
        return not (self._lib.llama_model_is_recurrent(self.handle) or self._lib.llama_model_is_hybrid(self.handle))

    @property
    def exact_rows(self) -> int:
        """Rows a pass needs, of all and of those with logits, to compute the same bits as any larger one.

        Measured on x86 (AVX-512), 320 rows each: F32, F16, BF16, Q4_0, Q4_1, Q5_0, Q8_0 and IQ4_NL differ only in
        passes of one row; Q2_K, Q4_K and Q6_K in passes of fewer than 8 (nine rows of ten, by up to 0.1). Kinds not
        measured are taken to be like these.
        """
        return 2 if self._lib.llama_model_ftype(self.handle) & ~_GUESSED in _TWO_ROWS else 8

    @property
    def digest(self) -> str:
        """sha256 of the file or all its parts, hex; of size and samples where one is larger than 1 GiB."""
        return model_digest(self.path)

    # --- text <-> ids --------------------------------------------------------------------------------------------

    def tokenize(self, text: str, special: bool = False, opening: bool | None = None) -> list[int]:
        """Text to ids. `special`: special tokens in the text are parsed, as in a rendered template.

        `opening`: begin with the tokens the vocabulary opens a text with (BOS); by default a plain text does, and a
        rendered template, which brings its own, does not.
        """
        opening = not special if opening is None else opening
        data = text.encode()
        size = len(data) + 8
        while True:
            buffer = (ctypes.c_int32 * size)()
            n = self._lib.llama_tokenize(self._vocab, data, len(data), buffer, size, opening, special)
            if n >= 0:
                return list(buffer[:n])
            size = -n

    def piece(self, token: int, special: bool = False) -> bytes:
        """The bytes of one token (a character may span several); b"" for control tokens unless `special`."""
        buffer = ctypes.create_string_buffer(64)
        n = self._lib.llama_token_to_piece(self._vocab, token, buffer, 64, 0, special)
        if n < 0:
            buffer = ctypes.create_string_buffer(-n)
            n = self._lib.llama_token_to_piece(self._vocab, token, buffer, -n, 0, special)
        return bytes(buffer.raw[:n])

    def detokenize(self, ids: Sequence[int], special: bool = False) -> str:
        """Ids to text; bytes that are not UTF-8 (yet) become U+FFFD."""
        return b"".join(self.piece(i, special) for i in ids).decode("utf-8", "replace")

    @cached_property
    def token_bytes(self) -> list[bytes]:
        """The bytes of every id, control tokens by their names: what two models of a pair must agree on."""
        return [self.piece(i, special=True) for i in range(self.vocab_size)]

    @property
    def eos_id(self) -> int | None:
        """The id that ends a text, None if the vocabulary has none."""
        token = int(self._lib.llama_vocab_eos(self._vocab))
        return token if token >= 0 else None

    @cached_property
    def eog_ids(self) -> frozenset[int]:
        """Every id that ends a generation (end of text, end of turn ...)."""
        return frozenset(i for i in range(self.vocab_size) if self._lib.llama_vocab_is_eog(self._vocab, i))

    @property
    def chat_template(self) -> str | None:
        """The jinja2 source in the file, None if it has none."""
        return self.metadata("tokenizer.chat_template")

    def apply_chat_template(self, messages: str | Sequence[Mapping[str, str]]) -> str:
        """A user's text, or messages of {role, content}, as the prompt this model was trained on."""
        template = self.chat_template
        if not template:
            raise ModelError(f"{self.path.name} carries no chat template; send raw text, or a model that has one.")
        turns = [{"role": "user", "content": messages}] if isinstance(messages, str) else messages
        return render_chat(template, turns, bos=self._name_of("bos"), eos=self._name_of("eos"))

    def _name_of(self, which: str) -> str:
        token = getattr(self._lib, f"llama_vocab_{which}")(self._vocab)
        return self.piece(token, special=True).decode("utf-8", "replace") if token >= 0 else ""

    # --- lifetime ------------------------------------------------------------------------------------------------

    def close(self) -> None:
        """Free the weights; contexts must be closed before."""
        if self.handle:
            self._lib.llama_model_free(self.handle)
            self.handle = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class LlamaContext:
    """KV memory for `sequences` sequences of `n_ctx` tokens each, and the passes that fill it.

    `kv`: "f32" for exactness, "f16" for half the memory. `outputs` bounds the rows of one pass that yield logits (their
    buffer is outputs x vocab float32). `passes` and `rows` count the work done. Raises EngineError if memory is short.
    """

    def __init__(
        self,
        model: LlamaModel,
        *,
        n_ctx: int,
        sequences: int = 1,
        n_batch: int = 512,
        outputs: int = 64,
        threads: int = 1,
        kv: str = "f32",
    ) -> None:
        self._lib = model._lib
        self.model, self.sequences, self.n_batch = model, sequences, n_batch
        self.outputs = min(max(outputs, 8), n_batch)
        last_error.clear()
        self.handle = self._lib.llama_init_from_model(model.handle, self._params(n_ctx, threads, kv))
        if not self.handle:
            raise EngineError(
                f"No memory for {sequences} sequences of {n_ctx} tokens{reason()}; lower the context or the sessions."
            )
        self._memory = self._lib.llama_get_memory(self.handle)
        self.n_ctx = int(self._lib.llama_n_ctx_seq(self.handle))
        self.passes = self.rows = 0
        self._allocate(n_batch)

    def _params(self, n_ctx: int, threads: int, kv: str) -> Any:
        params = self._lib.llama_context_default_params()
        params.n_ctx = _padded(n_ctx) * self.sequences
        params.n_batch = params.n_ubatch = self.n_batch
        params.n_outputs_max = self.outputs
        params.n_seq_max = self.sequences
        params.n_threads = params.n_threads_batch = threads
        params.type_k = params.type_v = KV_TYPES[kv]
        params.flash_attn_type = self._lib.LLAMA_FLASH_ATTN_TYPE_DISABLED
        params.kv_unified = False  # one stream per sequence: see the module's first lines
        params.swa_full = True  # a sliding window must be able to roll back
        params.no_perf = True
        return params

    def _allocate(self, n: int) -> None:
        """The batch llama.cpp reads, backed by numpy arrays that are filled row by row."""
        self._token, self._position, self._sequence = (np.zeros(n, np.int32) for _ in range(3))
        self._n_sequences, self._wanted = np.ones(n, np.int32), np.zeros(n, np.int8)
        self._pointers = self._sequence.ctypes.data + 4 * np.arange(n, dtype=np.uintp)
        batch = self._lib.llama_batch()
        int32_p, int8_p = ctypes.POINTER(ctypes.c_int32), ctypes.POINTER(ctypes.c_int8)
        batch.token, batch.pos = self._token.ctypes.data_as(int32_p), self._position.ctypes.data_as(int32_p)
        batch.n_seq_id, batch.logits = self._n_sequences.ctypes.data_as(int32_p), self._wanted.ctypes.data_as(int8_p)
        batch.seq_id = self._pointers.ctypes.data_as(ctypes.POINTER(int32_p))
        self._batch = batch

    def decode(self, rows: Sequence[Row]) -> Logits:
        """One forward pass. Logits [wanted, vocab] float32 in the order of the rows, a view valid until the next pass.

        Rows of one sequence must continue it without a gap. Raises EngineError; clear the sequences concerned then.
        """
        n = len(rows)
        if not 0 < n <= self.n_batch:
            raise EngineError(f"A pass takes 1 to {self.n_batch} rows, not {n}.")
        for i, row in enumerate(rows):
            self._token[i], self._position[i], self._sequence[i], self._wanted[i] = row
        wanted = int(np.count_nonzero(self._wanted[:n]))
        if wanted > self.outputs:
            raise EngineError(f"A pass yields at most {self.outputs} rows of logits, not {wanted}.")
        self._batch.n_tokens = n
        self._run()
        self.passes += 1
        self.rows += n
        return self._logits(wanted)

    def _run(self) -> None:
        code = self._lib.llama_decode(self.handle, self._batch)
        if code == 1:
            raise EngineError(
                f"The KV cache is full: no room for {self._batch.n_tokens} more rows; shorten the context."
            )
        if code != 0:
            raise EngineError(f"llama.cpp could not compute the pass (code {code}){reason()}.")

    def _logits(self, wanted: int) -> Logits:
        vocab = self.model.vocab_size
        if not wanted:
            return np.empty((0, vocab), np.float32)
        pointer = self._lib.llama_get_logits(self.handle)
        flat = (ctypes.c_float * (wanted * vocab)).from_address(ctypes.addressof(pointer.contents))
        return np.frombuffer(memoryview(flat), np.float32).reshape(wanted, vocab)

    def remove(self, sequence: int, from_position: int) -> bool:
        """Forget a sequence from a position on; False, and nothing done, if this memory can only forget all of it."""
        return bool(self._lib.llama_memory_seq_rm(self._memory, sequence, from_position, -1))

    def length(self, sequence: int) -> int:
        """Tokens a sequence holds."""
        return int(self._lib.llama_memory_seq_pos_max(self._memory, sequence)) + 1

    def copy(self, source: int, target: int) -> None:
        """Make `target` hold what `source` holds."""
        self._lib.llama_memory_seq_rm(self._memory, target, -1, -1)
        self._lib.llama_memory_seq_cp(self._memory, source, target, -1, -1)

    def state(self, sequence: int) -> memoryview:
        """The KV of one sequence, to be restored by `set_state` in any context of the same model and KV type."""
        state = allocate(self._lib.llama_state_seq_get_size(self.handle, sequence))
        written = self._lib.llama_state_seq_get_data(self.handle, _pointer(state), state.nbytes, sequence)
        return state[:written]

    def set_state(self, sequence: int, state: bytes | memoryview) -> None:
        """Make a sequence hold a saved state. Raises EngineError (and leaves it empty) if the state does not fit."""
        self.remove(sequence, -1)
        size = len(state)
        if not size or not self._lib.llama_state_seq_set_data(self.handle, _pointer(state), size, sequence):
            self.remove(sequence, -1)
            raise EngineError("A saved KV state does not fit this model; delete it.")

    def close(self) -> None:
        """Free the KV memory."""
        if self.handle:
            self._lib.llama_free(self.handle)
            self.handle = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _padded(n: int, to: int = 256) -> int:
    return -(-n // to) * to


def _pointer(buffer: bytes | memoryview) -> Any:
    """To the first byte, without a copy and without keeping the buffer alive (`ctypes.cast` would, in a cycle)."""
    return ctypes.byref(ctypes.c_uint8.from_address(np.frombuffer(buffer, np.uint8).ctypes.data))
