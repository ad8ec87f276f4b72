// Makes a function visible outside its library: to the other library of this build, or by its plain name to Python.
#pragma once

#if defined(_WIN32)
#define BATCHNORM_VISIBLE __declspec(dllexport)
#else
#define BATCHNORM_VISIBLE __attribute__((visibility("default")))
#endif
#define BATCHNORM_EXPORT extern "C" BATCHNORM_VISIBLE
