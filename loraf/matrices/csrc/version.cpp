// The interface version, which loraf/matrices/native.py checks, so that a library built from other sources is not used.

#include "api.h"
#include "isa.h"

LORAF_API int loraf_native_interface() { return 1; }

// 0 plain, 1 AVX2, 2 AVX-512: the best variant for this processor.
LORAF_API int loraf_native_isa() { return int(loraf::best_isa(2)); }
