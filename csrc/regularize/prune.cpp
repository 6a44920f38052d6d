#include <ATen/ATen.h>
#include <cctorch/mask.h>
#include <cctorch/regularizers.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <map>
#include <numeric>
#include <span>
#include <utility>

#include "csrc/ops/cpu/channelwise.h"
#include "csrc/ops/cpu/select.h"
#include "csrc/ops/mask.h"
#include "csrc/regularize/norms.h"
#include "csrc/regularize/prune.h"
#include "csrc/regularize/rewrite.h"

namespace cctorch::regularize {

namespace {

void check_sparsity(const char* who, double sparsity) {
  TORCH_CHECK_VALUE(0 <= sparsity && sparsity <= 1, who, ": sparsity = ", sparsity,
                    ", expected the fraction of weights to remove, 0 to 1");
}

// Zeros stay where a quantization put them or an earlier pruning, so the smaller number of values counts. Of two
// prunings, one bit for each weight says as well what both leave.
void pruned(Weight& weight, int64_t kept, int64_t index_bits) {
  Storage& storage = weight.storage;
  if (storage.factored) {
    const bool inputs_pruned = storage.inputs_pruned;
    storage = Storage::dense(weight.value);
    storage.inputs_pruned = inputs_pruned;
  }
  storage.values = std::min(storage.values, kept);
  const bool first = storage.index_bits == 0;
  storage.index_bits += index_bits;
  if (!first) storage.index_bits = std::min(storage.index_bits, weight.value.numel());
}

// Of each tensor, all of one type on one device.
std::vector<int64_t> nonzeros(at::TensorList tensors) {
  std::vector<int64_t> counts(tensors.size());
  if (!tensors[0].is_cpu()) {
    // A few launches for all of them; float64 counts exactly.
    const at::Tensor all = at::stack(at::_foreach_norm(at::_foreach_sign(tensors), 1, at::kDouble)).cpu();
    std::copy_n(all.const_data_ptr<double>(), counts.size(), counts.begin());
    return counts;
  }
  with_bits(tensors[0].scalar_type(), [&](auto bits) {
    using Bits = decltype(bits);
    const auto count = cpu::select::loops<Bits>().nonzero;
    at::parallel_for(0, static_cast<int64_t>(tensors.size()), 1, [&](int64_t first, int64_t last) {
      for (int64_t i = first; i < last; ++i) {
        const auto* values = static_cast<const Bits*>(tensors[i].const_data_ptr());
        const int64_t size = tensors[i].numel();
        for (int64_t begin = 0; begin < size; begin += simd::kMostMagnitudes) {
          counts[i] += count(values + begin, std::min(simd::kMostMagnitudes, size - begin));
        }
      }
    });
  });
  return counts;
}

// `kept` and `index_bits` are of a weight that nothing has pruned yet; else the slices or groups that are kept hold
// zeros, and what is left has to be counted.
struct Pruned {
  Weight* weight;
  int64_t kept, index_bits;
};

void pruned(const std::vector<Pruned>& all) {
  std::map<at::ScalarType, std::vector<Pruned>> again;
  for (const Pruned& each : all) {
    if (each.weight->storage.index_bits > 0) {
      again[each.weight->value.scalar_type()].push_back(each);
    } else {
      pruned(*each.weight, each.kept, each.index_bits);
    }
  }
  for (const auto& [type, members] : again) {
    std::vector<at::Tensor> values;
    for (const Pruned& each : members) values.push_back(each.weight->value);
    const std::vector<int64_t> left = nonzeros(values);
    for (size_t i = 0; i < members.size(); ++i) pruned(*members[i].weight, left[i], members[i].index_bits);
  }
}

void keep_largest(std::span<Weight> weights, double sparsity) {
  std::vector<at::Tensor> values;
  for (const Weight& weight : weights) values.push_back(weight.value);
  values = magnitude_prune(values, sparsity);
  const std::vector<int64_t> kept = nonzeros(values);
  for (size_t i = 0; i < weights.size(); ++i) {
    weights[i].value = values[i];
    pruned(weights[i], kept[i], values[i].numel());
  }
}

}  // namespace

MagnitudePruning::MagnitudePruning(double sparsity, Scope scope) : sparsity_(sparsity), scope_(scope) {
  check_sparsity("MagnitudePruning", sparsity);
}

void MagnitudePruning::check_shapes(const NamedParameters& selected) const {
  if (scope_ == Scope::layer || selected.empty()) return;
  const auto& [first_name, first] = selected.front();
  for (const auto& [name, parameter] : selected) {
    TORCH_CHECK_VALUE(parameter.scalar_type() == first.scalar_type(), "MagnitudePruning: parameter '", name, "' is ",
                      parameter.scalar_type(), " but '", first_name, "' is ", first.scalar_type(),
                      ", expected one type where all are ranked together; use the scope of a layer");
  }
}

void MagnitudePruning::replace(std::vector<Weight>& weights) {
  if (scope_ == Scope::global) {
    keep_largest(weights, sparsity_);
  } else {
    for (Weight& weight : weights) keep_largest({&weight, 1}, sparsity_);
  }
}

NMPruning::NMPruning(int64_t n, int64_t m, int64_t axis) : n_(n), m_(m), axis_(axis) {
  TORCH_CHECK_VALUE(1 <= n && n <= m, "NMPruning: n = ", n, " and m = ", m, ", expected 1 <= n <= m");
}

void NMPruning::check_shapes(const NamedParameters& selected) const {
  for (const auto& [name, parameter] : selected) {
    TORCH_CHECK_VALUE(-parameter.dim() <= axis_ && axis_ < parameter.dim() && parameter.size(axis_) % m_ == 0,
                      "NMPruning: parameter '", name, "' has shape ", parameter.sizes(), ", expected a dimension ",
                      axis_, " that is a multiple of m = ", m_, "; leave it out or choose another m");
  }
}

void NMPruning::replace(std::vector<Weight>& weights) {
  const int64_t bits_per_position = n_ == m_ ? 0 : static_cast<int64_t>(std::bit_width(static_cast<uint64_t>(m_ - 1)));
  std::map<at::ScalarType, std::vector<Weight*>> by_type;
  std::vector<Pruned> all;
  for (Weight& weight : weights) by_type[weight.value.scalar_type()].push_back(&weight);
  for (const auto& [type, members] : by_type) {
    std::vector<at::Tensor> values;
    for (const Weight* weight : members) values.push_back(weight->value);
    const auto masks = nm_masks(values, n_, m_, axis_);
    for (size_t i = 0; i < members.size(); ++i) {
      const int64_t kept = values[i].numel() / m_ * n_;
      members[i]->value = apply_mask(values[i], masks[i]);
      all.push_back({members[i], kept, kept * bits_per_position});
    }
  }
  pruned(all);
}

ChannelPruning::ChannelPruning(double sparsity, int64_t axis) : sparsity_(sparsity), axis_(axis) {
  check_sparsity("ChannelPruning", sparsity);
}

void ChannelPruning::check_shapes(const NamedParameters& selected) const {
  for (const auto& [name, parameter] : selected) {
    TORCH_CHECK_VALUE(-parameter.dim() <= axis_ && axis_ < parameter.dim(), "ChannelPruning: parameter '", name,
                      "' has shape ", parameter.sizes(), ", expected a dimension ", axis_, "; leave it out");
  }
}

namespace {

// What channel_masks keeps of one weight.
std::vector<bool> best_slices(const std::vector<double>& squares, int64_t kept) {
  std::vector<size_t> order(squares.size());
  std::iota(order.begin(), order.end(), 0);
  std::vector<double> norms;
  for (const double square : squares) norms.push_back(std::sqrt(square));
  std::nth_element(order.begin(), order.begin() + (kept - 1), order.end(),
                   [&](size_t a, size_t b) { return norms[a] > norms[b] || (norms[a] == norms[b] && a < b); });
  std::vector<bool> best(squares.size());
  for (int64_t i = 0; i < kept; ++i) best[order[i]] = true;
  return best;
}

void keep_best_on_cpu(Weight& weight, int64_t axis, int64_t kept) {
  const bool known = !weight.squares.empty() && weight.sliced_dimension == axis;
  const auto squares = known ? weight.squares : part_squares({weight.value}, axis)[0];
  auto keep = best_slices(squares, kept);
  const at::Tensor dense_value = dense(weight.value);
  const auto layout = channelwise::layout(dense_value, axis < 0 ? axis + dense_value.dim() : axis);
  if (channelwise::has_long_rows(layout)) {
    weight.value = dense_value;
    const int64_t bytes = dense_value.element_size();
    weight.rewrite = {layout.inner,
                      [keep = std::move(keep), squares, layout, bytes](const void*, void* to, int64_t begin,
                                                                       int64_t size) -> std::optional<double> {
                        const int64_t channel = begin / layout.inner % layout.channels;
                        if (keep[channel]) return 0;
                        std::memset(to, 0, size * bytes);
                        // A square that underflowed does not say that they are zeros.
                        return layout.outer == 1 && squares[channel] > 0 ? std::optional(squares[channel])
                                                                         : std::nullopt;
                      }};
  } else {
    std::vector<int64_t> shape(dense_value.dim(), 1);
    shape[axis < 0 ? axis + dense_value.dim() : axis] = static_cast<int64_t>(keep.size());
    const at::Tensor mask = at::empty({static_cast<int64_t>(keep.size())}, at::kBool);
    std::copy(keep.begin(), keep.end(), mask.mutable_data_ptr<bool>());
    weight.value = apply_mask(weight.value, mask.view(shape).expand_as(weight.value));
  }
  // A mask of another pruning is on it, so that what is left of it has to be counted.
  if (weight.storage.index_bits > 0) finish(weight);
}

}  // namespace

at::Tensor keep_best_slices(const at::Tensor& weights, int64_t axis, int64_t kept) {
  const at::Tensor norms =
      at::linalg_vector_norm(weights.movedim(axis + 1, 1).flatten(2), 2, {-1}, /*keepdim=*/false, at::kDouble);
  const at::Tensor order = std::get<1>(at::sort(norms, /*stable=*/true, /*dim=*/-1, /*descending=*/true));
  std::vector<int64_t> shape(weights.dim(), 1);
  shape[0] = weights.size(0);
  shape[axis + 1] = weights.size(axis + 1);
  const at::Tensor keep =
      at::zeros(norms.sizes(), norms.options().dtype(at::kBool)).scatter_(-1, order.narrow(-1, 0, kept), true);
  return at::where(keep.view(shape), weights, at::zeros({}, weights.options()));
}

void ChannelPruning::replace(std::vector<Weight>& weights) {
  const auto kept_of = [&](int64_t channels) { return std::max<int64_t>(1, kept_count(sparsity_, channels)); };
  // On a device a launch for each weight takes longer than its work.
  std::map<std::pair<at::ScalarType, std::vector<int64_t>>, std::vector<Weight*>> groups;
  std::vector<Pruned> all;
  for (Weight& weight : weights) {
    const int64_t channels = weight.value.size(axis_);
    all.push_back({&weight, weight.value.numel() / channels * kept_of(channels), channels});
    if (weight.value.is_cpu()) {
      keep_best_on_cpu(weight, axis_, kept_of(channels));
    } else {
      groups[{weight.value.scalar_type(), weight.value.sizes().vec()}].push_back(&weight);
    }
  }
  for (const auto& [kind, members] : groups) {
    std::vector<at::Tensor> parts;
    for (const Weight* weight : members) parts.push_back(weight->value);
    const int64_t axis = axis_ < 0 ? axis_ + parts[0].dim() : axis_;
    const auto values = keep_best_slices(at::stack(parts), axis, kept_of(parts[0].size(axis))).unbind();
    for (size_t i = 0; i < members.size(); ++i) members[i]->value = values[i];
  }
  pruned(all);
  for (Weight& weight : weights) {
    const int64_t axis = axis_ < 0 ? axis_ + weight.value.dim() : axis_;
    weight.storage.inputs_pruned = weight.storage.inputs_pruned || axis == 1;
  }
}

}  // namespace cctorch::regularize
