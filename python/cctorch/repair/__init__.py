"""Closed-form repair of a compressed network: better before fine-tuning, without a gradient step."""

from cctorch.repair.sequential import LayerFit, Repair, repair

__all__ = ["LayerFit", "Repair", "repair"]
