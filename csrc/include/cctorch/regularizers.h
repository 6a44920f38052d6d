#pragma once

#include <ATen/core/Generator.h>
#include <ATen/core/Tensor.h>
#include <cctorch/plan.h>

#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <variant>
#include <vector>

// Projections Q. docs/regularization-frequency.md has the formula of each.
namespace cctorch::regularize {

// What is stored in a checkpoint beside the weights. Plain values only, so that any format can hold it.
using State = std::map<std::string, std::variant<int64_t, double, std::string, at::Tensor>>;

using NamedParameters = std::vector<std::pair<std::string, at::Tensor>>;

// Ranks of a factored weight, as LayerPlan has them.
struct LowRankForm {
  int64_t rank = 0;
  LowRankLayout layout = LowRankLayout::channel;
  std::optional<int64_t> rank_in = std::nullopt;
};

// How a compressed parameter would be stored: values * bits_per_value + index_bits + table_bits.
struct Storage {
  int64_t values = 0;
  int64_t bits_per_value = 0;
  int64_t index_bits = 0;  // which weights `values` are, of a pruned parameter
  int64_t table_bits = 0;  // scales, codebooks
  bool factored = false;   // `values` are the entries of factors: lost when single weights change
  std::optional<LowRankForm> form = std::nullopt;  // of factors that a layer can be built from
  bool inputs_pruned = false;                      // slices along dimension 1 are zero that a layer needs not read

  static Storage dense(const at::Tensor& parameter);
  int64_t bits() const { return values * bits_per_value + index_bits + table_bits; }
};

// What is left to do to a value on CPU, in pieces of its memory that any thread may take in any order. An event does it
// where the parameter lies, which takes no second copy and sees every value once.
struct Rewrite {
  int64_t size = 0;  // of a piece, the last one may be smaller; 0 where nothing is left to do
  // Writes to `to`, which is elsewhere, what becomes of the values [begin, begin + size), which lie at `from`. Finite
  // where they are: nothing looks before the parameter is written. Returns ||to - from||^2 where that is known without
  // looking; 0 where they stay, and then it need not write.
  std::function<std::optional<double>(const void* from, void* to, int64_t begin, int64_t size)> piece = {};
};

// One parameter on its way through Q. `value` is replaced, never written into, and dense where a `rewrite` is left.
struct Weight {
  std::string name;
  at::Tensor value;
  Storage storage;
  Rewrite rewrite = {};
  // Sums of squares of parts of `value`, on CPU where it is a parameter as it was: of its slices along
  // `sliced_dimension`, if Q asks for those.
  std::vector<double> squares = {};
  std::optional<int64_t> sliced_dimension = std::nullopt;
};

// Q(w), with w as it was. Only the parameters that Q acts on; tied and empty ones are left out.
struct Projection {
  NamedParameters parameters;
  std::vector<at::Tensor> values;
  std::vector<Storage> storages;
  at::Tensor weight_norm;  // ||w||: float64, 0-dim, on the parameters' device
  int64_t bits = 0;
  int64_t dense_bits = 0;
};

struct Outcome {
  at::Tensor update_norm;  // ||Q(w) - w|| over all parameters that Q acts on: float64, 0-dim, on their device
  at::Tensor weight_norm;  // ||w|| before
  int64_t bits = 0;        // compressed size of those parameters
  int64_t dense_bits = 0;
};

// Q. All parameters of one call are seen together. Parameters that are one tensor (tied) are changed once, empty ones
// never, nor are the log_scale and offset of a FakeQuant, which is known by having no other parameters. Every Q but
// weight decay and noise leaves parameters of fewer than two dimensions (biases, normalizations) alone and is a
// projection: Q(Q(w)) = Q(w), to rounding where it factors.
class Regularizer {
 public:
  virtual ~Regularizer() = default;

  // Throws c10::ValueError, naming the parameter, if one is NaN or infinite (which waits for the device once), is not
  // of a floating type, is on another device than the first, or does not fit this Q.
  Projection project(const NamedParameters& parameters);

