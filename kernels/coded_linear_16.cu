// coded_linear_16: products with fp16 values in the same order, of heads and of models that are not
// quantized. Layout, launch, regime and bound are told in coded_linear.cuh.
#include "coded_linear.cuh"

CODED_LINEAR_OF(16, 1)
