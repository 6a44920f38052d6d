#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <vector>

// Dominant subspaces of batches of matrices, in float64, composed of ATen operators for any device; on CPU
// csrc/ops/cpu/subspace.h, matrix by matrix. A basis is a matrix of orthonormal rows.
namespace cctorch::composed {

// The eigenvectors of the `rank` largest eigenvalues of A A^T. On CUDA linalg_eigh waits for the device, and takes
// larger matrices than 32 x 32 one after the other.
at::Tensor leading(const at::Tensor& a, int64_t rank);

// The orthonormalized rows of each matrix (Cholesky QR in two passes); NaN where they are dependent. Waits for nothing.
at::Tensor orthonormal(const at::Tensor& rows);

// The next basis of the subspace iteration.
at::Tensor turned_towards(const at::Tensor& a, const at::Tensor& basis);

// Of each, whether a basis that turned from `before` to `after` is as good as the best, as cpu::subspace::near says;
// not if it is NaN.
at::Tensor near(const at::Tensor& before, const at::Tensor& after);

// Those of `near`, lists of flags, that are false: all are read at once.
std::vector<std::vector<int64_t>> far_ones(const std::vector<at::Tensor>& near);

// A batch as so many tensors that share no memory.
std::vector<at::Tensor> apart(const at::Tensor& batch, at::ScalarType type);

}  // namespace cctorch::composed
