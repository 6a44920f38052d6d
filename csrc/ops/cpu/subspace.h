#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <optional>
#include <utility>

// Dominant subspaces of matrices in float32 or float64. A basis is a matrix of orthonormal rows.
namespace cctorch::cpu::subspace {

// Up to this many rows everything is exact and in float64: batches of small matrices are its common case.
constexpr int64_t exact_rows = 64;

// From more rows on, a basis that is nearly right saves time.
constexpr int64_t direct_rows = 24;

// The orthonormalized rows of `rows` (Cholesky QR); nothing where they are dependent. The first pass shifts the
// Cholesky factor, which makes it safe but leaves angles between rows that were nearly dependent; two passes leave
// none, with a third where the second says that it needs one.
std::optional<at::Tensor> orthonormal(const at::Tensor& rows, int passes);

// A A^T
at::Tensor gram(const at::Tensor& a);

// Of a batch, in float64: the eigenvectors of A A^T as rows; of float64 input, from A's singular value decomposition
// where the Gram matrix could not resolve what is left.
at::Tensor exact_basis(const at::Tensor& a, int64_t rank);

// The basis that keeps the most of A, by the route that truncated_svd documents; of a tall A from that of its rows.
at::Tensor leading(const at::Tensor& a, int64_t rank);

// The basis after one step of the subspace iteration or two, of which the second is shifted and makes it almost the
// best; the best one where that is cheap.
enum class Steps : std::uint8_t { one, two };
at::Tensor turned_towards(const at::Tensor& a, const at::Tensor& basis, Steps steps);

// The sum of sin^2 of the angles by which a basis turned.
double turn(const at::Tensor& before, const at::Tensor& after);

// Whether a basis that turned so far is as good as the best, to 0.1 % of the error: 0.2 % of its square. Each angle
// costs at most its sin^2 times the first eigenvalue left out, which is taken for three times the mean of the `rest`
// left out.
bool near(double turn, int64_t rest);

// Of an A with no more rows than columns: its best approximation in the rows that A^T `basis` spans, as a product of a
// rows x rank and a rank x columns matrix; nothing where that may be more than 0.1 % from the best error.
std::optional<std::pair<at::Tensor, at::Tensor>> warm(const at::Tensor& a, const at::Tensor& basis);

}  // namespace cctorch::cpu::subspace
