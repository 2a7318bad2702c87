"""llama.cpp's C library, called by `ctypes`: its structures and functions, a model of it, and where it is found.

The structures are those of one version of `llama.h`; a library of another version is refused, because they change with
almost every one. The library ends the whole process where an assertion of its own fails, as for a file whose keys and
tensors do not match: so each file is first tried in a process of its own, which runs this file (`try_out`). It imports
nothing of this package, so that the process starts at once. Must not know requests.
"""

from __future__ import annotations

import ctypes
import importlib.util
import logging
import math
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from ctypes import c_bool, c_char_p, c_float, c_int8, c_int32, c_size_t, c_uint32, c_void_p
from functools import cache
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)

PACKAGE = "xllamacpp"
PINNED = f"{PACKAGE}==2026.10.11549"

_F32, _F16 = 0, 1  # ggml's numbers of the types
_MMAP = 1  # llama_load_mode: the file is mapped
_NO_FLASH, _FLASH = 0, 1  # llama_flash_attn_type
_LOG = ctypes.CFUNCTYPE(None, c_int32, c_char_p, c_void_p)
_ERROR = 4  # ggml's log level


class LibraryUnusable(Exception):
    """llama.cpp's library is missing, or another version than the one whose structures are known."""


class ModelParameters(ctypes.Structure):
    """`llama_model_params`."""

    _fields_ = (
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
    )


CONTEXT_FIELDS = (
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
    ("moe_cache_size", c_size_t),
    ("abort_callback", c_void_p),
    ("abort_callback_data", c_void_p),
    ("embeddings", c_bool),
    ("offload_kqv", c_bool),
    ("no_perf", c_bool),
    ("op_offload", c_bool),
    ("swa_full", c_bool),
    ("kv_unified", c_bool),
    ("samplers", c_void_p),
    ("n_samplers", c_size_t),
    ("ctx_other", c_void_p),
)


class ContextParameters(ctypes.Structure):
    """`llama_context_params`."""

    _fields_ = CONTEXT_FIELDS


class Batch(ctypes.Structure):
    """`llama_batch`."""

    _fields_ = (
        ("n_tokens", c_int32),
        ("token", ctypes.POINTER(c_int32)),
        ("embd", c_void_p),
        ("pos", ctypes.POINTER(c_int32)),
        ("n_seq_id", ctypes.POINTER(c_int32)),
        ("seq_id", ctypes.POINTER(ctypes.POINTER(c_int32))),
        ("logits", ctypes.POINTER(c_int8)),
    )


# Each function's result and arguments.
FUNCTIONS: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "llama_backend_init": (None, ()),
    "llama_log_set": (None, (_LOG, c_void_p)),
    "llama_model_default_params": (ModelParameters, ()),
    "llama_context_default_params": (ContextParameters, ()),
    "llama_model_load_from_file": (c_void_p, (c_char_p, ModelParameters)),
    "llama_model_free": (None, (c_void_p,)),
    "llama_model_get_vocab": (c_void_p, (c_void_p,)),
    "llama_model_is_recurrent": (c_bool, (c_void_p,)),
    "llama_model_is_hybrid": (c_bool, (c_void_p,)),
    "llama_model_has_encoder": (c_bool, (c_void_p,)),
    "llama_model_n_head": (c_int32, (c_void_p,)),
    "llama_model_n_embd": (c_int32, (c_void_p,)),
    "llama_model_n_swa": (c_int32, (c_void_p,)),
    "llama_vocab_n_tokens": (c_int32, (c_void_p,)),
    "llama_init_from_model": (c_void_p, (c_void_p, ContextParameters)),
    "llama_free": (None, (c_void_p,)),
    "llama_set_n_threads": (None, (c_void_p, c_int32, c_int32)),
    "llama_n_ctx": (c_uint32, (c_void_p,)),
    "llama_get_memory": (c_void_p, (c_void_p,)),
    "llama_memory_seq_rm": (c_bool, (c_void_p, c_int32, c_int32, c_int32)),
    "llama_memory_seq_cp": (None, (c_void_p, c_int32, c_int32, c_int32, c_int32)),
    "llama_state_seq_get_size": (c_size_t, (c_void_p, c_int32)),
    "llama_state_seq_get_data": (c_size_t, (c_void_p, c_void_p, c_size_t, c_int32)),
    "llama_state_seq_set_data": (c_size_t, (c_void_p, c_void_p, c_size_t, c_int32)),
    "llama_batch_init": (Batch, (c_int32, c_int32, c_int32)),
    "llama_batch_free": (None, (Batch,)),
    "llama_decode": (c_int32, (c_void_p, Batch)),
    "llama_get_logits": (c_void_p, (c_void_p,)),
}

