#include <cctorch/channel_graph.h>
#include <cctorch/nn/factors.h>
#include <cctorch/nn/prepare.h>
#include <cctorch/plan.h>
#include <pybind11/operators.h>
#include <pybind11/stl.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/utils/pybind.h>

#include <optional>
#include <sstream>
#include <string>
#include <vector>

#include "bindings.h"
#include "names.h"

namespace py = pybind11;

namespace cctorch::python {

namespace {

constexpr Names<LayerKind, 5> layer_kinds{{{"conv2d", LayerKind::conv2d},
                                           {"depthwise_conv2d", LayerKind::depthwise_conv2d},
                                           {"linear", LayerKind::linear},
                                           {"batch_norm2d", LayerKind::batch_norm2d},
                                           {"lstm", LayerKind::lstm}}};
constexpr Names<MaskPlan::Kind, 3> mask_kinds{
    {{"magnitude", MaskPlan::Kind::magnitude}, {"nm", MaskPlan::Kind::nm}, {"channel", MaskPlan::Kind::channel}}};

template <class Owner>
void bind_kind(py::class_<Owner>& type) {
  type.def_property(
      "kind", [](const Owner& self) { return name_of(layer_kinds, self.kind); },
      [](Owner& self, const std::string& text) { self.kind = parse(layer_kinds, "kind", text); });
}

void bind_layer_spec(py::module_& module) {
  py::class_<LayerSpec> type(module, "LayerSpec");
  type.def(py::init([](std::string name, const std::string& kind, int64_t in_channels, int64_t out_channels,
                       int64_t kernel_height, int64_t kernel_width, int64_t positions, int64_t groups, int64_t bits,
                       int64_t stride_height, int64_t stride_width) {
             return LayerSpec{std::move(name),
                              parse(layer_kinds, "kind", kind),
                              in_channels,
                              out_channels,
                              kernel_height,
                              kernel_width,
                              positions,
                              groups,
                              bits,
                              stride_height,
                              stride_width};
           }),
           py::arg("name"), py::arg("kind"), py::arg("in_channels"), py::arg("out_channels"),
           py::arg("kernel_height") = 1, py::arg("kernel_width") = 1, py::arg("positions") = 1, py::arg("groups") = 1,
           py::arg("bits") = 32, py::arg("stride_height") = 1, py::arg("stride_width") = 1)
      .def_readwrite("name", &LayerSpec::name)
      .def_readwrite("in_channels", &LayerSpec::in_channels)
      .def_readwrite("out_channels", &LayerSpec::out_channels)
      .def_readwrite("kernel_height", &LayerSpec::kernel_height)
      .def_readwrite("kernel_width", &LayerSpec::kernel_width)
      .def_readwrite("positions", &LayerSpec::positions)
      .def_readwrite("groups", &LayerSpec::groups)
      .def_readwrite("bits", &LayerSpec::bits)
      .def_readwrite("stride_height", &LayerSpec::stride_height)
      .def_readwrite("stride_width", &LayerSpec::stride_width)
      .def_property_readonly("macs", &LayerSpec::macs)
      .def_property_readonly("parameters", &LayerSpec::parameters);
  bind_kind(type);
}

void bind_mask_plan(py::module_& module) {
  py::class_<MaskPlan>(module, "MaskPlan")
      .def(py::init([](const std::string& kind, double sparsity, int64_t n, int64_t m) {
             return MaskPlan{parse(mask_kinds, "kind", kind), sparsity, n, m};
           }),
           py::arg("kind") = "magnitude", py::arg("sparsity") = 0.0, py::arg("n") = 2, py::arg("m") = 4)
      .def_property(
          "kind", [](const MaskPlan& self) { return name_of(mask_kinds, self.kind); },
          [](MaskPlan& self, const std::string& text) { self.kind = parse(mask_kinds, "kind", text); })
      .def_readwrite("sparsity", &MaskPlan::sparsity)
      .def_readwrite("n", &MaskPlan::n)
      .def_readwrite("m", &MaskPlan::m)
      .def(py::self == py::self);  // NOLINT(misc-redundant-expression): binds the operator
}

void bind_layer_plan(py::module_& module) {
  using Indices = std::optional<std::vector<int64_t>>;
  py::class_<LayerPlan> type(module, "LayerPlan");
  type.def(py::init([](std::string name, const std::string& kind, int64_t in_channels, int64_t out_channels,
                       const Indices& kept_in, const Indices& kept_out, std::vector<int64_t> gather,
                       std::optional<int64_t> rank, const std::string& layout, std::optional<int64_t> rank_in,
                       std::optional<MaskPlan> mask, std::optional<int64_t> bits) {
             auto layer =
                 LayerPlan::unchanged(std::move(name), parse(layer_kinds, "kind", kind), in_channels, out_channels);
             if (kept_in) layer.kept_in = *kept_in;
             if (kept_out) layer.kept_out = *kept_out;
             layer.gather = std::move(gather);
             layer.rank = rank;
             layer.layout = parse(layout_names, "layout", layout);
             layer.rank_in = rank_in;
             layer.mask = mask;
             layer.bits = bits;
             return layer;
           }),
           py::arg("name"), py::arg("kind"), py::arg("in_channels"), py::arg("out_channels"), py::kw_only(),
           py::arg("kept_in") = py::none(), py::arg("kept_out") = py::none(),
           py::arg("gather") = std::vector<int64_t>(), py::arg("rank") = py::none(), py::arg("layout") = "channel",
           py::arg("rank_in") = py::none(), py::arg("mask") = py::none(), py::arg("bits") = py::none())
      .def_readwrite("name", &LayerPlan::name)
      .def_readwrite("in_channels", &LayerPlan::in_channels)
      .def_readwrite("out_channels", &LayerPlan::out_channels)
      .def_readwrite("kept_in", &LayerPlan::kept_in)
      .def_readwrite("kept_out", &LayerPlan::kept_out)
      .def_readwrite("gather", &LayerPlan::gather)
      .def_readwrite("rank", &LayerPlan::rank)
      .def_property(
          "layout", [](const LayerPlan& self) { return name_of(layout_names, self.layout); },
          [](LayerPlan& self, const std::string& text) { self.layout = parse(layout_names, "layout", text); })
      .def_readwrite("rank_in", &LayerPlan::rank_in)
      .def_readwrite("mask", &LayerPlan::mask)
      .def_readwrite("bits", &LayerPlan::bits)
      .def_property_readonly("is_unchanged", &LayerPlan::is_unchanged)
      .def_property_readonly("keeps_shape", &LayerPlan::keeps_shape)
      .def("__copy__", [](const LayerPlan& self) { return LayerPlan(self); })
      .def(
          "__deepcopy__", [](const LayerPlan& self, const py::dict&) { return LayerPlan(self); }, py::arg("memo"))
      .def(py::self == py::self);  // NOLINT(misc-redundant-expression): binds the operator
  bind_kind(type);
}

void bind_compression_plan(py::module_& module) {
  py::class_<CompressionPlan>(module, "CompressionPlan")
      .def(py::init([](std::string method, double target, std::vector<LayerPlan> layers) {
             return CompressionPlan{std::move(method), target, std::move(layers)};
           }),
           py::arg("method") = "", py::arg("target") = 0.0, py::arg("layers") = std::vector<LayerPlan>())
      .def_readwrite("method", &CompressionPlan::method)
      .def_readwrite("target", &CompressionPlan::target)
      .def_readwrite("layers", &CompressionPlan::layers)
      .def(
          "find",
          [](const CompressionPlan& self, const std::string& name) -> std::optional<LayerPlan> {
            const LayerPlan* layer = self.find(name);
            return layer ? std::optional(*layer) : std::nullopt;
          },
          py::arg("name"))
      .def("validate", &CompressionPlan::validate)
      .def("to_json", &CompressionPlan::to_json)
      .def_static(
          "from_json", [](const std::string& text) { return CompressionPlan::from_json(text); }, py::arg("text"))
      // For copies, and the processes of a job: as the file that a plan is kept in.
      .def(py::pickle([](const CompressionPlan& self) { return self.to_json(); },
                      [](const std::string& text) { return CompressionPlan::from_json(text); }))
      .def(py::self == py::self)  // NOLINT(misc-redundant-expression): binds the operator
      .def("__repr__", [](const CompressionPlan& self) {
        std::ostringstream text;
        text << self;
        return text.str();
      });
}

void bind_macs(py::module_& module) {
  module.def("drop_idle_ranks", &drop_idle_ranks, py::arg("model"), py::arg("plan"));
  module.def(
      "factors",
      [](const at::Tensor& weight, const LayerPlan& plan) {
        nn::Factors found = nn::factorize(weight, plan);
        std::optional<at::Tensor> core;
        if (found.core.defined()) core = found.core;
        return std::tuple(found.first, core, found.second);
      },
      py::arg("weight"), py::arg("plan"), py::call_guard<py::gil_scoped_release>());
  module.def("set_bits", &set_bits, py::arg("model"), py::arg("plan"), py::arg("bits"));
  module.def("dense_macs", &dense_macs, py::arg("model"));
  module.def("nominal_macs", &nominal_macs, py::arg("model"), py::arg("plan"));
  module.def("final_macs", &final_macs, py::arg("model"), py::arg("plan"));
  module.def(
      "layer_macs",
      [](const LayerSpec& spec, const std::optional<LayerPlan>& plan, bool narrowed) {
        return layer_macs(spec, plan ? &*plan : nullptr, narrowed);
      },
      py::arg("spec"), py::arg("plan"), py::arg("narrowed"));
}

void bind_channel_graph(py::module_& module) {
  py::class_<ChannelGraph>(module, "ChannelGraph")
      .def(py::init<>())
      .def("input", &ChannelGraph::input, py::arg("channels"))
      .def(
          "layer",
          [](ChannelGraph& self, const std::string& name, const std::string& kind, const ChannelGraph::Channels& inputs,
             int64_t out_channels) { return self.layer(name, parse(layer_kinds, "kind", kind), inputs, out_channels); },
          py::arg("name"), py::arg("kind"), py::arg("inputs"), py::arg("out_channels"))
      .def("join", &ChannelGraph::join, py::arg("a"), py::arg("b"))
      .def_static("flatten", &ChannelGraph::flatten, py::arg("channels"), py::arg("features"))
      .def_static("concat", &ChannelGraph::concat, py::arg("parts"))
      .def("pin", &ChannelGraph::pin, py::arg("channels"))
      .def("unchanged", &ChannelGraph::unchanged, py::arg("layer"))
      .def("producers", &ChannelGraph::producers, py::arg("layer"))
      .def("streams", &ChannelGraph::streams)
      .def("resolve", &ChannelGraph::resolve, py::arg("plan"));
}

}  // namespace

void bind_plan(py::module_& module) {
  bind_layer_spec(module);
  bind_mask_plan(module);
  bind_layer_plan(module);
  bind_compression_plan(module);
  bind_macs(module);
  bind_channel_graph(module);
}

}  // namespace cctorch::python
