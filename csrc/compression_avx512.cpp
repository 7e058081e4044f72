#include "adapter_descent.h"
#include "descent.h"
#include "loops.h"
#include "rounding.h"
#include "scale_search.h"
#include "sweep.h"

namespace slimlm {

const Loops loops_avx512 = {encode,     best_scale, nearby_scale, affine_scale, code_sums,
                             code_error, bin,        sweep,        choose,       descend,
                             descend_right};

}  // namespace slimlm
