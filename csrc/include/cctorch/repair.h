#pragma once

#include <ATen/core/Tensor.h>

#include <array>
#include <cstdint>
#include <functional>
#include <optional>

// Closed-form repair of a compressed layer: the weight that comes closest to the outputs wanted of it, given the inputs
// that it now gets.
namespace cctorch::repair {

// How a convolution reads its input; the default is a 1 x 1 convolution. Padding is with zeros.
struct Window {
  std::array<int64_t, 2> kernel{1, 1}, stride{1, 1}, padding{0, 0}, dilation{1, 1};
};

// Samples are the output positions p = (i mod step), + step, + 2 step, ... of a map's image number i, row by row: as
// many of each image, and over `step` images all positions. They are ordered by image, then by position. `step` is cut
// to the number of positions; `first_image` is the number of x's first image.

// What the convolution reads at the samples: (C kh kw) x samples, the rows in the order of an unfolded weight.
// x: B x C x H x W.
at::Tensor input_samples(const at::Tensor& x, const Window& window, int64_t step, int64_t first_image = 0);

// y: B x N x H x W at the samples: N x samples.
at::Tensor output_samples(const at::Tensor& y, int64_t step, int64_t first_image = 0);

// Means and central second moments of samples x (unfolded inputs of a layer) and y (its wanted outputs). Products are
// taken in float32 (float64 for float64 samples) around the mean of what is added, sums are kept in float64, on the
// samples' device.
class Moments {
 public:
  Moments(int64_t inputs, int64_t outputs);  // inputs may be 0, outputs not

  // x: P x samples, y: N x samples.
  void add(const at::Tensor& x, const at::Tensor& y);

  // x: B x C x H x W, y: N x samples as from output_samples(). Unfolds as many images at a time as fit into `bytes`.
  void add_conv2d(const at::Tensor& x, const at::Tensor& y, const Window& window, int64_t step, int64_t first_image = 0,
                  int64_t bytes = int64_t{128} << 20);

  // Makes them those of the samples of all processes. `sum` adds a float64 tensor up over the processes, in place, on
  // every one of them; a process without samples takes part.
  void all_reduce(const std::function<void(at::Tensor)>& sum);

  int64_t samples() const { return samples_; }
  const at::Tensor& input_mean() const { return input_mean_; }        // P
  const at::Tensor& output_mean() const { return output_mean_; }      // N
  const at::Tensor& input_moment() const { return input_moment_; }    // sum (x - mean)(x - mean)^T, P x P
  const at::Tensor& cross_moment() const { return cross_moment_; }    // sum (y - mean)(x - mean)^T, N x P
  const at::Tensor& output_square() const { return output_square_; }  // sum (y - mean)^2, N

 private:
  int64_t samples_ = 0;
  at::Tensor input_mean_, output_mean_, input_moment_, cross_moment_, output_square_;
};

struct Options {
  double ridge = 1e-5;    // relative to the mean variance of the inputs; above 0
  bool intercept = true;  // whether something after the weight can hold a constant: a bias, a BatchNorm
};

struct Fit {
  at::Tensor weight;     // N x P, float64
  at::Tensor intercept;  // N, float64; the `intercept` that was given where the options leave none to choose
  double before = 0.0;   // mean square error of weight and intercept as given, over that of the best constant
  double after = 0.0;    // the same of those found; never above `before`
};

// The minimizer of sum |W x + b - y|^2 + ridge |W - weight|^2, y ~ W x + b. The penalty is on the change: directions
// that no sample shows keep what they had. weight: N x P (or unfoldable to it), intercept: N. Throws c10::Error where
// there is no sample, sizes do not match, or a moment is NaN or infinite.
Fit least_squares(const Moments& moments, const at::Tensor& weight, const at::Tensor& intercept,
                  const Options& options = {});

// The minimizer of the same among weights of at most `rank`: the least-squares weight, projected on the leading left
// singular vectors of what it makes of the inputs. `weight` must itself be of no higher rank.
Fit reduced_rank(const Moments& moments, const at::Tensor& weight, const at::Tensor& intercept, int64_t rank,
                 const Options& options = {});

// A small one, not surely the smallest, among weights of the form W[n, (c, i, j)] = sum_r outer[n, r, i] inner[r, c,
// j], outer as N x (r i) of at most `rank`: of a Tucker-2 convolution c are the inputs, i the kernel's positions, and
// outer is made of the core and the outputs' factor; of two one-dimensional kernels i is the one's, j the other's
// position. By alternating least squares: the best outer factor for the inner one, conjugate gradients for the inner
// one. Starts from `inner`, r x C x J, whose best outer factor is at least as good as that of `weight`, if that has
// this form.
Fit alternating_least_squares(const Moments& moments, const at::Tensor& weight, const at::Tensor& intercept,
                              const at::Tensor& inner, int64_t rank, const Options& options = {});

// A batch normalization in evaluation mode. All N.
struct Norm {
  at::Tensor weight, bias, running_mean, running_var;
  double eps = 1e-5;
};

// A layer and the normalization that reads its output, if there is one: together an affine function of the layer's
// unfolded input. Either `weight` (N x ...) is defined, or the factors of one of the layouts of LowRankLayout, or none
// of them: a layer that reads nothing and gives its bias everywhere, all that is left of a removed branch.
struct Affine {
  at::Tensor weight{}, first{}, second{};
  at::Tensor bias{};  // N, or undefined
  std::optional<Norm> norm{};
  at::Tensor core{};  // between `first` and `second`, of the layout tucker

  int64_t inputs() const;   // P
  int64_t outputs() const;  // N
};

// least_squares() or, of factors, reduced_rank() or alternating_least_squares() of the whole function, whose present
// one is where it starts. What is found is written into the tensors, unless it is no better. The statistics of the
// normalization become those of the samples, its scale and shift what gives the wanted function with them: a training
// step, which normalizes by the batch's own statistics, goes on from the function that was fitted. Of a layer that
// reads nothing the bias, or the normalization's, becomes the mean of the wanted outputs.
Fit fit(const Affine& affine, const Moments& moments, double ridge = Options().ridge);

}  // namespace cctorch::repair
