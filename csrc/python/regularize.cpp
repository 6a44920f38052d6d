#include <cctorch/regularize.h>
#include <cctorch/regularized_plan.h>
#include <pybind11/stl.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/utils/pybind.h>

#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "bindings.h"
#include "names.h"

namespace py = pybind11;

namespace cctorch::python {

namespace {

using namespace regularize;
using Release = py::call_guard<py::gil_scoped_release>;

constexpr Names<Scope, 2> scopes{{{"global", Scope::global}, {"layer", Scope::layer}}};
constexpr Names<Range, 2> ranges{{{"mse", Range::mse}, {"absmax", Range::absmax}}};
constexpr Names<MatrixView, 2> views{{{"channel", MatrixView::channel}, {"spatial", MatrixView::spatial}}};

template <class Class>
using Type = py::class_<Class, Regularizer, std::shared_ptr<Class>>;

template <class Class>
using Schedule = py::class_<Class, FrequencySchedule, std::shared_ptr<Class>>;

void bind_regularizer(py::module_& module) {
  py::class_<Outcome>(module, "Outcome")
      .def_readonly("update_norm", &Outcome::update_norm)
      .def_readonly("weight_norm", &Outcome::weight_norm)
      .def_readonly("bits", &Outcome::bits)
      .def_readonly("dense_bits", &Outcome::dense_bits);
  py::class_<Projection>(module, "Projection")
      .def_readonly("parameters", &Projection::parameters)
      .def_readonly("values", &Projection::values)
      .def_property_readonly("factored",
                             [](const Projection& self) {
                               std::vector<bool> factored;
                               for (const Storage& storage : self.storages)
                                 factored.push_back(storage.form.has_value());
                               return factored;
                             })
      .def_readonly("bits", &Projection::bits)
      .def_readonly("dense_bits", &Projection::dense_bits);
  py::class_<Regularizer, std::shared_ptr<Regularizer>>(module, "Regularizer")
      .def("project", &Regularizer::project, py::arg("parameters"), Release())
      .def("apply", &Regularizer::apply, py::arg("parameters"), Release())
      .def("acts_on", &Regularizer::acts_on, py::arg("parameter"))
      .def("select", &Regularizer::select, py::arg("parameters"))
      .def("state_dict", &Regularizer::state_dict)
      .def("load_state_dict", &Regularizer::load_state_dict, py::arg("state"));
}

void bind_regularized_plan(py::module_& module) {
  module.def("regularized_plan",
             py::overload_cast<const std::vector<LayerSpec>&, const NamedParameters&, Regularizer&>(&regularize::plan),
             py::arg("model"), py::arg("weights"), py::arg("regularizer"), Release());
}

void bind_pruning(py::module_& module) {
  Type<WeightDecay>(module, "WeightDecay").def(py::init<double>(), py::arg("strength"));
  Type<UniformNoise>(module, "UniformNoise").def(py::init<double, int64_t>(), py::arg("strength"), py::arg("seed") = 0);
  Type<MagnitudePruning>(module, "MagnitudePruning")
      .def(py::init([](double sparsity, const std::string& scope) {
             return std::make_shared<MagnitudePruning>(sparsity, parse(scopes, "scope", scope));
           }),
           py::arg("sparsity"), py::arg("scope") = "global");
  Type<NMPruning>(module, "NMPruning")
      .def(py::init<int64_t, int64_t, int64_t>(), py::arg("n") = 2, py::arg("m") = 4, py::arg("axis") = 1);
  Type<ChannelPruning>(module, "ChannelPruning")
      .def(py::init<double, int64_t>(), py::arg("sparsity"), py::arg("axis") = 0);
}

void bind_quantization(py::module_& module) {
  Type<UniformQuantization>(module, "UniformQuantization")
      .def(py::init([](int64_t bits, bool per_channel, const std::string& range) {
             return std::make_shared<UniformQuantization>(bits, per_channel, parse(ranges, "range", range));
           }),
           py::arg("bits"), py::arg("per_channel") = true, py::arg("range") = "mse");
  Type<CodebookQuantization>(module, "CodebookQuantization").def(py::init<int64_t>(), py::arg("bits"));
  Type<BinaryCodeQuantization>(module, "BinaryCodeQuantization")
      .def(py::init<int64_t, bool>(), py::arg("bits"), py::arg("per_channel") = true);
}

void bind_low_rank(py::module_& module) {
  using Ranks = std::optional<std::pair<int64_t, int64_t>>;
  Type<SVD>(module, "SVD")
      .def(py::init([](std::optional<int64_t> rank, std::optional<double> ratio, const std::string& view) {
             return std::make_shared<SVD>(RankOrRatio{rank, ratio}, parse(views, "view", view));
           }),
           py::arg("rank") = py::none(), py::arg("ratio") = py::none(), py::arg("view") = "channel");
  Type<TiledSVD>(module, "TiledSVD").def(py::init<int64_t, int64_t>(), py::arg("tile"), py::arg("rank"));
  Type<Tucker2>(module, "Tucker2")
      .def(py::init([](const Ranks& ranks, std::optional<double> ratio, int64_t iterations) {
             return std::make_shared<Tucker2>(RanksOrRatio{ranks, ratio}, iterations);
           }),
           py::arg("ranks") = py::none(), py::arg("ratio") = py::none(), py::arg("iterations") = 3);
  Type<Compose>(module, "Compose").def(py::init<std::vector<std::shared_ptr<Regularizer>>>(), py::arg("parts"));
}

void bind_schedules(py::module_& module) {
  py::class_<FrequencySchedule, std::shared_ptr<FrequencySchedule>>(module, "FrequencySchedule")
      .def("period", &FrequencySchedule::period, py::arg("step"), py::arg("lr") = py::none())
      .def("record", &FrequencySchedule::record, py::arg("relative_update"))
      .def("state_dict", &FrequencySchedule::state_dict)
      .def("load_state_dict", &FrequencySchedule::load_state_dict, py::arg("state"));
  Schedule<ConstantPeriod>(module, "ConstantPeriod").def(py::init<int64_t>(), py::arg("period"));
  Schedule<StepwisePeriod>(module, "StepwisePeriod")
      .def(py::init<std::vector<std::pair<int64_t, int64_t>>>(), py::arg("periods"));
  Schedule<InverseLearningRate>(module, "InverseLearningRate")
      .def(py::init<double, int64_t>(), py::arg("product"), py::arg("maximum") = 5000);
  Schedule<AdaptivePeriod>(module, "AdaptivePeriod")
      .def(py::init<double, int64_t, int64_t>(), py::arg("strength"), py::arg("minimum") = 1,
           py::arg("maximum") = 5000);
}

// A context manager is made before it is entered; the C++ guard is its time inside.
struct Context {
  RegularizationEvents& events;
  std::unique_ptr<AsIfAtEvent> guard;
  int64_t bits = 0;
};

void bind_events(py::module_& module) {
  py::class_<Event>(module, "Event")
      .def_readonly("step", &Event::step)
      .def_readonly("period", &Event::period)
      .def_readonly("update_norm", &Event::update_norm)
      .def_readonly("weight_norm", &Event::weight_norm)
      .def_readonly("bits", &Event::bits)
      .def_readonly("dense_bits", &Event::dense_bits)
      .def_property_readonly("relative_update", &Event::relative_update);
  py::class_<Context>(module, "AsIfAtEvent")
      .def_readonly("bits", &Context::bits)
      .def(
          "__enter__",
          [](Context& self) -> Context& {
            const py::gil_scoped_release release;
            self.guard = std::make_unique<AsIfAtEvent>(self.events);
            self.bits = self.guard->bits();
            return self;
          },
          py::return_value_policy::reference)
      .def("__exit__", [](Context& self, const py::args&) {
        const py::gil_scoped_release release;
        self.guard->restore();
      });
  py::class_<RegularizationEvents>(module, "RegularizationEvents")
      .def(py::init([](NamedParameters parameters, std::shared_ptr<Regularizer> regularizer,
                       std::shared_ptr<FrequencySchedule> schedule, bool include_frozen) {
             return std::make_unique<RegularizationEvents>(std::move(parameters), std::move(regularizer),
                                                           std::move(schedule),
                                                           EventOptions{.include_frozen = include_frozen});
           }),
           py::arg("parameters"), py::arg("regularizer"), py::arg("schedule"), py::arg("include_frozen") = false)
      .def_property_readonly("steps", &RegularizationEvents::steps)
      .def_property_readonly("steps_since_event", &RegularizationEvents::steps_since_event)
      .def_property_readonly("events", &RegularizationEvents::events)
      .def("step", &RegularizationEvents::step, py::arg("lr") = py::none(), Release())
      .def("due", &RegularizationEvents::due, py::arg("lr") = py::none())
      .def("finish", &RegularizationEvents::finish, Release())
      .def(
          "as_if_at_event", [](RegularizationEvents& self) { return Context{self, nullptr}; }, py::keep_alive<0, 1>())
      .def("state_dict", &RegularizationEvents::state_dict)
      .def("load_state_dict", &RegularizationEvents::load_state_dict, py::arg("state"));
}

}  // namespace

void bind_regularize(py::module_& module) {
  bind_regularizer(module);
  bind_regularized_plan(module);
  bind_pruning(module);
  bind_quantization(module);
  bind_low_rank(module);
  bind_schedules(module);
  bind_events(module);
}

}  // namespace cctorch::python
