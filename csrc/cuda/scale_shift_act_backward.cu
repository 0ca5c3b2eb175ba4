#define FASTRES_BACKWARD
#include "scale_shift_act.cu"
