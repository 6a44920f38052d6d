#include <ATen/ATen.h>
#include <cctorch/low_rank.h>
#include <cctorch/regularizers.h>

#include <algorithm>

namespace cctorch::regularize {

namespace {

// A size(0) x rest matrix cut into tile x tile blocks, row by row. Those at the right and lower edge are filled up with
// zeros, which changes none of their singular values.
struct Tiling {
  Tiling(const at::Tensor& weight, int64_t tile)
      : tile(tile),
        rows(weight.size(0)),
        columns(weight.numel() / rows),
        down((rows + tile - 1) / tile),
        right((columns + tile - 1) / tile) {}

  at::Tensor cut(const at::Tensor& weight) const {
    const at::Tensor matrix = weight.reshape({rows, columns});
    return at::constant_pad_nd(matrix, {0, right * tile - columns, 0, down * tile - rows})
        .view({down, tile, right, tile})
        .transpose(1, 2)
        .reshape({-1, tile, tile});
  }

  at::Tensor join(const at::Tensor& blocks, at::IntArrayRef sizes) const {
    const at::Tensor whole = blocks.view({down, right, tile, tile}).transpose(1, 2).reshape({down * tile, -1});
    return whole.narrow(0, 0, rows).narrow(1, 0, columns).reshape(sizes);
  }

  int64_t tile, rows, columns, down, right;
};

}  // namespace

TiledSVD::TiledSVD(int64_t tile, int64_t rank) : tile_(tile), rank_(rank) {
  TORCH_CHECK_VALUE(tile >= 3, "TiledSVD: tile = ", tile, ", expected at least 3");
  TORCH_CHECK_VALUE(1 <= rank && 2 * rank < tile, "TiledSVD: rank = ", rank, " for tile = ", tile,
                    ", expected at least 1 and below tile / 2, so that the factors are smaller");
}

void TiledSVD::replace(std::vector<Weight>& weights) {
  std::vector<at::Tensor> blocks, shrinks;
  std::vector<Tiling> tilings;
  std::vector<int64_t> counts;
  for (Weight& weight : weights) {
    const Tiling& tiling = tilings.emplace_back(weight.value, tile_);
    blocks.push_back(tiling.cut(weight.value));
    counts.push_back(tiling.down * tiling.right);
    const at::Tensor shrink = at::empty({counts.back()}, at::kBool);
    weight.storage = Storage::dense(weight.value);
    for (int64_t t = 0; t < counts.back(); ++t) {
      const int64_t height = std::min(tile_, tiling.rows - t / tiling.right * tile_);
      const int64_t width = std::min(tile_, tiling.columns - t % tiling.right * tile_);
      const int64_t saved = height * width - rank_ * (height + width);
      shrink.mutable_data_ptr<bool>()[t] = saved > 0;
      if (saved > 0) weight.storage.values -= saved;
    }
    weight.storage.factored = weight.storage.values < weight.value.numel();
    shrinks.push_back(shrink);
  }
  const auto [left, right] = truncated_svd(blocks, std::vector<int64_t>(blocks.size(), rank_));
  for (size_t i = 0; i < weights.size(); ++i) {
    const at::Tensor shrink = shrinks[i].to(blocks[i].device()).view({-1, 1, 1});
    const at::Tensor replaced = at::where(shrink, at::bmm(left[i], right[i]), blocks[i]);
    weights[i].value = tilings[i].join(replaced, weights[i].value.sizes());
  }
}

}  // namespace cctorch::regularize
