// coded_linear_8: products with codes of 8 bits. Layout, launch, regime and bound are told in
// coded_linear.cuh; a file a width, so that they are compiled side by side.
#include "coded_linear.cuh"

CODED_LINEAR_OF(8, 1)
CODED_LINEAR_OF(8, 2)
CODED_LINEAR_OF(8, 4)
