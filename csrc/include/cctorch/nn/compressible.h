#pragma once

#include <ATen/core/Tensor.h>
#include <cctorch/nn/modules.h>
#include <cctorch/plan.h>

#include <cstdint>
#include <optional>
#include <string>
#include <utility>
#include <vector>

namespace cctorch::nn {

// What prepare() puts on a weight of a layer, which computes with quant(mask(weight)): each of the two may be missing.
struct Constraint {
  std::string weight;  // the parameter's name
  Mask mask{nullptr};
  FakeQuant quant{nullptr};

  at::Tensor operator()(at::Tensor value) const;
};

class Compressible;

// Is told what layers read and give.
class Watcher {
 public:
  virtual ~Watcher() = default;

  // Before `layer` computes with `input`, which is what it gathers of x.
  virtual void reads(Compressible& layer, const at::Tensor& x, const at::Tensor& input) = 0;
  virtual void gives(Compressible& layer, const at::Tensor& input, const at::Tensor& y) = 0;
};

// A dense layer that can carry out a LayerPlan in place.
class Compressible {
 public:
  virtual ~Compressible() = default;

  // The dense layer under `name`, also once it is compressed. `positions` is 0 until observe() has seen a forward pass.
  virtual LayerSpec spec(const std::string& name) const = 0;

  // Throws c10::Error naming the layer, what was found and what was expected, if compress() could not carry out `plan`.
  void check(const LayerPlan& plan) const;

  // Replaces the parameters by narrowed or factored ones of the same dtype, device, memory format and requires_grad.
  // Throws as check() does, and then leaves the layer as it was. `format` is that of the model: a constant in the place
  // of the layer's output takes it where a tensor without channels arrives, of which activations lose the layout.
  void compress(const LayerPlan& plan, at::MemoryFormat format = at::MemoryFormat::Contiguous);

  // What compress() carried out.
  const std::optional<LayerPlan>& plan() const { return plan_; }

  // The parameters that a mask or bits can act on, by name: the weight or its factors.
  virtual std::vector<std::pair<std::string, at::Tensor>> weights() const { return {}; }

  // Takes `constraint`, of one of weights(), as children of the layer: weight_mask and weight_quant.
  virtual void constrain(const Constraint& constraint);
  const std::vector<Constraint>& constraints() const { return constraints_; }

  // Gives the weights the values that the layer computes with, and lets go of the constraints.
  virtual void bake();

  // While on, forward() counts output positions for spec(), of every call. Switching on begins at 0.
  void observe(bool on);

  // Tells `watcher` of every forward pass, until it is given another one, or nullptr.
  void watch(Watcher* watcher) { watcher_ = watcher; }

 protected:
  virtual void check_structure(const LayerPlan& plan) const = 0;
  virtual void carry_out(const LayerPlan& plan) = 0;

  bool observing_ = false;
  int64_t positions_ = 0;
  Watcher* watcher_ = nullptr;
  std::optional<LayerPlan> plan_;
  std::vector<Constraint> constraints_;
  at::MemoryFormat format_ = at::MemoryFormat::Contiguous;
};

// The entries of a layer's parameter, or of anything shaped like it, that survive `plan`: kept_out along dimension 0
// and, for the weight of a convolution or a linear layer, kept_in along dimension 1.
at::Tensor narrow(const at::Tensor& tensor, const LayerPlan& plan);

}  // namespace cctorch::nn
