# Enables C++ if a compiler is there that can build the native library. Otherwise `icnnrt_reason` says, in words that
# `icnnrt doctor` repeats, why there will be none.
set(icnnrt_reason "")

if(NOT ICNNRT_NATIVE)
  set(icnnrt_reason "it was built with ICNNRT_NATIVE=OFF")
elseif(WIN32)
  # The kernels are written with vector extensions that MSVC lacks, and GCC does not align them on this stack.
  set(icnnrt_reason "it is not built on Windows")
else()
  include(CheckLanguage)
  check_language(CXX)
  if(CMAKE_CXX_COMPILER)
    enable_language(CXX)
    include(CheckCXXSourceCompiles)
    include(CheckCXXCompilerFlag)
    if(NOT CMAKE_CXX_COMPILER_ID MATCHES "GNU|Clang")
      set(icnnrt_reason "it needs GCC or Clang, but the compiler is ${CMAKE_CXX_COMPILER_ID}")
    else()
      check_cxx_source_compiles("#ifndef __x86_64__\n#error\n#endif\nint main() {}" ICNNRT_X86_64)
      check_cxx_source_compiles("#ifndef __aarch64__\n#error\n#endif\nint main() {}" ICNNRT_AARCH64)
      # The vector extensions that native/core is written with, on every processor.
      check_cxx_source_compiles("
        typedef double Vec __attribute__((vector_size(16)));
        typedef float FloatVec __attribute__((vector_size(8)));
        Vec wider(FloatVec x) { const Vec y = __builtin_convertvector(x, Vec); return y > 0.0 ? y : -y; }
        int main() {}" ICNNRT_VECTOR_EXTENSIONS)
      check_cxx_compiler_flag(-march=x86-64-v2 ICNNRT_X86_64_LEVELS)
      if(NOT ICNNRT_VECTOR_EXTENSIONS OR (ICNNRT_X86_64 AND NOT ICNNRT_X86_64_LEVELS))
        set(icnnrt_reason "it needs GCC 11 or Clang 12, but the compiler is ${CMAKE_CXX_COMPILER_ID} ${CMAKE_CXX_COMPILER_VERSION}")
      elseif(CMAKE_OSX_ARCHITECTURES MATCHES ";")
        set(icnnrt_reason "it is built for one processor, but CMAKE_OSX_ARCHITECTURES is ${CMAKE_OSX_ARCHITECTURES}")
      endif()
    endif()
  else()
    set(icnnrt_reason "no C++ compiler was found")
  endif()
endif()
