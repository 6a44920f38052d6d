#include "csrc/nn/watching.h"

#include <ATen/record_function.h>

#include <memory>
#include <string_view>
#include <utility>

namespace cctorch::repair {

namespace {

thread_local Watching* current = nullptr;

std::vector<at::Tensor> tensors_in(c10::ArrayRef<const c10::IValue> values) {
  std::vector<at::Tensor> found;
  for (const c10::IValue& value : values) {
    if (value.isTensor()) {
      found.push_back(value.toTensor());
    } else if (value.isTensorList()) {
      for (const at::Tensor& tensor : value.toTensorVector()) found.push_back(tensor);
    }
  }
  return found;
}

bool is_addition(const at::RecordFunction& function) {
  const std::string_view name = function.name();
  if (name != "aten::add" && name != "aten::add_") return false;
  const auto inputs = function.inputs();
  return inputs.size() == 3 && inputs[0].isTensor() && inputs[1].isTensor() && inputs[2].isScalar() &&
         inputs[2].toScalar().equal(1) && inputs[0].toTensor().sizes() == inputs[1].toTensor().sizes();
}

}  // namespace

// PyTorch calls them at every operator, and says nothing of what they throw.
struct Watching::Callbacks {
  struct Joined : at::ObserverContext {
    explicit Joined(const Origin& of) : origin(of) {}
    Origin origin;
  };

  template <typename Event>
  static void run(Watching& watching, const Event& event) noexcept {
    watching.busy_ = true;
    try {
      event();
    } catch (...) {
      watching.thrown_ = std::current_exception();
    }
    watching.busy_ = false;
  }

  static bool silent() { return current == nullptr || current->busy_ || current->thrown_; }

  static std::unique_ptr<at::ObserverContext> before(const at::RecordFunction& function) {
    if (silent() || current->in_norm_) return nullptr;
    Watching& watching = *current;
    std::unique_ptr<Joined> joined;
    run(watching, [&] {
      for (const at::Tensor& tensor : tensors_in(function.inputs())) {
        const Origin origin = watching.origin_of(tensor);
        if (origin.layer != nullptr && origin.norm == nullptr) watching.on_use(*origin.layer);
      }
      if (!is_addition(function)) return;
      const at::Tensor a = function.inputs()[0].toTensor(), b = function.inputs()[1].toTensor();
      const Origin of_a = watching.origin_of(a), of_b = watching.origin_of(b);
      const auto age = [&](const Origin& origin) {
        return origin.layer == nullptr ? -1 : watching.executed_[origin.layer];
      };
      const bool second = age(of_b) > age(of_a);
      const Origin& origin = second ? of_b : of_a;
      if (origin.layer == nullptr) return;
      joined = std::make_unique<Joined>(origin);
      watching.on_join(origin, second ? b : a, second ? a : b);
    });
    return joined;
  }

  static void after(const at::RecordFunction& function, at::ObserverContext* context) {
    if (context == nullptr || silent()) return;
    run(*current,
        [&] { current->on_joined(dynamic_cast<Joined*>(context)->origin, function.outputs().front().toTensor()); });
  }
};

Watching::Watching(std::vector<Compressible*> layers, std::vector<Compressible*> norms)
    : layers_(layers.begin(), layers.end()), norms_(norms.begin(), norms.end()) {}

Watching::Scope::Scope(Watching& watching)
    : watching_(watching),
      handle_(at::addThreadLocalCallback(at::RecordFunctionCallback(&Callbacks::before, &Callbacks::after)
                                             .needsInputs(true)
                                             .needsOutputs(true)
                                             .scopes({at::RecordScope::FUNCTION}))) {
  current = &watching;
  for (const auto* const some : {&watching.layers_, &watching.norms_}) {
    for (Compressible* const layer : *some) layer->watch(&watching);
  }
}

Watching::Scope::~Scope() {
  for (const auto* const some : {&watching_.layers_, &watching_.norms_}) {
    for (Compressible* const layer : *some) layer->watch(nullptr);
  }
  current = nullptr;
  at::removeCallback(handle_);
  watching_.sources_.clear();
}

void Watching::mark(const at::Tensor& y, const Origin& origin) {
  sources_.insert_or_assign(y.unsafeGetTensorImpl(),
                            Source{c10::weak_intrusive_ptr<c10::TensorImpl>(y.getIntrusivePtr()), origin,
                                   static_cast<uint32_t>(y._version())});
}

Watching::Origin Watching::origin_of(const at::Tensor& x) const {
  if (!x.defined()) return {};
  const auto found = sources_.find(x.unsafeGetTensorImpl());
  if (found == sources_.end() || std::cmp_not_equal(found->second.version, x._version())) return {};
  return found->second.origin;
}

void Watching::reads(Compressible& layer, const at::Tensor& x, const at::Tensor& input) {
  if (busy_ || thrown_) return;
  if (norms_.contains(&layer)) {
    in_norm_ = true;
    return;
  }
  busy_ = true;
  try {
    on_input(layer, x, input);
  } catch (...) {
    busy_ = false;
    throw;
  }
  busy_ = false;
}

void Watching::gives(Compressible& layer, const at::Tensor& input, const at::Tensor& y) {
  if (busy_ || thrown_) return;
  if (!norms_.contains(&layer)) {
    executed_[&layer] = ++clock_;
    mark(y, {&layer, nullptr});
    Callbacks::run(*this, [&] { on_output(layer, y); });
    return;
  }
  in_norm_ = false;
  const Origin read = origin_of(input);
  if (read.layer == nullptr) return;
  const Origin origin{read.layer, &layer};
  mark(y, origin);
  Callbacks::run(*this, [&] { on_norm(origin, y); });
}

}  // namespace cctorch::repair
