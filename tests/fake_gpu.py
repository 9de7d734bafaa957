"""A GPU that is not there: PyTorch computes shapes, dtypes and devices of CUDA tensors, but no values."""

from contextlib import contextmanager

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

GPU = torch.device("cuda", 0)
FETCHED = 1  # what every value of a fake tensor is when the host reads it
COPIES = (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default)


class DeviceWatch(TorchDispatchMode):
    """Count the copies between host and GPU, and fail if an operation works on a CPU tensor.

    PyTorch accepts CPU tensors without dimensions as operands of CUDA operations, so they are allowed here as well.
    """

    def __init__(self):
        super().__init__()
        self.fetches = self.uploads = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is torch.ops.aten.detach.default and not isinstance(args[0], FakeTensor):  # by Tensor.numpy()
            with unset_fake_temporarily():
                return func(*args)
        if func is torch.ops.prim.device.default:
            return func(*args, **kwargs)
        if torch.is_inference_mode_enabled():  # composite operations are not decomposed yet
            with self:
                result = func.decompose(*args, **kwargs)
            if result is not NotImplemented:
                return result
        on_gpu = [_is_on_gpu(item) for item in tree_leaves((args, kwargs)) if isinstance(item, torch.Tensor)]
        if func is torch.ops.aten._local_scalar_dense.default and all(on_gpu):
            self.fetches += 1
            return _as_number(args[0].dtype)
        if func is torch.ops.aten._to_copy.default and all(on_gpu) and str(kwargs.get("device")) == "cpu":
            self.fetches += 1
            with unset_fake_temporarily():
                return torch.full(args[0].shape, FETCHED, dtype=kwargs.get("dtype") or args[0].dtype)
        result = func(*args, **kwargs)
        tensors = [item for item in tree_leaves((args, kwargs, result)) if isinstance(item, torch.Tensor)]
        on_cpu = [tensor for tensor in tensors if not _is_on_gpu(tensor)]
        if func in COPIES and on_cpu:
            assert len(on_cpu) < len(tensors), f"{func} copies within the host's memory"
            self.uploads += 1
        else:
            shapes = [tuple(tensor.shape) for tensor in on_cpu if tensor.ndim]
            assert not shapes, f"{func} works on CPU tensors of shape {shapes}"
        return result


def _is_on_gpu(tensor):
    return tensor.device.type == "cuda"


def _as_number(dtype):
    return bool(FETCHED) if dtype is torch.bool else float(FETCHED) if dtype.is_floating_point else FETCHED


@contextmanager
def fake_gpu(monkeypatch):
    """Create fake CUDA tensors in this block, and check them. Yields the function that checks: ``watched()``."""
    # Without a GPU, torch.autocast and GradScaler would disable themselves.
    monkeypatch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *_, **__: True)
    # FakeTensor.tolist reads one value at a time.
    monkeypatch.setattr(FakeTensor, "tolist", lambda tensor: tensor.cpu().tolist())
    with FakeTensorMode(allow_non_fake_inputs=True):
        yield DeviceWatch


def move_to_gpu(module):
    """Replace a module's parameters and buffers by fake CUDA tensors. Within :func:`fake_gpu` only."""
    for part in module.modules():
        for name, value in part._parameters.items():
            if value is not None:
                part._parameters[name] = torch.nn.Parameter(value.detach().to(GPU), requires_grad=value.requires_grad)
        for name, value in part._buffers.items():
            if value is not None:
                part._buffers[name] = value.to(GPU)
    return module
