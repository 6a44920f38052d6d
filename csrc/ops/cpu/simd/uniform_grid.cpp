#include "csrc/ops/cpu/simd/uniform_grid.h"

#include "csrc/ops/cpu/simd/reader.h"

namespace cctorch::simd::CCTORCH_ISA {
namespace {

// Squared errors are compared to this fraction of ||x||^2: what is on a grid already must not move to an equal one.
constexpr double kNoise = 1e-12;
// Ends of the grid that are tried: max |x| and this many times 0.9 of it. Then so many steps of rounding and least
// squares.
constexpr int kClips = 31;
constexpr double kClipRatio = 0.9;
constexpr int kRefinements = 10;
constexpr double kLargestFactor = 1.7976931348623157e308;

// Levels by the largest one, `reach`: it is then an element of the quantized row, and quantizing again finds it.
struct Grid {
  double reach;
  double q;
  double factor = 0;

  Grid(double largest_level, double levels) : reach(largest_level), q(levels) {
    if (reach > 0) factor = q / reach < kLargestFactor ? q / reach : kLargestFactor;
  }
  double code(double x) const {
    const double scaled = __builtin_rint(x * factor);
    const double low = scaled < -q ? -q : scaled;
    return low > q ? q : low;
  }
  double level(double x) const { return code(x) / q * reach; }
};

// x . code and code . code
struct Products {
  double dot = 0;
  double square = 0;

  void add(const Grid& grid, const double* x, int64_t n) {
    double dots = 0;
    double squares = 0;
#pragma omp simd reduction(+ : dots, squares)
    for (int64_t i = 0; i < n; ++i) {
      const double code = grid.code(x[i]);
      dots += x[i] * code;
      squares += code * code;
    }
    dot += dots;
    square += squares;
  }

  // The level of the code q that is best for these codes, at most `limit`.
  double reach(double q, double limit) const {
    const double fitted = dot / (square > 1 ? square : 1) * q;
    return fitted < limit ? fitted : limit;
  }
  // How much less than ||x||^2 the squared error is with it.
  double gain(double fitted, double q) const { return fitted / q * (2 * dot - fitted / q * square); }
};

template <typename S, typename T>
class Row {
 public:
  Row(const void* x, int64_t n) : x_(x), n_(n) {}

  // function(doubles, begin, size) for every tile
  template <typename Function>
  void for_each_tile(const Function& function) {
    for (int64_t begin = 0; begin < n_; begin += kTile) {
      const int64_t size = tile_size(begin, n_);
      const T* values = read_(x_, begin, size);
      for (int64_t i = 0; i < size; ++i) tile_[i] = static_cast<double>(values[i]);
      function(tile_, begin, size);
    }
  }

  double largest() {
    double largest = 0;
    for_each_tile([&](const double* x, int64_t, int64_t size) {
      double top = 0;
#pragma omp simd reduction(max : top)
      for (int64_t i = 0; i < size; ++i) top = __builtin_fabs(x[i]) > top ? __builtin_fabs(x[i]) : top;
      largest = top > largest ? top : largest;
    });
    return largest;
  }

  double best_reach(double q, double largest) {
    Products products[kClips];
    double ends[kClips];
    for (int k = 0; k < kClips; ++k) ends[k] = k == 0 ? largest : ends[k - 1] * kClipRatio;
    for_each_tile([&](const double* x, int64_t, int64_t size) {
      for (int k = 0; k < kClips; ++k) products[k].add(Grid(ends[k], q), x, size);
    });
    double best = products[0].reach(q, largest);
    double gain = products[0].gain(best, q);
    const auto keep_better = [&](const Products& other) {
      const double reach = other.reach(q, largest);
      const bool better = other.gain(reach, q) > gain;
      if (better) gain = other.gain(reach, q);
      if (better) best = reach;
      return better;
    };
    for (int k = 1; k < kClips; ++k) keep_better(products[k]);
    for (int i = 0; i < kRefinements; ++i) {
      Products next;
      for_each_tile([&](const double* x, int64_t, int64_t size) { next.add(Grid(best, q), x, size); });
      if (!keep_better(next)) break;
    }
    return best;
  }

  void write(const Grid& grid, void* y) {
    for_each_tile([&](const double* x, int64_t begin, int64_t size) { store(grid, x, size, y, begin); });
  }

  // Squared, of the levels as they are stored.
  double error(const Grid& grid) {
    S levels[kTile];
    double total = 0;
    for_each_tile([&](const double* x, int64_t, int64_t size) {
      store(grid, x, size, levels, 0);
      const T* values = read_(levels, 0, size);
      double sum = 0;
#pragma omp simd reduction(+ : sum)
      for (int64_t i = 0; i < size; ++i) {
        const double missed = static_cast<double>(values[i]) - x[i];
        sum += missed * missed;
      }
      total += sum;
    });
    return total;
  }

  // A number as it is stored.
  static double rounded(double value) {
    S storage{};
    Writer<S, T> write;
    Reader<S, T> read;
    *write.tile(&storage, 0) = static_cast<T>(value);
    write.flush(&storage, 0, 1);
    return static_cast<double>(*read(&storage, 0, 1));
  }

  double energy() {
    double total = 0;
    for_each_tile([&](const double* x, int64_t, int64_t size) {
      double sum = 0;
#pragma omp simd reduction(+ : sum)
      for (int64_t i = 0; i < size; ++i) sum += x[i] * x[i];
      total += sum;
    });
    return total;
  }

 private:
  static void store(const Grid& grid, const double* x, int64_t size, void* y, int64_t begin) {
    Writer<S, T> write;
    T* out = write.tile(y, begin);
#pragma omp simd
    for (int64_t i = 0; i < size; ++i) out[i] = static_cast<T>(grid.level(x[i]));
    write.flush(y, begin, size);
  }

  const void* x_;
  int64_t n_;
  Reader<S, T> read_;
  double tile_[kTile];
};

template <typename S, typename T>
void quantize(const void* x, void* y, int64_t n, double q, bool search) {
  Row<S, T> row(x, n);
  const Grid plain(row.largest(), q);
  if (!search) return row.write(plain, y);
  const Grid searched(Row<S, T>::rounded(row.best_reach(q, plain.reach)), q);
  const bool better = row.error(searched) < row.error(plain) - kNoise * row.energy();
  row.write(better ? searched : plain, y);
}

}  // namespace

UniformGrid uniform_grid(Storage storage) {
  return with_types(storage, []<typename S, typename T>() -> UniformGrid { return &quantize<S, T>; });
}

}  // namespace cctorch::simd::CCTORCH_ISA
