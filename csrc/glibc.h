// Included before every source. glibc 2.29 added a version of exp that does not set errno; the one before computes the
// same values, and a library that asks for it also loads with glibc 2.28.
#pragma once

#ifdef __linux__
#include <features.h>
#endif

#if defined(__GLIBC__) && defined(__x86_64__)
__asm__(".symver exp, exp@GLIBC_2.2.5");
#endif
