#pragma once

#include <cctorch/plan.h>
#include <cctorch/safetensors.h>
#include <torch/optim/sgd.h>

#include <cstdint>
#include <filesystem>
#include <map>
#include <optional>
#include <string>
#include <vector>

#include "measurements.h"
#include "resnet.h"
#include "training.h"

using Tensors = cctorch::Safetensors::Tensors;  // by name

// What is known once the network is compressed.
struct Compressed {
  cctorch::CompressionPlan plan;
  int64_t nominal_macs = 0, final_macs = 0;
  Measurements dense;
  double uncorrected = 0.0, reestimated = 0.0, repaired = 0.0;  // top-1

  // Once the weights have few bits: top-1 before that, and with them but before they are trained so.
  struct Quantized {
    double finetuned = 0.0, prepared = 0.0;
  };
  std::optional<Quantized> quantized;
};

// Where a run stands after an epoch, or after the compression: all that it takes to go on as if it had never stopped.
// No random numbers are among it: each epoch has a seed of its own.
struct State {
  std::vector<double> losses;            // of each epoch so far, of all stages
  std::optional<Compressed> compressed;  // absent while the dense network is trained
  Tensors model, momentum;               // empty before the first epoch

  void take(const ResNet& network, torch::optim::SGD& optimizer);

  // Into a network of the same shape, and an optimizer of its parameters. Throws std::runtime_error for another one.
  void restore(ResNet& network, torch::optim::SGD& optimizer) const;
};

// The file that holds the newest state. All ranks make the same calls; rank 0 reads and writes.
//
// It is a safetensors file. Nothing in it is executed, and one that is damaged, or made to do damage, is refused.
class Checkpoint {
 public:
  // `settings`: names and values that a run has to be continued with.
  Checkpoint(std::filesystem::path file, std::map<std::string, std::string> settings, const Ranks& ranks);

  // Absent where there is none yet. Throws on every rank, on rank 0 std::invalid_argument, where other settings or an
  // earlier version made it, or it is damaged.
  std::optional<State> load() const;

  void save(const State& state) const;

 private:
  std::filesystem::path file_;
  std::map<std::string, std::string> settings_;
  Ranks ranks_;
};
