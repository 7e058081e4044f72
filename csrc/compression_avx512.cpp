#include "loops.h"
#include "rounding.h"

namespace slimlm {

const Loops loops_avx512 = {encode};

}  // namespace slimlm
