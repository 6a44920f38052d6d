#pragma once

#include <cmath>

#include "csrc/ops/formula/host_device.h"

namespace cctorch::formula {

// Turns axes p and q of `gram`, symmetric, such that gram[p][q] becomes 0, and of `vectors` with them.
template <typename Matrix>
CCTORCH_HOST_DEVICE void rotate(Matrix& gram, Matrix& vectors, int p, int q, int size) {
  const double theta = (gram[q][q] - gram[p][p]) / (2 * gram[p][q]);
  const double t = std::copysign(1 / (std::abs(theta) + std::sqrt(theta * theta + 1)), theta);
  const double c = 1 / std::sqrt(t * t + 1), s = t * c;
  for (int k = 0; k < size; ++k) {
    const double left = gram[k][p], right = gram[k][q];
    gram[k][p] = c * left - s * right;
    gram[k][q] = s * left + c * right;
  }
  for (int k = 0; k < size; ++k) {
    const double upper = gram[p][k], lower = gram[q][k];
    gram[p][k] = c * upper - s * lower;
    gram[q][k] = s * upper + c * lower;
    const double left = vectors[k][p], right = vectors[k][q];
    vectors[k][p] = c * left - s * right;
    vectors[k][q] = s * left + c * right;
  }
}

// By Jacobi's method: the eigenvectors of `gram` become the columns of `vectors`, its eigenvalues its diagonal.
template <typename Matrix>
CCTORCH_HOST_DEVICE void diagonalize(Matrix& gram, Matrix& vectors, int size) {
  constexpr int sweeps = 12;  // convergence is quadratic: 6 to 8 are enough for this size
  constexpr double negligible = 1e-17;
  for (int i = 0; i < size; ++i) {
    for (int j = 0; j < size; ++j) vectors[i][j] = i == j ? 1 : 0;
  }
  for (int sweep = 0; sweep < sweeps; ++sweep) {
    for (int p = 0; p < size; ++p) {
      for (int q = p + 1; q < size; ++q) {
        if (std::abs(gram[p][q]) <= negligible * (std::abs(gram[p][p]) + std::abs(gram[q][q]))) continue;
        rotate(gram, vectors, p, q, size);
      }
    }
  }
}

// The shortest x of those with the least |gram x - moment|; eigenvalues of up to 1e-12 of the largest count as 0.
// `gram`, symmetric, becomes diagonal. Of the arrays' first `size` rows and columns; where that is a constant, all of
// them are in registers on a device.
template <typename Matrix, typename Vector>
CCTORCH_HOST_DEVICE void least_squares(Matrix& gram, const Vector& moment, Vector& x, int size) {
  constexpr double singular = 1e-12;
  Matrix vectors;
  diagonalize(gram, vectors, size);
  double largest = 0;
  for (int i = 0; i < size; ++i) largest = std::abs(gram[i][i]) > largest ? std::abs(gram[i][i]) : largest;
  for (int k = 0; k < size; ++k) x[k] = 0;
  for (int i = 0; i < size; ++i) {
    if (!(std::abs(gram[i][i]) > singular * largest)) continue;
    double product = 0;
    for (int k = 0; k < size; ++k) product += vectors[k][i] * moment[k];
    for (int k = 0; k < size; ++k) x[k] += vectors[k][i] * product / gram[i][i];
  }
}

}  // namespace cctorch::formula