# Defaults of `llama.h` that show that each structure lies as it is described here: first, middle and last fields.
_MODEL_DEFAULTS = {"n_gpu_layers": -1, "split_mode": 1, "main_gpu": 0, "use_extra_bufts": True, "check_tensors": False}
_CONTEXT_DEFAULTS = {
    "n_ctx": 512,
    "n_batch": 2048,
    "n_ubatch": 512,
    "rope_scaling_type": -1,
    "yarn_ext_factor": -1.0,
    "type_k": 1,
    "type_v": 1,
    "offload_kqv": True,
    "swa_full": True,
    "kv_unified": False,
    "n_samplers": 0,
}


def find() -> Path | None:
    """The file with the library; None where the package is not installed."""
    found = importlib.util.find_spec(PACKAGE)
    if found is None or not found.submodule_search_locations:
        return None
    folder = Path(found.submodule_search_locations[0])
    return next((path for path in folder.iterdir() if path.suffix in (".so", ".pyd")), None)


@cache
def library() -> Any:
    """The library, with its functions described; the process has it once.

    Raises:
        LibraryUnusable: it is missing, or of another version.
    """
    path = find()
    if path is None:
        raise LibraryUnusable(f"llama.cpp is not installed: pip install {PINNED}")
    try:
        found = ctypes.CDLL(os.fspath(path))
        for name, (result, arguments) in FUNCTIONS.items():
            function = getattr(found, name)
            function.restype, function.argtypes = result, arguments
    except (OSError, AttributeError) as error:
        raise LibraryUnusable(f"llama.cpp's library cannot be used: {error}") from error
    found.llama_log_set(_log_function, None)
    for made, defaults in (
        (found.llama_model_default_params(), _MODEL_DEFAULTS),
        (found.llama_context_default_params(), _CONTEXT_DEFAULTS),
    ):
        wrong = [name for name, value in defaults.items() if getattr(made, name) != value]
        if wrong:
            raise LibraryUnusable(
                f"llama.cpp's library is of another version than {PINNED}: {type(made).__doc__} has other fields "
                f"({', '.join(wrong)})"
            )
    found.llama_backend_init()
    return found


def _log(level: int, text: bytes, _: int) -> None:
    message = text.decode("utf-8", "replace").rstrip()
    if message:
        logger.log(logging.WARNING if level == _ERROR else logging.DEBUG, "%s", message)


_log_function = _LOG(_log)  # the library calls it as long as the process lives


class FileUnusable(Exception):
    """llama.cpp cannot read a file, or fails at computing it."""


class NoMemory(Exception):
    """There was no memory to try a file, which says nothing of the file."""


BATCH = 512  # the most tokens computed together
OUTPUTS = 32  # rows of logits of one call; more take memory of the vocabulary's size each

_SCORES = 128 * 2**20  # bytes of attention scores up to which tokens are computed together
_FIXED = 8 * 2**20  # bytes of a context besides


def context_bytes(capacity: int, heads: int, vocabulary: int, width: int, *, half: bool) -> int:
    """About the bytes of a context besides keys and values: attention scores, logits, and a layer's values.

    `capacity` is the most tokens of a sequence, `width` that of the model. With `half`, keys and values are float16,
    and no scores are kept.
    """
    together = BATCH if half else _together(capacity, heads)
    scores = 0 if half else 4 * heads * capacity * together
    return scores + 8 * OUTPUTS * vocabulary + 32 * together * width + _FIXED


