// coded_linear_16: products with fp16 values in the same order, of heads and of models that are not
// quantized. Layout, launch, regime and bound are told in coded_linear.cuh.
#include "coded_linear.cuh"

CODED_LINEAR(16, 2, , 1, 1, 1, 16)
CODED_LINEAR(16, 8, , 1, 1, 2, 16)
CODED_LINEAR(16, 16, , 1, 2, 4, 8)
