#pragma once

#include <ATen/core/Tensor.h>
#include <cctorch/collaborative.h>

#include <cstdint>
#include <vector>

namespace cctorch::collaborative {

// Multiply-accumulates, or what takes as long, of ranking the units of an unfolded weight of this size.
double ranking_macs(int64_t inputs, int64_t outputs, int64_t rank);

// The share of a layer's units that goes between two rankings of this cost, such that Options::effort holds: at most an
// eighth. Zero, which stands for Options::step_fraction, up to a hundredth, and for Basis::exact; other layers are
// wide.
double ranking_share(double macs, const Options& options);

// Of the dense layer.
double ranking_macs(const LayerSpec& spec);

// A layer on its way from dense to compressed: the running weight X, what has been removed from it, and the scores of
// what remains. Matrices are transposed, and without the channels removed so far: C'k x N. With Basis::exact they are
// float64; with Basis::fixed float32, and eigenproblems and sums over channels are float64. Those of a wide layer are
// where its weight is, others on the CPU: theirs are too small for a GPU.
//
// X = right left^T over its singular triplets: left has orthonormal columns, right carries the singular values. All
// formulas need only such products, so nothing is ever divided by a singular value. Removals update the factors: values
// are columns that go, channels rows of `right`, after which the eigenvectors of right^T right (r x r) turn the columns
// into singular triplets again. (Subtracting the rows from a kept right^T right would be cheaper, and would lose what
// is left where they dominated it.)
//
// Wide layers put that off until channels with half of X's squares have gone. In between, a singular value is a column
// of `left` with what X has along it: X = right left^T holds as before, and with it all that is said of the removal of
// such a column.
class RunningLayer {
 public:
  RunningLayer(const at::Tensor& weight, const at::Tensor& gradient, const Options& options);
  RunningLayer(const at::Tensor& weight, const at::Tensor& gradient, const at::Tensor& running, int64_t rank,
               const Options& options);

  int64_t channels() const { return channels_; }
  int64_t full_rank() const { return full_rank_; }
  int64_t units(Units kind) const;  // of the dense layer
  int64_t units_left(Units kind) const;
  int64_t kernel_size() const { return kernel_size_; }
  int64_t outputs() const { return outputs_; }
  int64_t channels_left() const { return static_cast<int64_t>(kept_.size()); }
  const std::vector<int64_t>& kept_channels() const { return kept_; }
  const std::vector<int64_t>& removed_channels() const { return removed_channels_; }  // in the order they went

  // Singular values that X can still have: what was asked to remain, or what the channels left allow.
  int64_t rank() const;
  bool decomposed() const { return removed_values_; }

  // Multiply-accumulates per output position as the layer now stands, and with its channel pruning alone.
  int64_t macs() const;
  int64_t pruned_macs() const { return outputs_ * channels_left() * kernel_size_; }
  int64_t dense_macs() const { return outputs_ * channels_ * kernel_size_; }

  double share() const;  // ranking_share() as the layer now stands

  double loss() const;          // (E1) of X
  double largest_loss() const;  // (E1) of X = 0
  // (E1) of each unit removed alone: channels, then singular values
  std::vector<double> losses_alone(bool of_values);
  std::vector<double> scores(const Options& options);  // (E3) of each unit: channels, then the rank() singular values

  // Channels that are still there, each named once.
  void remove_channels(const std::vector<int64_t>& channels);
  void remove_values(std::vector<int64_t> indices);  // of the remaining singular values, the largest first

 private:
  struct UnitSums;

  void keep_channels(const std::vector<int64_t>& positions);
  bool basis_serves() const;
  void factor();
  void decompose();  // unless the present singular vectors serve
  double loss_scale() const { return weight_scale_ * weight_scale_ * gradient_scale_ * gradient_scale_; }
  UnitSums unit_sums(bool of_values);
  at::Tensor index_of(const std::vector<int64_t>& positions) const;
  at::Tensor per_channel(const at::Tensor& matrix) const;                    // C'k x N or C'k x r, summed to C'
  std::vector<double> to_all(const at::Tensor& kept, double removed) const;  // C' values among C
  at::Tensor next_terms_exact();                                             // T of (E4) for every channel candidate

  int64_t outputs_, channels_, kernel_size_, full_rank_, values_left_;
  bool removed_values_ = false;
  std::vector<int64_t> kept_;  // ascending; the p-th has rows p k to (p + 1) k
  std::vector<int64_t> removed_channels_;
  Options options_;
  at::TensorOptions matrices_;                   // precision and device
  double weight_scale_, gradient_scale_;         // largest magnitudes, divided by: float32 holds the squares
  at::Tensor original_, weighting_, running_;    // W, G, X: C'k x N
  at::Tensor channel_dense_;                     // w of the closed forms, sum of G∘W^2 for each channel: C'
  double removed_loss_ = 0;                      // the same, summed over the removed channels
  at::Tensor left_, right_;                      // N x r, C'k x r; undefined until they are needed
  bool decomposition_current_ = false;           // no channel has gone since
  double basis_squares_ = 0, squares_gone_ = 0;  // of X when the basis was new, and of the channels gone since
  at::Tensor next_terms_;                        // (G left^2) ∘ right^2 of a wide layer while its basis serves: C'k x r
};

}  // namespace cctorch::collaborative
