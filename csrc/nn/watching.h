#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/intrusive_ptr.h>
#include <cctorch/nn/compressible.h>

#include <cstdint>
#include <exception>
#include <functional>
#include <unordered_map>
#include <unordered_set>
#include <vector>

namespace cctorch::repair {

using nn::Compressible;

// Follows the outputs of `layers` through a model that runs: into `norms` that read them, and into additions.
class Watching : public nn::Watcher {
 public:
  Watching(std::vector<Compressible*> layers, std::vector<Compressible*> norms);
  Watching(const Watching&) = delete;
  Watching& operator=(const Watching&) = delete;

  // Runs what runs the model. What the events throw ends it.
  template <typename Run>
  auto watch(const Run& run) {
    const Scope scope(*this);
    const auto result = run();
    if (thrown_) std::rethrow_exception(thrown_);
    return result;
  }

  void reads(Compressible& layer, const at::Tensor& x, const at::Tensor& input) override;
  void gives(Compressible& layer, const at::Tensor& input, const at::Tensor& y) override;

 protected:
  // What a tensor came out of: a layer, and the norm behind it if there was one.
  struct Origin {
    Compressible* layer = nullptr;
    Compressible* norm = nullptr;
    bool operator==(const Origin&) const = default;
  };

  virtual void on_input(Compressible&, const at::Tensor& /*x*/, const at::Tensor& /*input*/) {}
  virtual void on_output(Compressible&, const at::Tensor& /*y*/) {}
  virtual void on_norm(const Origin&, const at::Tensor& /*y*/) {}
  // Before y is added to a tensor of the same shape, and after.
  virtual void on_join(const Origin&, const at::Tensor& /*y*/, const at::Tensor& /*other*/) {}
  virtual void on_joined(const Origin&, const at::Tensor& /*sum*/) {}
  // Something else than a norm reads the layer's own output.
  virtual void on_use(Compressible&) {}

 private:
  struct Callbacks;

  // Watches, on this thread, as long as it lives.
  class Scope {
   public:
    explicit Scope(Watching& watching);
    ~Scope();
    Scope(const Scope&) = delete;
    Scope& operator=(const Scope&) = delete;

   private:
    Watching& watching_;
    uint64_t handle_;
  };

  struct Source {
    c10::weak_intrusive_ptr<c10::TensorImpl> tensor;  // so that no other gets its address
    Origin origin;
    uint32_t version;
  };

  void mark(const at::Tensor& y, const Origin& origin);
  // None of a tensor that was changed in place since: no longer what they gave.
  Origin origin_of(const at::Tensor& x) const;

  std::unordered_set<Compressible*> layers_, norms_;
  std::unordered_map<const c10::TensorImpl*, Source> sources_;
  std::unordered_map<const Compressible*, int64_t> executed_;
  int64_t clock_ = 0;
  bool in_norm_ = false, busy_ = false;
  std::exception_ptr thrown_;
};

}  // namespace cctorch::repair
