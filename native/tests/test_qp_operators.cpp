// QPSolve, QPAdjoint, QPSensitivity and the sparse ones as a runtime uses them: many threads, shared parameters,
// errors, shapes.
#include <doctest/doctest.h>

#include "library.h"
#include "plans.h"

namespace icnnrt_tests {
namespace {

template <typename T>
std::vector<T> joined(const std::vector<Program<T>>& samples, std::vector<T> Program<T>::*part) {
  std::vector<T> all;
  for (const Program<T>& sample : samples) all.insert(all.end(), (sample.*part).begin(), (sample.*part).end());
  return all;
}

TEST_CASE_TEMPLATE("programs on any number of threads, the bits of the core", T, float, double) {
  Random random(101);
  ProgramCaller caller;
  for (const ProgramShape& shape : {ProgramShape{4, 3, 1}, {30, 20, 5}})
    for (unsigned threads : {1u, 4u}) {
      CAPTURE(shape.n);
      CAPTURE(threads);
      constexpr std::int64_t B = 9;
      const auto n = static_cast<std::int64_t>(shape.n), m = static_cast<std::int64_t>(shape.m),
                 q = static_cast<std::int64_t>(shape.q);
      std::vector<Program<T>> samples;
      for (std::int64_t b = 0; b < B; ++b) {
        samples.push_back(random_program<T>(random, shape, true));
        samples.back().Q = samples.front().Q;  // shared, so the answers are others than were chosen
      }
      samples[1].p[0] = std::numeric_limits<T>::quiet_NaN();  // and its neighbours never know
      const Library library;
      const Node solve(library.find<T>("QPSolve"), OrtKernelInfo{{{"steps", 50}}}),
          adjoint(library.find<T>("QPAdjoint"), {}), sensitivity(library.find<T>("QPSensitivity"), {});
      const OrtValue Q = tensor<T>({1, n, n}, samples[0].Q), G = tensor<T>({B, m, n}, joined(samples, &Program<T>::G)),
                     A = tensor<T>({B, q, n}, joined(samples, &Program<T>::A));
      OrtKernelContext context{
          {Q, tensor<T>({B, n}, joined(samples, &Program<T>::p)), G,
           tensor<T>({B, m}, joined(samples, &Program<T>::h_lower)), tensor<T>({B, m}, joined(samples, &Program<T>::h)),
           A, tensor<T>({B, q}, joined(samples, &Program<T>::b)),
           tensor<T>({B, n}, joined(samples, &Program<T>::lower)),
           tensor<T>({B, n}, joined(samples, &Program<T>::upper)), zeros<T>({1, 0})},
          {},
          {}};
      context.threads = threads;
      CHECK(solve.run(context) == "");
      const std::vector<OrtValue> solved = context.outputs;
      const std::vector<T> z_bar(shape.n, T{1});
      context.inputs = {Q,
                        G,
                        A,
                        solved[1],
                        solved[3],
                        solved[4],
                        solved[5],
                        solved[7],
                        tensor<T>({1, n}, z_bar),
                        zeros<T>({1, 0}),
                        zeros<T>({1, 0}),
                        zeros<T>({1, 0})};
      CHECK(sensitivity.run(context) == "");
      const std::vector<OrtValue> told = context.outputs;
      CHECK(adjoint.run(context) == "");
      for (std::size_t b = 0; b < samples.size(); ++b) {
        const ProgramAnswer<T> answer = caller.solve(icnnrt::qp_kernels<T>(), samples[b]);
        CHECK(same_bits(answer.z.data(), sample_of<T>(solved[0], b, shape.n)));
        CHECK(same_bits(answer.slack.data(), sample_of<T>(solved[4], b, shape.m)));
        CHECK(same_bits(answer.residual.data(), sample_of<double>(solved[6], b, 3)));
        CHECK(sample_of<std::int32_t>(solved[7], b, 1)[0] == static_cast<std::int32_t>(answer.status));
        CHECK((answer.status == icnnrt::QpStatus::kNotFiniteInput) == (b == 1));
        const ProgramAdjoint<T> back = caller.adjoint(icnnrt::qp_kernels<T>(), samples[b], answer, z_bar);
        CHECK(same_bits(back.d_z.data(), sample_of<T>(context.outputs[0], b, shape.n)));
        CHECK(same_bits(back.d_lam.data(), sample_of<T>(context.outputs[1], b, shape.m)));
        CHECK(same_bits(back.d_z.data(), sample_of<T>(told[0], b, shape.n)));
        CHECK(same_bits(&back.share, sample_of<double>(told[4], b, 1)));
        CHECK(sample_of<std::int32_t>(told[5], b, 1)[0] == back.weak);
      }
      context.scarce = true;  // only large workspaces are asked for
      if (shape.n > 20)
        CHECK(adjoint.run(context).find("n = 30 variables, m = 20 inequalities and q = 5 equalities cannot") !=
              std::string::npos);
    }
}

TEST_CASE("programs that are malformed or too large are told") {
  const Library library;
  const Node solve(library.find<double>("QPSolve"), OrtKernelInfo{{{"steps", 50}}});
  const auto refusal = [&](std::size_t index, std::vector<std::int64_t> sizes) {
    OrtKernelContext context{
        {zeros<double>({2, 3, 3}), zeros<double>({1, 3}), zeros<double>({2, 4, 3}), zeros<double>({1, 0}),
         zeros<double>({2, 4}), zeros<double>({1, 0, 3}), zeros<double>({1, 0}), zeros<double>({1, 0}),
         zeros<double>({2, 3}), zeros<double>({1, 0})},
        {},
        {}};
    if (index < 10) context.inputs[index] = zeros<double>(std::move(sizes));
    return solve.run(context);
  };
  CHECK(refusal(10, {}) == "");
  for (std::size_t index = 0; index < 10; ++index)
    for (const auto& sizes : {std::vector<std::int64_t>{}, {7}, {2, 7}, {7, 3, 3, 1}, {3, 3, 7}, {2, 1}})
      CHECK(refusal(index, sizes).find("ai.icnnrt::QPSolve: ") == 0);
  CHECK(refusal(1, {5, 3}).find("p: expected a leading axis of B = 2") != std::string::npos);
  constexpr std::int64_t n = std::int64_t{1} << 30;
  OrtKernelContext large{{OrtValue{{1, n, n}, {}}, OrtValue{{1, n}, {}}, OrtValue{{1, 0, n}, {}}, OrtValue{{1, 0}, {}},
                          OrtValue{{1, 0}, {}}, OrtValue{{1, 0, n}, {}}, OrtValue{{1, 0}, {}}, OrtValue{{1, 0}, {}},
                          OrtValue{{1, 0}, {}}, OrtValue{{1, 0}, {}}},
                         {},
                         {}};
  large.counted_only = true;
  CHECK(solve.run(large).find("workspace can be counted in bytes") != std::string::npos);
  const Node refused(solve.op, OrtKernelInfo{{{"steps", -1}}});
  CHECK(refused.refused.find("steps: expected an integer from 0 to 1000000") != std::string::npos);
}

TEST_CASE_TEMPLATE("settings are inputs, and the steps taken an output", T, float, double) {
  Random random(7);
  const Program<T> program = random_program<T>(random, {6, 4, 2}, true);
  const Library library;
  const Node solve(library.find<T>("QuadraticProgram"), {}), fixed(library.find<T>("QPSolve"), kUsual);
  const auto run = [&](const Node& node, bool settings, double tolerance = 0.0, std::int64_t steps = 50,
                       double seconds = 0.0) {
    OrtKernelContext context{
        {tensor<T>({1, 6, 6}, program.Q), tensor<T>({1, 6}, program.p), tensor<T>({1, 4, 6}, program.G),
         tensor<T>({1, 4}, program.h_lower), tensor<T>({1, 4}, program.h), tensor<T>({1, 2, 6}, program.A),
         tensor<T>({1, 2}, program.b), tensor<T>({1, 6}, program.lower), tensor<T>({1, 6}, program.upper),
         zeros<T>({1, 0})},
        {},
        {}};
    if (settings) {
      context.inputs.push_back(tensor<double>({}, {tolerance}));
      context.inputs.push_back(tensor<std::int64_t>({1}, {steps}));
      context.inputs.push_back(tensor<double>({}, {seconds}));
    }
    CHECK(node.run(context) == "");
    return context.outputs;
  };
  const auto status = [](const std::vector<OrtValue>& outputs) { return sample_of<std::int32_t>(outputs[7], 0, 1)[0]; };
  const auto taken = [](const std::vector<OrtValue>& outputs) { return sample_of<std::int32_t>(outputs[9], 0, 1)[0]; };
  const auto failed = static_cast<std::int32_t>(icnnrt::QpStatus::kFailed);
  const std::vector<OrtValue> usual = run(solve, true), same = run(fixed, false);
  CHECK(status(usual) == 0);
  CHECK(taken(usual) > 0);
  for (std::size_t i = 0; i < same.size(); ++i) CHECK(usual[i].bytes == same[i].bytes);
  // As many steps as were taken are enough, and one less is not.
  CHECK(run(solve, true, 0.0, taken(usual))[0].bytes == usual[0].bytes);
  CHECK(status(run(solve, true, 0.0, taken(usual) - 1)) != 0);
  // What is no tolerance is that of the type; no double meets the least one there is.
  for (const double none : {-1.0, HUGE_VAL, std::numeric_limits<double>::quiet_NaN()})
    CHECK(run(solve, true, none)[0].bytes == usual[0].bytes);
  CHECK(status(run(solve, true, 1e-300)) != 0);
  const std::vector<OrtValue> loose = run(solve, true, 1e-2);
  CHECK(status(loose) == 0);
  CHECK(taken(loose) <= taken(usual));
  for (const double residual : sample_of<double>(loose[6], 0, 3)) CHECK(residual <= 1e-2);
  const std::vector<OrtValue> late = run(solve, true, 0.0, 50, 1e-9);
  CHECK(status(late) == failed);
  CHECK(taken(late) == 0);
  CHECK(run(solve, true, 0.0, 50, 1e3)[0].bytes == usual[0].bytes);
  OrtKernelContext context;
  context.inputs.assign(10, zeros<T>({1, 0}));
  for (int i = 0; i < 3; ++i) context.inputs.push_back(zeros<double>({2}));
  CHECK(solve.run(context).find("QuadraticProgram: tolerance: expected one number, but got [2]") != std::string::npos);
}

TEST_CASE_TEMPLATE("sparse programs, one of which does not keep to the plan", T, float, double) {
  Random random(31);
  constexpr std::int64_t B = 5, n = 12, m = 7, q = 3;
  const Program<T> first = [&] {
    Program<T> program = random_program<T>(random, {n, m, q}, true);
    thin_out(program, random, 4);
    return program;
  }();
  std::vector<Program<T>> samples(B, first);
  for (Program<T>& sample : samples)
    for (T& p : sample.p) p += static_cast<T>(random.uniform(-0.3, 0.3));
  const std::vector<std::int32_t> plan = plan_of(first, random);
  std::vector<T>& stray = samples[2].Q;
  for (std::size_t i = 0; i < n; ++i)
    for (std::size_t j = 0; j < i; ++j)
      if (stray[i * n + j] == T{0}) stray[i * n + j] = stray[j * n + i] = static_cast<T>(0.01);
  icnnrt::QpPlan read{};
  REQUIRE(icnnrt::read_plan(plan.data(), plan.size(), n, m, q, read) == nullptr);
  ProgramCaller sparse, dense;
  sparse.plan = &read;
  const Library library;
  const Node solve(library.find<T>("SparseQuadraticProgram"), {}),
      sensitivity(library.find<T>("SparseQPSensitivity"), {});
  const auto numbers = static_cast<std::int64_t>(plan.size());
  for (unsigned threads : {1u, 3u}) {
    const OrtValue Q = tensor<T>({B, n, n}, joined(samples, &Program<T>::Q)), G = tensor<T>({1, m, n}, first.G),
                   A = tensor<T>({1, q, n}, first.A);
    OrtKernelContext context{
        {Q, tensor<T>({B, n}, joined(samples, &Program<T>::p)), G, tensor<T>({1, m}, first.h_lower),
         tensor<T>({1, m}, first.h), A, tensor<T>({1, q}, first.b), tensor<T>({1, n}, first.lower),
         tensor<T>({1, n}, first.upper), zeros<T>({1, 0}), tensor<double>({}, {0.0}), tensor<std::int64_t>({}, {50}),
         tensor<double>({}, {0.0}), tensor<std::int32_t>({numbers}, plan)},
        {},
        {}};
    context.threads = threads;
    CHECK(solve.run(context) == "");
    const std::vector<OrtValue> solved = context.outputs;
    OrtKernelContext back{
        {Q, G, A, solved[1], solved[3], solved[4], solved[5], solved[7], tensor<T>({B, n}, std::vector<T>(B * n, T{1})),
         zeros<T>({1, 0}), zeros<T>({1, 0}), zeros<T>({1, 0}), tensor<std::int32_t>({numbers}, plan)},
        {},
        {}};
    back.threads = threads;
    CHECK(sensitivity.run(back) == "");
    for (std::size_t b = 0; b < B; ++b) {
      ProgramCaller& caller = b == 2 ? dense : sparse;
      const ProgramAnswer<T> answer = caller.solve(icnnrt::qp_kernels<T>(), samples[b]);
      CHECK(answer.status == icnnrt::QpStatus::kSolved);
      CHECK(same_bits(answer.z.data(), sample_of<T>(solved[0], b, n)));
      const ProgramAdjoint<T> adjoint =
          caller.adjoint(icnnrt::qp_kernels<T>(), samples[b], answer, std::vector<T>(n, T{1}));
      CHECK(same_bits(adjoint.d_z.data(), sample_of<T>(back.outputs[0], b, n)));
    }
    // Without memory for a dense one, what keeps to the plan is no longer solved either: it is one call.
    context.scarce = true;
    CHECK(solve.run(context).find("cannot be allocated") != std::string::npos);
    context.scarce = false;
    context.inputs[13] = tensor<std::int32_t>({numbers - 1}, {plan.begin(), plan.end() - 1});
    CHECK(solve.run(context).find("SparseQuadraticProgram: plan: expected as many numbers as its head says, for n = "
                                  "12 variables, m = 7 inequalities and q = 3 equalities, but got another of shape") !=
          std::string::npos);
    context.inputs[13] = zeros<std::int32_t>({0});
    CHECK(solve.run(context).find("plan: expected a plan of this version") != std::string::npos);
    context.inputs[13] = zeros<std::int32_t>({1, numbers});
    CHECK(solve.run(context).find("plan: expected one row of integers") != std::string::npos);
  }
}

TEST_CASE_TEMPLATE("what a plan does not solve is solved without one where that may help, and can", T, float, double) {
  Random random(32);
  constexpr std::int64_t n = 12, m = 7, q = 3;
  Program<T> program = random_program<T>(random, {n, m, q}, true);
  thin_out(program, random, 4);
  const std::vector<std::int32_t> plan = plan_of(program, random);
  icnnrt::QpPlan read{};
  REQUIRE(icnnrt::read_plan(plan.data(), plan.size(), n, m, q, read) == nullptr);
  ProgramCaller sparse;
  sparse.plan = &read;
  const Library library;
  const Node solve(library.find<T>("SparseQuadraticProgram"), {});
  const auto run = [&](std::int64_t steps, bool scarce) {
    const auto box = [&](const std::vector<T>& a) { return a.empty() ? zeros<T>({1, 0}) : tensor<T>({1, n}, a); };
    OrtKernelContext context{
        {tensor<T>({1, n, n}, program.Q), tensor<T>({1, n}, program.p), tensor<T>({1, m, n}, program.G),
         tensor<T>({1, m}, program.h_lower), tensor<T>({1, m}, program.h), tensor<T>({1, q, n}, program.A),
         tensor<T>({1, q}, program.b), box(program.lower), box(program.upper), zeros<T>({1, 0}),
         tensor<double>({}, {0.0}), tensor<std::int64_t>({}, {steps}), tensor<double>({}, {0.0}),
         tensor<std::int32_t>({static_cast<std::int64_t>(plan.size())}, plan)},
        {},
        {}};
    context.scarce = scarce;
    CHECK(solve.run(context) == "");
    return context.outputs;
  };
  const auto status = [](const std::vector<OrtValue>& outputs) {
    return static_cast<icnnrt::QpStatus>(sample_of<std::int32_t>(outputs[7], 0, 1)[0]);
  };
  // Of few steps all were taken: it is the answer of the plan. Dense ones would try an active set, which needs one.
  const std::vector<OrtValue> few = run(2, false);
  const ProgramAnswer<T> by_plan = sparse.solve(icnnrt::qp_kernels<T>(), program, 2);
  CHECK(status(few) == by_plan.status);
  CHECK(by_plan.status != icnnrt::QpStatus::kSolved);
  CHECK(sample_of<std::int32_t>(few[9], 0, 1)[0] == 2);
  CHECK(same_bits(by_plan.residual.data(), sample_of<double>(few[6], 0, 3)));
  // A ray is looked for without a plan, where there is memory for it.
  program.Q.assign(program.Q.size(), T{0});
  program.lower.clear();
  program.upper.clear();
  CHECK(status(run(60, false)) == icnnrt::QpStatus::kDualInfeasible);
  CHECK(status(run(60, true)) == sparse.solve(icnnrt::qp_kernels<T>(), program, 60).status);
}

TEST_CASE("shapes of programs are inferred: the batch is the largest leading axis known") {
  const Library library;
  const auto infer = [&](std::int64_t of_Q, const char* name_of_Q, std::int64_t of_p, const char* name_of_p) {
    const icnnrt::ort::CustomOp* const op = library.find<double>("QPSolve");
    OrtShapeInferContext context;
    const auto input = [&](std::vector<std::int64_t> sizes, std::vector<std::string> names) {
      context.inputs.push_back({icnnrt::ort::kFloat, std::move(sizes), std::move(names)});
    };
    input({of_Q, 4, 4}, {name_of_Q, "", ""});
    input({of_p, 4}, {name_of_p, ""});
    input({1, 3, 4}, {"", "", ""});
    input({1, 0}, {"", ""});
    input({1, 3}, {"", ""});
    input({1, 2, 4}, {"", "", ""});
    for (int i = 0; i < 4; ++i) input({1, 0}, {"", ""});
    context.outputs.resize(9);
    CHECK(op->InferOutputShapeFn(Library::as_given(op), &context) == nullptr);
    return context.outputs;
  };
  using Sizes = std::vector<std::int64_t>;
  CHECK(infer(1, "", 8, "")[0].sizes == Sizes{8, 4});
  CHECK(infer(1, "", 8, "")[8].sizes == Sizes{8, 13});
  CHECK(infer(8, "", 1, "")[7].sizes == Sizes{8});
  CHECK(infer(1, "", 8, "")[7].type == icnnrt::ort::kInt32);
  CHECK(infer(1, "", 8, "")[6].type == icnnrt::ort::kDouble);
  CHECK(infer(1, "", 8, "")[8].type == icnnrt::ort::kFloat);  // also where the operator asked is the one for double
  CHECK(infer(1, "", 1, "")[2].sizes == Sizes{1, 2});
  CHECK(infer(1, "", -1, "B")[0].names[0] == "B");
  CHECK(infer(-1, "B", 1, "")[0].names[0] == "B");
  CHECK(infer(-1, "", 1, "")[0].sizes.empty());  // perhaps more than one
  CHECK(infer(-1, "", 8, "")[0].sizes == Sizes{8, 4});
}

}  // namespace
}  // namespace icnnrt_tests
