"""Modules over :mod:`cctorch.ops`: they hold the parameters, the ops do the work."""

from cctorch.nn.batch_norm import BatchNorm2d
from cctorch.nn.channel_gate import ChannelGate
from cctorch.nn.constant import Constant
from cctorch.nn.fake_quant import FakeQuant
from cctorch.nn.gather import GatherChannels
from cctorch.nn.hard_concrete_gate import HardConcreteGate
from cctorch.nn.low_rank import LowRankConv2d, LowRankLinear, LowRankWeight
from cctorch.nn.low_rank_lstm import LowRankLSTM
from cctorch.nn.mask import Mask
from cctorch.nn.soft_threshold import SoftThreshold

__all__ = [
    "BatchNorm2d",
    "ChannelGate",
    "Constant",
    "FakeQuant",
    "GatherChannels",
    "HardConcreteGate",
    "LowRankConv2d",
    "LowRankLSTM",
    "LowRankLinear",
    "LowRankWeight",
    "Mask",
    "SoftThreshold",
]
