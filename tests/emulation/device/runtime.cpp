// The whole runtime as one translation unit, because it is compiled anew for every sanitizer.
#include "checks.cpp"
#include "copies.cpp"
#include "fibers.cpp"
#include "launches.cpp"
#include "shared.cpp"
#include "warps.cpp"
