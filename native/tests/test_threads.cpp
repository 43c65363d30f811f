// Calls from many threads at once, each with a workspace of its own: the answers of one thread. Run under
// ThreadSanitizer it also tells of anything shared.
#include <doctest/doctest.h>

#include <cstddef>
#include <cstdlib>
#include <sstream>
#include <string>
#include <thread>
#include <vector>

#include "call.h"
#include "cuts.h"
#include "each_kernel.h"
#include "qp.h"

namespace icnnrt_tests {
namespace {

template <typename T>
struct Answers {
  std::vector<SolveAnswer<T>> solved;
  std::vector<AdjointAnswer<T>> adjoints;
};

template <typename T>
Answers<T> answer_all(const icnnrt::Kernels<T>& kernels, const std::vector<Cuts<T>>& problems, std::size_t first) {
  Caller caller;
  Answers<T> answers{std::vector<SolveAnswer<T>>(problems.size()), std::vector<AdjointAnswer<T>>(problems.size())};
  for (std::size_t i = 0; i < problems.size(); ++i) {
    const std::size_t p = (first + i) % problems.size();  // every thread in an order of its own
    answers.solved[p] = caller.solve(kernels, problems[p]);
    answers.adjoints[p] =
        caller.adjoint(kernels, problems[p], answers.solved[p].lam, std::vector<T>(problems[p].n, T{1}));
  }
  return answers;
}

TEST_CASE_TEMPLATE("many threads, the answers of one", T, float, double) {
  Random random(51);
  std::vector<Cuts<T>> problems;
  for (std::size_t i = 0; i < 40; ++i)
    problems.push_back(random_cuts<T>(random, 1 + random.below(12), 1 + random.below(40), 10.0));

  each_kernel<T>([&](const icnnrt::Kernels<T>& kernels) {
    constexpr std::size_t kThreads = 4;
    std::vector<Answers<T>> of_threads(kThreads);
    std::vector<const icnnrt::Kernels<T>*> found(kThreads);
    std::vector<std::thread> threads;
    for (std::size_t t = 0; t < kThreads; ++t)
      threads.emplace_back([&, t] {
        found[t] = &icnnrt::kernels<T>();  // finding the kernels is part of what must be safe
        of_threads[t] = answer_all(kernels, problems, t * 10);
      });
    for (std::thread& thread : threads) thread.join();
    const Answers<T> expected = answer_all(kernels, problems, 0);
    for (const icnnrt::Kernels<T>* kernels_of_thread : found) CHECK(kernels_of_thread == &icnnrt::kernels<T>());
    for (const Answers<T>& answers : of_threads)
      for (std::size_t p = 0; p < problems.size(); ++p) {
        CHECK(answers.solved[p].intact);
        CHECK(answers.solved[p].same_bits_as(expected.solved[p]));
        CHECK(answers.adjoints[p].same_bits_as(expected.adjoints[p]));
      }
  });
}

TEST_CASE_TEMPLATE("the kernels in use are the best that this processor can run", T, float, double) {
  const std::vector<const icnnrt::Kernels<T>*> runnable = runnable_kernels<T>();
  REQUIRE(!runnable.empty());
  CHECK(&icnnrt::kernels<T>() == runnable.front());
  for (std::size_t a = 0; a < runnable.size(); ++a)
    for (std::size_t b = 0; b < a; ++b)
      CHECK(std::string(runnable[a]->instruction_set) != runnable[b]->instruction_set);
  CHECK(icnnrt::kernels_for<T>(icnnrt::kInstructionSets) == nullptr);
  CHECK(icnnrt::qp_kernels<T>().instruction_set == std::string(runnable.front()->instruction_set));
  // With ICNNRT_MAX_INSTRUCTION_SET those before the one it names are none that can be run.
  const char* const most = std::getenv(icnnrt::kLimitVariable);
  std::istringstream names(icnnrt::instruction_sets());
  std::string name;
  for (std::size_t i = 0; most && *most && names >> name && name != most; ++i) {
    CHECK(icnnrt::kernels_for<T>(i) == nullptr);
    CHECK(icnnrt::qp_kernels_for<T>(i) == nullptr);
  }
}

}  // namespace
}  // namespace icnnrt_tests
