"""Trained weights, and with them their gradients, moments and average, sharded over several GPUs: PyTorch's FSDP2.

`shard` changes modules in place. From then on their parameters are DTensors, of which each process holds a shard, and
all processes compute with them together. What writes a file asks for them `gathered`, what reads one makes its tensors
shards by `like`: so a checkpoint does not tell how many processes it was sharded over.
"""


def shard(module, mesh, reshard_after_forward):
    """Shard a module's parameters, block by block; returns its torch.distributed.fsdp.FSDPModules.

    mesh                   torch's DeviceMesh of the processes
    reshard_after_forward  whether the parameters of a block are gathered anew for its backward pass: less memory
    """
    from torch.distributed.fsdp import FSDPModule, fully_shard

    names = getattr(module, "_no_split_modules", None) or ()  # diffusers' and transformers' word for blocks
    blocks = [block for block in module.modules() if type(block).__name__ in names]
    for block in [*reversed(blocks), module]:  # those inside others first
        kind = type(block)
        fully_shard(block, mesh=mesh, reshard_after_forward=reshard_after_forward)
        # It is of another class now, FSDP and the name, which diffusers would write into config.json, and by which
        # transformers would not find what a model records (hidden states)
        for name in ("__name__", "__qualname__", "__module__"):
            setattr(type(block), name, getattr(kind, name))
    return [block for block in module.modules() if isinstance(block, FSDPModule)]


def gathered(values, keep=True):
    """`values`, nested dicts and lists with tensors in them, every sharded tensor among them in full, on the CPU.

    Every process has to call it; with `keep` False a process gets None in place of them. They are in full on the
    device one at a time.
    """
    if isinstance(values, dict):
        return {name: gathered(value, keep) for name, value in values.items()}
    if isinstance(values, list):
        return [gathered(value, keep) for value in values]
    if not _is_sharded(values):
        return values
    tensor = full(values)
    return tensor.cpu() if keep else None


def full(tensor):
    """A tensor in full, on its device; every process has to call it."""
    return tensor.detach().full_tensor() if _is_sharded(tensor) else tensor


def like(tensor, whole):
    """`whole`, which every process has in full, sharded as `tensor` is."""
    if not _is_sharded(tensor):
        return whole
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(whole.to(tensor.device), tensor.device_mesh, tensor.placements, src_data_rank=None)


def local(tensor):
    """This process's shard of a tensor, in the same memory."""
    return tensor.to_local() if _is_sharded(tensor) else tensor


def _is_sharded(tensor):
    return hasattr(tensor, "full_tensor")  # a DTensor; the class takes a second to import
