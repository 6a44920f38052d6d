#pragma once

#include <ATen/core/Tensor.h>
#include <cctorch/channel_graph.h>
#include <cctorch/plan.h>

#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

// Collaborative Compression (Li et al., CVPR 2021): input channels and singular values of every layer compete in one
// ranking, on one budget of multiply-accumulates.
namespace cctorch::collaborative {

// What a layer costs by what is left of it, in any unit: measured seconds, bytes. Linear between the counts given; a
// count that is no multiple of `multiple` costs what the next multiple does; more never costs less, because whoever may
// keep less may keep more.
struct CostTable {
  std::vector<int64_t> channels;  // kept inputs, rising; the last is all of them
  std::vector<int64_t> ranks;     // rising; a rank above the last is not considered, none at all: never factored
  std::vector<double> pruned;     // one layer that reads channels[i] inputs
  std::vector<double> factored;   // reads channels[i] inputs, rank ranks[j]: at i * ranks.size() + j
  int64_t multiple = 1;
  // Without any input, where the network works without the layer, which then gives its bias. Absent: it does not.
  std::optional<double> removed = {};
};

struct Layer {
  LayerSpec spec;
  at::Tensor weight;     // N x C x kh x kw, or N x C for a linear layer or lstm; any floating dtype, any device
  at::Tensor gradient;   // same shape: gradient of the mean loss over the training set
  CostTable table = {};  // for Budget::table
  double max_rate = 1;   // the largest share of its own budget to take from it; Options::max_rate holds too
  // What removing all of the layer does to the network, in any unit, the same for all layers: weighs its loss in
  // select(). 0: its cost does, as in (E2).
  double importance = 0;
  // For Budget::table, where the layer had more inputs or filters before: (E1) of those inputs, which all choices have
  // lost too, and what the layer cost, as the objective weighs it. 0: it had not.
  double lost = 0;
  double cost_before = 0;
};

enum class Units { both, channels, singular_values };

// How T of eq. (E4) is found for a candidate channel: by an eigendecomposition for each candidate, or by keeping the
// running weight's singular vectors.
enum class Basis { exact, fixed };

// What there is a budget of: multiply-accumulates, parameters of the weights, bytes that these take in the bits of each
// layer's spec (without the scales of quantized ones), or the unit of the layers' cost tables.
enum class Budget { macs, parameters, bytes, table };

struct Options {
  double target = 0.5;          // share of the model's budget to remove, in (0, 1)
  double gamma = 0.9;           // weight of the look-ahead in eq. (E3)
  double step_fraction = 0.01;  // of a layer's units removed between two rankings
  double max_rate = 0.95;       // no layer is asked to give up more than this
  Units units = Units::both;    // weights of an lstm give up singular values alone
  Basis basis = Basis::fixed;
  Budget budget = Budget::macs;
  int64_t multiple = 1;  // of kept channels and ranks, where not all are kept; with Budget::table, the table's holds
  // With Basis::fixed, multiply-accumulates for removing 63 % of a layer's units, and again of what is then left.
  // Layers for which it does not pay for rankings step_fraction apart are ranked less often; infinity: none.
  double effort = 3e11;
  // Of what is factored: channel, or spatial where low_rank_layout() allows it.
  LowRankLayout layout = LowRankLayout::channel;
};

// Loss against rate for one layer, and what the budget made of it: loss ~ a exp(b rate). With a table, the points are
// the layer's choices and the fit is for show.
struct RateCurve {
  std::string name;
  std::vector<double> rate;
  std::vector<double> loss;  // divided by the layer's maximum
  double a = 0.0;
  double b = 0.0;
  double allocated = 0.0;  // eq. (E2)
};

struct Solution {
  CompressionPlan plan;
  std::vector<RateCurve> curves;
  double lambda = 0.0;
  std::vector<double> losses;  // of select(): the loss of each layer's choice
  double curve_seconds = 0.0;
  double heuristic_seconds = 0.0;
  std::vector<std::string> warnings;
};

// One form of a layer: what it costs, in the table's unit, and what it loses (E1).
struct Choice {
  double cost = 0.0;
  double loss = 0.0;
  LayerPlan plan;
};

// The forms of a layer of which none costs and loses more than another; the first is the dense layer, costs fall and
// losses rise from there. Only the dense one where the loss does not respond to the weights.
struct LayerChoices {
  std::string name;
  double largest_loss = 0.0;  // all of the weight removed
  double importance = 0.0;    // of the Layer
  std::vector<Choice> choices;
  double cost_before = 0.0;  // of the Layer

