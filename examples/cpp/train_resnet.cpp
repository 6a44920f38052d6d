#include <cctorch/cctorch.h>
#include <fmt/format.h>
#include <fmt/ranges.h>
#include <torch/cuda.h>
#include <torch/utils.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <exception>
#include <filesystem>
#include <map>
#include <optional>
#include <stdexcept>
#include <string>
#include <system_error>
#include <utility>
#include <vector>

#include "checkpoint.h"
#include "fashion_mnist.h"
#include "files.h"
#include "measurements.h"
#include "options.h"
#include "resnet.h"
#include "training.h"

namespace fs = std::filesystem;

namespace {

constexpr int64_t classes = 10;
constexpr int64_t repair_images = 4000;

// Where torchrun starts several processes on a machine, each has a GPU of its own.
at::Device choose_device(const std::string& name) {
  const bool available = torch::cuda::is_available();
  if (name == "cuda" && !available)
    throw std::invalid_argument("--device cuda: no GPU can be used, expected auto or cpu");
  if (name == "cpu" || !available) return at::kCPU;
  const char* const local_rank = std::getenv("LOCAL_RANK");
  const int index = local_rank ? std::atoi(local_rank) : 0;
  if (index >= static_cast<int>(torch::cuda::device_count())) {
    throw std::invalid_argument(
        fmt::format("torchrun --nproc-per-node: rank {} of this machine has no GPU, expected at most {} processes, or "
                    "--device cpu",
                    index, torch::cuda::device_count()));
  }
  return {at::kCUDA, static_cast<at::DeviceIndex>(index)};
}

void to_channels_last(ResNet& model) {
  for (at::Tensor& parameter : model->parameters()) {
    if (parameter.dim() == 4) parameter.set_data(parameter.contiguous(at::MemoryFormat::ChannelsLast));
  }
}

ResNet new_model(const Options& options, const at::Device& device) {
  ResNet model(options.blocks, classes);
  model->to(device, options.float64 ? at::kDouble : at::kFloat);
  to_channels_last(model);
  return model;
}

FashionMnist load_data(const Options& options, const at::Device& device, const Ranks& ranks) {
  const std::string folder = ranks.on_main([&] {
    if (!options.synthetic) return options.data;
    const std::string synthetic = (fs::path(options.out) / "synthetic").string();
    write_synthetic(synthetic, 1280, 640);
    return synthetic;
  });
  FashionMnist data = read_fashion_mnist(folder, options.limit);
  for (Images* images : {&data.train, &data.test}) {
    images->pixels = images->pixels.to(device);
    images->labels = images->labels.to(device);
  }
  return data;
}

struct Search {
  cctorch::CompressionPlan plan;
  int64_t nominal_macs = 0;
};

Search solve(const std::vector<cctorch::collaborative::Layer>& layers, const cctorch::ChannelGraph& graph,
             const std::vector<cctorch::LayerSpec>& specs, const Options& options) {
  cctorch::collaborative::Options solver;
  solver.target = options.target;
  if (options.layout == "spatial") solver.layout = cctorch::LowRankLayout::spatial;
  const cctorch::collaborative::Search search(layers, cctorch::dense_macs(specs), solver);
  auto solution = search.at_final(options.target, specs, graph);
  for (const std::string& warning : solution.warnings) fmt::print("warning: {}\n", warning);
  fmt::print("search: rate optimization {:.2f} s, heuristic {:.2f} s\n", solution.curve_seconds,
             solution.heuristic_seconds);
  const int64_t nominal_macs = cctorch::nominal_macs(specs, solution.plan);
  graph.resolve(solution.plan);
  cctorch::drop_idle_ranks(specs, solution.plan);
  return {std::move(solution.plan), nominal_macs};
}

// The gradients are those over all ranks; rank 0 searches, and all get its plan.
Search search(ResNet& model, const Images& images, const std::vector<cctorch::LayerSpec>& specs, const Options& options,
              const Ranks& ranks) {
  const auto layers = cctorch::collaborative::mean_gradients(*model, cctorch::collaborative::participants(specs),
                                                             losses(model, images, options.batch, ranks), ranks);
  Search found;
  const std::string plan = ranks.on_main([&] {
    found = solve(layers, model->channel_graph(), specs, options);
    return found.plan.to_json();
  });
  found.plan = cctorch::CompressionPlan::from_json(plan);
  return found;
}

// Of every convolution and linear layer; the first and the last are the ones that few bits cost most.
std::map<std::string, int64_t> bits_of(const std::vector<cctorch::LayerSpec>& specs, int64_t bits) {
  std::map<std::string, int64_t> of_layers;
  if (bits == 0) return of_layers;
  for (const cctorch::LayerSpec& spec : specs) {
    const bool at_an_end = spec.name == "conv1" || spec.name == "linear";
    if (spec.macs() > 0) of_layers[spec.name] = at_an_end ? std::max<int64_t>(bits, 8) : bits;
  }
  return of_layers;
}

void check_target(int64_t dense_macs, int64_t final_macs, double target) {
  const double removed = 1.0 - static_cast<double>(final_macs) / static_cast<double>(dense_macs);
  if (removed >= target - 0.01) return;
  throw std::runtime_error(
      fmt::format("the plan removes {:.1f} % of the multiply-accumulates, expected {:.1f} %: lower "
                  "--target",
                  100 * removed, 100 * target));
}

// The two files are all that is needed: a fresh dense network, the plan, the tensors. Rank 0 has them.
double reloaded_accuracy(const Options& options, const at::Device& device, const Images& images, const Ranks& ranks) {
  const std::string json = ranks.on_main([&] { return read_file(fs::path(options.out) / "plan.json"); });
  ResNet model = new_model(options, device);
  cctorch::apply(*model, cctorch::CompressionPlan::from_json(json));
  to_channels_last(model);
  ranks.on_main([&] {
    const std::string file = read_file(fs::path(options.out) / "compressed.safetensors");
    cctorch::load_state_dict(*model, cctorch::from_safetensors(file).tensors);
    return "";
  });
  cctorch::distributed::broadcast_state(*model, ranks);
  return accuracy(model, images, 256, ranks);
}

// A network that stands at `state`, and its optimizer. Also a run that nothing has stopped begins each stage with one.
struct Trainee {
  ResNet model;
  torch::optim::SGD optimizer;

