#include "csrc/ops/tucker2.h"

#include <ATen/ATen.h>
#include <torch/library.h>

#include <algorithm>
#include <utility>

#include "csrc/largest_first.h"
#include "csrc/ops/cpu/subspace.h"

namespace cctorch {

bool tucker2_starts_from_bases(const at::Tensor& weight) {
  return weight.scalar_type() != at::kDouble &&
         (!weight.is_cpu() || std::max(weight.size(0), weight.size(1)) > cpu::subspace::direct_rows);
}

}  // namespace cctorch

namespace cctorch::cpu {
namespace {

at::Tensor next(const at::Tensor& a, const at::Tensor& basis, int64_t /*rank*/) {
  return subspace::turned_towards(a, basis, subspace::Steps::one);
}

at::Tensor almost_best(const at::Tensor& a, const at::Tensor& basis, int64_t rank) {
  return basis.defined() ? subspace::turned_towards(a, basis, subspace::Steps::two) : subspace::leading(a, rank);
}

// From bases that fitted similar weights, unless these turn too far.
std::optional<Tucker2Bases> from(const at::Tensor& w, const Tucker2Bases& start, int64_t iterations) {
  const auto out = subspace::orthonormal(start.out, 2), in = subspace::orthonormal(start.in, 2);
  if (!out || !in) return std::nullopt;
  const int64_t rank_out = out->size(0), rank_in = in->size(0);
  const Tucker2Bases once = improved(w, {*out, *in, {}}, rank_out, 1, next);
  Tucker2Bases bases = improved(w, once, rank_out, std::max<int64_t>(iterations - 1, 1), next);
  const bool near_out = subspace::near(subspace::turn(once.out, bases.out), w.size(0) - rank_out);
  const bool near_in = subspace::near(subspace::turn(once.in, bases.in), w.size(1) - rank_in);
  return near_out && near_in ? std::optional(std::move(bases)) : std::nullopt;
}

// No more outputs than what is left of inputs and kernel can tell apart, nor the other way round: more change nothing.
std::pair<int64_t, int64_t> useful_ranks(const at::Tensor& w, int64_t out, int64_t in, int64_t iterations) {
  const int64_t kernel = w.size(2);
  if (iterations == 0) return {std::min(out, w.size(1) * kernel), std::min(in, w.size(0) * kernel)};
  out = std::min(out, in * kernel);
  return {out, std::min(in, out * kernel)};
}

// `basis` and any directions beside it.
at::Tensor completed(const at::Tensor& basis, int64_t rank) {
  if (rank == basis.size(0)) return basis;
  return at::cat(
      {basis, std::get<0>(at::linalg_qr(basis.t(), "complete")).t().narrow(0, basis.size(0), rank - basis.size(0))});
}

void factor(const at::Tensor& weight, const Tucker2Bases& start, int64_t iterations, const Tucker2Factors& factors) {
  // Small ones in float64, which costs little and resolves all that float32 can show.
  const bool exact =
      weight.scalar_type() == at::kDouble || std::max(weight.size(0), weight.size(1)) <= subspace::exact_rows;
  at::Tensor w = weight.to(exact ? at::kDouble : at::kFloat).reshape({weight.size(0), weight.size(1), -1});
  const int64_t rank_out = factors[1].size(1), rank_in = factors[2].size(1);
  const auto useful = useful_ranks(w, rank_out, rank_in, iterations);
  std::optional<Tucker2Bases> bases;
  if (start.out.defined() && tucker2_starts_from_bases(weight) && useful == std::pair(rank_out, rank_in)) {
    const at::Tensor single = w.to(at::kFloat);
    bases = from(single, {start.out.to(at::kFloat).t(), start.in.to(at::kFloat).t(), {}}, iterations);
    if (bases) w = single;
  }
  if (!bases) bases = decomposed(w, useful.first, useful.second, iterations, almost_best);
  bases->in = completed(bases->in, rank_in);
  if (useful.first < rank_out) bases = {completed(bases->out, rank_out), bases->in, {}};
  factors[0].copy_(tucker2_core(w, *bases).view(factors[0].sizes()));
  factors[1].copy_(bases->out.t());
  factors[2].copy_(bases->in.t());
}

std::tuple<std::vector<at::Tensor>, std::vector<at::Tensor>, std::vector<at::Tensor>> tucker2(
    at::TensorList weights, at::IntArrayRef ranks_out, at::IntArrayRef ranks_in, int64_t iterations,
    at::TensorList bases_out, at::TensorList bases_in) {
  check_tucker2(weights, {ranks_out, ranks_in, iterations}, bases_out, bases_in);
  std::vector<Tucker2Factors> factors;
  std::vector<double> costs;
  for (size_t i = 0; i < weights.size(); ++i) {
    factors.push_back(empty_tucker2(weights[i], ranks_out[i], ranks_in[i]));
    costs.push_back(static_cast<double>(weights[i].numel() * (weights[i].size(0) + weights[i].size(1))));
  }
  largest_first(costs, [&](size_t i) {
    if (weights[i].numel() == 0) return;
    const bool started = !bases_out.empty() && bases_out[i].numel() > 0 && bases_in[i].numel() > 0;
    factor(weights[i], started ? Tucker2Bases{bases_out[i], bases_in[i], {}} : Tucker2Bases{}, iterations, factors[i]);
  });
  return tucker2_lists(weights.size(), [&](size_t i) { return factors[i]; });
}

}  // namespace

TORCH_LIBRARY_IMPL(cctorch, CPU, m) { m.impl("tucker2", &tucker2); }

}  // namespace cctorch::cpu
