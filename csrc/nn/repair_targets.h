#pragma once

#include <cctorch/nn/repair.h>
#include <cctorch/plan.h>
#include <torch/nn/module.h>

#include <cstdint>
#include <functional>
#include <map>
#include <string>
#include <unordered_map>
#include <unordered_set>
#include <vector>

#include "csrc/nn/watching.h"

namespace cctorch::repair {

using Named = std::map<std::string, Compressible*>;

std::vector<Compressible*> values_of(const Named& layers);

// A layer in order of execution. `norm`: the BatchNorm that reads it, or nothing. `joins`: a shortcut is added.
struct Place {
  std::string layer, norm;
  bool joins = false;
};

// A feature map B x N x H x W of what a linear layer reads or gives.
at::Tensor as_map(const Compressible& layer, const at::Tensor& y);

// What can be fitted of a dense model: layers under one name, with parameters of their own, what removed branches
// leave, and LSTMs, behind which all inputs are others. `norms`: the normalizations that may be behind them.
struct Candidates {
  Named layers, norms;

  Candidates(torch::nn::Module& dense, const CompressionPlan& plan);
};

// The dense model: finds the places while the first batch runs, and what it gives there.
class Targets : public Watching {
 public:
  Targets(const Candidates& candidates, const CompressionPlan& plan, const ModelOptions& options, int64_t first_image);

  // `next` runs the model on a batch, and returns false after the last.
  void run(const std::function<bool()>& next);

  const std::vector<Place>& places() const { return places_; }

  // How many images the model was run on, as its layers saw it.
  int64_t images() const;

  // Kept outputs x samples.
  at::Tensor take(const std::string& layer);

 protected:
  void on_output(Compressible& layer, const at::Tensor& y) override;
  void on_norm(const Origin& origin, const at::Tensor& y) override;
  void on_join(const Origin& origin, const at::Tensor& y, const at::Tensor& other) override;
  void on_joined(const Origin& origin, const at::Tensor& sum) override;
  void on_use(Compressible& layer) override;

 private:
  // Where a target may be taken: behind a layer, its norm, or the addition.
  struct Spot {
    Origin origin;
    bool joined;
    at::Tensor samples;
  };

  void record(const Origin& origin, bool joined, const at::Tensor& y);
  at::Tensor sampled(const Compressible& layer, const std::string& name, const at::Tensor& y) const;
  bool is_spot_of(const Place& place, const Origin& origin, bool joined) const;
  Place place_of(Compressible* layer) const;
  void choose();

  const CompressionPlan& plan_;
  const ModelOptions& options_;
  const int64_t first_image_;
  std::unordered_map<const Compressible*, std::string> names_;
  std::unordered_map<const Compressible*, int64_t> images_, begin_;
  std::vector<Compressible*> order_;
  std::vector<Origin> normed_, joined_;
  std::unordered_set<Compressible*> used_;
  std::vector<Spot> spots_;
  bool chosen_ = false;
  std::vector<Place> places_;
  std::map<std::string, const Place*> places_by_name_;
  std::map<std::string, std::vector<at::Tensor>> samples_;
};

}  // namespace cctorch::repair
