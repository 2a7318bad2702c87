"""The default dtype of one thread: it builds a model under its own, while other threads compute under torch's.

transformers builds a model under `torch.set_default_dtype`, which applies to the whole process. Here a function mode,
which torch keeps per thread, sets the dtype wherever the default would apply. It does not reach TorchScript,
`torch.ops`, sparse, nested and complex tensors, threads that a constructor starts, or the inside of functions that
torch passes to modes as a whole. Imports torch and transformers, so it is imported late.
"""

from __future__ import annotations

import functools
import inspect
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch._ops import OpOverload, OpOverloadPacket
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree
from transformers import modeling_utils

# The dtypes that torch accepts as its default.
_POSSIBLE = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

# Functions whose result has the default dtype for any arguments.
_OF_DEFAULT = frozenset(
    {
        torch.bartlett_window,
        torch.blackman_window,
        torch.empty,
        torch.empty_permuted,
        torch.empty_strided,
        torch.eye,
        torch.fft.fftfreq,
        torch.fft.rfftfreq,
        torch.hamming_window,
        torch.hann_window,
        torch.kaiser_window,
        torch.linspace,
        torch.logspace,
        torch.ones,
        torch.rand,
        torch.randn,
        torch.range,
        torch.scalar_tensor,
        torch.zeros,
    }
)

# Functions whose result has the default dtype where it is floating: a scalar's own dtype does not count.
_OF_SCALARS = frozenset({torch.arange, torch.full})

# Functions that look into their data: Python's floats have the default dtype, tensors and arrays their own.
_OF_DATA = frozenset({torch.as_tensor, torch.asarray, torch.tensor})

# Functions that choose among numbers: their result is converted, because their condition cannot be. torch too cuts
# numbers to half precision through single precision, so this is exact.
_CHOICES = frozenset({torch.where, torch.Tensor.where})

# Methods whose name gives the dtype of their result.
_CONVERSIONS = frozenset(
    {torch.Tensor.bfloat16, torch.Tensor.double, torch.Tensor.float, torch.Tensor.half, torch.Tensor.type}
)


class _OfThread(threading.local):
    """The default dtype of each thread that builds a model; None where torch's own applies."""

    dtype: torch.dtype | None = None


_OWN = _OfThread()

# torch's own functions, even if `install` of an earlier import of this module has replaced them.
_get_of_process = inspect.unwrap(torch.get_default_dtype)
_set_of_process = inspect.unwrap(torch.set_default_dtype)
_new_of_process: Callable[..., torch.Tensor] = inspect.unwrap(torch.Tensor.__new__)


@contextmanager
def local_dtype(dtype: torch.dtype, model_class_name: str | None = None) -> Iterator[None]:
    """Makes `dtype` the default of this thread only; `modeling_utils.local_torch_dtype` makes it that of all threads.

    Raises:
        ValueError: the dtype is not floating-point; in transformers' words.
        TypeError: the dtype is floating-point, but torch does not accept it as its default.
    """
    if not dtype.is_floating_point:
        if model_class_name is not None:
            raise ValueError(
                f"{model_class_name} cannot be instantiated under `dtype={dtype}` as it's not a floating-point dtype"
            )
        raise ValueError(f"Cannot set `{dtype}` as torch's default as it's not a floating-point dtype")
    _check_possible(dtype)
    before = _OWN.dtype
    # One mode reads the current dtype: of two, the outer one would change what the inner one leaves alone.
    mode = _Default() if before is None else nullcontext()
    with mode:
        _OWN.dtype = dtype
        try:
            yield
        finally:
            _OWN.dtype = before


def install() -> None:
    """Makes transformers build models under `local_dtype`, which it calls by its module's global name.

    torch passes neither `get_default_dtype` nor `torch.Tensor(2, 3)` to function modes, and some models' constructors
    use them: the sinusoidal tables of M2M100 and XGLM, and older models' code. Both are looked up as attributes when
    they are used, so these are replaced, once and permanently: replaced only during a construction, they would be one
    more switch of the whole process. Code that reads the default, sets another one and restores the first must not
    write a thread's own default into the process, so `set_default_dtype` is replaced too.
    """
    torch.get_default_dtype = get_default_dtype
    torch.set_default_dtype = set_default_dtype
    torch.Tensor.__new__ = staticmethod(_new)  # type: ignore[assignment]
    modeling_utils.local_torch_dtype = local_dtype


