#include "csrc/ops/tucker2.h"

#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/matmul.h>
#include <ATen/ops/stack.h>
#include <ATen/ops/tensor.h>
#include <torch/library.h>

#include <algorithm>
#include <map>

#include "csrc/ops/checks.h"
#include "csrc/ops/subspace.h"

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

namespace {

// Mode-n unfoldings, and W with its outputs (inputs) in the space of a basis.
at::Tensor swapped(const at::Tensor& w) { return w.transpose(-3, -2).contiguous(); }

at::Tensor coordinates(const at::Tensor& basis, const at::Tensor& w) {
  auto sizes = w.sizes().vec();
  sizes[sizes.size() - 3] = basis.size(-2);
  return at::matmul(basis, w.flatten(-2)).view(sizes);
}

}  // namespace

Tucker2Bases improved(const at::Tensor& w, const Tucker2Bases& bases, int64_t rank_out, int64_t iterations,
                      const Tucker2Step& step) {
  const int64_t rank_in = bases.in.size(-2);
  const at::Tensor by_input = iterations > 0 ? swapped(w) : at::Tensor();
  Tucker2Bases result = bases;
  for (int64_t i = 0; i < iterations; ++i) {
    result.out = step(swapped(coordinates(result.in, by_input)).flatten(-2), result.out, rank_out);
    result.narrowed = swapped(coordinates(result.out, w));
    result.in = step(result.narrowed.flatten(-2), result.in, rank_in);
  }
  return result;
}

Tucker2Bases decomposed(const at::Tensor& w, int64_t rank_out, int64_t rank_in, int64_t iterations,
                        const Tucker2Step& step) {
  Tucker2Bases bases;
  bases.in = step(swapped(w).flatten(-2), {}, rank_in);
  if (iterations == 0) bases.out = step(w.flatten(-2), {}, rank_out);
  return improved(w, bases, rank_out, iterations, step);
}

at::Tensor tucker2_core(const at::Tensor& w, const Tucker2Bases& bases) {
  const at::Tensor narrowed = bases.narrowed.defined() ? bases.narrowed : swapped(coordinates(bases.out, w));
  return swapped(coordinates(bases.in, narrowed));
}

namespace {

// Weights of one size, ranks and type, count x outputs x inputs x kernel, are decomposed together.
struct Group {
  std::vector<size_t> members;
  at::Tensor all, near;
  Tucker2Bases bases;
};

Tucker2Bases exact(const at::Tensor& all, int64_t rank_out, int64_t rank_in, int64_t iterations) {
  return decomposed(all, rank_out, rank_in, iterations,
                    [](const at::Tensor& a, const at::Tensor&, int64_t rank) { return composed::leading(a, rank); });
}

// From bases that fitted similar weights, as on CPU: near, unless these turn too far.
void start(Group& group, const Tucker2Bases& start, int64_t iterations) {
  const int64_t rank_out = start.out.size(-2);
  const auto step = [](const at::Tensor& a, const at::Tensor& basis, int64_t) {
    return composed::turned_towards(a, basis);
  };
  const Tucker2Bases first{composed::orthonormal(start.out), composed::orthonormal(start.in), {}};
  const Tucker2Bases once = improved(group.all, first, rank_out, 1, step);
  group.bases = improved(group.all, once, rank_out, std::max<int64_t>(iterations - 1, 1), step);
  group.near = composed::near(once.out, group.bases.out).logical_and(composed::near(once.in, group.bases.in));
}

// On any device. The host waits for it once to see which of the bases were near enough, and to decompose the others.
std::tuple<std::vector<at::Tensor>, std::vector<at::Tensor>, std::vector<at::Tensor>> composite(
    at::TensorList weights, at::IntArrayRef ranks_out, at::IntArrayRef ranks_in, int64_t iterations,
    at::TensorList bases_out, at::TensorList bases_in) {
  check_tucker2(weights, {ranks_out, ranks_in, iterations}, bases_out, bases_in);
  using Kind = std::tuple<std::vector<int64_t>, int64_t, int64_t, at::ScalarType, bool>;
  std::map<Kind, Group> groups;
  std::vector<Tucker2Factors> factors(weights.size());
  for (size_t i = 0; i < weights.size(); ++i) {
    const at::Tensor& w = weights[i];
    if (w.numel() == 0) {
      factors[i] = empty_tucker2(w, ranks_out[i], ranks_in[i]);
      continue;
    }
    const bool started =
        !bases_out.empty() && bases_out[i].numel() > 0 && bases_in[i].numel() > 0 && tucker2_starts_from_bases(w);
    groups[{w.sizes().vec(), ranks_out[i], ranks_in[i], w.scalar_type(), started}].members.push_back(i);
  }
  const auto stacked = [](at::TensorList list, const std::vector<size_t>& members) {
    std::vector<at::Tensor> parts;
    for (const size_t i : members) parts.push_back(list[i]);
    return at::stack(parts).to(at::kDouble);
  };
  std::vector<Group*> started;
  std::vector<at::Tensor> near;
  for (auto& [kind, group] : groups) {
    const auto& [sizes, rank_out, rank_in, type, from_bases] = kind;
    const auto count = static_cast<int64_t>(group.members.size());
    group.all = stacked(weights, group.members).reshape({count, sizes[0], sizes[1], -1});
    if (from_bases) {
      start(group, {stacked(bases_out, group.members).mT(), stacked(bases_in, group.members).mT(), {}}, iterations);
      started.push_back(&group);
      near.push_back(group.near);
    } else {
      group.bases = exact(group.all, rank_out, rank_in, iterations);
    }
  }
  const auto far = composed::far_ones(near);
  for (size_t g = 0; g < started.size(); ++g) {
    if (far[g].empty()) continue;
    Tucker2Bases& bases = started[g]->bases;
    const at::Tensor index = at::tensor(far[g], bases.out.options().dtype(at::kLong));
    const Tucker2Bases others =
        exact(started[g]->all.index_select(0, index), bases.out.size(-2), bases.in.size(-2), iterations);
    bases.out.index_copy_(0, index, others.out);
    bases.in.index_copy_(0, index, others.in);
    bases.narrowed.reset();
  }
  for (const auto& [kind, group] : groups) {
    const auto& [sizes, rank_out, rank_in, type, from_bases] = kind;
    std::vector<int64_t> core{static_cast<int64_t>(group.members.size()), rank_out, rank_in};
    core.insert(core.end(), sizes.begin() + 2, sizes.end());
    const auto cores = composed::apart(tucker2_core(group.all, group.bases).view(core), type);
    const auto out = composed::apart(group.bases.out.mT(), type), in = composed::apart(group.bases.in.mT(), type);
    for (size_t j = 0; j < group.members.size(); ++j) factors[group.members[j]] = {cores[j], out[j], in[j]};
  }
  return tucker2_lists(weights.size(), [&](size_t i) { return factors[i]; });
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