  // The same, in place; no parameter is changed where it throws.
  Outcome apply(const NamedParameters& parameters);

  virtual bool acts_on(const at::Tensor& parameter) const { return parameter.dim() >= 2; }

  // Those of `parameters` that Q changes: each once, none empty. Throws as project does, but reads no data.
  NamedParameters select(const NamedParameters& parameters) const;

  // What `project` is made of: replaces the values of finite, distinct, non-empty weights that `acts_on` accepted, or
  // says how to rewrite them.
  virtual void replace(std::vector<Weight>& weights) = 0;

  // The dimension whose slices `replace` wants the squares of: they are then what ||w|| is summed from.
  virtual std::optional<int64_t> sliced_dimension() const { return std::nullopt; }

  virtual State state_dict() const { return {}; }
  virtual void load_state_dict(const State&) {}

 protected:
  virtual void check_shapes(const NamedParameters& /*selected*/) const {}
};

// Its class, such as "MagnitudePruning".
std::string kind(const Regularizer& regularizer);

// w (1 - strength), strength in [0, 1]
class WeightDecay final : public Regularizer {
 public:
  explicit WeightDecay(double strength);
  bool acts_on(const at::Tensor&) const override { return true; }
  void replace(std::vector<Weight>& weights) override;

 private:
  double strength_;
};

// w + strength rms(w) u with u uniform in [-1, 1); rms of each parameter. The generator is its own; its state is in
// state_dict. Equal seeds draw equal noise on all ranks.
class UniformNoise final : public Regularizer {
 public:
  explicit UniformNoise(double strength, int64_t seed = 0);
  bool acts_on(const at::Tensor&) const override { return true; }
  void replace(std::vector<Weight>& weights) override;
  State state_dict() const override;
  void load_state_dict(const State& state) override;

 private:
  void add_on_cpu(std::vector<Weight>& weights);
  void add_on_device(std::vector<Weight>& weights);

  double strength_;
  int64_t seed_;
  at::Generator generator_;  // made on the parameters' device when first drawn from
  at::Tensor state_;         // of a generator that has yet to be made
};

enum class Scope { global, layer };

// Keeps the floor((1 - sparsity) n) largest magnitudes of all weights together, or of each parameter.
class MagnitudePruning final : public Regularizer {
 public:
  explicit MagnitudePruning(double sparsity, Scope scope = Scope::global);
  void replace(std::vector<Weight>& weights) override;

 protected:
  void check_shapes(const NamedParameters& selected) const override;

 private:
  double sparsity_;
  Scope scope_;
};

// Keeps the n largest magnitudes of every m consecutive weights along dimension `axis`.
class NMPruning final : public Regularizer {
 public:
  explicit NMPruning(int64_t n = 2, int64_t m = 4, int64_t axis = 1);
  void replace(std::vector<Weight>& weights) override;

 protected:
  void check_shapes(const NamedParameters& selected) const override;

 private:
  int64_t n_, m_, axis_;
};

// Keeps the floor((1 - sparsity) size) slices of dimension `axis` with the largest L2 norm; at least one.
class ChannelPruning final : public Regularizer {
 public:
  explicit ChannelPruning(double sparsity, int64_t axis = 0);
  void replace(std::vector<Weight>& weights) override;
  std::optional<int64_t> sliced_dimension() const override { return axis_; }

 protected:
  void check_shapes(const NamedParameters& selected) const override;

 private:
  double sparsity_;
  int64_t axis_;
};

// How the range of a uniform grid is found: smallest squared error (by search; exact for 2 bits), or the largest
// magnitude.
enum class Range { mse, absmax };

// s clamp(round(w / s), -q, q) with q = 2^(bits - 1) - 1 and one s for each slice of dimension 0 (or for the
// parameter). bits in [2, 16]; 2 bits are ternary.
class UniformQuantization final : public Regularizer {
 public:
  explicit UniformQuantization(int64_t bits, bool per_channel = true, Range range = Range::mse);
  void replace(std::vector<Weight>& weights) override;