  Trainee(const State& state, const Options& options, const at::Device& device, const Ranks& ranks)
      : model(shaped(state, options, device)),
        optimizer(model->parameters(),
                  torch::optim::SGDOptions(options.lr).momentum(0.9).nesterov(true).weight_decay(5e-4)) {
    model->synchronize(ranks);
    state.restore(model, optimizer);
  }

  static ResNet shaped(const State& state, const Options& options, const at::Device& device) {
    ResNet model = new_model(options, device);
    if (state.compressed) cctorch::apply(*model, state.compressed->plan);
    to_channels_last(model);
    if (state.compressed && state.compressed->quantized) cctorch::prepare(*model, state.compressed->plan);
    return model;
  }
};

class Run {
 public:
  Run(const Options& options, const at::Device& device, const Ranks& ranks)
      : options_(options),
        device_(device),
        ranks_(ranks),
        out_(options.out),
        checkpoint_(out_ / "checkpoint.safetensors", settings(options), ranks) {}

  void execute() {
    const std::optional<State> saved = checkpoint_.load();
    torch::manual_seed(options_.seed);
    data_ = load_data(options_, device_, ranks_);
    fmt::print("ResNet-{} on {}, {} rank(s): {} training images, {} test images\n", 6 * options_.blocks + 2,
               device_.str(), ranks_.count(), data_.train.labels.size(0), data_.test.labels.size(0));
    if (saved) {
      state_ = *saved;
      fmt::print("going on after epoch {} of {}\n", state_.losses.size(),
                 options_.epochs + options_.finetune_epochs + (options_.bits > 0 ? options_.quantize_epochs : 0));
    }
    // Anew: making data has drawn random numbers on rank 0 alone.
    torch::manual_seed(options_.seed);
    if (!state_.compressed) {
      Trainee dense(state_, options_, device_, ranks_);
      train_to("training", 0, options_.epochs, options_.lr, dense);
      compress(dense);
    }
    if (!state_.compressed->quantized) {
      Trainee compressed(state_, options_, device_, ranks_);
      train_to("fine-tuning", options_.epochs, options_.finetune_epochs, 0.5 * options_.lr, compressed);
      if (options_.bits == 0) return finish(compressed.model);
      quantize(compressed);
    }
    Trainee quantized(state_, options_, device_, ranks_);
    train_to("quantizing", options_.epochs + options_.finetune_epochs, options_.quantize_epochs, 0.1 * options_.lr,
             quantized);
    finish(quantized.model);
  }

