"""Reads the layers of a model and the paths of its channels off ``torch.export``'s graph."""

from cctorch.graph.model_graph import Branch, ModelGraph
from cctorch.graph.trace import trace

__all__ = ["Branch", "ModelGraph", "trace"]
