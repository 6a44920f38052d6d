from dataclasses import dataclass


@dataclass(frozen=True)
class LayerFit:
    """How far a layer is from what the dense model gives at its place: mean square error over that of a constant."""

    name: str
    samples: int
    unknowns: int
    """Weights of one output."""
    before: float
    after: float
