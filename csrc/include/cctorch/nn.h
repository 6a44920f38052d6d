#pragma once

// torch::nn modules and what is done to a model built from them. The only public header that pulls in torch::nn.

#include <cctorch/nn/apply.h>
#include <cctorch/nn/batch_norm.h>
#include <cctorch/nn/compressible.h>
#include <cctorch/nn/factors.h>
#include <cctorch/nn/gradients.h>
#include <cctorch/nn/layers.h>
#include <cctorch/nn/lstm.h>
#include <cctorch/nn/modules.h>
#include <cctorch/nn/prepare.h>
#include <cctorch/nn/repair.h>
#include <cctorch/nn/state_dict.h>
