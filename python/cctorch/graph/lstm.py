"""An ``nn.LSTM`` in the words of a plan: each of its weight matrices is a layer, named as the parameter is."""

from torch import nn

from cctorch._C import LayerPlan, LayerSpec


def weight_names(module: nn.LSTM) -> list[str]:
    """In the order of execution: ``weight_ih_l0``, ``weight_hh_l0``, ``weight_ih_l0_reverse``..."""
    return [name for names in module._all_weights for name in names if name.startswith("weight_")]


def specs(path: str, module: nn.LSTM, steps: int) -> list[LayerSpec]:
    """Of one call of the module at ``path``, on ``steps`` steps in time for each example."""
    found = []
    for name in weight_names(module):
        weight = getattr(module, name)
        rows, columns = weight.shape
        bits = 8 * weight.element_size()
        found.append(LayerSpec(f"{path}.{name}".lstrip("."), "lstm", columns, rows, positions=steps, bits=bits))
    return found


def module_of(layer: LayerSpec | LayerPlan) -> str:
    """The path of the module that a layer is, or is a weight of."""
    return layer.name.rpartition(".")[0] if layer.kind == "lstm" else layer.name