 private:
  // What is left of a stage behind the epochs of those `before`, with a checkpoint after each epoch.
  void train_to(const std::string& stage, int64_t before, int64_t epochs, double lr, Trainee& trainee) {
    const uint64_t seed = static_cast<uint64_t>(options_.seed) * 1'000'003 + static_cast<uint64_t>(before);
    train(trainee.model, trainee.optimizer, data_.train, {stage, epochs, options_.batch, lr, seed},
          static_cast<int64_t>(state_.losses.size()) - before, ranks_, [&](double loss) {
            state_.losses.push_back(loss);
            save(trainee);
          });
  }

  void save(Trainee& trainee) {
    cctorch::distributed::assert_identical("the checkpoint", *trainee.model, ranks_);
    state_.take(trainee.model, trainee.optimizer);
    checkpoint_.save(state_);
  }

  void compress(Trainee& dense) {
    ResNet& model = dense.model;
    const auto specs = cctorch::layer_specs(*model, [&] {
      accuracy(model, {data_.test.pixels.narrow(0, 0, 1), data_.test.labels.narrow(0, 0, 1)}, 1, {});
    });
    Compressed found;
    found.dense = measure(model, data_.test, cctorch::dense_macs(specs), cctorch::state_dict(*model),
                          out_ / "dense.safetensors", ranks_);
    auto [plan, nominal_macs] = search(model, data_.train, specs, options_, ranks_);
    found.plan = std::move(plan);
    cctorch::set_bits(specs, found.plan, bits_of(specs, options_.bits));
    found.nominal_macs = nominal_macs;
    found.final_macs = cctorch::final_macs(specs, found.plan);
    check_target(found.dense.macs, found.final_macs, options_.target);
    ResNet whole = new_model(options_, device_);
    cctorch::load_state_dict(*whole, cctorch::state_dict(*model));
    cctorch::apply(*model, found.plan, &dense.optimizer);
    found.uncorrected = accuracy(model, data_.test, 256, ranks_);
    reestimate(model, data_.train, options_.batch, repair_images, ranks_);
    found.reestimated = accuracy(model, data_.test, 256, ranks_);
    repair(model, whole, found.plan, data_.train, options_.batch, repair_images, ranks_);
    found.repaired = accuracy(model, data_.test, 256, ranks_);
    state_.compressed = std::move(found);
    save(dense);
  }

  // The momentum was that of other gradients.
  void quantize(Trainee& trained) {
    Compressed::Quantized found{.finetuned = accuracy(trained.model, data_.test, 256, ranks_)};
    cctorch::prepare(*trained.model, state_.compressed->plan, "mse");
    found.prepared = accuracy(trained.model, data_.test, 256, ranks_);
    state_.compressed->quantized = found;
    trained.optimizer.state().clear();
    save(trained);
  }

