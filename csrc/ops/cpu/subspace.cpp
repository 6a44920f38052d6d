#include "csrc/ops/cpu/subspace.h"

#include <ATen/ATen.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>

namespace cctorch::cpu::subspace {

namespace {

// Some kept eigenvalues of A A^T: their sum, the largest and the smallest.
struct Kept {
  double sum, largest, smallest;

  Kept shifted(double by, int64_t rank) const {
    return {sum + by * static_cast<double>(rank), largest + by, smallest + by};
  }
};

double epsilon(at::ScalarType type) {
  return type == at::kDouble ? std::numeric_limits<double>::epsilon() : std::numeric_limits<float>::epsilon();
}

// What a basis made of the Gram matrix loses at most, whatever the eigenvalues are.
double most_lost(double total, int64_t rank, at::ScalarType type) {
  return 4 * std::sqrt(static_cast<double>(rank)) * epsilon(type) * total;
}

// The Gram matrix of A is wrong by no more than 2 eps |A|^2 (1.3 at most in what was tried). A basis made of it loses
// no more than 2 sqrt(rank) times that and, by the sin-theta theorem, no more than its square times largest / gap^2,
// where the gap to what is left is at least smallest - left. (The latter bounds what a start loses in its normal
// equations too.) This may be 0.1 % of the error: 0.2 % of its square.
bool resolved(const Kept& kept, double total, int64_t rank, at::ScalarType type) {
  const double eps = epsilon(type);
  const double left = total - kept.sum, gap = kept.smallest - left;
  if (left < 16 * eps * total) return false;  // the difference itself is rounding
  double lost = most_lost(total, rank, type);
  if (gap > 0) lost = std::min(lost, std::pow(4 * eps * total / gap, 2) * kept.largest);
  return lost <= 0.002 * left;
}

// Of ascending eigenvalues, the last `rank`.
Kept kept_of(const at::Tensor& values, int64_t rank) {
  const at::Tensor last = values.narrow(0, values.size(0) - rank, rank).to(at::kDouble);
  const auto* value = last.const_data_ptr<double>();
  return {last.sum().item<double>(), value[rank - 1], value[0]};
}

// Whether squares as small as matter beside their sum, and products of it, are numbers in float32.
bool fits_float32(double sum_of_squares) { return 1e-20 < sum_of_squares && sum_of_squares < 1e30; }

// xorshift64, the same numbers every time.
class Random {
 public:
  uint64_t below(uint64_t bound) { return (next() >> 32) % bound; }
  float sign() { return (next() >> 40 & 1) != 0 ? 1.0F : -1.0F; }

 private:
  uint64_t next() {
    state_ ^= state_ << 13;
    state_ ^= state_ >> 7;
    return state_ ^= state_ << 17;
  }

  uint64_t state_ = 0x9e3779b97f4a7c15;
};

// `count` random sums and differences of the rows of G, each row in about four of them. As good a start as a product
// with random signs, at the cost of a few passes over G.
at::Tensor mixed_rows(const at::Tensor& g, int64_t count) {
  const int64_t n = g.size(0), each = std::min(n, (4 * n + count - 1) / count);
  at::Tensor result = at::zeros({count, n}, g.options());
  const auto* rows = g.const_data_ptr<float>();
  auto* sums = result.mutable_data_ptr<float>();
  std::vector<int64_t> order(n);
  std::iota(order.begin(), order.end(), 0);
  Random random;
  int64_t taken = n;
  for (int64_t i = 0; i < count * each; ++i) {
    if (taken == n) {  // every row once, then all again in another order
      for (int64_t k = n - 1; k > 0; --k) std::swap(order[k], order[random.below(k + 1)]);
      taken = 0;
    }
    const float* row = rows + order[taken++] * n;
    float* sum = sums + i / each * n;
    const float sign = random.sign();
    for (int64_t k = 0; k < n; ++k) sum[k] += sign * row[k];
  }
  return result;
}

// What some Lanczos steps from a random vector see of a matrix's eigenvalues: numbers in ascending order and the parts
// of all that they stand for.
struct Spectrum {
  std::vector<double> values, parts;

