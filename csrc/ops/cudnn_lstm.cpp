#include "csrc/ops/cudnn_lstm.h"

#include <ATen/autocast_mode.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/_cudnn_rnn.h>
#include <ATen/ops/cudnn_is_acceptable.h>
#include <ATen/ops/linear.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/tensor.h>
#include <ATen/ops/zeros.h>
#include <c10/core/GradMode.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <c10/core/impl/TorchDispatchModeTLS.h>
#include <c10/util/Exception.h>

#ifdef CCTORCH_CUDA_BUILT
#include <c10/cuda/CUDAGraphsC10Utils.h>
#endif

#include <algorithm>
#include <initializer_list>

namespace cctorch {
namespace {

constexpr int64_t lstm = 2;  // cuDNN's CUDNN_LSTM

// Of so many elements at most is the matrix of the recurrence, if not given as such: on an H100 the factors win at 4096
// states, not at 2048, and without gradients at 2048, not at 1024.
constexpr int64_t largest_trained = int64_t{1} << 24, largest_run = int64_t{1} << 23;

// Tensors that stand for others: of torch.func, of a tracer, or with a tangent.
bool stands_for_others(const at::Tensor& tensor) {
  static const c10::DispatchKeySet keys{c10::DispatchKey::Python, c10::DispatchKey::FuncTorchBatched,
                                        c10::DispatchKey::FuncTorchGradWrapper, c10::DispatchKey::Functionalize};
  return tensor.key_set().has_any(keys) || tensor._fw_grad(/*level=*/0).defined();
}

bool seen_through() {
  using c10::impl::tls_is_dispatch_key_included;
  return c10::impl::TorchDispatchModeTLS::any_modes_set() ||
         tls_is_dispatch_key_included(c10::DispatchKey::FuncTorchDynamicLayerFrontMode) ||
         tls_is_dispatch_key_included(c10::DispatchKey::FuncTorchDynamicLayerBackMode);
}

std::vector<at::Tensor> all_of(std::initializer_list<at::Tensor> states, std::initializer_list<at::TensorList> weights,
                               std::initializer_list<std::optional<at::Tensor>> biases) {
  std::vector<at::Tensor> all = states;
  for (const at::TensorList weight : weights) all.insert(all.end(), weight.begin(), weight.end());
  for (const auto& bias : biases) {
    if (bias) all.push_back(*bias);
  }
  return all;
}

// The type in which the products are made: all tensors', or autocast's. None where it is not one.
std::optional<at::ScalarType> type_of_products(const std::vector<at::Tensor>& given) {
  const at::Tensor& x = given.front();
  const bool autocast = at::autocast::is_autocast_enabled(at::kCUDA) && x.scalar_type() != at::kDouble;
  const at::ScalarType type = autocast ? at::autocast::get_autocast_dtype(at::kCUDA) : x.scalar_type();
  const bool alike = std::ranges::all_of(given, [&](const at::Tensor& tensor) {
    const at::ScalarType its = tensor.scalar_type();
    return tensor.device() == x.device() && (autocast ? its != at::kDouble : its == type);
  });
  return alike ? std::optional(type) : std::nullopt;
}

std::vector<at::Tensor> cast(at::TensorList weight, at::ScalarType type) {
  std::vector<at::Tensor> factors;
  for (const at::Tensor& factor : weight) factors.push_back(factor.to(type));
  return factors;
}

at::Tensor whole(at::TensorList weight, at::ScalarType type) {
  const std::vector<at::Tensor> factors = cast(weight, type);
  return factors.size() == 1 ? factors[0] : at::mm(factors[1], factors[0]);
}

// In cuDNN's order; it has both biases or none.
std::vector<at::Tensor> matrices(const at::Tensor& weight_ih, at::TensorList weight_hh, at::TensorList weight_hr,
                                 const std::optional<at::Tensor>& bias_ih, const std::optional<at::Tensor>& bias_hh) {
  const at::ScalarType type = weight_ih.scalar_type();
  std::vector<at::Tensor> all{weight_ih, whole(weight_hh, type)};
  if (bias_ih || bias_hh) {
    const at::Tensor none = bias_ih && bias_hh ? at::Tensor() : at::zeros({weight_ih.size(0)}, weight_ih.options());
    for (const auto& bias : {bias_ih, bias_hh}) all.push_back(bias ? bias->to(type) : none);
  }
  if (!weight_hr.empty()) all.push_back(whole(weight_hr, type));
  return all;
}

// PyTorch warns, at each call, of weights that are not one piece of memory. Products are made at each call.
class Unheard : public c10::WarningHandler {
 public:
  void process(const c10::Warning& /*warning*/) override {}
};

// A copy from the host can't be recorded.
bool is_recorded_in_a_graph() {
#ifdef CCTORCH_CUDA_BUILT
  return c10::cuda::currentStreamCaptureStatusMayInitCtx() != c10::cuda::CaptureStatus::None;
#else
  return true;  // unknown
#endif
}

// Of the rows of a packed sequence, each example's backwards. The same order leads back.
at::Tensor backwards(const std::vector<int64_t>& batch_sizes, const at::Tensor& x) {
  std::vector<int64_t> starts(batch_sizes.size()), lengths(static_cast<size_t>(batch_sizes.front())), rows;
  for (size_t t = 1; t < starts.size(); ++t) starts[t] = starts[t - 1] + batch_sizes[t - 1];
  for (const int64_t size : batch_sizes) {
    for (int64_t example = 0; example < size; ++example) ++lengths[static_cast<size_t>(example)];
  }
  for (int64_t t = 0; t < static_cast<int64_t>(batch_sizes.size()); ++t) {
    for (int64_t example = 0; example < batch_sizes[static_cast<size_t>(t)]; ++example) {
      rows.push_back(starts[static_cast<size_t>(lengths[static_cast<size_t>(example)] - 1 - t)] + example);
    }
  }
  return at::tensor(rows).to(x.device(), /*dtype=*/at::kLong, /*non_blocking=*/true);
}

}  // namespace

std::optional<std::tuple<at::Tensor, at::Tensor, at::Tensor>> cudnn_lstm(
    const at::Tensor& x, const at::Tensor& h, const at::Tensor& c, at::TensorList weight_ih, at::TensorList weight_hh,
    at::TensorList weight_hr, const std::optional<at::Tensor>& bias_ih, const std::optional<at::Tensor>& bias_hh,
    const std::vector<int64_t>& batch_sizes, bool reverse) {
  if (!x.is_cuda() || seen_through()) return std::nullopt;
  const auto given = all_of({x, h, c}, {weight_ih, weight_hh, weight_hr}, {bias_ih, bias_hh});
  if (std::ranges::any_of(given, [](const at::Tensor& t) { return stands_for_others(t) || t.numel() == 0; })) {
    return std::nullopt;
  }
  const bool ordered = reverse && !batch_sizes.empty();
  if (ordered && is_recorded_in_a_graph()) return std::nullopt;
  const bool train = c10::GradMode::is_enabled() &&
                     std::ranges::any_of(given, [](const at::Tensor& tensor) { return tensor.requires_grad(); });
  const int64_t largest = train ? largest_trained : largest_run;
  if (weight_hh.size() > 1 && weight_hh[1].size(0) * weight_hh[0].size(1) > largest) return std::nullopt;
  if (!weight_hr.empty() && h.size(1) >= c.size(1)) return std::nullopt;  // cuDNN's projections are narrower
  const auto type = type_of_products(given);
  if (!type) return std::nullopt;
  const at::Tensor read = x.to(*type);
  if (!at::cudnn_is_acceptable(read)) return std::nullopt;

  const c10::impl::ExcludeDispatchKeyGuard no_autocast(at::autocast_dispatch_keyset);
  const std::vector<at::Tensor> of_inputs = cast(weight_ih, *type);
  const at::Tensor narrow = of_inputs.size() == 1 ? read : at::linear(read, of_inputs[0]);
  const auto weights = matrices(of_inputs.back(), weight_hh, weight_hr, bias_ih, bias_hh);
  const at::Tensor order = ordered ? backwards(batch_sizes, x) : at::Tensor();
  const auto turned = [&](const at::Tensor& rows) {
    if (!reverse) return rows;
    return order.defined() ? rows.index_select(0, order) : rows.flip(0);
  };
  Unheard unheard;
  const c10::WarningUtils::WarningHandlerGuard guard(&unheard);
  const auto [y, last_h, last_c, reserve, buffer] =
      at::_cudnn_rnn(turned(narrow), weights, static_cast<int64_t>(weights.size()), /*weight_buf=*/std::nullopt,
                     h.to(*type).unsqueeze(0).contiguous(), c.to(*type).unsqueeze(0).contiguous(), lstm, c.size(1),
                     weight_hr.empty() ? 0 : h.size(1), /*num_layers=*/1, /*batch_first=*/false, /*dropout=*/0.0, train,
                     /*bidirectional=*/false, batch_sizes, /*dropout_state=*/std::nullopt);
  return std::tuple(turned(y), last_h.squeeze(0), last_c.squeeze(0));
}

}  // namespace cctorch
