#include <cctorch/collaborative.h>
#include <pybind11/functional.h>
#include <pybind11/stl.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/utils/pybind.h>

#include <optional>
#include <string>
#include <vector>

#include "bindings.h"
#include "names.h"

namespace py = pybind11;

namespace cctorch::python {

namespace {

using collaborative::Basis;
using collaborative::Budget;
using collaborative::CostTable;
using collaborative::Options;
using collaborative::Units;

constexpr Names<Units, 3> units_names{
    {{"both", Units::both}, {"channels", Units::channels}, {"singular_values", Units::singular_values}}};
constexpr Names<Basis, 2> basis_names{{{"exact", Basis::exact}, {"fixed", Basis::fixed}}};

constexpr Names<Budget, 4> budget_names{
    {{"macs", Budget::macs}, {"parameters", Budget::parameters}, {"bytes", Budget::bytes}, {"table", Budget::table}}};

using PythonProgress = std::function<void(const std::string&, int64_t, int64_t)>;

// pybind11's function wrapper takes the GIL; an exception it throws (Ctrl-C among them) stops the search.
collaborative::Progress forwarded(const std::optional<PythonProgress>& progress) {
  if (!progress) return {};
  return [&progress](std::string_view stage, int64_t done, int64_t total) {
    (*progress)(std::string(stage), done, total);
  };
}

collaborative::Solution solve(const std::vector<collaborative::Layer>& layers, double model_cost,
                              const Options& options, const std::optional<PythonProgress>& progress) {
  const py::gil_scoped_release release;
  return collaborative::solve(layers, model_cost, options, forwarded(progress));
}

std::vector<collaborative::LayerChoices> layer_choices(const std::vector<collaborative::Layer>& layers,
                                                       const Options& options,
                                                       const std::optional<PythonProgress>& progress) {
  const py::gil_scoped_release release;
  return collaborative::layer_choices(layers, options, forwarded(progress));
}

collaborative::Search search(std::vector<collaborative::Layer> layers, double model_cost, const Options& options,
                             const std::optional<PythonProgress>& progress) {
  const py::gil_scoped_release release;
  return {std::move(layers), model_cost, options, forwarded(progress)};
}

void bind_options(py::module_& module) {
  py::class_<Options>(module, "SolverOptions")
      .def(py::init([](double target, double gamma, double step_fraction, double max_rate, const std::string& units,
                       const std::string& basis, const std::string& budget, int64_t multiple, double effort,
                       const std::string& layout) {
             return Options{target,
                            gamma,
                            step_fraction,
                            max_rate,
                            parse(units_names, "units", units),
                            parse(basis_names, "basis", basis),
                            parse(budget_names, "budget", budget),
                            multiple,
                            effort,
                            parse(layout_names, "layout", layout)};
           }),
           py::arg("target") = 0.5, py::arg("gamma") = 0.9, py::arg("step_fraction") = 0.01, py::arg("max_rate") = 0.95,
           py::arg("units") = "both", py::arg("basis") = "fixed", py::arg("budget") = "macs", py::arg("multiple") = 1,
           py::arg("effort") = Options{}.effort, py::arg("layout") = "channel")
      .def_readwrite("target", &Options::target)
      .def_readwrite("gamma", &Options::gamma)
      .def_readwrite("step_fraction", &Options::step_fraction)
      .def_readwrite("max_rate", &Options::max_rate)
      .def_readwrite("multiple", &Options::multiple)
      .def_readwrite("effort", &Options::effort)
      .def_property(
          "units", [](const Options& self) { return name_of(units_names, self.units); },
          [](Options& self, const std::string& text) { self.units = parse(units_names, "units", text); })
      .def_property(
          "basis", [](const Options& self) { return name_of(basis_names, self.basis); },
          [](Options& self, const std::string& text) { self.basis = parse(basis_names, "basis", text); })
      .def_property(
          "layout", [](const Options& self) { return name_of(layout_names, self.layout); },
          [](Options& self, const std::string& text) { self.layout = parse(layout_names, "layout", text); })
      .def_property(
          "budget", [](const Options& self) { return name_of(budget_names, self.budget); },
          [](Options& self, const std::string& text) { self.budget = parse(budget_names, "budget", text); });
}

void bind_choices(py::module_& module) {
  py::class_<CostTable>(module, "CostTable")
      .def(py::init([](std::vector<int64_t> channels, std::vector<int64_t> ranks, std::vector<double> pruned,
                       std::vector<double> factored, int64_t multiple, std::optional<double> removed) {
             return CostTable{std::move(channels), std::move(ranks), std::move(pruned),
                              std::move(factored), multiple,         removed};
           }),
           py::arg("channels"), py::arg("ranks"), py::arg("pruned"), py::arg("factored"), py::arg("multiple") = 1,
           py::arg("removed") = py::none())
      .def_readonly("channels", &CostTable::channels)
      .def_readonly("ranks", &CostTable::ranks)
      .def_readonly("pruned", &CostTable::pruned)
      .def_readonly("factored", &CostTable::factored)
      .def_readonly("multiple", &CostTable::multiple)
      .def_readonly("removed", &CostTable::removed);
  py::class_<collaborative::Choice>(module, "Choice")
      .def_readonly("cost", &collaborative::Choice::cost)
      .def_readonly("loss", &collaborative::Choice::loss)
      .def_readonly("plan", &collaborative::Choice::plan);
  py::class_<collaborative::LayerChoices>(module, "LayerChoices")
      .def_readonly("name", &collaborative::LayerChoices::name)
      .def_readonly("largest_loss", &collaborative::LayerChoices::largest_loss)
      .def_readonly("importance", &collaborative::LayerChoices::importance)
      .def_readonly("choices", &collaborative::LayerChoices::choices)
      .def("objective", &collaborative::LayerChoices::objective, py::arg("loss"));
  module.def("layer_choices", &layer_choices, py::arg("layers"), py::arg("options"), py::arg("progress") = py::none());
  module.def("select", &collaborative::select, py::arg("layers"), py::arg("model_cost"), py::arg("target"),
             py::call_guard<py::gil_scoped_release>());
}

}  // namespace

void bind_collaborative(py::module_& module) {
  bind_options(module);
  bind_choices(module);
  py::class_<collaborative::Layer>(module, "SolverLayer")
      .def(py::init([](LayerSpec spec, at::Tensor weight, at::Tensor gradient, std::optional<CostTable> table,
                       double max_rate, double importance, double lost, double cost_before) {
             return collaborative::Layer{std::move(spec),
                                         std::move(weight),
                                         std::move(gradient),
                                         std::move(table).value_or(CostTable{}),
                                         max_rate,
                                         importance,
                                         lost,
                                         cost_before};
           }),
           py::arg("spec"), py::arg("weight"), py::arg("gradient"), py::arg("table") = py::none(),
           py::arg("max_rate") = 1.0, py::arg("importance") = 0.0, py::arg("lost") = 0.0, py::arg("cost_before") = 0.0)
      .def_readwrite("spec", &collaborative::Layer::spec)
      .def_readwrite("weight", &collaborative::Layer::weight)
      .def_readwrite("gradient", &collaborative::Layer::gradient)
      .def_readwrite("table", &collaborative::Layer::table)
      .def_readwrite("max_rate", &collaborative::Layer::max_rate)
      .def_readwrite("importance", &collaborative::Layer::importance)
      .def_readwrite("lost", &collaborative::Layer::lost)
      .def_readwrite("cost_before", &collaborative::Layer::cost_before);
  py::class_<collaborative::RateCurve>(module, "RateCurve")
      .def_readonly("name", &collaborative::RateCurve::name)
      .def_readonly("rate", &collaborative::RateCurve::rate)
      .def_readonly("loss", &collaborative::RateCurve::loss)
      .def_readonly("a", &collaborative::RateCurve::a)
      .def_readonly("b", &collaborative::RateCurve::b)
      .def_readonly("allocated", &collaborative::RateCurve::allocated);
  py::class_<collaborative::Solution>(module, "Solution")
      .def_readonly("plan", &collaborative::Solution::plan)
      .def_readonly("curves", &collaborative::Solution::curves)
      .def_readonly("multiplier", &collaborative::Solution::lambda)
      .def_readonly("losses", &collaborative::Solution::losses)
      .def_readonly("curve_seconds", &collaborative::Solution::curve_seconds)
      .def_readonly("heuristic_seconds", &collaborative::Solution::heuristic_seconds)
      .def_readonly("warnings", &collaborative::Solution::warnings);
  py::class_<collaborative::Search>(module, "Search")
      .def(py::init(&search), py::arg("layers"), py::arg("model_cost"), py::arg("options"),
           py::arg("progress") = py::none())
      .def("at", &collaborative::Search::at, py::arg("target"), py::call_guard<py::gil_scoped_release>())
      .def("at_final", &collaborative::Search::at_final, py::arg("target"), py::arg("model"), py::arg("graph"),
           py::call_guard<py::gil_scoped_release>());
  module.def(
      "remaining",
      [](const std::vector<LayerSpec>& model, const CompressionPlan& plan, const std::string& budget, bool final) {
        return collaborative::remaining(model, plan, parse(budget_names, "budget", budget), final);
      },
      py::arg("model"), py::arg("plan"), py::arg("budget"), py::arg("final"));
  module.def(
      "low_rank_layout",
      [](const LayerSpec& spec, const std::string& wanted) {
        return name_of(layout_names, collaborative::low_rank_layout(spec, parse(layout_names, "layout", wanted)));
      },
      py::arg("spec"), py::arg("wanted"));
  module.def(
      "participants",
      [](const std::vector<LayerSpec>& specs, const std::string& units) {
        return collaborative::participants(specs, parse(units_names, "units", units));
      },
      py::arg("specs"), py::arg("units") = "both");
  module.def("solve", &solve, py::arg("layers"), py::arg("model_cost"), py::arg("options"),
             py::arg("progress") = py::none());
  module.def("unit_scores", &collaborative::unit_scores, py::arg("weight"), py::arg("gradient"), py::arg("running"),
             py::arg("rank"), py::arg("options"), py::call_guard<py::gil_scoped_release>());
  module.def("factorize", &collaborative::factorize, py::arg("weight"), py::arg("kept_in"), py::arg("rank"),
             py::call_guard<py::gil_scoped_release>());
}

}  // namespace cctorch::python
