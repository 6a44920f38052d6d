#include "csrc/ops/tucker2.h"

#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/linalg_eigh.h>
#include <ATen/ops/matmul.h>
#include <torch/library.h>

#include "csrc/ops/checks.h"

namespace cctorch {

std::tuple<std::vector<at::Tensor>, std::vector<at::Tensor>, std::vector<at::Tensor>> tucker2(
    at::TensorList weights, at::IntArrayRef ranks_out, at::IntArrayRef ranks_in, int64_t iterations,
    at::TensorList bases_out, at::TensorList bases_in) {
  static const auto op =
      c10::Dispatcher::singleton().findSchemaOrThrow("cctorch::tucker2", "").typed<decltype(tucker2)>();
  return op.call(weights, ranks_out, ranks_in, iterations, bases_out, bases_in);
}

namespace {

constexpr auto op_name = "tucker2";

void check_bases(const char* name, at::TensorList bases, at::TensorList weights, at::IntArrayRef ranks, int64_t mode) {
  TORCH_CHECK(bases.empty() || bases.size() == weights.size(), op_name, ": expected no ", name,
              " or one for each of the ", weights.size(), " weights, got ", bases.size());
  for (size_t i = 0; i < bases.size(); ++i) {
    if (bases[i].sym_numel() == 0) continue;
    TORCH_CHECK(bases[i].dim() == 2 && bases[i].sym_size(0) == weights[i].sym_size(mode) &&
                    bases[i].sym_size(1) == ranks[i] && bases[i].scalar_type() == weights[i].scalar_type() &&
                    bases[i].device() == weights[i].device(),
                op_name, ": ", name, "[", i, "] must be ", weights[i].sym_size(mode), " x ", ranks[i], " in ",
                weights[i].scalar_type(), " on ", weights[i].device(), ", or empty, got ", bases[i].sym_sizes(), " in ",
                bases[i].scalar_type(), " on ", bases[i].device());
  }
}

}  // namespace

void check_tucker2(at::TensorList weights, const Tucker2Size& size, at::TensorList bases_out, at::TensorList bases_in) {
  TORCH_CHECK(size.ranks_out.size() == weights.size() && size.ranks_in.size() == weights.size(), op_name,
              ": expected one rank of outputs and of inputs for each of the ", weights.size(), " weights, got ",
              size.ranks_out.size(), " and ", size.ranks_in.size());
  TORCH_CHECK(size.iterations >= 0, op_name, ": iterations must be at least 0, got ", size.iterations);
  for (size_t i = 0; i < weights.size(); ++i) {
    const auto name = "weights[" + std::to_string(i) + "]";
    check_floating(weights[i], op_name, name.c_str());
    check_same_device(weights[i], op_name, name.c_str(), weights[0], "weights[0]");
    TORCH_CHECK(weights[i].dim() >= 2, op_name, ": ", name, " must have at least two dimensions, got shape ",
                weights[i].sym_sizes());
    TORCH_CHECK(1 <= size.ranks_out[i] && size.ranks_out[i] <= weights[i].sym_size(0) && 1 <= size.ranks_in[i] &&
                    size.ranks_in[i] <= weights[i].sym_size(1),
                op_name, ": the ranks of ", name, ", of shape ", weights[i].sym_sizes(),
                ", must be from 1 to its outputs and inputs, got ", size.ranks_out[i], " and ", size.ranks_in[i]);
  }
  check_bases("bases_out", bases_out, weights, size.ranks_out, 0);
  check_bases("bases_in", bases_in, weights, size.ranks_in, 1);
  TORCH_CHECK(bases_out.size() == bases_in.size(), op_name, ": expected as many bases_out as bases_in, got ",
              bases_out.size(), " and ", bases_in.size());
}

Tucker2Factors empty_tucker2(const at::Tensor& weight, int64_t rank_out, int64_t rank_in) {
  auto core = weight.sym_sizes().vec();
  core[0] = rank_out;
  core[1] = rank_in;
  return {at::empty_symint(core, weight.options()), at::empty_symint({weight.sym_size(0), rank_out}, weight.options()),
          at::empty_symint({weight.sym_size(1), rank_in}, weight.options())};
}

at::Tensor swapped(const at::Tensor& w) { return w.transpose(0, 1).contiguous(); }

at::Tensor coordinates(const at::Tensor& basis, const at::Tensor& w) {
  return at::matmul(basis, w.flatten(1)).view({basis.size(0), w.size(1), w.size(2)});
}

Tucker2Bases hosvd(const at::Tensor& w, int64_t rank_out, int64_t rank_in, const Tucker2Steps& steps) {
  return {steps.leading(w.flatten(1), rank_out), steps.leading(swapped(w).flatten(1), rank_in)};
}

Tucker2Bases improved(const at::Tensor& w, Tucker2Bases bases, int64_t iterations, const Tucker2Steps& steps) {
  const at::Tensor by_input = swapped(w);
  for (int64_t i = 0; i < iterations; ++i) {
    bases.out = steps.turned(swapped(coordinates(bases.in, by_input)).flatten(1), bases.out);
    bases.in = steps.turned(swapped(coordinates(bases.out, w)).flatten(1), bases.in);
  }
  return bases;
}

at::Tensor tucker2_core(const at::Tensor& w, const Tucker2Bases& bases) {
  return swapped(coordinates(bases.in, swapped(coordinates(bases.out, w))));
}

namespace {

// On any device; linalg_eigh waits for it, to know whether it converged. Always from the start: the bases that are
// given could be near or not.
std::tuple<std::vector<at::Tensor>, std::vector<at::Tensor>, std::vector<at::Tensor>> composite(
    at::TensorList weights, at::IntArrayRef ranks_out, at::IntArrayRef ranks_in, int64_t iterations,
    at::TensorList bases_out, at::TensorList bases_in) {
  check_tucker2(weights, {ranks_out, ranks_in, iterations}, bases_out, bases_in);
  const auto leading = [](const at::Tensor& a, int64_t rank) {
    const at::Tensor vectors = std::get<1>(at::linalg_eigh(at::matmul(a, a.t())));
    return vectors.narrow(1, vectors.size(1) - rank, rank).t();
  };
  const Tucker2Steps steps{leading,
                           [&](const at::Tensor& a, const at::Tensor& basis) { return leading(a, basis.size(0)); }};
  return tucker2_lists(weights.size(), [&](size_t i) -> Tucker2Factors {
    const at::Tensor& weight = weights[i];
    Tucker2Factors factors = empty_tucker2(weight, ranks_out[i], ranks_in[i]);
    if (weight.numel() == 0) return factors;
    const at::Tensor w = weight.to(at::kDouble).reshape({weight.size(0), weight.size(1), -1});
    const Tucker2Bases bases = improved(w, hosvd(w, ranks_out[i], ranks_in[i], steps), iterations, steps);
    factors[0].copy_(tucker2_core(w, bases).view(factors[0].sizes()));
    factors[1].copy_(bases.out.t());
    factors[2].copy_(bases.in.t());
    return factors;
  });
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(cctorch, m) {
  m.def(
      "tucker2(Tensor[] weights, int[] ranks_out, int[] ranks_in, int iterations, Tensor[] bases_out, "
      "Tensor[] bases_in) -> (Tensor[], Tensor[], Tensor[])",
      {at::Tag::pt2_compliant_tag});
}

TORCH_LIBRARY_IMPL(cctorch, CompositeExplicitAutograd, m) { m.impl("tucker2", &composite); }

}  // namespace cctorch
