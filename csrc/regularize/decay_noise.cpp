#include <ATen/ATen.h>
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/Dispatch.h>
#include <cctorch/regularizers.h>

#include <algorithm>
#include <cmath>
#include <iterator>
#include <limits>
#include <numeric>

#include "csrc/ops/cpu/channelwise.h"
#include "csrc/ops/cpu/simd/decay_noise.h"
#include "csrc/ops/cpu/simd/mt19937.h"
#include "csrc/regularize/norms.h"
#include "csrc/regularize/rewrite.h"
#include "csrc/regularize/state.h"

namespace cctorch::regularize {

namespace {

// What a piece is made of and what it becomes stay in the first-level cache. A piece of noise has a start, of 624
// words.
constexpr int64_t kPiece = 4096;
constexpr int64_t kNoisePiece = 8192;

simd::DecayNoise loops(const at::Tensor& weight) {
  const auto storage = channelwise::storage(weight.scalar_type());
  return for_isa(&simd::baseline::decay_noise, &simd::avx2::decay_noise, &simd::avx512::decay_noise)(storage);
}

simd::Mt19937Loops mt19937() {
  return for_isa(&simd::baseline::mt19937, &simd::avx2::mt19937, &simd::avx512::mt19937)();
}

double largest(at::ScalarType type) {
  return AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, type, "largest",
                                         [] { return static_cast<double>(std::numeric_limits<scalar_t>::max()); });
}

// The words that a generator on CPU draws next. Parts of them can be drawn on any thread, from where they start.
class Words {
  using Mt = simd::Mt19937;

 public:
  explicit Words(const at::Generator& generator) {
    const auto data = engine(generator).data();
    std::copy(data.state_.begin(), data.state_.end(), std::begin(next_.state));
    next_.used = Mt::kWords + 1 - data.left_;
  }

  // Where each `part` of the next n starts.
  std::vector<Mt> next(int64_t n, int64_t part) {
    std::vector<Mt> starts;
    for (int64_t begin = 0; begin < n; begin += part) {
      starts.push_back(next_);
      mt19937().skip(next_, std::min(part, n - begin));
    }
    return starts;
  }

  // The generator has drawn them.
  void keep_in(at::Generator& generator) const {
    auto data = engine(generator).data();
    std::copy(std::begin(next_.state), std::end(next_.state), data.state_.begin());
    data.next_ = static_cast<uint32_t>(next_.used);
    data.left_ = static_cast<int>(Mt::kWords + 1 - next_.used);
    at::mt19937 after;
    after.set_data(data);
    at::check_generator<at::CPUGeneratorImpl>(generator)->set_engine(after);
  }

 private:
  static at::mt19937 engine(const at::Generator& generator) {
    return at::check_generator<at::CPUGeneratorImpl>(generator)->engine();
  }
  Mt next_;
};

}  // namespace

WeightDecay::WeightDecay(double strength) : strength_(strength) {
  TORCH_CHECK_VALUE(0 <= strength && strength <= 1, "WeightDecay: strength = ", strength, ", expected 0 to 1");
}

void WeightDecay::replace(std::vector<Weight>& weights) {
  std::vector<at::Tensor> values;
  for (Weight& weight : weights) {
    values.push_back(weight.value);
    if (!weight.value.is_cpu()) continue;
    weight.value = dense(weight.value);
    weight.rewrite = {kPiece, [scale = loops(weight.value).scale, factor = 1 - strength_](const void* from, void* to,
                                                                                          int64_t, int64_t size) {
                        scale(from, to, size, factor);
                        return std::nullopt;
                      }};
  }
  if (values[0].is_cpu()) return;
  values = at::_foreach_mul(values, 1 - strength_);
  for (size_t i = 0; i < weights.size(); ++i) weights[i].value = values[i];
}

UniformNoise::UniformNoise(double strength, int64_t seed) : strength_(strength), seed_(seed) {
  TORCH_CHECK_VALUE(strength >= 0 && std::isfinite(strength), "UniformNoise: strength = ", strength,
                    ", expected a finite number of at least 0");
  TORCH_CHECK_VALUE(seed >= 0, "UniformNoise: seed = ", seed, ", expected at least 0");
}