  // The layer's term in what select() minimizes, with a form that loses `loss`.
  double objective(double loss) const;
};

// Those that take part in the search: convolutions and linear layers, without the first convolution, the last linear
// layer, and depthwise or grouped convolutions; and, where singular values may go, the weights of an lstm.
std::vector<LayerSpec> participants(const std::vector<LayerSpec>& specs, Units units = Units::both);

// The layout of a layer's factors, if `wanted` is asked for. Two one-dimensional kernels, `spatial`, are for
// convolutions whose kernel is higher than 1 and does not stride along its height, where the first one would compute
// rows that the second does not read; the factors of others are those of the layout channel.
LowRankLayout low_rank_layout(const LayerSpec& spec, LowRankLayout wanted);

// Called from any thread, never from two at once; may throw to stop the search.
using Progress = std::function<void(std::string_view stage, int64_t done, int64_t total)>;

// `model_cost` is that of the whole network, in the unit of the budget: its multiply-accumulates, its weights'
// parameters or bytes, or seconds. Throws c10::Error when a weight or gradient is not finite (naming the layer), when a
// table does not fit its layer, or when no allocation reaches the target (stating the highest that can be reached).
Solution solve(const std::vector<Layer>& layers, double model_cost, const Options& options,
               const Progress& progress = {});

// What is expensive in solve() does not depend on the target: a search for the highest of several targets has the plans
// of all the others.
class Search {
 public:
  Search(std::vector<Layer> layers, double model_cost, const Options& options, const Progress& progress = {});

  // For a target up to that of the options. solve() is this with the options' own.
  Solution at(double target) const;

  // The same with dead filters counted: of the targets for at(), the least that makes the final graph of the whole
  // network give up `target`. The graph is to be resolved with the plan as always. Not for Budget::table, whose unit
  // filters have no price in.
  Solution at_final(double target, const std::vector<LayerSpec>& model, const ChannelGraph& graph) const;

 private:
  struct State;
  std::shared_ptr<const State> state_;
};

// What a plan leaves of the model's multiply-accumulates, parameters or bytes: `final` counts dead filters too.
int64_t remaining(const std::vector<LayerSpec>& model, const CompressionPlan& plan, Budget budget, bool final);

// solve() for Budget::table in two steps, so that one search serves several targets. `select` minimizes the objective
// of eq. (E2), sum_l F_l loss_l / largest_loss_l, over the choices under sum_l (F_l - cost_l) >= target * model_cost.
// With importances, which all layers have or none, it is sum_l importance_l sqrt(loss_l / largest_loss_l): the root of
// (E1) is in the unit of the network's loss.
std::vector<LayerChoices> layer_choices(const std::vector<Layer>& layers, const Options& options,
                                        const Progress& progress = {});
Solution select(const std::vector<LayerChoices>& layers, double model_cost, double target);

// Scores (eq. E3) of all remaining units of a layer whose running weight is `running`: first the in_channels channels,
// infinite where already removed, then the `rank` largest singular values, largest first.
std::vector<double> unit_scores(const at::Tensor& weight, const at::Tensor& gradient, const at::Tensor& running,
                                int64_t rank, const Options& options);

// Truncated SVD of the unfolded weight restricted to `kept_in`: first is rank x C' x kh x kw (root of S times V
// transposed), second N x rank x 1 x 1 (U times root of S); rank x C' and N x rank for a linear layer.
std::pair<at::Tensor, at::Tensor> factorize(const at::Tensor& weight, const std::vector<int64_t>& kept_in,
                                            int64_t rank);

}  // namespace cctorch::collaborative