@functools.wraps(_get_of_process)
def get_default_dtype() -> torch.dtype:
    """The caller's default dtype: the thread's own, or torch's."""
    return _OWN.dtype or _get_of_process()


@functools.wraps(_set_of_process)
def set_default_dtype(d: torch.dtype, /) -> None:
    """Sets the default dtype of a thread that has its own; otherwise torch's."""
    if _OWN.dtype is None:
        _set_of_process(d)
    else:
        _check_possible(d)
        _OWN.dtype = d


@functools.wraps(_new_of_process)
def _new(cls: type[torch.Tensor], *args: Any, **kwargs: Any) -> torch.Tensor:
    """Creates a tensor from the old form's arguments, which have no dtype: a size, numbers, or a tensor to share."""
    dtype = _OWN.dtype
    if dtype is None or cls is not torch.Tensor:
        return _new_of_process(cls, *args, **kwargs)
    if len(args) == 1 and isinstance(args[0], torch.Tensor) and args[0].dtype is dtype:
        return args[0].detach()
    return _new_of_process(cls, *args, **kwargs).to(dtype)


class _Default(TorchFunctionMode):
    """Gives the thread's dtype to tensors that torch would create in its default one."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        named, dtype, standard = kwargs or {}, _OWN.dtype, _get_of_process()
        if dtype is None or dtype is standard or _is_told(func, args, named):
            return func(*args, **named)
        if func in _OF_DEFAULT or (func is torch.normal and not _tensors(args, named)):
            return func(*args, **{**named, "dtype": dtype})
        made = func(*args, **named)
        if func is torch.result_type:
            return dtype if made is standard and all(map(_is_whole, _tensors(args, named))) else made
        if not isinstance(made, torch.Tensor) or made.dtype is not standard:
            return made
        if func in _OF_SCALARS:
            return func(*args, **{**named, "dtype": dtype})
        if func in _OF_DATA:
            data = args[0] if args else named.get("data", named.get("obj"))
            found = _dtypes(data, dtype)
            fits = functools.reduce(torch.promote_types, found) if found else standard
            return made if fits is standard else func(*args, **{**named, "dtype": fits})
        tensors = _tensors(args, named)
        if func in _CONVERSIONS or not tensors or not all(map(_is_whole, tensors)):
            return made
        if func in _CHOICES:
            return made.to(dtype)
        # The default applied, because whole numbers gave floating ones. torch converts them before it computes.
        args, named = _pytree.tree_map_only(torch.Tensor, lambda tensor: tensor.to(dtype), (args, named))
        return func(*args, **named)


def _check_possible(dtype: torch.dtype) -> None:
    if dtype not in _POSSIBLE:
        raise TypeError(f"{dtype} cannot be the default dtype")


def _is_told(func: Callable[..., Any], args: tuple[Any, ...], named: Mapping[str, Any]) -> bool:
    """Whether a call gives the dtype of its result, or is a library's own operation."""
    if named.get("dtype") is not None or named.get("out") is not None:
        return True
    return any(isinstance(value, torch.dtype) for value in args) or isinstance(func, OpOverload | OpOverloadPacket)


def _tensors(args: tuple[Any, ...], named: Mapping[str, Any]) -> list[torch.Tensor]:
    """The tensors among a function's arguments, in lists too."""
    return [value for value in _pytree.tree_leaves((args, named)) if isinstance(value, torch.Tensor)]


def _is_whole(tensor: torch.Tensor) -> bool:
    """Whether a tensor holds whole numbers or truth values."""
    return not (tensor.is_floating_point() or tensor.is_complex() or tensor.is_quantized)


def _dtypes(data: Any, default: torch.dtype) -> set[torch.dtype]:
    """The dtypes of nested data, as torch sees them: a Python float and an empty list have the default.

    Python's whole numbers are left out: they change no floating dtype.
    """
    if isinstance(data, torch.Tensor):
        return {data.dtype}
    if hasattr(data, "dtype"):  # a NumPy array or scalar
        return {torch.as_tensor(data).dtype}
    if isinstance(data, float):
        return {default}
    if isinstance(data, Sequence):
        return {default} if not len(data) else set().union(*(_dtypes(item, default) for item in data))
    return set()
