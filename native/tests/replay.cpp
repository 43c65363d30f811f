// Runs a fuzz target without a fuzzer:
//     replay <first> <count>     pseudo-random inputs number first, first + 1, ...: the same ones everywhere
//     replay <file>...           inputs that a fuzzer has found
#include <csignal>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "cuts.h"

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size);

static long current = 0;

// What stopped the run should be found again.
static void report() { std::fprintf(stderr, "stopped at input %ld: run replay %ld 1\n", current, current); }

static void run_number(long number) {
  icnnrt_tests::Random random(static_cast<std::uint64_t>(number));
  std::vector<std::uint8_t> bytes(8 + random.below(56));
  for (std::uint8_t& byte : bytes) byte = static_cast<std::uint8_t>(random.bits());
  LLVMFuzzerTestOneInput(bytes.data(), bytes.size());
}

static int run_file(const char* name) {
  std::FILE* const file = std::fopen(name, "rb");
  if (!file) {
    std::fprintf(stderr, "%s cannot be read\n", name);
    return 1;
  }
  std::vector<std::uint8_t> bytes;
  for (int byte = std::fgetc(file); byte != EOF; byte = std::fgetc(file))
    bytes.push_back(static_cast<std::uint8_t>(byte));
  std::fclose(file);
  LLVMFuzzerTestOneInput(bytes.data(), bytes.size());
  std::printf("%s: passed\n", name);
  return 0;
}

int main(int argc, char** argv) {
  char* end = nullptr;
  const long first = argc == 3 ? std::strtol(argv[1], &end, 10) : 0;
  if (argc != 3 || *end != '\0') {
    int failed = argc < 2;
    for (int i = 1; i < argc; ++i) failed |= run_file(argv[i]);
    return failed;
  }
  const long count = std::strtol(argv[2], nullptr, 10);
  std::signal(SIGABRT, [](int) { report(); });
  for (current = first; current < first + count; ++current) run_number(current);
  std::printf("%ld inputs passed\n", count);
  return 0;
}
