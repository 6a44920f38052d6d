#include <cctorch/fake_quant.h>
#include <cctorch/nn/modules.h>
#include <torch/serialize/input-archive.h>
#include <torch/types.h>

#include <cmath>
#include <limits>
#include <ostream>
#include <vector>

namespace cctorch::nn {

FakeQuantImpl::FakeQuantImpl(const FakeQuantOptions& options_) : options(options_) {
  TORCH_CHECK_VALUE(options.bits() >= 2 && options.bits() <= 16, "bits = ", options.bits(), ", expected 2 to 16");
  TORCH_CHECK_VALUE(options.channels() >= 1 && (options.axis() || options.channels() == 1),
                    "channels = ", options.channels(),
                    ", expected 1, or with an axis the number of indices along that axis");
  FakeQuantImpl::reset();
}

void FakeQuantImpl::reset() { log_scale = register_parameter("log_scale", torch::zeros({options.channels()})); }

void FakeQuantImpl::load(torch::serialize::InputArchive& archive) {
  Module::load(archive);
  initialized_ = true;
}

void FakeQuantImpl::pretty_print(std::ostream& stream) const {
  stream << "cctorch::nn::FakeQuant(bits=" << options.bits() << ", signed=" << std::boolalpha << options.is_signed();
  if (options.axis()) stream << ", axis=" << *options.axis() << ", channels=" << options.channels();
  stream << ")";
}

int64_t FakeQuantImpl::qmin() const { return options.is_signed() ? -(int64_t{1} << (options.bits() - 1)) : 0; }

int64_t FakeQuantImpl::qmax() const {
  return (int64_t{1} << (options.is_signed() ? options.bits() - 1 : options.bits())) - 1;
}

void FakeQuantImpl::initialize(const at::Tensor& x) {
  const torch::NoGradGuard no_grad;
  std::vector<int64_t> reduced;
  if (const std::optional<int64_t> wanted = options.axis()) {
    const int64_t axis = *wanted < 0 ? *wanted + x.dim() : *wanted;
    TORCH_CHECK_VALUE(axis >= 0 && axis < x.dim() && x.size(axis) == options.channels(), "x of shape ", x.sizes(),
                      ": expected ", options.channels(), " channels along axis ", *wanted);
    for (int64_t dimension = 0; dimension < x.dim(); ++dimension) {
      if (dimension != axis) reduced.push_back(dimension);
    }
  }
  const at::Tensor magnitude = x.detach().to(log_scale.scalar_type()).abs();
  at::Tensor mean = options.axis() ? (reduced.empty() ? magnitude : magnitude.mean(reduced)) : magnitude.mean();
  mean = mean.view({-1}) * (2.0 / std::sqrt(static_cast<double>(qmax())));
  // A channel of zeros has no scale of its own.
  log_scale.copy_(torch::where(mean > 0, mean, torch::ones_like(mean)).log());
  initialized_ = true;
}

at::Tensor FakeQuantImpl::forward(const at::Tensor& x) {
  if (!initialized_) initialize(x);
  const double elements = static_cast<double>(x.numel()) / static_cast<double>(options.channels());
  const double grad_scale = 1.0 / std::sqrt(std::max(elements, 1.0) * static_cast<double>(qmax()));
  return fake_quant(x, log_scale, qmin(), qmax(), options.axis(), grad_scale);
}

}  // namespace cctorch::nn
