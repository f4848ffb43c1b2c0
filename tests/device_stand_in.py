"""A device without float64, in place of an Apple GPU (mps), which no test machine has.

Its tensors live in CPU memory. As there, a float64 tensor cannot be made on it or moved to it, and operators refuse a
mixture of its tensors with CPU tensors, except for CPU scalars. Importing this module registers the device, for good:
run it in a process of its own.
"""

import functools
import types
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

from bestrq2 import hardware
from bestrq2.ops.common import devices

NAME = "standin"


class StandInTensor(Tensor):
    cpu_tensor: Tensor

    @staticmethod
    def __new__(cls, cpu_tensor: Tensor) -> "StandInTensor":
        if cpu_tensor.dtype == torch.float64:
            raise TypeError("Cannot convert a tensor to float64: the device does not support it")
        return Tensor._make_wrapper_subclass(
            cls,
            cpu_tensor.shape,
            strides=cpu_tensor.stride(),
            storage_offset=cpu_tensor.storage_offset(),
            dtype=cpu_tensor.dtype,
            device=f"{NAME}:0",
        )

    def __init__(self, cpu_tensor: Tensor) -> None:
        self.cpu_tensor = cpu_tensor

    def tolist(self) -> Any:  # refused by torch for subclasses
        return self.cpu_tensor.tolist()

    @classmethod
    def __torch_dispatch__(cls, function: Any, kinds: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(function, args, kwargs or {})


COPIES = ("_to_copy", "copy_", "_copy_from")


def _run(function: Any, args: Any, kwargs: Any) -> Any:
    leaves = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    here = [leaf for leaf in leaves if isinstance(leaf, StandInTensor)]
    elsewhere = [leaf for leaf in leaves if not isinstance(leaf, StandInTensor) and leaf.dim() > 0]
    name = function.overloadpacket.__name__
    if here and elsewhere and name not in COPIES:
        raise RuntimeError(f"{name}: expected all tensors on one device, found {NAME} and cpu")
    args, kwargs = tree_map(lambda x: x.cpu_tensor if isinstance(x, StandInTensor) else x, (args, kwargs))
    wanted, result_here = kwargs.get("device"), bool(here)
    if wanted is not None:
        result_here = torch.device(wanted).type == NAME
        kwargs = {**kwargs, "device": torch.device("cpu")} if result_here else kwargs
    if name == "copy_":
        result_here = isinstance(leaves[0], StandInTensor)
    result = function(*args, **kwargs)
    if function._schema.is_mutable and len(function._schema.returns) == 1:
        return leaves[0]
    return tree_map(lambda x: StandInTensor(x) if isinstance(x, Tensor) and result_here else x, result)


class StandIn(TorchDispatchMode):
    """Inside, ``device="standin"`` works in factories and ``to``."""

    def __torch_dispatch__(self, function: Any, kinds: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(function, args, kwargs or {})


class Backend(types.ModuleType):
    """The functions that torch asks the module of a device for."""

    is_available = staticmethod(lambda: True)
    is_initialized = staticmethod(lambda: True)
    device_count = staticmethod(lambda: 1)
    current_device = staticmethod(lambda: 0)
    get_amp_supported_dtype = staticmethod(lambda: [torch.bfloat16, torch.float16])
    get_rng_state = staticmethod(lambda device=None: torch.empty(0, dtype=torch.uint8))
    set_rng_state = staticmethod(lambda state, device=None: None)
    _is_in_bad_fork = staticmethod(lambda: False)
    manual_seed_all = staticmethod(lambda seed: None)


_setup_privateuseone_for_python_backend(NAME, backend_module=Backend(f"torch.{NAME}"))
devices.WITHOUT_FLOAT64 = (NAME,)
hardware.APPLE = NAME
torch.backends.mps.is_available = functools.cache(lambda: True)  # torch.compile takes it for a cached function
