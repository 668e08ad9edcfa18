"""CUDA IPC handles as plain values, so that no process unpickles another's objects.

torch describes a shared CUDA tensor by a tuple of arguments for `rebuild_cuda_tensor`, among them three
Python classes. vLLM would pickle those, which `VLLM_ALLOW_INSECURE_SERIALIZATION` would have to allow; here
they are left out and put back, since they are always the same. Not yet run on a GPU.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

# Places of the classes in the arguments of torch.multiprocessing.reductions.rebuild_cuda_tensor.
_TENSOR_CLASS, _SIZE, _STRIDE, _STORAGE_CLASS, _DTYPE = 0, 1, 2, 4, 5
_PLACES = 15

Handles = Mapping[str, tuple[Any, ...]]


def _encode(arguments: tuple[Any, ...]) -> list[Any]:
    if len(arguments) != _PLACES or arguments[_STORAGE_CLASS] is not torch.storage.TypedStorage:
        raise TypeError("CUDA IPC: torch describes a shared tensor in another way than this version expects")
    plain = list(arguments)
    plain[_TENSOR_CLASS] = plain[_STORAGE_CLASS] = None
    plain[_SIZE], plain[_STRIDE] = list(plain[_SIZE]), list(plain[_STRIDE])
    plain[_DTYPE] = str(plain[_DTYPE]).removeprefix("torch.")
    return plain


def _decode(plain: Sequence[Any]) -> tuple[Any, ...]:
    dtype = getattr(torch, str(plain[_DTYPE]), None)
    if len(plain) != _PLACES or not isinstance(dtype, torch.dtype):
        raise ValueError(
            f"CUDA IPC: not the handle of a tensor: {len(plain)} values, dtype {plain[_DTYPE]!r}"
        )
    arguments = list(plain)
    arguments[_TENSOR_CLASS], arguments[_STORAGE_CLASS] = torch.Tensor, torch.storage.TypedStorage
    arguments[_SIZE], arguments[_STRIDE] = torch.Size(plain[_SIZE]), tuple(plain[_STRIDE])
    arguments[_DTYPE] = dtype
    return tuple(arguments)


def encode_update(update_info: Mapping[str, Any]) -> dict[str, Any]:
    """An update of vLLM's `ipc` backend (unpacked: a handle table a tensor), its handles made plain."""
    tables: Sequence[Handles] = update_info["ipc_handles"]
    plain = [{gpu: _encode(arguments) for gpu, arguments in table.items()} for table in tables]
    return {
        "names": list(update_info["names"]),
        "dtype_names": list(update_info["dtype_names"]),
        "shapes": [list(shape) for shape in update_info["shapes"]],
        "ipc_handles": plain,
    }


def decode_update(plain: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of `encode_update`."""
    tables: Sequence[Mapping[str, Sequence[Any]]] = plain["ipc_handles"]
    handles = [{gpu: _decode(values) for gpu, values in table.items()} for table in tables]
    return {**plain, "ipc_handles": handles}
