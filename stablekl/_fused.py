"""One pass over memory instead of one per operation: kernels in C for elementwise rules on a CPU.

torch reads and writes memory for every operation, so a rule of twenty operations moves ten times its data. The kernels
of ``_fused_kernels.c`` move it once. They are built when stablekl is installed, if there is a C compiler; without
one, and for everything but plain float32 and float64 tensors on a CPU, the callers evaluate the same formulas with
torch's operations. A kernel releases the interpreter lock, so threads share a large call evenly.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from ._autograd import is_dual, is_plain

__all__ = [
    "available",
    "beta_kl",
    "double_arithmetic",
    "double_log",
    "double_stirling",
    "fused",
    "gaussian_kl",
    "gaussian_kl_gradient",
    "lgamma_function",
    "normal_kl",
    "normal_kl_gradient",
    "polynomial",
    "remainders",
    "takes",
]

# Elements that are worth a thread of their own (starting one takes as long as some 20,000 elements).
_PER_THREAD = 2**17
_SOME, _FEW = 2**15, 2**12  # of those that take ten or a hundred times as long
_SPECIAL = ("expm1mx", "log1pmx", "log_ratio_bregman", "remainder_of_log")  # elementwise, of one result
_LGAMMA = ("lgamma_bregman", "lgamma_change", "lgamma_change_next", "lgamma_bend", "trigamma_fall")
_ARITHMETIC = ("add", "multiply", "divide")  # of numbers in twice the digits
_FUSED: set[Callable[..., Tensor]] = set()
_VERSION = 9  # of the functions' arguments: that of the C file


def _load() -> Any:
    spec = find_spec("stablekl._fused_kernels")
    if spec is None or spec.origin is None:
        return None
    try:
        library = ctypes.CDLL(spec.origin)
        if ctypes.c_int.in_dll(library, "stablekl_fused_version").value != _VERSION:
            return None
    except (OSError, ValueError):  # built for another system, or left over from another version
        return None
    names = [f"stablekl_{rule}_kl{what}" for rule in ("normal", "gaussian") for what in ("", "_gradient")]
    names += [f"stablekl_{name}" for name in ("beta_kl", "remainders", *_LGAMMA)]
    names += [f"stablekl_{name}" for name in (*_SPECIAL, "polynomial")]
    names += [f"stablekl_double_{name}" for name in ("log", "stirling", *_ARITHMETIC)]
    for kernel in (getattr(library, name) for name in names):
        addresses, size = ctypes.POINTER(ctypes.c_void_p), ctypes.c_int64
        kernel.argtypes = [addresses, ctypes.POINTER(size), size, size, ctypes.c_int, ctypes.c_void_p]
        kernel.restype = None
    return library


_library = _load()  # None where there is none that fits


def available(inputs: Sequence[Tensor]) -> bool:
    """Whether a kernel can take these tensors, which have one shape and dtype.

    A kernel reads addresses, behind the back of whatever records operations: it is for plain tensors outside every
    trace and every dispatch mode.
    """
    x = inputs[0]
    return (
        _library is not None
        and is_plain(inputs)
        and not is_dual(inputs)
        and x.device.type == "cpu"
        and x.dtype in (torch.float32, torch.float64)
        and all(type(t) in (Tensor, torch.nn.Parameter) and not t._is_zerotensor() for t in inputs)
        and torch._C._len_torch_dispatch_stack() == 0
    )


def normal_kl(inputs: Sequence[Tensor]) -> Tensor:
    """KL(N(mu_p, sigma_p^2) || N(mu_q, sigma_q^2)) of tensors for which `available` holds."""
    return _value(_library.stablekl_normal_kl, inputs)


def normal_kl_gradient(grad: Tensor, inputs: Sequence[Tensor], needed: Sequence[bool]) -> tuple[Tensor | None, ...]:
    """Its gradient times ``grad``, for the inputs that are ``needed``."""
    return _gradient(_library.stablekl_normal_kl_gradient, grad, inputs, needed)


def gaussian_kl(inputs: Sequence[Tensor]) -> Tensor:
    """The same divergence from mu_p, log sigma_p^2, mu_q and log sigma_q^2."""
    return _value(_library.stablekl_gaussian_kl, inputs)


def gaussian_kl_gradient(grad: Tensor, inputs: Sequence[Tensor], needed: Sequence[bool]) -> tuple[Tensor | None, ...]:
    """Its gradient times ``grad``, for the inputs that are ``needed``."""
    return _gradient(_library.stablekl_gaussian_kl_gradient, grad, inputs, needed)


def lgamma_function(name: str, inputs: Sequence[Tensor]) -> Tensor | None:
    """`_bregman`'s function of that name, of float64 tensors that broadcast; None where no kernel can take them."""
    if any(x.dtype != torch.float64 for x in inputs) or not available(inputs):
        return None
    if any(x.shape != inputs[0].shape for x in inputs):
        inputs = torch.broadcast_tensors(*inputs)
    return _value(getattr(_library, f"stablekl_{name}"), inputs, _FEW)


def beta_kl(inputs: Sequence[Tensor]) -> Tensor:
    """The divergence of a stick in `distributions.dirichlet`, of eight float64 tensors of one shape."""
    return _value(_library.stablekl_beta_kl, inputs, _FEW)


