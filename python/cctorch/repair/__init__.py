"""Closed-form repair of a compressed network: better before fine-tuning, without a gradient step."""

from cctorch.repair.layer_fit import LayerFit
from cctorch.repair.sequential import Repair, repair

__all__ = ["LayerFit", "Repair", "repair"]
