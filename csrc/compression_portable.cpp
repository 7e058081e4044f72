#include "loops.h"
#include "rounding.h"

namespace slimlm {

const Loops loops_portable = {encode};

}  // namespace slimlm