def fused(f: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Decorate an elementwise function ``name_value`` or ``name`` whose kernel is ``stablekl_name``.

    The kernel takes over where it can (see `takes`).
    """
    name = f.__name__.removesuffix("_value")

    @functools.wraps(f)
    def g(*inputs: Tensor, **options: bool) -> Tensor:
        if not options and takes(g, inputs):
            if any(x.shape != inputs[0].shape for x in inputs):
                inputs = torch.broadcast_tensors(*inputs)
            return _value(getattr(_library, f"stablekl_{name}"), inputs, _SOME)
        return f(*inputs, **options)

    _FUSED.add(g)
    return g


def takes(f: Callable[..., Tensor], inputs: Sequence[Tensor]) -> bool:
    """Whether f is made by `fused` and its kernel can take these tensors, whose shapes broadcast."""
    return f in _FUSED and available(inputs) and all(x.dtype == inputs[0].dtype for x in inputs)


def remainders(inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """`distributions.cross._pieces.remainders` of a float64 tensor."""
    return _parts(_library.stablekl_remainders, inputs, 2)


@functools.cache
def _numbers(values: tuple[float, ...]) -> Any:
    return (ctypes.c_double * len(values))(*values)


def polynomial(x: Tensor, coefficients: tuple[float, ...]) -> Tensor:
    """`_elementwise.horner` of a float64 tensor, bit for bit."""
    x = x.contiguous().resolve_neg()
    out = torch.empty(x.shape, dtype=x.dtype, device="cpu")
    addresses = (ctypes.c_void_p * 2)(x.data_ptr(), ctypes.addressof(_numbers(coefficients)))
    strides = (ctypes.c_int64 * 2)(1, len(coefficients))
    _library.stablekl_polynomial(addresses, strides, 0, x.numel(), 1, ctypes.c_void_p(out.data_ptr()))
    return out


def double_arithmetic(name: str, parts: Sequence[Tensor | float]) -> tuple[Tensor, ...] | None:
    """`_double`'s operation of that name, of two numbers of two parts each; None where no kernel can take them."""
    tensors = [x for x in parts if isinstance(x, Tensor)]
    if not tensors or not available(tensors) or any(x.dtype != torch.float64 for x in tensors):
        return None
    all_tensors = [x if isinstance(x, Tensor) else torch.tensor(x, dtype=torch.float64, device="cpu") for x in parts]
    shape = tensors[0].shape
    if any(x.shape != shape for x in all_tensors):
        all_tensors = list(torch.broadcast_tensors(*all_tensors))
    return _parts(getattr(_library, f"stablekl_double_{name}"), all_tensors, 2, _PER_THREAD)


def double_log(inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """`_double.log` of x and x - 1, of two float64 tensors each, all of one shape: its two parts."""
    return _parts(_library.stablekl_double_log, inputs, 2, _SOME)


def double_stirling(inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """`_double_gamma.stirling` of two float64 tensors of one shape: the two parts of either result."""
    return _parts(_library.stablekl_double_stirling, inputs, 4)


def _parts(
    kernel: Callable[..., None], inputs: Sequence[Tensor], count: int, per_thread: int = _FEW
) -> tuple[Tensor, ...]:
    out = [torch.empty(inputs[0].shape, dtype=inputs[0].dtype, device="cpu") for _ in range(count)]
    _run(kernel, inputs, (ctypes.c_void_p * count)(*(x.data_ptr() for x in out)), per_thread)
    return tuple(out)


def _value(kernel: Callable[..., None], inputs: Sequence[Tensor], per_thread: int = _PER_THREAD) -> Tensor:
    out = torch.empty(inputs[0].shape, dtype=inputs[0].dtype, device="cpu")
    _run(kernel, inputs, ctypes.c_void_p(out.data_ptr()), per_thread)
    return out


def _gradient(
    kernel: Callable[..., None], grad: Tensor, inputs: Sequence[Tensor], needed: Sequence[bool]
) -> tuple[Tensor | None, ...]:
    out = [torch.empty(grad.shape, dtype=grad.dtype, device="cpu") if n else None for n in needed]
    addresses = (ctypes.c_void_p * 4)(*(None if x is None else x.data_ptr() for x in out))
    _run(kernel, (*inputs, grad), addresses)
    return tuple(out)


def _run(kernel: Callable[..., None], inputs: Sequence[Tensor], out: object, per_thread: int = _PER_THREAD) -> None:
    """Call ``kernel`` on as many threads as torch uses; an expanded scalar goes in as it is, of stride 0."""
    scalar = [not any(x.stride()) for x in inputs]
    dense = [(x if s else x.contiguous()).resolve_neg() for x, s in zip(inputs, scalar, strict=True)]
    addresses = (ctypes.c_void_p * len(dense))(*(x.data_ptr() for x in dense))
    strides = (ctypes.c_int64 * len(dense))(*(0 if s else 1 for s in scalar))
    wide, n = inputs[0].dtype == torch.float64, inputs[0].numel()
    threads = max(1, min(torch.get_num_threads(), n // per_thread))

    def part(i: int) -> None:
        kernel(addresses, strides, n * i // threads, n * (i + 1) // threads, wide, out)

    if threads == 1:
        part(0)
    else:
        with ThreadPoolExecutor(threads - 1) as pool:
            others = [pool.submit(part, i) for i in range(1, threads)]
            part(0)
        for other in others:
            other.result()