void UniformNoise::replace(std::vector<Weight>& weights) {
  const at::Device device = weights.front().value.device();
  if (!generator_.defined() || generator_.device() != device) {
    generator_ = at::globalContext().defaultGenerator(device).clone();
    generator_.set_current_seed(seed_);
    // That of another kind of device has another size: there the draws begin anew.
    if (state_.defined() && state_.numel() == generator_.get_state().numel()) generator_.set_state(state_);
    state_.reset();
  }
  if (device.is_cpu()) {
    add_on_cpu(weights);
  } else {
    add_on_device(weights);
  }
  for (Weight& weight : weights) weight.storage = Storage::dense(weight.value);
}

void UniformNoise::add_on_device(std::vector<Weight>& weights) {
  // Each step for all weights together: most would be too short to be worth a launch.
  std::vector<at::Tensor> values, noise;
  std::vector<at::Scalar> roots;
  for (const Weight& weight : weights) {
    const at::Tensor& w = values.emplace_back(weight.value);
    noise.push_back(at::rand(w.sizes(), generator_, w.options()));
    roots.emplace_back(std::sqrt(static_cast<double>(w.numel())));
  }
  at::_foreach_mul_(noise, 2);
  at::_foreach_sub_(noise, 1);
  auto rms = at::_foreach_norm(values, 2, at::kDouble);
  at::_foreach_div_(rms, roots);
  at::_foreach_mul_(rms, strength_);
  for (size_t i = 0; i < weights.size(); ++i) noise[i].mul_(rms[i].to(noise[i].scalar_type()));
  values = at::_foreach_add(values, noise);
  for (size_t i = 0; i < weights.size(); ++i) weights[i].value = values[i];
}

// The same numbers that at::rand draws, in row-major order.
void UniformNoise::add_on_cpu(std::vector<Weight>& weights) {
  Words words(generator_);
  for (Weight& weight : weights) {
    const at::Tensor& w = weight.value = weight.value.contiguous();
    if (weight.squares.empty()) weight.squares = part_squares({w})[0];
    const double norm = std::sqrt(std::accumulate(weight.squares.begin(), weight.squares.end(), 0.0));
    const double rms = norm / std::sqrt(static_cast<double>(w.numel())) * strength_;
    const auto amplitude = at::scalar_tensor(rms, at::kDouble).to(w.scalar_type()).item<double>();
    const int64_t each = w.scalar_type() == at::kDouble ? 2 : 1;
    weight.rewrite = {kNoisePiece,
                      [add = loops(w).add_uniform, starts = words.next(each * w.numel(), each * kNoisePiece), each,
                       amplitude](const void* from, void* to, int64_t begin, int64_t size) {
                        thread_local std::vector<uint32_t> drawn;
                        drawn.resize(each * kNoisePiece);
                        simd::Mt19937 generator = starts[begin / kNoisePiece];
                        mt19937().draw(generator, drawn.data(), each * size);
                        add(from, to, size, drawn.data(), amplitude);
                        return std::nullopt;
                      }};
    // No weight is above their norm. Where a sum may overflow, what came out is looked at before a weight is changed.
    if (norm + amplitude > 0.9 * largest(w.scalar_type())) finish(weight);
  }
  words.keep_in(generator_);
}

State UniformNoise::state_dict() const {
  State state{{"seed", seed_}};
  if (generator_.defined()) {
    state.emplace("generator", generator_.get_state());
  } else if (state_.defined()) {
    state.emplace("generator", state_);
  }
  return state;
}

void UniformNoise::load_state_dict(const State& state) {
  const auto seed = read<int64_t>(state, "seed");
  state_ = state.contains("generator") ? read<at::Tensor>(state, "generator").cpu() : at::Tensor();
  seed_ = seed;
  generator_ = at::Generator();
}

}  // namespace cctorch::regularize
