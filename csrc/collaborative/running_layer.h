#pragma once

#include <ATen/core/Tensor.h>
#include <cctorch/collaborative.h>

#include <cstdint>
#include <vector>

namespace cctorch::collaborative {

// A layer on its way from dense to compressed: the running weight X, what has been removed from it, and the scores of
// what remains. Everything is float64, on the CPU, unfolded to N x (C k).
//
// X = sum_i left_i right_i^T over its singular triplets, one of the two factors carrying the singular value. All
// formulas need only such products, so nothing is ever divided by a singular value.
class RunningLayer {
 public:
  RunningLayer(const at::Tensor& weight, const at::Tensor& gradient);
  RunningLayer(const at::Tensor& weight, const at::Tensor& gradient, const at::Tensor& running, int64_t rank);

  int64_t channels() const { return channels_; }
  int64_t full_rank() const { return full_rank_; }
  int64_t units() const { return channels_ + full_rank_; }
  int64_t kernel_size() const { return kernel_size_; }
  int64_t outputs() const { return outputs_; }
  int64_t channels_left() const { return channels_left_; }
  const std::vector<char>& kept() const { return kept_; }
  std::vector<int64_t> kept_channels() const;

  const std::vector<int64_t>& removed_channels() const { return removed_channels_; }  // in the order they went

  // Singular values that X can still have: what was asked to remain, or what the channels left allow.
  int64_t rank() const;
  bool decomposed() const { return removed_values_; }

  // Multiply-accumulates per output position as the layer now stands, and with its channel pruning alone.
  int64_t macs() const;
  int64_t pruned_macs() const { return outputs_ * channels_left_ * kernel_size_; }
  int64_t dense_macs() const { return outputs_ * channels_ * kernel_size_; }

  double loss() const;                 // (E1) of X
  double largest_loss() const;         // (E1) of X = 0
  std::vector<double> losses_alone();  // (E1) of each unit removed alone: channels, then singular values
  std::vector<double> scores(const Options& options);  // (E3) of each unit: channels, then the rank() singular values

  void remove_channel(int64_t channel);
  void remove_value(int64_t index);  // the index-th largest of the remaining singular values
  void remove_values(std::vector<int64_t> indices);

 private:
  struct UnitSums;

  void decompose();
  UnitSums unit_sums();
  at::Tensor per_channel(const at::Tensor& matrix) const;  // N x Ck or r x Ck, summed to C
  at::Tensor next_terms_exact();                           // T of (E4) for every channel candidate
  at::Tensor next_terms_left(const at::Tensor& candidates);
  at::Tensor next_terms_right(const at::Tensor& candidates);

  int64_t outputs_, channels_, kernel_size_, full_rank_, values_left_, channels_left_;
  bool removed_values_ = false;
  std::vector<char> kept_;
  std::vector<int64_t> removed_channels_;
  at::Tensor original_, weighting_, running_;  // W, G, X
  at::Tensor channel_dense_;                   // w of the closed forms, sum of G∘W^2 for each channel
  at::Tensor left_, right_;                    // N x r, Ck x r
  bool decomposition_current_ = false;
};

}  // namespace cctorch::collaborative
