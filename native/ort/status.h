// Errors as statuses: no function here throws, and none allocates but ONNX Runtime's own.
#pragma once

#include <cstdarg>
#include <cstdio>

#include "abi.h"

// Passes an error on.
#define ICNNRT_TRY(expression)                                         \
  do {                                                                 \
    if (OrtStatus* const failed = (expression); failed) return failed; \
  } while (false)

namespace icnnrt::ort {

// A status with a message as printf makes it, cut at 800 bytes.
[[gnu::format(printf, 3, 4)]] inline OrtStatus* error(const Api& api, OrtErrorCode code, const char* format, ...) {
  char message[800];
  std::va_list values;
  va_start(values, format);
  std::vsnprintf(message, sizeof message, format, values);
  va_end(values);
  return api.CreateStatus(code, message);
}

}  // namespace icnnrt::ort
