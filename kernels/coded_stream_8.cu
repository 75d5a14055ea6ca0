// coded_stream_8: products of more tokens with codes of 8 bits. Layout, launch, regime and bound are told in
// coded_stream.cuh; a file a width, so that they are compiled side by side.
#include "coded_stream.cuh"

CODED_STREAM_OF(8, 1)
CODED_STREAM_OF(8, 2)
CODED_STREAM_OF(8, 4)