 private:
  int64_t bits_;
  bool per_channel_;
  Range range_;
};

// The nearest of 2^bits values, which are the centers that Lloyd's algorithm finds in each parameter. bits in [1, 8].
class CodebookQuantization final : public Regularizer {
 public:
  explicit CodebookQuantization(int64_t bits);
  void replace(std::vector<Weight>& weights) override;

 private:
  int64_t bits_;
};

// sum_i a_i b_i with `bits` scales a_i for each slice of dimension 0 (or for the parameter) and b_i in {-1, 1}.
// Smallest squared error for 1 and 2 bits, alternating least squares for 3. bits in [1, 3].
class BinaryCodeQuantization final : public Regularizer {
 public:
  explicit BinaryCodeQuantization(int64_t bits, bool per_channel = true);
  void replace(std::vector<Weight>& weights) override;

 private:
  int64_t bits_;
  bool per_channel_;
};

// A convolution weight N x C x kh x kw as a matrix: N x (C kh kw), or (N kh) x (C kw). Other weights are always
// size(0) x the rest.
enum class MatrixView { channel, spatial };

// Exactly one of both. ratio > 1: weights divided by entries of the factors; the largest rank (at least 1) that
// reaches it.
struct RankOrRatio {
  std::optional<int64_t> rank = std::nullopt;
  std::optional<double> ratio = std::nullopt;
};

// Truncated SVD. A matrix whose factors would not be smaller is left alone. An event starts from the factors of the
// last one: they are its state.
class SVD final : public Regularizer {
 public:
  explicit SVD(RankOrRatio size, MatrixView view = MatrixView::channel);
  void replace(std::vector<Weight>& weights) override;
  State state_dict() const override { return bases_; }
  void load_state_dict(const State& state) override { bases_ = state; }

 private:
  RankOrRatio size_;
  MatrixView view_;
  State bases_;
};

// Truncated SVD of every tile x tile block of the size(0) x rest matrix: ratio tile / (2 rank). Blocks at the right and
// lower edge are as large as the matrix leaves them.
class TiledSVD final : public Regularizer {
 public:
  TiledSVD(int64_t tile, int64_t rank);
  void replace(std::vector<Weight>& weights) override;

 private:
  int64_t tile_, rank_;
};

// Exactly one of both. `ranks`: output, then input channels. ratio > 1: ranks in proportion to the channels.
struct RanksOrRatio {
  std::optional<std::pair<int64_t, int64_t>> ranks = std::nullopt;
  std::optional<double> ratio = std::nullopt;
};

// Tucker-2: low rank in output and in input channels (1 x 1, kh x kw, 1 x 1). A weight whose factors would not be
// smaller is left alone. An event starts from the bases of the last one: they are its state.
class Tucker2 final : public Regularizer {
 public:
  explicit Tucker2(RanksOrRatio size, int64_t iterations = 3);
  void replace(std::vector<Weight>& weights) override;
  State state_dict() const override { return bases_; }
  void load_state_dict(const State& state) override { bases_ = state; }

 private:
  void truncate(const std::vector<Weight*>& weights);

  RanksOrRatio size_;
  int64_t iterations_;
  State bases_;
};

// The last of `parts` applied to the result of those before it.
class Compose final : public Regularizer {
 public:
  explicit Compose(std::vector<std::shared_ptr<Regularizer>> parts);
  bool acts_on(const at::Tensor& parameter) const override;
  void replace(std::vector<Weight>& weights) override;
  State state_dict() const override;
  void load_state_dict(const State& state) override;

 protected:
  void check_shapes(const NamedParameters& selected) const override;

 private:
  std::vector<std::shared_ptr<Regularizer>> parts_;
};

}  // namespace cctorch::regularize
