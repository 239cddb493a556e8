// What every file of the library needs.
#pragma once

#define LORAF_API extern "C" __attribute__((visibility("default")))
