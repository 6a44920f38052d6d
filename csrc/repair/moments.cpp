#include <ATen/ATen.h>
#include <ATen/Context.h>
#include <cctorch/repair.h>

#include <algorithm>
#include <cmath>

namespace cctorch::repair {

namespace {

void check_map(const char* what, const at::Tensor& map, int64_t step, int64_t first_image) {
  TORCH_CHECK_VALUE(map.dim() == 4 && map.numel() > 0, "repair: ", what, " has the shape ", map.sizes(),
                    ", expected images x channels x height x width, none of them 0");
  TORCH_CHECK_VALUE(step >= 1, "repair: step = ", step, ", expected at least 1");
  TORCH_CHECK_VALUE(first_image >= 0, "repair: first_image = ", first_image, ", expected at least 0");
}

int64_t outputs_along(const Window& window, size_t dim, int64_t size) {
  TORCH_CHECK_VALUE(
      window.kernel[dim] >= 1 && window.stride[dim] >= 1 && window.padding[dim] >= 0 && window.dilation[dim] >= 1,
      "repair: a window of kernel ", window.kernel[dim], ", stride ", window.stride[dim], ", padding ",
      window.padding[dim], " and dilation ", window.dilation[dim], ", expected at least 1, 1, 0 and 1");
  const int64_t reach = window.dilation[dim] * (window.kernel[dim] - 1) + 1;
  const int64_t spare = size + 2 * window.padding[dim] - reach;
  TORCH_CHECK_VALUE(spare >= 0, "repair: an input of size ", size, " with padding ", window.padding[dim],
                    " is smaller than the ", reach, " that the kernel reaches over");
  return spare / window.stride[dim] + 1;
}

int64_t positions_of(const at::Tensor& x, const Window& window) {
  return outputs_along(window, 0, x.size(2)) * outputs_along(window, 1, x.size(3));
}

// planes: B x C x pixels. For each sample, the pixels at `offsets` from the pixel that `corners` has for its position.
at::Tensor gather(const at::Tensor& planes, const at::Tensor& offsets, const at::Tensor& corners, int64_t step,
                  int64_t first_image) {
  const int64_t images = planes.size(0), channels = planes.size(1), reads = offsets.numel();
  step = std::min(step, corners.numel());
  const int64_t per_image = corners.numel() / step;
  at::Tensor samples = at::empty({channels, reads, images, per_image}, planes.options());
  for (int64_t i = 0; i < std::min(step, images); ++i) {
    const int64_t phase = (first_image + i) % step;
    const at::Tensor chosen = corners.slice(0, phase, phase + per_image * step, step);
    const at::Tensor read = planes.slice(0, i, images, step).index_select(2, (offsets.unsqueeze(1) + chosen).flatten());
    samples.slice(2, i, images, step).copy_(read.view({-1, channels, reads, per_image}).permute({1, 2, 0, 3}));
  }
  return samples.view({channels * reads, images * per_image});
}

at::Tensor in_product_type(const at::Tensor& samples) {
  return samples.scalar_type() == at::kDouble ? samples.detach() : samples.detach().to(at::kFloat);
}

}  // namespace

at::Tensor input_samples(const at::Tensor& x, const Window& window, int64_t step, int64_t first_image) {
  check_map("the input", x, step, first_image);
  const auto& [kernel, stride, padding, dilation] = window;
  const int64_t height = outputs_along(window, 0, x.size(2)), width = outputs_along(window, 1, x.size(3));
  const bool pads = padding[0] != 0 || padding[1] != 0;
  const at::Tensor padded =
      pads ? at::constant_pad_nd(x.detach(), {padding[1], padding[1], padding[0], padding[0]}) : x.detach();
  const int64_t row = padded.size(3);
  const auto grid = [&](int64_t rows, int64_t row_step, int64_t columns, int64_t column_step) {
    const auto options = at::TensorOptions(at::kLong).device(x.device());
    return (at::arange(rows, options).mul_(row_step * row).unsqueeze(1) +
            at::arange(columns, options).mul_(column_step))
        .flatten();
  };
  return gather(padded.contiguous().flatten(2), grid(kernel[0], dilation[0], kernel[1], dilation[1]),
                grid(height, stride[0], width, stride[1]), step, first_image);
}

at::Tensor output_samples(const at::Tensor& y, int64_t step, int64_t first_image) {
  check_map("the output", y, step, first_image);
  const at::Tensor planes = y.detach().contiguous().flatten(2);
  const auto options = at::TensorOptions(at::kLong).device(y.device());
  return gather(planes, at::zeros({1}, options), at::arange(planes.size(2), options), step, first_image);
}

Moments::Moments(int64_t inputs, int64_t outputs) {
  TORCH_CHECK_VALUE(inputs >= 0 && outputs >= 1, "repair: moments of ", inputs, " inputs and ", outputs,
                    " outputs, expected at least 1 output");
  input_mean_ = at::zeros({inputs}, at::kDouble);
  output_mean_ = at::zeros({outputs}, at::kDouble);
  input_moment_ = at::zeros({inputs, inputs}, at::kDouble);
  cross_moment_ = at::zeros({outputs, inputs}, at::kDouble);
  output_square_ = at::zeros({outputs}, at::kDouble);
}

void Moments::add(const at::Tensor& x, const at::Tensor& y) {
  TORCH_CHECK_VALUE(x.dim() == 2 && y.dim() == 2 && x.size(0) == input_mean_.numel() &&
                        y.size(0) == output_mean_.numel() && x.size(1) == y.size(1),
                    "repair: samples of shapes ", x.sizes(), " and ", y.sizes(), ", expected ", input_mean_.numel(),
                    " x samples of inputs and ", output_mean_.numel(), " x samples of outputs");
  const int64_t added = x.size(1);
  if (added == 0) return;
  if (samples_ == 0) {
    for (at::Tensor* sum : {&input_mean_, &output_mean_, &input_moment_, &cross_moment_, &output_square_}) {
      *sum = sum->to(x.device());
    }
  }
  // With TF32, which many turn on for training, singular moments would not look so.
  const at::NoTF32Guard full_float32;
  const at::Tensor x_exact = in_product_type(x), y_exact = in_product_type(y);
  const at::Tensor x_mean = x_exact.mean(1), y_mean = y_exact.mean(1);
  const at::Tensor x_central = x_exact - x_mean.unsqueeze(1), y_central = y_exact - y_mean.unsqueeze(1);
  const at::Tensor x_shift = x_mean - input_mean_, y_shift = y_mean - output_mean_;

  // Two sets of samples as one: their moments add up, and so does what their means differ by.
  const double share = static_cast<double>(added) / static_cast<double>(samples_ + added);
  const double between = static_cast<double>(samples_) * share;
  input_moment_.add_(at::mm(x_central, x_central.t())).addr_(x_shift, x_shift, 1, between);
  cross_moment_.add_(at::mm(y_central, x_central.t())).addr_(y_shift, x_shift, 1, between);
  output_square_.add_(y_central.square().sum(1)).addcmul_(y_shift, y_shift, between);
  input_mean_.add_(x_shift, share);
  output_mean_.add_(y_shift, share);
  samples_ += added;
}

void Moments::add_conv2d(const at::Tensor& x, const at::Tensor& y, const Window& window, int64_t step,
                         int64_t first_image, int64_t bytes) {
  check_map("the input", x, step, first_image);
  const int64_t positions = positions_of(x, window);
  const int64_t per_image = positions / std::min(step, positions);
  TORCH_CHECK_VALUE(y.dim() == 2 && y.size(1) == x.size(0) * per_image, "repair: wanted outputs of shape ", y.sizes(),
                    ", expected outputs x ", x.size(0) * per_image, ", ", per_image, " samples of each of ", x.size(0),
                    " images");
  // Padded, gathered, unfolded and centered: some three copies of the unfolded samples at once.
  const int64_t image_bytes = 3 * input_mean_.numel() * per_image * static_cast<int64_t>(sizeof(float));
  const int64_t at_once = std::max<int64_t>(1, bytes / image_bytes);
  for (int64_t begin = 0; begin < x.size(0); begin += at_once) {
    const int64_t end = std::min(begin + at_once, x.size(0));
    add(input_samples(x.slice(0, begin, end), window, step, first_image + begin),
        y.slice(1, begin * per_image, end * per_image));
  }
}

void Moments::all_reduce(const std::function<void(at::Tensor)>& sum) {
  const auto own = static_cast<double>(samples_);
  const int64_t inputs = input_mean_.numel(), outputs = output_mean_.numel();
  // One message: what the means are made of. A mean that is NaN must stay so on every process.
  const at::Tensor totals = at::cat({input_mean_ * own, output_mean_ * own, at::full({1}, own, input_mean_.options())});
  sum(totals);
  const auto all = totals[inputs + outputs].item<double>();
  const double divisor = std::max(all, 1.0);
  const at::Tensor input_mean = totals.narrow(0, 0, inputs) / divisor;
  const at::Tensor output_mean = totals.narrow(0, inputs, outputs) / divisor;
  const at::Tensor x_shift = input_mean_ - input_mean, y_shift = output_mean_ - output_mean;
  // Around the common mean a process' moments are larger by what its own mean is off.
  input_moment_.addr_(x_shift, x_shift, 1, own);
  cross_moment_.addr_(y_shift, x_shift, 1, own);
  output_square_.addcmul_(y_shift, y_shift, own);
  for (const at::Tensor& moment : {input_moment_, cross_moment_, output_square_}) {
    if (moment.numel() > 0) sum(moment);
  }
  input_mean_ = input_mean;
  output_mean_ = output_mean;
  samples_ = std::llround(all);
}

}  // namespace cctorch::repair
