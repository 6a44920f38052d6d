#pragma once

#include <cctorch/batch_norm.h>
#include <cctorch/channel_gate.h>
#include <cctorch/channel_graph.h>
#include <cctorch/collaborative.h>
#include <cctorch/fake_quant.h>
#include <cctorch/float_quant.h>
#include <cctorch/low_rank.h>
#include <cctorch/mask.h>
#include <cctorch/memory.h>
#include <cctorch/nn.h>
#include <cctorch/plan.h>
#include <cctorch/quant_range.h>
#include <cctorch/regularize.h>
#include <cctorch/repair.h>
#include <cctorch/value_grid.h>
