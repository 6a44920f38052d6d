#include "csrc/ops/value_grid.h"

#include <torch/library.h>

#include "csrc/ops/autograd/recorded.h"
#include "csrc/ops/autograd/straight_through.h"

namespace cctorch::autograd {

TORCH_LIBRARY_IMPL(cctorch, Autograd, m) {
  m.impl("binary_quant", &Recorded<overload<BinaryQuantOp>(&binary_quant), &binary_quant_backward>::call);
  m.impl("binary_quant.list", &Recorded<overload<BinaryQuantListOp>(&binary_quant), &binary_quant_list_backward>::call);
  m.impl("ternary_quant", &StraightThrough<overload<TernaryQuantOp>(&ternary_quant)>::call);
  m.impl("ternary_quant.list", &StraightThrough<overload<TernaryQuantListOp>(&ternary_quant)>::call);
  m.impl("binary_code_quant", &StraightThrough<overload<BinaryCodeQuantOp>(&binary_code_quant)>::call);
  m.impl("binary_code_quant.list", &StraightThrough<overload<BinaryCodeQuantListOp>(&binary_code_quant)>::call);
  m.impl("codebook_quant", &Recorded<overload<CodebookOp>(&codebook_quant), &codebook_quant_backward>::call);
  m.impl("codebook_indices", &Constant<&codebook_indices>::call);
  m.impl("codebook_update", &Constant<overload<CodebookOp>(&codebook_update)>::call);
  m.impl("codebook_quant.list",
         &Recorded<overload<CodebookListOp>(&codebook_quant), &codebook_quant_list_backward>::call);
  m.impl("codebook_update.list", &Constant<overload<CodebookListOp>(&codebook_update)>::call);
  m.impl("_member_sums", &Recorded<overload<MemberSumsOp>(&member_sums), &member_sums_backward>::call);
  m.impl("_member_sums.list", &Recorded<overload<MemberSumsListOp>(&member_sums), &member_sums_list_backward>::call);
}

}  // namespace cctorch::autograd
