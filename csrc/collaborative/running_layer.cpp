#include "csrc/collaborative/running_layer.h"

#include <ATen/ATen.h>

#include <algorithm>
#include <limits>
#include <numeric>
#include <utility>

namespace cctorch::collaborative {

namespace {

constexpr double infinity = std::numeric_limits<double>::infinity();
constexpr double least_share = 0.01, largest_share = 0.125;
constexpr int64_t largest_in_double = 2048;
// N x C x k... to Ck x N, never the caller's memory.
at::Tensor unfold(const at::Tensor& weight, const at::TensorOptions& options) {
  const at::Tensor matrix = weight.detach().reshape({weight.size(0), -1}).t();
  return at::empty(matrix.sizes(), options).copy_(matrix);
}

double scale_of(const at::Tensor& tensor) {
  const auto largest = tensor.detach().abs().max().item<double>();
  return largest > 0 ? largest : 1.0;
}

at::Tensor scaled(const at::Tensor& weight, double scale, const at::TensorOptions& options) {
  return unfold(weight, options.dtype(at::kDouble)).div_(scale).to(options);
}

double total(const at::Tensor& values) { return values.sum().item<double>(); }

std::vector<double> to_vector(const at::Tensor& values) {
  const at::Tensor dense = values.cpu().contiguous();
  return {dense.const_data_ptr<double>(), dense.const_data_ptr<double>() + dense.numel()};
}

// What is left of 0 ... count - 1.
std::vector<int64_t> others(const std::vector<int64_t>& sorted, int64_t count) {
  std::vector<int64_t> rest;
  for (int64_t i = 0; i < count; ++i) {
    if (!std::binary_search(sorted.begin(), sorted.end(), i)) rest.push_back(i);
  }
  return rest;
}

}  // namespace

double ranking_macs(int64_t inputs, int64_t outputs, int64_t rank) {
  const auto m = static_cast<double>(inputs), n = static_cast<double>(outputs), r = static_cast<double>(rank);
  // The sums, the Gram matrix in float64, both factors' turns, and an eigenproblem, which products of 12 r^3 take as
  // long as.
  return r * (3 * m * n + r * (2 * m + m + n + 12 * r));
}

double ranking_share(double macs, const Options& options) {
  const double share = options.basis == Basis::exact ? 0.0 : macs / options.effort;
  return share < least_share ? 0.0 : std::min(share, largest_share);
}

double ranking_macs(const LayerSpec& spec) {
  const int64_t inputs = spec.in_channels * spec.kernel_size();
  return ranking_macs(inputs, spec.out_channels, std::min(inputs, spec.out_channels));
}

RunningLayer::RunningLayer(const at::Tensor& weight, const at::Tensor& gradient, const Options& options)
    : outputs_(weight.size(0)),
      channels_(weight.size(1)),
      kernel_size_(weight.numel() / (outputs_ * channels_)),
      full_rank_(std::min(outputs_, channels_ * kernel_size_)),
      values_left_(full_rank_),
      kept_(channels_),
      options_(options),
      matrices_(at::device(share() > 0 ? weight.device() : at::Device(at::kCPU))
                    .dtype(options.basis == Basis::exact ? at::kDouble : at::kFloat)),
      weight_scale_(scale_of(weight)),
      gradient_scale_(scale_of(gradient)),
      original_(scaled(weight, weight_scale_, matrices_)),
      weighting_(scaled(gradient, gradient_scale_, matrices_).square_()),
      running_(original_) {
  std::iota(kept_.begin(), kept_.end(), 0);
  channel_dense_ = per_channel(weighting_ * original_ * original_);
}

RunningLayer::RunningLayer(const at::Tensor& weight, const at::Tensor& gradient, const at::Tensor& running,
                           int64_t rank, const Options& options)
    : RunningLayer(weight, gradient, options) {
  running_ = scaled(running, weight_scale_, matrices_);
  const std::vector<double> magnitude = to_vector(per_channel(running_.abs()));
  std::vector<int64_t> empty;
  for (int64_t c = 0; c < channels_; ++c) {
    if (!(magnitude[c] > 0)) empty.push_back(c);
  }
  remove_channels(empty);
  values_left_ = rank;
  removed_values_ = rank < full_rank_;
}

int64_t RunningLayer::units(Units kind) const {
  return (kind == Units::singular_values ? 0 : channels_) + (kind == Units::channels ? 0 : full_rank_);
}

int64_t RunningLayer::units_left(Units kind) const {
  return (kind == Units::singular_values ? 0 : channels_left()) + (kind == Units::channels ? 0 : rank());
}

int64_t RunningLayer::rank() const { return std::min(values_left_, channels_left() * kernel_size_); }

int64_t RunningLayer::macs() const {
  if (!removed_values_) return pruned_macs();
  return (channels_left() * kernel_size_ + outputs_) * rank();
}

double RunningLayer::share() const {
  return ranking_share(ranking_macs(channels_left() * kernel_size_, outputs_, rank()), options_);
}

at::Tensor RunningLayer::index_of(const std::vector<int64_t>& positions) const {
  return at::tensor(positions, at::kLong).to(matrices_.device());
}

at::Tensor RunningLayer::per_channel(const at::Tensor& matrix) const {
  return matrix.sum(1).to(at::kDouble).view({-1, kernel_size_}).sum(1);
}

std::vector<double> RunningLayer::to_all(const at::Tensor& kept, double removed) const {
  std::vector<double> all(channels_, removed);
  const std::vector<double> values = to_vector(kept);
  for (size_t p = 0; p < kept_.size(); ++p) all[kept_[p]] = values[p];
  return all;
}

double RunningLayer::loss() const {
  const double remaining = total(per_channel((running_ - original_).square_().mul_(weighting_)));
  return loss_scale() * (removed_loss_ + remaining);
}

double RunningLayer::largest_loss() const { return loss_scale() * (removed_loss_ + total(channel_dense_)); }

// X's factors with an orthonormal side, not yet singular triplets.
void RunningLayer::factor() {
  if (outputs_ <= channels_left() * kernel_size_) {
    left_ = at::eye(outputs_, matrices_);
    right_ = running_;
  } else {
    const auto [orthonormal, triangle] = at::linalg_qr(running_.t(), "reduced");
    left_ = orthonormal;
    right_ = triangle.t();
  }
}

bool RunningLayer::basis_serves() const {
  if (decomposition_current_) return true;
  return share() > 0 && squares_gone_ < 0.5 * basis_squares_ && left_.size(1) == rank();
}

void RunningLayer::decompose() {
  if (basis_serves()) return;
  if (!left_.defined()) factor();
  // float32 sees no value below 3e-4 of the largest. Where float64 takes long, those may be any directions: they lose
  // nothing.
  const at::Tensor right = right_.size(1) > largest_in_double ? right_ : right_.to(at::kDouble);
  const at::Tensor gram = at::mm(right.t(), right);
  const at::Tensor vectors = std::get<1>(at::linalg_eigh(gram));
  // Ascending eigenvalues: the last rank() columns, reversed, belong to the largest singular values.
  const at::Tensor turn = vectors.narrow(1, vectors.size(1) - rank(), rank()).flip(1).to(matrices_);
  left_ = at::mm(left_, turn);
  right_ = at::mm(right_, turn);
  decomposition_current_ = true;
  basis_squares_ = share() > 0 ? total(gram.diagonal()) : 0.0;
  squares_gone_ = 0;
  next_terms_ = at::Tensor();
}

// Sums over the weight that the closed forms are made of (docs/collaborative-compression.md).
struct RunningLayer::UnitSums {
  double loss, cross, square, next;                                      // I0, A0, B0, T of X
  at::Tensor channel_loss, channel_cross, channel_square, channel_next;  // i, a, b, T's share: C' each
  at::Tensor value_cross, value_square, value_next;                      // s P, s R, s^2 Q: r each
};

// On the CPU in blocks of channels that stay in the cache between the passes over them.
RunningLayer::UnitSums RunningLayer::unit_sums(bool of_values) {
  const bool wide = share() > 0, intact = running_.is_same(original_);
  const bool of_next = of_values || !wide;  // T alone is not worth the singular vectors of a wide layer
  if (of_next) decompose();
  const at::Tensor left_square = of_next ? left_.square() : at::Tensor();
  const bool next_known = next_terms_.defined();
  if (of_next && wide && !next_known) next_terms_ = at::empty_like(right_);
  const int64_t rows_at_once = std::max<int64_t>(256, (int64_t{1} << 16) / outputs_);
  const int64_t at_once =
      matrices_.device().is_cpu() ? std::max<int64_t>(1, rows_at_once / kernel_size_) : channels_left();
  UnitSums sums{};
  sums.value_next = sums.value_cross = sums.value_square =
      at::zeros({of_next ? right_.size(1) : 0}, matrices_.dtype(at::kDouble));
  std::vector<at::Tensor> loss, cross, square, next;
  for (int64_t begin = 0; begin < channels_left(); begin += at_once) {
    const int64_t end = std::min(begin + at_once, channels_left());
    const auto block = [&](const at::Tensor& matrix) {
      return matrix.narrow(0, begin * kernel_size_, (end - begin) * kernel_size_);
    };
    const at::Tensor running = block(running_), weighting = block(weighting_);
    const at::Tensor difference = running - block(original_);
    const at::Tensor weighted_difference = weighting * difference;
    const at::Tensor weighted_running = weighting * running;
    square.push_back(per_channel(weighted_running * running));
    cross.push_back(per_channel(weighted_difference * running).neg_());
    loss.push_back(per_channel(weighted_difference * difference));
    if (!of_next) {
      next.push_back(at::zeros_like(loss.back()));
      continue;
    }
    const at::Tensor right = block(right_);
    const at::Tensor next_terms = next_known ? block(next_terms_) : at::mm(weighting, left_square).mul_(right.square());
    if (wide && !next_known) block(next_terms_).copy_(next_terms);
    next.push_back(per_channel(next_terms));
    if (!of_values) continue;
    sums.value_next = sums.value_next + next_terms.sum(0);
    if (!intact) sums.value_cross = sums.value_cross + at::mm(weighted_difference, left_).mul_(right).sum(0);
    if (!wide) sums.value_square = sums.value_square + at::mm(weighted_running, left_).mul_(right).sum(0);
  }
  if (wide) sums.value_square = sums.value_next;
  sums.channel_loss = at::cat(loss);
  sums.channel_cross = at::cat(cross);
  sums.channel_square = at::cat(square);
  sums.channel_next = at::cat(next);
  sums.loss = removed_loss_ + total(sums.channel_loss);
  sums.cross = total(sums.channel_cross);
  sums.square = total(sums.channel_square);
  sums.next = total(sums.channel_next);
  return sums;
}

std::vector<double> RunningLayer::losses_alone(bool of_values) {
  const UnitSums sums = unit_sums(of_values);
  const double scale = loss_scale();
  std::vector<double> losses = to_all(scale * (sums.loss - sums.channel_loss + channel_dense_), scale * sums.loss);
  if (!of_values) return losses;
  const std::vector<double> values = to_vector(scale * (sums.loss - 2 * sums.value_cross + sums.value_next));
  losses.insert(losses.end(), values.begin(), values.end());
  return losses;
}

std::vector<double> RunningLayer::scores(const Options& options) {
  if (kept_.empty()) return std::vector<double>(channels_, infinity);
  const bool may_prune = options.units != Units::singular_values && channels_left() > 1;
  const bool may_truncate = options.units != Units::channels && rank() > 1;
  const UnitSums sums = unit_sums(may_truncate);
  const auto others = static_cast<double>(std::max<int64_t>(channels_left() + rank() - 1, 1));
  // (E3) with (E4): loss + gamma (loss + (4 cross + square + next) / (m - 1))
  const auto score = [&](const at::Tensor& loss, const at::Tensor& cross, const at::Tensor& square,
                         const at::Tensor& next) {
    const at::Tensor relative = loss * (1 + options.gamma) + (4 * cross + square + next) * (options.gamma / others);
    return relative * loss_scale();
  };

  std::vector<double> all(channels_, infinity);
  if (may_prune) {
    const at::Tensor next = options.basis == Basis::exact ? next_terms_exact() : sums.next - sums.channel_next;
    all = to_all(score(sums.loss - sums.channel_loss + channel_dense_, sums.cross - sums.channel_cross,
                       sums.square - sums.channel_square, next),
                 infinity);
  }
  all.resize(channels_ + rank(), infinity);
  if (may_truncate) {
    const auto values =
        to_vector(score(sums.loss - 2 * sums.value_cross + sums.value_next,
                        sums.cross + sums.value_cross + sums.value_square - sums.value_next,
                        sums.square - 2 * sums.value_square + sums.value_next, sums.next - sums.value_next));
    std::copy(values.begin(), values.end(), all.begin() + channels_);
  }
  return all;
}

// The left vectors of X without channel j are left times the eigenvectors of right^T right - right_j^T right_j.
at::Tensor RunningLayer::next_terms_exact() {
  const int64_t rank = right_.size(1);
  const int64_t candidate_bytes = 8 * (3 * rank * rank + 2 * rank * (outputs_ + right_.size(0)));
  const int64_t at_once = std::max<int64_t>(1, (int64_t{256} << 20) / candidate_bytes);
  const at::Tensor gram = at::mm(right_.t(), right_);
  const at::Tensor blocks = right_.view({channels_left(), kernel_size_, rank});
  std::vector<at::Tensor> terms;
  for (int64_t begin = 0; begin < channels_left(); begin += at_once) {
    const int64_t count = std::min(at_once, channels_left() - begin);
    const at::Tensor removed = blocks.narrow(0, begin, count);
    const at::Tensor turn = std::get<1>(at::linalg_eigh(gram - at::bmm(removed.transpose(1, 2), removed)));
    const at::Tensor next = at::matmul(weighting_, at::matmul(left_, turn).square_())
                                .mul_(at::matmul(right_, turn).square_())
                                .sum(2)
                                .view({count, channels_left(), kernel_size_})
                                .sum(2);
    terms.push_back(next.sum(1) - next.diagonal(begin, 0, 1));
  }
  return at::cat(terms);
}

void RunningLayer::remove_channels(const std::vector<int64_t>& channels) {
  if (channels.empty()) return;
  std::vector<int64_t> positions;
  for (const int64_t channel : channels) {
    positions.push_back(std::lower_bound(kept_.begin(), kept_.end(), channel) - kept_.begin());
  }
  std::sort(positions.begin(), positions.end());
  if (basis_squares_ > 0) {
    const at::Tensor rows = right_.view({channels_left(), -1}).index_select(0, index_of(positions));
    squares_gone_ += total(rows.square_().sum(1).to(at::kDouble));
  }
  removed_loss_ += channel_dense_.index_select(0, index_of(positions)).sum().item<double>();
  keep_channels(others(positions, channels_left()));
  removed_channels_.insert(removed_channels_.end(), channels.begin(), channels.end());
  decomposition_current_ = false;
}

void RunningLayer::keep_channels(const std::vector<int64_t>& positions) {
  const at::Tensor index = index_of(positions);
  const auto keep = [&](at::Tensor& matrix) {
    matrix = matrix.view({channels_left(), kernel_size_, matrix.size(1)}).index_select(0, index).flatten(0, 1);
  };
  const bool intact = running_.is_same(original_);
  keep(original_);
  keep(weighting_);
  if (intact) {
    running_ = original_;
  } else {
    keep(running_);
  }
  if (right_.defined()) keep(right_);
  if (next_terms_.defined()) keep(next_terms_);
  channel_dense_ = channel_dense_.index_select(0, index);
  std::vector<int64_t> kept;
  for (const int64_t position : positions) kept.push_back(kept_[position]);
  kept_ = std::move(kept);
}

void RunningLayer::remove_values(std::vector<int64_t> indices) {
  decompose();
  std::sort(indices.begin(), indices.end());
  const at::Tensor removed = index_of(indices);
  const at::Tensor kept = index_of(others(indices, left_.size(1)));
  values_left_ = rank() - static_cast<int64_t>(indices.size());
  running_ = at::addmm(running_, right_.index_select(1, removed), left_.index_select(1, removed).t(), 1, -1);
  // What is left has the same singular vectors.
  left_ = left_.index_select(1, kept);
  right_ = right_.index_select(1, kept);
  if (next_terms_.defined()) next_terms_ = next_terms_.index_select(1, kept);
  removed_values_ = true;
}

}  // namespace cctorch::collaborative
