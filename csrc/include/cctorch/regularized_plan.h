#pragma once

#include <cctorch/plan.h>
#include <cctorch/regularizers.h>

#include <vector>

namespace torch::nn {
class Module;
}

namespace cctorch::regularize {

// The plan by which apply() makes layers as small as Q has left their weights: factors of the ranks of SVD and Tucker2
// where these are fewer numbers, and none of the input channels that ChannelPruning along dimension 1 set to zero (one
// stays). What the network computes stays as it is, to rounding. Masks and bits are not in it: they make no layer
// smaller. `weights` are those that Q acted on, under the names of `model`'s layers; those of grouped convolutions and
// normalizations stay. A layer that gives up inputs gathers the others, until ChannelGraph::resolve has removed the
// filters nobody reads; drop_idle_ranks then drops factors that save nothing any more.
//
// Throws c10::ValueError naming a layer whose weight is not of the rank that Q gives it: finish() the events first. Q's
// state is as before.
CompressionPlan plan(const std::vector<LayerSpec>& model, const NamedParameters& weights, Regularizer& regularizer);

// The same of a model of cctorch::nn layers, and of those of its `parameters` that Q acts on.
CompressionPlan plan(torch::nn::Module& model, const NamedParameters& parameters, Regularizer& regularizer);

}  // namespace cctorch::regularize