def _together(capacity: int, heads: int) -> int:
    """Tokens that are computed together where a sequence has up to `capacity`."""
    return max(16, min(BATCH, _SCORES // (4 * heads * capacity)))


class Model:
    """A GGUF file in llama.cpp's hands. One thread at a time."""

    def __init__(self, path: str | os.PathLike[str], *, half: bool = False) -> None:
        """Maps the file. With `half`, keys and values are float16.

        Raises:
            FileUnusable: llama.cpp cannot read it, or keeps more of a text than keys and values.
            LibraryUnusable: as `library`.
        """
        self.lib = lib = library()
        parameters = lib.llama_model_default_params()
        parameters.n_gpu_layers = 0
        self._half = half
        self._model = lib.llama_model_load_from_file(os.fsencode(path), parameters)
        if not self._model:
            raise FileUnusable("llama.cpp cannot read its file")
        if lib.llama_model_is_recurrent(self._model) or lib.llama_model_is_hybrid(self._model):
            lib.llama_model_free(self._model)
            raise FileUnusable("its layers keep a state besides keys and values")
        self.vocabulary = int(lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(self._model)))
        self.windowed = int(lib.llama_model_n_swa(self._model)) > 0  # whether some layers see the last tokens only
        self._heads = max(1, int(lib.llama_model_n_head(self._model)))
        self._width = int(lib.llama_model_n_embd(self._model))
        self._batch = lib.llama_batch_init(BATCH, 0, 1)

    def context(self, sequences: int, capacity: int) -> Any:
        """A KV cache of so many sequences of at most `capacity` tokens; None if there is no memory for it.

        llama.cpp's flash attention rounds keys and values to 16 bits, so those in float32 are computed without it.
        """
        parameters = self.lib.llama_context_default_params()
        parameters.n_ctx, parameters.n_seq_max = sequences * capacity, sequences
        parameters.n_batch = BATCH
        parameters.n_ubatch = BATCH if self._half else _together(capacity, self._heads)
        parameters.n_outputs_max = parameters.n_outputs_max_per_seq = max(OUTPUTS, sequences)
        parameters.type_k = parameters.type_v = _F16 if self._half else _F32
        parameters.flash_attn_type = _FLASH if self._half else _NO_FLASH
        parameters.swa_full = True
        return self.lib.llama_init_from_model(self._model, parameters)

    def context_bytes(self, capacity: int) -> int:
        """About the bytes that a context takes besides keys and values; see the function."""
        return context_bytes(capacity, self._heads, self.vocabulary, self._width, half=self._half)

    def compute(self, context: Any, work: Sequence[tuple[int, int, int, bool]], threads: int = 1) -> Any:
        """Computes at most `BATCH` tokens: each with its place in a sequence, and whether its logits are wanted.

        Returns the logits of the wanted ones, (wanted, vocabulary) in one row, valid until the next call.

        Raises:
            FileUnusable: the library says that it failed.
        """
        batch = self._batch
        batch.n_tokens = len(work)
        for index, (token, place, sequence, wanted) in enumerate(work):
            batch.token[index], batch.pos[index] = token, place
            batch.n_seq_id[index], batch.logits[index] = 1, wanted
            batch.seq_id[index][0] = sequence
        self.lib.llama_set_n_threads(context, threads, threads)
        if status := self.lib.llama_decode(context, batch):
            raise FileUnusable(f"llama.cpp computes no step ({status})")
        count = sum(each[3] for each in work)
        return (c_float * (count * self.vocabulary)).from_address(self.lib.llama_get_logits(context) if count else 0)

    def close(self) -> None:
        """Unmaps the file; its contexts must be freed before."""
        if self._model:
            self.lib.llama_batch_free(self._batch)
            self.lib.llama_model_free(self._model)
            self._model = None


_TRIED = 24  # tokens
_HALF = "half"
_NO_MEMORY = 3  # the exit status of a trial without memory
_KILLED = 9  # the number of the signal

_Ended = Callable[[float | None], tuple[bytes, bytes] | None]
Until = Callable[[_Ended], tuple[bytes, bytes] | None]


def _try_out(path: str, *, half: bool) -> None:
    """Computes two sequences of a file, in a batch and step by step."""
    model = Model(path, half=half)
    context = model.context(2, BATCH)
    if not context:
        raise NoMemory
    work = [(index % model.vocabulary, index // 2, index % 2, True) for index in range(_TRIED)]
    for part in (work[: _TRIED - 2], work[_TRIED - 2 : _TRIED - 1], work[_TRIED - 1 :]):
        found = model.compute(context, part)
        if not all(math.isfinite(found[index]) for index in range(model.vocabulary)):
            raise FileUnusable("its logits are not numbers")


def try_out(path: Path, until: Until = lambda ended: ended(None), *, half: bool = False) -> None:
    """Computes a file in a process of its own, which may end of it. With `half`, keys and values are float16.

    `until` repeats a function, which waits for at most the seconds that it is given, until that returns something; the
    process ends with an error of it.

    Raises:
        FileUnusable: llama.cpp cannot read or compute it.
        NoMemory: the process got no memory, or was killed, as the system does where memory is short.
    """
    command = [sys.executable, __file__, os.fspath(path), *([_HALF] if half else [])]
    environment = {**os.environ, "GGML_NO_BACKTRACE": "1"}  # it would start a debugger
    tried = subprocess.Popen(  # noqa: S603 - this very interpreter, on this file
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment
    )

    def ended(seconds: float | None) -> tuple[bytes, bytes] | None:
        with suppress(subprocess.TimeoutExpired):
            return tried.communicate(timeout=seconds)
        return None

    with tried:
        try:
            written = until(ended)
        except BaseException:
            tried.kill()
            raise
    if tried.returncode in (_NO_MEMORY, -_KILLED):
        raise NoMemory
    if tried.returncode and written is not None:
        lines, log = (text.decode("utf-8", "replace").strip() for text in written)
        logger.info("llama.cpp fails: %s", log[-2000:])
        raise FileUnusable(lines.splitlines()[-1] if lines else "llama.cpp ends the process in which it is tried")


def _main() -> None:
    try:
        _try_out(sys.argv[1], half=_HALF in sys.argv[2:])
    except (FileUnusable, LibraryUnusable) as error:
        sys.stdout.write(f"{error}\n")
        sys.exit(1)
    except NoMemory:
        sys.exit(_NO_MEMORY)


if __name__ == "__main__":
    _main()
