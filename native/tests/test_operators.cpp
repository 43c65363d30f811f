// The library as a runtime uses it: registered, one kernel a node, many threads, errors, and all given back.
#include <doctest/doctest.h>

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <sstream>
#include <string>
#include <vector>

#include "call.h"
#include "cuts.h"
#include "library.h"

namespace icnnrt_tests {
namespace {

struct Batch {
  std::size_t B, k, n;
};

TEST_CASE_TEMPLATE("any number of threads, the bits of the core", T, float, double) {
  Random random(81);
  Caller caller;
  const std::string names[] = {"Entropy", "Simplex", "Quadratic"};  // as `Domain` has them
  // workspaces on the stack and not, one task and many, fewer samples than threads
  for (const Batch& size : {Batch{1, 5, 10}, {300, 5, 10}, {7, 20, 300}, {2, 30, 600}, {0, 3, 4}}) {
    CAPTURE(size.B);
    CAPTURE(size.k);
    std::vector<Cuts<T>> samples;
    std::vector<T> slopes, offsets, y_bar(size.B * size.n, T{1});
    for (std::size_t b = 0; b < size.B; ++b) {
      samples.push_back(random_cuts<T>(random, size.k, size.n, 10.0));
      if (b == 1) samples[b].offsets[0] = std::numeric_limits<T>::quiet_NaN();  // and its neighbours never know
      slopes.insert(slopes.end(), samples[b].slopes.begin(), samples[b].slopes.end());
      offsets.insert(offsets.end(), samples[b].offsets.begin(), samples[b].offsets.end());
    }
    const auto B = static_cast<std::int64_t>(size.B), k = static_cast<std::int64_t>(size.k),
               n = static_cast<std::int64_t>(size.n);
    for (std::size_t call = 0; call < 2 * icnnrt::kDomains; ++call) {
      const unsigned threads = call % 2 ? 4 : 1;
      const std::string& name = names[call / 2];
      const icnnrt::Kernels<T>& core = icnnrt::kernels<T>(static_cast<Domain>(call / 2));
      CAPTURE(threads);
      CAPTURE(name);
      const Library library;
      const Node solve(library.find<T>("Bundle" + name + "Solve"), kUsual),
          adjoint(library.find<T>("Bundle" + name + "Adjoint"), {});
      OrtKernelContext context{{tensor<T>({B, k, n}, slopes), tensor<T>({B, k}, offsets), zeros<T>({B, 0})}, {}, {}};
      context.threads = threads;
      CHECK(solve.run(context) == "");
      const std::vector<OrtValue> solved = context.outputs;
      context.inputs[2] = solved[1];
      context.inputs.push_back(tensor<T>({B, n}, y_bar));
      CHECK(adjoint.run(context) == "");
      for (std::size_t b = 0; b < size.B; ++b) {
        const SolveAnswer<T> expected = caller.solve(core, samples[b]);
        CHECK(same_bits(expected.y.data(), sample_of<T>(solved[0], b, size.n)));
        CHECK(same_bits(expected.lam.data(), sample_of<T>(solved[1], b, size.k)));
        CHECK(same_bits(&expected.lower_bound, sample_of<double>(solved[2], b, 1)));
        CHECK(same_bits(expected.residual, sample_of<double>(solved[3], b, 3)));
        const AdjointAnswer<T> back = caller.adjoint(core, samples[b], expected.lam, std::vector<T>(size.n, T{1}));
        CHECK(same_bits(back.c_y.data(), sample_of<T>(context.outputs[0], b, size.n)));
        CHECK(same_bits(back.c_lam.data(), sample_of<T>(context.outputs[1], b, size.k)));
      }
    }
  }
}

TEST_CASE_TEMPLATE("what is malformed is told, and nothing kept", T, float, double) {
  const Library library;
  const Node solve(library.find<T>("BundleEntropySolve"), kUsual);
  const auto refusal = [&](std::vector<std::int64_t> slopes, std::vector<std::int64_t> offsets,
                           std::vector<std::int64_t> lam_start) {
    OrtKernelContext context{{zeros<T>(slopes), zeros<T>(offsets), zeros<T>(lam_start)}, {}, {}};
    return solve.run(context);
  };
  CHECK(refusal({2, 3, 4}, {2, 3}, {2, 3}) == "");
  for (const auto& slopes : {std::vector<std::int64_t>{}, {3, 4}, {2, 0, 4}, {2, 3, 0}, {1, 1, 1, 1, 1, 1, 1, 1, 1}})
    CHECK(refusal(slopes, {2, 3}, {2, 0}).find("BundleEntropySolve: slopes: expected [B, k, n]") != std::string::npos);
  for (const auto& offsets : {std::vector<std::int64_t>{}, {2, 4}, {1, 3}, {2, 3, 1}, {0, std::int64_t{1} << 62}})
    CHECK(refusal({2, 3, 4}, offsets, {2, 0}).find("offsets: expected [B, k] = [2, 3]") != std::string::npos);
  for (const auto& start : {std::vector<std::int64_t>{}, {2, 4}, {1, 3}, {0, std::int64_t{1} << 62}})
    CHECK(refusal({2, 3, 4}, {2, 3}, start).find("lam_start: expected [B, k_prev] with B = 2") != std::string::npos);
  // Sizes without an end, of no samples: nothing to compute, and nothing to overflow.
  CHECK(refusal({0, std::int64_t{1} << 62, std::int64_t{1} << 62}, {0, std::int64_t{1} << 62}, {0, 0}) == "");
  for (std::int64_t steps : {std::int64_t{-1}, std::int64_t{1'000'001}, std::numeric_limits<std::int64_t>::min()}) {
    const Node refused(solve.op, OrtKernelInfo{{{"steps", steps}}});
    CHECK(refused.refused.find("steps: expected an integer from 0 to 1000000") != std::string::npos);
  }
  CHECK(Node(solve.op, {}).refused.find("steps: expected an integer attribute, but got none") != std::string::npos);
  OrtSessionOptions again = library.options;
  CHECK(Node::told(library.add_to(again)).find("registered there already") != std::string::npos);
}

// The environment variable while this lives.
struct Limited {
  std::string before = std::getenv(icnnrt::kLimitVariable) ? std::getenv(icnnrt::kLimitVariable) : "";
  explicit Limited(const std::string& to) { setenv(icnnrt::kLimitVariable, to.c_str(), 1); }
  ~Limited() { setenv(icnnrt::kLimitVariable, before.c_str(), 1); }
};

TEST_CASE("a variable takes instruction sets away, and can ask for none that the processor lacks") {
  std::vector<std::string> names;
  std::istringstream listed(icnnrt::instruction_sets());
  for (std::string name; listed >> name;) names.push_back(name);
  const auto used = [](const std::string& limit) {
    const Limited limited(limit);
    const Library library;  // reads it as it is loaded
    return library.options.entries.at("ai.icnnrt.instruction_set");
  };
  const auto place = [&](const std::string& name) {
    return std::find(names.begin(), names.end(), name) - names.begin();
  };
  const std::string best = used("");
  REQUIRE(place(best) < static_cast<std::ptrdiff_t>(names.size()));
  for (const std::string& name : names) {
    CAPTURE(name);
    CHECK(used(name) == (place(name) > place(best) ? name : best));
  }
  const std::string wrong(names[0] + "_and_more_than_the_forty_bytes_that_a_message_shows");
  const Limited limited(wrong);
  void* const handle = dlopen(ICNNRT_TESTS_LIBRARY, RTLD_NOW | RTLD_LOCAL);
  OrtSessionOptions options;
  const std::string message = Node::told(Library::add_to(handle, options));
  CAPTURE(message);
  CHECK(message.find("ICNNRT_MAX_INSTRUCTION_SET: expected the name of an instruction set") != std::string::npos);
  CHECK(message.find('(' + std::string(icnnrt::instruction_sets()) + "), but got '" + wrong.substr(0, 40) + "';") !=
        std::string::npos);
  CHECK(options.domains.empty());
  dlclose(handle);
  CHECK(live.none());
}

TEST_CASE("memory that is not there is told once, however many threads want it") {
  const Library library;
  const Node solve(library.find<double>("BundleEntropySolve"), kUsual);
  for (unsigned threads : {1u, 4u}) {
    OrtKernelContext context{{zeros<double>({8, 30, 600}), zeros<double>({8, 30}), zeros<double>({8, 0})}, {}, {}};
    context.threads = threads;
    context.scarce = true;
    const std::string message = solve.run(context);
    CHECK(message.find("workspace for k = 30 cuts of n = 600 entries cannot be allocated (none left)") !=
          std::string::npos);
  }
}

TEST_CASE("what is too large to count is told before it is wanted") {
  const Library library;
  const Node solve(library.find<float>("BundleEntropySolve"), kUsual);
  // Tensors that say so much and hold nothing: nothing of them may be touched. n entries of one cut.
  constexpr std::int64_t n = std::int64_t{1} << 60;
  OrtKernelContext context{{OrtValue{{1, 1, n}, {}}, OrtValue{{1, 1}, {}}, OrtValue{{1, 0}, {}}}, {}, {}};
  context.counted_only = true;
  CHECK(solve.run(context).find("workspace can be counted in bytes") != std::string::npos);
}

TEST_CASE("shapes are inferred as far as they are known") {
  const Library library;
  for (const icnnrt::ort::CustomOp* op : library.options.domains[0]->operators) {
    const std::string name = op->GetName(Library::as_given(op));
    CAPTURE(name);
    if (name.find("Bundle") != 0) continue;  // test_qp_operators.cpp has the others
    OrtShapeInferContext context;
    context.inputs = {{icnnrt::ort::kFloat, {-1, 5, 7}, {"B", "", ""}}, {icnnrt::ort::kFloat, {-1, -1}, {"", "k"}}};
    context.inputs.push_back({icnnrt::ort::kFloat, {}, {}});  // of unknown rank
    context.inputs.push_back({icnnrt::ort::kFloat, {-1, -1}, {"", ""}});
    context.outputs.resize(4);
    CHECK(op->InferOutputShapeFn(Library::as_given(op), &context) == nullptr);
    CHECK(context.outputs[0].sizes == std::vector<std::int64_t>{-1, 7});
    CHECK(context.outputs[0].names == std::vector<std::string>{"B", ""});
    CHECK(context.outputs[0].type == icnnrt::ort::kFloat);
    CHECK(context.outputs[1].sizes == std::vector<std::int64_t>{-1, 5});
    if (name != "BundleEntropySolve") continue;
    CHECK(context.outputs[3].sizes == std::vector<std::int64_t>{-1, 3});
    CHECK(context.outputs[3].type == icnnrt::ort::kDouble);  // also where the operator asked is the one for double
  }
}

}  // namespace
}  // namespace icnnrt_tests
