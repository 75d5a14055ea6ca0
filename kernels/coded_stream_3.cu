// coded_stream_3: products of more tokens with codes of 3 bits. Layout, launch, regime and bound are told in
// coded_stream.cuh; a file a width, so that they are compiled side by side.
#include "coded_stream.cuh"

CODED_STREAM_OF(3, 1)
CODED_STREAM_OF(3, 2)
CODED_STREAM_OF(3, 4)
