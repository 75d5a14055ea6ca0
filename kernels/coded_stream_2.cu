// coded_stream_2: products of more tokens with codes of 2 bits. Layout, launch, regime and bound are told in
// coded_stream.cuh; a file a width, so that they are compiled side by side.
#include "coded_stream.cuh"

CODED_STREAM_OF(2, 1)
CODED_STREAM_OF(2, 2)
CODED_STREAM_OF(2, 4)
