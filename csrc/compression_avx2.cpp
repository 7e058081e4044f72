#include "loops.h"
#include "rounding.h"

namespace slimlm {

const Loops loops_avx2 = {encode};

}  // namespace slimlm
