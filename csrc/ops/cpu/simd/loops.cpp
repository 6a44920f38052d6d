#include "csrc/ops/cpu/simd/loops.h"

#include <type_traits>

#include "csrc/ops/cpu/simd/reader.h"

namespace cctorch::simd::CCTORCH_ISA {
namespace {

template <typename S, typename Formula, typename T = typename Formula::value_type>
void forward(const Formula& shared_formula, void* y, const void* x, int64_t n,
             typename Formula::parameter_type parameter, Stores stores) {
  const Formula formula = shared_formula;
  Reader<S, T> read_x;
  Writer<S, T> write_y(stores);
  for (int64_t begin = 0; begin < n; begin += kTile) {
    const int64_t size = tile_size(begin, n);
    const T* xs = read_x(x, begin, size);
    T* ys = write_y.tile(y, begin);
#pragma omp simd
    for (int64_t i = 0; i < size; ++i) ys[i] = formula.forward(xs[i], parameter);
    write_y.flush(y, begin, size);
  }
}

template <typename S, typename Formula, typename T = typename Formula::value_type,
          typename P = typename Formula::parameter_type>
formula::Wide<P> backward(const Formula& shared_formula, void* grad_x, const void* grad, const void* x, int64_t n,
                          P parameter, Stores stores) {
  const Formula formula = shared_formula;
  Reader<S, T> read_x;
  Reader<S, T> read_grad;
  Writer<S, T> write(stores);
  formula::Wide<P> total{};
  for (int64_t begin = 0; begin < n; begin += kTile) {
    const int64_t size = tile_size(begin, n);
    const T* xs = read_x(x, begin, size);
    const T* gs = read_grad(grad, begin, size);
    T* out = write.tile(grad_x, begin);
    // A Pair as the variable of the reduction would not be vectorized.
    T sum = 0;
    T second = 0;
#pragma omp simd reduction(+ : sum, second)
    for (int64_t i = 0; i < size; ++i) {
      const auto gradients = formula.backward(gs[i], xs[i], parameter);
      out[i] = gradients.x;
      if constexpr (formula::is_pair<P>) {
        sum += gradients.parameter.first;
        second += gradients.parameter.second;
      } else {
        sum += gradients.parameter;
      }
    }
    write.flush(grad_x, begin, size);
    if constexpr (formula::is_pair<P>) {
      total += formula::wide(P{sum, second});
    } else {
      total += formula::wide(sum);
    }
  }
  return total;
}

template <typename S, typename Formula, typename T = typename Formula::value_type>
void forward_each(const Formula& shared_formula, void* y, const void* x, int64_t n,
                  typename Loops<Formula>::Parameters parameters, Stores stores) {
  const Formula formula = shared_formula;
  Reader<S, T> read_x;
  Writer<S, T> write_y(stores);
  for (int64_t begin = 0; begin < n; begin += kTile) {
    const int64_t size = tile_size(begin, n);
    const T* xs = read_x(x, begin, size);
    T* ys = write_y.tile(y, begin);
    // Plain pointers, or the loop is not vectorized.
    const T* first = parameters.numbers + begin;
    if constexpr (formula::is_pair<typename Formula::parameter_type>) {
      const T* second = first + parameters.length;
#pragma omp simd
      for (int64_t i = 0; i < size; ++i) ys[i] = formula.forward(xs[i], {first[i], second[i]});
    } else {
#pragma omp simd
      for (int64_t i = 0; i < size; ++i) ys[i] = formula.forward(xs[i], first[i]);
    }
    write_y.flush(y, begin, size);
  }
}

template <typename S, typename Formula, typename T = typename Formula::value_type>
void backward_each(const Formula& shared_formula, void* grad_x, const void* grad, const void* x, int64_t n,
                   typename Loops<Formula>::Parameters parameters, typename Loops<Formula>::Sums sums, Stores stores) {
  const Formula formula = shared_formula;
  Reader<S, T> read_x;
  Reader<S, T> read_grad;
  Writer<S, T> write(stores);
  for (int64_t begin = 0; begin < n; begin += kTile) {
    const int64_t size = tile_size(begin, n);
    const T* xs = read_x(x, begin, size);
    const T* gs = read_grad(grad, begin, size);
    T* out = write.tile(grad_x, begin);
    const T* first = parameters.numbers + begin;
    T* first_sums = sums.numbers + begin;
    if constexpr (formula::is_pair<typename Formula::parameter_type>) {
      const T* second = first + parameters.length;
      T* second_sums = first_sums + sums.length;
#pragma omp simd
      for (int64_t i = 0; i < size; ++i) {
        const auto gradients = formula.backward(gs[i], xs[i], {first[i], second[i]});
        out[i] = gradients.x;
        first_sums[i] += gradients.parameter.first;
        second_sums[i] += gradients.parameter.second;
      }
    } else {
#pragma omp simd
      for (int64_t i = 0; i < size; ++i) {
        const auto gradients = formula.backward(gs[i], xs[i], first[i]);
        out[i] = gradients.x;
        first_sums[i] += gradients.parameter;
      }
    }
    write.flush(grad_x, begin, size);
  }
}

template <typename S, typename Formula>
Loops<Formula> of() {
  return {&forward<S, Formula>, &backward<S, Formula>, &forward_each<S, Formula>, &backward_each<S, Formula>};
}

}  // namespace

template <typename Formula>
Loops<Formula> loops(Storage storage) {
  if constexpr (std::is_same_v<typename Formula::value_type, double>) {
    return of<double, Formula>();
  } else {
    switch (storage) {
      case Storage::kHalf:
        return of<Half, Formula>();
      case Storage::kBFloat16:
        return of<BFloat16, Formula>();
      default:
        return of<float, Formula>();
    }
  }
}

#define CCTORCH_DEFINE_FORMULA(name)                   \
  template Loops<formula::name<float>> loops(Storage); \
  template Loops<formula::name<double>> loops(Storage);
CCTORCH_FOR_EACH_FORMULA(CCTORCH_DEFINE_FORMULA)

}  // namespace cctorch::simd::CCTORCH_ISA