  // Three quarters of the smallest one: subtracted from G, it spreads a flat spectrum. No larger part of the
  // eigenvalues than that one's can lie below it (Chebyshev, Markov and Stieltjes); where this is much, 0: they would
  // grow with the largest.
  double floor() const { return parts.front() < 0.3 ? std::max(0.0, 0.75 * values.front()) : 0; }

  // Above which about a part `above` of all lies: each number stands for as many below as above it. Nothing where one
  // stands for too many.
  std::optional<double> quantile(double above) const {
    double passed = 0, before = 0;
    for (size_t i = values.size(); i-- > 0;) {
      if (parts[i] > 0.3) return std::nullopt;
      const double middle = passed + parts[i] / 2;
      if (middle >= above) {
        if (i + 1 == values.size()) return values[i];
        return values[i] + (values[i + 1] - values[i]) * (middle - above) / (middle - before);
      }
      passed += parts[i];
      before = middle;
    }
    return values.front();
  }
};

Spectrum spectrum_of(const at::Tensor& g) {
  constexpr int64_t most = 8;
  at::Tensor tridiagonal = at::zeros({most, most}, at::kDouble);
  auto entry = tridiagonal.accessor<double, 2>();
  at::Tensor before = at::zeros({g.size(0)}, g.options()), now = at::empty({g.size(0)}, g.options());
  Random random;
  for (int64_t i = 0; i < g.size(0); ++i) {
    now.mutable_data_ptr<float>()[i] = random.sign() / std::sqrt(static_cast<float>(g.size(0)));
  }
  double beside = 0;
  int64_t steps = 0;
  while (true) {
    at::Tensor next = at::addmv(before, g, now, -beside, 1);
    entry[steps][steps] = at::dot(next, now).item<double>();
    next.sub_(now, entry[steps][steps]);
    if (++steps == most) break;
    beside = at::linalg_vector_norm(next).item<double>();
    if (!(beside > 0)) break;
    entry[steps][steps - 1] = beside;
    before = now;
    now = next.div_(beside);
  }
  const auto [values, vectors] = at::linalg_eigh(tridiagonal.narrow(0, 0, steps).narrow(1, 0, steps));
  const at::Tensor parts = vectors[0].square();
  Spectrum seen;
  for (int64_t i = 0; i < steps; ++i) {
    seen.values.push_back(values[i].item<double>());
    seen.parts.push_back(parts[i].item<double>());
  }
  return seen;
}

// What lies in [0, bound] is to be damped beside what lies between that and `top`.
struct Range {
  double bound, top;
  // How much faster than the constant the Chebyshev polynomial of degree `degree` grows.
  double reach() const { return std::acosh(std::max(1.0, 2 * top / bound - 1)); }
};

// The Chebyshev polynomial of degree `degree` on [0, bound] of G, times `rows`: at most 1 on that interval, and growing
// as fast as any polynomial can above it. `image` is rows G.
at::Tensor filter(const at::Tensor& g, const at::Tensor& rows, const at::Tensor& image, double bound, int64_t degree) {
  const double half = bound / 2;
  at::Tensor before = rows, now = (image - half * rows).div_(half);
  for (int64_t d = 1; d < degree; ++d) {
    before = at::addmm(before, now, g, -1, 2 / half).sub_(now, 2);
    std::swap(before, now);
  }
  return now;
}

// The basis of a float32 block survives this ratio of its rows' growth.
constexpr double most_growth = 3000;

// The largest degree that a block survives which has grown so far already; 0 if there is none.
int64_t safe_degree(const Range& range, double grown, int64_t wanted) {
  if (grown >= most_growth) return 0;
  const double reach = range.reach();
  return reach > 0 ? std::min(wanted, static_cast<int64_t>(std::acosh(most_growth / grown) / reach)) : wanted;
}

// From the spectrum of G, for a block that keeps a part of all directions: nothing where that is too coarse a picture.
std::optional<Range> range_of(const Spectrum& seen, double shift, double part) {
  const std::optional<double> bound = seen.quantile(part);
  if (!bound || part < 0.2) return std::nullopt;
  const Range range{*bound - shift, seen.values.back() - shift};
  return range.bound > 0 && range.top < 8 * range.bound ? std::optional(range) : std::nullopt;
}

// The eigenvalues of G as a block of orthonormal rows sees it, ascending. `image` is block G.
at::Tensor ritz_values(const at::Tensor& block, const at::Tensor& image) {
  return at::linalg_eigvalsh(at::mm(image, block.t()));
}

// From the block's Ritz values, the smallest one wanted as the bound. A larger one would damp what lies between them,
// once they have converged.
Range ritz_range(const at::Tensor& block, const at::Tensor& image, int64_t rank) {
  const at::Tensor values = ritz_values(block, image);
  const auto* value = values.const_data_ptr<float>();
  return {value[values.size(0) - rank], value[values.size(0) - 1]};
}

// Whether two steps in float32 keep what these Ritz values stand for, to 0.1 % of the error. A row may hold parts of
// all of them, which grow with their squares: beside the largest, rounding turns the i-th by eps (largest / i-th)^2.
bool survive_two_steps(const at::Tensor& values, double total) {
  constexpr double eps = std::numeric_limits<float>::epsilon();
  const at::Tensor wide = values.to(at::kDouble).clamp_min(0);
  const double largest = wide[-1].item<double>(), left = total - wide.sum().item<double>();
  if (left < 16 * eps * total) return false;  // the difference itself is rounding
  double lost = 0;
  for (int64_t i = 0; i < wide.size(0); ++i) {
    const auto value = wide[i].item<double>();
    if (value > 0) lost += value * std::min(1.0, std::pow(eps * std::pow(largest / value, 2), 2));
  }
  return lost <= 0.002 * left;
}

// A quarter more rows than wanted, and this degree of all polynomials together, reach 0.1 % for a spectrum without any
// gap; those of trained weights fall faster.
int64_t width_for(int64_t rank) { return rank + rank / 4 + 16; }
constexpr int64_t total_degree = 5;

// Subspace iteration with Chebyshev polynomials and one Rayleigh-Ritz step at the end: products of matrices almost
// only. Needs fewer multiplications than an eigendecomposition for ranks below a third of G's size. With a range that
// is known it needs no Ritz values on the way.
std::optional<std::pair<at::Tensor, Kept>> iterate(const at::Tensor& g, int64_t rank,
                                                   const std::optional<Range>& known) {
  const int64_t width = width_for(rank);
  std::optional<at::Tensor> block = mixed_rows(g, width);
  double grown = known ? known->top / known->bound : most_growth;
  for (int64_t left = total_degree - 1; left > 0;) {
    int64_t step = known ? safe_degree(*known, grown, left) : 0;
    if (step == 0) {
      block = orthonormal(*block, 1);
      if (!block) return std::nullopt;
    }
    const at::Tensor image = at::mm(*block, g);
    const Range range = known ? *known : ritz_range(*block, image, rank);
    if (!(range.bound > 0)) return std::nullopt;
    if (step == 0) step = std::max<int64_t>(1, safe_degree(range, 1, left));
    block = filter(g, *block, image, range.bound, step);
    grown = most_growth;
    left -= step;
  }
  block = orthonormal(*block, 2);
  if (!block) return std::nullopt;
  const auto [values, vectors] = at::linalg_eigh(at::mm(at::mm(*block, g), block->t()));
  return std::pair(at::mm(vectors.narrow(1, width - rank, rank).t(), *block), kept_of(values, rank));
}

std::pair<at::Tensor, Kept> by_eigenvectors(const at::Tensor& g, int64_t rank) {
  const auto [values, vectors] = at::linalg_eigh(g);
  return {vectors.narrow(1, g.size(0) - rank, rank).t(), kept_of(values, rank)};
}

// L^-1 `rows`. Solved from the right for the transpose, as LAPACK sees it, nothing is transposed in memory.
at::Tensor solve_rows(const at::Tensor& lower, const at::Tensor& rows) {
  return at::linalg_solve_triangular(lower.t(), rows.t(), /*upper=*/true, /*left=*/false).t();
}

// L of the rows' products, whose Cholesky factor exists: relative to their lengths, these are shifted.
std::optional<at::Tensor> lower_of_products(const at::Tensor& rows) {
  at::Tensor products = gram(rows);
  const at::Tensor lengths = products.diagonal().sqrt().unsqueeze(1);
  products.div_(lengths).div_(lengths.t());
  products.diagonal().add_(5e-7 * static_cast<double>(rows.size(0)));
  const auto [lower, failed] = at::linalg_cholesky_ex(products);
  if (failed.item<int>() != 0) return std::nullopt;
  return lower * lengths;
}

// The sum of sin^2 of the angles between orthonormal rows B and the rows of L^-1 B G, where L L^T = B G B^T: B times
// their transpose is L.
std::optional<double> turn_of_solution(const at::Tensor& solution, const at::Tensor& lower) {
  const auto of_products = lower_of_products(solution);
  if (!of_products) return std::nullopt;
  const at::Tensor overlap = at::linalg_solve_triangular(*of_products, lower.t(), /*upper=*/false);
  return static_cast<double>(solution.size(0)) - overlap.square().sum(at::kDouble).item<double>();
}

}  // namespace

std::optional<at::Tensor> orthonormal(const at::Tensor& rows, int passes) {
  const auto first = lower_of_products(rows);
  if (!first) return std::nullopt;
  at::Tensor q = solve_rows(*first, rows);
  for (int pass = 1; pass < passes; ++pass) {
    const auto [lower, failed] = at::linalg_cholesky_ex(gram(q));
    const auto shortest = lower.diagonal().min().item<double>();
    // What the shift left so short is made of rounding.
    if (failed.item<int>() != 0 || shortest < 0.03) return std::nullopt;
    q = solve_rows(lower, q);
    if (pass == 1 && shortest < 0.1) ++passes;  // the square of its inverse times eps is left of the angles
  }
  return q;
}

at::Tensor gram(const at::Tensor& a) {
  const int64_t rows = a.size(0);
  constexpr int64_t panel = 64;
  at::Tensor g = at::empty({rows, rows}, a.options());
  for (int64_t begin = 0; begin < rows; begin += panel) {
    const int64_t end = std::min(rows, begin + panel);
    const at::Tensor below = g.narrow(0, begin, end - begin);
    at::Tensor lower = below.narrow(1, 0, end);
    at::mm_out(lower, a.narrow(0, begin, end - begin), a.narrow(0, 0, end).t());
    g.narrow(0, 0, begin).narrow(1, begin, end - begin).copy_(below.narrow(1, 0, begin).t());
  }
  return g;
}

at::Tensor exact_basis(const at::Tensor& a, int64_t rank) {
  const at::Tensor wide = a.to(at::kDouble);
  const auto [values, vectors] = at::linalg_eigh(at::matmul(wide, wide.mT()));
  const int64_t rest = a.size(-2) - rank;
  at::Tensor basis = vectors.narrow(-1, rest, rank).mT();
  if (a.scalar_type() != at::kDouble || rest == 0) return basis;
  bool all_resolved = true;
  const at::Tensor rows = values.reshape({-1, values.size(-1)});
  for (int64_t i = 0; i < rows.size(0) && all_resolved; ++i) {
    all_resolved = resolved(kept_of(rows[i], rank), rows[i].sum().item<double>(), rank, at::kDouble);
  }
  if (all_resolved) return basis;
  return std::get<0>(at::linalg_svd(wide, /*full_matrices=*/rank > a.size(-1))).narrow(-1, 0, rank).mT();
}

at::Tensor turned_towards(const at::Tensor& a, const at::Tensor& basis, Steps steps) {
  const int64_t rank = basis.size(0);
  if (a.scalar_type() == at::kDouble || a.size(0) <= direct_rows) return leading(a, rank);
  const auto norm = at::linalg_vector_norm(a).item<double>();
  if (!fits_float32(norm * norm)) return leading(a, rank);
  // Of more than a quarter of the rows, the lower half of a Gram matrix takes less than two products.
  const bool by_gram = a.size(0) <= a.size(1) && (steps == Steps::two || 4 * rank > a.size(0));
  const at::Tensor g = by_gram ? gram(a) : at::Tensor();
  const auto times = [&](const at::Tensor& rows) { return by_gram ? at::mm(rows, g) : at::mm(at::mm(rows, a), a.t()); };
  at::Tensor next = times(basis);
  if (steps == Steps::two) {
    // G (G - 0.7 t), t the smallest of the basis' eigenvalues: two steps where the spectrum falls fast, and where it
    // hardly falls almost what eigenvectors would give.
    const at::Tensor values = ritz_values(basis, next);
    if (!survive_two_steps(values, norm * norm)) return leading(a, rank);
    next = times(next).sub_(next, 0.7 * std::max(0.0F, values.const_data_ptr<float>()[0]));
  }
  const auto orthonormal_next = orthonormal(next, 2);
  return orthonormal_next ? *orthonormal_next : leading(a, rank);
}

double turn(const at::Tensor& before, const at::Tensor& after) {
  return static_cast<double>(after.size(0)) - at::mm(after, before.t()).square().sum(at::kDouble).item<double>();
}

bool near(double turn, int64_t rest) { return turn * 3 <= 0.002 * static_cast<double>(rest); }

at::Tensor leading(const at::Tensor& a, int64_t rank) {
  if (a.size(0) > a.size(1) && rank <= a.size(1)) {
    const at::Tensor columns = at::mm(a, leading(a.t(), rank).t());
    return std::get<0>(at::linalg_qr(columns)).t();
  }
  if (a.scalar_type() == at::kDouble || a.size(0) <= exact_rows) return exact_basis(a, rank).to(a.scalar_type());
  // All directions: rounded eigenvectors would lose some of what an identity keeps.
  if (rank == a.size(0)) return at::eye(rank, a.options());
  const at::Tensor g = gram(a);
  const auto total = g.diagonal().sum(at::kDouble).item<double>();
  if (!fits_float32(total)) return exact_basis(a, rank).to(at::kFloat);
  std::optional<std::pair<at::Tensor, Kept>> found;
  if (3 * rank < a.size(0)) {
    const Spectrum seen = spectrum_of(g);
    const double shift = seen.floor(), part = static_cast<double>(width_for(rank)) / static_cast<double>(g.size(0));
    const auto known = range_of(seen, shift, part);
    g.diagonal().sub_(shift);
    found = iterate(g, rank, known);
    g.diagonal().add_(shift);
    if (found) found->second = found->second.shifted(shift, rank);
  }
  if (!found) found = by_eigenvectors(g, rank);
  return resolved(found->second, total, rank, at::kFloat) ? found->first : exact_basis(a, rank).to(at::kFloat);
}

std::optional<std::pair<at::Tensor, at::Tensor>> warm(const at::Tensor& a, const at::Tensor& basis) {
  const int64_t rank = basis.size(1), rest = a.size(0) - rank;
  auto rows = orthonormal(basis.t(), 1);
  const double norm = at::linalg_vector_norm(a).item<double>(), total = norm * norm;
  if (!fits_float32(total)) return std::nullopt;
  for (int round = 0; rows && round < 2; ++round) {
    const at::Tensor right = at::mm(*rows, a);
    const at::Tensor image = at::mm(right, a.t());
    const at::Tensor ritz = at::mm(image, rows->t());
    const auto [lower, failed] = at::linalg_cholesky_ex(ritz);
    if (failed.item<int>() != 0) return std::nullopt;
    // B = `rows`, Z = B A: the best in the rows of Z is A Z^T (Z Z^T)^-1 Z, and Z Z^T = L L^T.
    const at::Tensor half = solve_rows(lower, image);
    const auto kept = half.square().sum(at::kDouble).item<double>();
    if (most_lost(total, rank, at::kFloat) > 0.002 * (total - kept)) {
      Kept of_ritz = kept_of(at::linalg_eigvalsh(ritz), rank);
      of_ritz.sum = kept;
      if (!resolved(of_ritz, total, rank, at::kFloat)) return std::nullopt;
    }
    const auto angles = turn_of_solution(half, lower);
    if (!angles) return std::nullopt;
    if (near(*angles, rest)) {
      return std::pair(at::linalg_solve_triangular(lower.t(), half, /*upper=*/true).t(), right);
    }
    rows = orthonormal(half, 1);
  }
  return std::nullopt;
}

}  // namespace cctorch::cpu::subspace
