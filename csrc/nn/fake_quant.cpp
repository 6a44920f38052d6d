#include <cctorch/fake_quant.h>
#include <cctorch/nn/modules.h>
#include <cctorch/quant_range.h>
#include <torch/serialize/input-archive.h>
#include <torch/types.h>

#include <cmath>
#include <limits>
#include <ostream>
#include <tuple>
#include <utility>
#include <vector>

namespace cctorch::nn {

namespace {

// Added to the logarithm of a scale that comes from a range: the largest value is the end of the grid then, and would
// be clipped or not by its last bit, in which ranks of a run, or devices, may differ.
constexpr double inside = 1e-6;

// The type of the scales of `x`.
at::ScalarType kind(const at::Tensor& x) { return c10::promoteTypes(x.scalar_type(), at::kFloat); }

// Of the values where `counted` is 1; the others are 0.
at::Tensor mean_magnitude(const at::Tensor& x, const at::Tensor& counted, std::optional<int64_t> axis,
                          int64_t channels) {
  if (!axis) return x.abs().sum() / counted.sum().clamp_min(1);
  const int64_t kept = *axis < 0 ? *axis + x.dim() : *axis;
  TORCH_CHECK_VALUE(kept >= 0 && kept < x.dim() && x.size(kept) == channels, "x of shape ", x.sizes(), ": expected ",
                    channels, " channels along axis ", *axis);
  const auto sums = [&](const at::Tensor& values) { return values.movedim(kept, 0).reshape({channels, -1}).sum(1); };
  return sums(x.abs()) / sums(counted).clamp_min(1);
}

}  // namespace

FakeQuantImpl::FakeQuantImpl(FakeQuantOptions options_) : options(std::move(options_)) {
  TORCH_CHECK_VALUE(options.bits() >= 2 && options.bits() <= 16, "bits = ", options.bits(), ", expected 2 to 16");
  TORCH_CHECK_VALUE(options.channels() >= 1 && (options.axis() || options.channels() == 1),
                    "channels = ", options.channels(),
                    ", expected 1, or with an axis the number of indices along that axis");
  TORCH_CHECK_VALUE(options.groups() == 1 || (options.groups() > 1 && options.axis() == 0),
                    "groups = ", options.groups(), ", expected at least 1, and 1 unless axis is 0");
  TORCH_CHECK_VALUE(options.init() == "lsq" || options.init() == "minmax" || options.init() == "mse",
                    "init = ", options.init(), ", expected lsq, minmax or mse");
  FakeQuantImpl::reset();
}

void FakeQuantImpl::reset() {
  std::vector<int64_t> shape{options.channels()};
  if (options.groups() > 1) shape.push_back(options.groups());
  log_scale = register_parameter("log_scale", torch::zeros(shape));
  if (options.offset()) offset = register_parameter("offset", torch::zeros(shape));
}

void FakeQuantImpl::load(torch::serialize::InputArchive& archive) {
  Module::load(archive);
  initialized_ = has_scales();
}

void FakeQuantImpl::pretty_print(std::ostream& stream) const {
  stream << "cctorch::nn::FakeQuant(bits=" << options.bits() << ", signed=" << std::boolalpha << options.is_signed();
  if (options.axis()) stream << ", axis=" << *options.axis() << ", channels=" << options.channels();
  if (options.groups() > 1) stream << ", groups=" << options.groups();
  if (options.offset()) stream << ", offset=true";
  stream << ")";
}

int64_t FakeQuantImpl::qmin() const { return options.is_signed() ? -(int64_t{1} << (options.bits() - 1)) : 0; }

int64_t FakeQuantImpl::qmax() const {
  return (int64_t{1} << (options.is_signed() ? options.bits() - 1 : options.bits())) - 1;
}

at::Tensor FakeQuantImpl::grouped(const at::Tensor& x) const {
  if (options.groups() == 1) return x;
  TORCH_CHECK_VALUE(x.dim() > 0 && x.size(0) == options.channels() && x.numel() % log_scale.numel() == 0, "x of shape ",
                    x.sizes(), ": expected ", options.channels(), " indices of dimension 0, each of ", options.groups(),
                    " equal groups");
  return x.reshape({log_scale.numel(), -1});
}

bool FakeQuantImpl::has_scales() const {
  return log_scale.any().item<bool>() || (options.offset() && offset.any().item<bool>());
}

void FakeQuantImpl::initialize(const at::Tensor& input) {
  const torch::NoGradGuard no_grad;
  const at::Tensor given = grouped(input.detach().to(kind(log_scale)));
  const at::Tensor finite = given.isfinite(), x = at::where(finite, given, at::zeros({}, given.options()));
  at::Tensor logarithm, start = torch::zeros_like(log_scale);
  if (options.init() == "lsq") {
    const at::Tensor scale = mean_magnitude(x, finite.to(x.scalar_type()), axis(), log_scale.numel()) *
                             (2.0 / std::sqrt(static_cast<double>(qmax())));
    // A channel of zeros has no scale of its own.
    logarithm = torch::where(scale > 0, scale, torch::ones_like(scale)).log();
  } else if (options.offset()) {
    std::tie(logarithm, start) = quant_range_offset(x, qmin(), qmax(), axis(), options.init());
    logarithm.add_(inside);
  } else {
    logarithm = quant_range(x, qmin(), qmax(), axis(), options.init()).add_(inside);
  }
  log_scale.copy_(logarithm.view(log_scale.sizes()));
  if (options.offset()) offset.copy_(start.view(offset.sizes()));
  initialized_ = true;
}

at::Tensor FakeQuantImpl::scale() const {
  const at::Tensor logarithm = log_scale.detach().to(kind(log_scale)).flatten();
  // The code 1 stands for the scale itself, which the operators keep within the normal numbers of its type.
  const bool wide = logarithm.scalar_type() == at::kDouble;
  const double low = wide ? std::numeric_limits<double>::min() : std::numeric_limits<float>::min();
  const double high = wide ? std::numeric_limits<double>::max() : std::numeric_limits<float>::max();
  return fake_quant(logarithm.exp().clamp(low, high), logarithm, qmin(), qmax(), 0, 1.0).view(log_scale.sizes());
}

at::Tensor FakeQuantImpl::forward(const at::Tensor& x) {
  // An empty input, as of a detector that finds nothing, says nothing about the range. Scales may be there already:
  // copied, or averaged, from another module's parameters.
  if (!initialized_ && x.numel() > 0) {
    if (!has_scales()) initialize(x);
    initialized_ = true;
  }
  const double elements = static_cast<double>(x.numel()) / static_cast<double>(log_scale.numel());
  const double grad_scale = 1.0 / std::sqrt(std::max(elements, 1.0) * static_cast<double>(qmax()));
  const at::Tensor scales = log_scale.to(kind(x));
  const auto offsets = options.offset() ? std::optional(offset.to(kind(x))) : std::nullopt;
  if (options.groups() > 1) {
    const auto size = grouped(x).size(1);
    return fake_quant_groups(x, scales, qmin(), qmax(), size, grad_scale, offsets);
  }
  if (offsets) return fake_quant_offset(x, scales, *offsets, qmin(), qmax(), options.axis(), grad_scale);
  return fake_quant(x, scales, qmin(), qmax(), options.axis(), grad_scale);
}

}  // namespace cctorch::nn