  void finish(ResNet& model) {
    const Compressed& compressed = *state_.compressed;
    const auto stored = cctorch::quantized_state_dict(*model);
    cctorch::convert(*model);
    const Measurements after =
        measure(model, data_.test, compressed.final_macs, stored, out_ / "compressed.safetensors", ranks_);
    ranks_.on_main([&] {
      write_file(out_ / "plan.json", compressed.plan.to_json());
      write_file(out_ / "summary.json", summary(after));
      return "";
    });
    const double reloaded = reloaded_accuracy(options_, device_, data_.test, ranks_);
    if (reloaded != after.top1) {
      throw std::runtime_error(
          fmt::format("reloaded from {}: top-1 {} %, expected {} %", out_.string(), reloaded, after.top1));
    }
    print_table(compressed.dense, after);
    fmt::print("top-1 right after compression: {:.2f} %, {:.2f} % with BatchNorm re-estimated, {:.2f} % repaired\n",
               compressed.uncorrected, compressed.reestimated, compressed.repaired);
    if (compressed.quantized) {
      fmt::print(
          "top-1 fine-tuned: {:.2f} %, with {} bits (8 or more in the first and last layer) and untrained: {:.2f} %\n",
          compressed.quantized->finetuned, options_.bits, compressed.quantized->prepared);
    }
    fmt::print(
        "written to {}: plan.json, dense.safetensors, compressed.safetensors (reloaded: same top-1), "
        "summary.json\n",
        out_.string());
  }

  std::string summary(const Measurements& after) const {
    const Compressed& compressed = *state_.compressed;
    const std::string quantized = compressed.quantized
                                      ? fmt::format("\"top1_finetuned\": {}, \"top1_prepared\": {}, ",
                                                    compressed.quantized->finetuned, compressed.quantized->prepared)
                                      : "";
    return fmt::format(
        "{{\"top1_before\": {}, \"top1_compressed\": {}, \"top1_reestimated\": {}, \"top1_repaired\": {}, {}"
        "\"top1_after\": {}, "
        "\"macs_before\": {}, \"macs_nominal\": {}, \"macs_after\": {}, \"losses\": [{}]}}\n",
        compressed.dense.top1, compressed.uncorrected, compressed.reestimated, compressed.repaired, quantized,
        after.top1, compressed.dense.macs, compressed.nominal_macs, after.macs, fmt::join(state_.losses, ", "));
  }

  const Options& options_;
  const at::Device device_;
  const Ranks& ranks_;
  const fs::path out_;
  const Checkpoint checkpoint_;
  FashionMnist data_;
  State state_;
};

// Rank 0 alone writes the files and the progress.
void run_on_ranks(const Options& options, Ranks& ranks) {
  const at::Device device = choose_device(options.device);
  ranks = Ranks::from_environment(device);
  if (!ranks.is_main() && std::freopen("/dev/null", "w", stdout) == nullptr)
    throw std::runtime_error("/dev/null: cannot be written");
  std::optional<FolderLock> lock;
  ranks.on_main([&] {
    std::error_code error;
    fs::create_directories(options.out, error);
    if (error)
      throw std::invalid_argument(
          fmt::format("--out {}: no such folder can be made: {}", options.out, error.message()));
    lock.emplace(options.out);
    return "";
  });
  Run(options, device, ranks).execute();
}

}  // namespace

int main(int argc, char** argv) {
  cctorch::keep_freed_memory();
  // Outlives an error: a process group that ends waits for the others, which wait for what this rank will never send.
  Ranks ranks;
  int code = 1;
  try {
    const Options options = parse_options({argv + 1, argv + argc});
    if (options.help) {
      fmt::print("{}", help_text());
    } else {
      run_on_ranks(options, ranks);
    }
    return 0;
  } catch (const std::invalid_argument& error) {
    fmt::print(stderr, "train_resnet: {}\n", error.what());
    code = 2;
  } catch (const c10::Error& error) {
    fmt::print(stderr, "train_resnet: {}\n", error.what_without_backtrace());
  } catch (const std::exception& error) {
    fmt::print(stderr, "train_resnet: {}\n", error.what());
  }
  if (ranks.count() == 1) return code;
  std::fflush(nullptr);
  std::_Exit(code);
}
