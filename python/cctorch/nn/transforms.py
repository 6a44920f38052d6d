import torch


def within_transform() -> bool:
    """Whether ``torch.func`` transforms the call, which differentiates PyTorch's operators and none in C++."""
    return not torch.compiler.is_compiling() and torch._C._functorch.maybe_current_level() is not None
