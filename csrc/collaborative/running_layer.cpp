#include "csrc/collaborative/running_layer.h"

#include <ATen/ATen.h>

#include <algorithm>
#include <limits>

namespace cctorch::collaborative {

namespace {

constexpr double infinity = std::numeric_limits<double>::infinity();

at::Tensor unfold(const at::Tensor& weight) {
  return weight.detach().to(at::kCPU, at::kDouble).reshape({weight.size(0), -1}).contiguous();
}

std::vector<double> to_vector(const at::Tensor& values) {
  const at::Tensor dense = values.contiguous();
  return {dense.const_data_ptr<double>(), dense.const_data_ptr<double>() + dense.numel()};
}

}  // namespace

RunningLayer::RunningLayer(const at::Tensor& weight, const at::Tensor& gradient)
    : outputs_(weight.size(0)),
      channels_(weight.size(1)),
      kernel_size_(weight.numel() / (outputs_ * channels_)),
      full_rank_(std::min(outputs_, channels_ * kernel_size_)),
      values_left_(full_rank_),
      channels_left_(channels_),
      kept_(channels_, 1),
      original_(unfold(weight)),
      weighting_(unfold(gradient).square()),
      running_(original_.clone()),
      channel_dense_(per_channel(weighting_ * original_ * original_)) {}

RunningLayer::RunningLayer(const at::Tensor& weight, const at::Tensor& gradient, const at::Tensor& running,
                           int64_t rank)
    : RunningLayer(weight, gradient) {
  running_ = unfold(running).clone();
  const std::vector<double> magnitude = to_vector(per_channel(running_.abs()));
  for (int64_t c = 0; c < channels_; ++c) kept_[c] = magnitude[c] > 0;
  channels_left_ = std::count(kept_.begin(), kept_.end(), 1);
  values_left_ = rank;
  removed_values_ = rank < full_rank_;
}

std::vector<int64_t> RunningLayer::kept_channels() const {
  std::vector<int64_t> indices;
  for (int64_t c = 0; c < channels_; ++c) {
    if (kept_[c]) indices.push_back(c);
  }
  return indices;
}

int64_t RunningLayer::rank() const { return std::min(values_left_, channels_left_ * kernel_size_); }

int64_t RunningLayer::macs() const {
  if (!removed_values_) return pruned_macs();
  return (channels_left_ * kernel_size_ + outputs_) * rank();
}

at::Tensor RunningLayer::per_channel(const at::Tensor& matrix) const {
  return matrix.sum(0).view({channels_, kernel_size_}).sum(1);
}

double RunningLayer::loss() const { return (running_ - original_).square_().mul_(weighting_).sum().item<double>(); }

double RunningLayer::largest_loss() const { return channel_dense_.sum().item<double>(); }

void RunningLayer::decompose() {
  if (decomposition_current_) return;
  const bool left_is_smaller = outputs_ <= channels_ * kernel_size_;
  const at::Tensor gram = left_is_smaller ? at::mm(running_, running_.t()) : at::mm(running_.t(), running_);
  // Ascending eigenvalues: the last rank() columns, reversed, belong to the largest singular values.
  const at::Tensor basis = std::get<1>(at::linalg_eigh(gram)).narrow(1, gram.size(0) - rank(), rank()).flip(1);
  left_ = left_is_smaller ? basis : at::mm(running_, basis);
  right_ = left_is_smaller ? at::mm(running_.t(), basis) : basis;
  decomposition_current_ = true;
}

// Sums over the weight that the closed forms are made of (docs/collaborative-compression.md).
struct RunningLayer::UnitSums {
  double loss, cross, square, next;                                      // I0, A0, B0, T of X
  at::Tensor channel_loss, channel_cross, channel_square, channel_next;  // i, a, b, T's share: C each
  at::Tensor value_cross, value_square, value_next;                      // s P, s R, s^2 Q: r each
};

RunningLayer::UnitSums RunningLayer::unit_sums() {
  decompose();
  const at::Tensor difference = running_ - original_;
  const at::Tensor weighted_difference = weighting_ * difference;
  const at::Tensor weighted_running = weighting_ * running_;
  const at::Tensor left = left_.t();
  const at::Tensor right = right_.t();

  UnitSums sums;
  sums.channel_loss = per_channel(weighted_difference * difference);
  sums.channel_cross = per_channel(weighted_difference * running_).neg_();
  sums.channel_square = per_channel(weighted_running * running_);
  const at::Tensor next = at::mm(left.square(), weighting_).mul_(right.square());
  sums.channel_next = per_channel(next);
  sums.value_next = next.sum(1);
  sums.value_cross = at::mm(left, weighted_difference).mul_(right).sum(1);
  sums.value_square = at::mm(left, weighted_running).mul_(right).sum(1);
  sums.loss = sums.channel_loss.sum().item<double>();
  sums.cross = sums.channel_cross.sum().item<double>();
  sums.square = sums.channel_square.sum().item<double>();
  sums.next = sums.channel_next.sum().item<double>();
  return sums;
}

std::vector<double> RunningLayer::losses_alone() {
  const UnitSums sums = unit_sums();
  std::vector<double> losses = to_vector(sums.loss - sums.channel_loss + channel_dense_);
  const std::vector<double> values = to_vector(sums.loss - 2 * sums.value_cross + sums.value_next);
  losses.insert(losses.end(), values.begin(), values.end());
  return losses;
}

std::vector<double> RunningLayer::scores(const Options& options) {
  const UnitSums sums = unit_sums();
  const double others = static_cast<double>(std::max<int64_t>(channels_left_ + rank() - 1, 1));
  // (E3) with (E4): loss + gamma (loss + (4 cross + square + next) / (m - 1))
  const auto score = [&](const at::Tensor& loss, const at::Tensor& cross, const at::Tensor& square,
                         const at::Tensor& next) {
    return to_vector(loss * (1 + options.gamma) + (4 * cross + square + next) * (options.gamma / others));
  };

  const bool may_prune = options.units != Units::singular_values && channels_left_ > 1;
  const bool may_truncate = options.units != Units::channels && rank() > 1;
  std::vector<double> all(channels_ + rank(), infinity);
  if (may_prune) {
    const at::Tensor next = options.basis == Basis::exact ? next_terms_exact() : sums.next - sums.channel_next;
    const auto channels = score(sums.loss - sums.channel_loss + channel_dense_, sums.cross - sums.channel_cross,
                                sums.square - sums.channel_square, next);
    for (int64_t c = 0; c < channels_; ++c) {
      if (kept_[c]) all[c] = channels[c];
    }
  }
  if (may_truncate) {
    const auto values = score(sums.loss - 2 * sums.value_cross + sums.value_next,
                              sums.cross + sums.value_cross + sums.value_square - sums.value_next,
                              sums.square - 2 * sums.value_square + sums.value_next, sums.next - sums.value_next);
    std::copy(values.begin(), values.end(), all.begin() + channels_);
  }
  return all;
}

at::Tensor RunningLayer::next_terms_exact() {
  const int64_t side = std::min(outputs_, channels_ * kernel_size_);
  const int64_t candidate_bytes = 8 * (3 * side * side + 2 * side * std::max(outputs_, channels_ * kernel_size_));
  const int64_t at_once = std::max<int64_t>(1, (int64_t{256} << 20) / candidate_bytes);
  const std::vector<int64_t> channels = kept_channels();
  at::Tensor terms = at::zeros({channels_}, at::kDouble);
  for (size_t begin = 0; begin < channels.size(); begin += at_once) {
    const auto end = channels.begin() + std::min<int64_t>(begin + at_once, channels.size());
    const at::Tensor candidates = at::tensor(std::vector<int64_t>(channels.begin() + begin, end), at::kLong);
    terms.index_copy_(
        0, candidates,
        outputs_ <= channels_ * kernel_size_ ? next_terms_left(candidates) : next_terms_right(candidates));
  }
  return terms;
}

// Left vectors of X without channel j are the eigenvectors of X X^T - X_j X_j^T.
at::Tensor RunningLayer::next_terms_left(const at::Tensor& candidates) {
  const int64_t count = candidates.numel();
  const at::Tensor blocks = running_.view({outputs_, channels_, kernel_size_}).transpose(0, 1);  // C x N x k
  const at::Tensor removed = blocks.index_select(0, candidates);
  const at::Tensor grams = at::mm(running_, running_.t()) - at::bmm(removed, removed.transpose(1, 2));
  const at::Tensor basis = std::get<1>(at::linalg_eigh(grams)).transpose(1, 2);  // count x N x N, a vector a row
  const at::Tensor projected = at::matmul(basis, running_).square_();            // count x N x Ck
  const at::Tensor terms =
      at::matmul(basis.square(), weighting_).mul_(projected).sum(1).view({count, channels_, kernel_size_}).sum(2);
  return terms.sum(1) - terms.gather(1, candidates.unsqueeze(1)).squeeze(1);
}

// The same through the right vectors, the eigenvectors of X^T X with channel j's rows and columns zeroed.
at::Tensor RunningLayer::next_terms_right(const at::Tensor& candidates) {
  const int64_t count = candidates.numel();
  const int64_t width = channels_ * kernel_size_;
  at::Tensor keep = at::ones({count, channels_, kernel_size_}, at::kDouble);
  keep.scatter_(1, candidates.view({count, 1, 1}).expand({count, 1, kernel_size_}), 0.0);
  keep = keep.view({count, width});
  const at::Tensor grams = at::mm(running_.t(), running_) * keep.unsqueeze(1) * keep.unsqueeze(2);
  const at::Tensor basis = std::get<1>(at::linalg_eigh(grams));                            // count x Ck x Ck
  const at::Tensor projected = at::matmul(running_, keep.unsqueeze(2) * basis).square_();  // count x N x Ck
  return at::matmul(weighting_, basis.square()).mul_(projected).sum({1, 2});
}

void RunningLayer::remove_channel(int64_t channel) {
  running_.narrow(1, channel * kernel_size_, kernel_size_).zero_();
  kept_[channel] = 0;
  removed_channels_.push_back(channel);
  --channels_left_;
  decomposition_current_ = false;
}

void RunningLayer::remove_value(int64_t index) { remove_values({index}); }

void RunningLayer::remove_values(std::vector<int64_t> indices) {
  decompose();
  std::sort(indices.begin(), indices.end());
  std::vector<int64_t> remaining;
  for (int64_t i = 0; i < left_.size(1); ++i) {
    if (!std::binary_search(indices.begin(), indices.end(), i)) remaining.push_back(i);
  }
  const at::Tensor removed = at::tensor(indices, at::kLong);
  const at::Tensor kept = at::tensor(remaining, at::kLong);
  values_left_ = rank() - static_cast<int64_t>(indices.size());
  running_ -= at::mm(left_.index_select(1, removed), right_.index_select(1, removed).t());
  // What is left has the same singular vectors.
  left_ = left_.index_select(1, kept);
  right_ = right_.index_select(1, kept);
  removed_values_ = true;
}

}  // namespace cctorch::collaborative
