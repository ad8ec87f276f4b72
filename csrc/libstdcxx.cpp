// Hidden definitions of symbols that headers of newer compilers use, but that the libraries of manylinux_2_28 (glibc 2.28,
// GCC 8) do not have.
#include <new>
#include <sstream>

#if defined(__GLIBCXX__) && defined(__linux__)

// Whether the process has a single thread; glibc 2.32 and later know. False is always right.
extern char single_threaded __asm__("__libc_single_threaded");
char single_threaded = 0;

// GCC 11 and later call this for an array that is too large: std::__throw_bad_array_new_length().
[[noreturn]] void too_large() __asm__("_ZSt28__throw_bad_array_new_lengthv");
void too_large() { throw std::bad_array_new_length(); }

// Compiled in, because GCC 9 and 11 added functions.
template class std::basic_stringbuf<char>;
template class std::basic_ostringstream<char>;
template class std::basic_stringstream<char>;

#endif
