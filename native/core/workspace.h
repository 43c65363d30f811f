// The scratch memory of one call, laid out.
#pragma once

#include "layout.h"
#include "point.h"
#include "symmetric.h"

namespace icnnrt {
namespace ICNNRT_INSTRUCTION_SET {

// What a solve or an adjoint needs; `workspace_bytes` in dispatch.cpp allows for it.
struct Workspace {
  std::size_t ld;                              // of H and A: k padded
  double *H, *A;                               // [k, ld]
  double *e, *lam, *best, *trial;              // [k]
  double *start, *sizes, *gradient, *z;        // [k]
  double *inverse, *step, *ones;               // [ld]
  double *w, *r, *eta, *m, *direction;         // [ld]
  double* centres;                             // [ld] of a Gram matrix
  std::size_t *rows, *free_rows, *candidates;  // [k + 1]
  Point point, other;
  double *u, *u_coefficient;  // [blocks, W]
  double* short_rows;         // [k, W] rows of fewer than W columns, padded with zeros
};

ICNNRT_INLINE Point take_point(Layout& layout, std::size_t columns, std::size_t k) {
  Point point{};
  point.s = layout.take<double>(columns);
  point.y = layout.take<double>(columns);
  point.c = layout.take<double>(columns);
  point.D = layout.take<double>(columns);
  point.v = layout.take<double>(k);
  return point;
}

static Workspace lay_out(void* memory, std::size_t k, std::size_t n) {
  Layout layout{static_cast<unsigned char*>(memory)};
  Workspace ws{};
  const std::size_t ld = padded(k), columns = padded(n);
  ws.ld = ld;
  ws.H = layout.take<double>(k * ld);
  ws.A = layout.take<double>(k * ld);
  double** const vectors[] = {&ws.e,        &ws.lam, &ws.best,    &ws.trial,     &ws.start,  &ws.sizes,
                              &ws.gradient, &ws.z,   &ws.inverse, &ws.step,      &ws.ones,   &ws.w,
                              &ws.r,        &ws.eta, &ws.m,       &ws.direction, &ws.centres};
  for (double** const vector : vectors) *vector = layout.take<double>(ld);
  ws.rows = layout.take<std::size_t>(k + 1);
  ws.free_rows = layout.take<std::size_t>(k + 1);
  ws.candidates = layout.take<std::size_t>(k + 1);
  ws.point = take_point(layout, columns, ld);
  ws.other = take_point(layout, columns, ld);
  ws.u = layout.take<double>(columns);
  ws.u_coefficient = layout.take<double>(columns);
  ws.short_rows = layout.take<double>(k * W);
  return ws;
}

}  // namespace ICNNRT_INSTRUCTION_SET
}  // namespace icnnrt
