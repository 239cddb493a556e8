// Declarations for every file of the library.
#pragma once

#define LORAF_API extern "C" __attribute__((visibility("default")))
